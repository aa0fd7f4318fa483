"""Measure how many images a second each loader delivers, for the transforms of pretraining and finetuning.

    python benchmarks/bench_data.py

makes 1,024 JPEGs (500 x 375, quality 93) of the two photographs that scikit-learn carries, or takes a folder
(`--data_path`), packs them with tools.pack_images, and loads epochs with the loaders of training: first with the
training process and one worker on one core, then with as many workers as there are cores. Rounds interleave, as noise
varies with time. On one core the batches of --loader fast are also finished, as when the training itself runs on that
core: the core then does what is otherwise left to a GPU. DALI's CPU pipeline (`pip install nvidia-dali-cuda130`), if
installed, is compared in pretraining. The other parts measure the memory of a worker over 10 epochs, the training
device's share of the work, the share of crops that must be enlarged, and with a GPU (or `--train MODEL`) the images/s
of training from shards, as a fraction of those with random data. `--parts` chooses parts.
Expected on 2 cores of an AMD EPYC (Zen 4), relative to the released pipeline in Pillow: fast 2.9 and shards 5.3 for
pretraining, 3.6 and 6.4 for finetuning.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main_pretrain
from benchmarks.bench_augment import clocks
from benchmarks.bench_train import RandomBatches
from benchmarks.command_line import make_parser
from engine_pretrain import train_one_epoch
from Finetuning import main_finetune
from ops.kernel_choice import should_compile
from tools import pack_images
from util import arguments, cli, hardware
from util.data import datasets, decode, loaders, transforms
from util.data.device_loader import DeviceLoader
from util.errors import UserError
from util.tracking.run_log import Log
from util.training.run_state import Run

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # on Linux
CPU = torch.device("cpu")
RECIPES = {"pretrain": main_pretrain, "finetune": main_finetune}
SIZES = {"pretrain": 192, "finetune": 224}
TRANSFORMS = {"pretrain": transforms.pretrain_transform, "finetune": transforms.finetune_transform}
PHOTOGRAPHS = {"original": (500, 375), "packed": (341, 256)}  # width and height, before and after tools.pack_images
RELEASED = "PIL, as released"
FINISHED = ", finished on the CPU"
PARTS = ("loading", "memory", "device", "crops", "training")
Epoch = Callable[[], int]  # loads an epoch, returns its number of images


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    numbers = {"batch_size": (64, "images"), "rounds": (7, "timed epochs, after one more")}
    parser = make_parser("bench_data.py", __doc__, numbers, device=False)
    text = "folder with train/, instead of images that are made"
    parser.add_argument("--data_path", type=arguments.nonempty, help=text)
    images = arguments.number(int, 4, 10**6)
    parser.add_argument("--images", type=images, default=1024, help="to make (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="what to measure (default: all)")
    model = "arm_base_pz16" if torch.cuda.is_available() else None
    text = "pretrain this model from shards and from random data (default: %(default)s)"
    parser.add_argument("--train", metavar="MODEL", default=model, help=text)
    return parser


def make_images(folder: Path, count: int) -> None:
    """Write random crops of photographs as JPEGs of 500 x 375 in four classes."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427
    draw = random.Random(0)
    for number in range(count):
        photo = photographs[number % len(photographs)]
        height = draw.uniform(0.6, 1) * photo.height
        width = height * 4 / 3
        left, top = draw.uniform(0, photo.width - width), draw.uniform(0, photo.height - height)
        image = photo.resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        path = folder / "train" / str(number % 4) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=93)


def recipe_arguments(recipe: str, *more: object) -> argparse.Namespace:
    """Return the arguments of a recipe's script; `more` is `--data_path`, then other words of the command line."""
    words = ["--input_size", SIZES[recipe], "--data_path", *more]
    args = RECIPES[recipe].get_args_parser().parse_args([str(word) for word in words])
    arguments.check_arguments(args)
    return args


def loader_of(recipe: str, device: torch.device, *words: object) -> DeviceLoader:
    """Return the training loader of a recipe's script; for the words see `recipe_arguments`."""
    args = recipe_arguments(recipe, *words)
    transform = TRANSFORMS[recipe](arguments.image_size(args), args)
    dataset = datasets.image_dataset(args.data_path, "train", transform, args.loader)
    return loaders.train_loader(dataset, args, device)


def open_as_released(path: str) -> Image.Image:
    """Open an image as torchvision's `ImageFolder` does, but no format for which Pillow runs another program."""
    with open(path, "rb") as file:
        return Image.open(file, formats=decode.KNOWN).convert("RGB")


def released_epochs(recipe: str, *words: object) -> Epoch:
    """Return epochs of the released pipeline: ImageFolder, a transform of torchvision or timm in Pillow, DataLoader."""
    args = recipe_arguments(recipe, *words)
    transform = TRANSFORMS[recipe](arguments.image_size(args), args)
    dataset = ImageFolder(f"{words[0]}/train", transform, loader=open_as_released)
    loader = DataLoader(
        dataset, args.batch_size, True, num_workers=args.num_workers, persistent_workers=True, drop_last=True
    )
    return lambda: sum(len(imgs) for imgs, _ in loader)


def epochs_of(loader: DeviceLoader, finished: bool = False) -> Epoch:
    """Return epochs as the training process receives them: uint8 with --loader fast, float32 with --loader pil.

    If `finished`, the training device then does its part, as in training.
    """
    numbers = itertools.count()

    def epoch() -> int:
        loader.sampler.set_epoch(next(numbers))
        if finished:
            return sum(len(images) for images, _ in loader)
        return sum(len(pixels) for (pixels, _), _ in loader.loader)

    return epoch


def dali_epochs(folder: Path, batch_size: int, threads: int) -> Epoch:
    """Return epochs of DALI's CPU pipeline for pretraining: ROI decoding, resize, flip, normalisation.

    Raises:
        ImportError: it is not installed.
    """
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    mean, std = ([255 * value for value in values] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, seed=0)
    def pipeline() -> tuple:
        files, labels = fn.readers.file(file_root=str(folder / "train"), random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(
            files, device="cpu", random_area=[0.2, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, size=[192, 192], interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop_mirror_normalize(images, mirror=fn.random.coin_flip(), mean=mean, std=std), labels

    loader = DALIGenericIterator(
        pipeline(), ["images", "labels"], reader_name="files", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
    )
    return lambda: sum(len(batch["images"]) for (batch,) in loader)


def rates(epochs: dict[str, Epoch], rounds: int) -> dict[str, float]:
    """Return the images a second of each, the median over rounds."""
    measured: dict[str, list[float]] = {name: [] for name in epochs}
    for _ in range(rounds + 1):
        for name, epoch in epochs.items():
            seconds, images = hardware.time_once(epoch, CPU)
            measured[name].append(images / seconds)
    return {name: statistics.median(values[1:]) for name, values in measured.items()}


def compare(recipe: str, folder: Path, shards: Path, cores: list[int], args: argparse.Namespace) -> dict[str, float]:
    """Return the images a second of each loader on some cores; on a single one, also `FINISHED` by it."""
    os.sched_setaffinity(0, cores)
    words = ["--batch_size", args.batch_size, "--num_workers", len(cores)]
    paths = {
        "--loader pil": (folder, "--loader", "pil"),
        "--loader fast": (folder, "--loader", "fast"),
        "fast, packed shards": (f"wds:{shards}", "--loader", "fast"),
    }
    epochs = {RELEASED: released_epochs(recipe, folder, *words)}
    for name, path in paths.items():
        loader = loader_of(recipe, CPU, *path, *words)
        epochs[name] = epochs_of(loader)
        if len(cores) == 1 and "pil" not in path:  # which leaves nothing to the device
            epochs[name + FINISHED] = epochs_of(loader, finished=True)
    if recipe == "pretrain":
        try:
            epochs["DALI"] = dali_epochs(folder, args.batch_size, len(cores))
        except ImportError:
            print("DALI is not installed: pip install nvidia-dali-cuda130")
    try:
        return rates(epochs, args.rounds)
    finally:
        os.sched_setaffinity(0, CORES)


def loading(recipe: str, folder: Path, shards: Path, cores: list[int], args: argparse.Namespace) -> dict:
    """Compare the loaders, print a table, return its content for the JSON file."""
    found = compare(recipe, folder, shards, cores, args)
    print(f"\n{f'{recipe}, {len(cores)} cores':<42}{'images/s a core':>17}{'x PIL':>8}")
    rows = {}
    for name, rate in found.items():
        rows[name] = {"images_per_second_per_core": rate / len(cores), "times_released": rate / found[RELEASED]}
        print(f"{name:<42}{rate / len(cores):>17.0f}{rate / found[RELEASED]:>8.2f}")
    return {"recipe": recipe, "cores": len(cores), "paths": rows}


def worker_memory(recipe: str, folder: Path, batch_size: int, epochs: int = 10) -> list[float]:
    """Return the private memory of a worker, in MB, after each epoch with --loader fast."""
    before = set(multiprocessing.active_children())
    epoch = epochs_of(loader_of(recipe, CPU, folder, "--batch_size", batch_size, "--num_workers", 1))
    held = []
    for _ in range(epochs):
        epoch()
        (worker,) = set(multiprocessing.active_children()) - before
        rollup = Path(f"/proc/{worker.pid}/smaps_rollup").read_text()
        held.append(sum(int(kb) for kb in re.findall(r"Private_\w+: +(\d+) kB", rollup)) / 1024)
    return held


def device_share(recipe: str, folder: Path, batch_size: int, device: torch.device) -> float:
    """Return the milliseconds an image that `finish` takes on the training device."""
    loader = loader_of(recipe, device, folder, "--batch_size", batch_size, "--num_workers", 0)
    batch, _ = next(iter(loader.loader))
    times = [clocks(partial(loader.finish, batch, device), device)["wall"] for _ in range(10)]
    return 1000 * statistics.median(times) / batch_size


def enlarged_crops(recipe: str, width: int, height: int, draws: int = 100_000) -> dict[str, float]:
    """Return the share of the area below which a crop has fewer pixels than the input, and the share of such crops."""
    size = SIZES[recipe]
    crop = TRANSFORMS[recipe]((size, size), recipe_arguments(recipe, "unread")).transforms[0]
    photograph = Image.new("L", (width, height))
    random.seed(0)  # timm's crops
    torch.manual_seed(0)  # torchvision's
    boxes = [crop.get_params(photograph, crop.scale, crop.ratio) for _ in range(draws)]
    enlarged = sum(h * w < size * size for _, _, h, w in boxes)
    return {"area": size * size / (width * height), "crops": enlarged / draws}


def training(model: str, shards: Path, batch_size: int, rounds: int) -> dict[str, float]:
    """Return the images a second of pretraining from packed shards and with random data."""
    device = hardware.default_device()
    words = [f"wds:{shards}", "--batch_size", batch_size, "--num_workers", len(CORES)]
    args = recipe_arguments("pretrain", *words, "--model", model, "--norm_pix_loss")
    network = main_pretrain.build_model(args).to(device)
    if should_compile(None, device):
        network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, fused=True)
    loader = loader_of("pretrain", device, *words)
    run = Run(args, network, optimizer)

    def epochs(batches: DeviceLoader) -> Epoch:
        def epoch() -> int:
            run.samples = 0
            train_one_epoch(network, batches, run, device, Log())
            return len(batches) * batch_size

        return epoch

    random_data = RandomBatches(batch_size, SIZES["pretrain"], 1, len(loader), device)
    return rates({"random data": epochs(random_data), "shards": epochs(loader)}, rounds)


def main(args: argparse.Namespace) -> None:
    """Measure, print the tables, write everything as JSON.

    Raises:
        UserError: processes cannot be kept on a core, or there is no model to train.
    """
    if not CORES:
        raise UserError("bench_data.py keeps processes on single cores, which only Linux can")
    parts = args.parts or (PARTS if args.train else PARTS[:-1])
    if "training" in parts and not args.train:
        get_args_parser().error("--parts training needs --train MODEL where there is no GPU")
    torch.set_num_threads(1)  # of the training process
    about = hardware.describe(hardware.default_device()) | {"cores": len(CORES)}
    output = hardware.result_file("-".join(["data", *(args.parts or ())]), about, args.output)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    with tempfile.TemporaryDirectory() as temporary:
        folder, shards = Path(args.data_path or f"{temporary}/images"), Path(temporary, "shards")
        if not args.data_path:
            make_images(folder, args.images)
        pack_images.main(pack_images.get_args_parser().parse_args([str(folder), str(shards), "--short_side", "256"]))
        results: dict[str, Any] = {}
        if "loading" in parts:
            of_cores = [CORES[:1]] + [CORES] * (len(CORES) > 1)
            results["loading"] = [loading(r, folder, shards, cores, args) for r in RECIPES for cores in of_cores]
        for recipe in RECIPES:
            if "memory" in parts:
                held = worker_memory(recipe, folder, args.batch_size)
                results.setdefault("worker_mb", {})[recipe] = held
                print(f"\n{recipe}: a worker holds {held[0]:.0f} MB after 1 epoch, {held[-1]:.0f} MB after {len(held)}")
            if "device" in parts:
                shares = results.setdefault("device_ms_per_image", {})[recipe] = {}
                shares["cpu"] = device_share(recipe, folder, args.batch_size, CPU)
                print(f"{recipe}: what the training device does takes {shares['cpu']:.2f} ms an image on one core")
                if torch.cuda.is_available():
                    shares["cuda"] = device_share(recipe, folder, args.batch_size, torch.device("cuda"))
                    print(f"{recipe}: and {shares['cuda']:.4f} ms on the GPU")
            if "crops" in parts:
                enlarged = {name: enlarged_crops(recipe, *pixels) for name, pixels in PHOTOGRAPHS.items()}
                results.setdefault("enlarged", {})[recipe] = enlarged
                for name, found in enlarged.items():
                    print(f"{recipe}, {name}: crops below {found['area']:.1%} of the area, {found['crops']:.1%} of all")
        if "training" in parts:
            found = training(args.train, shards, args.batch_size, args.rounds)
            fraction = found["shards"] / found["random data"]
            results["training"] = {"model": args.train, "images_per_second": found, "fraction": fraction}
            print(f"\n{args.train} with random data: {found['random data']:.0f} images/s")
            print(f"from packed shards on {len(CORES)} cores: {found['shards']:.0f}, which is {100 * fraction:.0f} %")
    hardware.write(output, {**about, **results})


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
