"""Pretrain a small ARM on handwritten digits, and compare it with random weights, frozen and finetuned with few labels.

    make demo

runs the scripts that also train ARM-base on ImageNet, prints a table, and writes curves and pictures to demo_out/.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.digits import few_labels, unpack_digits
from demo.pictures import draw_curves, draw_predictions
from Evaluation import probe
from Finetuning import main_finetune
from main_pretrain import build_model
from tools import plot_log
from util import arguments, cli, hardware, launch
from util.checkpoints import checkpoint_file
from util.errors import RunError, as_user_error
from util.files import write_json
from util.launch import ROOT
from util.seeding import seed_everything

OUT = Path("demo_out")
DATA = OUT / "digits"  # 4,000 digits to train, 1,000 to evaluate
FEW = OUT / "few_labels"  # 500 of the 4,000, and the same 1,000

# 24 x 24 pixels: 6 x 6 patches in 3 x 3 clusters. Digits are no photographs: no flips, mild crops, no erasing.
MODEL = "--model arm_tiny_pz16 --embed_dim 96 --depth 6 --input_size 24 --patch_size 4 --num_workers 1"
RECIPE = "--warmup_epochs 1 --hflip 0 --scale 0.6 1"
PRETRAIN = "--cluster_size 2 --dec_embed_dim 64 --norm_pix_loss --lr 2e-3 --epochs 12"
FINETUNE = "--nb_classes 10 --lr 1e-3 --epochs 16 --layer_decay 0.75 --aa none --reprob 0 --dist_eval"
# Title and seconds of each step, as measured on 2 cores: the time that is left is computed from them.
STEPS = (
    ("pretrain without labels", 115),
    ("evaluate the frozen features of pretrained and of random weights", 15),
    ("finetune the pretrained weights with 50 labels a class", 50),
    ("finetune random weights with the same labels", 50),
    ("evaluate the finetuned checkpoint again, and draw", 5),
)
# Points that pretraining adds at least, by row of the table. After finetuning, the gain of single seeds differs by more
# than it is on average: only a clear loss is an error.
LEAST = 20, 12, -5


class Progress:
    """The progress of the demo: which step of `STEPS` runs, and how long the rest takes."""

    def __init__(self) -> None:
        self.began, self.step = time.monotonic(), 0

    def left(self, share: float) -> str:
        """Return the number of the step and the minutes left, after a share (0 to 1) of the step."""
        seconds = [seconds for _, seconds in STEPS]
        done = sum(seconds[: self.step - 1]) + share * seconds[self.step - 1]
        # this machine's speed, once more than a few seconds tell it
        speed = self.seconds() / done if done > 20 else 1.0
        left = round(speed * (sum(seconds) - done))
        return f"[{self.step}/{len(STEPS)}, {left // 60}:{left % 60:02d} left]"

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.began

    def next(self) -> None:
        """Begin the next step: print its number, its title and the time that is left."""
        self.step += 1
        print(f"\n{self.left(0)} {STEPS[self.step - 1][0]}", flush=True)

    def torchrun(self, script: str, words: str, batch_size: int) -> None:
        """Run a training script with two processes (with one on a single GPU); show its output with the progress.

        Args:
            script: to run.
            words: its arguments, but for the batch size.
            batch_size: of all processes together.

        Raises:
            RunError: it failed.
        """
        gpus = torch.cuda.device_count()
        processes = min(2, gpus) if gpus else 2
        command = launch.command_line(script, f"{words} --batch_size {batch_size // processes}", processes)
        show(command)
        threads = max(1, hardware.available_cores() // processes)
        process = launch.start(command, {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE, text=True)
        epochs, epoch = int(re.findall(r"--epochs (\d+)", words)[-1]), 0.0
        for line in process.stdout or ():
            if at := re.match(r"epoch (\d+)(?:  \[(\d+)/(\d+)\]|: loss)", line):
                epoch = int(at[1]) + (int(at[2]) / int(at[3]) if at[2] else 1)
            print(self.left(epoch / epochs), line, end="", flush=True)
        if process.wait():
            raise RunError(f"{script} failed with exit status {process.returncode}")


def call(script: str, module: ModuleType, words: str) -> None:
    """Run a script in this process, which saves a start of Python; raises what its `main` raises."""
    show(f"python {script} {words}")
    module.main(module.get_args_parser().parse_args(words.split()))


def show(command: str) -> None:
    """Print a command as a user types it in the repository."""
    print(f"$ {command}", flush=True)


def write_random_encoder(pretrained: Path, path: Path) -> None:
    """Write the initial weights of the run that wrote a pretraining checkpoint."""
    args = checkpoint_file.read(pretrained)["args"]
    seed_everything(args.seed)
    torch.save({"model": build_model(args).state_dict(), "args": args}, path)


def probe_frozen(checkpoint: Path) -> dict[str, float]:
    """Return the accuracies, in percent, of 20 nearest neighbours and of a linear probe on frozen features."""
    output = checkpoint.with_suffix(".probe.json")
    words = f"{checkpoint} --data_path {DATA} --seeds 2 --num_workers 1 --output {output}"
    call("Evaluation/probe.py", probe, words)
    return {row["probe"]: row["acc1"] for row in json.loads(output.read_text())["results"]}


def main(args: argparse.Namespace) -> None:
    """Run the demo.

    Raises:
        UserError: its folder cannot be created, or mlxtend is not installed.
        RunError: a step failed, or pretraining is not better than random weights by `LEAST`.
    """
    progress = Progress()
    os.chdir(ROOT)  # the commands are those that a user types there
    shutil.rmtree(OUT, ignore_errors=True)  # of an earlier demo
    with as_user_error(OSError):
        OUT.mkdir()
    minutes = round(sum(seconds for _, seconds in STEPS) / 60)
    print(f"{len(STEPS)} steps, about {minutes} minutes on 2 CPU cores; everything is written to {OUT}/", flush=True)
    unpack_digits(DATA)
    few_labels(DATA, FEW)
    pretrained, random = OUT / "pretrain" / "checkpoint-last.pth", OUT / "random.pth"

    progress.next()
    seed = f"--seed {args.seed}"
    words = f"{MODEL} {RECIPE} {PRETRAIN} {seed} --data_path {DATA} --output_dir {pretrained.parent}"
    progress.torchrun("main_pretrain.py", words, 64)

    progress.next()
    write_random_encoder(pretrained, random)
    frozen = {"pretrained": probe_frozen(pretrained), "random": probe_frozen(random)}

    for name, start in (("pretrained", f"--finetune {pretrained} "), ("random", "")):
        progress.next()
        words = f"{MODEL} {RECIPE} {FINETUNE} {start}{seed} --data_path {FEW} --output_dir {OUT}/finetune_{name}"
        progress.torchrun("Finetuning/main_finetune.py", words, 16)

    progress.next()
    finetuned = OUT / "finetune_pretrained" / "checkpoint-last.pth"
    call("Finetuning/main_finetune.py", main_finetune, f"--eval --resume {finetuned} --data_path {DATA}")
    logs = {run: plot_log.read(OUT / run) for run in ("pretrain", "finetune_pretrained", "finetune_random")}
    last = {name: logs[f"finetune_{name}"][-1]["test_acc1"] for name in frozen}
    table = {
        "frozen features, 20 nearest neighbours": {name: rows["20-NN"] for name, rows in frozen.items()},
        "frozen features, linear probe": {name: rows["linear"] for name, rows in frozen.items()},
        "finetuned with 50 labels a class": last,
    }
    draw_curves(logs, table, OUT / "curves.png")
    draw_predictions(pretrained, DATA / "val", OUT / "predictions.png")
    seconds = round(progress.seconds())
    lines = ["top-1 on 1,000 held-out digits | pretrained | random weights", "--- | --- | ---"]
    lines += [f"{title} | {row['pretrained']:.1f} % | {row['random']:.1f} %" for title, row in table.items()]
    text = "".join(f"| {line} |\n" for line in lines)
    print(f"\n{text}\n{seconds} s; {OUT}/curves.png and {OUT}/predictions.png show the runs", flush=True)
    (OUT / "table.md").write_text(text)
    about = hardware.describe(hardware.default_device())
    write_json(OUT / "results.json", {**about, "seed": args.seed, "seconds": seconds, "top1": table})
    for (title, row), least in zip(table.items(), LEAST, strict=True):
        if (gain := row["pretrained"] - row["random"]) < least:
            raise RunError(f"{title}: pretraining adds {gain:.1f} points, not at least {least}")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("demo.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=arguments.seed_number, default=0, help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
