"""The table of gpu_check.py: what each part measured, what was predicted, and what is decided.

"adopt" stands for an entry of `FASTER` in ops/measured.py.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from util.errors import UserError
from util.files import read_json


class Row(NamedTuple):
    """A row of the table; `entry` is the key of `FASTER` to add if the decision is "adopt"."""

    figure: str
    measured: str
    prediction: str
    decision: str
    entry: str = ""


ADOPT, KEEP, LOOK, NOT = "adopt", "keep", "look", "not measured"

# Limits in microseconds for the backward pass of the scan in CUDA C++, in ARM-base's pretraining on an H200.
SCAN_ADOPT, SCAN_LOOK = 450, 650
# Predictions for the scan's sizes, in bench_scan.py's order, on an H200: counted for "cuda", measured for "triton".
SCANS = {
    "pretraining": "cuda at least 102 + 253, below 450 backward; triton 237 + 837",
    "finetuning": "cuda at least 320 + 790; triton 714 + 2543",
    "pretraining, huge": "triton 238 + 825",
}
# Microseconds that each operator should save in a block: a twelfth of the saving in a step.
SAVED = {
    ("swiglu", "pretraining"): 158, ("swiglu", "finetuning"): 125,
    ("norm", "pretraining"): 108, ("norm", "finetuning"): 83,
    ("conv", "pretraining"): 54, ("conv", "finetuning"): 200,
    ("projections", "pretraining"): 92, ("projections", "finetuning"): 92,
}  # fmt: skip
# Images a second with every switch on, (least, aim), and estimates for larger models.
GOALS = {"pretrain_base": (4860, 5100), "finetune_base": (2440, 2800)}
BEFORE = {"pretrain_base": 3672, "finetune_base": 1525}  # without any switch, measured on an H200
ESTIMATES = {"pretrain_large": 1750, "pretrain_huge": 930}
MARGIN = 1.0  # milliseconds by which a step with CUDA graphs may be longer than the GPU is busy
# Milliseconds that a switch alone should save in a step, in pretraining and in finetuning.
GAINS = {
    "cuda_graph": ("4 to 17", "4 to 6"), "cuda": ("6.9", "20.6"), "swiglu": ("1.9", "1.5"), "norm": ("1.3", "1.0"),
    "conv": ("0.65", "2.4"), "projections": ("1.1", "1.1"),
}  # fmt: skip
RELEASED = {"pretrain": 2.18, "finetune": 4.14}  # times faster than the released composition, before these kernels
AUGMENT = 0.02  # milliseconds an image
GROWTH = 1.1  # of the encoder's time for a token, in larger images


def tests_table(xml: str) -> Iterator[Row]:
    """Yield the row of the GPU tests."""
    found = tests_found(xml)
    failed = found["failures"] + found["errors"]
    passed = found["tests"] - failed - found["skipped"]
    measured = f"{passed} passed, {found['skipped']} skipped, {failed} failed"
    yield Row("GPU tests", measured, "0 failed", LOOK if failed or not passed else KEEP)


def tests_found(xml: str) -> dict[str, int]:
    """Return the numbers of tests in a report of pytest, JUnit XML."""
    suites = list(ElementTree.fromstring(xml).iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}


def scan_table(report: dict) -> Iterator[Row]:
    """Yield rows of the selective scan alone, microseconds forward + backward."""
    for result, (size, prediction) in zip(report["results"], SCANS.items(), strict=False):
        us = result["microseconds"]
        shown = {name: f"{name} {t['forward']:.0f} + {t['backward']:.0f}" for name, t in us.items()}
        ours = [text for name, text in shown.items() if name.startswith(("cuda", "triton"))]
        figure = f"scan, {size}, µs"
        if "cuda" not in us:
            reason = result.get("left_out", {}).get("cuda", "not run")
            yield Row(figure, "; ".join([*(ours or shown.values()), f"cuda: {reason}"]), prediction, NOT)
        else:
            yield Row(figure, "; ".join(ours), prediction, scan_decision(us, size), "cuda")
        for backend in ("triton", "cuda"):
            variants = {name: t["both"] for name, t in us.items() if name.startswith(f"{backend} chunk")}
            if backend in us and variants:
                best = min(variants, key=lambda name: variants[name])
                gain = 1 - variants[best] / us[backend]["both"]
                decision = LOOK if gain > 0.02 else KEEP
                prediction = "3 % to 8 %, for twice the states" if backend == "triton" else "slower"
                yield Row(f"scan, {size}, {best}", f"{gain:+.1%} faster than {backend}", prediction, decision)


def scan_decision(us: dict[str, dict[str, float]], size: str) -> str:
    """Decide whether the scan in CUDA C++ replaces Triton's, from one size."""
    backward = us["cuda"]["backward"]
    if "triton" in us and us["cuda"]["both"] >= us["triton"]["both"]:
        return KEEP
    if size != "pretraining" or backward < SCAN_ADOPT:
        return ADOPT
    return LOOK if backward <= SCAN_LOOK else f"{KEEP}: fall back to triton with chunks of 4"


def ops_table(report: dict) -> Iterator[Row]:
    """Yield rows of the fused operators alone."""
    for row in report["results"]:
        operator, size = row["operator"], row["size"].removesuffix("_toy")
        figure, prediction = f"{operator}, {size}, µs", f"{SAVED[operator, size]} less"
        if "microseconds" not in row:
            yield Row(figure, row.get("left_out") or row["wrong"], prediction, LOOK if "wrong" in row else NOT)
            continue
        compiled, fused = row["microseconds"]["compiled"], row["microseconds"]["fused"]
        gain, spread = compiled["both"] - fused["both"], max(compiled["spread"], fused["spread"])
        measured = f"{compiled['both']:.0f} compiled, {fused['both']:.0f} fused, spread {spread:.1f}"
        yield Row(figure, measured, prediction, ADOPT if gain > spread else KEEP, operator)


def train_table(report: dict) -> Iterator[Row]:
    """Yield rows of training steps: every switch compared with none."""
    rows = {(row["case"], row["composition"]): row for row in report["results"]}
    for case in dict.fromkeys(name for name, _ in rows):
        plain = rows.get((case, "none"), {})
        for switch in (kind for name, kind in rows if name == case):
            row = rows[case, switch]
            figure, prediction = f"{case}, {switch}", ""
            if switch == "none" and case in BEFORE:
                prediction = f"{BEFORE[case]} images/s before"
            if switch in GAINS:
                prediction = f"{GAINS[switch]['finetune' in case]} ms less"
            if switch == "all" and case in GOALS:
                prediction = "at least {} images/s, aim {}".format(*GOALS[case])
            if "ms_per_step" not in row:
                problem = row.get("left_out") or row.get("failed") or "out of memory"
                yield Row(figure, problem, prediction, NOT if "left_out" in row else LOOK)
                continue
            wall, busy = row["ms_per_step"], row["busy_ms_per_step"]
            measured = f"{row['images_per_second']:.0f} images/s, {wall:.2f} ms"
            measured += f", busy {busy:.2f}" if busy else ""
            yield Row(figure, measured, prediction, train_decision(switch, case, row, plain), switch)
            if row["cuda_graph"] and busy:
                decision = KEEP if wall - busy <= MARGIN else LOOK
                yield Row(f"{figure}: wall - busy", f"{wall - busy:.2f} ms", f"at most {MARGIN:.0f} ms", decision)


def train_decision(switch: str, case: str, row: dict, plain: dict) -> str:
    """Decide on a switch: it must save more than the range of the rounds; "all" must reach `GOALS`."""
    if switch == "none":
        return KEEP
    if switch == "all":
        return KEEP if row["images_per_second"] >= GOALS.get(case, (0,))[0] else LOOK
    if "ms_per_step" not in plain:
        return LOOK
    spread = max(max(r["ms_per_step_of_rounds"]) - min(r["ms_per_step_of_rounds"]) for r in (row, plain))
    return ADOPT if plain["ms_per_step"] - row["ms_per_step"] > spread else KEEP


def profile_table(text: str) -> Iterator[Row]:
    """Yield a row that points to the tables of kernels."""
    tables = sum(line.startswith("Self CPU time total") for line in text.splitlines())
    yield Row("kernel tables", f"{tables} in profile.txt", "optimise next: 20 % above its count", LOOK)


def ncu_table(text: str) -> Iterator[Row]:
    """Yield a row that points to the report of ncu."""
    kernels = text.count("Section: Warp State Statistics")
    prediction = "long scoreboard: a third stage; MIO throttle: chunk 4; math pipe: shuffles"
    yield Row("stalls of the scan", f"{kernels} launches in ncu.txt", prediction, LOOK if kernels else NOT)


def losses_table(report: dict) -> Iterator[Row]:
    """Yield rows of the losses of every form: the largest relative differences from none."""
    for row in report["results"]:
        form, figure = row["form"], f"losses, {row['case']}, {row['form']}"
        predictions = {"again": "0", "eager": "rounding", "cuda_graph": "at most twice again"}
        prediction = predictions.get(form, "at most twice eager")
        if "difference" not in row:
            problem = row.get("left_out") or row.get("failed") or "there is nothing to compare with"
            yield Row(figure, problem, prediction, LOOK if "failed" in row else NOT)
        elif form != "none":
            measured = "loss {loss:.1e}, gradient {grad_norm:.1e}".format(**row["difference"])
            fits = form in ("again", "eager") or row["within_rounding"]
            yield Row(figure, measured, prediction, NOT if fits is None else KEEP if fits else LOOK)


def augment_table(report: dict) -> Iterator[Row]:
    """Yield rows of augmentation."""
    for erasing in ("with_erasing", "without_erasing"):
        figure = f"augmentation {erasing.replace('_', ' ')}, ms an image"
        found = {form: rows[erasing]["ms_per_image"] for form, rows in report["forms"].items()}
        measured = ", ".join(f"{form} {ms:.4f}" for form, ms in found.items())
        if "triton" not in found:
            yield Row(figure, measured, f"below {AUGMENT}", NOT)
            continue
        better = found["triton"] < found["torch"]
        decision = KEEP if not better else ADOPT if found["triton"] < AUGMENT else LOOK
        yield Row(figure, measured, f"below {AUGMENT}", decision, "augment")


def large_table(report: dict) -> Iterator[Row]:
    """Yield rows of larger models, all switches on."""
    for row in report["results"]:
        estimate = ESTIMATES.get(row["case"], 0)
        if "ms_per_step" not in row:
            problem = row.get("left_out") or row.get("failed") or "out of memory"
            yield Row(f"{row['case']}, all", problem, f"{estimate} images/s", LOOK)
            continue
        measured = f"{row['images_per_second']:.0f} images/s, {row['ms_per_step']:.1f} ms"
        decision = KEEP if row["images_per_second"] >= estimate else LOOK
        yield Row(f"{row['case']}, all", measured, f"{estimate} images/s", decision)


def released_table(report: dict) -> Iterator[Row]:
    """Yield rows that compare all switches with the released composition."""
    speeds = {(row["case"], row["composition"]): row.get("images_per_second") for row in report["results"]}
    for case in dict.fromkeys(name for name, _ in speeds):
        figure, before = f"{case}, times the released composition", RELEASED[case.partition("_")[0]]
        ours, theirs = speeds.get((case, "all")), speeds.get((case, "released"))
        if not ours or not theirs:
            yield Row(figure, "-", f"above {before}", NOT)
        else:
            decision = KEEP if ours / theirs >= before else LOOK
            yield Row(figure, f"{ours / theirs:.2f} ({theirs:.0f} images/s)", f"above {before}", decision)


def tokens_table(report: dict) -> Iterator[Row]:
    """Yield rows of the encoder beside a ViT, by image size: the time of a token must not grow with their number."""
    before = math.inf
    for row in report["results"]:
        figure, prediction = f"tokens, {row['pixels']} px, ms to train", f"ARM: at most {GROWTH} times as long a token"
        if "models" not in row:
            yield Row(figure, row.get("left_out") or row["failed"], prediction, LOOK)
            continue
        seconds = {name: passes["train"].get("seconds") for name, passes in row["models"].items()}
        shown = (f"{name} {1000 * s:.1f}" if s else f"{name} out of memory" for name, s in seconds.items())
        ours = (seconds["ARM, 4 directions"] or math.inf) / row["tokens"]
        yield Row(figure, "; ".join(shown), prediction, KEEP if ours < GROWTH * before else LOOK)
        before = min(before, ours)


TABLES: dict[str, Callable[..., Iterator[Row]]] = {
    "tests": tests_table, "scan": scan_table, "ops": ops_table, "ncu": ncu_table, "train": train_table,
    "profile": profile_table, "losses": losses_table, "augment": augment_table, "large": large_table,
    "released": released_table, "tokens": tokens_table,
}  # fmt: skip


def table(folder: Path, results: dict[str, str], done: dict[str, dict]) -> list[Row]:
    """Return the rows of all parts, from the file of each in `results`; for `done` see `gpu_check.run_parts`."""
    rows: list[Row] = []
    for name, result in results.items():
        found: list[Row] = []
        status = done.get(name, {"status": "not asked for", "reason": ""})
        with suppress(OSError, UserError, ElementTree.ParseError):
            path = folder / result
            content = read_json(path) if path.suffix == ".json" else path.read_text(errors="replace")
            found = list(TABLES[name](content))
        if status["status"] != "done" or not found:
            why = ": ".join(filter(None, (status["status"], status["reason"])))
            found.append(Row(f"part {name}", why, "done", LOOK if status["status"] == "failed" else NOT))
        rows += found
    tested = [row.decision for row in rows if row.figure in ("GPU tests", "part tests")] == [KEEP]
    return [
        row._replace(decision=f"{LOOK}: {doubt}") if (doubt := doubt_of(row, rows, tested)) else row for row in rows
    ]


def doubt_of(row: Row, rows: list[Row], tested: bool) -> str | None:
    """Return why a kernel is not adopted although it is faster; None if it is, or is not faster."""
    if row.decision != ADOPT:
        return None
    if not tested:
        return "faster, but not all GPU tests have passed"
    losses = {r.decision for r in rows if r.figure.startswith("losses, ") and r.figure.endswith(f", {row.entry}")}
    if LOOK in losses:
        return "faster, but its losses differ"
    if row.entry != "augment" and KEEP not in losses:
        return "faster, but its losses are not compared"
    return None


def entries(rows: list[Row], folder: Path, capability: list[int]) -> tuple[list[str], list[str]]:
    """Return the lines to add to `FASTER`, and the names of kernels that are faster in some rows only."""
    lines, unclear = [], []
    for name in dict.fromkeys(row.entry for row in rows if row.decision == ADOPT):
        if {row.decision for row in rows if row.entry == name} <= {ADOPT, NOT}:
            lines.append(f'"{name}": {{({capability[0]}, {capability[1]}): "{folder.name}/summary.json"}},')
        else:
            unclear.append(name)
    return lines, unclear
