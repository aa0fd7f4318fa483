"""From a checkpoint to a model: read a file, URL or hub name, and build the model that it holds.

model, found = pretrained.load("hf://OWNER/REPO/checkpoint-best.pth")
logits = model(imgs)  # of `found.input_size` pixels; `found.class_names` names the outputs
"""

import logging
import os
from collections.abc import Collection, Sequence
from functools import cached_property

from torch import nn

import models_arm
from models_classifier import ARMClassifier
from ops import BackendUnavailable
from util.checkpoints import checkpoint_file, convert, inspection
from util.errors import as_user_error
from util.files import printable
from util.pos_embed import resize_pos_embed

SMALLEST_DECODER = {"dec_embed_dim": 64, "dec_depth": 1}  # of a model that only encodes


class Checkpoint:
    """A checkpoint, and what is found in it.

    Args:
        name: path, URL or hf:// name, for messages.
        content: of the file, as `checkpoint_file.read` returns it.
        model_key: which weights, `model` or `model_ema`; None takes `model` where it is there.

    Attributes:
        key: the weights that are taken; None for a bare state dict.
        state_dict: these weights, by the names of the models here.

    Raises:
        UserError: the file holds no such weights, or none of ARM.
    """

    def __init__(self, name: str | os.PathLike, content: dict, model_key: str | None = None) -> None:
        self.name, self.content = os.fspath(name), content
        self.state_dict = inspection.weights(content, model_key)
        self.key = model_key or next(iter(checkpoint_file.weight_keys(content)), None)

    @property
    def is_pretraining(self) -> bool:
        """Whether it is of a pretraining model, and not of a classifier."""
        return inspection.is_pretrained(self.state_dict)

    @property
    def has_decoder(self) -> bool:
        """Whether it holds the decoder of pretraining."""
        return "ar_token" in self.state_dict

    @cached_property
    def sizes(self) -> dict[str, int]:
        """`embed_dim`, `depth` and `patch_size`; of a classifier also `num_classes` and `directions`."""
        return inspection.classifier_sizes(self.state_dict)

    @cached_property
    def options(self) -> dict[str, object]:
        """Arguments of the model that sizes do not show.

        Of a classifier `global_pool`; of pretraining `objective`, `order`, `taps`, `norm_pix_loss` and `cluster_size`.
        """
        if not self.is_pretraining:
            return {"global_pool": True if self.saved_pooling is None else self.saved_pooling}
        options = inspection.pretrain_options(self.content, self.state_dict)
        return options | {"objective": models_arm.objective_of(self.state_dict, options["objective"])}

    @cached_property
    def input_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images that it was trained on."""
        return inspection.image_size(self.state_dict, inspection.saved_size(self.content))

    @cached_property
    def class_names(self) -> list[str]:
        """Names of a classifier's outputs, in their order; empty where the file has none."""
        return inspection.class_names(self.content)

    @property
    def saved_pooling(self) -> bool | str | None:
        """`global_pool` of the run that wrote the file, where that is known."""
        return inspection.saved_arguments(self.content).get("global_pool")

    @property
    def epoch(self) -> int | None:
        """Last epoch that was trained to its end, from 0; None where the file does not say, or none was."""
        epoch = self.content.get("epoch")
        return epoch if type(epoch) is int and epoch >= 0 else None

    def guesses(self, given: Collection[str] = ()) -> dict[str, str]:
        """Return the arguments that the file does not tell, and what is assumed of each.

        A file of a run tells everything; one of the released code leaves out what had no other value then.

        Args:
            given: names of arguments that need no guess.
        """
        saved = inspection.saved_arguments(self.content)
        assumed = {} if self.is_pretraining else {"global_pool": "mean of the patches"}
        assumed["input_size"] = "a square"
        if self.is_pretraining and not saved:
            assumed |= {name: str(value) for name, value in self.options.items()}
        return {name: words for name, words in assumed.items() if saved.get(name) is None and name not in given}

    def say_guesses(self, given: Collection[str] = ()) -> None:
        """Log in one line what is guessed of the file, if anything is; see `guesses`."""
        if guessed := [f"{name} ({value})" for name, value in self.guesses(given).items()]:
            line = f"{printable(self.name)} does not say how it was trained; guessed: {', '.join(guessed)}"
            checkpoint_file.say_once(logging.INFO, line)

    def build(self, encoder: bool = False, **overrides: object) -> models_arm.PretrainModel | ARMClassifier:
        """Build its model with random weights.

        Args:
            encoder: build a pretraining model with the smallest decoder.
            **overrides: arguments of the model that replace what was found.

        Raises:
            UserError: the decoder is incomplete, or sizes do not fit together.
        """
        found = {"img_size": self.input_size} | self.sizes | self.options
        if self.is_pretraining:
            found |= SMALLEST_DECODER if encoder else inspection.decoder_sizes(self.state_dict)
        create = models_arm.create_pretrain_model if self.is_pretraining else models_arm.create_classifier
        with as_user_error(TypeError, ValueError, BackendUnavailable, prefix=f"{self.name}: "):
            if found.get("order") == "random" and overrides.get("img_size", self.input_size) != self.input_size:
                raise ValueError(f"a random order of clusters holds for {self.input_size} pixels alone: --input_size")
            return create("arm_base_pz16", **{**found, **overrides})

    def load_into(self, model: nn.Module, keep_head: bool = True, encoder: bool = False) -> bool:
        """Load the weights into a model of the same width, depth and patch size, at any resolution.

        Args:
            model: a classifier, which takes the encoder of a pretraining model, too; or a pretraining model.
            keep_head: the head of the file must fit a classifier; otherwise one of another size is left out.
            encoder: leave the decoder of a pretraining model as it is.

        Returns:
            Whether the head came from the file.

        Raises:
            UserError: lists, key by key, what did not fit.
        """
        if self.is_pretraining:
            models_arm.check_names(self.state_dict)
        if isinstance(model, ARMClassifier):
            return convert.load_into_classifier(self.state_dict, model, inspection.saved_size(self.content), keep_head)
        state_dict = self.state_dict
        if encoder:
            state_dict = models_arm.encoder_part(state_dict)
            trained, own = (tuple(n // model.patch_size for n in s) for s in (self.input_size, model.image_size))
            state_dict["pos_embed"] = resize_pos_embed(state_dict["pos_embed"], trained, own)
        convert.load(model, state_dict, set(model.state_dict()) - state_dict.keys() if encoder else set())
        return False

    def load_model(self, encoder: bool = False, **overrides: object) -> models_arm.PretrainModel | ARMClassifier:
        """Build its model with its weights, in evaluation mode; log what was guessed. For the rest see `build`."""
        self.say_guesses()
        model = self.build(encoder, **overrides)
        self.load_into(model, encoder=encoder)
        return model.eval()


def read(name: str | os.PathLike, model_key: str | None = None, ignore_keys: Sequence[str] = ()) -> Checkpoint:
    """Read a checkpoint; log which weights are taken where `model_key` leaves it open.

    Args:
        name: path, URL, or hf://OWNER/REPO/FILE; see `util.checkpoints.hub`.
        model_key: `model` or `model_ema`.
        ignore_keys: patterns of parameters to leave out; see `checkpoint_file.read`.

    Raises:
        UserError: there is no such file, it is damaged, or not one of ARM.
    """
    content = checkpoint_file.read(name, ignore_keys)
    return Checkpoint(name, content, checkpoint_file.chosen_key(content, model_key))


def load(
    name: str | os.PathLike,
    model_key: str | None = None,
    ignore_keys: Sequence[str] = (),
    encoder: bool = False,
    **overrides: object,
) -> tuple[models_arm.PretrainModel | ARMClassifier, Checkpoint]:
    """Build the model of a checkpoint, with its weights, in evaluation mode.

    Args:
        name: see `read`.
        model_key: see `read`.
        ignore_keys: see `read`.
        encoder: give a pretraining model the smallest decoder, of random weights, whatever the file holds.
        **overrides: arguments of the model that replace what was found, such as `img_size` or `scan_backend`.

    Returns:
        The model, and what was found in the file.

    Raises:
        UserError: see `read`; or weights and model do not fit together.
    """
    found = read(name, model_key, ignore_keys)
    return found.load_model(encoder, **overrides), found
