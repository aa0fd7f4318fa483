"""Watch a pretraining run between its epochs: the loss on val/, kNN accuracy and effective rank of its features.

Nothing here changes a result: weights, random numbers and compiled graphs are left as they are. Batches, and the random
orders and masks of each, are the same in every epoch, run and number of processes, so values can be compared.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from engine_pretrain import loss_of
from Evaluation.features import encode, pool
from Evaluation.probes import has_direction, knn
from models_arm import PretrainModel
from util.arguments import image_size
from util.data.class_names import match_classes
from util.data.datasets import ImageDataset, LabelledBatches, pixels_by
from util.data.device_loader import DeviceLoader
from util.data.loaders import chunk_loader
from util.data.pixels import Pixels
from util.data.sources.readers import open_source
from util.data.sources.source import NoSplit, Source
from util.data.transforms import eval_transform
from util.distributed.parallel import unsharded
from util.distributed.processes import rank, reduce_sum, world_size
from util.errors import Interrupted, UserError, as_user_error
from util.files import some
from util.seeding import preserve_generators, seed_everything
from util.tracking.run_log import Log
from util.training.precision import autocast
from util.training.run_state import Run

CHUNK = 64  # images of a batch, whatever --batch_size and the number of processes are
SEED = 0  # draws the images to probe, and orders and masks, whatever --seed is
K, TEMPERATURE = 20, 0.07  # of kNN, as of DINO


class Watch:
    """Measure a run while it trains, on images that are drawn once.

    Args:
        args: of main_pretrain.py.
        train: the training images.
        device: of the model.
        say: shows a line to the user.

    Raises:
        UserError: `--val_freq` without val/, or the classes of val/ are others than those of train/.
    """

    def __init__(
        self, args: argparse.Namespace, train: Source, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self.args, self.device, self.say = args, device, say
        self.start, self.spent = time.monotonic(), {"val": 0.0, "probe": 0.0}
        self.transform = pixels_by("pil", eval_transform(image_size(args), "square", Pixels.of(args)))  # as probe.py
        val = self._open_val(train)
        self.val: ImageDataset | None = None
        self.probed: ConcatDataset | None = None
        if args.val_freq and val is not None:
            self.val = ImageDataset(val, self.transform)
            say(f"loss on val: {len(val.labels)} images, every {args.val_freq} epochs")
        self.queries, self.classes = 0, len(train.classes)
        if args.probe_freq:
            self.probed, self.queries = self._images_to_probe(train, val)

    def _open_val(self, train: Source) -> Source | None:
        """Return val/, or None if it is not needed, or there is none and only the probe, for kNN, would take it."""
        if self.args.val_freq:
            with as_user_error(UserError, prefix=f"--val_freq {self.args.val_freq}: "):
                return open_source(self.args.data_path, "val", labels=False)
        try:
            return (
                open_source(self.args.data_path, "val", labels=False)
                if has_classes(train) and self.args.probe_freq
                else None
            )
        except NoSplit as error:
            self.say(f"the probe uses training images only: {error}")
            return None

    def _images_to_probe(self, train: Source, val: Source | None) -> tuple[ConcatDataset, int]:
        """Draw at most `--probe_images`: three quarters are the neighbours, of train/, and the rest the queries of kNN.

        Without labels there are no queries. Without a labelled val/ the queries are training images.

        Returns:
            The images, neighbours first, and the number of queries.
        """
        count, images = min(self.args.probe_images, len(train.labels)), ImageDataset(train, self.transform)
        every = f"every {self.args.probe_freq} epochs"
        if not has_classes(train):
            self.say(f"probe: RankMe of {count} training images, {every}; kNN needs classes, which {train.root} lacks")
            return ConcatDataset([Subset(images, draw(train.labels, count).tolist())]), 0
        if val is not None and has_classes(val):
            with as_user_error(UserError, prefix=f"--probe_freq {self.args.probe_freq}: "):
                for line in match_classes(val, train.classes, train.root):
                    self.say(line)
            asked, queries = draw(val.labels, max(1, self.args.probe_images // 4)), ImageDataset(val, self.transform)
            kept = np.arange(len(train.labels))
        else:
            asked, queries = draw(train.labels, count // 4 or 1), images
            kept = np.setdiff1d(np.arange(len(train.labels)), asked)
        bank = kept[draw(train.labels[kept], self.args.probe_images - len(asked))].tolist()
        if queries is images:  # a mixture can hold an image several times
            names = {train.name(index) for index in asked.tolist()}
            bank = [index for index in bank if train.name(index) not in names]
        among = f"{len(asked)} images of {queries.source.root} among {len(bank)} of {train.root}"
        classes = f"{len(train.classes)} classes ({some(train.classes)})"
        self.say(f"probe: kNN of {classes}, {among}; RankMe of all, {every}")
        return ConcatDataset([Subset(images, bank), Subset(queries, asked.tolist())]), len(asked)

    def measure(self, model: PretrainModel, run: Run, log: Log) -> dict[str, float]:
        """Measure what is due after the current epoch; all processes call it, before `run.end_epoch`.

        Args:
            model: the bare model, or a sharded one.
            run: of the model.
            log: of this rank.

        Returns:
            Those that are due of: `test_loss`, the mean objective over the intact images of val/; `test_knn_acc1`, the
            top-1 accuracy of the queries in percent; `rankme`, see there; `val_share` and `probe_share`, the percentage
            of the time since this process opened its images that each has taken. NaN where no image is left.

        Raises:
            Interrupted: the run was asked to stop; a checkpoint of the end of the epoch is written.
        """
        found: dict[str, float] = {}
        try:
            for name, freq, images, of in (
                ("val", self.args.val_freq, self.val, self.loss_on_val),
                ("probe", self.args.probe_freq, self.probed, self.probe),
            ):
                if images is None or ((run.epoch + 1) % freq and run.epoch + 1 != self.args.epochs):
                    continue
                began = time.monotonic()
                loader = chunk_loader(images, LabelledBatches(self.transform), self.args, self.device, CHUNK)
                with _left_as_it_is(model, self.device):
                    found |= of(model, Chunks(loader, len(images), run, log, name))
                self.spent[name] += time.monotonic() - began
                found[f"{name}_share"] = round(100 * self.spent[name] / (time.monotonic() - self.start), 2)
        except Interrupted:  # raised inside of contexts that a checkpoint must not be written in
            run.leave()
        return found

    def loss_on_val(self, model: PretrainModel, chunks: "Chunks") -> dict[str, float]:
        """Return `test_loss`; broken images are left out, and counted."""
        compute_loss = loss_of(model)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # losses, intact images
        for _, imgs, labels in chunks:
            if chunks.loader.broken:
                imgs = imgs[labels >= 0]  # waits for the device
            if len(imgs):
                with autocast(self.device):
                    loss = compute_loss(imgs, labels)
                sums += torch.stack([loss.double() * len(imgs), sums.new_tensor(len(imgs))])
        total, count = reduce_sum(sums).tolist()
        if count < chunks.images:
            self.say(f"{chunks.images - int(count)} broken images of val are left out of the loss")
        return {"test_loss": total / count if count else math.nan}

    def probe(self, model: PretrainModel, chunks: "Chunks") -> dict[str, float]:
        """Return `test_knn_acc1`, if there are labels, and `rankme`.

        Broken images are left out. A query whose features are not finite, or zero, counts as wrong; a neighbour like
        that is left out, and there is no rank then.
        """
        last, images = range(len(model.layers), len(model.layers) + 1), chunks.images
        features = torch.zeros(images, model.embed_dim, device=self.device)
        labels = torch.zeros(images, dtype=torch.int64, device=self.device)
        for rows, imgs, numbers in chunks:
            with autocast(self.device):
                features[rows] = pool(model, encode(model, imgs, last))
            labels[rows] = numbers
        # each row is of one process, and zero on the others; on the CPU no TF32 chooses other neighbours
        features, labels = reduce_sum(features).cpu(), reduce_sum(labels).cpu()
        intact = labels >= 0
        if not intact.all():
            self.say(f"{int((~intact).sum())} broken images are left out of the probe")
        found = {"rankme": rankme(features[intact])}
        if self.queries:
            bank, asked = (torch.arange(images) < images - self.queries), intact.clone()
            asked[bank] = False
            bank &= intact & has_direction(features)
            found["test_knn_acc1"] = self._accuracy(features[bank], labels[bank], features[asked], labels[asked])
        return found

    def _accuracy(self, bank: Tensor, labels: Tensor, asked: Tensor, wanted: Tensor) -> float:
        """Return kNN's top-1 accuracy in percent; see `knn`. Each process classifies a share."""
        if not len(bank) or not len(asked):
            return math.nan
        mine, k = slice(rank(), None, world_size()), min(K, len(bank))
        best = knn(bank, labels, asked[mine].nan_to_num(), [k], TEMPERATURE, self.classes)[k]
        hits = (best[:, 0] == wanted[mine]) & has_direction(asked[mine])
        return 100 * reduce_sum(hits.sum().to(self.device)).item() / len(asked)


class Chunks:
    """Yield this rank's chunks: rows (a slice), images (B, C, H, W), labels (B,). Random numbers depend on the rows.

    Attributes:
        images: number of rows, of all ranks.

    Raises:
        Interrupted: the run was asked to stop.
    """

    def __init__(self, loader: DeviceLoader, images: int, run: Run, log: Log, title: str) -> None:
        self.loader, self.images, self.run, self.log, self.title = loader, images, run, log, title

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        progress = self.log.progress(self.title, len(self.loader))
        sampler: Any = self.loader.loader.batch_sampler
        for step, (chunk, (imgs, labels)) in enumerate(zip(sampler, self.loader, strict=True), start=1):
            seed_everything(SEED, chunk[0], of_rank=0)
            yield slice(chunk[0], chunk[-1] + 1), imgs, labels
            progress.update(len(chunk) * world_size())
            if step <= sampler.common and self.run.stop.agreed():
                raise Interrupted
        progress.close()


@contextmanager
def _left_as_it_is(model: PretrainModel, device: torch.device) -> Iterator[None]:
    """Evaluate a model without gradients, and leave it and all generators of random numbers as they were.

    Its blocks run eagerly and without CUDA graphs: a graph compiled here would make later ones of training differ.
    """
    generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
    eager, training = torch.compiler.set_stance("force_eager"), model.training
    with preserve_generators(), generators, torch.no_grad(), unsharded(model), eager:
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def has_classes(source: Source) -> bool:
    """Return whether the images have classes to tell apart, which those of one folder have not."""
    return len(source.classes) > 1


def draw(labels: np.ndarray, count: int) -> np.ndarray:
    """Draw images by a fixed seed, of each class as many as of the others while it has any.

    Args:
        labels: (n,) int64.
        count: at most so many.

    Returns:
        Their indices, sorted, (min(count, n),) int64.
    """
    order = np.random.default_rng(SEED).permutation(len(labels))
    by_class = order[labels[order].argsort(kind="stable")]  # classes one after the other, each in random order
    turn = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])  # inside of its class
    return np.sort(by_class[np.lexsort((order.argsort()[by_class], turn))[:count]])


def rankme(features: Tensor) -> float:
    """Return the effective rank of features: exp of the entropy of their normalised singular values.

    From 1, all features point in one direction, to min(n, C). Source: Garrido et al. 2023, arXiv 2210.02885; without
    its epsilon of 1e-7, since 0 log 0 is 0.

    Args:
        features: (n, C), not centred.

    Returns:
        NaN without features, or if some are not finite or all are zero.
    """
    if not features.numel() or not features.isfinite().all() or not features.any():
        return math.nan
    values = torch.linalg.svdvals(features.double())
    return torch.special.entr(values / values.sum()).sum().exp().item()


def describe(found: dict[str, float]) -> str:
    """Return what `Watch.measure` found as part of a line, "" for nothing."""
    parts = []
    if "test_loss" in found:
        parts.append(f", on val {found['test_loss']:.4f} ({found['val_share']:.2f} % of the time)")
    if "rankme" in found:
        accuracy = f"{K}-NN {found['test_knn_acc1']:.2f} %, " if "test_knn_acc1" in found else ""
        parts.append(f", {accuracy}RankMe {found['rankme']:.1f} ({found['probe_share']:.2f} % of the time)")
    return "".join(parts)
