"""Load state dicts into models; convert those of pretraining for the classifier."""

import re
from collections.abc import Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from util.checkpoints.checkpoint_file import StateDict
from util.checkpoints.inspection import image_size, is_pretrained
from util.distributed.parallel import shard_like
from util.errors import UserError
from util.files import some
from util.pos_embed import insert_middle, resize_around_token, resize_pos_embed

Model = Any  # a pretraining model or an `ARMClassifier`, which util does not import

# Parameters of which each scan direction has its own, as a one-direction checkpoint names them.
_SCAN = re.compile(r"^(layers\.\d+\.mixer\.)(A|D|conv1d|x_proj|dt_proj)(_log)?(\.weight|\.bias)?$")

# How the names of parameters begin that pretraining and classifier share.
SHARED = ("patch_embed.", "layers.", "pos_embed")
TOPS = ("head.", "pyramid.")  # how the names begin of what reads the encoder's tokens
WORDS = {
    "cls_token": "class token",
    "norm_f": "last norm",
    "head": "head",
    "pyramid": "pyramid",
}  # of parameters, for users


class Loaded(NamedTuple):
    """Hold the result of loading a state dict: whether the head came from it, and notes for the user."""

    head: bool
    notes: list[str]


def fit_embeddings(state_dict: StateDict, model: Model, saved: tuple[int, int] | None = None) -> list[str]:
    """Fit the patch and position embedding of a state dict to the channels, patches and grid of a model, in place.

    Channels are summed for a model of one channel, else repeated and scaled, so that the response to equal channels
    stays: timm's rule (`adapt_input_conv`). Patches are resampled as FlexiViT's (Beyer et al. 2023), positions
    interpolated.

    Args:
        state_dict: of a pretraining model or a classifier; its tensors are replaced, not changed.
        model: a pretraining model or a classifier.
        saved: height and width of the input that `state_dict` was trained on, if known. Otherwise, the grid is that of
            the model if the number of patches is the same, else a square.

    Returns:
        What was changed.

    Raises:
        UserError: the grid is unknown, and the number of patches is no square.
    """
    notes = []
    pos_embed, weight = state_dict["pos_embed"], state_dict["patch_embed.proj.weight"]
    channels, side = weight.shape[1], weight.shape[-1]
    patches = pos_embed.shape[1] - (not is_pretrained(state_dict))
    if saved is None and patches == model.grid_size[0] * model.grid_size[1]:
        grid = model.grid_size
    else:
        height, width = image_size(state_dict, saved)
        grid = height // side, width // side
    if grid != model.grid_size:
        resize = resize_pos_embed if is_pretrained(state_dict) else resize_around_token
        state_dict["pos_embed"] = resize(pos_embed, grid, model.grid_size)
        before, after = (f"{rows} x {columns}" for rows, columns in (grid, model.grid_size))
        notes.append(f"position embedding interpolated from {before} to {after} patches")
    if channels != model.in_chans:
        weight = fit_channels(weight, model.in_chans)
        how = "summed" if model.in_chans == 1 else "repeated" if model.in_chans > channels else "cut"
        notes.append(f"channels of the patch embedding {how} from {channels} to {model.in_chans}")
    if side != model.patch_size:
        from timm.layers import resample_patch_embed  # which --help need not import

        weight = resample_patch_embed(weight, [model.patch_size, model.patch_size])
        notes.append(f"patch embedding resampled from {side} to {model.patch_size} pixels")
    state_dict["patch_embed.proj.weight"] = weight
    return notes


def fit_channels(weight: Tensor, channels: int) -> Tensor:
    """Return the weight of a patch embedding (C, channels before, p, p) for other channels; see `fit_embeddings`."""
    before = weight.shape[1]
    if channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, -(-channels // before), 1, 1)[:, :channels]
    return (repeated * (before / channels)).to(weight.dtype)


def pretrain_to_classifier(
    state_dict: StateDict, model: Model, saved: tuple[int, int] | None = None, notes: list[str] | None = None
) -> StateDict:
    """Convert a state dict, of pretraining or of a classifier of another resolution, for a classifier.

    From pretraining: every scan parameter goes to all directions; the position embedding gets a zero row for the class
    token; the decoder is dropped; class token, `norm_f` and head are not in the result. For patch and position
    embedding see `fit_embeddings`. The row of a class token stays.

    Args:
        state_dict: as `weights` returns it; left unchanged.
        model: the `ARMClassifier` to load into.
        saved: see `fit_embeddings`.
        notes: gets what was changed.

    Raises:
        UserError: see `fit_embeddings`.
    """
    pretrained, decoder = is_pretrained(state_dict), "ar_token" in state_dict
    state_dict = {name: value for name, value in state_dict.items() if not pretrained or name.startswith(SHARED)}
    changes = fit_embeddings(state_dict, model, saved)
    if pretrained:
        directions = model.layers[0].mixer.directions
        for name in list(state_dict):
            if match := _SCAN.match(name):
                layer, parameter, log, kind = match[1], match[2], match[3] or "", match[4] or ""
                for s in directions:
                    state_dict[f"{layer}{parameter}{s}{log}{kind}"] = state_dict[name].clone()
        pos_embed = state_dict["pos_embed"]
        state_dict["pos_embed"] = insert_middle(pos_embed, torch.zeros_like(pos_embed[:, :1]))
        changes += [f"scan copied to {len(directions)} directions"] * (len(directions) > 1)
        changes += ["decoder left out"] * decoder
    if notes is not None:
        notes += changes
    return state_dict


def load(model: nn.Module, state_dict: StateDict, allow_missing: Set[str] = frozenset()) -> Loaded:
    """Load a state dict, of which every key and shape must fit and every value must be finite.

    A buffer that holds infinite values in the model, as the attention mask does, may hold them in the state dict, too.

    Args:
        model: the model to load into.
        state_dict: its parameters and buffers.
        allow_missing: keys that may be absent; the model keeps their values.

    Returns:
        Notes: how many of the model's parameters were loaded, and which kept the model's values.

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
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    notes = [f"{sum(n for k, n in counts.items() if k in state_dict):,} of {sum(counts.values()):,} parameters loaded"]
    kept = list(dict.fromkeys(WORDS.get(k.split(".")[0], k) for k in counts if k not in state_dict))
    return Loaded("head.weight" in state_dict, notes + [f"new: {some(kept)}"] * bool(kept))


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


def load_what_fits(model: nn.Module, state_dict: StateDict, encoder: str) -> str:
    """Load what follows the encoder, where names and shapes are those of a model; return a note about the rest.

    Args:
        model: a detector or segmenter.
        state_dict: of any task.
        encoder: prefix of the encoder's parameters, which are left as they are.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(encoder)}
    fits = {name: value for name, value in own.items() if name in state_dict and state_dict[name].shape == value.shape}
    load(model, {name: state_dict[name] for name in fits}, model.state_dict().keys())
    parts = list(dict.fromkeys(name.rpartition(".")[0] for name in own.keys() - fits.keys()))
    new = f"new: {some(sorted(parts))}" if parts else "nothing is new"
    return f"{len(fits)} of {len(own)} tensors after the encoder loaded; {new}"


def load_encoder(state_dict: StateDict, model: Model, saved: tuple[int, int] | None = None) -> Loaded:
    """Load the encoder's part of a state dict of pretraining into a pretraining model, which keeps its decoder.

    `model` may have another resolution, patch size and number of channels; for `saved` see `fit_embeddings`.

    Raises:
        UserError: lists the keys that do not fit.
    """
    notes = fit_embeddings(state_dict, model, saved)
    loaded = load(model, state_dict, model.state_dict().keys() - state_dict.keys())
    return Loaded(False, [loaded.notes[0], *notes, "only the encoder"])


def load_into_classifier(
    state_dict: StateDict, model: Model, saved: tuple[int, int] | None = None, keep_head: bool = True
) -> Loaded:
    """Load a state dict, of pretraining, a classifier or an encoder with a pyramid, into one of the last two.

    Args:
        state_dict: as `weights` returns it; its width and depth are those of the model.
        model: an `ARMClassifier` or `ARMPyramid`, of any resolution, patch size and number of channels.
        saved: height and width of the input that `state_dict` was trained on, if known.
        keep_head: the head of a classifier must fit; see `fit_tops`.

    Raises:
        UserError: lists the keys that do not fit.
    """
    changes: list[str] = []
    state_dict = pretrain_to_classifier(state_dict, model, saved, changes)
    state_dict, new = fit_tops(state_dict, model, keep_head, changes)
    loaded = load(model, state_dict, new)
    return Loaded(loaded.head and not new, [loaded.notes[0], *changes, *loaded.notes[1:]])


def fit_tops(
    state_dict: StateDict, model: Model, keep_head: bool = True, notes: list[str] | None = None
) -> tuple[StateDict, set[str]]:
    """Leave out a head or pyramid that a model does not have, or has of another size.

    Args:
        state_dict: as `pretrain_to_classifier` returns it.
        model: an `ARMClassifier` or `ARMPyramid`.
        keep_head: if the model has a head, leave nothing out: what does not fit is an error of `load`.
        notes: gets what the model does not have.

    Returns:
        The rest of the state dict, and the names of the model's tensors that it may lack: those keep their values.
    """
    own = model.state_dict()
    new = set() if "cls_token" in state_dict else {name for name in own if not name.startswith(SHARED)}
    for top in TOPS if not (keep_head and model.num_classes) else ():
        wanted, found = ({k: v.shape for k, v in names.items() if k.startswith(top)} for names in (own, state_dict))
        if wanted != found:
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith(top)}
            new |= wanted.keys()
            if notes is not None and not wanted:
                notes.append(f"{top[:-1]} left out")
    return state_dict, new
