"""Classifier and pyramid in timm: the methods that timm's models have beyond the forward pass, and registration.

import models_arm  # registers
model = timm.create_model("arm_base_pz16", num_classes=10, img_size=(224, 192))
maps = timm.create_model("arm_base_pz16_pyramid", features_only=True)  # of strides 4, 8, 16, 32
"""

import argparse
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import is_exportable, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from util.checkpoints import inspection
from util.checkpoints.checkpoint_file import StateDict, read, weight_keys
from util.checkpoints.convert import SHARED, fit_tops, load_into_classifier, pretrain_to_classifier
from util.checkpoints.inspection import is_pretrained
from util.data.pixels import Pixels
from util.data.transforms import crop_ratio
from util.errors import UserError
from util.lr_decay import NO_WEIGHT_DECAY
from util.pos_embed import split_middle

try:
    from timm.models._input import update_model_input_size  # since timm 1.0.31, for `save_for_hf`
except ImportError:  # timm 1.0.28

    def update_model_input_size(model: nn.Module, img_size: int | Sequence[int] | None, **model_args: Any) -> None:
        """Do nothing: this version does not keep the size."""


def input_config(size: tuple[int, int], in_chans: int = 3) -> dict[str, Any]:
    """Return the entries of timm's config that depend on height, width and channels of the images."""
    return {"input_size": (in_chans, *size), "crop_pct": crop_ratio(size)}


def pixel_config(in_chans: int, known: dict[str, Any]) -> dict[str, Any]:
    """Return `mean` and `std` of timm's config: those `known` if they are of so many channels, else ImageNet's.

    Other images than grey and RGB ones have no usual values. They get 0 and 1, which change nothing, and a line.
    """
    try:
        pixels = Pixels.of(argparse.Namespace(in_chans=in_chans), known)
    except UserError as error:
        LOGGER.info("%s; timm's config has mean 0 and std 1 until then", error)
        return {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans}
    return {"mean": pixels.mean, "std": pixels.std}


# From timm's names and the values of --global_pool to timm's names.
POOLING: dict[str | bool, str] = {"avg": "avg", True: "avg", "token": "token", False: "token", "": ""}
CONFIG = {  # for timm.data.resolve_data_config; "squash" and the crop evaluate as `eval_transform` does
    "num_classes": 1000,
    **input_config((224, 224)),
    "fixed_input_size": True,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "crop_mode": "squash",
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
LOGGER = logging.getLogger("arm")
INSTEAD = "which chooses its path and its scan in Python: use torch.export or torch.compile"
default_cfgs: dict[str, Any] = {}  # timm reads the configs of this module's models here


def register(
    name: str, new_model: Callable[..., nn.Module], check_names: Callable[[StateDict], None], maps: int | None = None
) -> None:
    """Let `timm.create_model(name, ...)` build a classifier, or an encoder with a pyramid.

    `pretrained=True` with a `file` in `pretrained_cfg_overlay` builds the model of a checkpoint and loads it, with
    its moving average if there is one: width, depth, patch size, channels, directions, input size, classes and pooling
    are the file's, unless arguments say otherwise; see `OwnFile`. The head keeps its random values if the file is of
    pretraining or has other classes, a pyramid if the file has none. Weights from elsewhere are adapted by
    `pretrain_to_classifier`.

    `exportable=True` computes the scan with operators of torch only, which exporters know.

    Args:
        name: of the model in timm.
        new_model: builds it.
        check_names: raises for a state dict of pretraining with unknown parameters.
        maps: of a pyramid; None for a classifier, which has one for each block.
    """
    settings = CONFIG if maps is None else {**CONFIG, "num_classes": 0, "classifier": None}

    def create(
        pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: dict | None = None, **kwargs: Any
    ) -> nn.Module:
        overlay, build = dict(pretrained_cfg_overlay or {}), new_model
        config = resolve_pretrained_cfg(name, pretrained_cfg, dict(overlay))
        known = {"mean": config.mean, "std": config.std}
        if pretrained and config.file and config.source != "local-dir" and not config.state_dict:
            own = OwnFile(config.file, new_model, check_names, has_head=maps is None)
            kwargs = own.with_sizes(kwargs)
            pretrained, build = False, own.build
            overlay = {"num_classes": kwargs.get("num_classes", settings["num_classes"])} | overlay
            known |= own.pixels
        shape = kwargs.get("in_chans", 3), *to_2tuple(kwargs.get("img_size", config.input_size[-2:]))
        if shape != tuple(config.input_size):
            overlay = input_config(shape[1:], shape[0]) | overlay
        overlay = pixel_config(shape[0], known) | overlay
        if is_exportable():
            kwargs.setdefault("scan_backend", "export")
        return build_model_with_cfg(
            build,
            name,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=adapt,
            feature_cfg={"out_indices": maps or 3, "feature_cls": "getter"},
            **kwargs,
        )

    def adapt(state_dict: StateDict, model: TimmModel) -> StateDict:
        state_dict = inspection.encoder_of(state_dict)
        if is_pretrained(state_dict):
            check_names(state_dict)
        if "head.weight" in state_dict and len(state_dict["head.weight"]) == model.num_classes:
            model.pretrained_cfg["num_classes"] = model.num_classes  # timm keeps only a head of that many classes
        adapted, _ = fit_tops(pretrain_to_classifier(state_dict, model), model)
        return {name: value for name, value in model.state_dict().items() if not name.startswith(SHARED)} | adapted

    create.__name__ = name
    default_cfgs.update(generate_default_cfgs({name: settings}))
    register_model(create)


class OwnFile:
    """A checkpoint of this code, of any task, which describes its encoder.

    Args:
        file: path, URL or hf:// name.
        new_model: builds the model.
        check_names: see `register`.
        has_head: whether the model takes `num_classes` and `global_pool`.

    Attributes:
        pixels: `mean` and `std` of the images in training, if the file has them.

    Raises:
        UserError: the file is no checkpoint of ARM.
    """

    def __init__(
        self,
        file: str,
        new_model: Callable[..., nn.Module],
        check_names: Callable[[StateDict], None],
        has_head: bool = True,
    ) -> None:
        content = read(file)
        key = "model_ema" if "model_ema" in weight_keys(content) else None
        self.file, self.new_model, self.saved = file, new_model, inspection.saved_size(content)
        self.state_dict = inspection.encoder_of(inspection.weights(content, key))
        arguments = inspection.saved_arguments(content)
        self.pixels = {name: tuple(arguments[name]) for name in ("mean", "std") if arguments.get(name)}
        self.sizes: dict[str, Any] = {**inspection.classifier_sizes(self.state_dict)}
        if is_pretrained(self.state_dict):
            check_names(self.state_dict)
        elif arguments.get("global_pool") is not None:
            self.sizes["global_pool"] = arguments["global_pool"]
        if not has_head:
            self.sizes = {name: size for name, size in self.sizes.items() if name not in ("num_classes", "global_pool")}

    def with_sizes(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return arguments of the model: those given, and for all others the file's.

        Raises:
            UserError: a given width, depth or number of directions is not the file's; or no size of the images is
                given, and the file does not tell it.
        """
        for name in ("embed_dim", "depth", "directions"):
            if name in given and given[name] != self.sizes.get(name, given[name]):
                raise UserError(f"{self.file} has {name} {self.sizes[name]}, not {given[name]}: leave {name} out")
        if "img_size" not in given:
            given = given | {"img_size": inspection.image_size(self.state_dict, self.saved)}
        return self.sizes | given

    def build(self, **sizes: Any) -> nn.Module:
        """Build the model, and load the weights."""
        model = self.new_model(**sizes)
        loaded = load_into_classifier(self.state_dict, model, self.saved, keep_head=False)
        LOGGER.info("%s: %s", self.file, "; ".join(loaded.notes))
        return model


class TimmModel(nn.Module):
    """The methods that timm calls, for a classifier with `encode` and the attributes below; see `ARMClassifier`."""

    embed_dim: int
    patch_size: int
    in_chans: int
    num_classes: int
    global_pool: str
    grad_checkpointing: bool
    cls_token: nn.Parameter
    layers: nn.ModuleList
    norm_f: nn.Module
    head: nn.Module
    order: Tensor  # (directions, M + 1) int64
    pretrained_cfg: dict[str, Any]  # set by timm
    encode: Callable[..., tuple[Tensor, list[Tensor]]]  # see `ARMClassifier.encode`

    @property
    def feature_info(self) -> list[dict]:
        """Return module name, channels and stride of each block's output."""
        sizes = {"num_chs": self.embed_dim, "reduction": self.patch_size}
        return [{"module": f"layers.{i}", **sizes} for i in range(len(self.layers))]

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay, besides the 1-D ones."""
        return set(NO_WEIGHT_DECAY)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns that group parameters by layer, as `util.lr_decay` does; all others come last."""
        return {"stem": r"^(?:cls_token|pos_embed|patch_embed)", "blocks": r"^layers\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the head: a Linear, or Identity where `num_classes` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | bool | None = None) -> None:
        """Replace the head by a new one of `num_classes` outputs, 0 for none, on the same device.

        `global_pool` is one of `POOLING`, None keeps it; for the errors that it raises see `pooling`.
        """
        if global_pool is not None:
            self.global_pool = pooling(global_pool, len(self.order))
        self.num_classes = num_classes
        self.head = new_head(self.embed_dim, num_classes).to(self.cls_token)
        init_head(self.head)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last of `indices`; with `prune_norm` or `prune_head` also `norm_f` or the head.

        Returns:
            The indices, from 0; see `forward_intermediates`.
        """
        taken = chosen(len(self.layers), indices)
        self.layers = self.layers[: max(taken) + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list | tuple[Tensor, list] | dict:
        """Return the patches after some of the blocks.

        Args:
            x: images (B, in_chans, H, W).
            indices: of blocks, negative from the end; a number n takes the last n; None takes all.
            return_prefix_tokens: return pairs of the patches and the class token (B, 1, C).
            norm: apply `norm_f` to each.
            stop_early: do not run the blocks after the last of `indices`; the final tokens are its output.
            output_fmt: "NCHW" for (B, C, H / p, W / p), "NLC" for (B, M, C).
            intermediates_only: return no final tokens.
            output_dict: return a dict, with the class tokens in a separate list.

        Returns:
            Final tokens (B, M + 1, C) as from `forward_features`, and one tensor or pair for each index, in the order
            of the blocks; without the final tokens if `intermediates_only`. With `output_dict` the same as
            `image_features`, `image_intermediates` and `image_intermediates_prefix` (see `return_prefix_tokens`).

        Raises:
            ValueError: unknown format, or see `ARMClassifier.encode`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"unknown output_fmt {output_fmt!r}; choose from NCHW, NLC")
        taken = chosen(len(self.feature_info), indices)
        h, found = self.intermediates(x, taken, norm, stop_early)
        if output_fmt == "NCHW":
            intermediates = [patches.contiguous() for patches, _ in found]
        else:
            intermediates = [patches.flatten(2).mT for patches, _ in found]  # (B, C, h, w) -> (B, M, C)
        prefixes = [token for _, token in found]
        if output_dict:
            outputs: dict[str, Any] = {"image_intermediates": intermediates}
            if return_prefix_tokens:
                outputs["image_intermediates_prefix"] = prefixes
            return outputs if intermediates_only else outputs | {"image_features": self.norm_f(h)}
        results = list(zip(intermediates, prefixes, strict=True)) if return_prefix_tokens else intermediates
        return results if intermediates_only else (self.norm_f(h), results)

    def intermediates(
        self, imgs: Tensor, taken: Collection[int], norm: bool = False, stop_early: bool = False
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run the blocks, and return what `forward_intermediates` arranges.

        Returns:
            Tokens (B, M + 1, C) after the last block that ran, without `norm_f`; and for each of `taken`, in ascending
            order, a map (B, C, H / p, W / p), which need not be contiguous, and the class token (B, 1, C).
        """
        h, states = self.encode(imgs, taken, max(taken) + 1 if stop_early else None)
        rows = -(-imgs.shape[-2] // self.patch_size)  # with those that `dynamic_img_pad` adds
        found = []
        for state in states:
            patches, token = split_middle(self.norm_f(state) if norm else state)
            found.append((patches.unflatten(1, (rows, -1)).permute(0, 3, 1, 2), token))  # (B, M, C) -> (B, C, h, w)
        return h, found

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """Return the intermediates of `forward_intermediates`, with the arguments of DINO's method.

        `n` are indices of blocks, or how many of the last ones; the patches after each are (B, M, C), or with `reshape`
        (B, C, H / p, W / p). For the other arguments and errors see `forward_intermediates`.
        """
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, True, output_fmt, intermediates_only=True)

    def record_input_size(self, size: tuple[int, int]) -> None:
        """Write height and width of the images to timm's configs of this model."""
        if hasattr(self, "pretrained_cfg"):
            self.pretrained_cfg.update(input_config(size, self.in_chans))
        update_model_input_size(self, size, patch_size=self.patch_size)

    def __prepare_scriptable__(self) -> None:
        """Refuse `torch.jit.script`, which calls this."""
        raise TypeError(f"TorchScript cannot compile this model, {INSTEAD}")


def pooling(global_pool: str | bool, directions: int = 4) -> str:
    """Return timm's name of a pooling: "avg", "token" or "" (none).

    Raises:
        ValueError: unknown; or the class token with one direction, where it reads only half of the image.
    """
    if global_pool not in POOLING:
        raise ValueError(f"unknown global_pool {global_pool!r}; choose from {', '.join(map(repr, POOLING))}")
    if directions == 1 and POOLING[global_pool] == "token":
        raise ValueError("a class token in the middle sees half of the image with one direction: pool the mean instead")
    return POOLING[global_pool]


def chosen(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return indices of blocks from 0: those given (negative from the end), the last n for a number n, all for None.

    Raises:
        ValueError: there are no such blocks.
    """
    every = list(range(depth))
    if indices is None:
        return every
    if isinstance(indices, int):
        indices = range(-indices, 0)
    if not indices or any(not -depth <= i < depth for i in indices):
        raise ValueError(f"no blocks {list(indices)} among {depth}")
    return [every[i] for i in indices]


def new_head(embed_dim: int, num_classes: int) -> nn.Module:
    """Return a linear layer to the classes, Identity for 0."""
    return nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()


def init_head(head: nn.Module) -> None:
    """Draw weights of standard deviation 0.02, and set the bias to 0."""
    if isinstance(head, nn.Linear):
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
