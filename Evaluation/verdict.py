"""Measure all published weights of a place, and compare them with the paper's figures.

    python Evaluation/verdict.py hf://OliverRen/ARM --data_path /path/to/ImageNet --output_dir verdict

evaluates each classifier and probes each encoder of pretraining, and writes verdict.md, verdict.json and verdict.csv.
Each measurement is kept in a file as soon as it is done: the same command continues a run that was killed or stopped.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from Evaluation import probe, robustness
from Evaluation.probes import PROBES
from Evaluation.reports.verdict_files import UNREADABLE, describe, listed
from Evaluation.reports.verdict_page import COLUMNS, MARK, PAGE, RESULT, ROWS, best_at_own_size, csv_of, how, page
from Evaluation.tables import accuracy, csv_text, starts_with
from util import arguments, cli, hardware, launch
from util.data.class_names import known_names, match_classes
from util.data.sources.readers import open_source
from util.data.sources.source import NoSplit, Source, hash_states
from util.distributed.processes import check_one_machine, init_device, on_main
from util.distributed.signals import SIGNALS
from util.errors import Interrupted, RunError, UserError, as_user_error
from util.files import json_with, output_file, printable, read_json, to_json, write_json, write_text
from util.seeding import seed_everything
from util.tracking.run_log import Log, open_log
from util.training import precision
from util.training.evaluation import describe_result, evaluate
from util.training.run_state import fingerprint

if TYPE_CHECKING:
    from pretrained import Checkpoint

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.

ENCODERS = ("pretraining", "image-text training")  # without a head: probes measure them
MEASUREMENTS = "measurements"  # folder of the results that are done, below --output_dir
MOST = 8  # evaluations of a classifier on the images of val


class Measurement(NamedTuple):
    """A number to measure.

    Attributes:
        row: of the result, without the numbers: file, measure, weights, input size and resize.
        key: hash of all that changes the numbers.
        run: returns the numbers.
    """

    row: dict
    key: str
    run: Callable[[], dict]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("verdict.py", description=__doc__.splitlines()[0])
    arguments.add_machine_arguments(parser)
    add = parser.add_argument_group("weights").add_argument
    add(
        "weights",
        type=arguments.nonempty,
        nargs="?",
        default="hf://OliverRen/ARM",
        metavar="WEIGHTS",
        help="hf://OWNER/REPO, hf://OWNER/REPO@REVISION, or a folder of checkpoints (default: %(default)s)",
    )
    add = parser.add_argument_group("images").add_argument
    add(
        "--data_path",
        type=arguments.nonempty,
        required=True,
        metavar="PATH",
        help="ImageNet, or other images with train and val; train is for the probes",
    )
    add(
        "--robustness",
        type=robustness.named_path,
        nargs="+",
        default=[],
        metavar="SET=FOLDER",
        help="also measure classifiers on these sets; see --data of robustness.py",
    )
    arguments.add_eval_loader(add)
    arguments.add_eval_bad(add)
    add = parser.add_argument_group("measurements").add_argument
    add("--output_dir", type=arguments.nonempty, default="verdict", help="folder of the table and the measurements")
    add(
        "--sizes",
        type=arguments.pixels,
        nargs="*",
        default=[224, 384],
        metavar="PX",
        help="sides of the input, beside the size of the file (default: 224 384)",
    )
    add(
        "--resizes",
        choices=arguments.RESIZES,
        nargs="+",
        default=[*arguments.RESIZES],
        help="how images are resized (default: both)",
    )
    add(
        "--probe",
        choices=("none", *PROBES),
        nargs="+",
        default=["knn", "linear"],
        help="of encoders of pretraining; none leaves them out (default: knn linear)",
    )
    parser.set_defaults(dist_eval=True)
    return parser


class Plan:
    """The measurements of each file, for images and arguments.

    Args:
        args: of this script.
        sources: images of `val`, and of `train` if there are any.
        device: computes.
        log: of this rank.
    """

    def __init__(self, args: argparse.Namespace, sources: dict[str, Source], device: torch.device, log: Log) -> None:
        self.args, self.sources, self.device, self.log = args, sources, device, log
        self.data = {name: [fingerprint(source), on_main(source.state)] for name, source in sources.items()}
        self.states: dict[Path, str] = {}
        self.said: set[str] = set()

    def say(self, line: str) -> None:
        """Show a line, if it has not been shown before."""
        if line and line not in self.said:
            self.said.add(line)
            self.log.say(line)

    def of(self, file: dict, found: dict[str | None, Checkpoint]) -> Iterator[Measurement]:
        """Yield the measurements of a file, and add lines on what is left out to its `left_out`."""
        if file["kind"] in ENCODERS:
            yield from self.probes(file, next(iter(found.values())))
        elif file["kind"] != "classification":
            file["left_out"] += [] if file["problem"] else [f"a model of {file['kind']} is not measured here"]
        else:
            yield from self.accuracies(file, found)

    def accuracies(self, file: dict, found: dict[str | None, Checkpoint]) -> Iterator[Measurement]:
        """Yield those of a classifier: its own size first, and the released code's resize before the other."""
        own, patch = tuple(file["input_size"]), file["patch_size"]
        sizes = dict.fromkeys([own, *((side, side) for side in self.args.sizes)])
        whole = [size for size in sizes if not any(side % patch for side in size)]
        for size in sizes.keys() - whole:
            file["left_out"].append(f"{size[0]} x {size[1]} pixels do not divide into patches of {patch}")
        if len(found) < 2:
            file["left_out"].append(f"there is one set of weights, {next(iter(found)) or 'a bare state dict'}")
        resizes = [*dict.fromkeys(self.args.resizes)]
        ways = [(own, resize) for resize in resizes]
        ways += [(size, resize) for resize in resizes for size in whole if size != own]
        ways, more = ways[: MOST // len(found)], ways[MOST // len(found) :]
        if more:
            named = ", ".join(f"{' x '.join(map(str, size))} {resize}" for size, resize in more)
            file["left_out"].append(f"beyond {MOST} evaluations of a file: {named}")
        rows = []
        for size, resize in ways:
            for checkpoint in found.values():
                planned = self.measurement(file, checkpoint, "accuracy", size, resize, self.data["val"], self.accuracy)
                rows.append(planned.row)
                yield planned
        if not self.args.robustness:
            file["left_out"].append("robustness: --robustness names no sets")
        elif (best := best_at_own_size(file, rows)) is None:
            file["left_out"].append("robustness: the accuracy at its own size failed")
        else:
            for name, path in self.args.robustness:
                run = self.robustness(name, path)
                measure, resize = f"robustness {name}", best["resize"]
                yield self.measurement(file, found[best["weights"]], measure, own, resize, self.state(path), run)

    def state(self, path: Path) -> str:
        """Return a hash of names, sizes and times of the files of a robustness set."""
        if path not in self.states:
            self.states[path] = on_main(lambda: files_state(path))
        return self.states[path]

    def probes(self, file: dict, checkpoint: Checkpoint) -> Iterator[Measurement]:
        """Yield those of an encoder."""
        if "none" in self.args.probe:
            file["left_out"].append("probes: --probe none")
        elif "train" not in self.sources:
            file["left_out"].append(f"probes: {printable(self.args.data_path)} has no train")
        else:
            for name in dict.fromkeys(self.args.probe):
                size, resize = tuple(file["input_size"]), self.args.resizes[0]
                yield self.measurement(file, checkpoint, f"probe {name}", size, resize, self.data, self.probe(name))

    def measurement(
        self, file: dict, checkpoint: Checkpoint, measure: str, size: tuple[int, ...], resize: str, data: object,
        run: Callable[[argparse.Namespace, Checkpoint], dict],
    ) -> Measurement:  # fmt: skip
        """Return a measurement with its key."""
        row = {"file": file["file"], "measure": measure, "weights": checkpoint.key, "size": [*size], "resize": resize}
        about = {name: row[name] for name in ("measure", "weights", "size", "resize")} | {
            "sha256": file["sha256"], "data": data,
            **{name: getattr(self.args, name) for name in ("eval_loader", "eval_bad", "dtype")},
        }  # fmt: skip
        key = hashlib.sha256(to_json(about).encode()).hexdigest()[:32]
        values = {"checkpoint": checkpoint.name, "model_key": checkpoint.key, "ignore_keys": [],
            "input_size": [*size], "eval_resize": resize}  # fmt: skip
        args = argparse.Namespace(**{**vars(self.args), **values})
        return Measurement(row, key, lambda: run(args, checkpoint))

    def accuracy(self, args: argparse.Namespace, checkpoint: Checkpoint) -> dict:
        """Return the accuracy on the images of `val`."""
        from Evaluation.features import eval_images, load_model, read_checkpoint
        from util.data.loaders import eval_loader

        source = copy.copy(self.sources["val"])
        found = read_checkpoint(args, self.device, checkpoint)
        model = load_model(args, self.device, found, encoder=False)
        names, assumed = known_names(args.class_names, found.sizes["num_classes"], source.classes, found.name)
        for line in [assumed, *match_classes(source, names, found.name)]:
            self.say(line)
        loader = eval_loader(eval_images(args, source), args, self.device)
        result = evaluate(model, loader, self.device, self.log)
        self.log.say(describe_result(result))
        correct, correct5 = (result[name] * result["images"] / 100 for name in ("acc1", "acc5"))
        # the paper's figures are of ImageNet's classes, all of them
        imagenet = len(names) == 1000 and {*names} == {*source.classes} and len({*source.labels.tolist()}) == 1000
        imagenet = imagenet and {*names} == {*robustness.timm_list("imagenet_synsets.txt")}
        return result | accuracy(correct, correct5, int(result["images"])) | {"imagenet": imagenet}

    def robustness(self, name: str, path: Path) -> Callable[[argparse.Namespace, Checkpoint], dict]:
        """Return what measures on a set of robustness.py."""

        def run(args: argparse.Namespace, checkpoint: Checkpoint) -> dict:
            from Evaluation.features import load_model, read_checkpoint

            args.data = [(name, path)]
            model: Any = load_model(args, self.device, read_checkpoint(args, self.device, checkpoint), encoder=False)
            synsets = robustness.timm_list("imagenet_synsets.txt")
            names, imagenet = robustness.sorted_classes(args, model, synsets, self.log)
            parts = robustness.open_sets(args.data, names, imagenet, self.log)[name]
            return robustness.measure(args, model, name, parts, imagenet, self.device, self.log)

        return run

    def probe(self, name: str) -> Callable[[argparse.Namespace, Checkpoint], dict]:
        """Return what trains and evaluates a probe, with the defaults of probe.py."""

        def run(args: argparse.Namespace, checkpoint: Checkpoint) -> dict:
            from Evaluation.features import load_model, read_checkpoint

            defaults = vars(probe.get_args_parser().parse_args([args.checkpoint, "--data_path", args.data_path]))
            args = argparse.Namespace(**{**defaults, **vars(args), "probe": [name]})
            args.cache = str(Path(args.output_dir) / "features")
            seed_everything(args.seed)
            model = load_model(args, self.device, read_checkpoint(args, self.device, checkpoint))
            sources = {split: copy.copy(self.sources[split]) for split in ("train", "val")}
            return probe.measure(args, model, sources, self.device, self.log)

        return run


def files_state(path: Path) -> str:
    """Return a hash of the names, sizes and times of all files below a folder."""
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return hash_states([os.fsencode(path) for path in paths])


def stored(path: Path) -> dict | None:
    """Return the earlier result in a file; None if there is none, or it is damaged."""
    if not json_with(result=dict, machine=dict)(path):
        return None
    content = read_json(path)
    assert isinstance(content, dict)
    return content


def main(args: argparse.Namespace) -> None:
    """Measure what is not yet measured, and write the table after each measurement.

    Raises:
        UserError: arguments, weights or images do not fit; nothing has been measured then.
        RunError: a file could not be read or measured; the table says which.
        Interrupted: the run was asked to stop; the same command continues.
    """
    check_one_machine()
    device, log = init_device(args.device, args.dist_timeout), open_log()
    precision.choose(args, device)
    folder = Path(args.output_dir)
    on_main(lambda: check_output(folder))
    if len(dict(args.robustness)) < len(args.robustness):
        raise UserError("--robustness names a set twice")
    for name, path in args.robustness:
        if not path.is_dir():
            raise UserError(f"--robustness {name}={printable(path)}: no such folder")
    sources, left_out = {"val": open_source(args.data_path, "val")}, []
    if "none" not in args.probe:
        try:
            sources["train"] = open_source(args.data_path, "train")
        except NoSplit as error:
            left_out.append(f"probes: {error}")
    revision, names, others = on_main(lambda: listed(args.weights))
    plan = Plan(args, sources, device, log)
    content: dict[str, Any] = {
        "weights": printable(args.weights), "revision": revision, "files": [], "others": others, "measurements": [],
        "left_out": left_out, "waiting": [*names],
        "data": {"root": printable(sources["val"].root), "images": len(sources["val"].labels),
            "classes": len(sources["val"].classes), "fingerprint": fingerprint(sources["val"])},
        "run": {"commit of this code": launch.commit() or "unknown", "timm": metadata.version("timm"),
            "activations": args.dtype, "decoder": args.eval_loader, "broken images": args.eval_bad},
    }  # fmt: skip
    before = on_main(lambda: len([*(folder / MEASUREMENTS).glob("*.json")]))
    log.say(
        f"{content['weights']}: {len(names)} files of weights, {len(others)} others; "
        f"{before} measurements of earlier runs are in {printable(folder / MEASUREMENTS)}"
    )
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    try:
        for name, opened in names.items():
            measure_file(plan, content, name, opened)
            content["waiting"].remove(name)
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped; the same command continues: {printable(folder)} has what is done") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    on_main(lambda: write(folder, content))
    rows = content["measurements"]
    bad = [file for file in content["files"] if file["kind"] == UNREADABLE] + [row for row in rows if "failed" in row]
    log.say(f"{printable(folder / PAGE)}: {sum('result' in row for row in rows)} of {len(rows)} measurements")
    if bad:
        raise RunError(f"{len(bad)} files or measurements failed: {printable(folder / PAGE)} names them")


def check_output(folder: Path) -> None:
    """Raise UserError if the files of a table cannot be written into a folder, or others are in their place."""
    ours = {PAGE: starts_with(MARK), RESULT: json_with(weights=str, files=list, measurements=list),
        ROWS: starts_with(csv_text([COLUMNS]))}  # fmt: skip
    for name, is_ours in ours.items():
        output_file(folder / name, is_ours, flag="--output_dir")
    with as_user_error(OSError, prefix="--output_dir: "):
        (folder / MEASUREMENTS).mkdir(exist_ok=True)


def measure_file(plan: Plan, content: dict, name: str, opened: str) -> None:
    """Measure a file as planned, or take earlier results; add it and its rows to the content of the table.

    Args:
        plan: of all files.
        content: of the table.
        name: of the file in it.
        opened: path or hf:// name.
    """
    folder, log = Path(plan.args.output_dir), plan.log
    file, found = describe(name, opened)
    log.say(f"{file['file']}: {file['problem'] and file['kind'] + ': '}{file['problem'] or file['what']}")
    content["files"].append(file)
    for row, key, run in plan.of(file, found):
        content["measurements"].append(row)
        path, words = folder / MEASUREMENTS / f"{key}.json", f"{file['file']}: {row['measure']} with {how(row)}"
        if earlier := on_main(partial(stored, path)):
            row.update({name: earlier[name] for name in ("result", "machine")})
            log.say(f"{words}: measured before")
            continue
        log.say(words)
        try:
            result = run()
        except (UserError, RunError, torch.OutOfMemoryError) as error:
            row["failed"] = printable(str(error)).replace(opened, file["file"])
            log.say(f"failed: {row['failed']}")
            continue
        row.update(result=result, machine=hardware.describe(plan.device))
        on_main(partial(write_json, path, row))
        on_main(lambda: write(folder, content))
    on_main(lambda: write(folder, content))


def write(folder: Path, content: dict) -> None:
    """Write the table as JSON, CSV and Markdown; raise RunError if that fails."""
    try:
        write_json(folder / RESULT, content)
        write_text(folder / ROWS, csv_of(content))
        write_text(folder / PAGE, page(content))
    except OSError as error:
        raise RunError(f"--output_dir {printable(folder)} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
