"""Both ops as torch operators, `arm::...`: one registration for every backend that has kernels.

To `torch.compile` an operator is one opaque node with known shapes and gradients, whatever backend computes it. What a
backend provides is documented in torch_backend.py. Arguments are those of `ops.selective_scan` and `ops.causal_conv1d`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, NoReturn, TypeVar, cast

from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef, custom_op

from .backends import backend_module

Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


# Torch replaces an operator by another of its name: each package of which these files are a part has its own names.
NAMESPACE = __name__.removesuffix("ops.operators").rstrip(".") or "arm"


def _refusing_forward_mode(function: Callable) -> Callable:
    """Return the function, raising where inputs may have tangents: torch would silently drop them from its result."""

    @wraps(function)
    def call(*args: object) -> object:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                "the operators arm::... have no forward-mode derivatives: call ops.selective_scan and "
                "ops.causal_conv1d instead, uncompiled and inside the forward-mode level; backend='export' where only "
                "a backward pass is"
            )
        return function(*args)

    return call


def _refuse_second(ctx: object, *grads: Tensor) -> NoReturn:
    raise NotImplementedError("the kernels have no second derivatives: backend='export' (--scan_backend export) has")


def operator(fake: Callable, differentiable: bool = True) -> Callable[[Callable], CustomOpDef]:
    """Return a decorator that registers a function as the torch operator `NAMESPACE::NAME`.

    Args:
        fake: takes the same arguments and returns empty tensors like the results, for tracing.
        differentiable: False where derivatives are refused.
    """

    def register(function: Callable) -> CustomOpDef:
        registered = custom_op(f"{NAMESPACE}::{function.__name__}", _refusing_forward_mode(function), mutates_args=())
        registered.register_fake(_refusing_forward_mode(fake))
        if not differentiable:
            registered.register_autograd(_refuse_second)
        return registered

    return register


def as_inputs(grads: Iterable[Tensor], inputs: Tensors) -> Tensors:
    """Return each gradient in the dtype of its input and contiguous, as `empty_grads` announces it."""
    return cast(Tensors, tuple(grad.to(x.dtype).contiguous() for grad, x in zip(grads, inputs, strict=True)))


def empty_grads(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Return empty tensors like the gradients that `as_inputs` returns."""
    return tuple(x.new_empty(x.shape) for x in inputs)


def empty_states(u: Tensor, A: Tensor, backend: str, trains: bool) -> Tensor:
    """Return an empty tensor like the states that the scan returns, which are none unless it `trains`."""
    return backend_module(backend).scan_states(u, A) if trains else u.new_empty(0)


def save(ctx: Any, tensors: Iterable[Tensor | None], internal: Sequence[Tensor]) -> None:
    """Save tensors for the backward pass, and outputs that exist only for it; these have no gradients.

    Autograd would fill those gradients with zeros: as much memory as the states of a scan take.
    """
    ctx.save_for_backward(*tensors, *internal)
    ctx.mark_non_differentiable(*internal)
    ctx.set_materialize_grads(False)


def _empty_scan(u: Tensor, dt: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), empty_states(u, A, *others[-2:])


@operator(_empty_scan)
def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    order: Tensor | None, backend: str, trains: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y and, where it `trains`, the states that the backward pass starts from (else an empty tensor)."""
    y, states = backend_module(backend).scan_forward((u, dt, A, B, C, D, dt_bias), order, trains)
    return y.contiguous(), u.new_empty(0) if states is None else states


@operator(lambda dy, *inputs: empty_grads(*inputs[:7]), differentiable=False)
def selective_scan_backward(
    dy: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    order: Tensor | None, states: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of u, dt, A, B, C, D and dt_bias."""
    inputs = (u, dt, A, B, C, D, dt_bias)
    return as_inputs(backend_module(backend).scan_backward(dy, inputs, order, states), inputs)


def register_scan_grads(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Register the gradients of an operator with inputs (*tensors, backend, trains) and outputs (y, *saved).

    `backward` takes the gradient of y, the tensors, the saved outputs and the backend.
    """

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.count = len(inputs)
        *tensors, ctx.backend, ctx.trains = inputs
        save(ctx, tensors, output[1:])

    def grads(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple:
        if dy is None:  # nothing depends on y
            return (None,) * ctx.count
        if not ctx.trains:  # there are no states to start from
            raise RuntimeError(f"{forward._qualname} was computed with trains=False: it has no gradients")
        return *backward(dy, *ctx.saved_tensors, ctx.backend), None, None, None

    forward.register_autograd(grads, setup_context=setup)


register_scan_grads(selective_scan, selective_scan_backward)


@operator(lambda x, weight, *_: x.new_empty(weight.shape[0], *x.shape))
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, backend: str) -> Tensor:
    """Return the convolution after SiLU."""
    return backend_module(backend).conv_forward(x, weight, bias, order).contiguous()


@operator(lambda dy, *inputs: empty_grads(*inputs[:3]), differentiable=False)
def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    inputs = (x, weight, bias)
    return as_inputs(backend_module(backend).conv_backward(dy, *inputs, order), inputs)


def _conv_context(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


causal_conv1d.register_autograd(
    lambda ctx, dy: (*causal_conv1d_backward(dy, *ctx.saved_tensors, ctx.backend), None, None),
    setup_context=_conv_context,
)


def split_projected(projected: Tensor, dt_proj: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return low-rank steps (K, B * L, R), B and C (K, B, L, N) as views of the output of x_proj."""
    rank = dt_proj.shape[-1]
    states = (projected.shape[-1] - rank) // 2
    low, b, c = projected.split([rank, states, states], dim=-1)
    return low, *(x.unflatten(1, u.shape[1:3]) for x in (b, c))  # (K, B * L, N) -> (K, B, L, N)
