"""Pretrain a small ARM on real digits, finetune and evaluate it, and compare with random initial weights.

    make demo

runs under torchrun the scripts that also train ARM-base on ImageNet, prints a table, and writes curves and pictures to
demo_out/.
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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.digits import unpack_digits
from demo.pictures import draw_curves, draw_predictions
from main_pretrain import build_model
from tools import plot_log
from util import cli, launch
from util.checkpoints import checkpoint_file
from util.errors import as_user_error
from util.launch import ROOT
from util.seeding import seed_everything

OUT = ROOT / "demo_out"
DATA = OUT / "digits"

# 24 x 24 pixels: 6 x 6 patches in 3 x 3 clusters. Digits are no photographs: no flips, mild crops, no erasing.
MODEL = "--model arm_tiny_pz16 --embed_dim 96 --depth 6 --input_size 24 --patch_size 4 --batch_size 16 --num_workers 1"
RECIPE = "--lr 1e-3 --warmup_epochs 1 --hflip 0 --scale 0.6 1"
PRETRAIN = "--cluster_size 2 --dec_embed_dim 64 --norm_pix_loss --epochs 48"
FINETUNE = "--nb_classes 10 --epochs 4 --layer_decay 0.9 --aa none --reprob 0 --dist_eval"


def torchrun(script: str, arguments: str) -> str:
    """Run a script with two processes (with one on a single GPU); show and return its output."""
    gpus = torch.cuda.device_count()
    processes = min(2, gpus) if gpus else 2
    command = launch.command_line(script, f"{arguments} --data_path {DATA}", processes).replace(f"{ROOT}/", "")
    print(f"\n$ {command}", flush=True)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    process = launch.start(command, {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE, text=True)
    printed = ""
    for line in process.stdout or ():
        print(line, end="", flush=True)
        printed += line
    if process.wait():
        sys.exit(process.returncode)
    return printed


def evaluate(run: str) -> float:
    """Return the top-1 accuracy, in percent, of a finetuned checkpoint by the script's own --eval."""
    printed = torchrun("Finetuning/main_finetune.py", f"--eval --dist_eval --resume {OUT}/{run}/checkpoint-last.pth")
    return float(re.findall(r"^model: top-1 ([\d.]+) %.* on 1000 images$", printed, re.MULTILINE)[0])


def write_random_encoder(pretrained: Path, path: Path) -> None:
    """Write the initial weights of the run that wrote a pretraining checkpoint."""
    args = checkpoint_file.read(pretrained)["args"]
    seed_everything(args.seed)
    torch.save({"model": build_model(args).state_dict(), "args": args}, path)


def probe(path: Path) -> tuple[float, float]:
    """Return the accuracy, in percent, of 20 nearest neighbours and of a linear probe on frozen features."""
    torchrun("Evaluation/probe.py", f"{path} --seeds 2 --num_workers 1 --output {OUT}/probe.json")
    rows = {row["probe"]: row["acc1"] for row in json.loads((OUT / "probe.json").read_text())["results"]}
    return rows["20-NN"], rows["linear"]


def main(args: argparse.Namespace) -> None:
    """Run the demo, which has no arguments.

    Raises:
        UserError: its folder cannot be created.
    """
    start = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)  # of an earlier demo
    with as_user_error(OSError):
        OUT.mkdir()
    unpack_digits(DATA)
    torchrun("main_pretrain.py", f"{MODEL} {RECIPE} {PRETRAIN} --output_dir {OUT}/pretrain")
    checkpoint = OUT / "pretrain" / "checkpoint-last.pth"
    finetune = f"{MODEL} {RECIPE} {FINETUNE}"
    torchrun("Finetuning/main_finetune.py", f"{finetune} --finetune {checkpoint} --output_dir {OUT}/finetune")
    accuracy = evaluate("finetune")
    torchrun("Finetuning/main_finetune.py", f"{finetune} --output_dir {OUT}/scratch")
    accuracy_scratch = evaluate("scratch")

    write_random_encoder(checkpoint, OUT / "random.pth")
    knn, linear = probe(checkpoint)
    knn_random, linear_random = probe(OUT / "random.pth")

    logs = {run: plot_log.read(OUT / run) for run in ("pretrain", "finetune", "scratch")}
    draw_curves(logs, OUT / "curves.png")
    draw_predictions(checkpoint, DATA / "val", OUT / "predictions.png")
    table = f"""
| 1,000 held-out digits | top-1 after {len(logs["finetune"])} epochs |
| --- | --- |
| finetuned from {len(logs["pretrain"])} epochs of autoregressive pretraining | {accuracy:.1f} % |
| the same finetuning from random weights | {accuracy_scratch:.1f} % |
| frozen pretrained encoder: 20 nearest neighbours, linear probe | {knn:.1f} %, {linear:.1f} % |
| frozen random encoder: 20 nearest neighbours, linear probe | {knn_random:.1f} %, {linear_random:.1f} % |

{time.monotonic() - start:.0f} s in all; {OUT.name}/curves.png and {OUT.name}/predictions.png show the runs.
"""
    print(table)
    (OUT / "table.md").write_text(table)
    if accuracy < 95 or accuracy <= accuracy_scratch:
        sys.exit("expected at least 95 % from pretraining, and more than from random weights")


if __name__ == "__main__":
    cli.run_main(main, cli.Parser("demo.py", description=__doc__.splitlines()[0]))
