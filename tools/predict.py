"""Name the classes of images with a checkpoint of finetuning, or write the features of any checkpoint.

    python tools/predict.py out_finetune_b/checkpoint-best.pth photo.jpg holiday/ --output answers.csv
    python tools/predict.py out_b/checkpoint-last.pth holiday/ --features pooled --output features.npy

Images are files, folders at any depth, or places with the prefixes of --data_path. The answers are CSV or JSON lines,
by the suffix of --output; features are an array of NumPy with a CSV file of the same name that lists the images. Under
torchrun each process takes a share of the images; the files are those of one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from torch import Tensor

from Evaluation.tables import csv_text
from util import arguments, cli
from util.checkpoints.hub import beside, locate
from util.data.class_names import known_names
from util.data.sources.image_files import FileList
from util.data.sources.mixture import Mixture
from util.data.sources.readers import READERS, open_source, path_of
from util.data.sources.source import Source
from util.distributed.processes import check_one_machine, gather_late, init_device, on_main, rank, world_size
from util.errors import RunError, UserError
from util.files import open_regular, output_file, printable, replacing, reserve, some
from util.tracking.run_log import Log, open_log

if TYPE_CHECKING:
    from models_classifier import ARMClassifier
    from pretrained import Model
    from util.data.device_loader import DeviceLoader

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.

TOPK = 5
LISTED = ["index", "file", "error"]  # columns of the list of images beside their features


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
    add("--output", type=Path, required=True, metavar="FILE", help=".csv or .jsonl; with --features .npy")
    add("--topk", type=arguments.positive, metavar="K", help=f"likeliest classes (default: {TOPK}, or all of fewer)")
    add("--features", choices=("pooled", "tokens"), help="write features instead, float32 or all tokens in float16")
    arguments.add_block_arguments(group)
    parser.set_defaults(dist_eval=True, eval_bad="wrong")
    return parser


def check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError if flags contradict each other, or a file cannot be written or is of another kind."""
    suffixes = [".npy"] if args.features else [".csv", ".jsonl"]
    if args.output.suffix not in suffixes:
        what = "features" if args.features else "answers"
        raise UserError(f"--output {printable(args.output)}: {what} are written as {' or '.join(suffixes)}")
    for name in ("topk",) if args.features else ("block", "average_last"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is {'not for' if args.features else 'only for'} --features: leave it out")
    inputs = [beside(args.checkpoint), *(path for path in args.images if not path_of(path)[0])]
    output_file(args.output, is_features if args.features else is_answers, *inputs)
    if args.features:
        output_file(args.output.with_suffix(".csv"), is_list, *inputs)


def first_line(path: Path) -> str:
    """Return the beginning of a text file, "" if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(2**16).decode(errors="replace").partition("\n")[0]
    except OSError:
        return ""


def is_list(path: Path) -> bool:
    """Return whether a file lists the images of features."""
    return first_line(path) == ",".join(LISTED)


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


@contextmanager
def writing(path: Path, kind: type[Exception] = RunError) -> Iterator[None]:
    """Turn an error of the system into one line about `--output`."""
    try:
        yield
    except OSError as error:
        raise kind(f"--output {printable(path)} cannot be written: {error.strerror}") from error


@contextmanager
def shared(path: Path) -> Iterator[Path]:
    """Yield, on all processes, a path that replaces `path` if the block raises nothing; see `replacing`."""
    with ExitStack() as stack:
        yield on_main(lambda: stack.enter_context(replacing(path)))
        with writing(path):
            stack.close()


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


def errors_of(loader: DeviceLoader, source: Source, share: range, finite: Sequence[bool], what: str) -> dict[int, str]:
    """Return why images of a batch have no result: their number -> the reason.

    Args:
        loader: knows the broken images.
        source: names them.
        share: numbers of the images (B,).
        finite: whether the result of each is finite.
        what: the result.
    """
    broken = {i: loader.broken[i].removeprefix(f"{source.name(i)}: ") for i in share if i in loader.broken}
    return {i: f"{what} are not finite" for i, good in zip(share, finite, strict=True) if not good} | broken


def all_errors(own: dict[int, str], images: int) -> dict[int, str]:
    """Return the errors of all processes; raise RunError if no image has a result."""
    errors = {index: reason for share in gather_late(own) for index, reason in share.items()}
    if len(errors) == images:
        raise RunError(f"none of the {images} images has a result: {next(iter(errors.values()))}")
    return errors


def write_answers(
    args: argparse.Namespace, model: ARMClassifier, loader: DeviceLoader, source: Source, log: Log
) -> dict[int, str]:
    """Write the likeliest classes of each image, and return why images have none.

    Each process appends its answers to a file of its own; rank 0 merges these in the order of the images.
    """
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

    errors: dict[int, str] = {}
    with shared(args.output) as target:
        parts = [target.with_name(f"{target.name}{number}") for number in range(world_size())]
        try:
            append(args.output, parts[rank()], "")
            for share, _, (finite, best) in compute(loader, likeliest, log, "images"):
                new = errors_of(loader, source, share, finite, "logits")
                errors |= new
                lines = [
                    form.without(source.name(i), new[i]) if i in new else form.line(source.name(i), pairs)
                    for i, pairs in zip(share, best, strict=True)
                ]
                append(args.output, parts[rank()], "".join(lines))
            errors = all_errors(errors, len(source.labels))
            on_main(lambda: merge(args.output, parts, target, form.head()))
        finally:
            parts[rank()].unlink(missing_ok=True)
    return errors


def append(output: Path, part: Path, text: str) -> None:
    """Append text to a part of the output, in UTF-8; raise RunError."""
    with writing(output), part.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def merge(output: Path, parts: Sequence[Path], target: Path, head: str) -> None:
    """Write a head and then the lines of all parts in turn, as `ShareSampler` deals the images; raise RunError."""
    with writing(output), ExitStack() as stack:
        files = [stack.enter_context(part.open("rb")) for part in parts]
        file = stack.enter_context(target.open("xb"))
        file.write(head.encode())
        for lines in zip_longest(*files, fillvalue=b""):
            file.writelines(lines)


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

        def list_images() -> None:
            with writing(args.output), listed.open("x", encoding="utf-8", newline="") as file:
                file.write(csv_text([LISTED]))
                for index in range(len(source.labels)):
                    file.write(csv_text([[index, source.name(index), errors.get(index, "")]]))

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
        on_main(list_images)
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
    on_main(lambda: check_outputs(args))
    locate(args.checkpoint)
    source = open_images(args.images)

    from Evaluation.features import eval_images, load_model
    from models_arm import ARMClassifier
    from util.data.loaders import eval_loader

    model = load_model(args, device)
    loader = eval_loader(eval_images(args, source), args, device)
    if args.features:
        errors = write_features(args, model, loader, source, log)
    elif isinstance(model, ARMClassifier) and model.num_classes:
        errors = write_answers(args, model, loader, source, log)
    else:
        raise UserError(f"{args.checkpoint} comes from pretraining and has no classes: add --features pooled")
    if errors:
        files = some([source.name(index) for index in sorted(errors)])
        log.say(f"{len(errors)} of {len(source.labels)} images have no result, the column error says why: {files}")
    log.say(f"{printable(args.output)}: {len(source.labels)} images")


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
