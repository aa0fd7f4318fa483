/* Selective scan and causal convolution on the CPU, forward and backward, in float32.
 *
 * Plain C with GCC's and Clang's vector extensions. A vector holds neighbouring channels (a tile); the states of a tile
 * stay in registers while time runs. `order` is read in here, so no tensor is ever permuted. A work item is a group of
 * tiles and every sum has one order, whatever the number of threads: two runs agree to the last bit.
 *
 * STATES (N of the scan) and TAPS (W of the convolution) are fixed when this is compiled, see cpu_backend.py.
 */
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define GROUP 8  /* tiles of a work item: dB and dC are added up over them before they are stored */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* a vec anywhere in memory */
#define ZERO ((vec){0})

/* (K, B, L, channels) with contiguous channels. */
typedef struct {
    float *at;
    int64_t k, b, t;
} rows;

INLINE float *row(rows x, int64_t k, int64_t b, int64_t t) { return x.at + k * x.k + b * x.b + t * x.t; }

/* The token that direction k reads at a step. */
INLINE int64_t token(const int64_t *order, int64_t k, int64_t L, int64_t step) {
    return order ? order[k * L + step] : step;
}

#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))
#define GROUPS(width) CEIL_DIV(width, GROUP * LANES)
#define CHUNKS(L) CEIL_DIV(L, CHUNK)

int scan_groups(int width) { return GROUPS(width); }

/* Group, image and direction of a work item. */
#define UNRAVEL(item, groups, batch) \
    int64_t g = (item) % (groups), b = (item) / (groups) % (batch), k = (item) / (groups) / (batch);

/* Run `body` for tile i of group g: m channels from c on. m is a constant but in the last, ragged tile. */
#define EACH_TILE(g, width, body)                                      \
    for (int i = 0; i < GROUP; i++) {                                  \
        const int64_t c = ((g) * GROUP + i) * LANES, left = width - c; \
        if (left >= LANES) {                                           \
            const int m = LANES;                                       \
            body;                                                      \
        } else if (left > 0) {                                         \
            const int m = left;                                        \
            body;                                                      \
        }                                                              \
    }

/* ---- vectors ---- */

INLINE vec load(const float *p, int m) {
    if (m == LANES) return *(const loose *)p;
    vec v = ZERO;
    memcpy(&v, p, m * sizeof(float));
    return v;
}

INLINE void store(float *p, vec v, int m) {
    if (m == LANES)
        *(loose *)p = v;
    else
        memcpy(p, &v, m * sizeof(float));
}

INLINE vec blend(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

INLINE float sum(const vec *v) { /* in fours, which needs no shuffle of a wide vector */
    typedef float four __attribute__((vector_size(16), may_alias));
    four s = *(const four *)v;
    for (int i = 1; i < LANES / 4; i++) s += ((const four *)v)[i];
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* 2^x for x <= 127 to 1e-7: 2^round(x) written as the bits of a float, times a minimax polynomial with p(0) = 1. */
INLINE vec exp2v(vec x) {
    const float round = 12582912 + 127; /* 1.5 * 2^23 leaves no bits for a fraction; 127 is the exponent's bias */
    x = blend(x < -126, ZERO - 126, x);
    vec r = x + round, f = x - (r - round);
    vec p = f * 1.535336194e-4f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472029e-1f;
    p = p * f + 1;
    return p * (vec)((ivec)r << 23);
}

#define LOG2_E 1.44269504f

/* 1 / (1 + exp(-x)), and z = exp(-|x|) */
INLINE vec sigmoid(vec x, vec *z) {
    *z = exp2v(blend(x > 0, -x, x) * LOG2_E);
    return blend(x > 0, ZERO + 1, *z) / (*z + 1);
}

/* max(x, 0) + log(1 + z) with log(1 + z) = 2 artanh(z / (2 + z)), and the derivative */
INLINE vec softplus(vec x, vec *slope) {
    vec z;
    *slope = sigmoid(x, &z);
    vec s = z / (z + 2), q = s * s;
    vec p = q * (1.f / 13) + 1.f / 11;
    p = p * q + 1.f / 9;
    p = p * q + 1.f / 7;
    p = p * q + 1.f / 5;
    p = p * q + 1.f / 3;
    p = p * q + 1;
    return blend(x > 0, x, ZERO) + 2 * s * p;
}

/* ---- threads: those of the OpenMP runtime that torch runs on, handed over by cpu_backend.py ---- */

static void (*omp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*omp_thread)(void), (*omp_threads)(void);

void use_openmp(void *parallel, void *thread, void *threads) {
    omp_parallel = parallel;
    omp_thread = thread;
    omp_threads = threads;
}

typedef struct {
    void (*work)(const void *job, int64_t item);
    const void *job;
    int64_t items;
} team;

static void share(void *arg) {
    const team *t = arg;
    const int64_t thread = omp_thread(), threads = omp_threads();
    for (int64_t i = t->items * thread / threads; i < t->items * (thread + 1) / threads; i++) t->work(t->job, i);
}

static void run(void (*work)(const void *, int64_t), const void *job, int64_t items, int threads) {
    team t = {work, job, items};
    if (threads > 1 && omp_parallel)
        omp_parallel(share, &t, threads, 0);
    else
        for (int64_t i = 0; i < items; i++) work(job, i);
}

/* ---- selective scan ---- */

typedef struct {
    int64_t K, batch, L, width;
    rows u, dt, B, C, dy;      /* (K, B, L, D); B and C (K, B, L, N) */
    const int64_t *order;      /* (K, L), or NULL */
    const float *A, *D, *bias; /* (K, N, D), (K, D), (K, D) */
    float *y;                  /* (K, B, L, D) */
    float *states;             /* (K, B, chunks, N, D): the state before each chunk; NULL: no backward will follow */
    float *du, *ddt;           /* (K, B, L, D) */
    float *dA, *dD, *dbias;    /* of each image: (K, B, N, D), (K, B, D), (K, B, D) */
    float *dB, *dC;            /* of each group: (groups, K, B, L, N) */
} scan;

INLINE void scan_forward_tile(const scan *s, int64_t k, int64_t b, int64_t c, int m) {
    const int64_t kb = k * s->batch + b, L = s->L, width = s->width;
    const vec D = load(s->D + k * width + c, m), bias = load(s->bias + k * width + c, m);
    vec h[STATES], A[STATES];
    for (int n = 0; n < STATES; n++) {
        h[n] = ZERO;
        A[n] = load(s->A + (k * STATES + n) * width + c, m) * LOG2_E;
    }
    for (int64_t step = 0; step < L; step++) {
        if (s->states && step % CHUNK == 0)
            for (int n = 0; n < STATES; n++)
                store(s->states + ((kb * CHUNKS(L) + step / CHUNK) * STATES + n) * width + c, h[n], m);
        const int64_t t = token(s->order, k, L, step);
        const float *B = row(s->B, k, b, t), *C = row(s->C, k, b, t);
        vec slope, delta = softplus(load(row(s->dt, k, b, t) + c, m) + bias, &slope);
        vec u = load(row(s->u, k, b, t) + c, m), x = delta * u, y = D * u;
        for (int n = 0; n < STATES; n++) {
            h[n] = exp2v(delta * A[n]) * h[n] + x * B[n];
            y += h[n] * C[n];
        }
        store(s->y + (kb * L + t) * width + c, y, m);
    }
}

static void scan_forward_group(const void *job, int64_t item) {
    const scan *s = job;
    UNRAVEL(item, GROUPS(s->width), s->batch)
    EACH_TILE(g, s->width, scan_forward_tile(s, k, b, c, m))
}

void scan_forward(const scan *s, int threads) {
    run(scan_forward_group, s, s->K * s->batch * GROUPS(s->width), threads);
}

typedef struct { /* what the backward of a tile hands from chunk to chunk */
    vec dh[STATES], dA[STATES], dD, dbias;
} carry;

/* One chunk of one tile: its states again from the stored one, then back through time. */
INLINE void scan_backward_tile(const scan *s, int64_t k, int64_t b, int64_t c, int m, int64_t chunk, carry *r,
                               vec (*dB)[STATES], vec (*dC)[STATES]) {
    const int64_t kb = k * s->batch + b, L = s->L, width = s->width, first = chunk * CHUNK;
    const int steps = L - first < CHUNK ? L - first : CHUNK;
    const vec D = load(s->D + k * width + c, m), bias = load(s->bias + k * width + c, m);
    vec h[CHUNK + 1][STATES], decay[CHUNK][STATES], delta[CHUNK], slope[CHUNK], A[STATES];
    for (int n = 0; n < STATES; n++) {
        h[0][n] = load(s->states + ((kb * CHUNKS(L) + chunk) * STATES + n) * width + c, m);
        A[n] = load(s->A + (k * STATES + n) * width + c, m);
    }
    for (int i = 0; i < steps; i++) {
        const int64_t t = token(s->order, k, L, first + i);
        const float *B = row(s->B, k, b, t);
        delta[i] = softplus(load(row(s->dt, k, b, t) + c, m) + bias, &slope[i]);
        vec x = delta[i] * load(row(s->u, k, b, t) + c, m), scaled = delta[i] * LOG2_E;
        for (int n = 0; n < STATES; n++) {
            decay[i][n] = exp2v(scaled * A[n]);
            h[i + 1][n] = decay[i][n] * h[i][n] + x * B[n];
        }
    }
    for (int i = steps - 1; i >= 0; i--) {
        const int64_t t = token(s->order, k, L, first + i), at = (kb * L + t) * width + c;
        const float *B = row(s->B, k, b, t), *C = row(s->C, k, b, t);
        vec u = load(row(s->u, k, b, t) + c, m), dy = load(row(s->dy, k, b, t) + c, m), x = delta[i] * u;
        vec dx = ZERO, ddelta = ZERO;
        for (int n = 0; n < STATES; n++) {
            vec dh = r->dh[n] + dy * C[n];
            dC[i][n] += dy * h[i + 1][n];
            dB[i][n] += dh * x;
            dx += dh * B[n];
            r->dh[n] = dh * decay[i][n];
            vec dexponent = r->dh[n] * h[i][n];
            ddelta += dexponent * A[n];
            r->dA[n] += dexponent * delta[i];
        }
        vec ddt = (ddelta + dx * u) * slope[i];
        r->dbias += ddt;
        r->dD += dy * u;
        store(s->ddt + at, ddt, m);
        store(s->du + at, dx * delta[i] + dy * D, m);
    }
}

static void scan_backward_group(const void *job, int64_t item) {
    const scan *s = job;
    UNRAVEL(item, GROUPS(s->width), s->batch)
    const int64_t kb = k * s->batch + b, L = s->L, width = s->width;
    carry r[GROUP];
    memset(r, 0, sizeof r);
    for (int64_t chunk = CHUNKS(L) - 1; chunk >= 0; chunk--) {
        vec dB[CHUNK][STATES], dC[CHUNK][STATES]; /* still one number a lane */
        memset(dB, 0, sizeof dB);
        memset(dC, 0, sizeof dC);
        EACH_TILE(g, width, scan_backward_tile(s, k, b, c, m, chunk, &r[i], dB, dC))
        for (int i = 0; i < CHUNK && chunk * CHUNK + i < L; i++) {
            const int64_t t = token(s->order, k, L, chunk * CHUNK + i);
            const int64_t at = ((g * s->K * s->batch + kb) * L + t) * STATES;
            for (int n = 0; n < STATES; n++) {
                s->dB[at + n] = sum(&dB[i][n]);
                s->dC[at + n] = sum(&dC[i][n]);
            }
        }
    }
    EACH_TILE(g, width, {
        for (int n = 0; n < STATES; n++) store(s->dA + (kb * STATES + n) * width + c, r[i].dA[n], m);
        store(s->dD + kb * width + c, r[i].dD, m);
        store(s->dbias + kb * width + c, r[i].dbias, m);
    })
}

void scan_backward(const scan *s, int threads) {
    run(scan_backward_group, s, s->K * s->batch * GROUPS(s->width), threads);
}

/* ---- causal depthwise convolution and SiLU ---- */

typedef struct {
    int64_t K, batch, L, width;
    rows x, dy;                 /* x (1, B, L, D), one for all directions; dy (K, B, L, D) */
    const int64_t *order;       /* (K, L), or NULL */
    const float *weight, *bias; /* (K, W, D) from the present token's tap into the past; (K, D) */
    float *y;                   /* (K, B, L, D) */
    float *dx;                  /* (B, L, D) */
    float *dweight, *dbias;     /* of each image: (B, K, W, D), (B, K, D) */
} conv;

INLINE void conv_forward_tile(const conv *s, int64_t k, int64_t b, int64_t c, int m) {
    const int64_t L = s->L, width = s->width;
    const vec bias = load(s->bias + k * width + c, m);
    vec w[TAPS], x[TAPS]; /* x[j]: the token of j steps ago */
    for (int j = 0; j < TAPS; j++) {
        w[j] = load(s->weight + (k * TAPS + j) * width + c, m);
        x[j] = ZERO;
    }
    for (int64_t step = 0; step < L; step++) {
        const int64_t t = token(s->order, k, L, step);
        for (int j = TAPS - 1; j > 0; j--) x[j] = x[j - 1];
        x[0] = load(row(s->x, 0, b, t) + c, m);
        vec z, a = bias;
        for (int j = 0; j < TAPS; j++) a += w[j] * x[j];
        store(s->y + ((k * s->batch + b) * L + t) * width + c, a * sigmoid(a, &z), m);
    }
}

static void conv_forward_group(const void *job, int64_t item) {
    const conv *s = job;
    UNRAVEL(item, GROUPS(s->width), s->batch)
    EACH_TILE(g, s->width, conv_forward_tile(s, k, b, c, m))
}

void conv_forward(const conv *s, int threads) {
    run(conv_forward_group, s, s->K * s->batch * GROUPS(s->width), threads);
}

INLINE void conv_backward_tile(const conv *s, int64_t k, int64_t b, int64_t c, int m) {
    const int64_t L = s->L, width = s->width, bk = b * s->K + k;
    const vec bias = load(s->bias + k * width + c, m);
    vec w[TAPS], dw[TAPS], x[TAPS], dx[TAPS], dbias = ZERO; /* dx[j]: of x[j], so far */
    for (int j = 0; j < TAPS; j++) {
        w[j] = load(s->weight + (k * TAPS + j) * width + c, m);
        dw[j] = x[j] = dx[j] = ZERO;
    }
    for (int64_t step = 0; step < L + TAPS - 1; step++) { /* a token's dx is whole TAPS - 1 steps after it was read */
        for (int j = TAPS - 1; j > 0; j--) {
            x[j] = x[j - 1];
            dx[j] = dx[j - 1];
        }
        dx[0] = ZERO;
        if (step < L) {
            const int64_t t = token(s->order, k, L, step);
            x[0] = load(row(s->x, 0, b, t) + c, m);
            vec z, a = bias;
            for (int j = 0; j < TAPS; j++) a += w[j] * x[j];
            vec p = sigmoid(a, &z), da = load(row(s->dy, k, b, t) + c, m) * p * (1 + a * (1 - p));
            for (int j = 0; j < TAPS; j++) {
                dx[j] += w[j] * da;
                dw[j] += x[j] * da;
            }
            dbias += da;
        }
        if (step >= TAPS - 1) {
            float *out = s->dx + (b * L + token(s->order, k, L, step - (TAPS - 1))) * width + c;
            store(out, k ? load(out, m) + dx[TAPS - 1] : dx[TAPS - 1], m);
        }
    }
    for (int j = 0; j < TAPS; j++) store(s->dweight + (bk * TAPS + j) * width + c, dw[j], m);
    store(s->dbias + bk * width + c, dbias, m);
}

static void conv_backward_group(const void *job, int64_t item) { /* from k = 0 on, in turn: directions add to one dx */
    const conv *s = job;
    UNRAVEL(item, GROUPS(s->width), s->batch)
    for (; k < s->K; k++) EACH_TILE(g, s->width, conv_backward_tile(s, k, b, c, m))
}

void conv_backward(const conv *s, int threads) { run(conv_backward_group, s, s->batch * GROUPS(s->width), threads); }
