"""Repeat an update whose gradient was not finite, and name the first modules and parameters with such values.

    python tools/replay_nonfinite.py ./out_b/nonfinite-epoch900-batch17

reads the folder that a run writes when it stops (see --max_nonfinite): the state before the update, and the batches of
every process. It computes the loss and the gradient of each batch, and names the first modules whose output, and the
first parameters whose gradient, is not finite. The exit status is 1 if there are any, 0 if everything is finite here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import engine_pretrain
import main_pretrain
from Detection import main_detect
from Finetuning import engine_finetune, main_finetune
from Segmentation import main_segment
from util import cli
from util.checkpoints import checkpoint_file, inspection
from util.distributed.processes import init_device
from util.errors import UserError, as_user_error
from util.files import printable
from util.seeding import seed_everything
from util.training import precision
from util.training.nonfinite import STATE, batch_file, ranks_in
from util.training.precision import autocast

if TYPE_CHECKING:
    from pretrained import Model

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("replay_nonfinite.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="OUTPUT_DIR/nonfinite-epoch...-batch..., written by a run")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is a GPU)")
    return parser


def build(content: dict) -> tuple[Model, Callable[..., Tensor]]:
    """Return the model of a checkpoint, with its weights, and the function that computes the loss of a batch."""
    from pretrained import Checkpoint

    args, found = content["args"], Checkpoint(STATE, content)
    model: Model
    if found.is_pretraining:
        model = main_pretrain.build_model(args)
        compute_loss = engine_pretrain.loss_of(model)
    elif found.task == "detection":
        detector = main_detect.build_detector(args, found, len(found.class_names))
        model, compute_loss = cast("Model", detector), lambda *batch: torch.stack([*detector(*batch).values()]).sum()
    elif found.task == "segmentation":
        segmenter = main_segment.build_segmenter(args, found, len(found.class_names))
        model, compute_loss = cast("Model", segmenter), segmenter
    else:
        # the sizes that the run took from --finetune are those of these weights
        model = main_finetune.build_classifier(args, found)
        mixup, criterion = main_finetune.training_loss(args)
        compute_loss = engine_finetune.loss_of(model, criterion, mixup)
    found.load_into(model)
    return model, compute_loss


def broken_modules(model: nn.Module) -> list[str]:
    """Return a list to which the forward pass adds the names of modules whose output is not finite, in its order."""
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        tensors = output if isinstance(output, (tuple, list)) else [output]
        if any(isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors):
            found.append(name or type(model).__name__)

    for name, module in model.named_modules():
        module.register_forward_hook(partial(look, name))
    return found


def read_update(path: Path, image: tuple[int, int, int], classes: int | None) -> dict:
    """Read the batches of one process: `epoch`, `first` (number of the first batch in the epoch) and `batches`.

    `image` is channels, height and width of the model's input, `classes` the number of outputs of a classifier.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    update = checkpoint_file.read(path)
    with as_user_error(ValueError, prefix=f"{printable(path)} is damaged: "):
        for name in ("epoch", "first"):
            if not inspection.is_integer(update.get(name)):
                raise ValueError(f"it has no number {name}")
        if not isinstance(update.get("batches"), list) or not update["batches"]:
            raise ValueError("it has no batches")
        if not all(is_batch(batch, image, classes) for batch in update["batches"]):
            sizes = " x ".join(map(str, image))
            raise ValueError(f"a batch is no pair of images of {sizes} values and labels")
    return update


def is_batch(batch: object, image: tuple[int, int, int], classes: int | None) -> bool:
    """Return whether a saved batch is a list of images (B, *image) and labels (B,) int64, for a model as above.

    Of a detector the labels are a dict for each image, of a segmenter the classes of the pixels (B, H, W) int64.
    """
    if not isinstance(batch, list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        return False
    imgs, labels = batch
    if isinstance(labels, list) and classes is None:
        return imgs.shape == (len(labels), *image) and all(isinstance(target, dict) for target in labels)
    if not isinstance(labels, Tensor) or not imgs.is_floating_point() or labels.dtype != torch.int64:
        return False
    if labels.shape not in ((len(imgs),), (len(imgs), *image[1:]) if classes is None else ()):
        return False
    known = classes is None or (len(labels) > 0 and labels.min() >= 0 and labels.max() < classes)
    return bool(known) and imgs.shape == (len(labels), *image)


def main(args: argparse.Namespace) -> None:
    """Replay every batch of every process.

    Raises:
        UserError: the folder was not written by a run.
    """
    content = checkpoint_file.read(args.folder / STATE)
    saved = inspection.saved_arguments(content, "world_size", "seed")
    if not isinstance(content["args"], argparse.Namespace) or not inspection.is_integer(saved["seed"]):
        raise UserError(f"{printable(args.folder / STATE)} does not hold the arguments of a run")
    device = init_device(args.device)
    with as_user_error(AttributeError, KeyError, TypeError, ValueError, prefix=f"{printable(args.folder / STATE)}: "):
        model, compute_loss = build(content)
        if not precision.is_state(content.get("scaler", {})):
            raise ValueError("its scaler has no state of a loss scale")
        precision.choose(argparse.Namespace(dtype=saved.get("dtype")), device)
    loss_scale = precision.LossScale()
    loss_scale.load_state_dict(content.get("scaler", {}))
    loss_scale.start(device)
    model.to(device).train()
    modules, finite = broken_modules(model), True
    ranks = [rank for rank in ranks_in(args.folder) if rank < saved["world_size"]]
    if not ranks:
        raise UserError(f"{printable(args.folder)} holds no batches")
    encoder = getattr(model, "backbone", model)
    classes = getattr(model, "num_classes", None) if encoder is model else None
    image = encoder.in_chans, *encoder.image_size
    updates = {r: read_update(batch_file(args.folder, r), image, classes) for r in ranks}
    for rank, update in updates.items():
        for step, batch in enumerate(update["batches"], update["first"]):
            seed_everything(saved["seed"], update["epoch"], step, of_rank=rank)
            modules.clear()
            model.zero_grad()
            with autocast(device):
                loss = compute_loss(*tree_map_only(Tensor, lambda tensor: tensor.to(device), batch))
            loss_scale.scaled(loss).backward()
            parameters = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            images = "" if batch[0].isfinite().all() else "; the images themselves are not finite"
            print(f"rank {rank}, batch {step}: loss {loss.item():.6g}{images}")
            for what, names in (("outputs of modules", modules), ("gradients", parameters)):
                if names:
                    print(f"  {len(names)} {what} are not finite, first: {', '.join(names[:3])}")
            finite &= not modules and not parameters and bool(loss.isfinite())
    if not finite:
        sys.exit(1)
    print("everything is finite here")


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
