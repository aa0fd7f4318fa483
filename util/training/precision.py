"""Mixed precision: the dtype of activations, and loss scaling for float16."""

import argparse
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOGGER = logging.getLogger("arm")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOOR = 1.0  # smallest scale of the loss: below it, gradients that float16 can hold would vanish

_chosen: str | None = None  # of this process, see `choose`


def choose(args: argparse.Namespace, device: torch.device) -> None:
    """Let this process compute as `args.dtype` says, and set it to the dtype chosen where it is None.

    The default is bfloat16 on a GPU and float32 elsewhere. GPUs before Ampere (compute capability 8.0) do not multiply
    in bfloat16, so that float16 is the default there, and a line says so.
    """
    global _chosen
    _chosen = getattr(args, "dtype", None)
    if _chosen is None and (_chosen := _default(device)) == "fp16":
        LOGGER.info("this GPU does not compute in bfloat16: activations are float16, as with --dtype fp16")
    args.dtype = _chosen


def _default(device: torch.device) -> str:
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def activation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of activations: that chosen for this process, else the default of the device."""
    return DTYPES[_chosen or _default(device)]


def autocast(device: torch.device) -> torch.autocast:
    """Return a context that casts activations to `activation_dtype`."""
    dtype = activation_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class LossScale:
    """Scale the loss so that gradients of float16 activations neither vanish nor overflow, without host waits.

    The arithmetic, the defaults and the saved state are those of `torch.amp.GradScaler` (Micikevicius et al. 2018).
    That class decides itself which updates are skipped; here the loop does. Only float16 needs a scale: with other
    dtypes it stays as it is, and nothing is multiplied.
    """

    def __init__(self) -> None:
        self.active = False
        self.scale = torch.full((), 2.0**16)
        self.steps = torch.zeros((), dtype=torch.int32)  # updates in a row without an overflow
        self.factors: dict[str, Any] = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}

    def start(self, device: torch.device) -> None:
        """Move to the device of a training loop, and scale if its activations are float16."""
        self.active = activation_dtype(device) == torch.float16
        self.scale, self.steps = self.scale.to(device), self.steps.to(device)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to compute gradients of."""
        return loss * self.scale if self.active else loss

    def unscaled(self, norm: Tensor) -> Tensor:
        """Return the norm of the gradients, from the norm of those of the scaled loss."""
        return norm / self.scale if self.active else norm

    def counts(self) -> Tensor:
        """Return whether a non-finite gradient counts for `--max_nonfinite`: 1 or 0, () float32.

        It does not count while the scale can still be halved, since overflows are expected until the scale is right.
        """
        return (self.scale <= FLOOR).float() if self.active else torch.ones_like(self.scale)

    def update(self, overflow: Tensor) -> None:
        """Halve the scale, down to `FLOOR`, after an overflow (1, else 0); double it after 2000 updates without one."""
        if self.active:
            growth, backoff = self.factors["growth_factor"], self.factors["backoff_factor"]
            torch._amp_update_scale_(self.scale, self.steps, overflow, growth, backoff, self.factors["growth_interval"])
            self.scale.clamp_(min=FLOOR)

    def state_dict(self) -> dict:
        """Return the state in the form of a `GradScaler`; waits for the device."""
        return {"scale": self.scale.item(), **self.factors, "_growth_tracker": self.steps.item()}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state that `is_state` accepts; an empty one, of a `GradScaler` that was off, is left out."""
        if state:
            self.scale.fill_(state["scale"])
            self.steps.fill_(state["_growth_tracker"])
            self.factors = {name: state[name] for name in self.factors}


def is_state(value: object) -> bool:
    """Return whether a value can be the state of a `LossScale` or of a `GradScaler`."""
    if not isinstance(value, dict) or not value:
        return value == {}
    possible: dict[str, Callable[[Any], bool]] = {
        "scale": lambda number: type(number) is float and 0 < number < math.inf,
        "growth_factor": lambda number: type(number) is float and 1 < number < math.inf,
        "backoff_factor": lambda number: type(number) is float and 0 < number < 1,
        "growth_interval": lambda number: type(number) is int and 0 < number < 2**31,
        "_growth_tracker": lambda number: type(number) is int and 0 <= number < 2**31,
    }
    return all(is_possible(value.get(name)) for name, is_possible in possible.items())
