"""The card of an exported model: what it is, what was measured of it and what was not, and how to load it."""

from __future__ import annotations

import argparse
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from Evaluation.tables import escaped, table, with_interval
from mamba import SIZES
from util import hardware
from util.files import printable, some
from util.launch import commit

if TYPE_CHECKING:
    import torch

    from pretrained import Checkpoint
    from util.data.sources.source import Source
    from util.tracking.run_log import Log

PACKAGES = ("torch", "timm", "onnxruntime")  # whose versions a card states
SECONDS = 5.0  # that the measurement of time may take
BUSY = 3  # times as long as the shortest round may the longest one take
ROUNDS = 20
LISTED = 20  # classes that a card names
# arguments of a run that a card repeats, and what it calls them
TRAINING = {
    "epochs": "epochs", "batch_size": "batch size of a process", "world_size": "processes", "lr": "learning rate",
    "weight_decay": "weight decay", "finetune": "started from", "data_path": "data", "seed": "seed",
}  # fmt: skip
LOAD = {
    "onnx": """
import onnxruntime

session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
{outputs} = session.run(None, {{"imgs": imgs{more}}})  # imgs: {shape} float32, an array of NumPy
""",
    "pt2": """
import torch

compute = torch.export.load("{file}").module()
{outputs} = compute(imgs{more})  # imgs: {shape} float32, a tensor
""",
    "safetensors": """
import json, timm
import models_arm  # of the repository: registers the models

about = json.load(open("{json}"))
model = timm.create_model(about["architecture"], checkpoint_path="{file}", **about["model_args"]).eval()
{outputs} = model(imgs)  # imgs: {shape} float32, a tensor
""",
    "pretraining": """
import pretrained  # of the repository

encoder, _ = pretrained.load("{file}", encoder=True)
{outputs} = encoder.forward_features(imgs)  # imgs: {shape} float32, a tensor
""",
    "hf": """
import timm
import models_arm  # of the repository: registers the models

model = timm.create_model("local-dir:{file}", pretrained=True).eval()  # or hf-hub:OWNER/NAME
{outputs} = model(imgs)  # imgs: {shape} float32, a tensor

# or without the repository, by the code in the folder
from transformers import {auto}

model = {auto}.from_pretrained("{file}", trust_remote_code=True)  # or OWNER/NAME
{outputs} = model(imgs).{field}
""",
}
AUTO = {True: ("AutoModelForImageClassification", "logits"), False: ("AutoModel", "pooler_output")}  # has it classes?
UNMEASURED = (
    "Nothing else was measured: neither other images, nor robustness, nor calibration, nor another machine. What the "
    "images of the training contain, and whom the model may fail, is not known here."
)


SUBJECTS = {"accuracy": "Accuracy was", "cost": "Time and memory were"}


def facts(found: Checkpoint, module: Any) -> dict:
    """Return what a description adds for the card: `parameters`, `sha256` of the weights, and `training`.

    `training` holds arguments of the run that wrote the checkpoint; of paths only the last part.
    """
    from Evaluation.features import hash_of

    model = getattr(module, "model", module)
    said = {name: value for name in TRAINING if (value := found.arguments.get(name)) is not None}
    for name in ("finetune", "data_path"):
        if name in said:
            places = said[name] if isinstance(said[name], list) else [said[name]]
            said[name] = ", ".join(Path(str(place)).name for place in places)
    epoch = {} if found.epoch is None else {"epochs done": found.epoch + 1}
    training = {TRAINING[name]: value for name, value in said.items()} | epoch
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return {"parameters": parameters, "sha256": hash_of(model), "training": training}


def measured(
    args: argparse.Namespace, path: Path, about: dict, source: Source | None, device: torch.device, log: Log
) -> dict:
    """Measure an exported file or folder in its own runtime.

    Args:
        args: of export.py.
        path: the file, with its description beside it, or the folder.
        about: the description.
        source: images to answer; None measures no accuracy.
        device: to compute on, if the format can.
        log: shows the progress.

    Returns:
        `machine`, and of what was measured `accuracy` with `data`, and `cost`; `reasons` says why something was not.

    Raises:
        UserError: the classes of the images do not fit.
    """
    from Evaluation import cost
    from Evaluation.opened_models import answer, open_model
    from util.training.run_state import fingerprint

    reasons = {}
    if source is None:
        reasons["accuracy"] = "no images were given (--data_path)"
    if about.get("task") or not about["num_classes"]:
        reasons["accuracy"] = "the model returns no classes"
    result: dict = {"machine": machine(device), "reasons": reasons}
    if not args.measure:
        reasons["cost"] = "it was switched off (--no_measure)"
    elif path.suffix == ".safetensors" and not about["num_classes"]:
        reasons["cost"] = "the weights of an encoder are computed by whatever loads them"
    if "cost" in reasons and source is None:
        return result
    settings = {"scan_backend": args.scan_backend}
    logging.disable(logging.INFO)  # the checkpoint has told all of it
    model = open_model(str(path), device, **settings)
    logging.disable(logging.NOTSET)
    result["runs on"] = str(model.device)
    if "cost" not in reasons:
        more = {"device": str(device), "dtype": args.dtype, **settings}
        (result["cost"],) = cost.measure([model], args.batch_size, ROUNDS, SECONDS, more)
    model.name = path.name  # for messages; until here it is in a folder that is not kept
    if source is not None:
        (answers,) = answer([model], source, args, log)
        result["accuracy"] = answers.row()
        root = "/".join(Path(source.root).parts[-2:])
        result["data"] = {"root": root, "images": len(source.labels), "fingerprint": fingerprint(source)}
    return result


def machine(device: torch.device) -> dict:
    """Return date, commit of this repository, versions and hardware."""
    found: dict = dict(hardware.describe(device))
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found.pop(package, None)
    return found | {"commit": commit() or "not known"}


def card(about: dict, measured: dict | None) -> str:
    """Return the card, in Markdown.

    Args:
        about: of `describe` and `facts`, with the `format` (a key of the writers) and the name of the `file`.
        measured: what the function of this name returns; None if nothing was measured.
    """
    found = measured or {"reasons": {"accuracy": "nobody did it", "cost": "nobody did it"}}
    parts = [f"# {escaped(printable(about['file']))}", table(["what", "value"], *rows(about, found))]
    parts += ["## Measured", *((accuracy_of(found) + cost_of(found)) or ["Nothing was measured."])]
    if "machine" in found and found.keys() & {"accuracy", "cost"}:
        parts.append("On this machine, whose cores other programs may have used at the same time:")
        where = found["machine"] | {"computed on": found["runs on"]}
        parts.append(table(["what", "value"], *([name, escaped(str(value))] for name, value in where.items())))
    parts += ["## Not measured", "\n".join(f"- {line}" for line in unmeasured(found))]
    if about.get("training"):
        parts += ["## What the checkpoint says of its training", "It was read from the checkpoint, and not checked."]
        parts.append(table(["what", "value"], *([k, escaped(printable(str(v)))] for k, v in about["training"].items())))
    parts += ["## Loading", f"```python\n{loading(about)}\n```"]
    return "\n\n".join(parts) + "\n"


def rows(about: dict, found: dict) -> list[list[str]]:
    """Return the rows of the table of what the model is."""
    sizes, config = about["model_args"], about["pretrained_cfg"]
    channels, height, width = config["input_size"]
    directions = sizes.get("directions", 1)
    usual = all(SIZES[about["architecture"]][name] == sizes[name] for name in ("embed_dim", "depth"))
    called = about["architecture"] if usual else f"{about['architecture']} with other sizes"
    body = f"{sizes['depth']} blocks of {sizes['embed_dim']} channels, patches of {sizes['patch_size']} pixels"
    resized = [int(side / config["crop_pct"]) for side in (height, width)]
    cut = f", {height} x {width} of the centre" if config["crop_pct"] != 1 else ""
    numbers = [", ".join(f"{value:g}" for value in config[name]) for name in ("mean", "std")]
    names = [printable(name) for name in about.get("label_names", [])]
    classes = f"{about['num_classes']}"
    classes += f": {some(names, LISTED)}" if any(names) else ", which the checkpoint does not name"
    task = about.get("task", "classification" if about["num_classes"] else "encoder")
    return [
        ["model", escaped(f"{called}: {body}, {directions} scan directions")],
        ["task", task],
        ["parameters", f"{about['parameters']:,}" if "parameters" in about else "not counted"],
        ["input", f"{channels} x {height} x {width}, float32"],
        ["preparation", f"resized to {resized[0]} x {resized[1]} whatever the aspect ratio (bicubic){cut}"],
        ["normalisation", f"values from 0 to 1, less {numbers[0]}, divided by {numbers[1]}"],
        ["orientation in EXIF", "obeyed" if about.get("exif") else "ignored"],
        *([["classes", escaped(classes)]] if about["num_classes"] else []),
        ["weights", escaped(f"{about.get('weights') or 'state dict'}, SHA-256 {about.get('sha256', 'not known')}")],
        ["format", f"{about['format']} of tools/export.py"],
    ]


def accuracy_of(found: dict) -> list[str]:
    """Return what is said of the accuracy."""
    if (row := found.get("accuracy")) is None:
        return []
    data = found["data"]
    images = f"{data['images']} images of {escaped(data['root'])}"
    missing = f" {row['unanswered']} of them have no answer and count as wrong." if row["unanswered"] else ""
    head = ["measure", "value (95 % Wilson interval)"]
    body = [[name, with_interval(row, key)] for name, key in (("top-1", "acc1"), ("top-5", "acc5"))]
    said = f"{images} (fingerprint {data['fingerprint'][:16]}).{missing}"
    return [table(head, *body, ["mean cross-entropy", f"{row['loss']:.4f}"]), said]


def cost_of(found: dict) -> list[str]:
    """Return what is said of time and memory."""
    if (row := found.get("cost")) is None:
        return []
    batch, memory = row["batch"], row.get("memory_mb", {})
    lines, times = [["latency of one image", f"{spread(row['latency_ms'], 'ms')}"]], [row["latency_ms"]]
    if "images_per_second" in row:
        lines.append([f"throughput of a batch of {batch}", spread(row["images_per_second"], "images/s")])
        times.append(row["images_per_second"])
    lines += [[f"peak memory of {counted(int(n))}", f"{value:.0f} MB"] for n, value in memory.items()]
    said = f"Median of {row['rounds']} rounds, least and most in brackets; decoding and resizing are not in it."
    if any(values["most"] > BUSY * values["least"] for values in times):
        said += " The rounds differ widely, because other programs ran: measure again on a quiet machine."
    if memory:
        said += " Memory is what a new process needs for the model beyond Python and its libraries."
    return [table(["cost", "value"], *lines), said]


def spread(values: dict, unit: str) -> str:
    """Return a median with the least and the most."""
    digits = 3 if values["median"] < 100 else 4
    median, least, most = (f"{values[name]:.{digits}g}" for name in ("median", "least", "most"))
    return f"{median} {unit} ({least} to {most})"


def counted(images: int) -> str:
    """Return a number of images as words."""
    return "one image" if images == 1 else f"a batch of {images}"


def unmeasured(found: dict) -> list[str]:
    """Return a line for all that was not measured."""
    lines = [f"{SUBJECTS[name]} not measured: {reason}." for name, reason in found["reasons"].items()]
    row = found.get("cost", {})
    if row and "images_per_second" not in row:
        lines.append("Throughput of a batch: the file takes one image at a time.")
    if "memory_reason" in row:
        lines.append(f"Memory: {row['memory_reason']}.")
    return [*map(escaped, lines), UNMEASURED]


def loading(about: dict) -> str:
    """Return the lines of Python that load the file."""
    kind, file = about["format"], printable(about["file"])
    outputs = "logits" if about["num_classes"] and "task" not in about else "tokens"
    shape, more = "(B, {}, {}, {})".format(*about["pretrained_cfg"]["input_size"]), ""
    if "outputs" in about:  # of a detector
        outputs, shape = ", ".join(about["outputs"]), shape.replace("B", "1")
        more = ', "score": np.float32(0.05)' if kind == "onnx" else ", torch.tensor(0.05)"
    elif kind == "onnx":
        outputs += ","
    code = LOAD["pretraining" if kind == "safetensors" and "switches" in about else kind]
    auto, field = AUTO[bool(about["num_classes"])]
    if kind == "hf" and not about["num_classes"]:
        outputs = "features"  # (B, channels)
    names = {"file": file, "json": Path(file).with_suffix(".json").name, "outputs": outputs, "auto": auto}
    names["field"] = field
    return code.strip().format(**names, shape=shape, more=more)
