"""Finetune an encoder for a task: a model, labelled images, a loss and a metric."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ops import kernel_choice
from util import arguments
from util.checkpoints import checkpoint_file
from util.data.class_names import differing
from util.data.device_loader import DeviceLoader
from util.data.pixels import IMAGENET, Pixels
from util.distributed.parallel import distribute, unsharded
from util.distributed.processes import init_device, is_main
from util.distributed.signals import StopRequest
from util.errors import UserError, as_user_error
from util.files import printable, some
from util.lr_decay import param_groups_layer_decay
from util.seeding import seed_everything
from util.tracking.run_log import Log, clock, open_log
from util.training.loop import train_epoch
from util.training.precision import autocast
from util.training.run_state import Run, starting_point

if TYPE_CHECKING:
    from timm.data import Mixup
    from timm.utils import ModelEmaV3

    from pretrained import Checkpoint


LOGGER = logging.getLogger("arm")


class Task(NamedTuple):
    """Hold what a run finetunes: a model, its images, a loss and a metric.

    Attributes:
        model: the bare model, with the weights to start from. It has `compile`, and the blocks of its encoder lie in a
            `ModuleList` of itself, or of its `backbone`.
        loader: of the training images.
        loss_of: from the model, bare or distributed, to the function that computes the loss of a batch.
        evaluate: (model, title, stop) -> results by name, see `util.training.evaluation.evaluate`.
        describe: results -> one line.
        best: name of the result that chooses the best checkpoint; higher is better.
        class_names: by output.
        draw: model -> figures (h, w, 3) uint8 by name, for every `--vis_freq` epochs; only rank 0 calls it.
    """

    model: nn.Module
    loader: DeviceLoader
    loss_of: Callable[[nn.Module], Callable[..., Tensor | dict[str, Tensor]]]
    evaluate: Callable[[nn.Module, str, StopRequest], dict[str, float]]
    describe: Callable[[dict[str, float]], str]
    best: str
    class_names: list[str]
    draw: Callable[[nn.Module], dict[str, np.ndarray]] | None = None


def begin(args: argparse.Namespace) -> tuple[torch.device, Log, dict | None]:
    """Begin a run of any task: return the device, the log, and the content of the checkpoint to start from.

    With `args.eval` that is the checkpoint to evaluate. `args.model_key` becomes that of the weights to start from.

    Raises:
        UserError: arguments contradict each other, folders cannot be written, or the checkpoint cannot be read.
    """
    arguments.check_arguments(args)
    if args.model_key and args.resume and not args.eval:
        raise UserError("--model_key chooses among the weights of --finetune; --resume takes both")
    if args.ignore_keys and not (args.finetune or args.eval):
        raise UserError("--ignore_keys is for --finetune and --eval: --resume continues a run of this code")
    if args.eval and not (args.resume or args.finetune):
        raise UserError("--eval needs a checkpoint: --resume FILE")
    if args.freeze is not None and args.eval:
        raise UserError(f"--freeze {args.freeze} is for training, and --eval trains nothing: leave one of them out")
    if args.output and not args.eval:
        raise UserError("--output is the folder for the report of --eval; that of a run is --output_dir")
    device = init_device(args.device, args.dist_timeout, args.deterministic)
    seed_everything(args.seed)
    if args.eval:
        log = open_log(every=args.print_freq)
        return device, log, checkpoint_file.read(args.resume or args.finetune, args.ignore_keys)
    folders = arguments.output_folders(args)
    log = open_log(folders, args.tracker, args.print_freq)
    content = starting_point(args, folders[0], log.say)
    if content is None and args.finetune:
        content = checkpoint_file.read(args.finetune, args.ignore_keys)
        args.model_key = checkpoint_file.chosen_key(content, args.model_key)
    if args.freeze is not None and content is None:
        raise UserError(f"--freeze {args.freeze} keeps weights as they are: --finetune says which")
    return device, log, content


def encoder_sizes(args: argparse.Namespace, found: Checkpoint | None, task: str) -> dict[str, Any]:
    """Return the arguments of the encoder that the command line and the checkpoint to start from describe.

    The command line comes first, then the checkpoint: width, depth, patch size, channels and directions; for evaluation
    also the input size.

    Raises:
        UserError: the checkpoint has weights for another number of directions; or it is of another task than this one,
            for evaluation or resuming.
    """
    sizes: dict[str, Any] = {}
    if found is not None:
        if found.task != task and (args.eval or args.resume):
            raise UserError(f"{found.name} comes from {found.task}: --finetune it first")
        sizes |= {name: size for name, size in found.sizes.items() if name != "num_classes"}
        saved = sizes.get("directions", args.directions)
        if args.directions not in (None, saved):
            raise UserError(
                f"{found.name} has weights for {saved} directions, which --directions {args.directions} cannot take"
            )
        if args.model is not None:
            del sizes["embed_dim"], sizes["depth"]
        if args.eval and args.input_size is None:
            sizes["img_size"] = found.input_size
    sizes |= arguments.given(args, "patch_size", "in_chans", "embed_dim", "depth", "directions")
    if args.input_size is not None:
        sizes["img_size"] = arguments.image_size(args)
    return sizes


def set_up(args: argparse.Namespace, model: Any) -> None:
    """Set `args` to the sizes of the encoder; checkpoint activations and freeze blocks as `args` say.

    `model` is a classifier, or a model with the encoder as `backbone`. Raises UserError if it has fewer blocks than
    --freeze names.
    """
    encoder = getattr(model, "backbone", model)
    args.input_size, args.directions, args.in_chans = list(encoder.image_size), len(encoder.order), encoder.in_chans
    model.set_grad_checkpointing(getattr(args, "grad_checkpointing", False))
    for blocks in arguments.given(args, "freeze").values():
        with as_user_error(ValueError, prefix=f"--freeze {blocks}: "):
            model.freeze(blocks)


def choose_pixels(args: argparse.Namespace, found: Checkpoint | None) -> Pixels:
    """Return the pixels that the command line and the checkpoint describe; set `args` to them, and log unusual ones."""
    pixels = Pixels.of(args, {} if found is None else found.saved_pixels)
    vars(args).update(pixels.arguments())
    if pixels != IMAGENET:
        LOGGER.info("%s%s", pixels, "" if found is None else f"; what no flag says is as in {printable(found.name)}")
    return pixels


def start_from(found: Checkpoint, model: Any, task: str, outputs: tuple[str, ...], names: list[str], log: Log) -> None:
    """Load the weights of `--finetune`, and of a model of the same task all parts that fit; say which outputs are new.

    Args:
        found: the checkpoint.
        model: with the encoder as `backbone`.
        task: of the model.
        outputs: how the names of the parameters of each class begin; they stay new where the classes are others.
        names: classes of this run.
        log: of this rank.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    new = {name: value.clone() for name, value in model.state_dict().items() if name.startswith(outputs)}
    found.load_into(model, keep_head=False)
    if found.task == task and (others := differing(found.class_names, names)):
        model.load_state_dict(new, strict=False)
        log.say(f"the outputs are new: the classes of {printable(found.name)} are others: {some(others)}")


def describe_frozen(model: nn.Module, flag: str, is_new: bool) -> str:
    """Return a line about a frozen model: how much of it is trained, and that a new class token is not."""
    trained, every = (sum(p.numel() for p in model.parameters() if p.requires_grad or not t) for t in (True, False))
    new = "; the class token, which is new, keeps its random values" * is_new
    return f"{flag}: {trained:,} of {every:,} parameters are trained{new}"


def finetune(task: Task, args: argparse.Namespace, device: torch.device, log: Log, content: dict | None) -> None:
    """Train for `args.epochs`; evaluate after every epoch, also the EMA if there is one, and keep the best weights.

    Args:
        task: what to train.
        args: see `util.arguments.add_shared_arguments`; also `ema_decay`, `layer_decay` and, with `task.draw`,
            `vis_freq`.
        device: to train on.
        log: of this rank.
        content: of the checkpoint to resume from.

    Raises:
        UserError: the checkpoint or the arguments do not fit; no training has started then.
    """
    from timm.utils import ModelEmaV3

    model, images = task.model.to(device), len(task.loader.sampler.dataset)
    ema = ModelEmaV3(model, decay=args.ema_decay) if args.ema_decay is not None else None
    wrapped = distribute(model, device, args.fsdp)  # all processes have the weights of rank 0 from here on
    if ema is not None and args.fsdp:
        distribute(ema.module, device, sharded=True)
    groups = param_groups_layer_decay(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)
    kernel_choice.compile_models(args, device, model, *([] if ema is None else [ema.module]))
    run = Run(
        args, model, optimizer, ema, task.class_names, content=content, images=images, folder=Path(args.output_dir),
        say=log.say, graphs=kernel_choice.block_graphs(args, model),
    )  # fmt: skip

    compute_loss = task.loss_of(wrapped)
    log.say(run.describe(images, device))
    start, first = time.monotonic(), run.epoch
    with run:
        while run.epoch < args.epochs:
            epoch = run.epoch
            stats = train_one_epoch(wrapped, compute_loss, task.loader, run, device, log)
            run.save()  # the epoch is not lost if the evaluation is interrupted
            task.loader.report(log.say)
            result = task.evaluate(model, "eval", run.stop)
            stats |= {f"test_{name}": value for name, value in result.items()}
            passed = clock(start, epoch + 1 - first, args.epochs - first)
            log.say(f"epoch {epoch}: loss {stats['train_loss']:.4f}, {task.describe(result)}; {passed}")
            names = ["checkpoint-best.pth"] if run.improved("max_accuracy", result[task.best]) else []
            if ema is not None:
                result = task.evaluate(ema.module, "eval of the EMA", run.stop)
                stats |= {f"ema_test_{name}": value for name, value in result.items()}
                log.say(f"epoch {epoch}: EMA {task.describe(result)}")
                names += ["checkpoint-best-ema.pth"] if run.improved("ema_max_accuracy", result[task.best]) else []
            log.epoch(**stats, epoch=epoch, n_parameters=sum(p.numel() for p in model.parameters()))
            run.end_epoch(*names)
            if task.draw is not None and args.vis_freq and run.epoch % args.vis_freq == 0:
                with unsharded(model), autocast(device):
                    log.images(epoch, **(task.draw(model) if is_main() else {}))


def train_one_epoch(
    model: nn.Module,
    compute_loss: Callable[..., Tensor | dict[str, Tensor]],
    loader: DeviceLoader,
    run: Run,
    device: torch.device,
    log: Log,
) -> dict[str, float]:
    """Train for one epoch, and update the EMA of `run` after every update: see `train_epoch`."""
    if run.ema is None:
        return train_epoch(model, loader, compute_loss, run, device, log)
    return train_epoch(model, loader, compute_loss, run, device, log, partial(update_ema, run.ema, run.model))


@torch.no_grad()
def update_ema(ema: ModelEmaV3, model: nn.Module, skipped: Tensor) -> None:
    """Update the averages of the parameters as `ModelEmaV3.update` does, unless the update of the weights was skipped.

    Only the device knows whether it was: `skipped` is 1 or 0 there, so that the host does not wait.
    """
    averages: list[Tensor] = list(ema.module.parameters())
    values: list[Tensor] = list(model.parameters())
    steps = torch._foreach_sub(values, averages)
    torch._foreach_mul_(steps, (1 - ema.decay) * (1 - skipped))
    torch._foreach_add_(averages, steps)


def loss_of(model: nn.Module, criterion: nn.Module, mixup: Mixup | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that computes the loss of a batch: images (B, in_chans, H, W), labels (B,) int64 -> scalar.

    `criterion` takes logits and labels; with `mixup`, which mixes images and labels, logits and class probabilities.
    """

    def compute_loss(imgs: Tensor, labels: Tensor) -> Tensor:
        if mixup is not None:
            imgs, labels = mixup(imgs, labels)
        return criterion(model(imgs), labels)

    return compute_loss
