"""Open a classifier from wherever it is kept, and let it answer images as it was made for.

model = open_model("out_finetune_b/checkpoint-best.onnx", torch.device("cpu"))
logits = model.compute(imgs)  # (B, C, H, W) float32 -> (B, classes) float32

The file of a checkpoint, and a .safetensors file, is computed by this repository, an .onnx file by onnxruntime, a .pt2
file by the operators of torch, a folder with config.json and the names `timm:NAME` by timm.
"""

import argparse
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torchvision import transforms

import pretrained
from Evaluation.tables import accuracy, wilson
from util.checkpoints.hub import files, locate
from util.data.class_names import known_names, match_classes
from util.data.datasets import ImageDataset, pixels_by
from util.data.loaders import eval_loader
from util.data.pixels import Pixels
from util.data.sources.source import Source
from util.data.transforms import BoundedResize, Recipe, crop_ratio, eval_transform
from util.errors import RunError, UserError, as_user_error
from util.files import printable, read_json
from util.tracking.run_log import Log
from util.training.evaluation import Answers, batches_of
from util.training.precision import activation_dtype, autocast

LOGGER = logging.getLogger("arm")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of timm's models on the hub
TIMM = "timm:"  # before the name of a model that timm opens
RESIZES = {"squash": "square", "shorter": "shorter"}  # crop modes that `eval_transform` carries out, and its names
MODES = {name: mode for mode, name in RESIZES.items()}
MODE_WORDS = {
    "squash": "resized to {0} x {1} whatever the aspect ratio",
    "shorter": "shorter side resized to {2}",
    "center": "resized to cover {0} x {1}",
    "border": "resized to fit into {0} x {1}, with a border",
}


class Preparation(NamedTuple):
    """How an image becomes the input of a model.

    Attributes:
        size: height and width of the input, in pixels.
        pixels: channels, orientation, mean and deviation.
        crop_pct: side of the crop divided by that of the resized image.
        mode: timm's `crop_mode`, or "shorter" of `eval_transform`.
        interpolation: timm's name.
    """

    size: tuple[int, int]
    pixels: Pixels
    crop_pct: float
    mode: str = "squash"
    interpolation: str = "bicubic"

    def recipe(self) -> Recipe:
        """Return the transform: image -> (C, H, W) float32."""
        if self.mode in RESIZES and self.interpolation == "bicubic":
            return eval_transform(self.size, RESIZES[self.mode], self.pixels, self.crop_pct)
        composed = create_transform(
            (self.pixels.channels, *self.size), interpolation=self.interpolation, mean=self.pixels.mean,
            std=self.pixels.std, crop_pct=self.crop_pct, crop_mode=self.mode,
        )  # fmt: skip
        steps = [
            BoundedResize(step.size, step.interpolation) if isinstance(step, transforms.Resize) else step
            for step in cast(Any, composed).transforms
        ]
        return Recipe(steps, self.pixels)

    def __str__(self) -> str:
        resized = [int(side / self.crop_pct) for side in self.size]
        words = MODE_WORDS[self.mode].format(*resized, max(resized))
        cut = "" if self.crop_pct == 1 and self.mode == "squash" else f", {self.size[0]} x {self.size[1]} of the centre"
        return f"{words} ({self.interpolation}){cut}; {self.pixels}"


@dataclass(eq=False)
class OpenedModel:
    """A model that computes, and what is known of it.

    Attributes:
        name: as it was given.
        kind: "checkpoint", "safetensors", "onnx", "pt2" or "timm".
        module: images on `device` -> logits.
        device: that it computes on.
        dtype: of its activations.
        preparation: of images.
        class_names: of the outputs, in their order; empty if they are not known.
        num_classes: number of logits; 0 if it returns something else.
        parameters: their number; None if it is not known.
        bytes: size of its files; None if it has none of its own.
        only_one: it takes one image at a time.
    """

    name: str
    kind: str
    module: nn.Module
    device: torch.device
    dtype: torch.dtype
    preparation: Preparation
    class_names: list[str]
    num_classes: int
    parameters: int | None
    bytes: int | None
    only_one: bool = False

    @torch.no_grad()
    def compute(self, imgs: Tensor) -> Tensor:
        """Return the logits (B, classes) float32, on `device`, of images (B, C, H, W) float32."""
        with autocast(self.device) if self.dtype != torch.float32 else torch.autocast(self.device.type, enabled=False):
            return self.module(imgs.to(self.device)).float()


def open_model(
    name: str, device: torch.device, model_key: str | None = None, scan_backend: str = "auto", resize: str = "square"
) -> OpenedModel:
    """Open a model.

    Args:
        name: a checkpoint of this code (path, URL or hf:// name), a file of export.py (.onnx, .pt2, .safetensors), a
            folder with config.json and weights, or `timm:` and a name of timm (`timm:hf-hub:...`, `timm:local-dir:...`
            too), whose pretrained weights are loaded.
        device: to compute on; onnxruntime without CUDA and programs of torch.export compute on the CPU.
        model_key: which weights of a checkpoint, see `pretrained.read`.
        scan_backend: of models of this code.
        resize: of images for models of this code and their exports, see `eval_transform`.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    if name.startswith(TIMM):
        return _of_timm(name, name.removeprefix(TIMM), device, resize)
    if Path(name).is_dir():
        return _of_timm(name, f"local-dir:{name}", device, resize)
    if Path(name).suffix in (".onnx", ".pt2"):
        return _of_file(name, Path(name), device, resize)
    found = pretrained.read(name, model_key)
    if found.task != "classification":
        raise UserError(f"{printable(name)} is of {found.task}: only classifiers are compared")
    model = found.load_model(scan_backend=scan_backend).to(device).requires_grad_(False)
    preparation = Preparation(found.input_size, found.pixels, crop_ratio(found.input_size), MODES[resize])
    file, _ = locate(name)
    return OpenedModel(
        name=name,
        kind="safetensors" if file.suffix == ".safetensors" else "checkpoint",
        module=model,
        device=device,
        dtype=activation_dtype(device),
        preparation=preparation,
        class_names=found.class_names,
        num_classes=found.sizes["num_classes"],
        parameters=count(model),
        bytes=file.stat().st_size,
    )


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_hub(known_as: str) -> None:
    """Raise UserError if the hub does not have a model's weights, or does not answer.

    huggingface_hub itself would try again for a minute. Weights in its cache need no answer.
    """
    if known_as.startswith("local-dir:"):
        return
    kind, _, place = known_as.partition(":")
    config = None if place else get_pretrained_cfg(known_as)
    place = place.partition("@")[0] if kind.replace("_", "-") == "hf-hub" else getattr(config, "hf_hub_id", None) or ""
    cached = [try_to_load_from_cache(place, file) for file in WEIGHTS] if place else []
    if place and not any(isinstance(path, str) for path in cached):
        files(f"hf://{place}")


def _of_timm(name: str, known_as: str, device: torch.device, resize: str) -> OpenedModel:
    logging.getLogger("timm").setLevel(logging.WARNING)
    with _as_mistake(name, "timm cannot open it"):
        check_hub(known_as)
        model: Any = timm.create_model(known_as, pretrained=True)
    module, config = model.to(device).eval().requires_grad_(False), resolve_model_data_config(model)
    own, size = model.pretrained_cfg, tuple(config["input_size"][1:])
    mode = config["crop_mode"]
    if isinstance(model, pretrained.ARMClassifier):
        mode = MODES[resize]
    elif mode == "center" and size[0] == size[1]:
        mode = "shorter"
    folder = Path(known_as.partition(":")[2]) if known_as.startswith("local-dir:") else None
    turned = folder is not None and bool(cast(dict, read_json(folder / "config.json")).get("exif"))  # of export.py
    pixels = Pixels(tuple(config["mean"]), tuple(config["std"]), config["input_size"][0], turned)
    names = [str(label) for label in own.get("label_names") or ()]
    subset = infer_imagenet_subset(model)
    if not names and subset not in (None, "imagenet-1k"):  # `known_names` says that those of 1k are assumed
        names = ImageNetInfo(subset).label_names()
        LOGGER.info("%s does not name its classes: those of %s are assumed", printable(name), subset)
    weights = [] if folder is None else [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    return OpenedModel(
        name=name,
        kind="timm",
        module=module,
        device=device,
        dtype=activation_dtype(device),
        preparation=Preparation(size, pixels, config["crop_pct"], mode, config["interpolation"]),
        class_names=names,
        num_classes=model.num_classes,
        parameters=count(model),
        bytes=sum(file.stat().st_size for file in weights) or None,
    )


def _of_file(name: str, path: Path, device: torch.device, resize: str) -> OpenedModel:
    """Open an .onnx or .pt2 file of export.py, with the description beside it."""
    locate(name)
    description = path.with_suffix(".json")
    if not description.is_file():
        raise UserError(
            f"{printable(name)}: export.py writes {printable(description.name)} beside it, which is missing"
        )
    about = read_json(description)
    with as_user_error(KeyError, TypeError, ValueError, prefix=f"{printable(description)} is damaged: "):
        config = cast(dict, about)["pretrained_cfg"]
        channels, *size = config["input_size"]
        pixels = Pixels(tuple(config["mean"]), tuple(config["std"]), channels, bool(cast(dict, about)["exif"]))
        preparation = Preparation((size[0], size[1]), pixels, config["crop_pct"], MODES[resize])
        about = cast(dict, about)
    with _as_mistake(name, "it cannot be read"):
        module: nn.Module
        if path.suffix == ".onnx":
            module = Session(path, device)
            where = module.device
        else:
            module, where = Program(path), torch.device("cpu")
    data = path.with_name(f"{path.name}.data")
    return OpenedModel(
        name=name,
        kind=path.suffix[1:],
        module=module,
        device=where,
        dtype=torch.float32,
        preparation=preparation,
        class_names=about.get("label_names", []),
        num_classes=0 if about.get("task") else about["num_classes"],
        parameters=about.get("parameters"),
        bytes=sum(file.stat().st_size for file in (path, data) if file.is_file()),
        only_one="task" in about,
    )


class Session(nn.Module):
    """An .onnx file in onnxruntime, with CUDA where that is built in and the device is a GPU, else on the CPU.

    Further inputs than the images, as the least score of a detector's objects, are 0.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"{printable(path)} needs onnxruntime: pip install onnxruntime") from error
        wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        providers = [provider for provider in wanted if provider in onnxruntime.get_available_providers()]
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.device = device if self.session.get_providers()[0].startswith("CUDA") else torch.device("cpu")

    def forward(self, imgs: Tensor) -> Tensor:
        """Return the first output."""
        first, *others = (given.name for given in self.session.get_inputs())
        values = {first: imgs.cpu().numpy()} | {name: np.zeros((), dtype=np.float32) for name in others}
        return torch.from_numpy(self.session.run(None, values)[0]).to(self.device)


class Program(nn.Module):
    """A .pt2 file, on the CPU, which it was exported for. A detector's second input, the least score, is 0."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        program = torch.export.load(path)
        self.inputs, self.program = len(program.graph_signature.user_inputs), program.module()

    def forward(self, imgs: Tensor) -> Tensor:
        """Return the first output."""
        found = self.program(imgs, *[torch.zeros(())] * (self.inputs - 1))
        return found if isinstance(found, Tensor) else found[0]


class _as_mistake:
    """Turn whatever a library raises on a name or file that it does not know into a `UserError` of one line."""

    def __init__(self, name: str, what: str) -> None:
        self.prefix = f"{printable(name)}: {what}: "

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (UserError, MemoryError)):
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(self.prefix + printable(reason)[:300]) from error


class Answered(NamedTuple):
    """The answers of a model to all images.

    Attributes:
        answers: (images, 5) float64, see `Answers.gathered`.
        labels: (images,) int64, outputs that are right.
        names: printable, of each output: its own, that of the class of the images, or its number.
    """

    answers: np.ndarray
    labels: np.ndarray
    names: list[str]

    @property
    def right(self) -> np.ndarray:
        """Return which answers are right, (images,) bool; those without an answer are not."""
        return self.answers[:, 0] == self.labels

    @property
    def answered(self) -> np.ndarray:
        """Return which images have an answer, (images,) bool."""
        return self.answers[:, 0] >= 0

    def row(self) -> dict:
        """Return `acc1`, `acc5`, their intervals, `loss` and `images`, and how many have no answer (`unanswered`)."""
        correct5 = float((self.answers[:, 1] == 1).sum())
        losses = self.answers[self.answered, 3]
        return accuracy(float(self.right.sum()), correct5, len(self.labels)) | {
            "interval5": wilson(correct5, len(self.labels)),
            "loss": float(losses.mean()) if len(losses) else None,
            "unanswered": int((~self.answered).sum()),
        }


def answer(models: Sequence[OpenedModel], source: Source, args: argparse.Namespace, log: Log) -> list[Answered]:
    """Let models answer all images; those that prepare images alike share what is decoded.

    Args:
        models: classifiers.
        source: images; labels are matched with the outputs of each model by the names of the classes.
        args: see `arguments.add_machine_arguments`; `eval_bad` and `dist_eval`, which must be False.
        log: shows the progress, and how classes were matched.

    Raises:
        UserError: the classes of the images do not fit those of a model.
        RunError: a model answers no image.
    """
    matched = [match(m.class_names, m.num_classes, source, printable(m.name), log.say) for m in models]
    scores = [Answers() for _ in models]
    groups: dict[tuple, list[int]] = {}
    for number, model in enumerate(models):
        groups.setdefault((model.preparation, model.device), []).append(number)
    for (preparation, device), members in groups.items():
        dataset = ImageDataset(source, pixels_by("pil", preparation.recipe()))
        start = 0
        title = ", ".join(printable(models[number].name) for number in members)
        for imgs, labels in batches_of(nn.Identity(), eval_loader(dataset, args, device), log, title[:60]):
            for number in members:
                logits = models[number].compute(imgs)
                own = torch.from_numpy(matched[number][0][start : start + len(labels)]).to(logits.device)
                bad = ~logits.isfinite().all(dim=1) | (labels == -1).to(logits.device)
                scores[number](logits, own.masked_fill(bad, -1))
            start += len(labels)
    found = []
    for model, (correct, names), score in zip(models, matched, scores, strict=True):
        found.append(Answered(score.gathered(False), correct, names))
        if not found[-1].answered.any():
            raise RunError(f"{printable(model.name)} answers none of {len(correct)} images: broken, or not finite")
    return found


def match(
    class_names: list[str], outputs: int, source: Source, owner: str, say: Callable[[str], None]
) -> tuple[np.ndarray, list[str]]:
    """Match the classes of images with the outputs of a model, as all scripts do.

    Args:
        class_names: of the outputs; empty if they are not known.
        outputs: their number.
        source: the images.
        owner: printable name of the model.
        say: shows a line of how they were matched.

    Returns:
        The labels (images,) as outputs of the model, and a printable name of each output.

    Raises:
        UserError: they do not fit together.
    """
    own = copy.copy(source)
    names, assumed = known_names(class_names, outputs, own.classes, owner)
    for line in [assumed] * bool(assumed) + match_classes(own, names, owner):
        say(line)
    known = [*map(printable, own.classes), *[""] * len(names)]
    return own.labels, [printable(name or known[place] or str(place)) for place, name in enumerate(names)]
