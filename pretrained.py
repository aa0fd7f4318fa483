"""Build the model of a checkpoint: a path, URL or hub name.

model, found = pretrained.load("hf://OWNER/REPO/checkpoint-best.pth")
logits = model(found.read_image("photo.jpg")[None])  # (1, classes); `found.class_names` names the outputs
"""

import argparse
import logging
import os
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor

import models_arm
from models_classifier import ARMClassifier
from models_pretrain import PretrainModel
from objectives import check_names, encoder_part, objective_of
from ops import BackendUnavailable
from util.checkpoints import checkpoint_file, convert, inspection
from util.data.datasets import model_input
from util.data.decode import BrokenImage
from util.data.pixels import Pixels
from util.errors import UserError, as_user_error
from util.files import open_regular, printable
from util.package import imported

LOGGER = logging.getLogger("arm")
Model = PretrainModel | ARMClassifier  # or that of one of `TASKS`, which is imported by name
# The module of each task whose model is built around an encoder, with `build(state_dict, sizes, arguments)`: sizes of
# the encoder, with `img_size`, and arguments of the run. Modules are imported when first needed.
TASKS = {"detection": "Detection.models_detect", "segmentation": "Segmentation.models_segment"}
SMALLEST_DECODER = {"dec_embed_dim": 64, "dec_depth": 1}  # of a model that only encodes images


class Checkpoint:
    """The content of a checkpoint, and the model that it describes.

    Args:
        name: path, URL or hf:// name, for messages.
        content: of the file, see `checkpoint_file.read`.
        model_key: which weights, `model` or `model_ema`; None takes `model` if present, else `model_ema`.

    Attributes:
        key: the weights that are taken; None for a bare state dict.
        state_dict: these weights, without prefixes of wrappers.
        encoder: those of the encoder of a detector or segmenter; otherwise all of them.

    Raises:
        UserError: the file has no such weights, or no weights of ARM.
    """

    def __init__(self, name: str | os.PathLike[str], content: dict[str, Any], model_key: str | None = None) -> None:
        self.name, self.content = os.fspath(name), content
        self.state_dict = inspection.weights(content, model_key)
        self.encoder = inspection.encoder_of(self.state_dict)
        self.key = model_key or next(iter(checkpoint_file.weight_keys(content)), None)

    @cached_property
    def task(self) -> str:
        """Return the task of the model, such as pretraining or classification; see `task_of`."""
        return inspection.task_of(self.state_dict)

    @property
    def is_pretraining(self) -> bool:
        """Return whether the weights are of a pretraining model."""
        return self.task == "pretraining"

    @property
    def has_decoder(self) -> bool:
        """Return whether the decoder of pretraining is among the weights."""
        return "ar_token" in self.state_dict

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Return the sizes of the encoder, and of a classifier `num_classes`, or 0; see `classifier_sizes`."""
        headless = {"num_classes": 0} if self.task == "image-text training" else {}
        return headless | inspection.classifier_sizes(self.encoder)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Return the arguments of the model that do not follow from the shapes of its weights.

        Of a classifier `global_pool`; of pretraining `objective`, `order`, `taps`, `norm_pix_loss` and `cluster_size`;
        none of a detector or segmenter, which reads the `arguments` of the run.
        """
        if self.task in TASKS:
            return {}
        if not self.is_pretraining:
            return {"global_pool": True if self.saved_pooling is None else self.saved_pooling}
        options: dict[str, Any] = inspection.pretrain_options(self.content, self.state_dict)
        return options | {"objective": objective_of(self.state_dict, options["objective"])}

    @cached_property
    def input_size(self) -> tuple[int, int]:
        """Return height and width of the images in training, in pixels."""
        return inspection.image_size(self.encoder, inspection.saved_size(self.content))

    @cached_property
    def class_names(self) -> list[str]:
        """Return the names of a classifier's outputs, in their order; an empty list if the file has none."""
        return inspection.class_names(self.content)

    @property
    def saved_pixels(self) -> dict[str, Any]:
        """Return the arguments of `Pixels.of` that the file has."""
        known = inspection.saved_arguments(self.content)
        found = {name: known[name] for name in ("mean", "std", "exif") if known.get(name) is not None}
        return found | {"in_chans": self.encoder["patch_embed.proj.weight"].shape[1]}

    @property
    def pixels(self) -> Pixels:
        """Return channels, orientation, mean and deviation of the images in training; raise UserError if unknown."""
        with as_user_error(UserError, prefix=f"{printable(self.name)} does not say how images were normalised: "):
            return Pixels.of(argparse.Namespace(**self.saved_pixels))

    def read_image(
        self,
        image: str | os.PathLike[str] | bytes,
        resize: str = "square",
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return an image as the model takes it, (C, H, W) float32, with the `pixels` of its training.

        Args:
            image: path of a file, or its content.
            resize: "square", or "shorter" to keep the aspect ratio; see `eval_transform`.
            size: height and width, if the model was built with others than `input_size`.

        Raises:
            UserError: the file cannot be read or decoded, or the checkpoint does not tell how to normalise.
            BrokenImage: the content cannot be decoded.
        """
        if isinstance(image, bytes):
            return model_input(image, size or self.input_size, resize, self.pixels)
        with as_user_error(OSError, BrokenImage, prefix=f"{printable(image)}: "):
            with open_regular(image) as file:
                data = file.read()
            return self.read_image(data, resize, size)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the run that wrote the file; see `inspection.saved_arguments`."""
        return inspection.saved_arguments(self.content)

    @property
    def saved_pooling(self) -> bool | str | None:
        """Return `global_pool` of the run that wrote the file, or None if the file does not have it."""
        return inspection.saved_arguments(self.content).get("global_pool")

    @property
    def epoch(self) -> int | None:
        """Return the last completed epoch, from 0; None if no epoch was completed, or the file does not have it."""
        epoch = self.content.get("epoch")
        return epoch if type(epoch) is int and epoch >= 0 else None

    def guesses(self, given: Collection[str] = ()) -> dict[str, str]:
        """Return the arguments that the file does not have, and the value that is assumed for each.

        A file of this code has all arguments; the released code saves only those that it knows. Those `given` need no
        guess.
        """
        saved = inspection.saved_arguments(self.content)
        assumed = {"global_pool": "mean of the patches"} if self.task == "classification" else {}
        assumed["input_size"] = "a square"
        if self.is_pretraining and not saved:
            assumed |= {name: str(value) for name, value in self.options.items()}
        return {name: words for name, words in assumed.items() if saved.get(name) is None and name not in given}

    def say_guesses(self, given: Collection[str] = ()) -> None:
        """Log the `guesses`, if there are any, in one line."""
        if guessed := [f"{name} ({value})" for name, value in self.guesses(given).items()]:
            line = f"{printable(self.name)} does not say how it was trained; guessed: {', '.join(guessed)}"
            checkpoint_file.say_once(logging.INFO, line)

    def build(self, encoder: bool = False, **overrides: Any) -> Model:
        """Build the model with random weights.

        Args:
            encoder: build a pretraining model with the smallest decoder, of a detector or segmenter the encoder alone.
            **overrides: arguments of the model that replace those found in the file.

        Raises:
            UserError: the decoder is incomplete, or sizes do not fit together.
        """
        size = to_2tuple(overrides.get("img_size") or self.input_size)
        found: dict[str, Any] = self.sizes | self.options
        if self.task in TASKS:
            build = imported(TASKS[self.task]).build
            with as_user_error(TypeError, ValueError, BackendUnavailable, prefix=f"{self.name}: "):
                model = build(self.state_dict, {**found, **overrides, "img_size": size}, self.arguments)
            return model.backbone if encoder else model
        if self.is_pretraining:
            found |= SMALLEST_DECODER if encoder else inspection.decoder_sizes(self.state_dict)
        create = models_arm.create_pretrain_model if self.is_pretraining else models_arm.create_classifier
        with as_user_error(TypeError, ValueError, BackendUnavailable, prefix=f"{self.name}: "):
            if found.get("order") == "random" and size != self.input_size:
                raise ValueError(f"a random order of clusters is only for {self.input_size} pixels: --input_size")
            return create("arm_base_pz16", **{**found, **overrides, "img_size": size})

    def load_into(self, model: Model, keep_head: bool = True, encoder: bool = False) -> bool:
        """Load the weights into a model of the same width and depth; log what was loaded, adapted and left out.

        Args:
            model: a classifier or another encoder of any resolution, patch size and number of channels, for weights of
                any task; a detector or segmenter, whose encoder takes weights of any task; or a pretraining model.
            keep_head: require that all that follows the encoder fits; if False, what does not is not loaded.
            encoder: load only the encoder into a pretraining model, of any resolution and so on.

        Returns:
            Whether the classifier's head came from the file.

        Raises:
            UserError: lists the names that do not fit.
        """
        if self.is_pretraining:
            check_names(self.state_dict)
        saved = inspection.saved_size(self.content)
        if isinstance(model, ARMClassifier):
            loaded = convert.load_into_classifier(self.encoder, model, saved, keep_head)
        elif hasattr(model, "backbone") and not keep_head:
            loaded = convert.load_into_classifier(self.encoder, model.backbone, saved, keep_head)
            loaded.notes.append(convert.load_what_fits(model, self.state_dict, "backbone."))
        elif hasattr(model, "backbone"):
            changes: list[str] = []
            fitted = convert.pretrain_to_classifier(self.encoder, model.backbone, saved, changes)
            loaded = convert.load(model, self.state_dict | {f"backbone.{name}": fitted[name] for name in fitted})
            loaded.notes.extend(changes)
        elif encoder:
            loaded = convert.load_encoder(encoder_part(self.state_dict), model, saved)
        else:
            loaded = convert.load(model, self.state_dict)
        LOGGER.info("%s: %s%s", printable(self.name), f"{self.key}: " if self.key else "", "; ".join(loaded.notes))
        return loaded.head

    def load_model(self, encoder: bool = False, **overrides: Any) -> Model:
        """Return the model with its weights, in evaluation mode; log the guesses. For the rest see `build`."""
        self.say_guesses()
        model = self.build(encoder, **overrides)
        self.load_into(model, encoder=encoder)
        return model.eval()


def read(name: str | os.PathLike[str], model_key: str | None = None, ignore_keys: Sequence[str] = ()) -> Checkpoint:
    """Read a checkpoint; log which weights are taken if there are two kinds and no `model_key`.

    Args:
        name: path, URL, or hf://OWNER/REPO/FILE; see `util.checkpoints.hub`.
        model_key: `model` or `model_ema`.
        ignore_keys: patterns of parameters to leave out; see `checkpoint_file.read`.

    Raises:
        UserError: no such file, a damaged file, or one without weights of ARM.
    """
    content = checkpoint_file.read(name, ignore_keys)
    return Checkpoint(name, content, checkpoint_file.chosen_key(content, model_key))


def load(
    name: str | os.PathLike[str],
    model_key: str | None = None,
    ignore_keys: Sequence[str] = (),
    encoder: bool = False,
    **overrides: Any,
) -> tuple[Model, Checkpoint]:
    """Return the model of a checkpoint, with its weights and in evaluation mode, and the checkpoint.

    For `name`, `model_key` and `ignore_keys` see `read`. With `encoder` only the encoder of a pretraining model is
    loaded, beside the smallest decoder with random weights. `overrides` replace arguments of the model found in the
    file, such as `img_size` or `scan_backend`.

    Raises:
        UserError: see `read`; or the weights do not fit the model.
    """
    found = read(name, model_key, ignore_keys)
    return found.load_model(encoder, **overrides), found
