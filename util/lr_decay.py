"""Layer-wise learning-rate decay of the encoder (BEiT, Bao et al. 2022; MAE, util/lr_decay.py)."""

from typing import cast

from torch import nn

NO_WEIGHT_DECAY = ("cls_token", "pos_embed")


def param_groups_layer_decay(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Return optimizer groups by layer: each layer of the encoder at `layer_decay` times the rate of the next.

    All other parameters have the full rate: `norm_f`, a head, a pyramid and what a task adds to its encoder.

    1-D parameters, biases, the class token and the position embedding have no weight decay. Groups are in the order of
    their first parameters in the model, as in the published code: optimizer states are stored in this order.

    Args:
        model: an `ARMClassifier`, or a model of a task with one as `backbone`.
        weight_decay: of all other parameters.
        layer_decay: factor per layer; 1 gives all layers the full rate.

    Returns:
        Groups with `params`, `weight_decay` and `lr_scale`.
    """
    prefix = "backbone." if hasattr(model, "backbone") else ""
    last = len(cast(nn.ModuleList, model.get_submodule(f"{prefix}layers"))) + 1
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.removeprefix(prefix) if name.startswith(prefix) else ""  # its name in the encoder
        layer = _layer_of(own, last)
        decays = parameter.ndim > 1 and own not in NO_WEIGHT_DECAY
        settings = {"weight_decay": weight_decay if decays else 0.0, "lr_scale": layer_decay ** (last - layer)}
        groups.setdefault((layer, decays), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def _layer_of(name: str, last: int) -> int:
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    if name.startswith("layers."):
        return int(name.split(".")[1]) + 1
    return last
