"""The Triton kernels of both ops for CUDA: channels last, all directions in one launch, no atomics.

A program owns 32 or more channels of one image in one direction and walks through its tokens, the states in
registers. Channels are contiguous in memory, so every access is coalesced without a transpose, and a direction is only
a map from steps to tokens. Gradients of inputs that several programs share (B and C of a token, A, D, biases) are
written as one partial sum per program and added up afterwards in a fixed order: two runs are equal bit for bit.
Addresses have 64 bits, tensors may have any strides, shapes are those of `ops`.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """Return log(1 + e^x) as max(x, 0) + log1p(e^-|x|), the logarithm as a polynomial (relative error below 2e-7).

    It takes fewer instructions than a logarithm, and is exact where 1 + e^x rounds to 1: initial steps are about 0.001.
    """
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    p = 0.005126102361828089 * e - 0.029074065387248993
    p = p * e + 0.0775160863995552
    p = p * e - 0.13602247834205627
    p = p * e + 0.19076880812644958
    p = p * e - 0.2483539879322052
    p = p * e + 0.3331812024116516
    p = p * e - 0.4999944567680359
    p = p * e + 0.9999999403953552
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _program(segments, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return direction, image, segment of tokens and block of channels of this program.

    All programs of one image run side by side: they find x, or B and C, in the cache.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = WIDTH // BLOCK
    part = pid // blocks
    path = part // segments
    return (path % K).to(tl.int64), (path // K).to(tl.int64), part % segments, pid % blocks


@triton.jit
def _token(order, t, ORDERED: tl.constexpr):
    """Return the token that is read at step t."""
    if ORDERED:
        return tl.load(order + t).to(tl.int32).to(tl.int64)  # the compiler multiplies 32-bit numbers in one step
    else:
        return tl.cast(t, tl.int64)


@triton.jit
def _advance(h, x, delta, decay_rate, b):
    """Return the state after a token: h (N, BLOCK), x = delta * u and delta (BLOCK,), decay_rate = A / ln 2, b (N,)."""
    return tl.exp2(delta[None, :] * decay_rate) * h + x[None, :] * b[:, None]


@triton.jit
def _read(u, dt, B, order, start, length, u_st, dt_st, B_st, T: tl.constexpr, ORDERED: tl.constexpr):
    """Return the tokens of T steps and their u, dt and B; beyond the last step, the last token again.

    All of it is loaded at once, because no load is moved across a store later.
    """
    tokens, us, raws, bs = (), (), (), ()
    for j in tl.static_range(T):
        token = _token(order, tl.minimum(start + j, length - 1), ORDERED)
        tokens += (token,)
        us += (tl.load(u + token * u_st),)
        raws += (tl.load(dt + token * dt_st),)
        bs += (tl.load(B + token * B_st),)
    return tokens, us, raws, bs


@triton.jit
def _delta(raw, bias):
    return _softplus(raw.to(tl.float32) + bias)


@triton.jit(do_not_specialize=["batch", "length"])
def scan_forward_kernel(
    u, dt, A, B, C, D, dt_bias, order, y, states,
    batch, length,
    u_sk, u_sb, u_st, dt_sk, dt_sb, dt_st, B_sk, B_sb, B_st, C_sk, C_sb, C_st,
    K: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr,
    ORDERED: tl.constexpr, TRAINS: tl.constexpr,
):  # fmt: skip
    """Write y and, where it TRAINS, the state before every chunk of tokens; `*_sk, *_sb, *_st` are strides."""
    k, b, _, block = _program(1, K, WIDTH, BLOCK)
    row = k * batch + b
    n, d = tl.arange(0, N), block * BLOCK + tl.arange(0, BLOCK)
    u += k * u_sk + b * u_sb + d
    dt += k * dt_sk + b * dt_sb + d
    B += k * B_sk + b * B_sb + n
    C += k * C_sk + b * C_sb + n
    y += row * length * WIDTH + d
    chunks = tl.cdiv(length, CHUNK)
    states += row * chunks * N * WIDTH + d[None, :] * N + n[:, None]
    if ORDERED:
        order += k * length

    decay_rate = tl.load(A + (k * WIDTH + d[None, :]) * N + n[:, None]) * LOG2_E  # (N, BLOCK)
    skip = tl.load(D + k * WIDTH + d)
    bias = tl.load(dt_bias + k * WIDTH + d)
    h = tl.zeros([N, BLOCK], tl.float32)
    for chunk in range(chunks):
        if TRAINS:
            tl.store(states, h)
            states += N * WIDTH
        for start in range(chunk * CHUNK, min(length, (chunk + 1) * CHUNK), T):
            tokens, us, raws, bs = _read(u, dt, B, order, start, length, u_st, dt_st, B_st, T, ORDERED)
            cs = ()
            for j in tl.static_range(T):
                cs += (tl.load(C + tokens[j] * C_st),)
            for j in tl.static_range(T):
                u_j, delta = us[j].to(tl.float32), _delta(raws[j], bias)
                h = _advance(h, delta * u_j, delta, decay_rate, bs[j].to(tl.float32))
                y_j = tl.sum(h * cs[j].to(tl.float32)[:, None], 0) + skip * u_j
                tl.store(y + tokens[j] * WIDTH, y_j.to(y.dtype.element_ty), mask=start + j < length)


@triton.jit(do_not_specialize=["batch", "length"])
def scan_backward_kernel(
    u, dt, A, B, C, D, dt_bias, order, states, dy,
    du, ddt, dA, dB, dC, dD, dt_dbias,
    batch, length,
    u_sk, u_sb, u_st, dt_sk, dt_sb, dt_st, B_sk, B_sb, B_st, C_sk, C_sb, C_st, dy_sk, dy_sb, dy_st,
    K: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr,
    ORDERED: tl.constexpr,
):  # fmt: skip
    """Write the gradients, T tokens at a time from the last to the first.

    dA (K, B, D, N), dD and dt_dbias (K, B, D) are sums over the tokens of one image; dB and dC (K, B, L, blocks, N)
    over the channels of one program. Where T does not divide the length, the last block repeats the last token with
    a dy of 0: that adds nothing to any sum, and what it stores is overwritten by the token itself.
    """
    k, b, _, block = _program(1, K, WIDTH, BLOCK)
    row = k * batch + b
    n, d = tl.arange(0, N), block * BLOCK + tl.arange(0, BLOCK)
    u += k * u_sk + b * u_sb + d
    dt += k * dt_sk + b * dt_sb + d
    B += k * B_sk + b * B_sb + n
    C += k * C_sk + b * C_sb + n
    dy += k * dy_sk + b * dy_sb + d
    du += row * length * WIDTH + d
    ddt += row * length * WIDTH + d
    blocks: tl.constexpr = WIDTH // BLOCK
    dB += (row * length * blocks + block) * N + n
    dC += (row * length * blocks + block) * N + n
    states += row * tl.cdiv(length, CHUNK) * N * WIDTH + d[None, :] * N + n[:, None]
    if ORDERED:
        order += k * length

    decay_rate = tl.load(A + (k * WIDTH + d[None, :]) * N + n[:, None]) * LOG2_E  # (N, BLOCK)
    skip = tl.load(D + k * WIDTH + d)
    bias = tl.load(dt_bias + k * WIDTH + d)
    dh = tl.zeros([N, BLOCK], tl.float32)
    dA_sum = tl.zeros([N, BLOCK], tl.float32)
    dD_sum = tl.zeros([BLOCK], tl.float32)
    dbias_sum = tl.zeros([BLOCK], tl.float32)
    count = tl.cdiv(length, T)
    for i in range(count):
        start = (count - 1 - i) * T
        chunk = start // CHUNK
        h = tl.load(states + chunk.to(tl.int64) * N * WIDTH)
        for before in range(chunk * CHUNK, start, T):
            tokens, us, raws, bs = _read(u, dt, B, order, before, length, u_st, dt_st, B_st, T, ORDERED)
            for j in tl.static_range(T):
                delta = _delta(raws[j], bias)
                h = _advance(h, delta * us[j].to(tl.float32), delta, decay_rate, bs[j].to(tl.float32))
        tokens, us, raws, bs = _read(u, dt, B, order, start, length, u_st, dt_st, B_st, T, ORDERED)
        cs, dys, hs = (), (), (h,)
        for j in tl.static_range(T):
            cs += (tl.load(C + tokens[j] * C_st),)
            dys += (tl.load(dy + tokens[j] * dy_st, mask=start + j < length, other=0.0),)
        for j in tl.static_range(T):
            delta = _delta(raws[j], bias)
            hs += (_advance(hs[j], delta * us[j].to(tl.float32), delta, decay_rate, bs[j].to(tl.float32)),)
        for j in tl.static_range(T - 1, -1, -1):
            token = tokens[j]
            u_j, raw, dy_j = us[j].to(tl.float32), raws[j].to(tl.float32) + bias, dys[j].to(tl.float32)
            delta = _softplus(raw)
            b_j = bs[j].to(tl.float32)
            c_j = cs[j].to(tl.float32)
            dD_sum += dy_j * u_j
            dh += dy_j[None, :] * c_j[:, None]
            dC_j = tl.sum(hs[j + 1] * dy_j[None, :], 1)
            dB_j = tl.sum(dh * (delta * u_j)[None, :], 1)
            dx = tl.sum(dh * b_j[:, None], 0)
            dh *= tl.exp2(delta[None, :] * decay_rate)
            ddecay = dh * hs[j]  # the gradient of delta * A
            dA_sum += ddecay * delta[None, :]
            ddelta = tl.sum(ddecay * decay_rate, 0) * LN_2 + dx * u_j
            ddt_j = ddelta * tl.exp2((raw - delta) * LOG2_E)  # sigmoid(raw) = e^(raw - softplus(raw))
            dbias_sum += ddt_j
            du_j = dx * delta + skip * dy_j
            tl.store(dC + token * (blocks * N), dC_j)
            tl.store(dB + token * (blocks * N), dB_j)
            tl.store(ddt + token * WIDTH, ddt_j.to(ddt.dtype.element_ty))
            tl.store(du + token * WIDTH, du_j.to(du.dtype.element_ty))
    tl.store(dA + (row * WIDTH + d[None, :]) * N + n[:, None], dA_sum)
    tl.store(dD + row * WIDTH + d, dD_sum)
    tl.store(dt_dbias + row * WIDTH + d, dbias_sum)


@triton.jit
def _past(x, order, t, x_st, ORDERED: tl.constexpr):
    """Return the input of step t in float32, 0 before the first step."""
    token = _token(order, tl.maximum(t, 0), ORDERED)
    return tl.load(x + token * x_st, mask=t >= 0, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["batch", "length"])
def conv_forward_kernel(
    x, weight, bias, order, y,
    batch, length, x_sb, x_st,
    K: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    AHEAD: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Write the convolution after SiLU of one segment of tokens; the last inputs stay in registers.

    AHEAD tokens are loaded before the first of them is used, because no load is moved across a store later.
    """
    segments = tl.cdiv(length, SEGMENT)
    k, b, segment, block = _program(segments, K, WIDTH, BLOCK)
    d = block * BLOCK + tl.arange(0, BLOCK)
    x += b * x_sb + d
    y += (k * batch + b) * length * WIDTH + d
    if ORDERED:
        order += k * length
    start = segment * SEGMENT
    w, past = (), ()  # both begin with the present token, whose tap is the last of a weight
    for j in tl.static_range(TAPS):
        w += (tl.load(weight + (k * WIDTH + d) * TAPS + (TAPS - 1 - j)),)
    for j in tl.static_range(1, TAPS):
        past += (_past(x, order, start - j, x_st, ORDERED),)
    offset = tl.load(bias + k * WIDTH + d)
    for first in range(start, min(length, start + SEGMENT), AHEAD):
        tokens, loaded = (), ()
        for i in tl.static_range(AHEAD):
            t = first + i  # only those after the first can lie beyond the end
            tokens += (_token(order, t if i == 0 else tl.minimum(t, length - 1), ORDERED),)
            loaded += (tl.load(x + tokens[i] * x_st),)
        for i in tl.static_range(AHEAD):
            past = (loaded[i].to(tl.float32),) + past
            s = offset
            for j in tl.static_range(TAPS):
                s += w[j] * past[j]
            here = None if i == 0 else first + i < length
            tl.store(y + tokens[i] * WIDTH, (s * _sigmoid(s)).to(y.dtype.element_ty), mask=here)
            past = past[: TAPS - 1]


@triton.jit(do_not_specialize=["batch", "length"])
def conv_backward_kernel(
    x, weight, bias, order, dy, dx, sums,
    batch, length, x_sb, x_st, dy_sk, dy_sb, dy_st,
    K: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    AHEAD: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Write dx (K, B, L, D) of each direction, and dweight and dbias of each segment: (K, B, segments, TAPS + 1, D).

    It walks back in time, AHEAD tokens at once like the forward pass. A token's dx needs the gradients of the TAPS - 1
    tokens after it, so a segment begins with those of the next one.
    """
    segments = tl.cdiv(length, SEGMENT)
    k, b, segment, block = _program(segments, K, WIDTH, BLOCK)
    row = k * batch + b
    d = block * BLOCK + tl.arange(0, BLOCK)
    x += b * x_sb + d
    dy += k * dy_sk + b * dy_sb + d
    dx += row * length * WIDTH + d
    if ORDERED:
        order += k * length
    start = segment * SEGMENT
    end = min(length, start + SEGMENT)
    last = min(length, end + TAPS - 1) - 1
    w, dw, past, ahead = (), (), (), ()  # ahead: gradients before SiLU of the tokens after the present one
    for j in tl.static_range(TAPS):
        w += (tl.load(weight + (k * WIDTH + d) * TAPS + (TAPS - 1 - j)),)
        dw += (tl.zeros([BLOCK], tl.float32),)
        past += (_past(x, order, last - j, x_st, ORDERED),)
    for j in tl.static_range(1, TAPS):
        ahead += (tl.zeros([BLOCK], tl.float32),)
    offset = tl.load(bias + k * WIDTH + d)
    db = tl.zeros([BLOCK], tl.float32)
    for passed in range(0, last + 1 - start, AHEAD):
        tokens, dys, pasts = (), (), ()
        for i in tl.static_range(AHEAD):
            t = last - passed - i
            tokens += (_token(order, t if i == 0 else tl.maximum(t, 0), ORDERED),)
            dys += (tl.load(dy + tokens[i] * dy_st),)
            pasts += (_past(x, order, t - TAPS, x_st, ORDERED),)
        for i in tl.static_range(AHEAD):
            t = last - passed - i
            s = offset
            for j in tl.static_range(TAPS):
                s += w[j] * past[j]
            gate = _sigmoid(s)
            ds = dys[i].to(tl.float32) * gate * (1.0 + s * (1.0 - gate))
            ahead = (ds,) + ahead
            dx_t = tl.zeros([BLOCK], tl.float32)
            for j in tl.static_range(TAPS):
                dx_t += w[j] * ahead[j]
            own = t < end if i == 0 else (t >= start) & (t < end)
            tl.store(dx + tokens[i] * WIDTH, dx_t.to(dx.dtype.element_ty), mask=own)
            ds = tl.where(own, ds, 0.0)
            added = ()
            for j in tl.static_range(TAPS):
                added += (dw[j] + ds * past[j],)
            dw = added
            db += ds
            ahead = ahead[: TAPS - 1]
            past = past[1:] + (pasts[i],)
    sums += (row * segments + segment) * (TAPS + 1) * WIDTH + d
    for j in tl.static_range(TAPS):
        tl.store(sums + (TAPS - 1 - j) * WIDTH, dw[j])
    tl.store(sums + TAPS * WIDTH, db)
