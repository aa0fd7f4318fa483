"""Measure what it costs to watch a run: the demo's pretraining with and without a loss on val/ and a probe, in turns.

    python demo/watch_cost.py

trains the same weights each time, and reports the seconds and CPU seconds of each run with the shares that it logged.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.compare_loaders import script
from demo.demo import MODEL, PRETRAIN, RECIPE
from demo.digits import unpack_digits
from util import arguments, cli, hardware
from util.errors import RunError

WATCHED = {
    "unwatched": "",
    "every epoch": "--val_freq 1 --probe_freq 1",
    "every 5 epochs": "--val_freq 5 --probe_freq 5",
}
VALUES = "test_loss", "test_knn_acc1", "rankme", "val_share", "probe_share"  # of log.txt


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("watch_cost.py", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=arguments.positive, default=5, help="of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=arguments.positive, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results/)")
    return parser


def train(folder: Path, name: str, number: int, epochs: int) -> dict:
    """Pretrain; return the seconds that it took, the training loss of the last epoch, and what it logged there.

    CPU seconds, of all processes of the run, depend less on what else the machine does.
    """
    out = folder / f"{name}-{number}".replace(" ", "-")
    start, cpu = time.perf_counter(), cpu_seconds()
    words = f"{MODEL} {RECIPE} {PRETRAIN} --batch_size 64 --epochs {epochs} --vis_freq 0 {WATCHED[name]}"
    script("main_pretrain.py", f"{words} --data_path {folder}/digits", out)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    last = json.loads((out / "log.txt").read_text().splitlines()[-1])
    found = {"watched": name, "seconds": seconds, "cpu_seconds": cpu, "train_loss": last["train_loss"]}
    return found | {value: last[value] for value in VALUES if value in last}


def cpu_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(args: argparse.Namespace) -> None:
    """Train in turns, print a line for each run and for each kind, write JSON.

    Raises:
        RunError: a watched run is not the same run.
    """
    about = hardware.describe(torch.device("cpu"))
    output = hardware.result_file("watching", about, args.output)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        unpack_digits(Path(temporary, "digits"))
        for number in range(args.rounds):
            for name in WATCHED:
                runs.append(train(Path(temporary), name, number, args.epochs))
                print(", ".join(f"{key} {value}" for key, value in runs[-1].items()), flush=True)
    if len({run["train_loss"] for run in runs}) > 1:
        raise RunError("the runs end with different losses: watching has changed the training")
    seconds = {
        name: statistics.median(run["cpu_seconds"] for run in runs if run["watched"] == name) for name in WATCHED
    }
    for name, value in seconds.items():
        print(f"{name}: {value:.1f} CPU seconds, {100 * (value / seconds['unwatched'] - 1):+.1f} %")
    hardware.write(output, {**about, "epochs": args.epochs, "cpu_seconds": seconds, "runs": runs})


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
