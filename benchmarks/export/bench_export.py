"""Measure `export.py --to onnx` and the latency of the file, beside another checkout and the C kernels.

    git worktree add ../before COMMIT
    npm install --prefix ../web onnxruntime-web
    python benchmarks/export/bench_export.py --before ../before --web ../web

Each checkout exports a classifier with random weights for images of 224 pixels in a process of its own. Then rounds
interleave the files in onnxruntime and the model with its C kernels, one image at a time, with one thread; times are
CPU time, which other processes disturb less than wall clock, and the median is reported. `--web` adds
onnxruntime-web's WebAssembly in Node.js, with one thread.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.command_line import make_parser
from models_arm import create_classifier
from util import cli, hardware
from util.errors import UserError

HERE = Path(__file__).resolve().parents[2]
SIZES = ("tiny", "small", "base", "large", "huge")
WEB = """
import * as ort from "onnxruntime-web";
import { readFileSync } from "node:fs";
const [rounds, ...files] = process.argv.slice(1);
ort.env.wasm.numThreads = 1;
const pixels = Float32Array.from({ length: 3 * 224 * 224 }, (_, i) => Math.sin(i));
const image = new ort.Tensor("float32", pixels, [1, 3, 224, 224]);
const sessions = [], options = { executionProviders: ["wasm"] };
for (const file of files) sessions.push(await ort.InferenceSession.create(readFileSync(file), options));
const seconds = files.map(() => []);
for (let round = 0; round <= rounds; round++)
  for (const [i, session] of sessions.entries()) {
    const start = process.cpuUsage();
    await session.run({ imgs: image });
    const used = process.cpuUsage(start);
    if (round) seconds[i].push((used.user + used.system) / 1e6);
  }
console.log(JSON.stringify(seconds));
"""


def get_args_parser() -> cli.Parser:
    """Return the parser of the command line."""
    numbers = {"rounds": (30, "of the latency")}
    parser = make_parser("bench_export.py", __doc__, numbers, device=False)
    parser.add_argument("--width", choices=SIZES, default="tiny", help="of the model (default: %(default)s)")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, measured beside this one")
    parser.add_argument("--web", type=Path, metavar="FOLDER", help="whose node_modules has onnxruntime-web")
    return parser


def export(checkout: Path, checkpoint: Path, output: Path) -> dict:
    """Run a checkout's export.py; return its CPU time and wall clock in seconds, lines of output, and bytes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    words = [sys.executable, *map(str, (checkout / "tools/export.py", checkpoint, "--to", "onnx", "--output", output))]
    done = subprocess.run(words, capture_output=True, text=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{checkout}: export.py failed: {done.stderr.strip()}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    printed = len((done.stdout + done.stderr).splitlines())
    return {"cpu_seconds": cpu, "wall_seconds": wall, "lines": printed, "bytes": output.stat().st_size}


def latencies(computations: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """Return the median CPU time of each computation, and those of the rounds, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in computations}
    for number in range(rounds + 1):
        for name, compute in computations.items():
            start = time.process_time()
            compute()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return {name: summary(own) for name, own in seconds.items()}


def summary(seconds: list[float]) -> dict:
    """Return the median and all."""
    return {"cpu_seconds": statistics.median(seconds), "cpu_seconds_of_rounds": seconds}


def web(folder: Path, files: dict[str, Path], rounds: int) -> dict[str, dict]:
    """Return the latencies of files in onnxruntime-web."""
    words = ["node", "--input-type=module", "--eval", WEB, str(rounds), *map(str, files.values())]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--web {folder}: {done.stderr.strip()}")
    return dict(zip(files, map(summary, json.loads(done.stdout)), strict=True))


def main(args: argparse.Namespace) -> None:
    """Export with each checkout, measure the files, print and write the figures."""
    import onnxruntime

    machine = hardware.describe(torch.device("cpu"))
    output = hardware.result_file("onnx", machine, args.output)
    torch.set_num_threads(1)
    checkouts = {"now": HERE} | ({"before": args.before.resolve()} if args.before else {})
    model = create_classifier(f"arm_{args.width}_pz16").eval()
    imgs = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        checkpoint = Path(folder) / "model.pth"
        torch.save({"model": model.state_dict()}, checkpoint)
        files = {name: Path(folder) / f"{name}.onnx" for name in checkouts}
        exported = {name: export(checkouts[name], checkpoint, files[name]) for name in files}
        sessions = {name: onnxruntime.InferenceSession(file, options) for name, file in files.items()}
        computations: dict[str, Callable[[], object]] = {"C kernels": lambda: model(imgs)}
        for name, session in sessions.items():
            computations[name] = partial(session.run, None, {"imgs": imgs.numpy()})
        latency = {"onnxruntime": latencies(computations, args.rounds)}
        if args.web:
            latency["onnxruntime-web"] = web(args.web, files, args.rounds)
    report = {**machine, "onnxruntime": onnxruntime.__version__, "width": args.width, "threads": 1}
    hardware.write(output, report | {"export": exported, "latency": latency}, quiet=True)
    for name, row in exported.items():
        print(
            f"export, {name}: {row['cpu_seconds']:.1f} s of CPU time, {row['lines']} lines, {row['bytes'] / 1e6:.1f} MB"
        )
    for runtime, rows in latency.items():
        for name, row in rows.items():
            print(f"{runtime}, {name}: {1000 * row['cpu_seconds']:.1f} ms an image")
    print(output)


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
