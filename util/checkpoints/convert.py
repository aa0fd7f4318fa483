"""Load state dicts into models; convert those of pretraining for the classifier."""

import re
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from util.checkpoints.checkpoint_file import StateDict
from util.checkpoints.inspection import image_size, is_pretrained
from util.distributed.parallel import shard_like
from util.errors import UserError
from util.files import some
from util.pos_embed import insert_middle, resize_around_token

Classifier = Any  # `models_classifier.ARMClassifier`, which util does not import

# Parameters of which each scan direction has its own, as a one-direction checkpoint names them.
_SCAN = re.compile(r"^(layers\.\d+\.mixer\.)(A|D|conv1d|x_proj|dt_proj)(_log)?(\.weight|\.bias)?$")

# How the names of parameters begin that pretraining and classifier share.
SHARED = ("patch_embed.", "layers.", "pos_embed")
# Parameters that only the classifier has.
NEW_IN_CLASSIFIER = {"cls_token", "norm_f.weight", "norm_f.bias", "head.weight", "head.bias"}


def pretrain_to_classifier(state_dict: StateDict, model: Classifier, saved: tuple[int, int] | None = None) -> StateDict:
    """Convert a state dict, of pretraining or of a classifier of another resolution, for a classifier.

    From pretraining: every scan parameter goes to all four directions; the position embedding is interpolated to
    the model's grid and gets a zero row for the class token; the decoder is dropped; class token, `norm_f` and
    head are not in the result. From a classifier: the patch rows of the position embedding are interpolated, the
    row of the class token stays.

    Args:
        state_dict: as `weights` returns it; left unchanged.
        model: the `ARMClassifier` to load into.
        saved: height and width of the input that `state_dict` was trained on, if known. Otherwise, the grid is that of
            the model if the number of patches is the same, else a square.

    Raises:
        UserError: the grid is unknown, and the number of patches is no square.
    """
    pretrained = is_pretrained(state_dict)
    state_dict = {name: value for name, value in state_dict.items() if not pretrained or name.startswith(SHARED)}
    pos_embed = state_dict["pos_embed"]
    if pretrained:
        for name in list(state_dict):
            if match := _SCAN.match(name):
                layer, parameter, log, kind = match[1], match[2], match[3] or "", match[4] or ""
                for s in model.layers[0].mixer.directions:
                    state_dict[f"{layer}{parameter}{s}{log}{kind}"] = state_dict[name].clone()
        pos_embed = insert_middle(pos_embed, torch.zeros_like(pos_embed[:, :1]))
    if saved is None and pos_embed.shape[1] == model.pos_embed.shape[1]:
        saved = model.grid_size[0] * model.patch_size, model.grid_size[1] * model.patch_size
    height, width = image_size(state_dict, saved)
    side = state_dict["patch_embed.proj.weight"].shape[-1]
    state_dict["pos_embed"] = resize_around_token(pos_embed, (height // side, width // side), model.grid_size)
    return state_dict


def load(model: nn.Module, state_dict: StateDict, allow_missing: Set[str] = frozenset()) -> None:
    """Load a state dict, of which every key and shape must fit and every value must be finite.

    A buffer that holds infinite values in the model, as the attention mask does, may hold them in the state dict, too.

    Args:
        model: the model to load into.
        state_dict: its parameters and buffers.
        allow_missing: keys that may be absent; the model keeps their values.

    Raises:
        UserError: names both sizes if width or depth differ, else the first keys that do not fit or are not finite,
            and how many follow; the model is unchanged then.
    """
    own = model.state_dict()
    (width, depth), (own_width, own_depth) = map(_width_and_depth, (state_dict, own))
    if width and own_width and (width, depth) != (own_width, own_depth):
        sizes = f"{width} channels and {depth} blocks, the model {own_width} and {own_depth}"
        raise UserError(f"the checkpoint has {sizes}: --model, --embed_dim and --depth set them")
    optional = allow_missing | {"mask"}
    missing = [k for k in own if k not in state_dict and k not in optional]
    unexpected = [k for k in state_dict if k not in own]
    common = {k: v for k, v in state_dict.items() if k in own}
    misfits = []
    for k, v in common.items():
        if v.shape != own[k].shape:
            misfits.append(f"{k} has shape {tuple(v.shape)}, the model {tuple(own[k].shape)}")
        if v.is_floating_point() != own[k].is_floating_point() or v.is_complex():
            misfits.append(f"{k} is of {v.dtype}, the model's of {own[k].dtype}")
    problems = ["missing " + some(missing)] * bool(missing)
    problems += [f"unexpected {some(unexpected)} (--ignore_keys leaves keys out)"] * bool(unexpected)
    problems += [some(misfits)] * bool(misfits)
    if problems:
        raise UserError("the checkpoint does not fit the model: " + "; ".join(problems))
    infinite = {name for name, buffer in model.named_buffers() if not is_finite(buffer)}
    broken = [k for k, v in common.items() if not is_finite(v) and (k not in infinite or v.isnan().any())]
    if broken:
        raise UserError(f"the checkpoint has weights that are not finite (NaN or infinite): {some(broken)}")
    model.load_state_dict({k: shard_like(v, own.get(k)) for k, v in state_dict.items()}, strict=not allow_missing)


def is_finite(value: Tensor) -> bool:
    """Return whether all values of a tensor are finite."""
    if not value.is_floating_point() or not value.numel():
        return True
    value = value.float() if value.itemsize == 1 else value  # torch cannot compare numbers of 8 bits
    return bool(value.abs().max().isfinite())


def _width_and_depth(state_dict: StateDict) -> tuple[int, int]:
    """Return channels and number of blocks of a model; 0 channels if it is none of ours."""
    weight = state_dict.get("patch_embed.proj.weight")
    blocks = {match[0] for name in state_dict if (match := re.match(r"layers\.[0-9]+\.", name))}
    return weight.shape[0] if weight is not None and weight.ndim == 4 else 0, len(blocks)


def load_into_classifier(
    state_dict: StateDict, model: Classifier, saved: tuple[int, int] | None = None, keep_head: bool = True
) -> bool:
    """Load a state dict, of pretraining or of a classifier, into a classifier.

    Args:
        state_dict: as `weights` returns it; its width, depth and patch size are those of the model.
        model: an `ARMClassifier`, at any resolution.
        saved: height and width of the input that `state_dict` was trained on, if known.
        keep_head: the head must fit; otherwise a head of another size is left out.

    Returns:
        Whether the head came from the state dict.

    Raises:
        UserError: lists the keys that do not fit.
    """
    state_dict = pretrain_to_classifier(state_dict, model, saved)
    new: set[str] = set() if "cls_token" in state_dict else NEW_IN_CLASSIFIER
    if not keep_head and "head.weight" in state_dict and state_dict["head.weight"].shape != model.head.weight.shape:
        del state_dict["head.weight"], state_dict["head.bias"]
        new = {"head.weight", "head.bias"}
    load(model, state_dict, new)
    return not new
