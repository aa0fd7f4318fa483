"""Re-encode a folder of images into tar shards, once, for faster training.

    python tools/pack_images.py /path/to/ImageNet /path/to/shards --short_side 256

writes SHARDS/train/*.tar and, as far as there is a val/ folder, SHARDS/val/*.tar in the webdataset layout, which
`--data_path wds:/path/to/shards` reads. Training images whose shorter side is longer are resized (bicubic) and stored
as JPEG; all others, and every image of val/, are stored as they are. A run that was stopped goes on where it was.
"""

import argparse
import errno
import hashlib
import io
import os
import stat
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import simplejpeg
import torch
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from util import arguments, cli
from util.data import decode
from util.data.decode import BrokenImage
from util.data.device_loader import allowed_broken, listed
from util.data.readers import Folder, Source
from util.data.tar_shards import TarShards
from util.errors import RunError, UserError, as_user_error
from util.files import printable, read_json, replacing, write_json
from util.lock import lock_folder

MAX_JPEG_SIDE = 65500  # of libjpeg


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser("pack_images.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "source",
        type=arguments.nonempty,
        metavar="SRC",
        help="folder with train/ and perhaps val/, one folder of images a class",
    )
    parser.add_argument("target", type=arguments.nonempty, metavar="DST", help="folder for the shards")
    parser.add_argument("--short_side", type=arguments.side, metavar="PX", help="resize larger training images to this")
    parser.add_argument(
        "--quality",
        type=arguments.number(int, 1, 100),
        default=90,
        help="of the JPEGs that are written (default: %(default)s)",
    )
    parser.add_argument(
        "--shard_images",
        type=arguments.positive,
        default=4096,
        metavar="N",
        help="images a shard (default: %(default)s)",
    )
    parser.add_argument(
        "--num_workers",
        type=arguments.number(int, 1, 1024),
        default=len(os.sched_getaffinity(0)),
        help="(default: the number of cores)",
    )
    parser.add_argument(
        "--max_bad_samples",
        type=arguments.natural,
        metavar="N",
        help="more broken training images than these end the run (default: 0.1 %% of the images)",
    )
    return parser


def encoded(source: Folder, short_side: int | None, quality: int, index: int) -> tuple[str, bytes] | str:
    """An image as it is stored.

    Args:
        source: where it comes from.
        short_side: the most pixels that its shorter side may have; None leaves it as it is, broken or not.
        quality: of a JPEG that is written.
        index: of the image in the source.

    Returns:
        Suffix and content of its file, or why it is broken.

    Raises:
        RunError: the file cannot be read, which may be another time.
    """
    name = source.name(index)
    try:
        data = source.read(index)
    except OSError as error:
        if error.errno == errno.EFBIG or _never_readable(source.path(index)):
            return f"{name}: {error.strerror}"
        raise RunError(f"{name}: {error.strerror}; the same command goes on after the last whole shard") from error
    suffix = os.path.splitext(name)[1].removeprefix(".").lower()
    if short_side is None:
        return suffix, data
    try:
        pixels = decode.crop_of(data, lambda height, width: (0, 0, height, width))
    except BrokenImage as error:
        return f"{name}: {error}"
    height, width, _ = pixels.shape
    if min(height, width) <= short_side or short_side * max(height, width) > MAX_JPEG_SIDE * min(height, width):
        return suffix, data
    image = torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    pixels = F.resize_image(image, [short_side], F.InterpolationMode.BICUBIC).permute(1, 2, 0)  # (3, h, w) -> (h, w, 3)
    return "jpg", simplejpeg.encode_jpeg(pixels.contiguous().numpy(), quality=quality, colorsubsampling="420")


def _never_readable(path: str) -> bool:
    """Return whether a path is a link that leads nowhere, a pipe, a device or the like."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path)


def _start_worker(*arguments: object) -> None:
    global _encoded
    torch.set_num_threads(1)
    _encoded = partial(encoded, *arguments)


def _in_worker(index: int) -> tuple[str, bytes] | str:
    return _encoded(index)


def shards_of(count: int, folder: Path, size: int) -> dict[Path, list[int]]:
    """Return the shards of a split, and the images in each: `size` of `count`, the last one fewer."""
    order = np.random.default_rng(0).permutation(count)  # classes mixed, for readers that shuffle within a buffer
    return {
        folder / f"{number:06d}.tar": order[start : start + size].tolist()
        for number, start in enumerate(range(0, count, size))
    }


def claim(source: Folder, folder: Path, short_side: int | None, args: argparse.Namespace) -> dict[Path, list[str]]:
    """Make the folder of one split, with what will be packed into it in packed.json, and keep other packers out.

    Args:
        source: the images.
        folder: of the shards.
        short_side: see `encoded`.
        args: `quality` and `shard_images`.

    Returns:
        The shards that are there, and the broken images that each leaves out.

    Raises:
        UserError: the folder holds shards of other images or settings, or of unknown ones; a file in it is damaged; it
            is in use, or cannot be written.
    """
    names = hashlib.sha256(b"\0".join(source.paths)).hexdigest()
    plan = {"images": len(source.labels), "names": names, "short_side": short_side}
    plan |= {"quality": args.quality, "shard_images": args.shard_images}
    plan_file = folder / "packed.json"
    with as_user_error(OSError):  # its message names the file
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder, "DST")
        found = set(folder.glob("*.tar"))
        if not plan_file.exists():
            if found:
                raise UserError(f"{folder} holds shards, but no packed.json that says of what: choose another folder")
            write_json(plan_file, plan)
    if read_json(plan_file) != plan:
        raise UserError(f"{folder} holds shards of other images or settings: choose another folder, or remove it")
    foreign = sorted(found - shards_of(len(source.labels), folder, args.shard_images).keys())
    if foreign:
        raise UserError(f"{printable(foreign[0])} is none of the shards that are packed here: move it elsewhere")
    return {path: _left_out(path) for path in sorted(found)}


def _left_out(shard: Path) -> list[str]:
    """Return the broken images that a finished shard leaves out, a line for each."""
    path = _list_of(shard)
    if not path.exists():
        return []
    lines = read_json(path)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{path} is damaged: it is no list of broken images. Remove {shard.name} to pack that again")
    return [printable(line) for line in lines]


def _list_of(shard: Path) -> Path:
    return shard.with_suffix(".broken.json")


@contextmanager
def _starting_workers() -> Iterator[None]:
    """Say what helps where the system starts no further process."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"no worker can be started: {error.strerror}; a smaller --num_workers, a larger /dev/shm (docker run "
            "--shm-size=8g) or higher limits (ulimit) help"
        ) from error


def pack(
    source: Folder,
    folder: Path,
    short_side: int | None,
    args: argparse.Namespace,
    finished: dict[Path, list[str]],
) -> list[str]:
    """Write the shards of one split that are not there yet.

    Args:
        source: the images.
        folder: as `claim` leaves it; gets 000000.tar and so on. Each is complete or absent at any moment. The broken
            images of one are in 000000.broken.json, which counts only beside it.
        short_side: see `encoded`.
        args: `quality`, `shard_images`, `num_workers`, `max_bad_samples`.
        finished: what `claim` has returned.

    Returns:
        The images that are broken and left out.

    Raises:
        RunError: too many images are broken, a file cannot be read, or no worker can be started.
    """
    count = len(source.labels)
    max_broken = allowed_broken(args.max_bad_samples, count)
    shards = shards_of(count, folder, args.shard_images)
    missing = [path for path in shards if path not in finished]
    broken = {path: finished.get(path, []) for path in shards}
    for pattern in (".*.tar.*.tmp", ".*.json.*.tmp", "*.partial"):  # of a killed packer; the last of earlier versions
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
                        add_image(tar, source, index, *result)
                        continue
                    broken[path].append(result)
                    found = [line for lines in broken.values() for line in lines]
                    if len(found) > max_broken:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise RunError(
                            f"{listed(found)}\nthese are more than {max_broken} of {count}: mend or remove them, or "
                            "raise --max_bad_samples"
                        )
                _list_of(path).unlink(missing_ok=True)
                if broken[path]:
                    write_json(_list_of(path), broken[path])
    return [line for lines in broken.values() for line in lines]


def add_image(tar: tarfile.TarFile, source: Source, index: int, suffix: str, data: bytes) -> None:
    """Add an image and its label to a shard, in a folder named by its class."""
    label = source.labels[index]
    stem = Path(source.name(index)).stem.replace(".", "_")  # a key ends at its first dot
    for kind, content in ((suffix, data), ("cls", b"%d" % label)):
        member = tarfile.TarInfo(f"{source.classes[label]}/{index}_{stem}.{kind}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def main(args: argparse.Namespace) -> None:
    """Pack every split that there is.

    Raises:
        UserError: there is nothing to pack, or the target holds something else.
        RunError: too many images are broken, a file cannot be read, a worker was killed, or the shards do not hold what
            they should.
    """
    source, target = Path(args.source), Path(args.target)
    splits = [split for split in ("train", "val") if (source / split).is_dir()]
    if not splits:
        raise UserError(f"{source}: there is no folder train or val in it")
    with as_user_error(OSError):
        if target.exists() and target.samefile(source):
            raise UserError(f"DST {printable(args.target)} is SRC: shards among the images would be in their way")
    sources = {split: Folder(args.source, split) for split in splits}
    short_sides = {"train": args.short_side, "val": None}
    # all mistakes before the hours that the first one takes
    finished = {split: claim(images, target / split, short_sides[split], args) for split, images in sources.items()}
    for split, images in sources.items():
        try:
            broken = pack(images, target / split, short_sides[split], args, finished[split])
        except BrokenProcessPool as error:
            raise RunError(
                "a worker was killed; the same command goes on after the last whole shard, if memory ran out with a "
                "smaller --num_workers"
            ) from error
        except OSError as error:
            raise RunError(f"{printable(target)}: {error.strerror}") from error
        packed = TarShards(args.target, split)
        if len(packed.labels) + len(broken) != len(images.labels):
            raise RunError(
                f"{target / split}: {len(packed.labels)} of {len(images.labels)} images; remove it and repeat"
            )
        print(f"{split}: {len(packed.labels)} images in {len(packed.shards)} shards, {packed.size.sum() / 1e6:.1f} MB")
        if broken:
            print(f"left out: {listed(broken)}")


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
