"""Capture blocks in CUDA graphs: a training step launches two graphs per block instead of every kernel.

A graph repeats its kernels on fixed addresses, so a captured block reads and writes static memory. A block reads its
input where the block before it wrote it, and its gradient where the block after it wrote it. Only other tensors are
copied. `torch.cuda.make_graphed_callables` would copy at every border between blocks (1.1 ms in a step of ARM-base),
must be called before DDP, and returns gradients that its next replay overwrites.
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ops import transformed
from ops.measured import faster

LOGGER = logging.getLogger("arm")


def captures(asked: bool | None, device: torch.device) -> bool:
    """Return whether a run on `device` captures its blocks: as asked, else if this is measured to be faster.

    Raises:
        ValueError: CUDA graphs are requested on another kind of device.
    """
    if asked and device.type != "cuda":
        raise ValueError(f"needs a GPU with CUDA, and the model is on {device.type}")
    return faster("cuda_graph", device) if asked is None else asked


class Recorder:
    """The calls of CUDA, for a model on `device`; tests on a CPU replace this class by an emulation."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # shared: graphs are replayed in the order of capture

    def warm_up(self, function: Callable[[], object]) -> None:
        """Call a function three times, to compile, tune and allocate before the capture.

        Raises:
            RuntimeError: the third call waits for the device, which a capture does not allow.
        """
        training, mode = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(training)
        with torch.cuda.stream(self.stream):
            function()
            function()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch does not notice every wait
                torch.cuda.set_sync_debug_mode("error")
                try:
                    function()
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
        training.wait_stream(self.stream)

    def record(self, function: Callable[[], tuple]) -> tuple[Callable[[], None], tuple]:
        """Capture the kernels that a function launches.

        Returns:
            A function that launches them again on the current stream, and the result, whose tensors they fill again.

        Raises:
            RuntimeError: the kernels cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # If a capture fails, torch.cuda.graph leaves its own stream current: the outer context restores the old one.
        with torch.cuda.stream(torch.cuda.current_stream(self.device)):
            try:
                # "thread_local" lets the threads that pin memory and watch NCCL continue with theirs.
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    outputs = function()
            except RuntimeError as error:
                # If the driver refuses to end the capture, torch does not make these calls, and would never again free
                # memory that was used on two streams. If torch made them, the first one raises.
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                    torch._C._cuda_releasePool(self.device.index, self.pool)
                raise RuntimeError(str(error.__context__ or error)) from error  # the context is the first error
        return graph.replay, outputs


class BlockGraphs:
    """The blocks of a model (the elements of its `ModuleList`s), captured after the first batch.

    During the first batch, which runs without graphs, the calls of the blocks are recorded. `capture` then captures
    the forward passes in order and the backward passes in reverse order. Later calls with the same mode, shapes,
    strides, dtypes and autocast replay them. Any other call, such as an evaluation or a batch of another size, runs the
    block itself.

    Weights may change in place, as by optimizers and `load_state_dict`. Parameters must not move to other memory later
    (`model.to`, `load_state_dict(assign=True)`, `set_input_size`). The next call of a block overwrites its output: a
    forward pass must not begin before the backward pass of the previous one has ended.

    Args:
        model: not wrapped, on its device, already compiled if it will be; DDP may wrap it later, FSDP must not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.device = next(model.parameters()).device
        self.calls: list[CapturedBlock] = []
        self.noted: list[tuple[nn.Module, Callable | None]] | None = []  # blocks and their compiled functions
        self.repeated: set[nn.Module] = set()
        # Number of the current pass over the model, and the last block in its forward and in its backward pass.
        self.number, self.forward_at, self.backward_at = 0, 0, 0
        self.gradients: list[tuple[Tensor, int]] = []  # parameters, and the addresses of their static gradients
        for part in model.children():
            for block in part if isinstance(part, nn.ModuleList) else ():
                # nn.Module.compile stores its result here. It replaces the call of the module with its hooks, and is
                # not part of state dicts, pickles and deep copies.
                self.noted.append((block, block._compiled_call_impl))
                block._compiled_call_impl = self._noting(block, block._compiled_call_impl or block._call_impl)

    def _noting(self, block: nn.Module, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function that calls a block as before and records the call."""

        def record(*args: object, **kwargs: object) -> Tensor:
            if kwargs or not _trains(block):
                return plain(*args, **kwargs)
            if any(call.block is block for call in self.calls):
                self.repeated.add(block)
                return plain(*args)
            with _as_autocast(_autocast(self.device), self.device):  # compile once, for this and the capture
                output = plain(*args)
            self.calls.append(CapturedBlock(self, block, plain, args, output))
            return output

        return record

    def capture(self) -> None:
        """Capture the blocks as the first batch called them; calls after the first one do nothing.

        If a block cannot be captured, one line says why, and the model runs without graphs.
        """
        if self.noted is None:
            return
        for block, compiled in self.noted:
            block._compiled_call_impl = compiled
        self.noted = None
        recorder, backwards = Recorder(self.device), self.calls[::-1]
        for call in self.calls:
            del call.output
        stages = (CapturedBlock.rehearse, CapturedBlock.record_forward, CapturedBlock.record_backward)
        try:
            for stage, calls in zip(stages, (self.calls, self.calls, backwards), strict=True):
                for call in calls:
                    stage(call, recorder)
        except Exception as error:  # of any library: the model trained a batch without graphs
            self.calls.clear()
            kind = type(call.block).__name__
            LOGGER.error("no CUDA graphs: %s cannot be captured: %s", kind, _reason(error))  # of every rank
            return
        self.forward_at = self.backward_at = len(self.calls)
        for call in self.calls:
            call.block._compiled_call_impl = call
            gradients = zip(call.parameters, call.gradients[len(call.inputs) :], strict=True)
            self.gradients += [(p, gradient.data_ptr()) for p, gradient in gradients if gradient is not None]
        LOGGER.info("%d blocks run as CUDA graphs", len(self.calls))

    def begin_forward(self, index: int) -> int:
        """Record that a block's forward pass is replayed next; return the number of the pass over the model."""
        if index <= self.forward_at:
            self.number += 1
            self.backward_at = len(self.calls)
            self._move_gradients()
        self.forward_at = index
        return self.number

    def begin_backward(self, index: int, number: int) -> None:
        """Record that a block's backward pass is replayed next.

        Raises:
            RuntimeError: its inputs are overwritten: it is not of the newest forward pass, or out of order.
        """
        if number != self.number or index >= self.backward_at:
            raise RuntimeError("a captured block was called again before its backward pass, or these run out of order")
        self.backward_at = index

    def _move_gradients(self) -> None:
        """Copy each `.grad` that autograd took over from a graph, because the next replays overwrite it."""
        moved = {p: p.grad for p, address in self.gradients if p.grad is not None and p.grad.data_ptr() == address}
        if moved:
            copies = [torch.empty_like(grad) for grad in moved.values()]
            torch._foreach_copy_(copies, list(moved.values()))
            for parameter, copy in zip(moved, copies, strict=True):
                parameter.grad = copy


class CapturedBlock:
    """A block that replays the graphs of calls like the recorded one, and runs itself for other calls.

    Args:
        graphs: of the model; its `calls` are those before this one.
        block: called once in a pass.
        plain: calls the block without graphs.
        args: of the recorded call: tensors, or values that must be equal in every call.
        output: of the recorded call.
    """

    def __init__(
        self, graphs: BlockGraphs, block: nn.Module, plain: Callable[..., Tensor], args: tuple, output: Tensor
    ) -> None:
        self.graphs, self.index, self.block, self.plain = graphs, len(graphs.calls), block, plain
        self.autocast, self.layouts = _autocast(graphs.device), _layouts(args)
        self.parameters, self.output = list(block.parameters()), output
        # By the position of an argument: the earlier block whose output it is; tensors without a gradient, and the
        # version whose values were copied.
        self.sources = {i: call for i, arg in enumerate(args) for call in graphs.calls if arg is call.output}
        fixed = {i: arg for i, arg in enumerate(args) if isinstance(arg, Tensor) and not arg.requires_grad}
        self.copied: dict[int, tuple[Tensor, int | None]] = {i: (arg, None) for i, arg in fixed.items()}
        self.consumer: tuple[CapturedBlock, int] | None = None  # the first reader of the output, and the position there
        for i, source in self.sources.items():
            source.consumer = source.consumer or (self, i)

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        captured = not kwargs and _trains(self.block) and _autocast(self.graphs.device) == self.autocast
        if captured and _layouts(args) == self.layouts:
            return _Replay.apply(self, *args, *self.parameters)
        return self.plain(*args, **kwargs)

    # ---- capture ----

    def rehearse(self, recorder: Recorder) -> None:
        """Warm up both passes.

        Raises:
            RuntimeError: the block cannot be captured; the message names the operator.
        """
        if self.block in self.graphs.repeated:
            raise RuntimeError("it is called more than once in a batch")
        # Aliases share the memory of the parameters, but not autograd's nodes with DDP's hooks. Those belong to the
        # stream of training and must not take part in the capture.
        named = self.block.named_parameters()
        self.aliases: dict[str, Tensor] = {f"block.{n}": nn.Parameter(p.detach(), p.requires_grad) for n, p in named}
        self.module = _Bare(self.block, self.plain)
        self.inputs: list[Any] = [layout.new() if isinstance(layout, _Layout) else layout for layout in self.layouts]
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
            self.inputs[i] = None  # until the earlier block is captured

    def _rehearsal(self) -> None:
        self._forward()
        self.gradient = torch.zeros_like(self.output)
        self._backward()
        del self.output, self.gradient  # and with them autograd's nodes of this stream

    def record_forward(self, recorder: Recorder) -> None:
        """Capture the forward pass, after those of earlier blocks."""
        for i, source in self.sources.items():
            self.inputs[i] = source.result.detach().requires_grad_(self.layouts[i].requires_grad)
        self.replay_forward, (output,) = recorder.record(self._forward)
        self.result: Tensor = output.detach()

    def record_backward(self, recorder: Recorder) -> None:
        """Capture the backward pass, after those of later blocks."""
        handed_back: Tensor | None = None
        if self.consumer is not None:
            consumer, i = self.consumer
            handed_back = consumer.gradients[i]
        self.gradient = torch.zeros_like(self.result) if handed_back is None else handed_back
        self.replay_backward, found = recorder.record(self._backward)
        of_trainable = iter(found)
        tensors = (*self.inputs, *self.parameters)
        self.gradients: list[Tensor | None] = [next(of_trainable) if _trainable(x) else None for x in tensors]

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
        torch.autograd.graph.increment_version(self.result)  # lets autograd refuse late uses of the old values
        return number

    def _copy_in(self, i: int, arg: Tensor) -> None:
        """Copy an argument, unless its values were copied before: a mask, an order of tokens."""
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
    """One node of autograd per block: DDP receives its gradients as soon as its backward pass is launched."""

    @staticmethod
    def forward(ctx: Any, call: CapturedBlock, *tensors: object) -> Tensor:
        ctx.call, ctx.number = call, call.forward(tensors[: len(call.inputs)])
        return call.result.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.call.backward(gradient, ctx.number)


class _Bare(nn.Module):
    """Call a block without graphs."""

    def __init__(self, block: nn.Module, plain: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self.forward = block, plain


class _LastOperator(TorchDispatchMode):
    """Store the name of the last operator in `name`."""

    name = "no operator"

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
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


def _layouts(args: tuple) -> list[Any]:
    return [
        _Layout(x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x for x in args
    ]


def _trainable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _trains(block: nn.Module) -> bool:
    return block.training and torch.is_grad_enabled() and not transformed()


def _autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, None if it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _as_autocast(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Return autocast to a dtype, without its cache: a graph would read old weights from there."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


def _reason(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
