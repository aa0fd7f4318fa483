"""Run state, checkpointing and resuming."""

import argparse
import hashlib
import math
import socket
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from util.arguments import effective_batch_size, image_size
from util.checkpoints import convert, inspection
from util.checkpoints.checkpoint_file import read, weight_keys
from util.checkpoints.checkpoint_folder import CheckpointFolder
from util.data.class_names import differing
from util.data.pixels import Pixels
from util.data.sources.source import Source
from util.distributed.parallel import join_gather, local_share
from util.distributed.processes import barrier, gather, is_main, on_main, world_size
from util.distributed.signals import StopRequest
from util.errors import Interrupted, RunError, UserError
from util.files import some
from util.lock import lock_folder
from util.training import resume
from util.training.precision import LossScale

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

# Arguments that do not change a run's result, except for rounding and the random numbers of each process. For some,
# values derived from them are compared instead: lr, data and the effective batch size.
FREE = {
    "output_dir", "log_dir", "data_path", "resume", "finetune", "model_key", "ignore_keys", "start_epoch",
    "allow_changed_args", "save_freq", "save_every_steps", "keep", "blr", "batch_size", "accum_iter", "world_size",
    "num_workers", "worker_timeout", "pin_mem", "max_bad_samples", "max_nonfinite", "dist_timeout", "device", "compile",
    "cuda_graph", "fused_ops", "deterministic", "fsdp", "scan_backend", "dtype", "eval", "dist_eval", "eval_bad",
    "output", "tracker", "vis_freq", "grad_checkpointing", "print_freq", "val_freq", "probe_freq", "probe_images",
    "category_ids", "classes", "multi_scale",
}  # fmt: skip


class Graphs(Protocol):
    """CUDA graphs of a model's blocks; see `ops.cuda_graph.BlockGraphs`."""

    def capture(self) -> None:
        """Capture the blocks as the first batch called them; called after each backward pass."""


class Run:
    """The state of a training run that its checkpoints keep. As a context, it handles signals and writes checkpoints.

    Random numbers depend only on the seed and the position in the run, so checkpoints hold no generator state. The
    position inside an epoch is counted in images, so a run can resume with another number of processes.

    Attributes:
        epoch: the current epoch, from 0.
        samples: images of it trained on so far, by all processes.
        loss: (2,) float64, sum and number of the finite losses of these images.
        skipped_in_a_row: number of updates skipped since the last one that was made.
        best: best accuracies of a finetuning run: `max_accuracy`, `ema_max_accuracy`.

    Args:
        args: of the script.
        model: the bare model.
        optimizer: its optimizer.
        ema: the moving average of its weights; it starts from the weights unless `content` has one.
        class_names: of a classifier, by output; "" for an output without a name.
        content: checkpoint to resume from, as `starting_point` returns it.
        images: number of training images; a resumed position must not exceed it.
        folder: of the checkpoints; without one, none are written.
        say: shows a line to the user.
        graphs: captures blocks after the first batch.

    Raises:
        UserError: `content` is not of this run; see `_restore`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        optimizer: Optimizer,
        ema: "ModelEmaV3 | None" = None,
        class_names: list[str] | None = None,
        content: dict | None = None,
        images: int = 0,
        folder: Path | None = None,
        say: Callable[[str], None] = print,
        graphs: Graphs | None = None,
    ) -> None:
        self.args, self.model, self.optimizer, self.ema = args, model, optimizer, ema
        self.class_names = class_names
        self.epoch, self.samples = args.start_epoch or 0, 0
        self.loss = torch.zeros(2, dtype=torch.float64)
        self.skipped_in_a_row = 0
        self.best: dict[str, float] = {}
        self.recent: deque[float] = deque(maxlen=20)  # the losses logged last
        self.loss_scale = LossScale()
        self.stop = StopRequest()
        self.graphs = graphs
        if content is not None:
            self._restore(content, images)
        if ema is not None and not (content is not None and "model_ema" in weight_keys(content)):
            ema.set(model)
            if content is not None:
                say(f"{args.resume} holds no EMA: the EMA starts from the weights")
        self.folder = CheckpointFolder(folder, args.keep, say) if folder is not None and is_main() else None

    def __enter__(self) -> "Run":
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self._close()
            elif self.folder is not None:
                self.folder.close() if kind is Interrupted else self.folder.wait()
        finally:
            if kind is Interrupted:
                barrier()  # when one process ends, torchrun ends all, also the one that writes
            self.stop.__exit__(kind, *exception)

    def _restore(self, content: dict, images: int) -> None:
        """Restore weights, optimizer, EMA and position from a checkpoint of this run.

        Raises:
            UserError: see `resume.resume`; or arguments or classes have changed, or the checkpoint holds an EMA and
                this run keeps none.
        """
        changed = changed_arguments(self.args, content)
        if changed and not self.args.allow_changed_args:
            listed = ", ".join(changed)
            advice = "--allow_changed_args resumes with the new ones"
            raise UserError(f"{self.args.resume} is of a run with other arguments: {listed}; {advice}")
        others = differing(inspection.class_names(content), self.class_names or [])
        if others:
            advice = "--finetune into another --output_dir takes its weights and a new head"
            raise UserError(f"{self.args.resume} is of a run with other classes: {some(others)}; {advice}")
        self.epoch, self.samples = resume.resume(self.args, content, self.model, self.optimizer)
        per_update, misfit = effective_batch_size(self.args), ""
        if self.samples > images:
            misfit = f"but --data_path has only {images}"
        elif self.samples % per_update and self.args.start_epoch != self.epoch:
            misfit = f"which is no multiple of the effective batch size {per_update}"
        if misfit:
            written = f"{self.args.resume} was written after {self.samples} images of its epoch"
            raise UserError(f"{written}, {misfit}: --start_epoch {self.epoch} restarts the epoch")
        if self.samples % per_update:
            self.samples = 0
        if self.samples:
            self.loss = torch.tensor(content.get("loss", [0.0, 0.0]), dtype=torch.float64)
        self.skipped_in_a_row = content.get("skipped_in_a_row", 0)
        self.loss_scale.load_state_dict(content.get("scaler", {}))
        self.best = {key: content[key] for key in ("max_accuracy", "ema_max_accuracy") if key in content}
        if "model_ema" in weight_keys(content):
            if self.ema is None:
                raise UserError(f"{self.args.resume} holds an EMA: resume with --ema_decay")
            convert.load(self.ema.module, inspection.weights(content, "model_ema"))

    def describe(self, images: int, device: torch.device) -> str:
        """Return two lines about the run: model, number of training images, device, batch size and epochs."""
        args, processes = self.args, world_size()
        name = type(self.model).__name__.removeprefix("FSDP")
        parameters = sum(p.numel() for p in self.model.parameters())
        started = f", from epoch {self.epoch}" if self.epoch < args.epochs else ", all of them done"
        return (
            f"{name}: {parameters / 1e6:.1f} M parameters, input {' x '.join(map(str, image_size(args)))}, "
            f"{images} training images, {processes} x {device.type}\n"
            f"batch {effective_batch_size(args)} = {args.batch_size} x {args.accum_iter} accumulated x {processes} "
            f"processes, lr {args.lr:.3g}, {args.epochs} epochs{started if self.epoch else ''}"
        )

    def content(self) -> dict:
        """Return the content of a checkpoint, see `util.checkpoints.inspection`; with --fsdp, tensors are sharded."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch - 1,
            "samples": self.samples,
            "loss": self.loss.tolist(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "scaler": self.loss_scale.state_dict(),  # without float16, for tools based on MAE, which expect one
            "args": self.args,
            **self.best,
        }
        if self.class_names is not None:
            content["class_names"] = self.class_names
        if self.ema is not None:
            content["model_ema"] = self.ema.module.state_dict()
        return content

    def check_finite(self) -> None:
        """Raise RunError, which names some, if weights or EMA are not finite on any process. All processes call it."""
        models = {"": self.model} | ({} if self.ema is None else {"EMA of ": self.ema.module})
        shares = {f"{kind}{n}": local_share(p.detach()) for kind, m in models.items() for n, p in m.named_parameters()}
        finite = torch.stack([share.isfinite().all() for share in shares.values()]).tolist()
        broken = gather([name for name, is_good in zip(shares, finite, strict=True) if not is_good])
        if any(broken):
            names = list(dict.fromkeys(name for share in broken for name in share))
            epoch = max(0, self.epoch - (self.samples == 0))  # `end_epoch` has counted it already
            raise RunError(
                f"an update of epoch {epoch} has made weights that are not finite: {some(names)}. They are not "
                "saved, and older checkpoints are untouched: --resume auto with a lower --blr and --allow_changed_args "
                "resumes from the newest"
            )

    def save(self, *names: str) -> None:
        """Write checkpoint-last.pth and further names in the background after `check_finite`. All processes call it."""
        self.check_finite()
        if self.folder is not None:
            self.folder.save(self.content(), *names)
        else:
            join_gather(self.content())

    def end_epoch(self, *names: str) -> None:
        """Count the epoch as done and `save`; when it is due, also as checkpoint-{epoch}.pth."""
        ended = self.epoch
        self.epoch, self.samples = self.epoch + 1, 0
        self.loss = torch.zeros(2, dtype=torch.float64)
        if self.epoch % self.args.save_freq == 0 or self.epoch == self.args.epochs:
            names = (*names, f"checkpoint-{ended}.pth")
        self.save(*names)

    def improved(self, name: str, accuracy: float) -> bool:
        """Record an accuracy; return whether it is the best so far."""
        better = accuracy > self.best.get(name, -math.inf)
        self.best[name] = max(accuracy, self.best.get(name, -math.inf))
        return better

    def leave(self) -> NoReturn:
        """Write a checkpoint and raise Interrupted; the run's context waits for the file. All processes call it."""
        self.save()
        raise Interrupted(f"stopped in epoch {self.epoch} after {self.samples} images; --resume auto resumes there")

    def _close(self) -> None:
        """Wait; raise RunError if a checkpoint could not be written: the last, the best, or one to be kept."""
        if self.folder is not None:
            self.folder.close()
            if self.folder.lost:
                lost = ", ".join(sorted(self.folder.lost))
                raise RunError(f"{lost} could not be written to {self.folder.path} when it was due")


def starting_point(args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict | None:
    """Lock the output folder, and read the checkpoint to resume from, if any.

    `--resume FILE` takes that file; `--resume auto` takes the newest undamaged checkpoint of the folder, if it has one.

    `args.resume` becomes the path of the checkpoint, or None; `say` shows a line to the user.

    Returns:
        The checkpoint's content, or None.

    Raises:
        UserError: another run uses the folder, it holds checkpoints that this run would replace, or the file is no
            checkpoint.
    """

    def choose() -> str | None:
        last_owner = lock_folder(folder)
        if last_owner:
            say(f"{last_owner} ended without releasing {folder}")
        kept = sorted(folder.glob("checkpoint-*.pth"))
        if args.resume == "auto":
            newest, damaged = CheckpointFolder(folder, args.keep, say).newest()
            for reason in damaged:
                say(f"{reason}; renamed to *.damaged")
            if newest is not None:
                say(f"resuming from {newest}")
            return None if newest is None else str(newest)
        if kept and not (args.resume and folder.resolve() in Path(args.resume).resolve().parents):
            raise UserError(
                f"--output_dir {folder} holds {kept[0].name} of another run: --resume auto continues that run, or "
                "choose another folder"
            )
        return args.resume

    args.resume = on_main(choose)
    return read(args.resume) if args.resume else None


def fingerprint(source: Source) -> str:
    """Return a hash of a dataset, independent of its path: of its classes and labels in order, or of its `identity`."""
    digest = hashlib.sha256("\0".join(source.classes).encode(errors="surrogateescape"))
    digest.update(source.labels.astype("int64").tobytes() if source.classes else source.identity().encode())
    return digest.hexdigest()[:16]


def record_images(args: argparse.Namespace, source: Source) -> None:
    """Set `args.data` and `args.images`, by which a resumed run recognises its images."""
    args.data, args.images = fingerprint(source), f"{type(source).__name__} {source.identity()[:16]}"


def check_same_images(*sources: Source) -> None:
    """Raise UserError, which names a process, unless all processes see the same images. All processes call it."""
    own = [(len(source.labels), source.identity(), fingerprint(source)) for source in sources]
    (first, host), *others = gather((own, socket.gethostname()))
    for number, (images, other_host) in enumerate(others, 1):
        for source, seen, expected in zip(sources, images, first, strict=True):
            if seen != expected:
                raise UserError(
                    f"rank {number} on {other_host} sees other images than rank 0 on {host}: {seen[0]} and "
                    f"{expected[0]} of {source.root}, or other names, sizes or labels. All need the same files"
                )


def changed_arguments(args: argparse.Namespace, content: dict) -> list[str]:
    """Return the arguments that differ from the checkpoint's and would change the run's result.

    Checkpoints of the released code and of our first versions do not record enough: the list is empty for them.
    """
    if "samples" not in content:
        return []
    counts = ("batch_size", "accum_iter", "world_size")
    saved = inspection.PUBLISHED | Pixels().arguments() | inspection.saved_arguments(content, *counts)
    now = vars(args)
    compared = sorted(saved.keys() & now.keys() - FREE - {"data", "images"})
    changed = [f"{k} {saved[k]} -> {now[k]}" for k in compared if saved[k] != now[k]]
    changed += _changed_images(saved, now)
    before, after = (math.prod(values[name] for name in counts) for values in (saved, now))
    if before != after:
        changed.append(f"effective batch {before} -> {after}")
    return changed


def _changed_images(saved: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return how the training images differ, if they do, from the arguments that `record_images` set.

    What identifies an image differs between readers, so it is compared only where the reader is the same. Earlier
    versions recorded classes and labels only.
    """
    (reader, _, images), (reader_now, _, images_now) = (
        str(values.get("images", "")).partition(" ") for values in (saved, now)
    )
    if reader == reader_now and images != images_now:
        return ["images of --data_path (other ones, names or order)"]
    if "data" in saved and "data" in now and saved["data"] != now["data"]:
        return ["images of --data_path (other ones, classes or labels)"]
    return []
