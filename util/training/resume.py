"""Load weights, optimizer and position of a run from its checkpoint."""

import argparse
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from util.checkpoints.convert import is_finite, load
from util.checkpoints.inspection import is_integer, saved_arguments, weights
from util.distributed.parallel import shard_like
from util.errors import UserError, as_user_error
from util.training.precision import is_state


def position(content: dict) -> tuple[int, int]:
    """Return the current epoch of the run that wrote a checkpoint, and the number of its images trained on."""
    return content["epoch"] + 1, content.get("samples", 0)


# the values of a checkpoint that describe the position of its run, and which values are possible
_POSITION: dict[str, Callable[[object], bool]] = {
    "samples": is_integer,
    "skipped_in_a_row": is_integer,
    "scaler": is_state,
    "loss": lambda value: isinstance(value, list) and [type(part) for part in value] == [float, float],
    "max_accuracy": lambda value: isinstance(value, float),
    "ema_max_accuracy": lambda value: isinstance(value, float),
}


def _moment(name: str, value: object, index: int, parameter: nn.Parameter) -> object:
    """Return this process's share of a value of an optimizer's state; raise ValueError if it cannot be one."""
    tensor = torch.as_tensor(value)
    if tensor.shape not in (parameter.shape, ()) or not is_finite(tensor):
        raise ValueError(f"{name} of parameter {index} is not finite, or has another shape")
    return shard_like(value, parameter)


def resume(args: argparse.Namespace, content: dict, model: nn.Module, optimizer: Optimizer) -> tuple[int, int]:
    """Load weights and optimizer, and return the position to resume from.

    `content` is that of the file `args.resume`, and `model` the bare model.

    Returns:
        The epoch, and the number of its images already trained on. They are those of the file; with `args.start_epoch`,
        the start of that epoch, unless the file is of a run with the same `start_epoch` and stands later.

    Raises:
        UserError: the file is no full checkpoint or does not fit; or its epoch is negative (the released code wrote -1,
            -10 and -20 into its latest and best files) and `args.start_epoch` is not given.
    """
    absent = [name for name in ("model", "optimizer") if not isinstance(content.get(name), dict)]
    absent += ["epoch"] * (not is_integer(content.get("epoch"), -20))  # the released code's lowest
    if absent:
        raise UserError(f"cannot resume from {args.resume}: it has no {', '.join(absent)}")
    odd = [name for name, is_possible in _POSITION.items() if name in content and not is_possible(content[name])]
    if odd:
        raise UserError(f"cannot resume from {args.resume}: it is damaged, with impossible values of {', '.join(odd)}")
    if args.start_epoch is None and content["epoch"] < 0 and "samples" not in content:
        raise UserError(
            f"{args.resume} says epoch {content['epoch']}, which no run has: give the next epoch with --start_epoch"
        )
    load(model, weights(content, "model"))
    # moments come from the file; settings (weight decay, layer decay) from this run's arguments
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
            raise ValueError("its learning rate is not finite")
        groups = [{**group, "lr": before["lr"]} for group, before in zip(own, saved["param_groups"], strict=True)]
        state = {
            index: {name: _moment(name, value, index, parameters[index]) for name, value in values.items()}
            for index, values in saved["state"].items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    found, start = position(content), (args.start_epoch, 0)
    same_start = "samples" in content and saved_arguments(content).get("start_epoch") == args.start_epoch
    return found if args.start_epoch is None or (same_start and found >= start) else start
