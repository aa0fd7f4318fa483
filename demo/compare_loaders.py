"""Compare the accuracy of training with `--loader fast` and `--loader pil`: the demo's recipe on JPEGs, several seeds.

    python demo/compare_loaders.py

stores the demo's digits as JPEGs (both loaders decode other formats with Pillow), and for every seed and loader
pretrains, finetunes with RandAugment and random erasing, and reports the accuracy on the held-out digits. The runs of a
seed draw the same random numbers and differ in pixels only.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.demo import FINETUNE, MODEL, PRETRAIN, RECIPE
from demo.digits import unpack_digits
from util import arguments, cli, hardware, launch
from util.errors import RunError


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("compare_loaders.py", description=__doc__.splitlines()[0])
    seeds = arguments.number(int, 2, 1000)
    parser.add_argument("--seeds", type=seeds, default=3, help="at least 2 (default: %(default)s)")
    parser.add_argument("--epochs", type=arguments.positive, default=12, help="of pretraining (default: %(default)s)")
    parser.add_argument("--finetune_epochs", type=arguments.positive, default=6, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results/)")
    return parser


def make_jpegs(folder: Path, quality: int = 95) -> None:
    """Write the demo's digits as JPEG files."""
    unpack_digits(folder)
    for path in folder.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), quality=quality)
        path.unlink()


def script(name: str, arguments: str, out: Path) -> None:
    """Run a training script on one core.

    Raises:
        RunError: it failed.
    """
    command = launch.command_line(name, f"{arguments} --output_dir {out}", 1)
    with out.with_name(out.name + ".txt").open("w") as log:
        status = launch.start(command, {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log).wait()
    if status:
        raise RunError(f"{name} failed with exit status {status}: {log.name} says why")


def train(folder: Path, loader: str, seed: int, args: argparse.Namespace) -> dict:
    """Pretrain and finetune; return the loss of pretraining and the accuracy of finetuning."""
    common = f"{MODEL} {RECIPE} --data_path {folder}/digits --loader {loader} --seed {seed}"
    pre, fine = folder / f"{loader}-{seed}-pre", folder / f"{loader}-{seed}-fine"
    script("main_pretrain.py", f"{common} {PRETRAIN} --batch_size 16 --lr 1e-3 --epochs {args.epochs}", pre)
    more = "--batch_size 16 --layer_decay 0.9 --aa rand-m9-mstd0.5-inc1 --reprob 0.25"
    more += f" --epochs {args.finetune_epochs} --finetune {pre}/checkpoint-last.pth"
    script("Finetuning/main_finetune.py", f"{common} {FINETUNE} {more}", fine)
    rows = [json.loads(line) for log in (pre, fine) for line in (log / "log.txt").read_text().splitlines()]
    found = {"pretrain_loss": rows[args.epochs - 1]["train_loss"], "top1": rows[-1]["test_acc1"]}
    print(f"seed {seed}, --loader {loader}: loss {found['pretrain_loss']:.4f}, top-1 {found['top1']:.1f} %", flush=True)
    return {"loader": loader, "seed": seed, **found}


def main(args: argparse.Namespace) -> None:
    """Train with as many runs at a time as there are cores, print the table, write JSON."""
    about = hardware.describe(torch.device("cpu"))
    output = hardware.result_file("loaders", about, args.output)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_jpegs(folder / "digits")
        with ThreadPoolExecutor(hardware.available_cores()) as pool:
            settings = itertools.product(range(args.seeds), ("fast", "pil"))
            tasks = [pool.submit(train, folder, loader, seed, args) for seed, loader in settings]
            runs = [task.result() for task in tasks]
    differences = [fast["top1"] - pil["top1"] for fast, pil in zip(runs[::2], runs[1::2], strict=True)]
    for loader in ("fast", "pil"):
        top1 = [run["top1"] for run in runs if run["loader"] == loader]
        print(f"--loader {loader}: top-1 {statistics.mean(top1):.2f} % (deviation {statistics.stdev(top1):.2f})")
    print(f"fast - pil: {statistics.mean(differences):+.2f} (deviation {statistics.stdev(differences):.2f})")
    report = {**about, "epochs": args.epochs, "finetune_epochs": args.finetune_epochs, "runs": runs}
    hardware.write(output, report)


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
