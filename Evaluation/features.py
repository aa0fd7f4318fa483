"""Frozen features: the encoder of a checkpoint, and what its blocks make of each image, computed once and kept."""

import argparse
import hashlib
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models_arm import ARMClassifier, PretrainModel, create_pretrain_model
from ops import BackendUnavailable, choose_backend
from util import checkpoint, cli
from util.datasets import ImageDataset, eval_loader
from util.device_loader import DeviceLoader
from util.dist import barrier, on_main, world_size
from util.errors import RunError, UserError, as_user_error
from util.metrics import LOG_EVERY, ScreenLog, SilentLog
from util.pos_embed import resize_pos_embed
from util.run import fingerprint
from util.train_loop import activation_dtype, autocast

Model = PretrainModel | ARMClassifier
ENCODER = ("patch_embed.", "layers.", "pos_embed", "cluster_order")  # what of a pretraining model makes features


def load_model(args: argparse.Namespace, device: torch.device) -> Model:
    """The model of a checkpoint, of pretraining (its encoder only: the decoder stays random) or of finetuning.

    Args:
        args: `checkpoint`, `model_key`, `input_size` and `scan_backend` count; the middle ones get what was found.
        device: where it goes.

    Raises:
        UserError: no checkpoint of ARM, or an input size that does not fit.
    """
    content = checkpoint.read(args.checkpoint, args.ignore_keys)
    args.model_key = checkpoint.chosen_key(content, args.model_key)
    state = checkpoint.weights(content, args.model_key)
    checkpoint.say_guesses(args.checkpoint, content, state)
    trained_size = checkpoint.image_size(state, checkpoint.saved_size(content))
    sizes = checkpoint.classifier_sizes(state)
    if args.input_size is None:
        args.input_size = list(trained_size)
    sizes |= {"img_size": cli.image_size(args), "scan_backend": args.scan_backend}
    with as_user_error(TypeError, ValueError, BackendUnavailable):
        choose_backend(args.scan_backend, device, activation_dtype(device), sizes["embed_dim"])
        if not checkpoint.is_pretrained(state):
            model = ARMClassifier(**sizes, global_pool=checkpoint.saved_pooling(content))
        else:
            sizes |= checkpoint.switches(content, state) | {"dec_embed_dim": 64, "dec_depth": 1}
            if sizes["order"] == "random" and sizes["img_size"] != trained_size:
                raise ValueError(f"--input_size: a random order of clusters holds for {trained_size} pixels alone")
            model = create_pretrain_model("arm_base_pz16", **sizes)
    if isinstance(model, ARMClassifier):
        checkpoint.load_into_classifier(content, model, args.model_key)
    else:
        encoder = {k: v for k, v in state.items() if k.startswith(ENCODER)}
        grid = tuple(side // model.patch_size for side in trained_size)
        encoder["pos_embed"] = resize_pos_embed(state["pos_embed"], grid, model.grid_size)
        decoder = {k for k in model.state_dict() if not k.startswith(ENCODER)}
        checkpoint.load(model, encoder, decoder)
    return model.to(device).eval().requires_grad_(False)


def chosen_blocks(args: argparse.Namespace, depth: int) -> range:
    """The blocks whose outputs are averaged, from 1: `--block`, the last ones of `--average_last`, or the last.

    Raises:
        UserError: there are not so many.
    """
    for name in ("block", "average_last"):
        if (getattr(args, name) or 1) > depth:
            raise UserError(f"--{name} {getattr(args, name)}: the encoder has {depth} blocks")
    if args.block is not None:
        return range(args.block, args.block + 1)
    return range(depth + 1 - (args.average_last or 1), depth + 1)


def encode(model: Model, imgs: Tensor, blocks: range) -> Tensor:
    """Mean of the outputs of some blocks.

    A pretrained encoder reads all clusters, the last one too, in cluster order. A classifier's outputs pass its last
    normalisation, as the last block's do.

    Args:
        model: of pretraining or finetuning.
        imgs: (B, 3, H, W).
        blocks: which, from 1.

    Returns:
        Tokens (B, L, C) float32; those of a classifier have the class token in the middle.
    """
    if isinstance(model, ARMClassifier):
        _, taps = model.encode(imgs, [number - 1 for number in blocks], blocks[-1])
        taps = [model.norm_f(h) for h in taps]
    else:
        taps = model.encode(model.embed(imgs), blocks).values()
    return sum(h.float() for h in taps) / len(blocks)


def pool(model: Model, tokens: Tensor) -> Tensor:
    """One vector an image: the mean over all tokens, for a classifier what its head reads: (B, L, C) -> (B, C)."""
    return tokens.mean(dim=1) if isinstance(model, PretrainModel) else model.forward_head(tokens, pre_logits=True)


def hash_of(model: Model) -> str:
    """SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(model, PretrainModel) or name.startswith(ENCODER):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def features(
    args: argparse.Namespace,
    model: Model,
    dataset: ImageDataset,
    split: str,
    blocks: range,
    tokens: bool,
    device: torch.device,
    log: ScreenLog | SilentLog,
) -> tuple[Tensor, Tensor]:
    """What the frozen model makes of every image: from the cache, or computed, each process a share, and kept there.

    A file of the cache is NumPy's format, which executes nothing, read through a memory map. It is named by a hash of
    the weights, of the images' folder and labels, and of all settings that change a value.

    Args:
        args: `cache`, `max_gb`, what `eval_loader` reads, and the settings of the images.
        model: as `load_model` returns it.
        dataset: of one split.
        split: its name, for the file.
        blocks: see `encode`.
        tokens: all tokens in float16, instead of the pooled features in float32.
        device: of the model.
        log: of this rank.

    Returns:
        (n, C) float32 or (n, L, C) float16, and labels (n,) int64, in the order of the data; the label of a broken
        image is -1. Memory-mapped from the file.

    Raises:
        UserError: larger than `--max_gb`, or the folder cannot be written.
        RunError: broken images, or features that are not finite.
    """
    settings = {
        "weights": hash_of(model), "data": fingerprint(dataset.source), "split": split,
        "root": os.path.abspath(dataset.source.root),
        "blocks": list(blocks), "tokens": tokens, "pool": str(getattr(model, "global_pool", "mean")),
        "dtype": str(activation_dtype(device)), "cluster_size": getattr(model, "cluster_size", None),
        "order": model.order if isinstance(model, PretrainModel) else None,
        **{name: getattr(args, name) for name in ("input_size", "eval_resize", "eval_loader", "eval_bad")},
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(args.cache) / f"{split}-{'tokens' if tokens else 'pooled'}-{key}.npy"
    length = model.grid_size[0] * model.grid_size[1] + isinstance(model, ARMClassifier)
    feature = ("feature", np.float16, (length, model.embed_dim)) if tokens else ("feature", np.float32, model.embed_dim)
    record = np.dtype([("label", np.int64), feature], align=True)

    def start() -> str | None:
        """Make the file to fill, unless there is a whole one."""
        if path.is_file():
            return None
        size = len(dataset) * record.itemsize / 1e9
        if size > args.max_gb:
            raise UserError(f"the features of {split} take {size:.3g} GB, more than --max_gb {args.max_gb:g} allows")
        mine = f".{path.name}.{socket.gethostname()}."  # other hosts may share the folder
        for left in path.parent.glob(f"{mine}*"):  # by a process that was killed
            if not Path("/proc", left.suffix[1:]).exists():
                left.unlink(missing_ok=True)
        partial = path.with_name(f"{mine}{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(partial, "w+", record, (len(dataset),))
            with partial.open("r+b") as file:  # a full disk would end a process that writes to the map, wordlessly
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise UserError(f"--cache {path.parent} cannot be written: {error.strerror}") from error
        return str(partial)

    partial = on_main(start)
    if partial is not None:
        loader = eval_loader(dataset, args, device)
        try:
            compute(model, loader, np.lib.format.open_memmap(partial, "r+"), blocks, tokens, device, log, split)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        barrier()
        on_main(lambda: os.replace(partial, path))
    with as_user_error(ValueError, OSError, prefix=f"{path} is damaged, delete it: "):
        rows = np.load(path, mmap_mode="c", allow_pickle=False)  # as if writable: torch has no read-only tensors
    return torch.from_numpy(rows["feature"]), torch.from_numpy(rows["label"])


@torch.inference_mode()
def compute(
    model: Model,
    loader: DeviceLoader,
    rows: np.ndarray,
    blocks: range,
    tokens: bool,
    device: torch.device,
    log: ScreenLog | SilentLog,
    title: str,
) -> None:
    """Fill this process's share of the rows (n,) of features and labels; for the rest see `features`."""
    progress, seen = log.progress(f"features of {title}", len(loader)), 0
    for step, (imgs, labels) in enumerate(loader, start=1):
        with autocast(device):
            found = encode(model, imgs, blocks)
        found = (found if tokens else pool(model, found)).cpu().numpy().astype(rows["feature"].dtype)
        if not np.isfinite(found).all():
            raise RunError(f"features of {title} are not finite" + " in float16" * tokens)
        share = list(loader.sampler.indices[seen : seen + len(labels)])
        rows["feature"][share], rows["label"][share] = found, labels.cpu()
        seen += len(labels)
        progress.update(len(labels) * world_size(), quiet=step % LOG_EVERY != 0 and step != len(loader))
    progress.close()
    rows.flush()
