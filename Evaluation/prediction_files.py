"""Files that all processes of tools/predict.py write together: a line for each image, and the list of images."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path

from Evaluation.tables import csv_text, starts_with
from util.data.device_loader import DeviceLoader
from util.data.sources.source import Source
from util.distributed.processes import gather_late, on_main, rank, world_size
from util.errors import RunError
from util.files import printable, replacing

LISTED = ["index", "file", "error"]  # columns of the list of images beside their features or detections
is_list = starts_with(csv_text([LISTED]))  # whether a file lists images


@contextmanager
def writing(path: Path, kind: type[Exception] = RunError) -> Iterator[None]:
    """Turn an error of the system into one line about `--output`."""
    try:
        yield
    except OSError as error:
        raise kind(f"--output {printable(path)} cannot be written: {error.strerror}") from error


@contextmanager
def shared(path: Path) -> Iterator[Path]:
    """Yield, on all processes, a path that replaces `path` if the block raises nothing; see `replacing`."""
    with ExitStack() as stack:
        yield on_main(lambda: stack.enter_context(replacing(path)))
        with writing(path):
            stack.close()


def errors_of(
    loader: DeviceLoader, source: Source, share: Sequence[int], finite: Sequence[bool], what: str
) -> dict[int, str]:
    """Return why images of a batch have no result: their number -> the reason.

    Args:
        loader: knows the broken images.
        source: names them.
        share: numbers of the images (B,).
        finite: whether the result of each is finite.
        what: the result.
    """
    broken = {i: loader.broken[i].removeprefix(f"{source.name(i)}: ") for i in share if i in loader.broken}
    return {i: f"{what} are not finite" for i, good in zip(share, finite, strict=True) if not good} | broken


def all_errors(own: dict[int, str], images: int) -> dict[int, str]:
    """Return the errors of all processes; raise RunError if no image has a result."""
    errors = {index: reason for share in gather_late(own) for index, reason in share.items()}
    if len(errors) == images:
        raise RunError(f"none of the {images} images has a result: {next(iter(errors.values()))}")
    return errors


def write_lines(
    args: argparse.Namespace,
    batches: Iterable[tuple[dict[int, str], str]],
    images: int,
    joined: Callable[[Iterable[bytes]], Iterable[bytes]],
) -> dict[int, str]:
    """Write the lines of all images to `args.output`, and return why images have no result.

    Each process appends its lines to a file of its own; rank 0 merges these in the order of the images.

    Args:
        args: of the script.
        batches: of this process's share of the images: the errors by number, and a line for each image.
        images: their number.
        joined: from the lines of all images, in order, to the content of the file.
    """
    errors: dict[int, str] = {}
    with shared(args.output) as target:
        parts = [target.with_name(f"{target.name}{number}") for number in range(world_size())]
        try:
            append(args.output, parts[rank()], "")
            for new, lines in batches:
                errors |= new
                append(args.output, parts[rank()], lines)
            errors = all_errors(errors, images)
            on_main(lambda: merge(args.output, parts, target, joined))
        finally:
            parts[rank()].unlink(missing_ok=True)
    return errors


def append(output: Path, part: Path, text: str) -> None:
    """Append text to a part of the output, in UTF-8; raise RunError."""
    with writing(output), part.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def merge(
    output: Path, parts: Sequence[Path], target: Path, joined: Callable[[Iterable[bytes]], Iterable[bytes]]
) -> None:
    """Write the lines of all parts in turn, as `ShareSampler` deals the images, as `joined` says; raise RunError."""
    with writing(output), ExitStack() as stack:
        files = [stack.enter_context(part.open("rb")) for part in parts]
        file = stack.enter_context(target.open("xb"))
        file.writelines(joined(line for lines in zip_longest(*files, fillvalue=b"") for line in lines))


def list_images(output: Path, path: Path, source: Source, errors: dict[int, str]) -> None:
    """Write the list of images beside `output`; raise RunError."""
    with writing(output), path.open("x", encoding="utf-8", newline="") as file:
        file.write(csv_text([LISTED]))
        for index in range(len(source.labels)):
            file.write(csv_text([[index, source.name(index), errors.get(index, "")]]))
