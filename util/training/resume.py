"""Resume: load weights, optimizer and position of a run from its checkpoint."""

import argparse
import math

import torch
from torch import nn
from torch.optim import Optimizer

from util.checkpoints.convert import is_finite, load
from util.checkpoints.inspection import saved_arguments, weights
from util.distributed.parallel import shard_like
from util.errors import UserError, as_user_error


def position(content: dict) -> tuple[int, int]:
    """Where in its run a checkpoint was written: the epoch under way, and the images of it that were trained on."""
    return content["epoch"] + 1, content.get("samples", 0)


def _is_whole(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


# what of a checkpoint tells where its run stands: which values it can have
_POSITION = {
    "samples": _is_whole,
    "skipped_in_a_row": _is_whole,
    "loss": lambda value: isinstance(value, list) and [type(part) for part in value] == [float, float],
    "max_accuracy": lambda value: isinstance(value, float),
    "ema_max_accuracy": lambda value: isinstance(value, float),
}


def _moment(name: str, value: object, index: int, parameter: nn.Parameter) -> object:
    """Return this process's share of one value of an optimizer's state.

    Raises:
        ValueError: it is neither a number nor of the parameter's shape, or not finite.
    """
    tensor = torch.as_tensor(value)
    if tensor.shape not in (parameter.shape, ()) or not is_finite(tensor):
        raise ValueError(f"{name} of parameter {index} is not finite, or has another shape")
    return shard_like(value, parameter)


def resume(args: argparse.Namespace, content: dict, model: nn.Module, optimizer: Optimizer) -> tuple[int, int]:
    """Load weights and optimizer to go on with a run.

    Args:
        args: of the run; `resume` and `start_epoch` count.
        content: of the file `args.resume`.
        model: the bare model.
        optimizer: its optimizer.

    Returns:
        The epoch to go on with and the images of it that have been trained on: as in the file, or where
        `args.start_epoch` is given, that epoch from its beginning; as in the file again where that was written since,
        by a run with the same `start_epoch`.

    Raises:
        UserError: the file is no full checkpoint or does not fit, or holds an epoch that no run has (the released code
            wrote -1, -10 and -20 into its latest and best files) while `args.start_epoch` is not given.
    """
    absent = [name for name in ("model", "optimizer") if not isinstance(content.get(name), dict)]
    absent += ["epoch"] * (not _is_whole(content.get("epoch"), -20))  # the released code's lowest
    if absent:
        raise UserError(f"cannot resume from {args.resume}: it has no {', '.join(absent)}")
    odd = [name for name, is_possible in _POSITION.items() if name in content and not is_possible(content[name])]
    if odd:
        raise UserError(f"cannot resume from {args.resume}: it is damaged, {', '.join(odd)} cannot be what a run wrote")
    if args.start_epoch is None and content["epoch"] < 0 and "samples" not in content:
        raise UserError(
            f"{args.resume} says epoch {content['epoch']}, which no run has: tell the true next one with --start_epoch"
        )
    load(model, weights(content, "model"))
    # the moments come from the file, the settings (weight decay, layer decay) from this run's arguments
    own = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with as_user_error(
        ValueError, LookupError, TypeError, AttributeError,
        prefix=f"the optimizer in {args.resume} does not fit this run: ",
    ):  # fmt: skip
        saved = content["optimizer"]
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
            raise ValueError("it has other groups of parameters")
        if not all(isinstance(before["lr"], float) and math.isfinite(before["lr"]) for before in saved["param_groups"]):
            raise ValueError("its learning rate is no finite number")
        groups = [{**group, "lr": before["lr"]} for group, before in zip(own, saved["param_groups"], strict=True)]
        state = {
            index: {name: _moment(name, value, index, parameters[index]) for name, value in values.items()}
            for index, values in saved["state"].items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    found, start = position(content), (args.start_epoch, 0)
    since = "samples" in content and saved_arguments(content).get("start_epoch") == args.start_epoch
    return found if args.start_epoch is None or (since and found >= start) else start
