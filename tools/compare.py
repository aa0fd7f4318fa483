"""Compare classifiers on the same images: accuracy, paired differences, agreement, time, memory and size.

    python tools/compare.py out_a/checkpoint-best.pth out_b/checkpoint-best.pth timm:resnet50 --data_path /path/to/data

A model is a checkpoint (path, URL or hf:// name), a file or folder of export.py, or `timm:` and a name of timm, whose
pretrained weights are loaded. Each prepares images in its own way. The folder --output gets a page, compare.md, the
same table as JSON and CSV, the answer of every model to every image, and a picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from Evaluation.reports import comparison
from Evaluation.tables import report_folder
from tools.model_card import machine
from util import arguments, cli
from util.data.sources.readers import open_source
from util.distributed.processes import init_device, world_size
from util.errors import UserError
from util.files import printable
from util.tracking.run_log import open_log
from util.training import precision

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.

SECONDS = 30.0  # that the measurement of a model's time may take


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("compare.py", description=__doc__.splitlines()[0])
    arguments.add_machine_arguments(parser)
    add = parser.add_argument_group("models").add_argument
    kinds = "checkpoint, exported file or folder, or timm:NAME; differences are to the first"
    add("models", type=arguments.nonempty, nargs="+", metavar="MODEL", help=kinds)
    add("--model_key", choices=("model", "model_ema"), help="weights to take of checkpoints (default: model)")
    add = parser.add_argument_group("images").add_argument
    add("--data_path", type=arguments.nonempty, required=True, metavar="PATH", help="its val/ is answered")
    resizes = "for models of this code and their exports: a square, or the shorter side"
    add("--eval_resize", choices=("square", "shorter"), default="square", help=resizes)
    add = parser.add_argument_group("report").add_argument
    add("--output", type=arguments.nonempty, default="comparison", metavar="DIR", help="folder of the report")
    add("--rounds", type=arguments.few, default=10, metavar="N", help="in which the models take turns to be timed")
    add("--no_measure", action="store_false", dest="measure", help="do not measure time and memory")
    parser.set_defaults(dist_eval=False, eval_bad="wrong")
    return parser


def labels_of(names: Sequence[str]) -> list[str]:
    """Return a short label of each name: its last part, and as many before it as tell it from the others.

    Raises:
        UserError: a name is given twice.
    """
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{printable(twice)} is given twice")
    parts = [printable(name).rstrip("/").split("/") for name in names]
    labels = []
    for own in parts:
        tails = (own[-count:] for count in range(1, len(own) + 1))
        unique = (t for t in tails if sum(other[-len(t) :] == t for other in parts) == 1)
        labels.append("/".join(next(unique, own)))
    return labels


def main(args: argparse.Namespace) -> None:
    """Answer all images with all models, measure, and write the report.

    Raises:
        UserError: a model or the images cannot be opened, do not fit together, or the report cannot be written.
        RunError: a model answers no image, or the report cannot be written.
    """
    if world_size() > 1:
        raise UserError("compare.py times models side by side, in one process: start it without torchrun")
    labels = labels_of(args.models)
    folder = report_folder(args.output, "", comparison.FILES)
    device, log = init_device(args.device, args.dist_timeout), open_log()
    precision.choose(args, device)
    source = open_source(args.data_path, "val")

    from Evaluation import cost
    from Evaluation.opened_models import answer, open_model

    settings = {"model_key": args.model_key, "scan_backend": args.scan_backend, "resize": args.eval_resize}
    models = [open_model(name, device, **settings) for name in args.models]
    for model in models:
        if not model.num_classes:
            raise UserError(f"{printable(model.name)} is no classifier: it has no classes to compare")
    answers = answer(models, source, args, log)
    costs: list[dict] = [{} for _ in models]
    if args.measure:
        log.say("time and memory are measured")
        more = {"device": str(device), "dtype": args.dtype, **settings}
        costs = cost.measure(models, args.batch_size, args.rounds, SECONDS, more)
    rows = [
        {
            "model": label,
            "name": printable(model.name),
            "kind": model.kind,
            "computed_on": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "outputs": model.num_classes,
            "parameters": model.parameters,
            "bytes": model.bytes,
            "preparation": str(model.preparation),
            **found.row(),
            **measured,
        }
        for label, model, found, measured in zip(labels, models, answers, costs, strict=True)
    ]
    known = {name: number for number, name in enumerate(sorted({name for found in answers for name in found.names}))}
    chosen = np.stack([numbered(found.answers[:, 0], [known[name] for name in found.names]) for found in answers])
    comparison.write(
        folder, source, rows, np.stack([found.right for found in answers]), chosen, [*known], args, machine(device)
    )
    log.say(comparison.lines(rows))
    log.say(f"report: {printable(folder / comparison.PAGE)}")


def numbered(outputs: np.ndarray, numbers: list[int]) -> np.ndarray:
    """Return the number of the class that each output (images,) stands for; -1 stays."""
    return np.array([*numbers, -1])[outputs.astype(np.int64)]


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
