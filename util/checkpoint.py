"""Checkpoint files: safe reading, and what becomes of a state dict in another model.

A file is a dict with `model`, `optimizer`, `epoch` (the last whole one), `samples` (images of the next epoch that have
been trained on), `scaler`, `args` (an argparse.Namespace) and what `util.run` needs to go on; a finetuning file adds
`class_names` (list of str, by output), `model_ema`, `max_accuracy` and `ema_max_accuracy`. Files of the released code
have this form without `samples` and `class_names`, or are a bare state dict; both are read.
"""

import argparse
import json
import logging
import math
import os
import pickle
import re
import struct
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from util.errors import UserError, as_user_error
from util.files import printable
from util.fsdp import like
from util.hub import local_file, sha256_of
from util.pos_embed import insert_middle, resize_around_token

LOGGER = logging.getLogger(__name__)
StateDict = dict[str, Tensor]

# Parameters that each scan direction owns, in a one-direction checkpoint.
_SCAN = re.compile(r"^(layers\.\d+\.mixer\.)(A|D|conv1d|x_proj|dt_proj)(_log)?(\.weight|\.bias)?$")
# What pretraining has and the classifier has not.
_DECODER = re.compile(r"^(ar_token|dec_pos_embed|mask|mask_token|enc2dec\.|dec_block\.|norm_\d+\.|ar_norm\.|ar_pred\.)")
# What the classifier has and pretraining has not.
NEW_IN_CLASSIFIER = {"cls_token", "norm_f.weight", "norm_f.bias", "head.weight", "head.bias"}


SUMS = "SHA256SUMS"  # file of a checkpoint's folder
METADATA = "arm"  # what export.py writes into .safetensors: JSON of `input_size`, `global_pool` and switches
# switches of the published models, and so of files that say nothing else
PUBLISHED = {
    "objective": "arm",
    "order": "row",
    "taps": "even",
    "norm_pix_loss": True,
    "cluster_size": 4,
    "directions": 4,
}


class DamagedCheckpoint(UserError):
    """A file that is not what was written, or nothing that can be loaded."""


def hashes(folder: Path) -> dict[str, set[str]]:
    """What a folder's SHA256SUMS says: by name of a file its hash, or two while it is being replaced."""
    sums: dict[str, set[str]] = {}
    if (folder / SUMS).is_file():
        text = (folder / SUMS).read_text(encoding="utf-8", errors="replace")
        for digest, name in re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.MULTILINE):
            sums.setdefault(name, set()).add(digest)
    return sums


def read(path: str | os.PathLike) -> dict:
    """Load a checkpoint onto the CPU without executing anything in it.

    Args:
        path: of a file of torch.save, or .safetensors (a bare state dict, or of `export.py`, whose metadata become
            `args`); or another name that `local_file` knows. A SHA256SUMS beside the file that names it must have its
            hash.

    Raises:
        UserError: no such file, or it cannot be read at the moment.
        DamagedCheckpoint: a damaged file, no checkpoint, or one with a type inside other than tensors, plain values
            and a Namespace.
    """
    file = local_file(path)
    try:
        right = hashes(file.parent).get(file.name)
        if right and sha256_of(file) not in right:
            raise DamagedCheckpoint(
                f"{path} is damaged, or not the file that was written: {SUMS} beside it has another hash"
            )
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                known = (opened.metadata() or {}).get(METADATA)
            state_dict = load_file(file)
            return {"model": state_dict, "args": argparse.Namespace(**json.loads(known))} if known else state_dict
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    # the last ones: what torch.load makes of files that by chance begin like a pickle
    except (pickle.UnpicklingError, LookupError, TypeError, AttributeError, AssertionError, struct.error) as error:
        unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it holds a {unknown[1]}, and only tensors, plain values and a Namespace are loaded"
            if unknown
            else ("it is no file that torch.save wrote")
        )
        raise DamagedCheckpoint(f"refused checkpoint {path}: {reason}") from error
    except (RuntimeError, EOFError, OSError, ValueError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), "it ends too early")
        passing = isinstance(error, OSError) or "allocate memory" in reason  # it may be whole, and readable later
        raise (UserError if passing else DamagedCheckpoint)(f"unreadable checkpoint {path}: {reason}") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{path} is no checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


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
    state_dict = content[key or present[0]] if present else content
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items()
    ):
        raise UserError("the checkpoint is not one of ARM: it holds no state dict, which is tensors by name")
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}  # saved from inside DDP
    needed = ["patch_embed.proj.weight", "pos_embed", "layers.0.mixer.A_log"]
    needed += [] if is_pretrained(state_dict) else ["head.weight", "head.bias"]
    for name in needed:
        if name not in state_dict:
            raise UserError(f"the checkpoint is not one of ARM: it has no {name}")
    if state_dict["patch_embed.proj.weight"].ndim != 4 or state_dict["pos_embed"].ndim != 3:
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
        `embed_dim`, `depth` and `patch_size`; for a classifier also `num_classes` and `directions`.
    """
    embed_dim, _, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    blocks = {int(name.split(".")[1]) for name in state_dict if re.match(r"layers\.\d+\.", name)}
    sizes = {"embed_dim": embed_dim, "depth": len(blocks), "patch_size": patch_size}
    if is_pretrained(state_dict):
        return sizes
    directions = 4 if "layers.0.mixer.A_b_log" in state_dict else 1
    return sizes | {"num_classes": len(state_dict["head.weight"]), "directions": directions}


def class_names(content: dict) -> list[str]:
    """Names of the classes of a finetuning checkpoint, by output; empty where it has none.

    Raises:
        UserError: what it has are no names.
    """
    names = content.get("class_names") or getattr(content.get("args"), "class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("the checkpoint is damaged: its class_names are no list of names")
    if names and len(names) != len(weights(content).get("head.weight", ())):
        raise UserError(f"the checkpoint is damaged: it has {len(names)} class_names and another number of outputs")
    return [printable(name) for name in names]


def guesses(content: dict, state_dict: StateDict, given: Collection[str] = ()) -> dict[str, str]:
    """Return what has to be assumed of a checkpoint that does not hold the arguments of its run, in words by argument.

    Args:
        content: as `read` returns it.
        state_dict: its weights.
        given: names of arguments that need no guess.
    """
    known = {*(vars(content["args"]) if content.get("args") is not None else ()), *given}
    assumed = {"input_size": "a square input"}
    if not is_pretrained(state_dict):
        assumed["global_pool"] = "pooling of the mean over the patches"
    return {name: words for name, words in assumed.items() if name not in known}


def saved_size(content: dict) -> tuple[int, int] | None:
    """Height and width of the input, from the arguments saved in a checkpoint, if it has them."""
    size = getattr(content.get("args"), "input_size", None)
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
    """
    found = {name: getattr(content.get("args"), name, value) for name, value in PUBLISHED.items()}
    del found["directions"]  # of a classifier
    if "mask_token" in state_dict:
        found["objective"] = "mae"
    if "cluster_order" in state_dict:
        found["order"] = "random"
    if "mask" in state_dict:  # every cluster but one
        found["cluster_size"] = math.isqrt(state_dict["pos_embed"].shape[1] - len(state_dict["mask"]))
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
    """Load a state dict whose every key and shape must fit.

    Args:
        model: the model to load into.
        state_dict: its parameters and buffers.
        allow_missing: keys that may be absent and then keep their present value.

    Raises:
        UserError: lists, key by key, what did not fit; the model is unchanged then.
    """
    own = model.state_dict()
    optional = allow_missing | {"mask"}
    problems = [f"missing {k}" for k in own if k not in state_dict and k not in optional]
    problems += [f"unexpected {k}" for k in state_dict if k not in own]
    problems += [
        f"{k} has shape {tuple(v.shape)}, the model {tuple(own[k].shape)}"
        for k, v in state_dict.items()
        if k in own and v.shape != own[k].shape
    ]
    if problems:
        raise UserError("the checkpoint does not fit the model: " + "; ".join(problems))
    model.load_state_dict({k: like(v, own.get(k)) for k, v in state_dict.items()}, strict=not allow_missing)


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
    kinds_of = {"model": dict, "optimizer": dict, "epoch": int}
    absent = [name for name, kind in kinds_of.items() if not isinstance(content.get(name), kind)]
    if absent:
        raise UserError(f"cannot resume from {args.resume}: it has no {', '.join(absent)}")
    if args.start_epoch is None and content["epoch"] < 0 and "samples" not in content:
        raise UserError(
            f"{args.resume} says epoch {content['epoch']}, which no run has: tell the true next one with --start_epoch"
        )
    load(model, weights(content, "model"))
    # the moments come from the file, the settings (weight decay, layer decay) from this run's arguments
    own = optimizer.state_dict()["param_groups"]
    with as_user_error(
        ValueError, KeyError, TypeError, prefix=f"the optimizer in {args.resume} does not fit this run: "
    ):
        saved = content["optimizer"]
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
            raise ValueError("it has other groups of parameters")
        groups = [{**group, "lr": before["lr"]} for group, before in zip(own, saved["param_groups"], strict=True)]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {name: like(value, parameters[index]) for name, value in values.items()}
            for index, values in saved["state"].items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    found, start = position(content), (args.start_epoch, 0)
    since = "samples" in content and getattr(content.get("args"), "start_epoch", None) == args.start_epoch
    return found if args.start_epoch is None or (since and found >= start) else start
