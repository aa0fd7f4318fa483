"""Objectives of pretraining: where their models are, and which parameters of a state dict belong to which part.

Importing this file imports no model.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from util.errors import UserError
from util.files import some
from util.package import imported

# The module and class of each objective, a `models_pretrain.PretrainModel`. Modules are imported when first needed.
OBJECTIVES = {"arm": "models_arm.ARMPretrain", "mae": "models_mae.MaskedPretrain"}
# Regular expressions of the names in a state dict: the encoder's, and those of the decoder that all objectives share.
ENCODER = r"(patch_embed|layers)\..+|pos_embed|cluster_order"
DECODER = r"(enc2dec|dec_block|norm_\d+|ar_norm|ar_pred)\..+|ar_token|dec_pos_embed"


def objective_class(name: str) -> type[Any]:
    """Import the model of an objective; raise ValueError for an unknown one."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose from {', '.join(OBJECTIVES)}")
    module, _, model = OBJECTIVES[name].rpartition(".")
    return getattr(imported(module), model)


def objective_of(state_dict: Mapping[str, Tensor], saved: str = "arm") -> str:
    """Return the objective with the most parameters of its own in a state dict, or `saved` where none has more."""
    own = {name: len(_matching(state_dict, objective_class(name).own_parameters)) for name in OBJECTIVES}
    return max((saved, *OBJECTIVES), key=lambda name: own.get(name, 0))


def encoder_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's part of the state dict of a pretraining model."""
    return _matching(state_dict, ENCODER)


def check_names(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse parameters that belong neither to the encoder, nor to the decoder, nor to any objective.

    Raises:
        UserError: names them.
    """
    own = [objective_class(name).own_parameters for name in OBJECTIVES]
    known = _matching(state_dict, "|".join([ENCODER, DECODER, *own]))
    if unknown := [name for name in state_dict if name not in known]:
        raise UserError(
            f"the checkpoint does not fit the model: unexpected {some(unknown)} (--ignore_keys leaves keys out)"
        )


def _matching(state_dict: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    return {name: value for name, value in state_dict.items() if re.fullmatch(pattern, name)}
