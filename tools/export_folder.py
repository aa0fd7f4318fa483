"""The folder of `tools/export.py --to hf`: what timm, transformers and the Hugging Face hub read.

It holds the weights with their description, a model card, and code that needs neither timm nor this repository: arm.py,
collected from the sources by `standalone`, and modeling_arm.py, a copy of the file beside this one.
"""

import hashlib
import logging
import os
import runpy
import textwrap
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from tools.export_formats import Compute, Encoder, to_safetensors
from tools.standalone import ROOT, Collection
from util.errors import UserError
from util.files import printable, read_json, sha256_of, to_json, write_json, write_text
from util.launch import commit

MODEL, CODE, WEIGHTS, CONFIG = "arm.py", "modeling_arm.py", "model.safetensors", "config.json"
ABOUT = '''"""ARM (arXiv 2406.07537): a Mamba encoder of images with a class token in the middle, and a linear head.

Collected from the sources of "{title}",
commit {commit}.
Names in backquotes that are not in this file are that repository's, which also has fast kernels of the scan: here the
scan is a loop over the tokens in PyTorch, for any device.
"""

'''


def read_code(name: str) -> str:
    """Return the text of a file of this repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def code() -> dict[str, str]:
    """Return the text of the Python files by name; each begins with the notice that the licence asks for."""
    licence = read_code("LICENSE")
    notice = textwrap.indent(textwrap.dedent(licence[licence.rindex("   Copyright") :]), "# ", lambda line: True)
    notice = notice.replace("# \n", "#\n") + "\n"
    title = next(line for line in read_code("CITATION.cff").splitlines() if line.startswith("title: "))
    about = ABOUT.format(title=title.partition('"')[2].rstrip('"'), commit=commit() or "unknown")
    wrapper = read_code(f"tools/{CODE}").replace("from models_classifier import", "from .arm import")
    return {MODEL: notice + about + Collection("tools.modeling_arm").text(), CODE: notice + wrapper}


def settings(about: dict) -> tuple[dict, dict]:
    """Return the content of config.json and of preprocessor_config.json for a description of `describe`."""
    pixels, (channels, *size) = about["pretrained_cfg"], about["pretrained_cfg"]["input_size"]
    classes = {"AutoConfig": "ARMConfig", "AutoModel": "ARMModel"}
    if about["num_classes"]:
        classes["AutoModelForImageClassification"] = "ARMForImageClassification"
    if channels in (1, 3):  # Pillow has no others
        classes["AutoImageProcessor"] = "ARMImageProcessor"
    else:  # timm 1.0.20 would take the first weights for those of RGB images, and give them random values
        pixels = pixels | {"first_conv": None}
    # Without trust_remote_code, transformers takes the classes that wrap timm's.
    both: dict = {"image_processor_type": "TimmWrapperImageProcessor"}
    both |= {"auto_map": {name: f"{Path(CODE).stem}.{kind}" for name, kind in classes.items()}}
    sizes = {name: value for name, value in about["model_args"].items() if name != "num_classes"}  # it stands outside
    config = about | both | {"model_type": "timm_wrapper", "model_args": sizes, "pretrained_cfg": pixels}
    resized = [int(side / pixels["crop_pct"]) for side in size]
    normalised = {"image_mean": pixels["mean"], "image_std": pixels["std"]}
    return config, both | normalised | {"resized": resized, "size": size, "exif": about["exif"]}


def to_hf(module: nn.Module, about: dict, imgs: Tensor, path: Path) -> Compute:
    """Write the folder; its computation is that of timm, and below it that of arm.py: (2, ...) for each output."""
    import timm
    from safetensors.torch import load_file

    path.mkdir()
    to_safetensors(module, about, imgs, path / WEIGHTS)
    logging.getLogger("timm").setLevel(logging.WARNING)
    config, processor = settings(about)
    write_json(path / CONFIG, config)
    if "AutoImageProcessor" in config["auto_map"]:
        write_json(path / "preprocessor_config.json", processor)
    for name, text in code().items():
        write_text(path / name, text)
    own = runpy.run_path(str(path / MODEL))["ARMClassifier"](**about["model_args"])
    own.load_state_dict(load_file(path / WEIGHTS))
    models = [timm.create_model(f"local-dir:{path}", pretrained=True), own]
    again = [Encoder(model) if isinstance(module, Encoder) else model for model in models]
    for model in again:
        model.eval()
    return lambda imgs: torch.stack([model(imgs) for model in again])


def head(about: dict) -> str:
    """Return the part of README.md, above the card, that the hub reads. It names no licence: that of weights varies."""
    task = "image-classification" if about["num_classes"] else "image-feature-extraction"
    return f"---\nlibrary_name: timm\npipeline_tag: {task}\ntags: [timm, transformers, arm, mamba]\n---\n\n"


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by name: of config.json without its entry `files`, of a folder no digit."""
    content = cast(dict, read_json(folder / CONFIG))
    described = to_json({name: value for name, value in content.items() if name != "files"}).encode()
    found = {place.name: sha256_of(place) if place.is_file() else "" for place in folder.iterdir()}
    return found | {CONFIG: hashlib.sha256(described).hexdigest()}


def seal(folder: Path) -> None:
    """Write the `fingerprint` to config.json, by which `check_folder` knows the folder, and bring all to the disk."""
    write_json(folder / CONFIG, cast(dict, read_json(folder / CONFIG)) | {"files": fingerprint(folder)})
    for place in (*folder.iterdir(), folder):
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def check_folder(output: Path, source: Path) -> None:
    """Raise UserError unless nothing is at `output`, or an earlier folder that nobody has changed since.

    `source` is the checkpoint. Raises OSError if the place cannot be read.
    """
    name = printable(output)
    if not output.name.strip("."):
        raise UserError(f"--output {name} has no name of its own: give one")
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise UserError(f"--output {name} is there and is no folder: give another name")
    if output.resolve() in source.resolve().parents:
        raise UserError(f"--output {name} holds the checkpoint: give another name")
    content = read_json(output / CONFIG) if (output / CONFIG).is_file() else None
    if not (isinstance(content, dict) and isinstance(content.get("files"), dict)):
        raise UserError(f"--output {name} is there and is no earlier result: move it, or give another name")
    if changed := dict(fingerprint(output).items() ^ content["files"].items()):
        remedy = "save it elsewhere and remove the folder, or give another name"
        raise UserError(f"{name}: {min(changed)} is not as the export wrote it: {remedy}")


def put(folder: Path, output: Path) -> None:
    """Move a folder to `output`; an earlier one there stays if that fails."""
    earlier = folder.with_name("earlier")
    if replaces := output.exists():
        output.rename(earlier)
    try:
        folder.rename(output)
    except OSError:
        if replaces:
            earlier.rename(output)
        raise
