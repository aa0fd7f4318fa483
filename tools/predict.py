"""Name the classes of images or of their pixels, detect objects, or write features, with a checkpoint.

    python tools/predict.py out_finetune_b/checkpoint-best.pth photo.jpg holiday/ --output answers.csv
    python tools/predict.py out_detect_b/checkpoint-best.pth photo.jpg holiday/ --output detections.json
    python tools/predict.py out_segment_b/checkpoint-best.pth photo.jpg holiday/ --output maps
    python tools/predict.py out_b/checkpoint-last.pth holiday/ --features pooled --output features.npy

Images are files, folders at any depth, or places with the prefixes of --data_path. The answers of a classifier are CSV
or JSON lines, by the suffix of --output; those of a detector are JSON in COCO's format for results; features are an
array of NumPy. Beside the last two, a CSV file of the same name lists the images. The answers of a segmenter are a
folder of label maps (PNG) and a list of them, maps.csv. Under torchrun each process takes a share of the images; the
files are those of one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from torch import Tensor

from Detection.coco_metrics import is_detections
from Evaluation.prediction_files import all_errors, errors_of, is_list, list_images, shared, write_lines, writing
from Evaluation.tables import csv_text
from util import arguments, cli
from util.checkpoints.hub import beside, locate
from util.data.class_names import known_names
from util.data.sources.image_files import FileList
from util.data.sources.mixture import Mixture
from util.data.sources.readers import READERS, open_source, path_of
from util.data.sources.source import Source
from util.distributed.processes import check_one_machine, init_device, on_main
from util.errors import UserError
from util.files import open_regular, output_file, printable, reserve, some
from util.tracking.run_log import Log, open_log

if TYPE_CHECKING:
    from models_classifier import ARMClassifier
    from pretrained import Model
    from util.data.device_loader import DeviceLoader

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.

TOPK = 5
SUFFIXES = {  # of --output
    "features": (".npy",),
    "classification": (".csv", ".jsonl"),
    "detection": (".json",),
    "segmentation": (),  # a folder, which `write_maps` checks
}
ONLY_FOR = {"topk": "classification", "score": "detection", "block": "--features", "average_last": "--features"}


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("predict.py", description=__doc__.splitlines()[0])
    arguments.add_machine_arguments(parser)
    arguments.add_eval_arguments(parser, scored=False)
    arguments.add_checkpoint_arguments(parser)
    group = parser.add_argument_group("answers")
    add = group.add_argument
    places = "files, folders, and places with a prefix: " + ", ".join(f"{kind}:" for kind in READERS if kind)
    add("images", type=arguments.nonempty, nargs="+", metavar="IMAGES", help=places)
    kinds = ".csv or .jsonl, of a detector .json, of a segmenter a folder; with --features .npy"
    add("--output", type=Path, required=True, metavar="PATH", help=kinds)
    add("--topk", type=arguments.positive, metavar="K", help=f"likeliest classes (default: {TOPK}, or all of fewer)")
    add("--score", type=arguments.rate, help="least score of a detection (default: 0.05)")
    add("--features", choices=("pooled", "tokens"), help="write features instead, float32 or all tokens in float16")
    arguments.add_block_arguments(group)
    parser.set_defaults(dist_eval=True, eval_bad="wrong")
    return parser


def check_outputs(args: argparse.Namespace, kind: str) -> None:
    """Raise UserError if flags contradict each other, or a file cannot be written or is of another kind.

    `kind` is "features", or the task of the checkpoint, whose answers are written.
    """
    if kind not in SUFFIXES:
        why = " and has no classes" if kind == "pretraining" else ""
        raise UserError(f"{args.checkpoint} comes from {kind}{why}: add --features pooled")
    if SUFFIXES[kind] and args.output.suffix not in SUFFIXES[kind]:
        what = {"classification": "answers", "detection": "detections"}.get(kind, kind)
        raise UserError(f"--output {printable(args.output)}: {what} are written as {' or '.join(SUFFIXES[kind])}")
    for name, wanted in ONLY_FOR.items():
        if getattr(args, name) is not None and wanted.removeprefix("--") != kind:
            what = "not for --features" if kind == "features" else f"only for {wanted}, not for {kind}"
            raise UserError(f"--{name} is {what}: leave it out")
    for name, usual in (("eval_resize", "square"), ("eval_loader", "pil")):
        if kind in ("detection", "segmentation") and (given := getattr(args, name)) != usual:
            raise UserError(f"--{name} {given} is not for {kind}, which takes whole images: leave it out")
    if kind == "segmentation":
        return
    inputs = [beside(args.checkpoint), *(path for path in args.images if not path_of(path)[0])]
    is_ours = {"features": is_features, "classification": is_answers, "detection": is_detections}[kind]
    output_file(args.output, is_ours, *inputs)
    if kind != "classification":
        output_file(args.output.with_suffix(".csv"), is_list, *inputs)


def first_line(path: Path) -> str:
    """Return the beginning of a text file, "" if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(2**16).decode(errors="replace").partition("\n")[0]
    except OSError:
        return ""


def is_features(path: Path) -> bool:
    """Return whether a file holds an array, and beside it is the list of its images."""
    return first_line(path).startswith("\ufffdNUMPY") and is_list(path.with_suffix(".csv"))


def is_answers(path: Path) -> bool:
    """Return whether a file holds answers."""
    if path.suffix == ".csv":
        return first_line(path).startswith("file,class_1,probability_1")
    return first_line(path).startswith('{"file": ')


def is_file(place: str) -> bool:
    """Return whether a place is a single file; raise UserError if it has no prefix and is no file or folder."""
    if path_of(place)[0]:
        return False
    try:
        mode = os.stat(place).st_mode
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        raise UserError(f"{printable(place)}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{printable(place)}: it is neither a file nor a folder")
    return stat.S_ISREG(mode)


def open_images(places: Sequence[str]) -> Source:
    """Open files, folders and places with a prefix as one source, in their order.

    Raises:
        UserError: a place is missing, or holds no image.
    """
    sources: list[Source] = []
    for are_files, group in groupby(places, is_file):
        if are_files:
            sources.append(FileList([*group]))
            continue
        for place in group:
            try:
                sources.append(open_source(place, "", labels=False))
            except UserError as error:
                raise UserError(str(error).removeprefix("--data_path ")) from error
    return sources[0] if len(sources) == 1 else Mixture(sources, [1] * len(sources))


class Answers:
    """The form of a file of answers: CSV, or JSON lines.

    Args:
        suffix: of the file.
        names: of the outputs.
        topk: number of likeliest classes.
    """

    def __init__(self, suffix: str, names: Sequence[str], topk: int) -> None:
        self.is_csv, self.names, self.topk = suffix == ".csv", names, topk

    def head(self) -> str:
        """Return what comes before the answers."""
        best = [f"{column}_{place}" for place in range(1, self.topk + 1) for column in ("class", "probability")]
        return csv_text([["file", *best, "error"]]) if self.is_csv else ""

    def line(self, file: str, best: Sequence[tuple[float, int]]) -> str:
        """Return the line of an image, whose likeliest classes are pairs (probability, output)."""
        found = [(self.names[output], float(f"{probability:.6g}")) for probability, output in best]
        if self.is_csv:
            return csv_text([[file, *(cell for pair in found for cell in pair), ""]])
        classes, probabilities = zip(*found, strict=True)
        return self._json(file=file, classes=classes, probabilities=probabilities)

    def without(self, file: str, error: str) -> str:
        """Return the line of an image that has no answer."""
        return csv_text([[file, *[""] * 2 * self.topk, error]]) if self.is_csv else self._json(file=file, error=error)

    @staticmethod
    def _json(**row: object) -> str:
        return json.dumps(row, ensure_ascii=False) + "\n"


def write_answers(
    args: argparse.Namespace, model: ARMClassifier, loader: DeviceLoader, source: Source, log: Log
) -> dict[int, str]:
    """Write the likeliest classes of each image, and return why images have none."""
    from Evaluation.features import compute
    from util.training.precision import autocast

    outputs = model.num_classes
    names, assumed = known_names(args.class_names, outputs, (), args.checkpoint)
    if assumed:
        log.say(assumed)
    if (args.topk or 0) > outputs:
        raise UserError(f"--topk {args.topk}: the checkpoint has {outputs} classes")
    topk = args.topk or min(TOPK, outputs)
    form = Answers(args.output.suffix, [name or str(place) for place, name in enumerate(names)], topk)

    def likeliest(imgs: Tensor) -> tuple[list[bool], list[list[tuple[float, int]]]]:
        """Return for images (B, in_chans, H, W) whether their logits are finite, and the best (probability, output)."""
        with autocast(imgs.device):
            logits = model(imgs)
        best = logits.float().softmax(dim=1).topk(topk)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return logits.isfinite().all(dim=1).tolist(), [[*zip(*pair, strict=True)] for pair in pairs]

    def batches() -> Iterator[tuple[dict[int, str], str]]:
        for share, _, (finite, best) in compute(loader, likeliest, log, "images"):
            errors = errors_of(loader, source, share, finite, "logits")
            lines = [
                form.without(source.name(i), errors[i]) if i in errors else form.line(source.name(i), pairs)
                for i, pairs in zip(share, best, strict=True)
            ]
            yield errors, "".join(lines)

    return write_lines(args, batches(), len(source.labels), lambda lines: chain([form.head().encode()], lines))


def write_features(
    args: argparse.Namespace, model: Model, loader: DeviceLoader, source: Source, log: Log
) -> dict[int, str]:
    """Write the features of each image, NaN for those that have none, and the list of images; return why."""
    from Evaluation.features import are_finite, chosen_blocks, compute, encode_kinds, form_of

    blocks, tokens = chosen_blocks(args, len(model.layers)), args.features == "tokens"
    dtype, shape = form_of(model, tokens)
    errors: dict[int, str] = {}
    # the array, which may take long to reach the disk, replaces the former one first, and the list right after it
    with shared(args.output.with_suffix(".csv")) as listed, shared(args.output) as target:

        def start() -> None:
            """Reserve the space: on a full disk, writing to the memory map would kill the process with no message."""
            with writing(args.output, UserError), target.open("xb") as file:
                about = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (len(source.labels), *shape)}
                np.lib.format.write_array_header_1_0(file, about)
                reserve(file, file.tell() + math.prod(about["shape"]) * np.dtype(dtype).itemsize)

        on_main(start)
        array = np.lib.format.open_memmap(target, "r+")
        for share, _, found in compute(
            loader, lambda imgs: encode_kinds(model, imgs, blocks, [tokens])[tokens], log, "images"
        ):
            new = errors_of(loader, source, share, are_finite(found).tolist(), "features" + " in float16" * tokens)
            found[[index in new for index in share]] = np.nan
            array[share] = found
            errors |= new
        array.flush()
        errors = all_errors(errors, len(source.labels))
        on_main(lambda: list_images(args.output, listed, source, errors))
    return errors


def main(args: argparse.Namespace) -> None:
    """Write the answers, or the features.

    Raises:
        UserError: arguments, checkpoint or images do not fit; nothing is written then.
        RunError: no image has a result, or the output cannot be written.
    """
    arguments.check_input_size(args)
    check_one_machine()
    device, log = init_device(args.device, args.dist_timeout), open_log()
    locate(args.checkpoint)
    source = open_images(args.images)

    from Evaluation.features import eval_images, load_model, read_checkpoint
    from util.data.loaders import eval_loader

    found = read_checkpoint(args, device)
    kind = "features" if args.features else found.task
    on_main(lambda: check_outputs(args, kind))
    model: Any = load_model(args, device, found, encoder=kind not in ("detection", "segmentation"))
    if kind == "detection":
        from Detection.detection_predict import write_detections

        errors = write_detections(args, found, model, source, device, log)
    elif kind == "segmentation":
        from Segmentation.segment_predict import write_maps

        errors = write_maps(args, found, model, source, device, log)
    else:
        write = write_features if args.features else write_answers
        errors = write(args, model, eval_loader(eval_images(args, source), args, device), source, log)
    if errors:
        files = some([source.name(index) for index in sorted(errors)])
        log.say(f"{len(errors)} of {len(source.labels)} images have no result, the column error says why: {files}")
    log.say(f"{printable(args.output)}: {len(source.labels)} images")


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
