"""Checkpoint files: safe reading, and what becomes of a state dict in another model.

A file is a dict with `model`, `optimizer`, `epoch` (the last whole one), `samples` (images of the next epoch that have
been trained on), `scaler`, `args` (an argparse.Namespace) and what `util.run` needs to go on; a finetuning file adds
`class_names` (list of str, by output), `model_ema`, `max_accuracy` and `ema_max_accuracy`. Files of the released code
have this form without `samples` and `class_names`, or are a bare state dict; both are read.
"""

import argparse
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from util.checkpoint_file import METADATA, DamagedCheckpoint, load_file, say_once
from util.errors import UserError, as_user_error
from util.files import printable, some
from util.fsdp import like
from util.pos_embed import insert_middle, resize_around_token

__all__ = ["METADATA", "DamagedCheckpoint"]  # of util.checkpoint_file, for those who read and export checkpoints

LOGGER = logging.getLogger(__name__)
StateDict = dict[str, Tensor]

# Parameters that each scan direction owns, in a one-direction checkpoint.
_SCAN = re.compile(r"^(layers\.\d+\.mixer\.)(A|D|conv1d|x_proj|dt_proj)(_log)?(\.weight|\.bias)?$")
# What pretraining has and the classifier has not.
_DECODER = re.compile(r"^(ar_token|dec_pos_embed|mask|mask_token|enc2dec\.|dec_block\.|norm_\d+\.|ar_norm\.|ar_pred\.)")
# What the classifier has and pretraining has not.
NEW_IN_CLASSIFIER = {"cls_token", "norm_f.weight", "norm_f.bias", "head.weight", "head.bias"}

# switches of the published models, and so of files that say nothing else
PUBLISHED = {
    "objective": "arm",
    "order": "row",
    "taps": "even",
    "norm_pix_loss": True,
    "cluster_size": 4,
    "directions": 4,
}


# names of other programs for `model` and `model_ema`: timm's train.py
_OTHER_NAMES = {"state_dict": "model", "state_dict_ema": "model_ema"}
# what torch.compile and DistributedDataParallel put into names, anywhere
_WRAPPERS = {"_orig_mod", "module"}
_MAX_DEPTH = 1000  # blocks
_MAX_SIDE = 2**15  # pixels


def read(path: str | os.PathLike, ignore_keys: Sequence[str] = ()) -> dict:
    """Load a checkpoint onto the CPU without executing anything in it.

    Args:
        path: of a file of torch.save, or .safetensors (a bare state dict, or of `export.py`, whose metadata become
            `args`); or another name that `util.hub` knows.
        ignore_keys: patterns (as of a shell, `*.angle_embed`) of parameters to leave out, which is counted in a line.

    Returns:
        Its content, as the head of this module says; weights of timm's train.py (`state_dict`) as `model`.

    Raises:
        UserError: see `load_file`; or a pattern matches nothing.
        DamagedCheckpoint: see `load_file`.
    """
    content = load_file(path)
    for other, name in _OTHER_NAMES.items():
        if isinstance(content.get(other), dict) and name not in content:
            content[name] = content.pop(other)
    state_dicts = [part for part in [content[key] for key in kinds(content)] or [content] if isinstance(part, dict)]
    ignored = set()
    for pattern in ignore_keys:
        found = [(part, key) for part in state_dicts for key in part if fnmatchcase(_unwrapped(key), pattern)]
        if not found:
            raise UserError(f"--ignore_keys {pattern}: {printable(path)} has no such key")
        ignored |= {_unwrapped(key) for _, key in found}
        for part, key in found:
            del part[key]
    if ignored:
        say_once(logging.INFO, f"{printable(path)}: {len(ignored)} keys are ignored: {some(sorted(ignored))}")
    return content


def _unwrapped(name: object) -> str:
    """Return the name of a parameter without the parts that wrappers of a model add."""
    return ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)


def kinds(content: dict) -> list[str]:
    """Which of `model` and `model_ema` a checkpoint holds; neither where it is a bare state dict."""
    return [key for key in ("model", "model_ema") if content.get(key) is not None]


def chosen_key(content: dict, key: str | None) -> str | None:
    """The weights that `weights` takes, which is said where `key` leaves it open; None for a bare state dict."""
    present = kinds(content)
    if key is None and len(present) > 1:
        LOGGER.info("the checkpoint holds %s: %s is taken; --model_key chooses", " and ".join(present), present[0])
    return key or (present[0] if present else None)


def weights(content: dict, key: str | None = None) -> StateDict:
    """The state dict of a checkpoint: `model`, else `model_ema`, else the content itself as a bare state dict.

    Args:
        content: as `read` returns it.
        key: ask for `model` or `model_ema`.

    Raises:
        UserError: `key` is not there, or what is there is not a state dict of ARM.
    """
    present = kinds(content)
    if key is not None and key not in present:
        raise UserError(f"the checkpoint has no {key}; it has {', '.join(present) or 'a bare state dict'}")
    saved = content[key or present[0]] if present else content
    if not isinstance(saved, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in saved.items()
    ):
        raise UserError("the checkpoint is not one of ARM: it holds no state dict, which is tensors by name")
    state_dict = {_unwrapped(name): value for name, value in saved.items()}
    if len(state_dict) < len(saved):
        raise UserError("the checkpoint has two tensors of one name, with and without a wrapper's prefix")
    needed = ["patch_embed.proj.weight", "pos_embed", "layers.0.mixer.A_log"]
    needed += [] if is_pretrained(state_dict) else ["head.weight", "head.bias"]
    for name in needed:
        if name not in state_dict:
            raise UserError(f"the checkpoint is not one of ARM: it has no {name}")
    patch, position = state_dict["patch_embed.proj.weight"], state_dict["pos_embed"]
    if (
        patch.ndim != 4
        or not patch.numel()
        or patch.shape[2] != patch.shape[3]
        or position.ndim != 3
        or position.shape[0] != 1
        or position.shape[2] != len(patch)
        or position.shape[1] < (1 if is_pretrained(state_dict) else 2)
        or not position.is_floating_point()
    ):
        raise UserError("the checkpoint is not one of ARM: patch or position embedding have other dimensions")
    return state_dict


def is_pretrained(state_dict: StateDict) -> bool:
    """Whether a state dict comes from pretraining: one scan direction, no class token."""
    return "cls_token" not in state_dict


def classifier_sizes(state_dict: StateDict) -> dict[str, int]:
    """Keyword arguments of the `ARMClassifier` that a state dict belongs to, read off its shapes.

    Args:
        state_dict: of a pretraining model or a classifier, as `weights` returns it.

    Returns:
        `embed_dim`, `depth` and `patch_size`; for a classifier also `num_classes` and `directions`. A model of these
        sizes is no larger than a small multiple of the state dict.

    Raises:
        UserError: the blocks are not numbered from 0, not alike, or do not have the width of the patch embedding.
    """
    embed_dim, _, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    layers = _blocks(state_dict, "layers")
    if layers[0].get("mixer.in_proj.weight") != (2 * embed_dim, embed_dim):
        raise UserError(
            f"the checkpoint is not one of ARM: its blocks do not have the {embed_dim} channels of its patches"
        )
    sizes = {"embed_dim": embed_dim, "depth": len(layers), "patch_size": patch_size}
    if is_pretrained(state_dict):
        return sizes
    head = state_dict["head.weight"]
    if head.ndim != 2 or head.shape[1] != embed_dim or not len(head):
        raise UserError(f"the checkpoint is not one of ARM: its head has shape {tuple(head.shape)}")
    return sizes | {"num_classes": len(head), "directions": 4 if "layers.0.mixer.A_b_log" in state_dict else 1}


def decoder_sizes(state_dict: StateDict) -> dict[str, int]:
    """Return `dec_embed_dim` and `dec_depth` of a pretraining model's state dict, as `classifier_sizes` does.

    Raises:
        UserError: there is no whole decoder.
    """
    token = state_dict.get("ar_token")
    width = token.shape[-1] if token is not None and token.ndim == 3 else 0
    blocks = _blocks(state_dict, "dec_block")
    if not width or blocks[0].get("attn2.q.weight") != (width, width):
        raise UserError(f"the checkpoint has no whole decoder: its blocks do not have {width} channels")
    return {"dec_embed_dim": width, "dec_depth": len(blocks)}


def _blocks(state_dict: StateDict, name: str) -> list[dict[str, torch.Size]]:
    """Return the shapes of each block's tensors.

    Raises:
        UserError: blocks are missing or not alike, or there are too many.
    """
    blocks: dict[int, dict[str, torch.Size]] = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(rf"{name}\.([0-9]{{1,9}})\.(.+)", key):
            blocks.setdefault(int(match[1]), {})[match[2]] = value.shape
    if not 1 <= len(blocks) <= _MAX_DEPTH:
        raise UserError(f"the checkpoint is not one of ARM: it has {len(blocks)} blocks {name}")
    for index in range(len(blocks)):
        differing = blocks.get(index, {}).items() ^ blocks.get(0, {}).items()
        if differing:
            raise UserError(
                f"the checkpoint is not one of ARM: {name}.{index} has not the tensors of the other blocks: "
                f"{some(sorted({key for key, _ in differing}))}"
            )
    return [blocks[index] for index in range(len(blocks))]


def _is_count(value: object, most: int = 2**31) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_size(value: object) -> bool:
    sides = value if isinstance(value, (list, tuple)) else [value]
    return 1 <= len(sides) <= 2 and all(_is_count(side, _MAX_SIDE) for side in sides)


def _is_plain(value: object) -> bool:
    """Whether a saved argument can be compared and shown: a scalar, or a list of scalars."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) and not isinstance(part, (list, tuple)) for part in value)
    return isinstance(value, (str, float, bool)) or value is None or (type(value) is int and abs(value) < 2**63)


# of the saved arguments that code reads: which values they can have
_POSSIBLE = {
    "input_size": _is_size,
    "global_pool": lambda value: isinstance(value, (bool, str)),
    "norm_pix_loss": lambda value: isinstance(value, bool),
    "directions": lambda value: _is_count(value, 4),
    "start_epoch": lambda value: value == 0 or _is_count(value),
    "cluster_size": lambda value: _is_count(value, _MAX_SIDE),
} | dict.fromkeys(("objective", "order", "taps"), lambda value: isinstance(value, str))
_POSSIBLE |= dict.fromkeys(("batch_size", "accum_iter", "world_size"), _is_count)


def saved_arguments(content: dict, *needed: str) -> dict[str, object]:
    """Return the arguments of the run that wrote a checkpoint, as far as they are scalars or lists of scalars.

    Args:
        content: as `read` returns it.
        *needed: names that must be among them.

    Raises:
        UserError: one that is read has a value that it cannot have, or a needed one is missing.
    """
    saved = content.get("args")
    if saved is not None and not isinstance(saved, (argparse.Namespace, dict)):
        say_once(logging.INFO, f"the checkpoint's args are a {type(saved).__name__}, which tells nothing of its run")
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


def guesses(content: dict, state_dict: StateDict, given: Collection[str] = ()) -> dict[str, str]:
    """Return the arguments that a checkpoint does not tell, and what is assumed of each.

    A file of a run tells everything; one of the released code leaves out what had no other value then.

    Args:
        content: as `read` returns it.
        state_dict: its weights.
        given: names of arguments that need no guess.
    """
    saved, assumed = saved_arguments(content), {}
    if not is_pretrained(state_dict):
        assumed["global_pool"] = "mean of the patches"
    assumed["input_size"] = "a square"
    if is_pretrained(state_dict) and not saved:
        assumed |= {name: str(value) for name, value in switches(content, state_dict).items()}
    return {name: words for name, words in assumed.items() if saved.get(name) is None and name not in given}


def say_guesses(path: str | os.PathLike, content: dict, state_dict: StateDict, given: Collection[str] = ()) -> None:
    """Say in one line what is guessed of the file `path`, if anything is; see `guesses`."""
    if guessed := [f"{name} ({value})" for name, value in guesses(content, state_dict, given).items()]:
        say_once(logging.INFO, f"{printable(path)} does not say how it was trained; guessed: {', '.join(guessed)}")


def saved_pooling(content: dict) -> bool | str:
    """Return the `global_pool` of a classifier, from the arguments saved in its checkpoint, else True."""
    saved = saved_arguments(content).get("global_pool")
    return True if saved is None else saved


def class_names(content: dict) -> list[str]:
    """Return the names of the classes of a finetuning checkpoint, by output; empty where it has none.

    Raises:
        UserError: what it has are no names.
    """
    names = content.get("class_names") or getattr(content.get("args"), "class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("the checkpoint is damaged: its class_names are no list of names")
    if names and len(names) != len(weights(content).get("head.weight", ())):
        raise UserError(f"the checkpoint is damaged: it has {len(names)} class_names and another number of outputs")
    names = [printable(name) for name in names]
    if twice := {name for name, times in Counter(names).items() if name and times > 1}:
        raise UserError(f"the checkpoint is damaged: its class_names hold {some(sorted(twice))} more than once")
    return names


def saved_size(content: dict) -> tuple[int, int] | None:
    """Return height and width of the input, from the arguments saved in a checkpoint, if it has them."""
    size = saved_arguments(content).get("input_size")
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def image_size(state_dict: StateDict, saved: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width that a state dict's position embedding covers.

    Args:
        state_dict: as `weights` returns it.
        saved: as `saved_size` returns it; counts where it has as many patches.

    Returns:
        `saved` where it fits, else a square.

    Raises:
        UserError: neither fits.
    """
    side = state_dict["patch_embed.proj.weight"].shape[-1]
    patches = state_dict["pos_embed"].shape[1] - (not is_pretrained(state_dict))
    if saved is not None and (saved[0] // side) * (saved[1] // side) == patches:
        return saved
    if saved is not None:
        say_once(logging.WARNING, f"an input of {saved[0]} x {saved[1]} has not the checkpoint's {patches} patches")
    root = math.isqrt(patches)
    if root * root != patches:
        raise UserError(
            f"the position embedding has {patches} patches, which is no square, and nothing tells its shape"
        )
    return root * side, root * side


def switches(content: dict, state_dict: StateDict) -> dict[str, object]:
    """Keyword arguments of `create_pretrain_model` that sizes do not show.

    Args:
        content: of a pretraining checkpoint, as `read` returns it.
        state_dict: its weights.

    Returns:
        `objective`, `order`, `taps`, `norm_pix_loss` and `cluster_size`: from the names and the attention mask, else
        from the saved arguments, else those of the published models.

    Raises:
        UserError: mask or arguments are none that a model can have.
    """
    saved = saved_arguments(content)
    found = PUBLISHED | {name: saved[name] for name in PUBLISHED if saved.get(name) is not None}
    del found["directions"]  # of a classifier
    if "mask_token" in state_dict:
        found["objective"] = "mae"
    if "cluster_order" in state_dict:
        found["order"] = "random"
    if "mask" in state_dict:  # every cluster but one
        mask, patches = state_dict["mask"], state_dict["pos_embed"].shape[1]
        if mask.ndim != 2 or not len(mask) < patches:
            raise UserError(f"the checkpoint is damaged: a mask of shape {tuple(mask.shape)} for {patches} patches")
        found["cluster_size"] = math.isqrt(patches - len(mask))
    return found


def without_decoder(state_dict: StateDict) -> StateDict:
    """What a state dict has besides the decoder of pretraining."""
    return {name: value for name, value in state_dict.items() if not _DECODER.match(name)}


def pretrain_to_classifier(state_dict: StateDict, model: nn.Module, saved: tuple[int, int] | None = None) -> StateDict:
    """The state dict to load into a classifier, from pretraining or from a classifier of another resolution.

    From pretraining: every scan parameter goes to all four directions; the position embedding is interpolated to
    the model's grid and gets a zero row for the class token; the decoder is dropped; class token, `norm_f` and
    head are not in the result. From a classifier: the patch rows of the position embedding are interpolated, the
    row of the class token stays.

    Args:
        state_dict: as `weights` returns it; left unchanged.
        model: the `ARMClassifier` to load into.
        saved: height and width of the input that `state_dict` was trained on, where they are known; otherwise as
            many patches as the model has are the model's, and any other number is a square.

    Raises:
        UserError: the number of patches is no square and nothing tells their shape.
    """
    state_dict = without_decoder(state_dict)
    state_dict.pop("cluster_order", None)  # the classifier reads rows
    pos_embed = state_dict["pos_embed"]
    if is_pretrained(state_dict):
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


def load(model: nn.Module, state_dict: StateDict, allow_missing: set[str] = frozenset()) -> None:
    """Load a state dict whose every key and shape must fit, and whose every value must be finite.

    Values that are infinite in the model too, as the attention mask's, can be so in the state dict.

    Args:
        model: the model to load into.
        state_dict: its parameters and buffers.
        allow_missing: keys that may be absent and then keep their present value.

    Raises:
        UserError: both sizes where width or depth differ, else the first keys that do not fit, or are not finite, and
            how many follow; the model is unchanged then.
    """
    own = model.state_dict()
    (width, depth), (own_width, own_depth) = map(_width_and_depth, (state_dict, own))
    if width and own_width and (width, depth) != (own_width, own_depth):
        raise UserError(
            f"the checkpoint has {width} channels and {depth} blocks, the model {own_width} and {own_depth}: "
            "--model, --embed_dim and --depth say which"
        )
    optional = allow_missing | {"mask"}
    missing = [k for k in own if k not in state_dict and k not in optional]
    unexpected = [k for k in state_dict if k not in own]
    common = {k: v for k, v in state_dict.items() if k in own}
    misfits = [
        f"{k} has shape {tuple(v.shape)}, the model {tuple(own[k].shape)}"
        for k, v in common.items()
        if v.shape != own[k].shape
    ] + [
        f"{k} is of {v.dtype}, the model's of {own[k].dtype}"
        for k, v in common.items()
        if v.is_floating_point() != own[k].is_floating_point() or v.is_complex()
    ]
    problems = ["missing " + some(missing)] * bool(missing)
    problems += [f"unexpected {some(unexpected)} (--ignore_keys leaves keys out)"] * bool(unexpected)
    problems += [some(misfits)] * bool(misfits)
    if problems:
        raise UserError("the checkpoint does not fit the model: " + "; ".join(problems))
    infinite = {name for name, buffer in model.named_buffers() if not is_finite(buffer)}
    broken = [k for k, v in common.items() if not is_finite(v) and (k not in infinite or v.isnan().any())]
    if broken:
        raise UserError(f"the checkpoint has weights that are not finite (NaN or infinite): {some(broken)}")
    model.load_state_dict({k: like(v, own.get(k)) for k, v in state_dict.items()}, strict=not allow_missing)


def is_finite(value: Tensor) -> bool:
    """Whether all values of a tensor are finite."""
    if not value.is_floating_point() or not value.numel():
        return True
    value = value.float() if value.itemsize == 1 else value  # torch compares no numbers of 8 bits
    return bool(value.abs().max().isfinite())


def _width_and_depth(state_dict: StateDict) -> tuple[int, int]:
    """Return channels and number of blocks of a model; no channels where it is none of ours."""
    weight = state_dict.get("patch_embed.proj.weight")
    blocks = {match[0] for name in state_dict if (match := re.match(r"layers\.[0-9]+\.", name))}
    return weight.shape[0] if weight is not None and weight.ndim == 4 else 0, len(blocks)


def load_into_classifier(content: dict, model: nn.Module, key: str | None = None, keep_head: bool = True) -> bool:
    """Load a checkpoint, from pretraining or finetuning, into a classifier.

    Args:
        content: as `read` returns it.
        model: an `ARMClassifier` of the checkpoint's width, depth and patch size, at any resolution.
        key: `model` or `model_ema`; see `weights`.
        keep_head: the head of the checkpoint must fit; otherwise one of another size is left out.

    Returns:
        Whether the head came from the checkpoint.

    Raises:
        UserError: lists, key by key, what did not fit.
    """
    state_dict = pretrain_to_classifier(weights(content, key), model, saved_size(content))
    new = set() if "cls_token" in state_dict else NEW_IN_CLASSIFIER
    if not keep_head and "head.weight" in state_dict and state_dict["head.weight"].shape != model.head.weight.shape:
        del state_dict["head.weight"], state_dict["head.bias"]
        new = {"head.weight", "head.bias"}
    load(model, state_dict, new)
    return not new


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
    return like(value, parameter)


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
