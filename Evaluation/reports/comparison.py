"""The report of tools/compare.py: a page with a table and a picture, JSON and CSV, and every model's answers."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from Evaluation.reports.paired import Pair, pair
from Evaluation.reports.report_pictures import label_of
from Evaluation.tables import csv_text, escaped, starts_with, table, with_interval
from util.data.sources.source import Source
from util.errors import RunError
from util.files import figure_of, json_with, printable, save_figure, some, write_json, write_text
from util.training.run_state import fingerprint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "ARM comparison"  # in the metadata of the picture
PAGE = "compare.md"
MARK = f"<!-- {TITLE} -->\n"  # at the head of the page
COLUMNS: dict[str, str | tuple] = {  # of the CSV file, and where each is in a row
    "model": "model", "name": "name", "kind": "kind", "acc1": "acc1", "acc1_low": ("interval", 0),
    "acc1_high": ("interval", 1), "acc5": "acc5", "acc5_low": ("interval5", 0), "acc5_high": ("interval5", 1),
    "loss": "loss", "images": "images", "unanswered": "unanswered", "difference": ("pair", "difference"),
    "difference_low": ("pair", "interval", 0), "difference_high": ("pair", "interval", 1), "mcnemar_p": ("pair", "p"),
    "agreement": ("pair", "agreement"), "kappa": ("pair", "kappa"), "batch": "batch",
    "images_per_second": ("images_per_second", "median"), "images_per_second_least": ("images_per_second", "least"),
    "images_per_second_most": ("images_per_second", "most"), "latency_ms": ("latency_ms", "median"),
    "latency_ms_least": ("latency_ms", "least"), "latency_ms_most": ("latency_ms", "most"),
    "memory_mb": ("memory_mb", "1"), "memory_mb_batch": ("memory_mb", "batch"), "parameters": "parameters",
    "bytes": "bytes", "computed_on": "computed_on", "dtype": "dtype", "outputs": "outputs",
    "preparation": "preparation",
}  # fmt: skip
FILES = {
    PAGE: starts_with(MARK),
    "compare.json": json_with(models=list, pairs=list, args=dict),
    "compare.csv": starts_with(csv_text([[*COLUMNS]])),
    "answers.csv": starts_with("image,class,"),
    "compare.png": figure_of(TITLE),
}
SHOWN = 5  # images without an answer that the page names
EXPLAINED = """
- Images without an answer (broken, or with logits that are not finite) count as wrong.
- Intervals of an accuracy are 95 % Wilson intervals. They treat the images as a random sample, and each model alone:
  whether one model is better than another is told by the difference on the same images.
- Difference: top-1 less that of the first model, in percentage points, with the 95 % interval of Bonett and Price 2012
  for paired proportions. p is that of McNemar's exact test. With several models, some p are small by chance.
- Agreement: share of the images that get the same class, right or wrong, of those that both models answer. Kappa is
  Cohen's: the same beyond what chance gives.
- Time: median of the rounds, least and most in brackets; all models take turns in every round. Images are noise on the
  device, so decoding and resizing are not in it.
- Memory: peak of a new process while it computes one image, and a batch, without Python and its libraries; on a GPU
  what torch allocates there.
"""


def write(
    folder: Path, source: Source, rows: list[dict], right: np.ndarray, chosen: np.ndarray, names: list[str],
    args: argparse.Namespace, machine: dict,
) -> None:  # fmt: skip
    """Write the files of the report, numbers first. `pair` of each row but the first is set to that with the first.

    Args:
        folder: see `report_folder`.
        source: the images.
        rows: of the models.
        right: (models, images) bool.
        chosen: (models, images) int64, places in `names`, -1 for no answer.
        names: of all classes that a model can name.
        args: of the script.
        machine: facts of it.

    Raises:
        RunError: a file cannot be written.
    """
    both = combinations(range(len(rows)), 2)
    pairs = [(a, b, pair((right[a], right[b]), (chosen[a], chosen[b]))) for a, b in both]
    for a, b, found in pairs:
        if a == 0:
            rows[b]["pair"] = found._asdict()
    content = {
        "data": {"root": printable(source.root), "images": len(source.labels), "fingerprint": fingerprint(source)},
        "machine": machine,
        "models": rows,
        "pairs": [{"first": rows[a]["model"], "second": rows[b]["model"], **found._asdict()} for a, b, found in pairs],
        "args": {k: printable(v) if isinstance(v, (str, Path)) else v for k, v in vars(args).items()},
    }
    try:
        write_json(folder / "compare.json", content)
        write_text(
            folder / "compare.csv",
            csv_text([[*COLUMNS], *([value(row, at) for at in COLUMNS.values()] for row in rows)]),
        )
        write_text(folder / "answers.csv", csv_text(answer_rows(source, rows, chosen, names)))
        save_figure(draw(rows), folder / "compare.png", TITLE, dpi=120)
        without = [[source.name(place) for place in np.flatnonzero(own < 0).tolist()] for own in chosen]
        write_text(folder / PAGE, page(content, pairs, without))
    except OSError as error:
        raise RunError(f"{printable(folder)} cannot be written: {error.strerror}") from error


def value(row: dict, at: str | tuple) -> object:
    """Return an entry of a row, which may lie deeper; None if there is none."""
    found: object = row
    for key in (at,) if isinstance(at, str) else at:
        if found is not None:
            key = str(row["batch"]) if key == "batch" and found is not row else key  # of the memory of a batch
            found = found.get(key) if isinstance(found, dict) else found[key]  # type: ignore[index]  # an interval
    return found


def answer_rows(source: Source, rows: list[dict], chosen: np.ndarray, names: list[str]) -> Iterator[Sequence]:
    """Yield the rows of answers.csv: image, its class, and the class that each model names, "" for no answer."""
    yield "image", "class", *(row["model"] for row in rows)
    known = [*names, ""]
    classes = [printable(name) or str(number) for number, name in enumerate(source.classes)]
    for place, label in enumerate(source.labels.tolist()):
        own = classes[label] if label < len(classes) else label
        yield source.name(place), own, *(known[number] for number in chosen[:, place])


def spread(row: dict, name: str) -> str:
    """Return a median with the least and the most, or a dash."""
    if name not in row:
        return "–"
    median, least, most = (
        f"{row[name][key]:,.{1 if row[name]['median'] < 100 else 0}f}" for key in ("median", "least", "most")
    )
    return f"{median} ({least} to {most})"


def difference(row: dict) -> str:
    """Return the difference to the first model with its interval, or a dash for the first."""
    if "pair" not in row:
        return "–"
    low, high = row["pair"]["interval"]
    return f"{row['pair']['difference']:+.2f} ({low:+.2f} to {high:+.2f})"


def p_value(row: dict) -> str:
    """Return the p of the test against the first model, or a dash for the first."""
    if "pair" not in row:
        return "–"
    p = row["pair"]["p"]
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def lines(rows: list[dict]) -> str:
    """Return the table of accuracy and cost, in Markdown."""
    head = ["model", "top-1", "top-5", "less the first (points)", "p", "agreement", "images/s", "ms for one image"]
    head += ["parameters (M)", "file (MB)", "memory (MB)"]
    body = []
    for row in rows:
        memory = " / ".join(f"{megabytes:.0f}" for megabytes in row.get("memory_mb", {}).values()) or "–"
        body.append(
            [
                escaped(row["model"]),
                with_interval(row),
                f"{row['acc5']:.2f} %",
                difference(row),
                p_value(row),
                f"{row['pair']['agreement']:.2f} %" if "pair" in row else "–",
                spread(row, "images_per_second"),
                spread(row, "latency_ms"),
                "–" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f}",
                "–" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}",
                memory,
            ]
        )
    return table(head, *body)


def page(content: dict, pairs: list, without: list[list[str]]) -> str:
    """Return the page, in Markdown."""
    rows, data = content["models"], content["data"]
    parts = [
        f"# {len(rows)} classifiers on the same images",
        f"{data['images']} images of {escaped(data['root'])}. Differences are to {escaped(rows[0]['model'])}.",
        lines(rows),
        "![accuracy against throughput](compare.png)",
        "All numbers: [JSON](compare.json), [table](compare.csv), [answers to every image](answers.csv).",
        "## Images and models",
        table(
            ["model", "opened from", "kind", "computes", "images are"],
            *[
                [
                    escaped(row["model"]),
                    escaped(row["name"]),
                    row["kind"],
                    f"{row['dtype']} on {row['computed_on']}",
                    escaped(row["preparation"]),
                ]
                for row in rows
            ],
        ),
    ]
    parts += [f"{escaped(row['model'])}: {line}." for row in rows for line in unmeasured(row)]
    for row, missing in zip(rows, without, strict=True):
        if missing:
            parts.append(
                f"No answer of {escaped(row['model'])} to {len(missing)} images: {escaped(some(missing, SHOWN))}."
            )
    if not any(without):
        parts.append("All models answer all images.")
    if pairs:
        parts += ["## Pairs", table(["", *(escaped(row["model"]) for row in rows)], *agreements(rows, pairs))]
        alone = "images that only the model of the row, and only that of the column, answers right"
        parts.append(f"Above the diagonal: agreement (kappa). Below it: {alone}.")
    parts += ["## How the numbers are computed", EXPLAINED.strip(), "## Machine"]
    facts = {**content["machine"], "fingerprint of the images": data["fingerprint"]}
    parts.append(table(["what", "value"], *([name, escaped(str(fact))] for name, fact in facts.items())))
    return MARK + "\n\n".join(parts) + "\n"


def unmeasured(row: dict) -> Iterator[str]:
    """Yield a line for each cost of a model that was not measured."""
    if "latency_ms" not in row:
        yield "time and memory were not measured (`--no_measure`)"
    elif "memory_reason" in row:
        yield f"memory was not measured: {escaped(row['memory_reason'])}"


def agreements(rows: list[dict], pairs: list[tuple[int, int, Pair]]) -> list[list[str]]:
    """Return the matrix of pairs: agreement and kappa above the diagonal, images that one alone has right below it."""
    cells = [[escaped(row["model"]), *["–"] * len(rows)] for row in rows]
    for a, b, found in pairs:
        kappa = "–" if found.kappa is None else f"{round(found.kappa, 3) + 0:.3f}"  # without the sign of -0.000
        cells[a][b + 1] = f"{found.agreement:.2f} % ({kappa})"
        cells[b][a + 1] = f"{found.only_second}, {found.only_first}"
    return cells


def draw(rows: list[dict]) -> "Figure":
    """Draw accuracy over throughput, areas by parameters, beside the differences to the first model.

    Without throughput, the accuracy of each model stands alone.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    timed = all("images_per_second" in row for row in rows)
    colours = [colormaps["tab10"](number % 10) for number in range(len(rows))]
    names = [label_of([row["model"]], 0) for row in rows]
    figure = Figure(figsize=(10, max(3.4, 1.6 + 0.32 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    largest = max([row["parameters"] or 0 for row in rows]) or 1
    for row, colour, place in zip(rows, colours, range(len(rows)), strict=True):
        low, high = row["interval"]
        x = row["images_per_second"]["median"] if timed else place
        area = 30 + 270 * (row["parameters"] or 0) / largest
        left.vlines(x, low, high, color=colour, linewidth=2, alpha=0.6)
        if timed:
            left.hlines(
                row["acc1"],
                row["images_per_second"]["least"],
                row["images_per_second"]["most"],
                color=colour,
                linewidth=1,
                alpha=0.6,
            )
        left.scatter(x, row["acc1"], s=area, color=colour, alpha=0.75, linewidths=0)
    left.set_ylabel("top-1 (%), 95 % interval")
    if timed:
        left.set_xscale("log")
        left.set_xlabel(f"images/s, batches of {rows[0]['batch']}; median, least and most")
    else:
        left.set_xticks(range(len(rows)), names, rotation=30, ha="right", fontsize=8, parse_math=False)
    left.set_title("area: number of parameters", fontsize=10)
    places = range(len(rows))
    right.axvline(0, color="0.4", linestyle="--", linewidth=1)
    for row, colour, place in zip(rows, colours, places, strict=True):
        low, high = row["pair"]["interval"] if "pair" in row else (0, 0)
        right.hlines(place, low, high, color=colour, linewidth=2.5, alpha=0.6)
        right.plot(row["pair"]["difference"] if "pair" in row else 0, place, "o", color=colour, markersize=6)
    right.set_yticks(places, names, fontsize=8, parse_math=False)
    right.set(ylim=(len(rows) - 0.5, -0.5), xlabel="top-1 less that of the first (points), 95 % interval")
    right.yaxis.tick_right()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure
