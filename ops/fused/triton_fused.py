"""Triton kernels of the fused operators (see __init__.py): one pass over memory each, no atomics.

Rows are tokens, channels are contiguous. Sums over rows, gradients of weights and biases, are written as one partial
sum per program and added up afterwards in a fixed order: two runs are equal bit for bit. The number of programs depends
only on the sizes, not on the GPU. Sums are in float32, addresses have 64 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Block sizes, chosen by counted instructions and registers, not yet by time.
COLUMNS = 512  # per program of SwiGLU
ROWS = 4  # that such a program reads at a time
GROUP = 64  # rows that such a program sums up
WARPS = 2048  # of the layer norm's backward pass: all run at once from 8.0 on; one partial sum per program


@triton.jit
def _swiglu_inputs(x, row, column, here, H: tl.constexpr):
    """Return gate and value (rows, columns) float32, and the sigmoid of the gate."""
    gate = tl.load(x + row * (2 * H) + column, mask=here, other=0.0).to(tl.float32)
    value = tl.load(x + row * (2 * H) + H + column, mask=here, other=0.0).to(tl.float32)
    return gate, value, 1.0 / (1.0 + tl.exp2(-gate * LOG2_E))


@triton.jit
def _swiglu_block(GROUP: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the first row, the columns and the number of the group of rows of this program."""
    blocks: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    group = tl.program_id(0) // blocks
    return group * GROUP, tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS), group


@triton.jit(do_not_specialize=["rows"])
def swiglu_forward_kernel(x, y, rows, H: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Write y = silu(gate) * value, (rows, H); x (rows, 2 H) holds the gates, then the values."""
    first, column, _ = _swiglu_block(ROWS, H, COLUMNS)
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    here = (row < rows) & (column < H)[None, :]
    gate, value, sigmoid = _swiglu_inputs(x, row, column[None, :], here, H)
    tl.store(y + row * H + column[None, :], (gate * sigmoid * value).to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(
    dy, x, dx, sums, rows, H: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr
):
    """Write dx (rows, 2 H), in the order of x, and its sums over GROUP rows: (groups, 2 H) float32."""
    first, column, group = _swiglu_block(GROUP, H, COLUMNS)
    # One sum for each of ROWS rows: they are added once, at the end, because warps wait for each other in such a sum.
    dgate_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    dvalue_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, GROUP, ROWS):
        row = (first + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        here = (row < rows) & (column < H)[None, :]
        gate, value, sigmoid = _swiglu_inputs(x, row, column[None, :], here, H)
        d = tl.load(dy + row * H + column[None, :], mask=here, other=0.0).to(tl.float32)
        silu = gate * sigmoid
        dvalue = d * silu
        dgate = d * value * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(dx + row * (2 * H) + column[None, :], dgate.to(dx.dtype.element_ty), mask=here)
        tl.store(dx + row * (2 * H) + H + column[None, :], dvalue.to(dx.dtype.element_ty), mask=here)
        dgate_sum += dgate
        dvalue_sum += dvalue
    sums += group.to(tl.int64) * (2 * H)
    tl.store(sums + column, tl.sum(dgate_sum, 0), mask=column < H)
    tl.store(sums + H + column, tl.sum(dvalue_sum, 0), mask=column < H)


@triton.jit(do_not_specialize=["length"])
def norm_forward_kernel(
    h, branch, keep, weight, bias, total, normed, statistics, length, normed_stride,
    C: tl.constexpr, WIDE: tl.constexpr, EPS: tl.constexpr, BRANCH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Write the layer norm of one row of h, or of h + keep * branch, which goes to `total`."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDE)
    here = c < C
    x = tl.load(h + row * C + c, mask=here, other=0.0)
    if BRANCH:
        added = tl.load(branch + row * C + c, mask=here, other=0.0).to(tl.float32)
        if KEEP:
            added *= tl.load(keep + row // length)
        x += added
        tl.store(total + row * C + c, x, mask=here)
    m = tl.sum(x, 0) / C
    centred = tl.where(here, x - m, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + EPS)
    w = tl.load(weight + c, mask=here, other=0.0)
    b = tl.load(bias + c, mask=here, other=0.0)
    tl.store(normed + row * normed_stride + c, (centred * r * w + b).to(normed.dtype.element_ty), mask=here)
    tl.store(statistics + row, m)
    tl.store(statistics + tl.num_programs(0) + row, r)


@triton.jit(do_not_specialize=["rows", "length"])
def norm_backward_kernel(
    dnormed, dtotal, x, keep, weight, statistics, dh, dbranch, sums, rows, length, dnormed_stride,
    C: tl.constexpr, WIDE: tl.constexpr, PROGRAMS: tl.constexpr,
    TOTAL: tl.constexpr, BRANCH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Write dh = dtotal + the layer norm's gradient, dbranch = keep * dh; x is the input of the norm: h or the sum.

    A program takes every PROGRAMS-th row. Its `sums` (2, C) are the partial gradients of weight and bias.
    """
    program = tl.program_id(0)
    c = tl.arange(0, WIDE)
    here = c < C
    w = tl.load(weight + c, mask=here, other=0.0)
    dweight = tl.zeros([WIDE], tl.float32)
    dbias = tl.zeros([WIDE], tl.float32)
    for i in range(program, rows, PROGRAMS):
        row = tl.cast(i, tl.int64)
        d = tl.load(dnormed + row * dnormed_stride + c, mask=here, other=0.0).to(tl.float32)
        if TOTAL:  # loaded with the others: no load is moved up across the sums, where warps wait for each other
            elsewhere = tl.load(dtotal + row * C + c, mask=here, other=0.0)
        mean, r = tl.load(statistics + row), tl.load(statistics + rows + row)
        unit = tl.where(here, (tl.load(x + row * C + c, mask=here, other=0.0) - mean) * r, 0.0)
        scaled = d * w
        grad = (scaled - tl.sum(scaled, 0) / C - unit * (tl.sum(scaled * unit, 0) / C)) * r
        if TOTAL:
            grad += elsewhere
        tl.store(dh + row * C + c, grad, mask=here)
        if BRANCH:
            passed = grad
            if KEEP:
                passed *= tl.load(keep + row // length)
            tl.store(dbranch + row * C + c, passed.to(dbranch.dtype.element_ty), mask=here)
        dweight += d * unit
        dbias += d
    sums += program * (2 * C)
    tl.store(sums + c, dweight, mask=here)
    tl.store(sums + C + c, dbias, mask=here)


def _launch(kernel: triton.JITFunction, programs: int, warps: int, *args: object, **constants: object) -> None:
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **constants, num_warps=warps)


def swiglu_forward(x: Tensor) -> Tensor:
    """Return silu(gate) * value; x (..., 2 H) holds the gates, then the values; the result is (..., H)."""
    x = x.contiguous()
    H = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], H)
    rows = y.numel() // max(H, 1)
    if y.numel():
        programs = triton.cdiv(rows, ROWS) * triton.cdiv(H, COLUMNS)
        _launch(swiglu_forward_kernel, programs, 4, x, y, rows, H=H, COLUMNS=COLUMNS, ROWS=ROWS)
    return y


def swiglu_backward(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (..., 2 H) and of a bias (2 H,) that was added to it, the latter in float32."""
    dy, x = dy.contiguous(), x.contiguous()
    H = dy.shape[-1]
    rows, dx = dy.numel() // max(H, 1), torch.empty_like(x)
    sums = x.new_empty(triton.cdiv(rows, GROUP), 2 * H, dtype=torch.float32)
    if dy.numel():
        constants = {"H": H, "COLUMNS": COLUMNS, "ROWS": ROWS, "GROUP": GROUP}
        _launch(swiglu_backward_kernel, len(sums) * triton.cdiv(H, COLUMNS), 8, dy, x, dx, sums, rows, **constants)
    return dx, sums.sum(0)


def _row_constants(C: int) -> tuple[int, dict[str, int]]:
    """Return the number of warps for a program that holds a row of C channels, and the row's constants."""
    wide = triton.next_power_of_2(C)
    return min(16, max(1, wide // 256)), {"C": C, "WIDE": wide}


def _row_stride(x: Tensor) -> int:
    """Return the stride between rows of (B, L, C); if L is 1, torch may give the row any stride."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def norm_forward(
    h: Tensor, branch: Tensor | None, keep: Tensor | None, weight: Tensor, bias: Tensor, eps: float, normed: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the layer norm of h (B, L, C) float32 contiguous, or of h + keep * branch, to `normed`.

    branch is (B, L, C); keep (B,) float32 is the factor of each image's branch, None is 1; weight and bias are (C,).
    normed (B, L, C), of any floating dtype, has evenly strided rows of contiguous channels.

    Returns:
        The sum (B, L, C) float32 (h itself without a branch); mean and 1 / standard deviation (2, B, L) float32.
    """
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    branch = branch if branch is None else branch.contiguous()
    total = h if branch is None else torch.empty_like(h)
    statistics = h.new_empty(2, *h.shape[:-1])
    warps, constants = _row_constants(h.shape[-1])
    if h.numel():
        args = (h, branch, keep, weight, bias, total, normed, statistics, h.shape[1], _row_stride(normed))
        constants |= {"BRANCH": branch is not None, "KEEP": keep is not None}
        _launch(norm_forward_kernel, statistics[0].numel(), warps, *args, **constants, EPS=eps)
    return total, statistics


def norm_backward(
    dnormed: Tensor, dtotal: Tensor | None, x: Tensor, keep: Tensor | None, weight: Tensor, statistics: Tensor,
    branch: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return the gradients of `norm_forward`; arguments are as there, and `branch` is the dtype of its branch, if any.

    dnormed (B, L, C) has evenly strided rows of contiguous channels. dtotal (B, L, C) float32 is the gradient of the
    sum from other operators, None is 0. x is the input of the norm: the sum, or h.

    Returns:
        dh (B, L, C) float32, the branch's gradient (B, L, C) or None, those of weight and bias (2, C) float32.
    """
    dtotal = dtotal if dtotal is None else dtotal.contiguous()
    dh, rows, C = torch.empty_like(x), statistics[0].numel(), x.shape[-1]
    dbranch = None if branch is None else torch.empty_like(x, dtype=branch)
    warps, constants = _row_constants(C)
    programs = WARPS // warps
    sums = x.new_empty(min(rows, programs), 2, C)
    if x.numel():
        weight = weight.float().contiguous()
        args = (dnormed, dtotal, x, keep, weight, statistics, dh, dbranch, sums, rows, x.shape[1], _row_stride(dnormed))
        constants |= {"TOTAL": dtotal is not None, "BRANCH": branch is not None, "KEEP": keep is not None}
        _launch(norm_backward_kernel, len(sums), warps, *args, **constants, PROGRAMS=programs)
    return dh, dbranch, sums.sum(0)
