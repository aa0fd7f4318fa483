// Selective scan on NVIDIA GPUs, forward and backward: bfloat16 activations, 16 states, channels last.
//
// cuda_backend.py compiles this file through NVRTC, so it includes nothing; tests/cuda_emulation.cpp includes it and
// runs it on a CPU. Names and shapes are those of torch_backend.py, N = 16.
//
// A path is one image in one direction. A thread owns one channel of a path and walks through its tokens with the 16
// states in registers; a warp owns a group of 32 channels, a block WARPS groups. Tokens are read in chunks of CHUNK:
// while one chunk is computed, the next one is on its way into shared memory. The forward pass stores the state before
// every chunk. The backward pass starts from it, computes the states of the chunk again, and then walks back.
// No atomics: what several threads add to is added up in one order, so two runs are equal bit for bit.
//
// Compile-time constants: WARPS (1, 2 or 4), CHUNK (8 or 4 tokens), ORDERED (1 where `order` is read, else 0), and what
// the host takes for the size of `Args` (ARGS_BYTES) and of a block's shared memory (SCAN_FORWARD_BYTES,
// SCAN_BACKWARD_BYTES).

typedef unsigned short bf16;  // 16 bits: the upper half of a float32
typedef unsigned int u32;
typedef long long i64;

#ifndef EMULATED  // tests/cuda_emulation.cpp defines these functions for a CPU
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(32 * WARPS)
extern __shared__ char shared_memory[];

DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float fma_of(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
DEVICE float abs_of(float x) { return fabsf(x); }
DEVICE float float_of_bits(u32 bits) { return __uint_as_float(bits); }
DEVICE bf16 to_bf16(float x) {  // rounds to nearest even
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// Begin to copy 16 bytes from global to shared memory, or to fill them with zeros; both addresses are aligned to 16.
DEVICE void begin_copy(void* to, const void* from, bool exists) {
  u32 address = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
DEVICE void end_of_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until all but the newest stage has arrived: as far as this thread copied it.
DEVICE void wait_for_previous_stage() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE void block_barrier() { __syncthreads(); }

// d = a b + c on tensor cores: a (16, 8), b (8, 8), c and d (16, 8), spread over the lanes of a warp. Lane 4 g + q holds
// a[g][q], a[g + 8][q], a[g][q + 4], a[g + 8][q + 4]; b[q][g], b[q + 4][g]; and of c and d
// [g][2 q], [g][2 q + 1], [g + 8][2 q], [g + 8][2 q + 1]. a and b count to 10 bits (tf32), sums are float32.
DEVICE void multiply_add(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
#endif

#define UNROLL _Pragma("unroll")

constexpr int N = 16;      // states of a channel
constexpr int GROUP = 32;  // channels of a warp
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
static_assert(CHUNK == 8 || CHUNK == 4, "a warp copies up to 8 rows of 64 bytes at once");

struct Strides {  // in elements; those of (K, B, L, channels), whose channels are contiguous
  i64 direction, image, token;
};

struct Args {
  const bf16 *u, *dt, *B, *C, *dy;
  const float *A, *D, *dt_bias;  // (K, D, N), (K, D), (K, D)
  const i64* order;              // (K, L)
  float* states;                 // (K, B, chunks, D / 32, 4, 32, 4), see `load_states`; null where nothing trains
  bf16 *y, *du, *ddt;            // (K, B, L, D)
  float* dCB;                    // (K, B, L, blocks, 32): of the channels of one block, C's 16 states before B's
  float *dA, *dD, *ddt_bias;     // of one image: (K, B, D / 32, 4, 32, 4) as the states, (K, B, D), (K, B, D)
  Strides u_strides, dt_strides, B_strides, C_strides, dy_strides;
  int images, length, width;     // B, L and D
};
static_assert(sizeof(Args) == ARGS_BYTES, "cuda_backend.py describes other arguments");

struct alignas(16) Float4 {
  float v[4];
};
struct alignas(16) Bits128 {
  u32 v[4];
};

DEVICE void load4(float* to, const float* from) {
  Float4 x = *(const Float4*)from;
  UNROLL for (int i = 0; i < 4; i++) to[i] = x.v[i];
}
DEVICE void store4(float* to, const float* from) {
  Float4 x;
  UNROLL for (int i = 0; i < 4; i++) x.v[i] = from[i];
  *(Float4*)to = x;
}
DEVICE void copy16(void* to, const void* from) { *(Bits128*)to = *(const Bits128*)from; }
DEVICE void load_row(float (&to)[N], const float* from) {
  UNROLL for (int i = 0; i < N; i += 4) load4(to + i, from + i);
}

// The 16 numbers of each of 32 lanes as [4][32][4]: each of four accesses takes consecutive 16 bytes from the lanes.
typedef float LaneRows[4][GROUP][4];
DEVICE void load_states(float (&to)[N], const LaneRows& from, int lane) {
  UNROLL for (int i = 0; i < 4; i++) load4(to + 4 * i, from[i][lane]);
}
DEVICE void store_states(LaneRows& to, const float (&from)[N], int lane) {
  UNROLL for (int i = 0; i < 4; i++) store4(to[i][lane], from + 4 * i);
}

DEVICE float widen(bf16 x) { return float_of_bits((u32)x << 16); }
DEVICE float sum4(const float (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }
DEVICE float softplus(float x) {  // the polynomial of triton_kernels.py
  float e = exp2_of(-abs_of(x) * LOG2_E);
  float p = fma_of(0.005126102361828089f, e, -0.029074065387248993f);
  p = fma_of(p, e, 0.0775160863995552f);
  p = fma_of(p, e, -0.13602247834205627f);
  p = fma_of(p, e, 0.19076880812644958f);
  p = fma_of(p, e, -0.2483539879322052f);
  p = fma_of(p, e, 0.3331812024116516f);
  p = fma_of(p, e, -0.4999944567680359f);
  p = fma_of(p, e, 0.9999999403953552f);
  return fma_of(p, e, max_of(x, 0.f));
}

// ---- shared memory, all of it private to a warp but for `sums` ----

struct alignas(16) Inputs {  // of one chunk, in the order of reading
  bf16 u[CHUNK][GROUP], dt[CHUNK][GROUP], B[CHUNK][N], C[CHUNK][N];
};
struct alignas(16) Columns {  // B and C in float32: every lane reads all of them
  float B[CHUNK][N], C[CHUNK][N];
};
struct alignas(16) ForwardMemory {
  Inputs inputs[2];  // the present chunk and the next
  Columns columns;
  bf16 y[CHUNK][GROUP];
};
struct alignas(16) BackwardInputs {
  Inputs inputs;
  bf16 dy[CHUNK][GROUP];
  LaneRows h;  // before the chunk
};
struct alignas(16) BackwardMemory {
  BackwardInputs stage[2];
  Columns columns;
  float sums[CHUNK][GROUP][4];  // for dC and dB, see `sum_over_lanes`
  LaneRows h[CHUNK - 1];        // after every token but the last
};

static_assert(WARPS * sizeof(ForwardMemory) == SCAN_FORWARD_BYTES, "cuda_backend.py asks for other memory");
static_assert(WARPS * sizeof(BackwardMemory) == SCAN_BACKWARD_BYTES, "cuda_backend.py asks for other memory");

// ---- what a warp works on ----

struct Work {
  i64 path;  // direction * images + image
  int direction, image, block, blocks, group, groups, channel, chunks, lane, warp;
  const i64* order;

  DEVICE Work(const Args& p) {
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    groups = p.width / GROUP;
    blocks = groups / WARPS;
    path = blockIdx.x / blocks;
    block = blockIdx.x % blocks;
    direction = (int)(path / p.images);
    image = (int)(path % p.images);
    group = block * WARPS + warp;
    channel = direction * p.width + group * GROUP + lane;  // of (K, D)
    chunks = (p.length + CHUNK - 1) / CHUNK;
    order = ORDERED ? p.order + (i64)direction * p.length : nullptr;
  }
  DEVICE const bf16* rows(const bf16* x, const Strides& s) const { return x + direction * s.direction + image * s.image; }
  DEVICE i64 token(int step) const { return ORDERED ? (int)order[step] : step; }  // a length fits 32 bits
};

// The lanes of a warp as readers and writers of a chunk's rows: 4 lanes share a row of 32 channels, 2 one of 16 states.
// Rows beyond the last token are zeros; a dy of 0 adds nothing to any gradient.
DEVICE void begin_rows(bf16 (&to)[CHUNK][GROUP], const bf16* from, i64 stride, const Work& w, int chunk, int length) {
  int row = w.lane / 4, column = w.lane % 4 * 8, step = chunk * CHUNK + row;
  if (row < CHUNK) begin_copy(&to[row][column], from + (step < length ? w.token(step) : 0) * stride + column, step < length);
}
DEVICE void begin_inputs(Inputs& to, const bf16* u, const bf16* dt, const bf16* B, const bf16* C, const Args& p,
                         const Work& w, int chunk) {
  begin_rows(to.u, u, p.u_strides.token, w, chunk, p.length);
  begin_rows(to.dt, dt, p.dt_strides.token, w, chunk, p.length);
  bool second = w.lane / 16;  // the upper half of the warp copies C
  int row = w.lane % 16 / 2, column = w.lane % 2 * 8, step = chunk * CHUNK + row;
  if (row < CHUNK) {
    i64 token = step < p.length ? w.token(step) : 0;
    const bf16* from = second ? C + token * p.C_strides.token : B + token * p.B_strides.token;
    begin_copy(second ? &to.C[row][column] : &to.B[row][column], from + column, step < p.length);
  }
}
DEVICE void end_rows(bf16* to, const bf16 (&from)[CHUNK][GROUP], const Args& p, const Work& w, int chunk) {
  int row = w.lane / 4, column = w.lane % 4 * 8, step = chunk * CHUNK + row;
  if (row < CHUNK && step < p.length) copy16(to + w.token(step) * p.width + column, &from[row][column]);
}
DEVICE void widen_columns(Columns& to, const Inputs& from, int lane) {  // each lane what it copied
  int row = lane % 16 / 2, column = lane % 2 * 8;
  if (row >= CHUNK) return;
  Bits128 pairs = *(const Bits128*)(lane / 16 ? &from.C[row][column] : &from.B[row][column]);
  float wide[8];
  UNROLL for (int i = 0; i < 4; i++) {
    wide[2 * i] = float_of_bits(pairs.v[i] << 16);
    wide[2 * i + 1] = float_of_bits(pairs.v[i] & 0xffff0000u);
  }
  float* row_of = lane / 16 ? to.C[row] : to.B[row];
  store4(row_of + column, wide);
  store4(row_of + column + 4, wide + 4);
}
DEVICE void load_decay_rates(float (&rate)[N], const Args& p, const Work& w) {  // powers of 2 instead of e
  load_row(rate, p.A + (i64)w.channel * N);
  UNROLL for (int i = 0; i < N; i++) rate[i] *= LOG2_E;
}

// ---- forward ----

KERNEL scan_forward(Args p) {
  Work w(p);
  ForwardMemory& memory = ((ForwardMemory*)shared_memory)[w.warp];
  const bf16 *u = w.rows(p.u, p.u_strides) + w.group * GROUP, *dt = w.rows(p.dt, p.dt_strides) + w.group * GROUP;
  const bf16 *B = w.rows(p.B, p.B_strides), *C = w.rows(p.C, p.C_strides);
  bf16* y = p.y + w.path * p.length * p.width + w.group * GROUP;
  LaneRows* states = (LaneRows*)p.states + w.path * w.chunks * w.groups + w.group;
  float rate[N], h[N];
  load_decay_rates(rate, p, w);
  UNROLL for (int i = 0; i < N; i++) h[i] = 0;
  float skip = p.D[w.channel], bias = p.dt_bias[w.channel];

  begin_inputs(memory.inputs[0], u, dt, B, C, p, w, 0);
  end_of_stage();
  for (int chunk = 0; chunk < w.chunks; chunk++) {
    Inputs& x = memory.inputs[chunk % 2];
    if (chunk + 1 < w.chunks) begin_inputs(memory.inputs[(chunk + 1) % 2], u, dt, B, C, p, w, chunk + 1);
    end_of_stage();
    wait_for_previous_stage();
    widen_columns(memory.columns, x, w.lane);
    warp_barrier();
    if (p.states) store_states(*states, h, w.lane);
    states += w.groups;
    UNROLL for (int t = 0; t < CHUNK; t++) {
      float u_t = widen(x.u[t][w.lane]), delta = softplus(widen(x.dt[t][w.lane]) + bias), input = delta * u_t;
      float B_t[N], C_t[N], y_t[4] = {skip * u_t, 0, 0, 0};
      load_row(B_t, memory.columns.B[t]);
      load_row(C_t, memory.columns.C[t]);
      UNROLL for (int i = 0; i < N; i++) {
        h[i] = fma_of(exp2_of(delta * rate[i]), h[i], input * B_t[i]);
        y_t[i % 4] = fma_of(h[i], C_t[i], y_t[i % 4]);
      }
      memory.y[t][w.lane] = to_bf16(sum4(y_t));
    }
    warp_barrier();
    end_rows(y, memory.y, p, w, chunk);
  }
}

// ---- backward ----

// Sums over the 32 lanes of a warp, by matrix products: 6 of them instead of 80 shuffles and additions.
//
// First, each group g of four lanes 4 g + q: with four of a lane's numbers as its part of a, the columns of a that hold
// number 4 j or 4 j + 1 (rows g and g + 8) are added up into column 2 j of d, those of 4 j + 2 and 4 j + 3 into column
// 2 j + 1. After all four j, lane 4 g + q holds the sums over its group of the numbers 4 q, 4 q + 2, 4 q + 1, 4 q + 3.
// Second, with these as b and ones on the diagonal of a, groups become columns: lane 4 r + q gets row r of groups 2 q
// and 2 q + 1, and adds them. Row r is number 4 (r % 4) + 2 (r / 4), in the second product the number after it.
struct Selectors {
  float column[N / 2], diagonal[2];
  DEVICE Selectors(int lane) {
    UNROLL for (int i = 0; i < N / 2; i++) column[i] = lane / 4 == i ? 1.f : 0.f;
    UNROLL for (int i = 0; i < 2; i++) diagonal[i] = lane / 4 == lane % 4 + 4 * i ? 1.f : 0.f;
  }
};
// sums: of x[i] * factor for two of the 16 i, over 8 of the 32 lanes; the four lanes with the same lane / 4 hold all.
DEVICE void sum_over_lanes(float* sums, const float (&x)[N], float factor, const Selectors& select) {
  const float zero[4] = {};
  float groups[4] = {}, columns[4];
  UNROLL for (int j = 0; j < 4; j++)
    multiply_add(groups, x[4 * j] * factor, x[4 * j + 1] * factor, x[4 * j + 2] * factor, x[4 * j + 3] * factor,
                 select.column[2 * j], select.column[2 * j + 1], groups);
  UNROLL for (int i = 0; i < 2; i++) {
    multiply_add(columns, select.diagonal[0], 0.f, select.diagonal[1], 0.f, groups[2 * i], groups[2 * i + 1], zero);
    sums[i] = columns[0] + columns[1];
  }
}

DEVICE void barrier_of_all_warps() {
  if (WARPS > 1) block_barrier();
  else warp_barrier();
}

KERNEL scan_backward(Args p) {
  Work w(p);
  BackwardMemory* memories = (BackwardMemory*)shared_memory;
  BackwardMemory& memory = memories[w.warp];
  const bf16 *u = w.rows(p.u, p.u_strides) + w.group * GROUP, *dt = w.rows(p.dt, p.dt_strides) + w.group * GROUP;
  const bf16 *B = w.rows(p.B, p.B_strides), *C = w.rows(p.C, p.C_strides);
  const bf16* dy = w.rows(p.dy, p.dy_strides) + w.group * GROUP;
  i64 first_row = w.path * p.length;
  bf16 *du = p.du + first_row * p.width + w.group * GROUP, *ddt = p.ddt + first_row * p.width + w.group * GROUP;
  const LaneRows* states = (const LaneRows*)p.states + w.path * w.chunks * w.groups + w.group;
  float* dCB = p.dCB + (first_row * w.blocks + w.block) * (2 * N);
  float rate[N], h[N], dh[N], dA[N], dD = 0, ddt_bias = 0;
  load_decay_rates(rate, p, w);
  UNROLL for (int i = 0; i < N; i++) dh[i] = dA[i] = 0;
  float skip = p.D[w.channel], bias = p.dt_bias[w.channel];
  Selectors select(w.lane);

  auto begin_stage = [&](int chunk) {
    BackwardInputs& to = memory.stage[chunk % 2];
    begin_inputs(to.inputs, u, dt, B, C, p, w, chunk);
    begin_rows(to.dy, dy, p.dy_strides.token, w, chunk, p.length);
    const LaneRows& from = states[(i64)chunk * w.groups];
    UNROLL for (int i = 0; i < 4; i++) begin_copy(to.h[i][w.lane], from[i][w.lane], true);
  };

  begin_stage(w.chunks - 1);
  end_of_stage();
  _Pragma("unroll 1") for (int chunk = w.chunks - 1; chunk >= 0; chunk--) {
    BackwardInputs& stage = memory.stage[chunk % 2];
    Inputs& x = stage.inputs;
    if (chunk > 0) begin_stage(chunk - 1);
    end_of_stage();
    wait_for_previous_stage();
    widen_columns(memory.columns, x, w.lane);
    warp_barrier();

    float delta[CHUNK];
    load_states(h, stage.h, w.lane);
    UNROLL for (int t = 0; t < CHUNK; t++) {
      float B_t[N];
      delta[t] = softplus(widen(x.dt[t][w.lane]) + bias);
      float input = delta[t] * widen(x.u[t][w.lane]);
      load_row(B_t, memory.columns.B[t]);
      if (t > 0) store_states(memory.h[t - 1], h, w.lane);
      UNROLL for (int i = 0; i < N; i++) h[i] = fma_of(exp2_of(delta[t] * rate[i]), h[i], input * B_t[i]);
    }
    UNROLL for (int t = CHUNK - 1; t >= 0; t--) {
      float dy_t = widen(stage.dy[t][w.lane]), u_t = widen(x.u[t][w.lane]), raw = widen(x.dt[t][w.lane]) + bias;
      float B_t[N], C_t[N], dinput[4] = {}, ddelta[4] = {}, sums[4];
      load_row(B_t, memory.columns.B[t]);
      load_row(C_t, memory.columns.C[t]);
      UNROLL for (int i = 0; i < N; i++) dh[i] = fma_of(dy_t, C_t[i], dh[i]);
      sum_over_lanes(sums, h, dy_t, select);                // dC
      sum_over_lanes(sums + 2, dh, delta[t] * u_t, select);  // dB
      store4(memory.sums[t][w.lane], sums);
      UNROLL for (int i = 0; i < N; i++) dinput[i % 4] = fma_of(dh[i], B_t[i], dinput[i % 4]);
      UNROLL for (int i = 0; i < N; i++) dh[i] *= exp2_of(delta[t] * rate[i]);
      load_states(h, t > 0 ? memory.h[t - 1] : stage.h, w.lane);  // before the token
      UNROLL for (int i = 0; i < N; i++) {
        float ddecay = dh[i] * h[i];  // the gradient of delta * A
        dA[i] = fma_of(ddecay, delta[t], dA[i]);
        ddelta[i % 4] = fma_of(ddecay, rate[i], ddelta[i % 4]);
      }
      float dinput_t = sum4(dinput), slope = exp2_of((raw - delta[t]) * LOG2_E);  // sigmoid(raw) = e^(raw - softplus(raw))
      float ddt_t = fma_of(sum4(ddelta), LN_2, dinput_t * u_t) * slope;
      ddt_bias += ddt_t;
      dD = fma_of(dy_t, u_t, dD);
      x.u[t][w.lane] = to_bf16(fma_of(skip, dy_t, dinput_t * delta[t]));  // du and ddt take the place of what was read
      x.dt[t][w.lane] = to_bf16(ddt_t);
    }
    barrier_of_all_warps();
    end_rows(du, x.u, p, w, chunk);
    end_rows(ddt, x.dt, p, w, chunk);
    // A thread adds up what the warps have of one row (see `sum_over_lanes`) of one token.
    UNROLL for (int i = threadIdx.x; i < CHUNK * 8; i += 32 * WARPS) {
      int t = i / 8, row = i % 8, step = chunk * CHUNK + t;
      float sum[4] = {};
      UNROLL for (int warp = 0; warp < WARPS; warp++)
        UNROLL for (int q = 0; q < 4; q++) {
          float part[4];
          load4(part, memories[warp].sums[t][4 * row + q]);
          UNROLL for (int j = 0; j < 4; j++) sum[j] += part[j];
        }
      if (step >= p.length) continue;
      float* to = dCB + w.token(step) * w.blocks * (2 * N) + 4 * (row % 4) + 2 * (row / 4);
      to[0] = sum[0], to[1] = sum[1], to[N] = sum[2], to[N + 1] = sum[3];
    }
    barrier_of_all_warps();
  }
  store_states(((LaneRows*)p.dA)[w.path * w.groups + w.group], dA, w.lane);
  i64 channel = w.path * p.width + w.group * GROUP + w.lane;
  p.dD[channel] = dD;
  p.ddt_bias[channel] = ddt_bias;
}
