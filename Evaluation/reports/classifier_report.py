"""Evaluate a classifier's checkpoint, and write a report: numbers as JSON and CSV, a page, pictures."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from Evaluation.features import hash_of
from Evaluation.reports.metrics import BIN_IMAGES, BINS, measure
from Evaluation.reports.report_pictures import draw_calibration, draw_classes, draw_confusions, sorted_classes
from Evaluation.tables import (
    INTERVALS,
    UNANSWERED,
    csv_text,
    escaped,
    report_folder,
    starts_with,
    table,
    wilson,
    with_interval,
)
from models_classifier import ARMClassifier
from pretrained import Checkpoint
from util import arguments, hardware
from util.checkpoints import checkpoint_file
from util.data.class_names import known_names, match_classes
from util.data.datasets import ImageDataset
from util.data.loaders import eval_loader
from util.data.sources.source import Source
from util.distributed.processes import on_main
from util.errors import RunError
from util.files import figure_of, json_with, printable, save_figure, some, write_json, write_text
from util.tracking.run_log import Log
from util.training.evaluation import Answers, describe_result, evaluate
from util.training.run_state import fingerprint

TITLE = "ARM evaluation"  # in the metadata of pictures
PAGE = "report.md"
MARK = f"<!-- {TITLE} -->\n"  # at the head of the page
FEW = 30  # classes: up to this number, the page lists all of them
LISTED = 10  # classes at each end otherwise; and frequent confusions
CLASSES = ("weights", "class", "images", "unanswered", "correct", "accuracy", "low", "high", "predictions")
CONFUSIONS = ("weights", "class", "predicted", "images")
PICTURES = {"calibration": draw_calibration, "classes": draw_classes, "confusions": draw_confusions}
EXPLAINED = f"""
- Images without an answer (broken, or with logits that are not finite) count as wrong in every accuracy. Loss, Brier
  score, calibration and confusions leave them out.
- Intervals are 95 % Wilson intervals: they treat the images as a random sample.
- Balanced accuracy: mean of the classes' accuracies. Macro F1: mean of the classes' F1, the harmonic mean of accuracy
  and precision (right among those predicted as the class). Classes without images are in neither.
- Loss: mean cross-entropy (negative log likelihood). Brier score: mean squared distance of the probabilities from the
  label's 0 and 1, summed over the classes; from 0 to 2.
- Confidence: probability of the predicted class. Expected calibration error (ECE): mean of |accuracy - confidence| over
  {BINS} bins of confidence of equal width, weighted by their images (Guo et al. 2017), or over at most as many bins of
  equal numbers of images: one for each {BIN_IMAGES} images of fewer. Images of the same confidence are in one bin.
"""


def evaluate_checkpoint(
    args: argparse.Namespace, found: Checkpoint, model: ARMClassifier, val: ImageDataset, device: torch.device, log: Log
) -> None:
    """Print the accuracy of a checkpoint's weights and of their EMA, or of `args.model_key` alone; write the report.

    Raises:
        UserError: the checkpoint does not fit the model, val has classes that it does not know, or the report cannot be
            written.
    """
    keys = [args.model_key] if args.model_key else checkpoint_file.weight_keys(found.content)
    loader = eval_loader(val, args, device)
    model.to(device)
    if args.compile:
        model.compile()
    source = val.source
    names, assumed = known_names(found.class_names, args.nb_classes, source.classes, found.name)
    for line in [assumed] * bool(assumed) + match_classes(source, names, found.name):
        log.say(line)
    pooling = "mean of the patches" if args.global_pool else "class token"
    classes, size = len(set(source.labels.tolist())), " x ".join(map(str, arguments.image_size(args)))
    about = (
        f"{len(val)} images of {classes} classes, an input of {size} ({args.eval_resize}); {args.nb_classes} outputs, "
        f"{args.directions} directions, {pooling}"
    )
    log.say(about)
    folder = report_folder(args.output, found.name, report_files(keys or ["weights"]))
    rows = {}
    for key in keys or [None]:  # a bare state dict
        Checkpoint(found.name, found.content, key).load_into(model)
        answers = Answers()
        result = evaluate(model, loader, device, log, score=answers)
        log.say(f"{key or 'weights'}: {describe_result(result)}")
        numbers = measure(answers.gathered(args.dist_eval), source.labels, args.nb_classes)
        intervals = {name: wilson(result[acc] * len(val) / 100, len(val)) for acc, name in INTERVALS.items()}
        rows[key or "weights"] = {"weights": hash_of(model), **result, **intervals, **numbers}
    content = {
        "checkpoint": printable(found.name),
        "about": about,
        "data": {"root": source.root, "images": len(val), "fingerprint": fingerprint(source)},
        "class_names": shown_names(names, source, args.nb_classes),
        "machine": hardware.describe(device),
        "results": rows,
        "args": {k: printable(v) if isinstance(v, (str, Path)) else v for k, v in vars(args).items()},
    }
    on_main(lambda: write_report(folder, content))
    log.say(f"report: {printable(folder / PAGE)}")


def shown_names(names: Sequence[str], source: Source, outputs: int) -> list[str]:
    """Return a printable name of each output: that of the checkpoint, or else of the images' class, or its number."""
    known = [*map(printable, source.classes), *[""] * outputs]
    return [name or known[label] or str(label) for label, name in enumerate(names)]


def report_files(keys: Sequence[str]) -> dict[str, Callable[[Path], bool]]:
    """Return the files of a report, and what tells that one in its place is of an earlier report."""
    return {
        PAGE: starts_with(MARK),
        "report.json": json_with(checkpoint=str, results=dict, class_names=list, args=dict),
        "classes.csv": starts_with(csv_text([CLASSES])),
        "confusions.csv": starts_with(csv_text([CONFUSIONS])),
        **{f"{name}-{key}.png": figure_of(TITLE) for name in PICTURES for key in keys},
    }


def write_report(folder: Path, content: dict) -> None:
    """Write the files of a report, numbers first, and remove pictures of weights that it does not have.

    Args:
        folder: see `report_folder`.
        content: of the JSON file.

    Raises:
        RunError: a file cannot be written.
    """
    names, rows = content["class_names"], content["results"]
    try:
        write_json(folder / "report.json", content)
        write_text(folder / "classes.csv", csv_text([CLASSES, *class_rows(names, rows)]))
        write_text(folder / "confusions.csv", csv_text([CONFUSIONS, *confusion_rows(names, rows)]))
        for name, draw in PICTURES.items():
            for key, row in rows.items():
                save_figure(draw(row, names), folder / f"{name}-{key}.png", TITLE, dpi=120)
            for old in folder.glob(f"{name}-*.png"):
                if old.stem.removeprefix(f"{name}-") not in rows and figure_of(TITLE)(old):
                    old.unlink()
        write_text(folder / PAGE, page(content))
    except OSError as error:
        raise RunError(f"{printable(folder)} cannot be written: {error.strerror}") from error


def class_rows(names: list[str], rows: dict[str, dict]) -> Iterator[Sequence]:
    """Yield the rows of classes.csv: every class for all weights."""
    for key, row in rows.items():
        yield from zip([key] * len(names), names, *(row["classes"][column] for column in CLASSES[2:]), strict=True)


def confusion_rows(names: list[str], rows: dict[str, dict]) -> Iterator[Sequence]:
    """Yield the rows of confusions.csv: the numbers of the confusion matrix that are not 0, right answers too.

    Images without an answer have no predicted class.
    """
    for key, row in rows.items():
        for label, name in enumerate(names):
            if correct := row["classes"]["correct"][label]:
                yield key, name, name, correct
            if unanswered := row["classes"]["unanswered"][label]:
                yield key, name, "", unanswered
        for label, predicted, times in row["confusions"]:
            yield key, names[label], names[predicted], times


def page(content: dict) -> str:
    """Return the page, in Markdown."""
    names, rows, machine = content["class_names"], content["results"], content["machine"]
    images = next(iter(rows.values()))["classes"]["images"]
    without = [names[label] for label, count in enumerate(images) if not count]
    lines = [
        f"# Evaluation of {escaped(content['checkpoint'])}",
        f"{escaped(content['about'])}. The images are those of {escaped(content['data']['root'])}.",
        table(["measure", *map(escaped, rows)], *headline(rows, len(names))),
    ]
    if without:
        of = f"Without images, and so without accuracy, are {len(without)} of {len(names)} classes"
        lines.append(f"{of}: {escaped(some(without, LISTED))}.")
    lines.append("All numbers: [JSON](report.json), [classes](classes.csv), [confusions](confusions.csv).")
    for key, row in rows.items():
        lines += [f"## {title}" for title in [escaped(key)] if len(rows) > 1]
        lines += ["### Calibration", f"![reliability diagram](calibration-{key}.png)"]
        lines += ["### Classes", f"![accuracy of the classes](classes-{key}.png)", *class_tables(names, row)]
        lines += ["### Confusions", f"![confusion matrix](confusions-{key}.png)", confusion_table(names, row)]
    lines += ["## How the numbers are computed", EXPLAINED.strip(), "## Run"]
    facts = {**machine, "fingerprint of the images": content["data"]["fingerprint"]}
    facts |= {f"SHA-256 of {key}": row["weights"] for key, row in rows.items()}
    lines.append(table(["what", "value"], *([name, escaped(str(value))] for name, value in facts.items())))
    return MARK + "\n\n".join(lines) + "\n"


def headline(rows: dict[str, dict], classes: int) -> list[list[str]]:
    """Return rows of a table: the numbers of all weights."""

    def cells(name: str, text: Callable[[dict], str]) -> list[str]:
        return [name, *map(text, rows.values())]

    found = [
        cells("top-1 (95 %)", with_interval),
        cells("top-5 (95 %)", lambda row: with_interval(row, "acc5")),
        cells("balanced accuracy", lambda row: f"{row['balanced_accuracy']:.2f} %"),
        cells("macro F1", lambda row: f"{row['macro_f1']:.2f} %"),
        cells("loss", lambda row: f"{row['nll']:.4f}"),
        cells("Brier score", lambda row: f"{row['brier']:.4f}"),
        cells("mean confidence", lambda row: f"{row['confidence']:.2f} %"),
        cells("calibration error (ECE)", lambda row: f"{row['ece']:.2f} %"),
        cells("ECE, bins of equal numbers", lambda row: f"{row['ece_equal_mass']:.2f} %"),
        cells("images", lambda row: str(row["images"])),
    ]
    for kind, words in UNANSWERED.items():
        if any(kind in row for row in rows.values()):
            found.append([words, *(str(row.get(kind, 0)) for row in rows.values())])
    return found if classes > 5 else [row for row in found if not row[0].startswith("top-5")]


def class_tables(names: list[str], row: dict) -> list[str]:
    """Return the table of all classes with images, or of the worst and of the best ones."""
    order, columns = sorted_classes(row), row["classes"]
    taken: dict[int, tuple[int, int]] = {}
    for label, predicted, times in row["confusions"]:
        taken.setdefault(label, (predicted, times))

    def cells(label: int) -> list:
        images, correct, predictions = (columns[name][label] for name in ("images", "correct", "predictions"))
        interval = columns["low"][label], columns["high"][label]
        precision = f"{100 * correct / predictions:.1f} %" if predictions else "never predicted"
        most = f"{escaped(names[taken[label][0]])} ({taken[label][1]})" if label in taken else ""
        accuracy = with_interval({"acc1": columns["accuracy"][label], "interval": interval}, digits=1)
        f1 = 200 * correct / (images + predictions)
        return [escaped(names[label]), accuracy, images, precision, f"{f1:.1f} %", most]

    head = ["class", "accuracy (95 %)", "images", "precision", "F1", "most often taken for (images)"]
    if len(order) <= FEW:
        return [table(head, *map(cells, order))]
    worst, best = order[:LISTED], order[: -LISTED - 1 : -1]
    return ["The worst:", table(head, *map(cells, worst)), "The best:", table(head, *map(cells, best))]


def confusion_table(names: list[str], row: dict) -> str:
    """Return the table of the most frequent confusions, or a sentence."""
    if not row["confusions"]:
        return "No image was taken for another class."
    images = row["classes"]["images"]
    found = (
        [escaped(names[label]), escaped(names[predicted]), times, f"{100 * times / images[label]:.1f} %"]
        for label, predicted, times in row["confusions"][:LISTED]
    )
    return table(["class", "taken for", "images", "of the class"], *found)
