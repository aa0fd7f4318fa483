"""Frozen features: load the encoder of a checkpoint, compute features of every image once, cache them in a file."""

import argparse
import glob
import hashlib
import json
import os
import socket
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

import pretrained
from models_arm import ARMClassifier, PretrainModel
from objectives import encoder_part
from ops import BackendUnavailable, choose_backend
from pretrained import Checkpoint, Model
from util import arguments
from util.data.datasets import ImageDataset, pixels_by
from util.data.device_loader import DeviceLoader
from util.data.loaders import eval_loader
from util.data.pixels import Pixels
from util.data.sources.source import Source
from util.data.transforms import eval_transform
from util.distributed.processes import barrier, gather_late, on_main, rank, world_size
from util.errors import RunError, UserError, as_user_error
from util.files import printable, reserve
from util.lock import is_running
from util.pos_embed import split_middle
from util.tracking.run_log import Log
from util.training import precision
from util.training.precision import activation_dtype, autocast
from util.training.run_state import fingerprint

T = TypeVar("T")

DIGEST = hashlib.sha256().digest_size  # bytes: the end of a cache file
BLOCK = 2**24  # bytes that are hashed at a time


def read_checkpoint(args: argparse.Namespace, device: torch.device, found: Checkpoint | None = None) -> Checkpoint:
    """Read the checkpoint of a command line, unless it is `found`, and prepare to compute with its model.

    `args.model_key` and `args.input_size` are set to those of the model, `args.class_names` to its outputs, the
    arguments of `Pixels` to those that it was trained with, and `args.dtype` to the dtype of activations.

    Raises:
        UserError: the file is no checkpoint of ARM, or the input size or backend does not fit.
    """
    found = found or pretrained.read(args.checkpoint, args.model_key, args.ignore_keys)
    args.model_key, args.class_names = found.key, found.class_names
    vars(args).update(found.pixels.arguments())
    precision.choose(args, device)
    with as_user_error(TypeError, ValueError, BackendUnavailable):
        choose_backend(args.scan_backend, device, activation_dtype(device), found.sizes["embed_dim"])
    if args.input_size is None:
        args.input_size = list(found.input_size)
    return found


def load_model(
    args: argparse.Namespace, device: torch.device, found: Checkpoint | None = None, encoder: bool = True
) -> Model:
    """Load the frozen model of a checkpoint: a classifier, or a pretraining model whose decoder stays random.

    Args:
        args: of the script; see `read_checkpoint`, which sets some.
        device: of the model.
        found: the checkpoint, if it has been read.
        encoder: load only the encoder of a detector or segmenter.

    Raises:
        UserError: see `read_checkpoint`.
    """
    found = found or read_checkpoint(args, device)
    size = arguments.image_size(args)
    model = found.load_model(encoder=encoder, img_size=size, scan_backend=args.scan_backend)
    return model.to(device).requires_grad_(False)


def eval_images(args: argparse.Namespace, source: Source, ratio: float | None = None) -> ImageDataset:
    """Return the images of a source as the model of `load_model` sees them; for `ratio` see `eval_transform`."""
    transform = eval_transform(arguments.image_size(args), args.eval_resize, Pixels.of(args), ratio)
    return ImageDataset(source, pixels_by(args.eval_loader, transform))


def chosen_blocks(args: argparse.Namespace, depth: int) -> range:
    """Return the blocks whose outputs are averaged, from 1: `--block`, the last `--average_last`, or the last one.

    Raises:
        UserError: the encoder has fewer blocks.
    """
    for name in ("block", "average_last"):
        if (getattr(args, name) or 1) > depth:
            raise UserError(f"--{name} {getattr(args, name)}: the encoder has {depth} blocks")
    if args.block is not None:
        return range(args.block, args.block + 1)
    return range(depth + 1 - (args.average_last or 1), depth + 1)


def encode(model: Model, imgs: Tensor, blocks: range) -> Tensor:
    """Average the outputs of some blocks.

    A pretraining model encodes all clusters, the last one too, in cluster order. A classifier applies its last
    normalisation to each output.

    Args:
        model: of pretraining or finetuning.
        imgs: (B, in_chans, H, W).
        blocks: their numbers, from 1.

    Returns:
        Tokens (B, L, C) float32; those of a classifier have the class token in the middle.
    """
    if isinstance(model, ARMClassifier):
        _, tapped = model.encode(imgs, [number - 1 for number in blocks], blocks[-1])
        outputs = [model.norm_f(h) for h in tapped]
    else:
        outputs = list(model.encode(model.embed(imgs), blocks).values())
    return reduce(torch.add, [h.float() for h in outputs]) / len(blocks)


def encode_patches(model: Model, imgs: Tensor, blocks: range) -> Tensor:
    """Do as `encode`, and return the patches alone in raster order: (B, in_chans, H, W) -> (B, M, C) float32."""
    tokens, (rows, columns) = encode(model, imgs, blocks), (side // model.patch_size for side in imgs.shape[-2:])
    if isinstance(model, PretrainModel):
        raster = torch.arange(rows * columns, device=imgs.device)[None, :, None]  # (1, M, 1)
        places = model.to_clusters(raster).flatten().argsort()  # (1, clusters, c * c, 1) -> (M,)
        return tokens.index_select(1, places)
    patches, _ = split_middle(tokens)
    whole = -(-columns // model.pad_patches) * model.pad_patches  # with those that a pyramid adds
    return patches.unflatten(1, (-1, whole))[:, :rows, :columns].flatten(1, 2)  # (B, rows, columns, C) -> (B, M, C)


def pool(model: Model, tokens: Tensor) -> Tensor:
    """Pool tokens, (B, L, C) -> (B, C): their mean, or as a classifier pools them for its head."""
    return tokens.mean(dim=1) if isinstance(model, PretrainModel) else model.forward_head(tokens, pre_logits=True)


def hash_of(model: Model) -> str:
    """Return the SHA-256 of a model's weights, of a pretraining model without its decoder."""
    digest, state_dict = hashlib.sha256(), model.state_dict()
    if isinstance(model, PretrainModel):
        state_dict = encoder_part(state_dict)
    for name, value in sorted(state_dict.items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def form_of(model: Model, tokens: bool) -> tuple[type, tuple[int, ...]]:
    """Return dtype and shape of an image's features: all tokens (L, C) float16, or pooled (C,) float32."""
    length = model.grid_size[0] * model.grid_size[1] + isinstance(model, ARMClassifier)
    return (np.float16, (length, model.embed_dim)) if tokens else (np.float32, (model.embed_dim,))


def encode_kinds(model: Model, imgs: Tensor, blocks: range, kinds: Collection[bool]) -> dict[bool, np.ndarray]:
    """Encode images (B, in_chans, H, W) once; return their tokens under True and pooled under False, see `form_of`."""
    with autocast(imgs.device):
        tokens = encode(model, imgs, blocks)
    with np.errstate(over="ignore"):  # values beyond float16 become infinite
        return {
            kind: (tokens if kind else pool(model, tokens)).cpu().numpy().astype(form_of(model, kind)[0])
            for kind in kinds
        }


def are_finite(found: np.ndarray) -> np.ndarray:
    """Return whether the features (B, ...) of each image are finite: (B,) bool."""
    return np.isfinite(found).reshape(len(found), -1).all(axis=1)  # (B, ...) -> (B, n) -> (B,)


class CacheFile:
    """A file of the cache: labels and features of one kind of every image of a split; see `features`.

    Args:
        args: of the script.
        model: whose features they are.
        kind: tokens or pooled.
        images: their number.
        split: name of the dataset, which begins the name of the file.
        settings: all that changes a value.
    """

    def __init__(
        self, args: argparse.Namespace, model: Model, kind: bool, images: int, split: str, settings: dict
    ) -> None:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(args.cache) / f"{split}-{'tokens' if kind else 'pooled'}-{key}.npy"
        self.record = np.dtype([("label", np.int64), ("feature", *form_of(model, kind))], align=True)
        self.images = images
        size = images * self.record.itemsize / 1e9
        if size > args.max_gb and not os.path.lexists(self.path):
            raise UserError(f"the features of {split} take {size:.3g} GB, more than --max_gb {args.max_gb:g} allows")

    def start(self) -> Path | None:
        """Create the file to fill and return its path; None if the features are cached. Raises UserError."""
        if os.path.lexists(self.path):
            return None
        folder, mine = self.path.parent, f".{self.path.name}.{socket.gethostname()}."  # other hosts may use it too
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{glob.escape(mine)}*"):  # of a process that was killed
                pid = left.suffix[1:]
                if pid == str(os.getpid()) or not (pid.isdecimal() and is_running(int(pid))):
                    left.unlink(missing_ok=True)
            partial = self.path.with_name(f"{mine}{os.getpid()}")
            with partial.open("xb") as file:  # a new file, never the target of a link
                header = {"descr": np.lib.format.dtype_to_descr(self.record), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, header | {"shape": (self.images,)})
                # reserve the space: on a full disk, writing to the memory map would kill the process without a message
                reserve(file, file.tell() + self.images * self.record.itemsize + DIGEST)
        except OSError as error:
            with suppress(OSError, NameError):
                partial.unlink()
            raise UserError(f"--cache {printable(folder)} cannot be written: {error.strerror}") from error
        return partial

    def finish(self, partial: Path) -> None:
        """Write the digest into a complete file, `partial`, and rename it; raise UserError. All processes call it."""
        digest, _ = digest_of(partial)
        on_main(lambda: publish(partial, self.path, digest))

    def read(self, verify: bool) -> tuple[Tensor, Tensor]:
        """Return features and labels, memory-mapped; `verify` their checksum. Raises UserError if it is damaged."""
        with as_user_error(ValueError, OSError, prefix=f"{printable(self.path)} is damaged, delete it: "):
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise ValueError("it is no regular file")
            if verify:
                digest, stored = digest_of(self.path)
                if digest != stored:
                    raise ValueError("its checksum does not match its content")
            rows = np.load(
                self.path, mmap_mode="c", allow_pickle=False
            )  # copy on write: torch has no read-only tensors
            if (rows.dtype, rows.shape) != (self.record, (self.images,)):
                raise ValueError(f"it holds {rows.dtype} {rows.shape}, not {self.record} {(self.images,)}")
        return torch.from_numpy(rows["feature"]), torch.from_numpy(rows["label"])


def features(
    args: argparse.Namespace,
    model: Model,
    dataset: ImageDataset,
    split: str,
    blocks: range,
    kinds: Collection[bool],
    log: Log,
) -> dict[bool, tuple[Tensor, Tensor]]:
    """Return the features of every image from the cache; compute them first, each process a share, if need be.

    All kinds that are not cached are computed in one pass. A file of the cache has NumPy's format, which executes
    nothing, and is memory-mapped. Its name holds a hash of the weights, of the images' folder, files and labels, and of
    all settings that change a value. It ends with a checksum of its content, which is checked once, before its use.
    `split` names the dataset; for `blocks` see `encode`.

    Returns:
        For each kind (True: tokens, False: pooled) features (n, ...), see `form_of`, and labels (n,) int64, in the
        order of the data; the label of a broken image is -1. Memory-mapped from the file.

    Raises:
        UserError: a file would be larger than `--max_gb`, cannot be written, or is damaged.
        RunError: images are broken, or features are not finite.
    """
    device = model.pos_embed.device
    settings = {
        "weights": hash_of(model), "data": fingerprint(dataset.source), "split": split,
        "root": os.path.abspath(dataset.source.root), "files": on_main(dataset.source.state),
        "blocks": list(blocks), "pool": str(getattr(model, "global_pool", "mean")),
        "dtype": str(activation_dtype(device)), "cluster_size": getattr(model, "cluster_size", None),
        "order": model.order if isinstance(model, PretrainModel) else None,
        **{name: getattr(args, name) for name in ("input_size", "eval_resize", "eval_loader", "eval_bad")},
        "pixels": Pixels.of(args).arguments(),
    }  # fmt: skip
    files = {
        kind: CacheFile(args, model, kind, len(dataset), split, settings | {"tokens": kind}) for kind in sorted(kinds)
    }
    partials: dict[bool, Path] = {}
    try:
        for kind, file in files.items():
            if partial := on_main(file.start):
                partials[kind] = partial
        if partials:
            rows = {kind: np.lib.format.open_memmap(partial, "r+") for kind, partial in partials.items()}
            loader = eval_loader(dataset, args, device)
            for share, labels, found in compute(
                loader, lambda imgs: encode_kinds(model, imgs, blocks, partials), log, f"features of {split}"
            ):
                for kind, values in found.items():
                    if not (finite := are_finite(values)).all():
                        name = printable(dataset.source.name(share[int(finite.argmin())]))
                        form = " in float16" * kind
                        raise RunError(f"features of {split} are not finite{form}; the first: {name}")
                    rows[kind]["feature"][share], rows[kind]["label"][share] = values, labels
            for array in rows.values():
                array.flush()
            barrier()
            for kind, partial in partials.items():
                files[kind].finish(partial)
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise
    return {kind: file.read(verify=kind not in partials) for kind, file in files.items()}


def digest_of(path: Path) -> tuple[bytes, bytes]:
    """Return the SHA-256 of the SHA-256s of a file's blocks, without its last `DIGEST` bytes, and these.

    Each process hashes some of the blocks: 1.3 GB a second (AMD EPYC, with SHA instructions) of a file in memory.

    Raises:
        OSError: the file cannot be read.
    """
    end = max(0, path.stat().st_size - DIGEST)
    starts = range(0, end, BLOCK)
    with path.open("rb") as file:
        parts = (os.pread(file.fileno(), min(BLOCK, end - at), at) for at in starts[rank() :: world_size()])
        shares = gather_late([hashlib.sha256(part).digest() for part in parts])
        stored = os.pread(file.fileno(), DIGEST, end)
    blocks = [shares[i % world_size()][i // world_size()] for i in range(len(starts))]
    return hashlib.sha256(b"".join(blocks)).digest(), stored


def publish(partial: Path, path: Path, digest: bytes) -> None:
    """Write the digest into the last bytes of a complete file, `partial`, and rename it to `path`.

    Raises:
        UserError: the folder cannot be written.
    """
    with as_user_error(OSError, prefix="--cache: "):
        with partial.open("r+b") as file:
            file.seek(-DIGEST, os.SEEK_END)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@torch.inference_mode()
def compute(
    loader: DeviceLoader, outputs: Callable[[Tensor], T], log: Log, title: str
) -> Iterator[tuple[range, np.ndarray, T]]:
    """Yield places, labels (B,) int64 and `outputs` of the images (B, C, H, W) of each batch of this process's share.

    `title` is that of the progress display. A label of -1 means a broken image.
    """
    progress, seen = log.progress(title, len(loader)), 0
    for imgs, labels in loader:
        found = outputs(imgs)
        yield loader.sampler.indices[seen : seen + len(labels)], labels.cpu().numpy(), found
        seen += len(labels)
        progress.update(len(labels) * world_size())
    progress.close()
