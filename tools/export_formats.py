"""Formats of tools/export.py: each function of `WRITERS` writes a model to a file and reads it again."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mamba import Mixer
from objectives import encoder_part
from util.checkpoints import checkpoint_file, convert

if TYPE_CHECKING:
    from pretrained import Checkpoint, Model


class Encoder(nn.Module):
    """A model without its head or decoder: it returns tokens."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, imgs: Tensor) -> Tensor:
        """Return tokens of images (B, in_chans, H, W); see `forward_features` of the model."""
        return self.model.forward_features(imgs)


def describe(found: Checkpoint, encoder: bool) -> dict:
    """Return what timm's config.json says of a model, and the further options of a pretraining model (`switches`)."""
    from models_arm import SIZES
    from timm_models import CONFIG, input_config, pooling

    size = found.input_size
    sizes: dict = found.sizes | {"img_size": size}
    same = (n for n, s in SIZES.items() if all(s[k] == sizes[k] for k in ("embed_dim", "depth")))
    about: dict = {"architecture": next(same, "arm_base_pz16"), "weights": found.key}
    options: dict = found.options
    if found.is_pretraining:
        about["switches"] = options
    else:
        sizes["global_pool"] = pooling(options.get("global_pool", True))
        if encoder or found.task != "classification":
            sizes["num_classes"] = 0
        if not encoder and any(found.class_names):
            about["label_names"] = found.class_names  # timm's name
    classes, normalised = sizes.get("num_classes", 0), {"mean": found.pixels.mean, "std": found.pixels.std}
    return about | {
        "num_classes": classes,
        "num_features": sizes["embed_dim"],
        "model_args": sizes,
        "pretrained_cfg": CONFIG | {"num_classes": classes} | input_config(size, sizes["in_chans"]) | normalised,
        "exif": found.pixels.exif,
    }


def build(about: dict) -> Model:
    """Build the model of a description with random weights, in evaluation mode; a classifier through timm."""
    import timm

    from models_arm import create_pretrain_model
    from pretrained import SMALLEST_DECODER

    sizes = about["model_args"] | {"scan_backend": "torch"}
    if "switches" not in about:
        return cast("Model", timm.create_model(about["architecture"], **sizes).eval())
    sizes |= about["switches"] | SMALLEST_DECODER
    return create_pretrain_model(about["architecture"], **sizes).eval()


# Each function of WRITERS writes a file, reads it, and returns its computation: images (B, in_chans, H, W), and of a
# detector a score -> outputs.
Compute = Callable[..., Tensor | tuple[Tensor, ...]]


def to_safetensors(module: nn.Module, about: dict, imgs: Tensor, path: Path) -> Compute:
    """Write the weights, with the options that `checkpoint_file.read` needs in the file's metadata."""
    from safetensors.torch import load_file, save

    sizes, switches = about["model_args"], about.get("switches", {})
    known = {"input_size": sizes["img_size"], "global_pool": sizes.get("global_pool") == "avg", **switches}
    known |= {"exif": about["exif"], **{name: about["pretrained_cfg"][name] for name in ("mean", "std")}}
    if "label_names" in about:
        known["class_names"] = about["label_names"]
    state_dict = (module.model if isinstance(module, Encoder) else module).state_dict()
    if "switches" in about:
        state_dict = encoder_part(state_dict)
    # `save_file` would let only the owner read it
    path.write_bytes(save(state_dict, {"format": "pt", checkpoint_file.METADATA: json.dumps(known)}))
    again = build(about)
    convert.load(again, load_file(path), set(again.state_dict()) - state_dict.keys())
    return Encoder(again) if isinstance(module, Encoder) else again


def any_batch() -> tuple[dict[int, torch.export.Dim]]:
    """Return the dynamic shape of images whose number is free."""
    return ({0: torch.export.Dim("batch")},)


@torch.no_grad()  # with gradients, the graph would contain constants that ONNX does not support
def program(module: Any, imgs: Tensor) -> torch.export.ExportedProgram:
    """Export the computation; from then on `module` scans with the backend "export".

    It is for any number of images, or that of a detector for one.
    """
    torch._dynamo.reset()  # otherwise a size that differs from that of an earlier program is taken as dynamic
    for mixer in (m for m in module.modules() if isinstance(m, Mixer)):
        mixer.scan_backend = "export"
    if hasattr(module, "program"):
        return module.program(imgs[:1])
    return torch.export.export(module, (imgs,), dynamic_shapes=any_batch())


def to_pt2(module: nn.Module, about: dict, imgs: Tensor, path: Path) -> Compute:
    """Write a program of torch.export."""
    torch.export.save(program(module, imgs), path)
    return torch.export.load(path).module()


def to_onnx(module: Any, about: dict, imgs: Tensor, path: Path) -> Compute:
    """Write a program of ONNX; above 1.5 GB its weights are in a second file, FILE.data."""
    import onnx
    import onnxruntime
    from onnx_ir.passes import common as passes
    from onnxscript import optimizer

    for library in ("onnx_ir", "onnxscript"):
        logging.getLogger(library).setLevel(logging.WARNING)  # their notes of what they leave as it is
    inputs, outputs = ["imgs"], ["tokens" if isinstance(module, Encoder) else "logits"]
    shapes: Any = any_batch()
    if hasattr(module, "outputs"):
        inputs, outputs, shapes = ["imgs", "score"], module.outputs, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision's own code
        exported = torch.onnx.export(
            program(module, imgs), dynamo=True, verbose=False, dynamic_shapes=shapes, input_names=inputs,
            output_names=outputs, optimize=False,
        )  # fmt: skip
    assert exported is not None  # with dynamo=True
    # torch's own optimization tries every rewriting rule at every node, which takes two thirds of the time; runtimes
    # have such rules. There are no limits of size, because the constants are weights that the model concatenates.
    passes.CommonSubexpressionEliminationPass()(exported.model)
    optimizer.fold_constants(exported.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
    passes.RemoveUnusedNodesPass()(exported.model)
    passes.ClearMetadataAndDocStringPass()(exported.model)  # stack traces, with the paths of this machine
    exported.save(path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def compute(*given: Tensor) -> tuple[Tensor, ...]:
        values = {name: value.numpy() for name, value in zip(inputs, given, strict=True)}
        return tuple(map(torch.from_numpy, session.run(None, values)))

    return compute


WRITERS = {"safetensors": to_safetensors, "onnx": to_onnx, "pt2": to_pt2}
DETECTORS = "onnx", "pt2"  # of these, the formats for a detector
