"""Test and measure the kernels on a GPU, in one run of ten minutes.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --parts scan ops --minutes 4 --output benchmarks/results/nvidia-h200-2030-01-02-check
    python benchmarks/gpu_check.py --toy --minutes 4

Runs `PARTS` one after the other, each as a process with a time limit: its share of the time that is left of
--minutes. Results are in the output folder as soon as they are measured, beside the log of each part. If a part
fails, hangs or is killed, only the parts that need it are left out. Training steps leave out a kernel that is wrong
by itself. A part is also left out if a package is not installed or too little time is left. After every part,
`summary.md` and `summary.json` hold a table: figure, measured, prediction, decision. A later call with the same
--output repeats the parts that it names and keeps the others. "adopt" stands for an entry in `FASTER` of
ops/measured.py. Nothing is adopted before all GPU tests have passed, and no kernel of the model before its losses are
shown to differ by rounding alone.
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
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn, cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ops
from benchmarks.gpu.gpu_tables import ADOPT, entries, table
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
TRAINING = ("timm", "einops", "tensorboard", "torchvision", "safetensors")  # imported by training, besides torch
GRACE = 5  # seconds from the request to end until a part is killed
OPERATORS = ("swiglu", "norm", "conv", "projections")  # fused operators of the model


class Part(NamedTuple):
    """A process of this check."""

    name: str
    seconds: float  # weight of its share of the time; it needs at least a third of these seconds
    command: tuple[str, ...]  # words after Python; FOLDER stands for the output folder
    result: str  # file in the output folder
    needs: tuple[str, ...] = ()  # packages that must be installed
    after: tuple[str, ...] = ()  # parts whose results it needs
    late: bool = False  # it runs in the time that the other parts leave
    program: tuple[str, ...] = ()  # words in front of Python
    trains: bool = False  # it trains without the kernels that are `faulty`


def benchmark(name: str, *words: str, part: str | None = None) -> tuple[str, ...]:
    """Return the command of a benchmark that writes the JSON file of a part."""
    return (f"benchmarks/{name}.py", *words, "--output", f"FOLDER/{part or name.removeprefix('bench_')}.json")


INTERPRET = ("env", "TRITON_INTERPRET=1")
NCU = "ncu --clock-control none --section WarpStateStats --section SchedulerStats -c 16".split()
NCU += ["-k", "regex:^scan_(forward|backward)", "--log-file", "FOLDER/ncu.txt"]


def parts(toy: bool) -> list[Part]:
    """Return the parts in the order in which they run; toys are small enough to rehearse on a CPU."""
    cores = min(14, hardware.available_cores())  # each worker compiles the kernels that it tests
    workers = ("-n", str(cores)) if importlib.util.find_spec("xdist") and not toy else ()
    tests = [name for name in TESTS if not toy or name.endswith("_gpu.py")]  # toy: a CPU skips these, and is slow
    few = ("--steps", "1", "--rounds", "1", "--batch_size", "2") if toy else ("--steps", "10")
    cases = ("pretrain_toy", "finetune_toy") if toy else ("pretrain_base", "finetune_base")
    large = cases if toy else ("pretrain_large", "pretrain_huge")
    switches = ("none", "all", "cuda_graph", "cuda", *OPERATORS, "casts")
    train = partial(benchmark, "bench_train", "--cases")
    pytest = ("-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "--junitxml", "FOLDER/tests.xml")
    scan = ("--sizes", "1,2,32,6,16", "4,2,32,7,16", "1,2,64,6,16", "--repetitions", "2") if toy else ()
    repetitions = ("--repetitions", "2") if toy else ()
    kernels = [backend for backend in ("triton", "cuda") if backend in ops.BACKENDS]
    ncu = ("benchmarks/bench_scan.py", "--contestants", *kernels, "--sizes", "1,256,768,128,16")
    augment = ("--batch_size", "4", "--input_size", "8", "--rounds", "1") if toy else ()
    tokens = ("--pixels", "32", "48", "--width", "tiny", "--rounds", "1") if toy else ()
    losses = ("--steps", "2", "--batch_size", "2") if toy else ("--steps", "50")
    found = [
        Part("tests", 240, (*pytest, *workers, *tests), "tests.xml", ("pytest", "sklearn", "matplotlib", *TRAINING)),
        Part("scan", 60, benchmark("bench_scan", *scan), "scan.json"),
        Part("ops", 80, benchmark("bench_ops", *repetitions), "ops.json", TRAINING),
        Part(
            "ncu", 40, (*ncu, "--repetitions", "1", "--output", "FOLDER/ncu-scan.json"), "ncu.txt", (), ("scan",),
            program=tuple(NCU),
        ),
        Part("train", 180, train(*cases, "--switches", *switches, *few), "train.json", TRAINING, trains=True),
        Part(
            "profile", 60,
            train(*cases, "--switches", "all", *few, "--rounds", "1", "--profile", "FOLDER/profile.txt",
                  part="profile"), "profile.txt", TRAINING, ("train",), trains=True,
        ),
        Part("losses", 90, benchmark("bench_losses", "--cases", *cases, *losses), "losses.json", TRAINING, trains=True),
        Part("augment", 30, benchmark("bench_augment", *augment), "augment.json", TRAINING),
        Part(
            "large", 90, train(*large, "--switches", "all", *few, part="large"), "large.json", TRAINING, ("train",),
            late=True, trains=True,
        ),
        Part(
            "released", 90, train(*cases, "--switches", "all", "released", *few, part="released"), "released.json",
            (*TRAINING, *(() if toy else ("mamba_ssm", "causal_conv1d"))), late=True, trains=True,
        ),
        Part("tokens", 90, benchmark("bench_tokens", *tokens), "tokens.json", TRAINING, late=True),
    ]  # fmt: skip
    if not toy:
        return found
    # On a CPU the kernels are interpreted, which takes seconds a step: training runs without them.
    interpreted = () if torch.cuda.is_available() else ("ops", "losses", "augment")
    found = [part._replace(seconds=part.seconds / 10) for part in found]
    return [part._replace(program=INTERPRET) if part.name in interpreted else part for part in found]


PARTS = [part.name for part in parts(toy=False)]


def run_parts(
    chosen: list[Part], folder: Path, seconds: float, done: dict[str, dict], after_each: Callable[[], object]
) -> None:
    """Run the chosen parts one after the other, in at most `seconds`; results and logs lie in the folder.

    `done` tells by name how each part ended: "status", "seconds", "reason". It holds earlier parts and is extended. A
    part that is left out keeps its earlier result. `after_each` is called before and after every part.
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
            done[part.name] = {"status": "running", "seconds": 0.0, "reason": "this check was killed during it"}
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
    """Return the kernels that parts "scan" and "ops" found wrong or failing, and the reasons."""
    rows: dict[str, list[dict]] = {"ops": [], "scan": []}
    for name in rows:
        with suppress(OSError, UserError):
            rows[name] = cast(dict, read_json(folder / f"{name}.json"))["results"]
    found = {row["operator"]: row["wrong"] for row in rows["ops"] if "wrong" in row}
    for row in rows["scan"]:
        if "cuda" in row.get("wrong", ()):
            found["cuda"] = row["wrong"]["cuda"]
    timed = any("cuda" in row["microseconds"] for row in rows["scan"])
    status = done.get("scan", {}).get("status")
    if status in ("failed", "stopped") and not timed:  # a kernel that crashes or hangs leaves no result
        found.setdefault("cuda", f"part scan {status} before it was timed")
    return found


def why_not(part: Part, left: float, limit: float, done: dict[str, dict], folder: Path) -> str | None:
    """Return why a part is left out; None if it runs."""
    if missing := [name for name in part.needs if importlib.util.find_spec(name) is None]:
        return f"not installed: {', '.join(missing)}"
    if part.program and shutil.which(part.program[0]) is None:
        return f"there is no program {part.program[0]}"
    for name in part.after:
        status = done.get(name, {}).get("status", "not done")
        if status != "done" and not (status == "stopped" and Path(folder, f"{name}.json").exists()):
            return f"it needs part {name}, which is {status}"
    if limit < part.seconds / 3 and limit < left:  # the only part left gets all the time
        return f"{max(0, left):.0f} s are left, its share is {max(0, limit):.0f} s and it needs {part.seconds / 3:.0f}"
    return "no time is left" if left <= 0 else None


def run_part(part: Part, folder: Path, limit: float) -> dict[str, object]:
    """Run a part in a process group of its own, kill the group at its end, and return how the part ended."""
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
                os.killpg(process.pid, signal.SIGINT)  # pytest then writes its report, Python a traceback
                process.wait(grace)
        finally:  # also kills children that a part leaves behind, and its process if this one is interrupted
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)  # a process that waits for a driver cannot be killed
    found = {"seconds": round(time.monotonic() - start, 1), "command": " ".join(part.command)}
    if stopped:
        return {"status": "stopped", "reason": f"its time of {limit:.0f} s was over", **found}
    if process.returncode:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        how = f"exit status {process.returncode}"
        if process.returncode < 0:
            how = f"killed by {signal.Signals(-process.returncode).name}"
        return {"status": "failed", "reason": f"{how}: {printable(last.strip())[:200]}", **found}
    return {"status": "done", "reason": "", **found}


@contextmanager
def no_part_outlives(folder: Path) -> Iterator[None]:
    """Turn signals that end this process into an exception, so that the part under way is killed too."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        name = signal.Signals(number).name
        raise Interrupted(f"{name}: what was measured is in {printable(folder)}; a call with --output adds to it")

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(folder: Path, about: dict, all_parts: list[Part], done: dict[str, dict]) -> str:
    """Write summary.json and summary.md; return the content of the latter."""
    rows = table(folder, {part.name: part.result for part in all_parts}, done)
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
        lines += ["", f"Faster in some rows only, which needs a decision by hand: {', '.join(unclear)}."]
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
        UserError: the folder cannot be written, or holds other files, or results of another GPU or size.
    """
    path = output_file(folder / "summary.json", json_with(date=str, parts=dict, table=list))
    if not path.exists():
        return {}
    before = cast(dict, read_json(path))
    if (before.get("gpu"), before.get("toy")) != (about.get("gpu"), about["toy"]):
        found = f"{before.get('gpu', 'a CPU')}{', toys' if before.get('toy') else ''}"
        raise UserError(f"--output {printable(folder)} holds results of {found}: give another folder")
    return before["parts"]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("gpu_check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help="default: %(default)s")
    minutes = arguments.number(float, 0.1, 1440)
    parser.add_argument("--minutes", type=minutes, default=10, help="for all parts together (default: %(default)s)")
    text = "default: benchmarks/results/GPU-DATE-check"
    parser.add_argument("--output", type=arguments.nonempty, metavar="FOLDER", help=text)
    parser.add_argument("--device", type=arguments.nonempty, help="default: cuda")
    parser.add_argument("--toy", action="store_true", help="rehearse with toy sizes, also on a CPU")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run the parts, then print the table."""
    if not args.toy and (not torch.cuda.is_available() or (args.device or "cuda").startswith("cpu")):
        raise UserError("it measures a GPU, and there is none: --toy rehearses it on a CPU")
    device = init_device(args.device)
    about: dict = {**hardware.describe(device), "toy": args.toy}
    if device.type == "cuda":
        about["capability"] = list(torch.cuda.get_device_capability(device))
    folder = Path(args.output or hardware.result_file("check", about).with_suffix("")).resolve()
    done = earlier(folder, about)
    everything = parts(args.toy)
    chosen = [part for part in everything if part.name in args.parts]
    if device.index is not None:
        names = os.environ.get("CUDA_VISIBLE_DEVICES")  # of the GPUs that this process sees; its parts see one
        os.environ["CUDA_VISIBLE_DEVICES"] = names.split(",")[device.index] if names else str(device.index)
    with no_part_outlives(folder):
        run_parts(chosen, folder, 60 * args.minutes, done, lambda: summary(folder, about, everything, done))
    print(f"\n{summary(folder, about, everything, done)}\nwritten to {printable(folder)}/summary.md and summary.json")
    ends = {part.name: done[part.name]["status"] for part in chosen}
    if bad := [f"{name} {status}" for name, status in ends.items() if status not in ("done", "left out")]:
        raise RunError(f"{', '.join(bad)}: see the logs in {printable(folder)}")


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
