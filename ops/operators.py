"""Both ops as torch operators, `arm::...`: one registration for the backends of our own.

To `torch.compile` an operator is one opaque node with known shapes and gradients, whatever backend computes it. A
backend is a module of five functions: `scan_forward`, `scan_states`, `scan_backward`, `conv_forward`, `conv_backward`
(documented in torch_backend.py). Arguments are those of `ops.selective_scan` and `ops.causal_conv1d`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar, cast

from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

from .backends import backend_module

Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


def in_forward_mode() -> bool:
    """Return whether a level of forward-mode derivatives is entered."""
    return forward_ad._current_level >= 0


def refuse_forward_mode() -> None:
    """Raise where tangents may be about: torch would leave them out of what an operator returns without a word."""
    if in_forward_mode():
        raise NotImplementedError(
            "the operators arm::... have no forward-mode derivatives: call ops.selective_scan and ops.causal_conv1d "
            "instead, uncompiled and inside the forward-mode level; backend='export' where only a backward pass is"
        )


def refuse_second(ctx: object, *grads: Tensor) -> NoReturn:
    """Raise in place of a second derivative."""
    raise NotImplementedError("the kernels have no second derivatives: backend='export' (--scan_backend export) has")


def as_inputs(grads: Iterable[Tensor], inputs: Tensors) -> Tensors:
    """Return each gradient in the dtype of its input and contiguous, as `empty_grads` announces it."""
    return cast(Tensors, tuple(grad.to(x.dtype).contiguous() for grad, x in zip(grads, inputs, strict=True)))


def save(ctx: Any, tensors: Iterable[Tensor | None], internal: Sequence[Tensor]) -> None:
    """Save tensors for the backward pass, and outputs that exist only for it; these have no gradients.

    Autograd would fill those gradients with zeros: as much memory as the states of a scan take.
    """
    ctx.save_for_backward(*tensors, *internal)
    ctx.mark_non_differentiable(*internal)
    ctx.set_materialize_grads(False)


def empty_grads(inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return empty tensors like the gradients that `as_inputs` returns, for tracing."""
    return tuple(x.new_empty(x.shape) for x in inputs)


@custom_op("arm::selective_scan", mutates_args=())
def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    order: Tensor | None, backend: str, trains: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y and, where it `trains`, the states that the backward pass starts from (else an empty tensor)."""
    refuse_forward_mode()
    y, states = backend_module(backend).scan_forward(u, dt, A, B, C, D, dt_bias, order, trains)
    return y.contiguous(), u.new_empty(0) if states is None else states


@selective_scan.register_fake
def _(u, dt, A, B, C, D, dt_bias, order, backend, trains):
    refuse_forward_mode()
    return u.new_empty(u.shape), backend_module(backend).scan_states(u, A) if trains else u.new_empty(0)


@custom_op("arm::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dy: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    order: Tensor | None, states: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of u, dt, A, B, C, D and dt_bias."""
    refuse_forward_mode()
    inputs = (u, dt, A, B, C, D, dt_bias)
    return as_inputs(backend_module(backend).scan_backward(dy, *inputs, order, states), inputs)


@selective_scan_backward.register_fake
def _(dy, u, dt, A, B, C, D, dt_bias, order, states, backend):
    refuse_forward_mode()
    return empty_grads((u, dt, A, B, C, D, dt_bias))


selective_scan_backward.register_autograd(refuse_second)


def _scan_context(ctx, inputs, output):
    *tensors, ctx.backend, ctx.trains = inputs
    save(ctx, tensors, output[1:])


def _scan_grads(ctx, dy, _):
    if dy is None:  # nothing depends on y
        return (None,) * 10
    if not ctx.trains:  # there are no states to start from
        raise RuntimeError("arm::selective_scan was computed with trains=False: it has no gradients")
    return *selective_scan_backward(dy, *ctx.saved_tensors, ctx.backend), None, None, None


selective_scan.register_autograd(_scan_grads, setup_context=_scan_context)


@custom_op("arm::causal_conv1d", mutates_args=())
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, backend: str) -> Tensor:
    """Return the convolution after SiLU."""
    refuse_forward_mode()
    return backend_module(backend).conv_forward(x, weight, bias, order).contiguous()


@causal_conv1d.register_fake
def _(x, weight, bias, order, backend):
    refuse_forward_mode()
    return x.new_empty(weight.shape[0], *x.shape)


@custom_op("arm::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    refuse_forward_mode()
    inputs = (x, weight, bias)
    return as_inputs(backend_module(backend).conv_backward(dy, *inputs, order), inputs)


@causal_conv1d_backward.register_fake
def _(dy, x, weight, bias, order, backend):
    refuse_forward_mode()
    return empty_grads((x, weight, bias))


causal_conv1d_backward.register_autograd(refuse_second)


def _conv_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _conv_grads(ctx, dy):
    return *causal_conv1d_backward(dy, *ctx.saved_tensors, ctx.backend), None, None


causal_conv1d.register_autograd(_conv_grads, setup_context=_conv_context)
