"""Export a checkpoint for use without this repository, and check that the file computes the same.

    python tools/export.py ./out_finetune_b/checkpoint-best.pth --to onnx

writes ./out_finetune_b/checkpoint-best.onnx, and beside it checkpoint-best.json: the architecture and arguments for
`timm.create_model`, and the input as timm describes it (size, mean, std, crop).

`--to hf` writes a folder for timm, transformers and the Hugging Face hub, with code that needs no clone of this one.

`--to pt2` writes a program of `torch.export`, `--to safetensors` the weights. `--encoder` leaves out the head: a
classifier then returns its normalised tokens, with the class token in the middle. Of a pretraining model only the
encoder can be exported: it scans in one direction and returns all patches after the last block, in cluster order. A
detector is exported as onnx or pt2 for one image of its input size; a second input is the least score of a detection.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from tools import export_folder, model_card
from tools.export_formats import DETECTORS, Encoder, build, describe
from tools.export_formats import WRITERS as FILES
from util import arguments, cli
from util.checkpoints.hub import beside, locate
from util.data.sources.readers import open_source
from util.distributed.processes import init_device
from util.errors import RunError, UserError, as_user_error
from util.files import json_with, output_file, printable, read_json, sha256_of, write_json, write_text
from util.tracking.run_log import open_log
from util.training import precision

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.
TOLERANCE = 1e-4  # relative to the largest output; summing in another order changes it by about 1e-6
DESCRIPTION = json_with(architecture=str, model_args=dict, pretrained_cfg=dict)  # the JSON beside a file
WRITERS = FILES | {"hf": export_folder.to_hf}
ONNX_NEEDS = ("onnx", "onnxscript", "onnxruntime")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("export.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=arguments.nonempty, metavar="CKPT", help="of pretraining or finetuning")
    parser.add_argument("--to", choices=tuple(WRITERS), required=True, help="format of the file; hf is a folder")
    parser.add_argument("--output", type=Path, metavar="PATH", help="(default: CKPT's name and the format's)")
    parser.add_argument("--model_key", choices=("model", "model_ema"), help="which weights (default: model)")
    arguments.add_ignore_keys(parser)
    parser.add_argument("--encoder", action="store_true", help="leave out the head and return tokens")
    arguments.add_machine_arguments(parser)
    add = parser.add_argument_group("model card").add_argument
    add("--data_path", type=arguments.nonempty, metavar="PATH", help="state the accuracy on val/ of these images")
    add("--no_measure", action="store_false", dest="measure", help="do not measure time and memory")
    parser.set_defaults(dist_eval=False, eval_bad="wrong")
    return parser


def load(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """Build the module to export in evaluation mode, and its description in the form of timm's config.json.

    Raises:
        UserError: the file is no checkpoint of ARM, or has no head and `--encoder` is not given; or the format is not
            for its task.
    """
    locate(args.checkpoint)

    import pretrained

    found = pretrained.read(args.checkpoint, args.model_key, args.ignore_keys)
    found.say_guesses()
    if found.task in ("pretraining", "image-text training") and not args.encoder:
        raise UserError(f"{args.checkpoint} comes from {found.task} and has no head: export its --encoder")
    if found.is_pretraining and args.to == "hf":
        raise UserError(f"--to hf is for encoders of finetuning: take --to safetensors for {args.checkpoint}")
    if found.task == "segmentation" and not args.encoder:
        raise UserError(f"{args.checkpoint} is of a segmenter, which is not exported: take its --encoder")
    about = describe(found, args.encoder)
    if found.task == "detection" and not args.encoder:
        from Detection.detection_export import ExportedDetector

        if args.to not in DETECTORS:
            raise UserError(f"--to {args.to} is not for a detector: take {' or '.join(DETECTORS)}, or its --encoder")
        detector = ExportedDetector(cast(Any, found.load_model(scan_backend="torch")))
        named = {"task": found.task, "num_classes": detector.model.num_classes, "outputs": detector.outputs}
        return detector, about | named | model_card.facts(found, detector)
    with as_user_error(ValueError):
        model = build(about)
    found.load_into(model, encoder=found.is_pretraining)
    module = Encoder(model) if args.encoder else model
    return module, about | model_card.facts(found, module)


def compare(module: Any, found: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...]) -> tuple[float, float]:
    """Return the largest difference, and the largest wanted value, of the output that differs most in proportion.

    Raises:
        RunError: of a detector, other objects are detected.
    """
    owns, wants = ([part] if isinstance(part, Tensor) else part for part in (found, want))
    if hasattr(module, "paired"):
        owns, wants = module.paired(owns, wants)
    distances = [
        ((own - wanted).abs().max().item(), wanted.abs().max().item())
        for own, wanted in zip(owns, wants, strict=True)
        if len(wanted)
    ]
    return max(distances, key=lambda pair: pair[0] / max(pair[1], 1e-30), default=(0.0, 0.0))


def check_output(kind: str, output: Path, source: Path) -> dict[str, str]:
    """Check that an export of the checkpoint `source` can be written to `output` and replaces nothing of value.

    Returns:
        SHA-256 by name, of the files that the JSON file beside `output` describes.

    Raises:
        UserError: it cannot.
    """
    if kind != "hf" and output.suffix != f".{kind}":
        raise UserError(f"--output {printable(output)}: a file of --to {kind} ends in .{kind}")
    with as_user_error(OSError, prefix=f"--output {printable(output)}: "):
        if not output.parent.is_dir():
            raise OSError(f"{printable(output.parent)} is no folder")
    with as_user_error(UnicodeEncodeError, prefix=f"--output {printable(output)}: the name is not UTF-8: "):
        str(output.resolve()).encode()  # the libraries that write and read the file accept no other
    if kind == "hf":
        with as_user_error(OSError, prefix=f"--output {printable(output)}: "):
            tempfile.TemporaryFile(dir=output.parent).close()
            export_folder.check_folder(output, source)
        return {}
    description = output_file(output.with_suffix(".json"), DESCRIPTION, source)
    earlier = cast(dict, read_json(description)).get("files") if description.is_file() else None
    known = earlier if isinstance(earlier, dict) else {}
    more = ["md", *["data"] * (kind == "onnx")]
    for file in (output, *(output.with_name(f"{output.name}.{suffix}") for suffix in more)):
        output_file(file, lambda path: path.name in known and known[path.name] == sha256_of(path), source)
    return known


def put_files(path: Path, output: Path, about: dict) -> None:
    """Move the files beside `path` to the folder of `output`, and write the description with their SHA-256 there."""
    written = [file for file in path.parent.iterdir() if file.suffix != ".json"]
    about["files"] |= {file.name: sha256_of(file) for file in written}
    write_json(path.with_suffix(".json"), about)
    for file in (*written, path.with_suffix(".json")):
        with file.open("rb") as content:
            os.fsync(content.fileno())
        file.replace(output.parent / file.name)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Write the file, read it, compare its outputs with the model's.

    Raises:
        UserError: the checkpoint or the output file does not fit, or a package is missing.
        RunError: the file computes something else, or cannot be written; no file is left then.
    """
    if missing := [name for name in ONNX_NEEDS if args.to == "onnx" and find_spec(name) is None]:
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    source = beside(args.checkpoint)
    with as_user_error(ValueError, prefix=f"{printable(args.checkpoint)} names no file: "):
        ending = f"{'-encoder' if args.encoder else ''}{'-' if args.to == 'hf' else '.'}{args.to}"
        output = args.output or source.with_name(f"{source.stem}{ending}")
    known = check_output(args.to, output, source)
    device, images = init_device(args.device, args.dist_timeout), None
    precision.choose(args, device)
    if args.data_path is not None:
        if args.encoder:
            raise UserError("--data_path is for the accuracy of a classifier, and --encoder leaves out the head")
        images = open_source(args.data_path, "val")
    start = time.monotonic()
    module: Any
    module, about = load(args)
    if images is not None:
        from Evaluation.opened_models import match

        if about.get("task"):
            raise UserError(f"--data_path is for the accuracy of a classifier: {args.checkpoint} is of {about['task']}")
        match(about.get("label_names", []), about["num_classes"], images, printable(args.checkpoint), lambda line: None)
    imgs = torch.randn(3, *about["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(0))
    examples = module.examples(imgs) if hasattr(module, "examples") else [(imgs,), (imgs[:1],)]
    wanted = [module(*inputs) for inputs in examples]
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
            path = Path(folder) / output.name
            compute = WRITERS[args.to](module, about, imgs[:2], path)
            pairs = [compare(module, compute(*inputs), want) for inputs, want in zip(examples, wanted, strict=True)]
            difference, largest = max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-30))
            if not difference <= TOLERANCE * largest:
                raise RunError(f"the exported model differs by {difference:.3g}, where outputs reach {largest:.3g}")
            seconds = time.monotonic() - start
            if args.to != "hf":
                write_json(path.with_suffix(".json"), about)
            measured = model_card.measured(args, path, about, images, device, open_log())
            text = model_card.card(about | {"file": output.name, "format": args.to}, measured)
            if args.to == "hf":
                write_text(path / "README.md", export_folder.head(about) + text)
                export_folder.seal(path)
                export_folder.put(path, output)
            else:
                write_text(path.with_name(f"{path.name}.md"), text)
                put_files(path, output, about | {"files": known})
    except OSError as error:
        raise RunError(f"{printable(output)} cannot be written: {error.strerror}") from error
    weights = output / export_folder.WEIGHTS if args.to == "hf" else output
    megabytes = weights.stat().st_size / 1e6
    print(
        f"{printable(output)}: {megabytes:.1f} MB after {seconds:.0f} s; read again it differs by at most "
        f"{difference:.2g} where outputs reach {largest:.2g}"
    )


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
