"""Everything that a GPU has to answer about the kernels, in one run of ten minutes.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --parts scan ops --minutes 4 --output benchmarks/results/nvidia-h200-2030-01-02-check
    python benchmarks/gpu_check.py --toy --minutes 4

Runs the parts of `PARTS` one after the other, each as a process with a time limit: its share of what is left of
--minutes, so that a part that ends early leaves its time to those after it. What a part finds lies in the output folder
as soon as it is found, beside its log. A part that fails, hangs or is killed stops those only that build on it, and a
kernel that is wrong by itself is left out of training steps; what is not installed, or has too little time left, leaves
its part out. After every part `summary.md` and `summary.json` hold a table: figure, measured, prediction, decision. A
later call with the same --output repeats the parts that it names and keeps the others. "adopt" names the entry to write
into `FASTER` of ops/measured.py; nothing is adopted before all GPU tests have passed, and no kernel of the model before
its losses are shown to differ by rounding alone.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn
from xml.etree import ElementTree

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ops
from util import arguments, cli, hardware
from util.distributed.processes import init_device
from util.errors import Interrupted, RunError, UserError
from util.files import json_with, output_file, printable, read_json, write_json, write_text

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/ops/test_ops_gpu.py", "tests/ops/test_triton.py", "tests/ops/test_fused.py",
    "tests/ops/test_fused_choice.py", "tests/ops/test_cuda_graph_gpu.py", "tests/ops/test_randaugment.py",
    "tests/data/test_device_loader_gpu.py",
)  # fmt: skip
TRAINING = ("timm", "einops", "tensorboard", "torchvision", "safetensors")  # what training imports beside torch
GRACE = 5  # last seconds of a part, in which it is asked to end before it is killed
OPERATORS = ("swiglu", "norm", "conv", "projections")  # fused ones of the model


class Part(NamedTuple):
    """A process of this run.

    `seconds` are its share beside those of other parts, and a third of them what it needs to begin. `command` are the
    words after Python; FOLDER in them is the output folder. `result` is a file in there. A part runs only `after`
    others have left a result. A `late` part gets what the others leave. `program` runs in front of Python. A part that
    `trains` goes without the kernels that are `faulty`.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    result: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    late: bool = False
    program: tuple[str, ...] = ()
    trains: bool = False


def benchmark(name: str, *words: str, part: str | None = None) -> tuple[str, ...]:
    """Return the command of a script beside this one, which writes the JSON file of a part."""
    return (f"benchmarks/{name}.py", *words, "--output", f"FOLDER/{part or name.removeprefix('bench_')}.json")


INTERPRET = ("env", "TRITON_INTERPRET=1")
NCU = "ncu --clock-control none --section WarpStateStats --section SchedulerStats -c 16".split()
NCU += ["-k", "regex:^scan_(forward|backward)", "--log-file", "FOLDER/ncu.txt"]


def parts(toy: bool) -> list[Part]:
    """Return the parts in the order in which they run; as toys, they are those of a rehearsal on a CPU."""
    cores = min(14, len(os.sched_getaffinity(0)))  # each worker compiles the kernels that it tests
    workers = ("-n", str(cores)) if importlib.util.find_spec("xdist") and not toy else ()
    tests = [*TESTS]
    if toy:  # on a CPU all of them are skipped, the others would take minutes
        tests = [name for name in tests if name.endswith("_gpu.py")]
    few = ("--steps", "1", "--rounds", "1", "--batch_size", "2") if toy else ("--steps", "10")
    cases = ("pretrain_toy", "finetune_toy") if toy else ("pretrain_base", "finetune_base")
    large = cases if toy else ("pretrain_large", "pretrain_huge")
    switches = ("none", "all", "cuda_graph", "cuda", *OPERATORS, "casts")
    pytest = ("-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "--junitxml", "FOLDER/tests.xml")
    scan = ("--sizes", "1,2,32,6,16", "4,2,32,7,16", "1,2,64,6,16", "--repetitions", "2") if toy else ()
    repetitions = ("--repetitions", "2") if toy else ()
    kernels = [backend for backend in ("triton", "cuda") if backend in ops.BACKENDS]
    ncu = ("benchmarks/bench_scan.py", "--contestants", *kernels, "--sizes", "1,256,768,128,16")
    augment = ("--batch_size", "4", "--input_size", "8", "--rounds", "1") if toy else ()
    losses = ("--steps", "2", "--batch_size", "2") if toy else ("--steps", "50")
    found = [
        Part("tests", 240, (*pytest, *workers, *tests), "tests.xml", ("pytest", "sklearn", "matplotlib", *TRAINING)),
        Part("scan", 60, benchmark("bench_scan", *scan), "scan.json"),
        Part("ops", 80, benchmark("bench_ops", *repetitions), "ops.json", TRAINING),
        Part(
            "ncu", 40, (*ncu, "--repetitions", "1", "--output", "FOLDER/ncu-scan.json"), "ncu.txt", (), ("scan",),
            program=tuple(NCU),
        ),
        Part(
            "train", 180, benchmark("bench_train", "--cases", *cases, "--switches", *switches, *few), "train.json",
            TRAINING, trains=True,
        ),
        Part(
            "profile", 60,
            benchmark("bench_train", "--cases", *cases, "--switches", "all", *few, "--rounds", "1",
                      "--profile", "FOLDER/profile.txt", part="profile"),
            "profile.txt", TRAINING, ("train",), trains=True,
        ),
        Part("losses", 90, benchmark("bench_losses", "--cases", *cases, *losses), "losses.json", TRAINING, trains=True),
        Part("augment", 30, benchmark("bench_augment", *augment), "augment.json", TRAINING),
        Part(
            "large", 90, benchmark("bench_train", "--cases", *large, "--switches", "all", *few, part="large"),
            "large.json", TRAINING, ("train",), late=True, trains=True,
        ),
        Part(
            "released", 90,
            benchmark("bench_train", "--cases", *cases, "--switches", "all", "released", *few, part="released"),
            "released.json", (*TRAINING, *(() if toy else ("mamba_ssm", "causal_conv1d"))), late=True, trains=True,
        ),
    ]  # fmt: skip
    if not toy:
        return found
    # On a CPU the kernels are interpreted, which takes seconds a step: training runs without.
    interpreted = () if torch.cuda.is_available() else ("ops", "losses", "augment")
    found = [part._replace(seconds=part.seconds / 10) for part in found]
    return [part._replace(program=INTERPRET) if part.name in interpreted else part for part in found]


PARTS = [part.name for part in parts(toy=False)]


# ---- running ----


def run_parts(
    chosen: list[Part],
    folder: Path,
    seconds: float,
    done: dict[str, dict],
    after_each: Callable[[], None],
) -> None:
    """Run parts one after the other, and note in `done` by name how each ended: "status", "seconds", "reason".

    Args:
        chosen: in order.
        folder: of results and logs.
        seconds: for all of them.
        done: what is known of parts that ran before; a part that is left out keeps the result that it has.
        after_each: called after every part.
    """
    end = time.monotonic() + seconds
    for i, part in enumerate(chosen):
        left = end - time.monotonic()
        sharing = [other for other in chosen[i:] if part.late or not other.late]
        limit = left * part.seconds / sum(other.seconds for other in sharing)
        if reason := why_not(part, left, limit, done, folder):
            print(f"{part.name:<10}left out: {reason}", flush=True)
            if part.name not in done or not Path(folder, part.result).exists():
                done[part.name] = {"status": "left out", "seconds": 0.0, "reason": reason}
        else:
            wrong = faulty(folder, done) if part.trains else {}
            for name, problem in wrong.items():
                print(f"{part.name:<10}without {name}: {problem}", flush=True)
            command = (*part.command, *(("--without", *wrong) if wrong else ()))
            print(f"{part.name:<10}at most {limit:.0f} s ...", end=" ", flush=True)
            done[part.name] = {"status": "running", "seconds": 0.0, "reason": "this check was killed meanwhile"}
            after_each()
            try:
                done[part.name] = run_part(part._replace(command=command), folder, limit)
            except Interrupted:
                done[part.name] |= {"status": "stopped", "reason": "this check was asked to stop"}
                after_each()
                raise
            print("{status} after {seconds:.0f} s".format(**done[part.name]), done[part.name]["reason"], flush=True)
        after_each()


def faulty(folder: Path, done: dict[str, dict]) -> dict[str, str]:
    """Return the kernels that parts "scan" and "ops" found to be wrong or to fail, and how."""
    found, timed = {}, False
    with suppress(OSError, UserError):
        for row in read_json(folder / "ops.json")["results"]:
            if "wrong" in row:
                found[row["operator"]] = row["wrong"]
    with suppress(OSError, UserError):
        for row in read_json(folder / "scan.json")["results"]:
            timed = timed or "cuda" in row["microseconds"]
            if "cuda" in row.get("wrong", ()):
                found["cuda"] = row["wrong"]["cuda"]
    status = done.get("scan", {}).get("status")
    if status in ("failed", "stopped") and not timed:  # what crashes or hangs leaves no result
        found.setdefault("cuda", f"part scan {status} before it was timed")
    return found


def why_not(part: Part, left: float, limit: float, done: dict[str, dict], folder: Path) -> str | None:
    """Return why a part is left out, None if it runs."""
    if missing := [name for name in part.needs if importlib.util.find_spec(name) is None]:
        return f"not installed: {', '.join(missing)}"
    if part.program and shutil.which(part.program[0]) is None:
        return f"there is no program {part.program[0]}"
    for name in part.after:
        status = done.get(name, {}).get("status", "not done")
        if status != "done" and not (status == "stopped" and Path(folder, f"{name}.json").exists()):
            return f"it needs part {name}, which is {status}"
    if limit < part.seconds / 3 and limit < left:  # alone it gets all there is
        return f"{max(0, left):.0f} s are left, its share is {max(0, limit):.0f} s and it needs {part.seconds / 3:.0f}"
    return "no time is left" if left <= 0 else None


def run_part(part: Part, folder: Path, limit: float) -> dict[str, object]:
    """Run a part in a process group of its own, which ends with it; return how it ended."""
    Path(folder, part.result).unlink(missing_ok=True)
    log = folder / f"{part.name}.log"
    command = [*part.program, sys.executable, *part.command]
    command = [word.replace("FOLDER", str(folder)) for word in command]
    start, grace = time.monotonic(), min(GRACE, limit / 4)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, start_new_session=True, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            process.wait(limit - grace)
            stopped = False
        except subprocess.TimeoutExpired:
            stopped = True
            with suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)  # pytest then writes its report, Python says where it was
                process.wait(grace)
        finally:  # also what a process leaves behind, and where this one is interrupted
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)  # a process that waits for a driver cannot even be killed
    found = {"seconds": round(time.monotonic() - start, 1), "command": " ".join(part.command)}
    if stopped:
        return {"status": "stopped", "reason": f"its time of {limit:.0f} s was over", **found}
    if process.returncode:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        how = f"exit status {process.returncode}"
        if process.returncode < 0:
            how = f"killed by {signal.Signals(-process.returncode).name}"
        return {"status": "failed", "reason": f"{how}: {printable(last.strip())[:200]}", **found}
    return {"status": "done", "reason": "", **found}


@contextmanager
def no_part_outlives(folder: Path) -> Iterator[None]:
    """Turn signals that end this process into an exception."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        name = signal.Signals(number).name
        raise Interrupted(f"{name}: what was measured is in {printable(folder)}; a call with --output adds to it")

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the table ----


class Row(NamedTuple):
    """A line of the table; `entry` is the key of `FASTER` that "adopt" stands for."""

    figure: str
    measured: str
    prediction: str
    decision: str
    entry: str = ""


ADOPT, KEEP, LOOK, NOT = "adopt", "keep", "look", "not measured"

# Microseconds of the scan's backward pass, by the kernels in CUDA C++, in ARM-base's pretraining on an H200.
SCAN_ADOPT, SCAN_LOOK = 450, 650
# The scan's sizes, in bench_scan.py's order: what is counted for "cuda", and was measured for "triton", on an H200.
SCANS = {
    "pretraining": "cuda at least 102 + 253, below 450 backward; triton 237 + 837",
    "finetuning": "cuda at least 320 + 790; triton 714 + 2543",
    "pretraining, huge": "triton 238 + 825",
}
# What each operator should save in a block, in microseconds: a twelfth of the table of remedies.
SAVED = {
    ("swiglu", "pretraining"): 158, ("swiglu", "finetuning"): 125,
    ("norm", "pretraining"): 108, ("norm", "finetuning"): 83,
    ("conv", "pretraining"): 54, ("conv", "finetuning"): 200,
    ("projections", "pretraining"): 92, ("projections", "finetuning"): 92,
}  # fmt: skip
# Images a second with every switch on: at least, and the aim. For larger models what is estimated.
GOALS = {"pretrain_base": (4860, 5100), "finetune_base": (2440, 2800)}
BEFORE = {"pretrain_base": 3672, "finetune_base": 1525}  # with none, measured on an H200
ESTIMATES = {"pretrain_large": 1750, "pretrain_huge": 930}
MARGIN = 1.0  # milliseconds by which a step with CUDA graphs may be longer than the GPU is busy
# What a switch alone should save in a step, milliseconds in pretraining and in finetuning.
GAINS = {
    "cuda_graph": ("4 to 17", "4 to 6"), "cuda": ("6.9", "20.6"), "swiglu": ("1.9", "1.5"), "norm": ("1.3", "1.0"),
    "conv": ("0.65", "2.4"), "projections": ("1.1", "1.1"),
}  # fmt: skip
RELEASED = {"pretrain": 2.18, "finetune": 4.14}  # times faster than the released composition, before these kernels
AUGMENT = 0.02  # milliseconds an image


def tests_table(xml: str) -> Iterator[Row]:
    """Rows of the GPU tests."""
    found = tests_found(xml)
    failed = found["failures"] + found["errors"]
    passed = found["tests"] - failed - found["skipped"]
    measured = f"{passed} passed, {found['skipped']} skipped, {failed} failed"
    yield Row("GPU tests", measured, "0 failed", LOOK if failed or not passed else KEEP)


def tests_found(xml: str) -> dict[str, int]:
    """Numbers of a report of pytest."""
    suites = list(ElementTree.fromstring(xml).iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}


def scan_table(report: dict) -> Iterator[Row]:
    """Rows of the selective scan alone, microseconds forward + backward."""
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
                best = min(variants, key=variants.get)
                gain = 1 - variants[best] / us[backend]["both"]
                decision = LOOK if gain > 0.02 else KEEP
                prediction = "3 % to 8 %, for twice the states" if backend == "triton" else "slower"
                yield Row(f"scan, {size}, {best}", f"{gain:+.1%} faster than {backend}", prediction, decision)


def scan_decision(us: dict[str, dict[str, float]], size: str) -> str:
    """Whether the kernels in CUDA C++ take the place of Triton's in one size."""
    backward = us["cuda"]["backward"]
    if "triton" in us and us["cuda"]["both"] >= us["triton"]["both"]:
        return KEEP
    if size != "pretraining" or backward < SCAN_ADOPT:
        return ADOPT
    return LOOK if backward <= SCAN_LOOK else f"{KEEP}: fall back to triton with chunks of 4"


def ops_table(report: dict) -> Iterator[Row]:
    """Rows of the fused operators alone."""
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
    """Rows of training steps: every switch beside none."""
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
            measured = f"{row['images_per_second']:.0f} images/s, {wall:.2f} ms" + (
                f", busy {busy:.2f}" if busy else ""
            )
            yield Row(figure, measured, prediction, train_decision(switch, case, row, plain), switch)
            if row["cuda_graph"] and busy:
                yield Row(
                    f"{figure}: wall - busy", f"{wall - busy:.2f} ms", f"at most {MARGIN:.0f} ms",
                    KEEP if wall - busy <= MARGIN else LOOK,
                )  # fmt: skip


def train_decision(switch: str, case: str, row: dict, plain: dict) -> str:
    """Whether a switch stays on: faster than none by more than the rounds of either differ; all, by the goal."""
    if switch == "none":
        return KEEP
    if switch == "all":
        return KEEP if row["images_per_second"] >= GOALS.get(case, (0,))[0] else LOOK
    if "ms_per_step" not in plain:
        return LOOK
    spread = max(max(r["ms_per_step_of_rounds"]) - min(r["ms_per_step_of_rounds"]) for r in (row, plain))
    return ADOPT if plain["ms_per_step"] - row["ms_per_step"] > spread else KEEP


def profile_table(text: str) -> Iterator[Row]:
    """A row that points to the tables of kernels."""
    tables = sum(line.startswith("Self CPU time total") for line in text.splitlines())
    yield Row("kernel tables", f"{tables} in profile.txt", "what is 20 % over its count is next", LOOK)


def ncu_table(text: str) -> Iterator[Row]:
    """A row that points to what ncu found."""
    kernels = text.count("Section: Warp State Statistics")
    prediction = "long scoreboard: a third stage; MIO throttle: chunk 4; math pipe: shuffles"
    yield Row("stalls of the scan", f"{kernels} launches in ncu.txt", prediction, LOOK if kernels else NOT)


def losses_table(report: dict) -> Iterator[Row]:
    """Rows of the losses of every form, as the largest relative differences from none."""
    for row in report["results"]:
        form, figure = row["form"], f"losses, {row['case']}, {row['form']}"
        prediction = {"again": "0", "eager": "rounding", "cuda_graph": "at most twice again"}.get(
            form, "at most twice eager"
        )
        if "difference" not in row:
            problem = row.get("left_out") or row.get("failed") or "there is nothing to compare with"
            yield Row(figure, problem, prediction, LOOK if "failed" in row else NOT)
        elif form != "none":
            measured = "loss {loss:.1e}, gradient {grad_norm:.1e}".format(**row["difference"])
            fits = form in ("again", "eager") or row["within_rounding"]
            yield Row(figure, measured, prediction, NOT if fits is None else KEEP if fits else LOOK)


def augment_table(report: dict) -> Iterator[Row]:
    """Rows of augmentation."""
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
    """Rows of larger models, all switches on."""
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
    """Rows of the released composition."""
    speeds = {(row["case"], row["composition"]): row.get("images_per_second") for row in report["results"]}
    for case in dict.fromkeys(name for name, _ in speeds):
        figure, before = f"{case}, times the released composition", RELEASED[case.partition("_")[0]]
        ours, theirs = speeds.get((case, "all")), speeds.get((case, "released"))
        if not ours or not theirs:
            yield Row(figure, "-", f"above {before}", NOT)
        else:
            decision = KEEP if ours / theirs >= before else LOOK
            yield Row(figure, f"{ours / theirs:.2f} ({theirs:.0f} images/s)", f"above {before}", decision)


TABLES = {
    "tests": tests_table, "scan": scan_table, "ops": ops_table, "ncu": ncu_table, "train": train_table,
    "profile": profile_table, "losses": losses_table, "augment": augment_table, "large": large_table,
    "released": released_table,
}  # fmt: skip


def table(folder: Path, all_parts: list[Part], done: dict[str, dict]) -> list[Row]:
    """Return the rows of all parts, from the files in the folder."""
    rows = []
    for part in all_parts:
        found, status = [], done.get(part.name, {"status": "not asked for", "reason": ""})
        with suppress(OSError, UserError, ElementTree.ParseError):
            path = folder / part.result
            content = read_json(path) if path.suffix == ".json" else path.read_text(errors="replace")
            found = list(TABLES[part.name](content))
        if status["status"] != "done" or not found:
            why = ": ".join(filter(None, (status["status"], status["reason"])))
            found.append(Row(f"part {part.name}", why, "done", LOOK if status["status"] == "failed" else NOT))
        rows += found
    tested = [row.decision for row in rows if row.figure in ("GPU tests", "part tests")] == [KEEP]
    return [
        row._replace(decision=f"{LOOK}: {doubt}") if (doubt := doubt_of(row, rows, tested)) else row for row in rows
    ]


def doubt_of(row: Row, rows: list[Row], tested: bool) -> str | None:
    """Return what keeps a figure that speaks for a kernel from being enough to adopt it."""
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
    """Return the lines of `FASTER` for which the table speaks, and the names for which only some of its rows do."""
    lines, unclear = [], []
    for name in dict.fromkeys(row.entry for row in rows if row.decision == ADOPT):
        if {row.decision for row in rows if row.entry == name} <= {ADOPT, NOT}:
            lines.append(f'"{name}": {{({capability[0]}, {capability[1]}): "{folder.name}/summary.json"}},')
        else:
            unclear.append(name)
    return lines, unclear


def summary(folder: Path, about: dict, all_parts: list[Part], done: dict[str, dict]) -> str:
    """Write summary.json and summary.md; return the latter."""
    rows = table(folder, all_parts, done)
    adopted, unclear = entries(rows, folder, about["capability"]) if "capability" in about else ([], [])
    lines = [f"# {about.get('gpu', about['cpu'])}, {about['date']}", ""]
    if about["toy"]:
        lines += ["A rehearsal at toy size: its decisions mean nothing.", ""]
    lines += [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    columns = ("figure", "measured", "prediction", "decision")
    lines += [f"| {' | '.join(columns)} |", "| --- | --- | --- | --- |"]
    for row in rows:
        decision = f"{ADOPT} {row.entry}" if row.decision == ADOPT else row.decision
        lines.append(f"| {' | '.join(text.replace('|', '/') for text in (*row[:3], decision))} |")
    if adopted:
        lines += ["", "Entries for `FASTER` in ops/measured.py, once this folder lies in benchmarks/results:", ""]
        lines += ["```", *adopted, "```"]
    if unclear:
        lines += ["", f"Faster in some rows only, so that somebody has to decide: {', '.join(unclear)}."]
    text = "\n".join(lines) + "\n"
    content = {**about, "parts": done, "table": [row._asdict() for row in rows], "entries": adopted}
    try:
        write_json(folder / "summary.json", content)
        write_text(folder / "summary.md", text)
    except OSError as error:
        raise RunError(f"--output {printable(folder)} cannot be written: {error.strerror}") from error
    return text


def earlier(folder: Path, about: dict) -> dict[str, dict]:
    """Return how the parts of earlier calls with the same output ended.

    Raises:
        UserError: the folder cannot be written, or holds something else, or results of another machine or size.
    """
    path = output_file(folder / "summary.json", json_with(date=str, parts=dict, table=list))
    if not path.exists():
        return {}
    before = read_json(path)
    if (before.get("gpu"), before.get("toy")) != (about.get("gpu"), about["toy"]):
        found = f"{before.get('gpu', 'a CPU')}{', toys' if before.get('toy') else ''}"
        raise UserError(f"--output {printable(folder)} holds results of {found}: give another folder")
    return before["parts"]


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser("gpu_check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--minutes",
        type=arguments.number(float, 0.1, 1440),
        default=10,
        help="for all parts together (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=arguments.nonempty, metavar="FOLDER", help="default: benchmarks/results/GPU-DATE-check"
    )
    parser.add_argument("--device", type=arguments.nonempty, help="default: cuda")
    parser.add_argument("--toy", action="store_true", help="rehearse with toy sizes, also on a CPU")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run the parts; print and write the table after them."""
    if not args.toy and (not torch.cuda.is_available() or (args.device or "cuda").startswith("cpu")):
        raise UserError("it measures a GPU, and there is none: --toy rehearses it on a CPU")
    device = init_device(args.device)
    about = {**hardware.describe(device), "toy": args.toy}
    if device.type == "cuda":
        about["capability"] = list(torch.cuda.get_device_capability(device))
    folder = Path(args.output or hardware.result_file("check", about).with_suffix("")).resolve()
    done = earlier(folder, about)
    everything = parts(args.toy)
    chosen = [part for part in everything if part.name in args.parts]
    if device.index is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible(device.index)
    with no_part_outlives(folder):
        run_parts(chosen, folder, 60 * args.minutes, done, lambda: summary(folder, about, everything, done))
    print(f"\n{summary(folder, about, everything, done)}\nwritten to {printable(folder)}/summary.md and summary.json")
    bad = [f"{part.name} {done[part.name]['status']}" for part in chosen if done[part.name]["status"] != "done"]
    if bad := [text for text in bad if not text.endswith("left out")]:
        raise RunError(f"{', '.join(bad)}: see the logs in {printable(folder)}")


def visible(index: int) -> str:
    """Return the one GPU that the parts are to see, as this process's own CUDA_VISIBLE_DEVICES names it."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[index] if names else str(index)


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
