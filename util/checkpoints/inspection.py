"""Find weights, sizes, options and arguments in the content of a checkpoint.

The content is a dict with `model`, `optimizer`, `epoch` (the last complete one), `samples` (images of the next epoch
trained on), `scaler`, `args` (an argparse.Namespace) and other state of `Run`; finetuning adds `class_names` (list of
str, by output), `model_ema`, `max_accuracy` and `ema_max_accuracy`. Files of the released code have this form without
`samples` and `class_names`, or are a bare state dict; both are read.
"""

import argparse
import logging
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from util.checkpoints.checkpoint_file import StateDict, say_once, unwrapped_name, weight_keys
from util.errors import UserError
from util.files import printable, some

# options of the published models, assumed for files that do not record theirs
PUBLISHED: dict[str, Any] = {
    "objective": "arm",
    "order": "row",
    "taps": "even",
    "norm_pix_loss": True,
    "cluster_size": 4,
    "directions": 4,
    "in_chans": 3,
    "freeze": None,
}

_ENCODER = "backbone."  # before the names of a detector's or segmenter's encoder
# The biases of the classes in a detector, a segmenter and a classifier, and how many of them are the background.
_OUTPUTS = {r"roi_heads\.box_predictor\.cls_score\.bias": 1, r"head\.classifier\.(\d+\.)?bias": 0, r"head\.bias": 0}
_NOT_ARM = "the checkpoint is not one of ARM"
# Files of methods that build on ARM, by their published code. RoMA's pretraining adds a vector to the tokens of rotated
# windows, which nothing here rotates. MambaXray-VL of CXPMRG-Bench saves the encoder beside a language model's parts.
_ROTATED = "angle_embed"
VISUAL = "visual_encoder."
_BESIDE_VISUAL = ("text_encoder.", "vision_proj.", "text_proj.", "logit_scale", "llama_model.", "llama_proj.",
    "layer_norm.", "embed_tokens.")  # fmt: skip
_MAX_DEPTH = 1000  # blocks
_MAX_SIDE = 2**15  # pixels


def weights(content: dict, key: str | None = None) -> StateDict:
    """Return the state dict of a checkpoint: `model`, else `model_ema`, else the content itself as a bare state dict.

    Args:
        content: as `read` returns it.
        key: `model` or `model_ema`, to take only that one.

    Returns:
        Its tensors by name, without wrappers' prefixes; of RoMA and MambaXray-VL those that ARM has, with a line.

    Raises:
        UserError: `key` is missing, or its value is no state dict of ARM.
    """
    present = weight_keys(content)
    if key is not None and key not in present:
        raise UserError(f"the checkpoint has no {key}; it has {', '.join(present) or 'a bare state dict'}")
    saved = content[key or present[0]] if present else content
    if not isinstance(saved, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in saved.items()
    ):
        raise UserError(f"{_NOT_ARM}: it holds no state dict (tensors by name)")
    state_dict = {unwrapped_name(name): value for name, value in saved.items()}
    if len(state_dict) < len(saved):
        raise UserError("the checkpoint has two tensors of one name, with and without a wrapper's prefix")
    needed = ["patch_embed.proj.weight", "pos_embed", "layers.0.mixer.A_log"]
    if any(name.startswith(VISUAL) for name in state_dict):
        state_dict = _visual_encoder(state_dict)
    elif task_of(state_dict) in ("classification", "image-text training"):
        needed += ["head.weight", "head.bias"]
    encoder = encoder_of(state_dict)
    for name in needed:
        if name not in encoder:
            raise UserError(f"{_NOT_ARM}: it has no {name}")
    patch, position = encoder["patch_embed.proj.weight"], encoder["pos_embed"]
    rows = position.shape[1] if position.ndim == 3 else 0
    if not (
        (patch.ndim == 4 and patch.numel() and patch.shape[2] == patch.shape[3])
        and (position.shape == (1, rows, len(patch)) and position.is_floating_point())
        and rows >= (1 if is_pretrained(encoder) else 2)
    ):
        raise UserError(f"{_NOT_ARM}: patch or position embedding have other dimensions")
    if is_pretrained(state_dict) and getattr(state_dict.get(_ROTATED), "shape", ()) == (1, 1, len(patch)):
        say_once(logging.INFO, f"{_ROTATED} of RoMA is left out: it marks rotated windows, which no image here has")
        del state_dict[_ROTATED]
    return state_dict


def _visual_encoder(state_dict: StateDict) -> StateDict:
    """Return the encoder, without a head, of MambaXray-VL's model of images and text, and say what is left out.

    Raises UserError if there are parameters that its code does not have.
    """
    others = [name for name in state_dict if not name.startswith(VISUAL)]
    if unknown := [name for name in others if not name.startswith(_BESIDE_VISUAL)]:
        raise UserError(f"{_NOT_ARM}: beside its {VISUAL[:-1]} are unexpected {some(unknown)}")
    parts = list(dict.fromkeys(name.split(".")[0] for name in others))
    left_out = f"; {len(others)} tensors are left out: {some(parts)}" if others else ""
    say_once(logging.INFO, f"{VISUAL[:-1]} of a model of images and text is taken{left_out}")
    return {name.removeprefix(VISUAL): value for name, value in state_dict.items() if name.startswith(VISUAL)}


def encoder_of(state_dict: StateDict) -> StateDict:
    """Return the encoder of a detector or segmenter, which is its `backbone`; any other state dict as it is."""
    inner = {name.removeprefix(_ENCODER): value for name, value in state_dict.items() if name.startswith(_ENCODER)}
    return inner or state_dict


def task_of(state_dict: StateDict) -> str:
    """Return the task of a state dict's model.

    It is pretraining, classification, image-text training (a classifier without a head), detection or segmentation.
    """
    if encoder_of(state_dict) is state_dict:
        named = "classification" if "head.weight" in state_dict else "image-text training"
        return "pretraining" if is_pretrained(state_dict) else named
    return "detection" if any(name.startswith("rpn.") for name in state_dict) else "segmentation"


def is_pretrained(state_dict: StateDict) -> bool:
    """Return whether a state dict comes from pretraining: one scan direction, no class token."""
    return "cls_token" not in state_dict


def classifier_sizes(state_dict: StateDict) -> dict[str, int]:
    """Return keyword arguments of the `ARMClassifier` that a state dict belongs to, read from its shapes.

    Args:
        state_dict: of a pretraining model, a classifier or another encoder, as `encoder_of` returns it.

    Returns:
        `embed_dim`, `depth`, `patch_size` and `in_chans`; but for pretraining also `directions`, and `num_classes`
        where there is a head. A model of these sizes is no larger than a small multiple of the state dict.

    Raises:
        UserError: the blocks are not numbered from 0, not alike, or do not have the width of the patch embedding.
    """
    embed_dim, in_chans, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    layers = _blocks(state_dict, "layers")
    if layers[0].get("mixer.in_proj.weight") != (2 * embed_dim, embed_dim):
        raise UserError(f"{_NOT_ARM}: its blocks do not have the {embed_dim} channels of its patches")
    sizes = {"embed_dim": embed_dim, "depth": len(layers), "patch_size": patch_size, "in_chans": in_chans}
    if is_pretrained(state_dict):
        return sizes
    sizes["directions"] = 4 if "layers.0.mixer.A_b_log" in state_dict else 1
    if "head.weight" not in state_dict:
        return sizes
    head = state_dict["head.weight"]
    if head.ndim != 2 or head.shape[1] != embed_dim or not len(head):
        raise UserError(f"{_NOT_ARM}: its head has shape {tuple(head.shape)}")
    return sizes | {"num_classes": len(head)}


def decoder_sizes(state_dict: StateDict) -> dict[str, int]:
    """Return `dec_embed_dim` and `dec_depth`, read from the shapes; raise UserError if the decoder is incomplete."""
    token = state_dict.get("ar_token")
    width = token.shape[-1] if token is not None and token.ndim == 3 else 0
    blocks = _blocks(state_dict, "dec_block")
    if not width or blocks[0].get("attn2.q.weight") != (width, width):
        raise UserError(f"the checkpoint has no complete decoder: its blocks do not have {width} channels")
    return {"dec_embed_dim": width, "dec_depth": len(blocks)}


def _blocks(state_dict: StateDict, name: str) -> list[dict[str, torch.Size]]:
    """Return the shapes of each block's tensors; raise UserError if blocks are missing, differ or are too many."""
    blocks: dict[int, dict[str, torch.Size]] = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(rf"{name}\.([0-9]{{1,9}})\.(.+)", key):
            blocks.setdefault(int(match[1]), {})[match[2]] = value.shape
    if not 1 <= len(blocks) <= _MAX_DEPTH:
        raise UserError(f"{_NOT_ARM}: it has {len(blocks)} blocks {name}")
    for index in range(len(blocks)):
        differing = blocks.get(index, {}).items() ^ blocks.get(0, {}).items()
        if differing:
            keys = some(sorted({key for key, _ in differing}))
            raise UserError(f"{_NOT_ARM}: {name}.{index} has not the tensors of the other blocks: {keys}")
    return [blocks[index] for index in range(len(blocks))]


def is_integer(value: object, least: int = 0, most: int = 2**63 - 1) -> bool:
    """Return whether a value is an int, and no bool, within bounds."""
    return type(value) is int and least <= value <= most


def _is_size(value: object) -> bool:
    sides = value if isinstance(value, (list, tuple)) else [value]
    return 1 <= len(sides) <= 2 and all(is_integer(side, 1, _MAX_SIDE) for side in sides)


def _is_plain(value: object) -> bool:
    """Return whether a saved argument can be compared and shown: a scalar, or a list of scalars."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) and not isinstance(part, (list, tuple)) for part in value)
    return isinstance(value, (str, float, bool)) or value is None or is_integer(value, 1 - 2**63)


def _are_numbers(value: object, above: float = -math.inf) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(v) is float and above < v < math.inf for v in value)


# the saved arguments that code reads, and which values are possible
_POSSIBLE: dict[str, Callable[[object], bool]] = {
    "input_size": _is_size,
    "global_pool": lambda value: isinstance(value, (bool, str)),
    "mean": _are_numbers,
    "std": lambda value: _are_numbers(value, 0),
    "dtype": lambda value: value in ("bf16", "fp16", "fp32"),
    "exif": lambda value: isinstance(value, bool),
    "norm_pix_loss": lambda value: isinstance(value, bool),
    "directions": lambda value: is_integer(value, 1, 4),
    "start_epoch": lambda value: is_integer(value, 0, 2**31),
    "cluster_size": lambda value: is_integer(value, 1, _MAX_SIDE),
}
_POSSIBLE |= dict.fromkeys(("objective", "order", "taps"), lambda value: isinstance(value, str))
_POSSIBLE |= dict.fromkeys(("batch_size", "accum_iter", "world_size"), lambda value: is_integer(value, 1, 2**31))


def saved_arguments(content: dict, *needed: str) -> dict[str, Any]:
    """Return those arguments of the run that wrote a checkpoint that are scalars or lists of scalars.

    Args:
        content: as `read` returns it.
        *needed: names that must be among them.

    Raises:
        UserError: one that code reads has an impossible value, or a needed one is missing.
    """
    saved = content.get("args")
    if saved is not None and not isinstance(saved, (argparse.Namespace, dict)):
        say_once(logging.INFO, f"the checkpoint's args are a {type(saved).__name__}, which is ignored")
    saved = vars(saved) if isinstance(saved, argparse.Namespace) else saved if isinstance(saved, dict) else {}
    size = saved.get("input_size")
    if isinstance(size, (list, tuple)) and len(size) == 3 and size[0] == 3:  # timm's: with the colour channels
        saved = {**saved, "input_size": list(size[1:])}
    for name, is_possible in _POSSIBLE.items():
        if saved.get(name) is not None and not is_possible(saved[name]):
            raise UserError(f"the checkpoint is damaged: its args say {name} {printable(repr(saved[name])[:60])}")
    missing = [name for name in needed if saved.get(name) is None]
    if missing:
        raise UserError(f"the checkpoint is damaged: its args lack {', '.join(missing)}")
    return {name: value for name, value in saved.items() if isinstance(name, str) and _is_plain(value)}


def class_names(content: dict) -> list[str]:
    """Return the class names of a finetuning checkpoint, by output; an empty list if it has none.

    Raises UserError if they are no list of different names, one for each output.
    """
    names = content.get("class_names") or getattr(content.get("args"), "class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("the checkpoint is damaged: its class_names are no list of names")
    if names and len(names) != outputs_of(weights(content)):
        raise UserError(f"the checkpoint is damaged: it has {len(names)} class_names and another number of outputs")
    names = [printable(name) for name in names]
    if twice := {name for name, times in Counter(names).items() if name and times > 1}:
        raise UserError(f"the checkpoint is damaged: its class_names hold {some(sorted(twice))} more than once")
    return names


def outputs_of(state_dict: StateDict) -> int:
    """Return the number of classes that a classifier, detector or segmenter tells apart; 0 if it has no such layer."""
    for pattern, background in _OUTPUTS.items():
        for name, value in state_dict.items():
            if re.fullmatch(pattern, name):
                return len(value) - background
    return 0


def saved_size(content: dict) -> tuple[int, int] | None:
    """Return height and width of the input from the arguments saved in a checkpoint, or None."""
    size = saved_arguments(content).get("input_size")
    sides = [size] if isinstance(size, int) else size
    return None if sides is None else (sides[0], sides[-1])


def image_size(state_dict: StateDict, saved: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return height and width of the input that a state dict's position embedding is for.

    Args:
        state_dict: as `weights` returns it.
        saved: as `saved_size` returns it.

    Returns:
        `saved` if it has the same number of patches, else a square.

    Raises:
        UserError: neither has this number of patches.
    """
    side = state_dict["patch_embed.proj.weight"].shape[-1]
    patches = state_dict["pos_embed"].shape[1] - (not is_pretrained(state_dict))
    if saved is not None and (saved[0] // side) * (saved[1] // side) == patches:
        return saved
    if saved is not None:
        say_once(logging.WARNING, f"an input of {saved[0]} x {saved[1]} does not have the {patches} patches saved")
    root = math.isqrt(patches)
    if root * root != patches:
        which = f"{patches} patches, which is no square"
        raise UserError(f"the position embedding has {which}, and their grid is not saved")
    return root * side, root * side


def pretrain_options(content: dict, state_dict: StateDict) -> dict[str, object]:
    """Return the keyword arguments of `create_pretrain_model` that the sizes do not show.

    Args:
        content: of a pretraining checkpoint, as `read` returns it.
        state_dict: its weights.

    Returns:
        `objective`, `order`, `taps`, `norm_pix_loss` and `cluster_size`: from names of tensors and the attention mask,
        else from the saved arguments, else those of the published models.

    Raises:
        UserError: mask or arguments are impossible.
    """
    saved = saved_arguments(content)
    names = ("objective", "order", "taps", "norm_pix_loss", "cluster_size")
    found = {name: PUBLISHED[name] if saved.get(name) is None else saved[name] for name in names}
    if "cluster_order" in state_dict:
        found["order"] = "random"
    if "mask" in state_dict:  # every cluster but one
        mask, patches = state_dict["mask"], state_dict["pos_embed"].shape[1]
        if mask.ndim != 2 or not len(mask) < patches:
            raise UserError(f"the checkpoint is damaged: a mask of shape {tuple(mask.shape)} for {patches} patches")
        found["cluster_size"] = math.isqrt(patches - len(mask))
    return found
