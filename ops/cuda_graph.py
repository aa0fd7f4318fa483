"""Blocks captured in CUDA graphs: a training step launches two graphs a block in place of each of its kernels.

A graph repeats its kernels on fixed addresses, so everything that a captured block reads and writes is static memory: a
block reads the output of the block before it where that one wrote it, and takes its gradient where the block after it
wrote that; only what comes from elsewhere is copied. `torch.cuda.make_graphed_callables` would copy at every border
between blocks, some 1.1 ms in a step of ARM-base, has to come before DDP, and hands out gradients that its next replay
overwrites.
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ops import transformed
from ops.measured import faster

LOGGER = logging.getLogger("arm")


def captures(asked: bool | None, device: torch.device) -> bool:
    """Return whether a run on `device` captures its blocks: as asked, else where that is measured to be faster.

    Raises:
        ValueError: it is asked for on a device that has no CUDA graphs.
    """
    if asked and device.type != "cuda":
        raise ValueError(f"needs a GPU with CUDA, and the model is on {device.type}")
    return faster("cuda_graph", device) if asked is None else asked


class Recorder:
    """Everything that only CUDA can do; tests on a CPU put an emulation in its place.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # one for all graphs, which are replayed in the order of capture

    def warm_up(self, function: Callable[[], object]) -> None:
        """Call a function three times, so that whatever is compiled, tuned or allocated once is there for the capture.

        Raises:
            RuntimeError: the function waits for the device, which the third call does not allow.
        """
        training, mode = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(training)
        with torch.cuda.stream(self.stream):
            function()
            function()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it does not notice every wait
                torch.cuda.set_sync_debug_mode("error")
                try:
                    function()
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
        training.wait_stream(self.stream)

    def record(self, function: Callable[[], tuple]) -> tuple[Callable[[], None], tuple]:
        """Capture what a function launches.

        Returns:
            What launches it again on the current stream, and the function's result, whose tensors every launch fills.

        Raises:
            RuntimeError: it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves its own stream current where a capture fails: the outer context takes it back.
        with torch.cuda.stream(torch.cuda.current_stream(self.device)):
            try:
                # "thread_local" lets the threads that pin memory and watch NCCL continue with theirs.
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    outputs = function()
            except RuntimeError as error:
                # Where the driver refuses to end the capture, torch stops short of these calls, and from then on would
                # never take back memory that was used on two streams. Where it has made them, the first one raises.
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                    torch._C._cuda_releasePool(self.device.index, self.pool)
                raise RuntimeError(str(error.__context__ or error)) from error  # ending the capture raised one more
        return graph.replay, outputs


class BlockGraphs:
    """The blocks of a model (the elements of its `ModuleList`s), captured once the first batch has shown how.

    The first batch is trained on as always, while this notes how each block is called. `capture` then captures every
    block's forward pass, in order, and its backward pass, in reverse order. From then on a block that is called in the
    same way (training, shapes, strides, dtypes, autocast) replays them; any other call, such as an evaluation or a
    last batch of another size, runs the block itself.

    Weights may change in place, as optimizers and `load_state_dict` change them. What gives parameters other memory
    (`model.to`, `load_state_dict(assign=True)`, `set_input_size`) must come before. The output of a block is
    overwritten by its next call: one forward pass cannot begin before the backward pass of another.

    Args:
        model: bare, on its device, compiled before if at all; it may be wrapped in DDP, but not sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.device = next(model.parameters()).device
        self.calls: list[CapturedBlock] = []
        self.noted: list[tuple[nn.Module, object]] | None = []
        self.repeated: set[nn.Module] = set()
        # Of the pass under way: its number, the block whose forward pass ran last and the one whose backward pass did.
        self.number, self.forward_at, self.backward_at = 0, 0, 0
        self.gradients: list[tuple[Tensor, int]] = []  # parameters, and the addresses of their static gradients
        for part in model.children():
            for block in part if isinstance(part, nn.ModuleList) else ():
                # nn.Module.compile puts its result here: called in place of the module with its hooks, left out of
                # state dicts, pickles and deep copies.
                self.noted.append((block, block._compiled_call_impl))
                block._compiled_call_impl = self._noting(block, block._compiled_call_impl or block._call_impl)

    def _noting(self, block: nn.Module, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return what calls a block as before, and notes how."""

        def call(*args: object, **kwargs: object) -> Tensor:
            if kwargs or not _trains(block):
                return plain(*args, **kwargs)
            if any(call.block is block for call in self.calls):
                self.repeated.add(block)
                return plain(*args)
            with _as_autocast(_autocast(self.device), self.device):  # compile once, for this and the capture
                output = plain(*args)
            self.calls.append(CapturedBlock(self, block, plain, args, output))
            return output

        return call

    def capture(self) -> None:
        """Capture the blocks as the first batch called them; call it after each backward pass, it does it once.

        Where a block cannot be captured, one line says why, and the model stays as it was.
        """
        if self.noted is None:
            return
        for block, compiled in self.noted:
            block._compiled_call_impl = compiled
        self.noted = None
        for call in self.calls:
            call.output = None
        recorder = Recorder(self.device)
        try:
            for call in self.calls:
                block = call.block
                if block in self.repeated:
                    raise RuntimeError("it is called more than once in a batch")
                call.rehearse(recorder)
            for call in self.calls:
                block = call.block
                call.record_forward(recorder)
            for call in reversed(self.calls):
                block = call.block
                call.record_backward(recorder)
        except Exception as error:  # of any library in between: the model trained a batch without graphs
            self.calls.clear()
            kind = type(block).__name__
            LOGGER.error("no CUDA graphs: %s cannot be captured: %s", kind, _reason(error))  # of every rank
            return
        self.forward_at = self.backward_at = len(self.calls)
        for call in self.calls:
            call.block._compiled_call_impl = call
            gradients = zip(call.parameters, call.gradients[len(call.inputs) :], strict=True)
            self.gradients += [(p, gradient.data_ptr()) for p, gradient in gradients if gradient is not None]
        LOGGER.info("%d blocks run as CUDA graphs", len(self.calls))

    def begin_forward(self, index: int) -> int:
        """Note that a block's forward pass is replayed next; return the number of the pass over the model."""
        if index <= self.forward_at:
            self.number += 1
            self.backward_at = len(self.calls)
            self._move_gradients()
        self.forward_at = index
        return self.number

    def begin_backward(self, index: int, number: int) -> None:
        """Note that a block's backward pass is replayed next.

        Raises:
            RuntimeError: what it needs is overwritten: it is not of the newest forward pass, or out of order.
        """
        if number != self.number or index >= self.backward_at:
            raise RuntimeError("a captured block was called again before its backward pass, or these run out of order")
        self.backward_at = index

    def _move_gradients(self) -> None:
        """Give memory of its own to each `.grad` that lies in a graph's, as autograd takes over what is handed out.

        More is added to it (gradient accumulation), and any graph from here on may overwrite it.
        """
        parameters = [p for p, address in self.gradients if p.grad is not None and p.grad.data_ptr() == address]
        if parameters:
            copies = [torch.empty_like(p.grad) for p in parameters]
            torch._foreach_copy_(copies, [p.grad for p in parameters])
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.grad = copy


class CapturedBlock:
    """A block that replays the graphs of one way to call it, and for other calls runs itself.

    Args:
        graphs: of the model; its `calls` are those before this one.
        block: called once in a pass.
        plain: calls it as before.
        args: tensors, or what is equal in every call.
        output: the tensor that it returned.
    """

    def __init__(
        self, graphs: BlockGraphs, block: nn.Module, plain: Callable[..., Tensor], args: tuple, output: Tensor
    ) -> None:
        self.graphs, self.index, self.block, self.plain = graphs, len(graphs.calls), block, plain
        self.autocast, self.layouts = _autocast(graphs.device), _layouts(args)
        self.parameters, self.output = list(block.parameters()), output
        # By the place of an argument: the earlier block whose output it is; what stands there without a gradient, and
        # at which version its values were copied.
        self.sources = {i: call for i, arg in enumerate(args) for call in graphs.calls if arg is call.output}
        self.copied = {
            i: (arg, None) for i, arg in enumerate(args) if isinstance(arg, Tensor) and not arg.requires_grad
        }
        self.consumer: tuple[CapturedBlock, int] | None = None  # who reads the output first, and at which place
        for i, source in self.sources.items():
            source.consumer = source.consumer or (self, i)

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        captured = not kwargs and _trains(self.block) and _autocast(self.graphs.device) == self.autocast
        if captured and _layouts(args) == self.layouts:
            return _Replay.apply(self, *args, *self.parameters)
        return self.plain(*args, **kwargs)

    # ---- capture ----

    def rehearse(self, recorder: Recorder) -> None:
        """Warm up both passes; raises RuntimeError with the operator that makes a capture impossible."""
        # Aliases share the memory of the parameters. Autograd's nodes of the parameters themselves belong to the stream
        # of training, and DDP's hooks hang on them: both would reach out of the capture.
        self.aliases = {
            f"block.{name}": nn.Parameter(p.detach(), p.requires_grad) for name, p in self.block.named_parameters()
        }
        self.module = _Bare(self.block, self.plain)
        self.inputs = [layout.new() if isinstance(layout, _Layout) else layout for layout in self.layouts]
        for i, (arg, _) in self.copied.items():
            self._copy_in(i, arg)
        try:
            recorder.warm_up(self._rehearsal)
        except RuntimeError:
            with _LastOperator() as last:
                try:
                    recorder.warm_up(self._rehearsal)
                except RuntimeError as error:
                    raise RuntimeError(f"{last.name}: {_reason(error)}") from error
            raise
        for i in self.sources:
            self.inputs[i] = None  # until the earlier block has a static output

    def _rehearsal(self) -> None:
        self._forward()
        self.gradient = torch.zeros_like(self.output)
        self._backward()
        self.output = self.gradient = None  # and autograd's nodes of this stream with them

    def record_forward(self, recorder: Recorder) -> None:
        """Capture the forward pass; those of earlier blocks are captured."""
        for i, source in self.sources.items():
            self.inputs[i] = source.result.detach().requires_grad_(self.layouts[i].requires_grad)
        self.replay_forward, (output,) = recorder.record(self._forward)
        self.result = output.detach()

    def record_backward(self, recorder: Recorder) -> None:
        """Capture the backward pass; those of later blocks are captured."""
        handed_back = None
        if self.consumer is not None:
            consumer, i = self.consumer
            handed_back = consumer.gradients[i]
        self.gradient = torch.zeros_like(self.result) if handed_back is None else handed_back
        self.replay_backward, gradients = recorder.record(self._backward)
        gradients = iter(gradients)  # of what has one, by place: arguments, then parameters
        self.gradients = [next(gradients) if _trainable(x) else None for x in (*self.inputs, *self.parameters)]

    def _forward(self) -> tuple[Tensor]:
        with _as_autocast(self.autocast, self.graphs.device):
            self.output = functional_call(self.module, self.aliases, tuple(self.inputs))
        return (self.output,)

    def _backward(self) -> tuple[Tensor | None, ...]:
        inputs = [x for x in (*self.inputs, *self.aliases.values()) if _trainable(x)]
        return torch.autograd.grad(self.output, inputs, self.gradient, allow_unused=True)

    # ---- replay ----

    def forward(self, args: tuple) -> int:
        """Replay the forward pass into `result`; return the number of the pass over the model."""
        number = self.graphs.begin_forward(self.index)
        for i, (static, arg) in enumerate(zip(self.inputs, args, strict=True)):
            if isinstance(static, Tensor) and static.data_ptr() != arg.data_ptr():
                self._copy_in(i, arg)
        self.replay_forward()
        torch.autograd.graph.increment_version(self.result)  # so that autograd notices who still needs the old one
        return number

    def _copy_in(self, i: int, arg: Tensor) -> None:
        """Copy an argument, unless it is the one whose values are there: a mask, an order of tokens."""
        if i in self.copied:
            if self.copied[i][0] is arg and self.copied[i][1] == arg._version:
                return
            self.copied[i] = arg, arg._version
        self.inputs[i].copy_(arg)

    def backward(self, gradient: Tensor, number: int) -> list[Tensor | None]:
        """Replay the backward pass of a pass over the model; return the gradients of arguments and parameters."""
        self.graphs.begin_backward(self.index, number)
        if gradient.data_ptr() != self.gradient.data_ptr():
            self.gradient.copy_(gradient)
        self.replay_backward()
        # New tensors on the same memory, which autograd takes over as `.grad` without a copy.
        return [x if x is None else x.detach() for x in self.gradients]


class _Replay(torch.autograd.Function):
    """One node of autograd for a block: its parameters' gradients reach DDP when its backward pass is queued."""

    @staticmethod
    def forward(ctx: FunctionCtx, call: CapturedBlock, *tensors: object) -> Tensor:
        ctx.call, ctx.number = call, call.forward(tensors[: len(call.inputs)])
        return call.result.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.call.backward(gradient, ctx.number)


class _Bare(nn.Module):
    """Calls a block past the graphs that may have taken its place."""

    def __init__(self, block: nn.Module, plain: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self.forward = block, plain


class _LastOperator(TorchDispatchMode):
    """Remembers which operator ran last, by `name`."""

    name = "no operator"

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.name = str(func)
        return func(*args, **(kwargs or {}))


class _Layout(NamedTuple):
    """The properties of a tensor that kernels are compiled for."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def new(self) -> Tensor:
        """Return a tensor of zeros like this."""
        zeros = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).zero_()
        return zeros.requires_grad_(self.requires_grad)


def _layouts(args: tuple) -> list[object]:
    return [
        _Layout(x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x for x in args
    ]


def _trainable(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _trains(block: nn.Module) -> bool:
    return block.training and torch.is_grad_enabled() and not transformed()


def _autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _as_autocast(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Return autocast to a dtype, without its cache of weights: a graph that read from there would keep old ones."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


def _reason(error: Exception) -> str:
    """Return the first line of its message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
