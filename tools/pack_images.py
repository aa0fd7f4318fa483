"""Re-encode images into tar shards, once, for faster training.

    python tools/pack_images.py /path/to/ImageNet /path/to/shards --short_side 256

writes shards/train/*.tar and, if there are images to validate, shards/val/*.tar in the webdataset layout, which
`--data_path wds:/path/to/shards` reads. Grey and RGB training images with a shorter side above 256 are resized
(bicubic) and stored as JPEG, with their orientation; all others, and all images of val/, are stored unchanged. Instead
of a folder, csv:FILE, wds:FOLDER or hfds:NAME is packed as well. The same command resumes a run that was stopped.
"""

import argparse
import errno
import io
import os
import stat
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image
from tqdm import tqdm

from util import arguments, cli, hardware
from util.data import arrays, decode
from util.data.decode import ARRAYS, SUFFIXES, BrokenImage
from util.data.device_loader import allowed_broken, list_broken, too_many_broken
from util.data.sources.folders import Folder
from util.data.sources.image_files import ImageFiles
from util.data.sources.readers import READERS, open_source, path_of
from util.data.sources.source import NoSplit, Source
from util.data.sources.tar_shards import TarShards
from util.errors import RunError, UserError, as_user_error
from util.files import printable, read_json, replacing, write_json
from util.lock import lock_folder
from util.training.run_state import fingerprint

MAX_JPEG_SIDE = 65500  # of libjpeg


class File(NamedTuple):
    """The file to store for an image.

    Attributes:
        suffix: without a dot.
        content: of the file.
        other_channels: whether the image is unchanged because it is neither grey nor RGB.
    """

    suffix: str
    content: bytes
    other_channels: bool = False


_encode: Callable[[int], File | str]  # of a worker, see `_start_worker`


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("pack_images.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=arguments.nonempty, metavar="SRC",
        help="; ".join(text for _, text in READERS.values()))
    parser.add_argument("target", type=arguments.nonempty, metavar="DST", help="folder for the shards")
    parser.add_argument("--allow_unlabelled", action="store_true",
        help="also pack images without labels, for pretraining")
    parser.add_argument("--short_side", type=arguments.side, metavar="PX", help="resize larger training images to this")
    parser.add_argument("--quality", type=arguments.number(int, 1, 100), default=90, help="quality of written JPEGs")
    parser.add_argument("--shard_images", type=arguments.positive, default=4096, metavar="N", help="images per shard")
    parser.add_argument("--num_workers", type=arguments.number(int, 1, 1024), default=hardware.available_cores(),
        help="number of processes (default: the number of cores)")
    parser.add_argument("--max_bad_samples", type=arguments.natural, metavar="N",
        help="more broken training images than this end the run (default: 0.1 %% of the images)")
    return parser
# fmt: on


def encode(source: Source, short_side: int | None, quality: int, index: int) -> File | str:
    """Return the file to store for an image, or the reason why the image is broken.

    `short_side` is the largest shorter side, in pixels; None stores the image unchanged, broken or not.

    Raises:
        RunError: the file cannot be read now, but may be readable later.
    """
    name = source.name(index)
    try:
        data = source.read(index)
    except OSError as error:
        if error.errno == errno.EFBIG or (isinstance(source, ImageFiles) and _never_readable(source.path(index))):
            return f"{name}: {error.strerror}"
        raise RunError(f"{name}: {error.strerror}; the same command resumes after the last complete shard") from error
    suffix = suffix_of(name)
    if short_side is None:
        return File(suffix, data)
    try:
        if arrays.has_other_channels(data):
            return File(suffix, data, other_channels=True)
        pixels = decode.crop_of(data)
    except BrokenImage as error:
        return f"{name}: {error}"
    height, width, _ = pixels.shape
    if min(height, width) <= short_side or short_side * max(height, width) > MAX_JPEG_SIDE * min(height, width):
        return File(suffix, data)
    from torchvision.transforms.v2 import functional as F

    image = torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    pixels = F.resize_image(image, [short_side], F.InterpolationMode.BICUBIC).permute(1, 2, 0)  # (3, h, w) -> (h, w, 3)
    jpeg = simplejpeg.encode_jpeg(pixels.contiguous().numpy(), quality=quality, colorsubsampling="420")
    return File("jpg", with_orientation(jpeg, decode.orientation_of(data)))


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """Return a JPEG with an orientation in EXIF data, which the encoder does not write; 1 needs none."""
    if orientation == 1:
        return jpeg
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = exif.tobytes()
    return jpeg[:2] + b"\xff\xe1" + (2 + len(data)).to_bytes(2, "big") + data + jpeg[2:]  # the segment APP1


def suffix_of(name: str) -> str:
    """Return the suffix under which an image is stored, without a dot: its own if it is one of an image, else jpg.

    Readers look at the content; the suffix must only be that of an image.
    """
    suffix = os.path.splitext(name)[1].removeprefix(".").lower()
    return suffix if suffix in {*SUFFIXES, ARRAYS} else "jpg"


def _never_readable(path: str) -> bool:
    """Return whether a path is a broken link, a pipe, a device or the like."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path)


def _start_worker(source: Source, short_side: int | None, quality: int) -> None:
    global _encode
    torch.set_num_threads(1)
    _encode = partial(encode, source, short_side, quality)


def _in_worker(index: int) -> File | str:
    return _encode(index)


def shards_of(count: int, folder: Path, size: int) -> dict[Path, list[int]]:
    """Return {shard: indices of its images} for `count` images in shards of `size`; the last shard may have fewer."""
    order = np.random.default_rng(0).permutation(count)  # mixes the classes, for readers that shuffle within a buffer
    return {
        folder / f"{number:06d}.tar": order[start : start + size].tolist()
        for number, start in enumerate(range(0, count, size))
    }


def claim(source: Source, folder: Path, short_side: int | None, args: argparse.Namespace) -> dict[Path, list[str]]:
    """Create and lock the folder of one split, and write the images and settings to be packed to its packed.json.

    Returns:
        {finished shard: the broken images that it leaves out}.

    Raises:
        UserError: the folder holds shards of other or unknown images or settings; a file in it is damaged; it is in
            use, or cannot be written.
    """
    plan = {"images": len(source.labels), "names": source.identity(), "short_side": short_side}
    plan |= {"quality": args.quality, "shard_images": args.shard_images}
    if not isinstance(source, Folder) or args.allow_unlabelled:  # in a folder, the names of images hold their labels
        plan["data"] = fingerprint(source)
    plan_file = folder / "packed.json"
    with as_user_error(OSError):  # its message names the file
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder, "DST")
        found = set(folder.glob("*.tar"))
        if not plan_file.exists():
            if found:
                raise UserError(f"{folder} holds shards, but no packed.json that describes them: choose another folder")
            write_json(plan_file, plan)
    if read_json(plan_file) != plan:
        raise UserError(f"{folder} holds shards of other images or settings: choose another folder, or remove it")
    foreign = sorted(found - shards_of(len(source.labels), folder, args.shard_images).keys())
    if foreign:
        raise UserError(f"{printable(foreign[0])} is not one of the shards that are packed here: move it elsewhere")
    return {path: _left_out(path) for path in sorted(found)}


def _left_out(shard: Path) -> list[str]:
    """Return one line for each broken image that a finished shard leaves out."""
    path = _list_of(shard)
    if not path.exists():
        return []
    lines = read_json(path)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{path} is damaged: it is not a list of lines. Remove {shard.name} to pack it again")
    return [printable(line) for line in lines]


def _list_of(shard: Path) -> Path:
    return shard.with_suffix(".broken.json")


@contextmanager
def _starting_workers() -> Iterator[None]:
    """Raise RunError with a remedy if the system cannot start a process."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"no worker can be started: {error.strerror}; use a smaller --num_workers, a larger /dev/shm (docker run "
            "--shm-size=8g) or higher limits (ulimit)"
        ) from error


def pack(
    source: Source, folder: Path, short_side: int | None, args: argparse.Namespace, finished: dict[Path, list[str]]
) -> tuple[list[str], int]:
    """Write the missing shards of one split.

    The shards 000000.tar and so on are written atomically. The broken images of a shard are listed in
    000000.broken.json, which is ignored without its shard. `finished` is the result of `claim`.

    Returns:
        One line for each broken image, which is left out; number of images packed now that have other channels.

    Raises:
        RunError: too many images are broken, a file cannot be read, or no worker can be started.
    """
    count = len(source.labels)
    max_broken = allowed_broken(args.max_bad_samples, count)
    shards = shards_of(count, folder, args.shard_images)
    missing = [path for path in shards if path not in finished]
    broken, other_channels = {path: finished.get(path, []) for path in shards}, 0
    for pattern in (".*.tar.*.tmp", ".*.json.*.tmp", "*.partial"):  # left by a killed run; *.partial by older versions
        for unfinished in folder.glob(pattern):
            unfinished.unlink()
    done = count - sum(len(shards[path]) for path in missing)
    settings = source, short_side, args.quality
    with _starting_workers():
        pool = ProcessPoolExecutor(args.num_workers, initializer=_start_worker, initargs=settings)
    with tqdm(total=count, initial=done, desc=printable(folder), unit=" images") as bar, pool:
        for path in missing:
            with _starting_workers():
                results = pool.map(_in_worker, shards[path], chunksize=16)
            with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
                for index, result in zip(shards[path], results, strict=True):
                    bar.update()
                    if not isinstance(result, str):
                        add_image(tar, source, index, result.suffix, result.content)
                        other_channels += result.other_channels
                        continue
                    broken[path].append(result)
                    found = [line for lines in broken.values() for line in lines]
                    if len(found) > max_broken:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise RunError(f"{list_broken(found)}\n{too_many_broken(max_broken, count)}")
                _list_of(path).unlink(missing_ok=True)
                if broken[path]:
                    write_json(_list_of(path), broken[path])
    return [line for lines in broken.values() for line in lines], other_channels


def add_image(tar: tarfile.TarFile, source: Source, index: int, suffix: str, data: bytes) -> None:
    """Add an image and its label, if it has one, to a shard, in a folder with the name of its class."""
    key = f"{index}_{Path(source.name(index)).stem.replace('.', '_')}"  # it ends at its first dot
    files = {suffix: data}
    if source.classes:
        label = source.labels[index]
        files["cls"] = b"%d" % label
        key = f"{source.classes[label]}/{key}" if source.classes[label] else key
    for kind, content in files.items():
        member = tarfile.TarInfo(f"{key}.{kind}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def main(args: argparse.Namespace) -> None:
    """Pack every split; raise UserError before anything is packed, or RunError if a split cannot be packed."""
    target, place = Path(args.target), path_of(args.source)[1]
    with as_user_error(OSError):
        if target.exists() and os.path.exists(place) and target.samefile(place):
            raise UserError(f"DST {printable(args.target)} is SRC: choose another folder for the shards")
    sources: dict[str, Source] = {}
    for split in ("train", "val"):
        with suppress(NoSplit):
            sources[split] = open_source(args.source, split, labels=not args.allow_unlabelled)
    if not sources:
        remedy = "; --allow_unlabelled packs all images in it, for pretraining" * (not args.allow_unlabelled)
        raise UserError(f"{printable(args.source)}: there is no train or val in it{remedy}")
    for name in (name for source in sources.values() for name in source.classes):
        if "/" in name or name.startswith("."):
            raise UserError(f"{printable(args.source)}: the class {name} cannot be a folder in the shards: rename it")
    short_sides = {"train": args.short_side, "val": None}
    # check all splits first, since packing one can take hours
    finished = {split: claim(images, target / split, short_sides[split], args) for split, images in sources.items()}
    for split, images in sources.items():
        try:
            broken, other_channels = pack(images, target / split, short_sides[split], args, finished[split])
        except BrokenProcessPool as error:
            advice = "the same command resumes after the last complete shard"
            raise RunError(f"a worker was killed; {advice}; if memory ran out, use a smaller --num_workers") from error
        except OSError as error:
            raise RunError(f"{printable(target)}: {error.strerror}") from error
        packed = TarShards(args.target, split, labels=bool(images.classes))
        if len(packed.labels) + len(broken) != len(images.labels):
            found = f"{len(packed.labels)} of {len(images.labels)} images"
            raise RunError(f"{target / split} has {found}: remove it and repeat")
        print(f"{split}: {len(packed.labels)} images in {len(packed.shards)} shards, {packed.size.sum() / 1e6:.1f} MB")
        if other_channels:
            print(f"{other_channels} images are neither grey nor RGB, and are stored unchanged")
        if broken:
            print(f"left out: {list_broken(broken)}")


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
