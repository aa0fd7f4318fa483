"""ARM in the interface of transformers: configuration, image processor, encoder and classifier.

    model = AutoModelForImageClassification.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    logits = model(**processor(image)).logits

FOLDER is one that `tools/export.py --to hf` of this repository writes. It contains a copy of this file, and the model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import BaseImageProcessor, BatchFeature, PretrainedConfig, PreTrainedModel
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from models_classifier import ARMClassifier

CLAIMS = ("weights", "sha256", "parameters", "training", "files")  # of the export, of weights that training changes


class ARMConfig(PretrainedConfig):
    """The content of config.json, which timm and TimmWrapper of transformers read too.

    Args:
        model_args: arguments of `ARMClassifier`, but for the number of classes.
        num_classes: outputs of the head; 0 for an encoder.
        label_names: of the outputs.
        **others: those of `PretrainedConfig`, and timm's.
    """

    model_type = "timm_wrapper"

    def __init__(
        self,
        model_args: dict[str, Any] | None = None,
        num_classes: int = 0,
        label_names: Sequence[str] | None = None,
        **others: Any,
    ) -> None:
        self.model_args = model_args or {}
        names = label_names or [f"LABEL_{index}" for index in range(num_classes)]
        others.setdefault("id2label", dict(enumerate(names)))
        others.setdefault("label2id", {name: index for index, name in others["id2label"].items()})
        super().__init__(**others)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json with timm's names."""
        content = super().to_dict() | {"num_classes": self.num_labels, "label_names": [*(self.id2label or {}).values()]}
        if "pretrained_cfg" in content:
            content["pretrained_cfg"] = content["pretrained_cfg"] | {"num_classes": self.num_labels}
        return {name: value for name, value in content.items() if name not in ("id2label", "label2id", *CLAIMS)}


class ARMImageProcessor(BaseImageProcessor):
    """Turns images into the input of the model as the evaluation of this repository does.

    Args:
        resized: height and width to which an image is resized, whatever its aspect ratio: bicubic, in Pillow.
        size: height and width of the centre crop, the input of the model.
        image_mean: of each channel, for values from 0 to 1; one value stands for grey images, three for RGB.
        image_std: standard deviation of each channel.
        exif: turn images as the orientation in their EXIF data says.
        **others: those of `BaseImageProcessor`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - as in transformers

    def __init__(
        self,
        resized: Sequence[int] = (256, 256),
        size: Sequence[int] = (224, 224),
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        exif: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.resized, self.size, self.exif = list(resized), list(size), exif
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images: Any, return_tensors: str = "pt", **_: Any) -> BatchFeature:
        """Return `pixel_values` (B, C, H, W) float32 of images: Pillow's, arrays or tensors, one or several."""
        flat: Any = make_flat_list_of_images(images)
        inputs = torch.stack([self.pixels(to_pil_image(image)) for image in flat])
        return BatchFeature({"pixel_values": inputs}, tensor_type=return_tensors)

    def pixels(self, image: Image.Image) -> Tensor:
        """Return the input (C, H, W) float32 for one image."""
        image = ImageOps.exif_transpose(image) if self.exif else image
        image = image.convert("RGB" if len(self.image_mean) == 3 else "L")
        image = image.resize((self.resized[1], self.resized[0]), Image.Resampling.BICUBIC)
        top, left = (round((full - side) / 2) for full, side in zip(self.resized, self.size, strict=True))
        image = image.crop((left, top, left + self.size[1], top + self.size[0]))
        pixels = torch.from_numpy(np.array(image).reshape(*self.size, -1)).permute(2, 0, 1)  # (C, H, W)
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (self.image_mean, self.image_std))  # (C, 1, 1)
        return (pixels.contiguous() / 255 - mean) / std


class ARMPreTrainedModel(PreTrainedModel):
    """Base of both models: loads and initialises `timm_model`, which has timm's names in config.json and in the file.

    Args:
        config: of the folder.
        num_classes: outputs of the head; 0 builds no head.
    """

    config_class = ARMConfig
    base_model_prefix = "timm_model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - as in transformers

    def __init__(self, config: ARMConfig, num_classes: int) -> None:
        super().__init__(config)
        self.timm_model = ARMClassifier(**config.model_args | {"num_classes": num_classes})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ARMClassifier):
            module.init_non_persistent_buffers()  # no file has them

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.timm_model.grad_checkpointing = enable

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Save a folder that timm and TimmWrapper read too: with timm's names of the weights."""
        weights = options.get("state_dict") or self.state_dict()
        plain = {name.removeprefix("timm_model."): weight for name, weight in weights.items()}
        super().save_pretrained(*args, **options | {"state_dict": plain})

    def tokens(self, pixel_values: Tensor, every_block: bool | None) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return normalised tokens (B, M + 1, C), the class token in the middle, and those after each block if asked.

        `pixel_values` are (B, in_chans, H, W). Tokens after a block are not normalised.
        """
        asked = self.config.output_hidden_states if every_block is None else every_block
        blocks = range(len(self.timm_model.layers)) if asked else ()
        h, states = self.timm_model.encode(pixel_values.to(self.device, self.dtype), blocks)
        return self.timm_model.norm_f(h), tuple(states) if asked else None


class ARMModel(ARMPreTrainedModel):
    """The encoder; its output has `last_hidden_state` (B, M + 1, C) and `pooler_output` (B, C)."""

    def __init__(self, config: ARMConfig) -> None:
        super().__init__(config, 0)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None, **_: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode images (B, in_chans, H, W)."""
        tokens, states = self.tokens(pixel_values, output_hidden_states)
        output = BaseModelOutputWithPooling(tokens, self.timm_model.forward_head(tokens), states)
        return output.to_tuple() if return_dict is False else output


class ARMForImageClassification(ARMPreTrainedModel):
    """The classifier; its output has `logits` (B, num_labels), and `loss` if `labels` are given."""

    def __init__(self, config: ARMConfig) -> None:
        if not config.num_labels:
            raise ValueError("the folder holds an encoder without a head: load it by AutoModel, or give num_labels")
        super().__init__(config, config.num_labels)
        self.num_labels = config.num_labels

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> ImageClassifierOutput | tuple:
        """Classify images (B, in_chans, H, W)."""
        tokens, states = self.tokens(pixel_values, output_hidden_states)
        logits = self.timm_model.forward_head(tokens)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss, logits, states)
        return output.to_tuple() if return_dict is False else output
