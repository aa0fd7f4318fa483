"""Entry points of torch.hub: `torch.hub.load(REPOSITORY, "arm_base_pz16", source="local")`.

The modules of this repository are imported as a package, beside those of the program that calls torch.hub.
"""

import importlib as _importlib
import os as _os
import runpy as _runpy
import zlib as _zlib
from collections.abc import Callable as _Callable
from typing import Any as _Any

dependencies = [  # packages that `arm` imports
    *("PIL", "einops", "filelock", "huggingface_hub", "numpy", "safetensors", "timm", "torch", "torchvision", "tqdm"),
]
_ROOT = _os.path.dirname(_os.path.realpath(__file__))
# For torch.hub a package of its own: other copies of the repository may be imported too.
_PACKAGE = __package__ or f"arm_vision_{_zlib.crc32(_os.fsencode(_ROOT)):08x}"


def _module(name: str) -> _Any:
    """Import a module of this repository."""
    _runpy.run_path(_os.path.join(_ROOT, "util", "package.py"))["as_package"](_PACKAGE)
    return _importlib.import_module(f"{_PACKAGE}.{name}")


def arm(checkpoint: str, model_key: str | None = None, encoder: bool = False, **overrides: _Any) -> tuple[_Any, _Any]:
    """Return the model of a checkpoint, with its weights and in evaluation mode, and the checkpoint.

    `found.read_image(FILE)` of the checkpoint reads an image as the model takes it; `found.class_names` names outputs.

    Args:
        checkpoint: path, URL, or hf://OWNER/REPO/FILE, of pretraining or finetuning.
        model_key: which weights, "model" or "model_ema"; by default "model" if the file has it.
        encoder: load only the encoder of a pretraining model, beside the smallest decoder with random weights.
        **overrides: arguments of the model that replace those in the file, such as `img_size`.
    """
    return _module("pretrained").load(checkpoint, model_key=model_key, encoder=encoder, **overrides)


def _classifier(name: str) -> _Callable[..., _Any]:
    def create(**overrides: _Any) -> _Any:
        return _module("models_arm").create_classifier(name, **overrides)

    create.__doc__ = f"""Return the classifier {name} with random weights; `arm` loads those of a checkpoint.

    Args:
        **overrides: arguments of `ARMClassifier` in models_classifier.py, such as `num_classes`, `img_size` and
            `drop_path_rate`; `device` and `dtype`.
    """
    return create


arm_tiny_pz16, arm_small_pz16 = _classifier("arm_tiny_pz16"), _classifier("arm_small_pz16")
arm_base_pz16 = _classifier("arm_base_pz16")
arm_large_pz16, arm_huge_pz16 = _classifier("arm_large_pz16"), _classifier("arm_huge_pz16")
