"""A training run: where it stands, its checkpoints, and how it goes on after whatever ended its processes."""

import argparse
import hashlib
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from util.arguments import effective_batch_size
from util.checkpoints import convert, inspection
from util.checkpoints.checkpoint_file import read, weight_keys
from util.checkpoints.checkpoint_folder import CheckpointFolder
from util.data.class_names import differing
from util.data.readers import Source
from util.distributed.parallel import join_gather, local_share
from util.distributed.processes import barrier, gather, is_main, on_main
from util.distributed.signals import StopRequest
from util.errors import Interrupted, RunError, UserError
from util.files import some
from util.lock import lock_folder
from util.training import resume

# Arguments that do not change what a run computes, but for rounding and for what each process draws; some count by what
# follows from them: lr, data and the effective batch.
FREE = {
    "output_dir", "log_dir", "data_path", "resume", "finetune", "model_key", "ignore_keys", "start_epoch",
    "allow_changed_args", "save_freq", "save_every_steps", "keep", "blr", "batch_size", "accum_iter", "world_size",
    "num_workers", "worker_timeout", "pin_mem", "max_bad_samples", "max_nonfinite", "dist_timeout", "device", "compile",
    "cuda_graph", "fused_ops", "deterministic", "fsdp", "scan_backend", "eval", "dist_eval", "eval_bad", "tracker",
    "vis_freq",
}  # fmt: skip


class Graphs(Protocol):
    """CUDA graphs of a model's blocks; see `ops.cuda_graph.BlockGraphs`."""

    def capture(self) -> None:
        """Capture the blocks as the first batch called them; called after each backward pass."""


class Run:
    """Everything of a training run that outlives its processes. Entered, it listens to signals and owns its folder.

    Whatever is random is drawn from the seed and the position in the run, so no generator's state belongs to it, and
    `samples` instead of batches say where an epoch stands, so the number of processes does not either.

    Attributes:
        epoch: the one under way, from 0.
        samples: images of it, of all processes, that have been trained on.
        loss: (2,) float64, sum of the finite losses over these images, and their number.
        skipped_in_a_row: updates up to now that were skipped.
        best: what a finetuning run saves beside the weights: `max_accuracy`, `ema_max_accuracy`.

    Args:
        args: of the script.
        model: the bare model.
        optimizer: its optimizer.
        ema: the moving average of its weights; it starts from the weights unless `content` has one.
        class_names: of a classifier, by output; "" for an output without a name.
        content: checkpoint to resume from, as `starting_point` returns it.
        images: number of training images, which a resumed position must lie within.
        folder: where checkpoints go; without one, none are kept.
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
        ema: ModelEmaV3 | None = None,
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
        self.recent: deque[float] = deque(maxlen=20)  # losses that were logged last
        self.stop = StopRequest()
        self.graphs = graphs
        if content is not None:
            self._restore(content, images)
        if ema is not None and not (content is not None and "model_ema" in weight_keys(content)):
            ema.set(model)
            if content is not None:
                say(f"{args.resume} holds no EMA: it starts from the weights")
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
                barrier()  # the end of any process would end the one that writes
            self.stop.__exit__(kind, *exception)

    def _restore(self, content: dict, images: int) -> None:
        """Take over weights, optimizer, EMA and position from a checkpoint of this run.

        Raises:
            UserError: see `resume.resume`; or arguments have changed, or it holds an EMA and this run keeps none.
        """
        changed = changed_arguments(self.args, content)
        if changed and not self.args.allow_changed_args:
            raise UserError(
                f"{self.args.resume} is of a run with other arguments: {', '.join(changed)}; --allow_changed_args goes "
                "on with those of now"
            )
        others = differing(inspection.class_names(content), self.class_names or [])
        if others:
            raise UserError(
                f"{self.args.resume} is of a run with other classes: {some(others)}; --finetune into another "
                "--output_dir takes its weights and a new head"
            )
        self.epoch, self.samples = resume.resume(self.args, content, self.model, self.optimizer)
        if self.samples > images:
            raise UserError(
                f"{self.args.resume} stands at image {self.samples} of its epoch, and there are {images}: "
                f"--start_epoch {self.epoch} begins the epoch again"
            )
        whole_batches = effective_batch_size(self.args)
        if self.samples % whole_batches:
            if self.args.start_epoch != self.epoch:
                raise UserError(
                    f"{self.args.resume} stands at image {self.samples} of its epoch, which is no multiple of the "
                    f"{whole_batches} of an update: --start_epoch {self.epoch} begins the epoch again"
                )
            self.samples = 0
        if self.samples:
            self.loss = torch.tensor(content.get("loss", [0.0, 0.0]), dtype=torch.float64)
        self.skipped_in_a_row = content.get("skipped_in_a_row", 0)
        self.best = {key: content[key] for key in ("max_accuracy", "ema_max_accuracy") if key in content}
        averaged = "model_ema" in weight_keys(content)
        if averaged and self.ema is None:
            raise UserError(f"{self.args.resume} holds an EMA: say --ema_decay to go on with it")
        if averaged:
            convert.load(self.ema.module, inspection.weights(content, "model_ema"))

    def content(self) -> dict:
        """What a checkpoint holds; see `util.checkpoints.inspection`. With --fsdp, tensors are still sharded."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch - 1,
            "samples": self.samples,
            "loss": self.loss.tolist(),
            "skipped_in_a_row": self.skipped_in_a_row,
            # bf16 needs no loss scaling; tools of the MAE line expect a loadable state all the same
            "scaler": torch.amp.GradScaler("cpu").state_dict(),
            "args": self.args,
            **self.best,
        }
        if self.class_names is not None:
            content["class_names"] = self.class_names
        if self.ema is not None:
            content["model_ema"] = self.ema.module.state_dict()
        return content

    def check_finite(self) -> None:
        """Make sure that the weights and their EMA are finite on all processes, which all call it.

        Raises:
            RunError: they are not; names some of them.
        """
        models = {"": self.model} | ({} if self.ema is None else {"EMA of ": self.ema.module})
        shares = {f"{kind}{n}": local_share(p.detach()) for kind, m in models.items() for n, p in m.named_parameters()}
        finite = torch.stack([share.isfinite().all() for share in shares.values()]).tolist()
        broken = gather([name for name, fits in zip(shares, finite, strict=True) if not fits])
        if any(broken):
            names = list(dict.fromkeys(name for share in broken for name in share))
            epoch = max(0, self.epoch - (self.samples == 0))  # `end_epoch` has gone on to the next one
            raise RunError(
                f"an update of epoch {epoch} has made weights that are not finite: {some(names)}. They are not "
                "saved, and older checkpoints are untouched: --resume auto with a lower --blr and --allow_changed_args "
                "goes on from the newest"
            )

    def save(self, *names: str) -> None:
        """Write a checkpoint in the background: checkpoint-last.pth and further names; all processes call it.

        Raises:
            RunError: weights or EMA are not finite; nothing is written then.
        """
        self.check_finite()
        if self.folder is not None:
            self.folder.save(self.content(), *names)
        else:
            join_gather(self.content())

    def end_epoch(self, *names: str) -> None:
        """Go to the next epoch and `save`, also as checkpoint-{epoch}.pth where one is due."""
        ended = self.epoch
        self.epoch, self.samples = self.epoch + 1, 0
        self.loss = torch.zeros(2, dtype=torch.float64)
        if self.epoch % self.args.save_freq == 0 or self.epoch == self.args.epochs:
            names = (*names, f"checkpoint-{ended}.pth")
        self.save(*names)

    def improved(self, name: str, accuracy: float) -> bool:
        """Note an accuracy; whether it is the best so far."""
        better = accuracy > self.best.get(name, -math.inf)
        self.best[name] = max(accuracy, self.best.get(name, -math.inf))
        return better

    def leave(self) -> NoReturn:
        """Write a checkpoint and end the process; all processes call it.

        Raises:
            Interrupted: which waits at the end of the run's context until it is written.
        """
        self.save()
        raise Interrupted(f"stopped in epoch {self.epoch} after {self.samples} images; --resume auto goes on")

    def _close(self) -> None:
        """Wait until everything is written.

        Raises:
            RunError: the last checkpoint could not be, or the best one, or one that was to be kept.
        """
        if self.folder is not None:
            self.folder.close()
            if self.folder.lost:
                lost = ", ".join(sorted(self.folder.lost))
                raise RunError(f"{lost} could not be written to {self.folder.path} when it was due")


def starting_point(args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict | None:
    """Take the output folder, and read the checkpoint that the run goes on from.

    What counts: `--resume FILE`, else with `--resume auto` the newest checkpoint of the folder that is not damaged,
    else `--finetune`, else random weights. With a checkpoint to resume, `--finetune` is left behind, and
    `--start_epoch` begins that epoch instead of where the checkpoint stands, unless that is where it has led to.

    Args:
        args: of the script; its `resume` becomes the path of what was found, or None.
        folder: of the run.
        say: shows a line to the user.

    Raises:
        UserError: another run has the folder, it holds checkpoints that this run would replace, or the file is no
            checkpoint.
    """

    def choose() -> str | None:
        left_behind = lock_folder(folder)
        if left_behind:
            say(f"{left_behind} ended without releasing {folder}")
        kept = sorted(folder.glob("checkpoint-*.pth"))
        if args.resume == "auto":
            newest, damaged = CheckpointFolder(folder, args.keep, say).newest()
            for reason in damaged:
                say(f"{reason}; renamed to *.damaged")
            if newest is not None:
                say(f"going on from {newest}")
            return newest and str(newest)
        if kept and not (args.resume and folder.resolve() in Path(args.resume).resolve().parents):
            raise UserError(
                f"--output_dir {folder} holds {kept[0].name} of another run: --resume auto goes on with it, or "
                "choose another folder"
            )
        return args.resume

    args.resume = on_main(choose)
    return read(args.resume) if args.resume else None


def fingerprint(source: Source) -> str:
    """What identifies training data wherever they lie: classes, and the label of every image in its order."""
    digest = hashlib.sha256("\0".join(source.classes).encode(errors="surrogateescape"))
    digest.update(source.labels.astype("int64").tobytes())
    return digest.hexdigest()[:16]


def changed_arguments(args: argparse.Namespace, content: dict) -> list[str]:
    """What this command line asks for otherwise than the run that wrote a checkpoint, and would change its result.

    Files of the released code and of our first versions do not tell enough: nothing is found in them.
    """
    if "samples" not in content:
        return []
    counts = ("batch_size", "accum_iter", "world_size")
    saved, now = inspection.PUBLISHED | inspection.saved_arguments(content, *counts), vars(args)
    changed = [f"{k} {saved[k]} -> {now[k]}" for k in sorted(saved.keys() & now.keys() - FREE) if saved[k] != now[k]]
    batches = [math.prod(values[name] for name in counts) for values in (saved, now)]
    if batches[0] != batches[1]:
        changed.append(f"effective batch {batches[0]} -> {batches[1]}")
    return changed
