"""Choose the kernels of a run: scan backend, fused operators, compilation and CUDA graphs."""

import argparse
import logging

import torch
from torch import Tensor, nn

from ops import BackendUnavailable, choose_backend, fused, unavailable
from ops.cuda_graph import BlockGraphs, captures
from util.errors import UserError, as_user_error
from util.training import precision

LOGGER = logging.getLogger("arm")


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add `--cuda_graph`, `--no_cuda_graph` and `--fused_ops`."""
    add = parser.add_argument
    add(
        "--cuda_graph",
        action="store_true",
        default=None,
        help="capture the blocks in CUDA graphs, which takes less CPU time (default: if measured faster on this GPU)",
    )
    add("--no_cuda_graph", action="store_false", dest="cuda_graph", help="launch each kernel separately")
    add(
        "--fused_ops",
        nargs="+",
        choices=("auto", "all", "none", *fused.FUSED),
        default=["auto"],
        metavar="NAME",
        help=f"fuse operators on a GPU: all, none, or some of {', '.join(fused.FUSED)}; auto takes those that are "
        "measured to be faster on this GPU (default: auto)",
    )


def choose(args: argparse.Namespace, device: torch.device, width: int, idle: dict[str, str]) -> None:
    """Check that the scan backend supports a model of this width; choose dtype, fused operators and CUDA graphs.

    The choice replaces `args.dtype`, `args.fused_ops` and `args.cuda_graph`. `idle` names fused operators that would do
    nothing in this run, and why; they are refused if asked for by name.

    Raises:
        UserError: the backend, or an operator that was asked for, does not work here.
    """
    precision.choose(args, device)
    if not should_compile(args.compile, device):
        idle = idle | {"casts": "the model is not compiled"}
    with as_user_error(TypeError, ValueError, BackendUnavailable):
        choose_backend(args.scan_backend, device, precision.activation_dtype(device), width)
    for name in idle.keys() & {*args.fused_ops}:
        raise UserError(f"--fused_ops {name}: {idle[name]}")
    with as_user_error(ValueError, BackendUnavailable, prefix=f"--fused_ops {' '.join(args.fused_ops)}: "):
        args.fused_ops = fused.use(args.fused_ops, device, idle)
    if args.fused_ops:
        LOGGER.info("fused operators: %s", ", ".join(args.fused_ops))
    with as_user_error(ValueError, prefix="--cuda_graph "):
        args.cuda_graph = captures(args.cuda_graph, device)


def should_compile(asked: bool | None, device: torch.device) -> bool:
    """Return `asked` unless it is None; then whether the device is a GPU and Triton works, which compiling needs."""
    return asked if asked is not None else device.type == "cuda" and unavailable("triton") is None


def compile_models(args: argparse.Namespace, device: torch.device, *models: nn.Module) -> None:
    """Compile models in place, block by block, if the run is to be compiled."""
    if should_compile(args.compile, device):
        for model in models:
            model.compile(**fused.compile_options())


def block_graphs(args: argparse.Namespace, model: nn.Module) -> BlockGraphs | None:
    """Return CUDA graphs of the blocks of an unwrapped, compiled model or its `backbone`, if the run uses them."""
    return BlockGraphs(getattr(model, "backbone", model)) if args.cuda_graph else None


def fuse_augmentation(transform: object) -> None:
    """Let a transform compute RandAugment with Triton kernels if `augment` is among the chosen operators."""
    from util.data.randaugment import carry_out_layers  # imports timm and torchvision
    from util.data.uint8_transform import Uint8Transform

    if isinstance(transform, Uint8Transform):
        transform.carry_out = carry_out_fused if fused.uses("augment") else carry_out_layers


def carry_out_fused(images: Tensor, notes: Tensor, parameters: Tensor, order: Tensor, fill: Tensor) -> Tensor:
    """Compute RandAugment with Triton kernels; see `util.data.randaugment.carry_out_layers`."""
    from ops.fused import triton_randaugment  # imports Triton

    return triton_randaugment.carry_out(images, parameters, fill)
