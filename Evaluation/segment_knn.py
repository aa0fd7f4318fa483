"""Classify every pixel by the nearest neighbours of the frozen tokens of a checkpoint, of any training.

    python Evaluation/segment_knn.py out_b/checkpoint-last.pth --data_path /path/to/ADEChallengeData2016

prints mIoU, pixel accuracy and mean class accuracy for each --k, and writes them and those of every class as JSON
beside the checkpoint. Under torchrun each process takes a share of the images; the results are those of one process.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from Evaluation.iou import Confusions
from Evaluation.probes import SHORTEST, has_direction
from Evaluation.tables import result_file, table, write_result
from util import arguments, cli, hardware
from util.checkpoints.hub import locate
from util.data.pixels import Pixels
from util.data.sources.mask_folder import IGNORED, MaskFolder, open_masks
from util.distributed.processes import gather_rows, init_device, world_size
from util.errors import RunError, UserError
from util.files import some
from util.seeding import seed_everything
from util.tracking.run_log import Log, open_log
from util.training.precision import autocast
from util.training.run_state import check_same_images, fingerprint

if TYPE_CHECKING:
    from pretrained import Model

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.

VOTES = 2**27  # numbers that are computed at a time, of similarities or of votes: 512 MB


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("segment_knn.py", description=__doc__.splitlines()[0])
    arguments.add_machine_arguments(parser)
    arguments.add_result(arguments.add_checkpoint_arguments(parser))
    group = parser.add_argument_group("images and masks")
    arguments.add_mask_arguments(group)
    group.add_argument(
        "--eval_resize", choices=("square", "shorter"), default="square",
        help="resize images to the input whatever their aspect ratio, or their shorter side, and slide the input over "
        "the longer one",
    )  # fmt: skip
    arguments.add_block_arguments(parser.add_argument_group("features"))
    add = parser.add_argument_group("neighbours").add_argument
    add("--k", type=arguments.few, nargs="+", default=[1, 3, 10, 30], help="their numbers")
    add("--temperature", type=arguments.number(float, 1e-6, 1e9), default=0.07, help="of their votes")
    add("--max_tokens", type=arguments.positive, default=10**6, metavar="N", help="patches of train that are kept")
    add("--seed", type=arguments.seed_number, default=0, help="chooses these patches (default: %(default)s)")
    return parser


class Bank(NamedTuple):
    """Patches whose classes are known.

    Attributes:
        tokens: (n, C) float32 of length 1.
        labels: (n, p * p) int16, the class of each pixel.
    """

    tokens: Tensor
    labels: Tensor


class Window(NamedTuple):
    """A part of an image: `top` and `left`, and the rows `above` and columns `before` that other windows predict."""

    top: int
    left: int
    above: int
    before: int


class Encoded(NamedTuple):
    """An image in windows of the size of the input.

    Attributes:
        number: of the image in its source.
        tokens: (windows, M, C) float32 of length 1, in raster order.
        windows: see `windows`.
        shape: height and width of the image after its resize.
        mask: (h, w) int64, in the pixels of the image's file.
    """

    number: int
    tokens: Tensor
    windows: list[Window]
    shape: tuple[int, int]
    mask: Tensor


def main(args: argparse.Namespace) -> None:
    """Collect the patches of train, and classify the pixels of val by them.

    Raises:
        UserError: arguments, checkpoint or data do not fit.
        RunError: an image is broken, or features are not finite.
    """
    arguments.check_input_size(args)
    device, log = init_device(args.device, args.dist_timeout), open_log()
    seed_everything(args.seed)
    output = result_file(args, ".segment-knn.json", list)
    locate(args.checkpoint)
    train, val = (open_masks(args.data_path, split, args.classes, args.ignore_label) for split in ("train", "val"))
    check_same_images(train, val)

    from Evaluation.features import chosen_blocks, hash_of, load_model

    model = load_model(args, device)
    torch.set_float32_matmul_precision("highest")  # TF32 would choose other neighbours than a CPU
    blocks = chosen_blocks(args, len(model.layers))
    bank = collect(args, model, train, blocks, log)
    present = {*bank.labels.unique().tolist()}
    if missing := [name for number, name in enumerate(train.classes) if number not in present]:
        log.say(f"no patch of train has one of {len(missing)} classes, so none is predicted: {some(missing)}")
    if min(args.k) > len(bank.tokens):
        raise UserError(f"--k {min(args.k)}: there are {len(bank.tokens)} patches of train")
    if large := [k for k in args.k if k > len(bank.tokens)]:
        log.say(f"--k {' '.join(map(str, large))}: left out, since there are {len(bank.tokens)} patches of train")
    ks = sorted({*args.k} - {*large})
    rows = [
        {"k": k, **found.summary(train.classes)}
        for k, found in evaluate(args, model, val, blocks, bank, ks, log).items()
    ]
    log.say(f"{type(model).__name__}, block {', '.join(map(str, blocks))} of {len(model.layers)}")
    numbers = "miou", "pixel_acc", "mean_acc"
    cells = [[row["k"], *("" if row[n] is None else f"{row[n]:.2f} %" for n in numbers), row["pixels"]] for row in rows]
    log.say(table(["k", "mIoU", "pixel accuracy", "mean class accuracy", "pixels"], *cells))
    about = {
        name: {"root": source.root, "images": len(source.labels), "fingerprint": fingerprint(source)}
        for name, source in (("train", train), ("val", val))
    }
    content = {
        "weights": hash_of(model), "blocks": list(blocks), "data": about, "class_names": train.classes,
        "ignored": train.ignored, "patches": len(bank.tokens), "machine": hardware.describe(device),
    }  # fmt: skip
    write_result(output, vars(args), {**content, "results": rows})


@torch.inference_mode()
def collect(args: argparse.Namespace, model: Model, source: MaskFolder, blocks: range, log: Log) -> Bank:
    """Collect patches of all images on every process, in the order of the images.

    A patch keeps the class of each of its pixels, as in CAPI (Darcet et al. 2025, arXiv 2502.08769). As there, one is
    left out if to have no class is most frequent among its pixels; else those without take the most frequent class. Of
    each image about the same number is kept, drawn by seed and image, so that the bank is that of one process.

    Raises:
        RunError: no patch has a class; or see `encoded`.
    """
    from Segmentation.segmentation_data import nearest

    images, (height, width), side = len(source.labels), arguments.image_size(args), model.patch_size
    device = model.pos_embed.device
    tokens = [torch.zeros(0, model.embed_dim, device=device)]
    labels = [torch.zeros(0, side * side, dtype=torch.int16, device=device)]
    numbers = [torch.zeros(0, 1, dtype=torch.int64, device=device)]
    for image in encoded(args, model, source, blocks, log, "patches of train"):
        mask = nearest(image.mask, image.shape)
        crops = [to_patches(mask[top : top + height, left : left + width], side) for top, left, *_ in image.windows]
        own = torch.cat(crops)  # (windows * M, p * p)
        common = own.mode(dim=1, keepdim=True).values
        known = (common[:, 0] != IGNORED).nonzero()[:, 0]
        quota = (image.number + 1) * args.max_tokens // images - image.number * args.max_tokens // images
        if quota < len(known):
            drawn = np.random.default_rng((args.seed, image.number)).choice(len(known), quota, replace=False)
            known = known[torch.from_numpy(np.sort(drawn)).to(device)]
        tokens.append(image.tokens.flatten(0, 1)[known])  # (windows, M, C) -> (windows * M, C) -> (kept, C)
        labels.append(torch.where(own == IGNORED, common, own)[known].short())
        numbers.append(torch.full((len(known), 1), image.number, device=device))
    order = gather_rows(torch.cat(numbers))[:, 0].argsort(stable=True)
    if not len(order):
        raise RunError(f"{source.root}: no patch has a class")
    log.say(f"{len(order)} patches of {images} images of train are kept")
    return Bank(*(gather_rows(torch.cat(parts))[order] for parts in (tokens, labels)))


@torch.inference_mode()
def evaluate(
    args: argparse.Namespace, model: Model, source: MaskFolder, blocks: range, bank: Bank, ks: list[int], log: Log
) -> dict[int, Confusions]:
    """Predict the class of every pixel of this process's images, and count confusions for each of `ks`.

    A pixel of the image's file takes the prediction that is nearest after the resize.

    Raises:
        RunError: see `encoded`.
    """
    from Segmentation.segmentation_data import nearest

    (height, width), side = arguments.image_size(args), model.patch_size
    confusions = {k: Confusions(len(source.classes), bank.tokens.device) for k in ks}
    for image in encoded(args, model, source, blocks, log, "pixels of val"):
        queries = image.tokens.flatten(0, 1)  # (windows, M, C) -> (windows * M, C)
        for k, predicted in vote(bank, queries, ks, args.temperature, len(source.classes)).items():
            whole = predicted.new_empty(image.shape)
            parts = predicted.chunk(len(image.windows))
            for (top, left, above, before), patches in zip(image.windows, parts, strict=True):
                pixels = from_patches(patches, (height // side, width // side))
                whole[top + above : top + height, left + before : left + width] = pixels[above:, before:]
            confusions[k].add(nearest(whole, image.mask.shape), image.mask)
    return confusions


def vote(bank: Bank, queries: Tensor, ks: list[int], temperature: float, classes: int) -> dict[int, Tensor]:
    """Let the nearest patches by cosine similarity s vote on each pixel with weights exp(s / temperature).

    Each pixel of a patch is voted on by the pixels at its place in the neighbours.

    Args:
        bank: of n patches.
        queries: (m, C) float32 of length 1.
        ks: numbers of neighbours, at most n, sorted.
        temperature: of the weights.
        classes: their number.

    Returns:
        For each of ks the class of each pixel, (m, p * p) int16.
    """
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    pixels = bank.labels.shape[1]
    for part in queries.split(max(1, VOTES // max(len(bank.tokens), classes * pixels))):
        similarity, nearest = (part @ bank.tokens.T).topk(ks[-1])  # (b, max k), sorted
        # relative to the nearest one, whose weight is 1: a low temperature would overflow
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = part.new_zeros(len(part), classes, pixels)
        for number in range(ks[-1]):  # one neighbour after another, so that a GPU adds in the same order each time
            labels = bank.labels[nearest[:, number]].long()[:, None]  # (b, 1, p * p)
            votes.scatter_add_(1, labels, weights[:, number, None, None].expand_as(labels))
            if number + 1 in found:
                found[number + 1].append(votes.argmax(dim=1).short())
    return {k: torch.cat(parts) for k, parts in found.items()}


def encoded(
    args: argparse.Namespace, model: Model, source: MaskFolder, blocks: range, log: Log, title: str
) -> Iterator[Encoded]:
    """Yield this process's share of the images of a source; batches do not depend on the number of processes.

    Raises:
        RunError: an image is broken, or a token has no direction: it is zero, or not finite.
    """
    from Evaluation.features import encode_patches
    from Segmentation.segmentation_data import SegmentationDataset, WholeImage
    from util.data.loaders import ChunkSampler, chunk_loader

    size, device = arguments.image_size(args), model.pos_embed.device
    dataset = SegmentationDataset(source, WholeImage(size, Pixels.of(args), args.eval_resize == "square"))
    loader = chunk_loader(dataset, dataset, args, device, args.batch_size)
    loader.max_broken, loader.advice = 0, "repair or remove it"
    progress = log.progress(title, len(loader))
    for numbers, (images, masks) in zip(ChunkSampler(len(dataset), args.batch_size).chunks, loader, strict=True):
        shapes = [(image.shape[1], image.shape[2]) for image in images]  # height and width
        cut = [windows(shape, size) for shape in shapes]
        crops = [
            image[:, top : top + size[0], left : left + size[1]]
            for image, own in zip(images, cut, strict=True)
            for top, left, *_ in own
        ]
        parts = []
        for start in range(0, len(crops), args.batch_size):
            with autocast(device):
                parts.append(encode_patches(model, torch.stack(crops[start : start + args.batch_size]), blocks))
        tokens = torch.cat(parts).split([len(own) for own in cut])
        for number, shape, mask, own, features in zip(numbers, shapes, masks, cut, tokens, strict=True):
            if not has_direction(features).all():
                raise RunError(f"features of {source.name(number)} are zero or not finite")
            unit = F.normalize(features, dim=-1, eps=SHORTEST)
            yield Encoded(number, unit, own, shape, mask)
        progress.update(len(images) * world_size())
    progress.close()


def windows(shape: tuple[int, int], size: tuple[int, int]) -> list[Window]:
    """Return the fewest windows of a size that cover an image, at even distances, from the top left on.

    Where two overlap, each predicts the half on its side.
    """
    axes: list[list[tuple[int, int]]] = []
    for whole, side in zip(shape, size, strict=True):
        count = math.ceil(whole / side)
        starts = [round(number * (whole - side) / max(1, count - 1)) for number in range(count)]
        covered = [0, *((last + side - start) // 2 for last, start in pairwise(starts))]
        axes.append([*zip(starts, covered, strict=True)])
    return [Window(top, left, above, before) for top, above in axes[0] for left, before in axes[1]]


def to_patches(mask: Tensor, side: int) -> Tensor:
    """Cut a mask into patches in raster order: (rows * p, columns * p) -> (rows * columns, p * p)."""
    grid = mask.unflatten(0, (-1, side)).unflatten(2, (-1, side))  # (rows, p, columns, p)
    return grid.transpose(1, 2).flatten(2).flatten(0, 1)  # (rows, columns, p, p) -> (rows * columns, p * p)


def from_patches(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Do the reverse of `to_patches` for rows and columns of patches."""
    side = math.isqrt(patches.shape[1])
    parts = patches.view(*grid, side, side).transpose(1, 2)  # (rows * columns, p * p) -> (rows, p, columns, p)
    return parts.flatten(2).flatten(0, 1)  # (rows * p, columns * p)


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
