"""Time forward and backward of each fused operator and of the same computation compiled by torch, in one run.

    python benchmarks/bench_ops.py

Each operator of `ops.fused` in the model is timed in the smallest brick that uses it: the convolution by itself,
SwiGLU, the mixer, a block; on a GPU compiled, under autocast, at the sizes of ARM-base. Output and gradients are first
compared with the same brick in float64; the fused form may differ from it at most twice as much as the compiled one. A
form that is wrong is not timed. An operator is left out if the brick runs the same kernels with it and without. Rounds
interleave, and the median is reported; the spread is the interquartile range of the rounds.
"""

import argparse
import statistics
import sys
import traceback
import types
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command_line import fitting, make_parser
from mamba import FOUR_DIRECTIONS, ONE_DIRECTION, Block, Mixer, SwiGLU, scan_orders
from ops import BackendUnavailable, causal_conv1d, fused, unavailable
from ops.backends import backend_module
from util import cli, hardware
from util.distributed.processes import init_device
from util.training.precision import activation_dtype, autocast

# Images, channels, and rows and columns of patches. One direction and no class token where the grid is None.
SIZES = {
    "pretraining": (256, 768, 128, None),
    "finetuning": (128, 768, 197, (14, 14)),
    "pretraining_toy": (2, 32, 6, None),
    "finetuning_toy": (2, 32, 7, (2, 3)),
}
OPERATORS = [name for name in fused.FUSED if name not in ("augment", "casts")]  # casts: an option of the compiler
ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # limit of either form, relative to the norm of a tensor
Inputs = list[Tensor | None]  # activations first, then the scan order


class WrongForm(Exception):
    """A form of an operator computes something else."""


class Convolution(nn.Module):
    """The mixer's convolutions of one half of the output of `in_proj`: (B, L, 2 C) -> (K, B, L, C)."""

    def __init__(self, dim: int, directions: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(torch.randn(directions, dim, 4) / 2)
        self.bias = nn.Parameter(torch.randn(directions, dim) / 2)

    def forward(self, x: Tensor, order: Tensor | None) -> Tensor:
        return causal_conv1d(x.chunk(2, dim=-1)[0], self.weight, self.bias, order, self.backend)


def brick(operator: str, size: tuple, backend: str, device: torch.device) -> tuple[nn.Module, Inputs]:
    """Return the smallest module that uses an operator, and its inputs."""
    batch, dim, tokens, grid = size
    directions = ONE_DIRECTION if grid is None else FOUR_DIRECTIONS
    torch.manual_seed(0)
    with device:
        order = None if grid is None else scan_orders(grid).to(device)
        x, low = torch.randn(batch, tokens, dim), activation_dtype(device)
        if operator == "conv":
            wide = torch.randn(batch, tokens, 2 * dim, dtype=low)
            return Convolution(dim, len(directions), backend), [wide, order]
        if operator == "swiglu":
            return SwiGLU(dim), [x.to(low)]
        if operator == "projections":
            return Mixer(dim, 1.0, directions, backend), [x.to(low), order]
        return Block(dim, 12, directions, backend), [x, order]  # the residual stream is float32


def activations(inputs: Inputs) -> Tensor:
    """Return the first input of a brick."""
    assert inputs[0] is not None
    return inputs[0]


def differentiated(module: nn.Module, inputs: Inputs, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the activations and of every parameter."""
    return torch.autograd.grad(y, [activations(inputs), *module.parameters()], dy)


def gradient_of(y: Tensor) -> Tensor:
    """Return a gradient of y, the same random numbers for every y of this shape."""
    dy = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1), device=y.device)
    return dy.bfloat16().to(y)  # equal in every dtype


def computed(module: nn.Module, inputs: Inputs, form: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Return the output and all gradients by name, of a module or of a form of it."""
    inputs = [activations(inputs).detach().requires_grad_(), *inputs[1:]]
    y = (form or module)(*inputs)
    dy = gradient_of(y)
    names = ("input", *(name for name, _ in module.named_parameters()))
    return {"output": y.detach(), **dict(zip(names, differentiated(module, inputs, y, dy), strict=True))}


class Kernels(TorchDispatchMode):
    """Collects in `seen` the operators that run, and the Triton kernels with their constants."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))

    def launch(self, start: Callable[..., None]) -> Callable[..., None]:
        def noted(kernel: object, paths: int, *args: object, **constants: object) -> None:
            self.seen.add(f"{kernel} {constants}")
            start(kernel, paths, *args, **constants)

        return noted


def kernels_of(module: nn.Module, inputs: Inputs) -> set[str]:
    """Return the kernels that a brick runs, uncompiled."""
    backend, kernels, device = backend_module("triton"), Kernels(), activations(inputs).device
    with patch.object(backend, "_launch", kernels.launch(backend._launch)), autocast(device), kernels:
        computed(module, inputs)
    return kernels.seen


@cache
def missing(operator: str, device: torch.device) -> str | None:
    """Return why a fused operator does not work here or is not there, None if it works."""
    if reason := unavailable("triton"):
        return reason
    module, inputs = brick(operator, SIZES["pretraining_toy"], "triton", device)
    seen = []
    try:
        for names in (["none"], [operator]):
            fused.use(names, device)
            seen.append(kernels_of(module, inputs))
    except BackendUnavailable as error:
        return str(error)
    return "the same kernels run with it and without: there is no such operator" if seen[0] == seen[1] else None


def form_of(module: nn.Module, name: str, device: torch.device) -> Callable[..., Tensor]:
    """Return a function that calls a module under autocast, compiled on a GPU.

    Each form has a code object of its own: the compiler caches by code object, and stops compiling one after some
    recompilations.
    """

    def call(*inputs: Tensor | None) -> Tensor:
        return module(*inputs)

    if device.type == "cuda":
        code = call.__code__.replace(co_name=f"{name}_form")
        call = torch.compile(types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__))

    def mixed(*inputs: Tensor | None) -> Tensor:
        with autocast(device):
            return call(*inputs)

    return mixed


def check(operator: str, size: tuple, forms: dict[str, Callable], module: nn.Module, inputs: Inputs) -> dict[str, dict]:
    """Return the error of each tensor in each form, relative to its norm in float64.

    Raises:
        WrongForm: the message says how.
    """
    x = activations(inputs)
    device = x.device
    exact, _ = brick(operator, size, "torch", device)
    exact.load_state_dict(module.state_dict())
    fused.use(["none"], device)
    want = computed(exact.double(), [x.double(), *inputs[1:]])
    errors = {}
    for name, form in forms.items():
        fused.use([operator] if name == "fused" else ["none"], device)
        got = computed(module, inputs, form)
        errors[name] = {
            key: ((got[key].double() - w).norm() / w.norm().clamp(min=1e-30)).item() for key, w in want.items()
        }
        for key, error in errors[name].items():
            limit = ERROR[activation_dtype(device)]
            if name == "fused":
                limit = min(limit, 2 * errors["compiled"][key] + limit / 10)
            if not error < limit:
                raise WrongForm(f"the {name} form is wrong: {key} differs by {error:.1e}, at most {limit:.1e} is right")
    return errors


def time_forms(
    operator: str, forms: dict[str, Callable], module: nn.Module, inputs: Inputs, repetitions: int
) -> dict[str, dict[str, float]]:
    """Return microseconds of forward, backward and both, and the spread of both, by form; rounds interleave."""
    activations(inputs).requires_grad_()
    device = activations(inputs).device
    times = hardware.time_rounds(
        {name: partial(form, *inputs) for name, form in forms.items()},
        lambda y: partial(differentiated, module, inputs, y, gradient_of(y)),
        device,
        repetitions,
        before=lambda name: fused.use([operator] if name == "fused" else ["none"], device),
    )
    rows = {name: {key: statistics.median(us) for key, us in parts.items()} for name, parts in times.items()}
    for name, parts in times.items():
        quarters = statistics.quantiles(parts["both"], n=4, method="inclusive") if repetitions > 1 else (0, 0, 0)
        rows[name]["spread"] = quarters[2] - quarters[0]
    return rows


def measure(operator: str, size: tuple, device: torch.device, repetitions: int) -> dict:
    """Return the times and errors of both forms, or why there are none."""
    try:
        if reason := missing(operator, device):
            return {"left_out": reason}
        torch._dynamo.reset()
        module, inputs = brick(operator, size, "triton", device)
        forms = {name: form_of(module, name, device) for name in ("compiled", "fused")}
        errors = check(operator, size, forms, module, inputs)
        us = time_forms(operator, forms, module, inputs, repetitions)
    except WrongForm as error:
        return {"wrong": str(error)}
    except Exception as error:  # of one operator: the others can still be measured
        traceback.print_exc()
        return {"wrong": f"it fails: {hardware.failure(error)}"}
    return {"microseconds": us, "largest_error": {name: max(found.values()) for name, found in errors.items()}}


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser("bench_ops.py", __doc__, {"repetitions": (11, "timed rounds, after three more")})
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS, help="default: %(default)s")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=fitting(SIZES), help="default: %(default)s")
    return parser


def main(args: argparse.Namespace) -> None:
    """Check, time, print a table, write everything as JSON."""
    device = init_device(args.device)
    dtype = str(activation_dtype(device)).removeprefix("torch.")
    report = hardware.Report("ops", device, args.output, dtype=dtype)
    columns = ("forward", "backward", "both", "spread")
    print(f"{'µs':<{hardware.WIDTH}}" + "".join(f"{key:>12}" for key in columns))
    for size in args.sizes:
        for operator in args.operators:
            work = partial(measure, operator, SIZES[size], device, args.repetitions)
            row = report.add(f"{operator}, {size}", {"operator": operator, "size": size}, work)
            for name, us in row["microseconds"].items() if row else ():
                numbers = "".join(f"{us[key]:>12.1f}" for key in columns)
                print(f"{f'{operator}, {size}, {name}':<{hardware.WIDTH}}{numbers}", flush=True)
    fused.use(["none"], device)
    report.close()


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
