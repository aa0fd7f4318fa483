"""Finetune a pretrained ARM encoder as a classifier with four scan directions, and evaluate classifiers.

    torchrun --standalone --nproc_per_node 8 main_finetune.py --batch_size 128 --model arm_base_pz16 \
        --finetune ./checkpoint-1599.pth --epochs 100 --global_pool True --blr 5e-4 --layer_decay 0.65 \
        --ema_decay 0.99992 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 \
        --dist_eval --data_path /path/to/ImageNet --output_dir ./out_finetune_b

The paper reports 83.2 % top-1 on ImageNet-1k for this run.

    python main_finetune.py --eval --resume ./out_finetune_b/checkpoint-best.pth --data_path /path/to/ImageNet

prints top-1, top-5, loss and the number of images, for the weights and for their EMA, and writes a report.

Writes checkpoint-last.pth after every epoch, checkpoint-{epoch}.pth every --save_freq epochs and after the last,
checkpoint-best.pth and checkpoint-best-ema.pth whenever the top-1 accuracy of the weights or of their EMA rises,
log.txt and TensorBoard files. --resume auto resumes from the checkpoint that was written last.
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from Finetuning import engine_finetune
from Finetuning.engine_finetune import Task
from mamba import SIZES
from ops import BackendUnavailable, kernel_choice
from util import arguments, cli
from util.data.class_names import differing, match_classes, names_by_output
from util.data.sources.readers import open_source
from util.data.sources.source import Source
from util.errors import UserError, as_user_error
from util.files import some
from util.tracking.run_log import Log
from util.training.evaluation import describe_result, evaluate
from util.training.run_state import check_same_images, record_images

if TYPE_CHECKING:
    from timm.data import Mixup

    from models_classifier import ARMClassifier
    from pretrained import Checkpoint
    from util.data.datasets import ImageDataset

LOGGER = logging.getLogger("arm")

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its defaults are those of the published base recipe."""
    parser = cli.Parser("main_finetune.py", description=__doc__.splitlines()[0])
    arguments.add_shared_arguments(parser, SIZES)
    add = arguments.add_finetune_arguments(parser).add_argument
    add("--nb_classes", type=arguments.number(int, 1, 10**6), help="number of outputs (default: classes of train/)")
    add(
        "--global_pool",
        type=arguments.boolean,
        nargs="?",
        const=True,
        help="classify the mean of the patches, or with False the class token (default: True, or what --resume used)",
    )
    add("--cls_token", action="store_false", dest="global_pool", help="the same as --global_pool False")

    add = parser.add_argument_group("augmentation").add_argument
    add("--color_jitter", type=arguments.amount, help="strength; only where --aa is none")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm policy, or none (default: %(default)s)")
    add("--smoothing", type=arguments.number(float, 0, 0.999), default=0.1, help="of the labels (default: %(default)s)")
    add("--reprob", type=arguments.rate, default=0.25, help="random erasing rate (default: %(default)s)")
    add(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="random erasing mode (default: %(default)s)",
    )
    add("--recount", type=arguments.few, default=1, help="random erasing count (default: %(default)s)")
    add("--mixup", type=arguments.amount, default=0.0, help="alpha; 0 is off (default: %(default)s)")
    add("--cutmix", type=arguments.amount, default=0.0, help="alpha; 0 is off (default: %(default)s)")
    add("--cutmix_minmax", type=arguments.rate, nargs=2, help="size range of the cut, instead of alpha")
    add("--mixup_prob", type=arguments.rate, default=1.0, help="rate of mixed batches (default: %(default)s)")
    add("--mixup_switch_prob", type=arguments.rate, default=0.5, help="rate of cutmix among them")
    add("--mixup_mode", choices=("batch", "pair", "elem"), default="batch", help="images that share one lambda")

    kernel_choice.add_arguments(parser.add_argument_group("kernels"))
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="only evaluate --resume (or --finetune)")
    add("--dist_eval", action="store_true", help="each process evaluates a share; the result is the same")
    add("--output", type=arguments.nonempty, metavar="DIR", help="report of --eval (default: CKPT.eval next to CKPT)")
    arguments.add_eval_arguments(parser)
    parser.set_defaults(epochs=100, recipe_epochs=100, warmup_epochs=5, blr=5e-4, min_lr=1e-6, scale=[0.08, 1.0])
    return parser


def build_classifier(args: argparse.Namespace, found: Checkpoint | None) -> ARMClassifier:
    """Build the classifier that the command line and the checkpoint to start from describe, with random weights.

    The command line comes first, then the checkpoint: width, depth, patch size, channels and directions; for evaluation
    also the input size; for evaluation and resuming the classes and the pooling. The default is base at 224 pixels with
    three channels and global pooling. `args` is set to the values of the model.

    Raises:
        UserError: see `engine_finetune.encoder_sizes`; sizes do not fit together; there are fewer blocks than --freeze
            names; or the pooling differs from the checkpoint's and `args.allow_changed_args` is not set.
    """
    from models_arm import create_classifier

    sizes = engine_finetune.encoder_sizes(args, found, "classification")
    trained = None  # pooling of the run that is evaluated or resumed
    if found is not None and (args.eval or args.resume):
        trained = found.saved_pooling
        sizes["num_classes"] = found.sizes["num_classes"]
    if args.nb_classes is not None:
        sizes["num_classes"] = args.nb_classes
    if args.global_pool is None:
        args.global_pool = True if trained is None else trained
    elif found is not None and trained not in (None, args.global_pool) and not args.allow_changed_args:
        raise UserError(
            f"{found.name} was trained with --global_pool {trained}, and --global_pool {args.global_pool} is another "
            "model; --allow_changed_args allows it"
        )
    with as_user_error(ValueError, BackendUnavailable):
        model = create_classifier(
            args.model or "arm_base_pz16",
            drop_path_rate=args.drop_path,
            global_pool=args.global_pool,
            scan_backend=args.scan_backend,
            **sizes,
        )
    args.nb_classes = model.num_classes
    engine_finetune.set_up(args, model)
    return model


def main(args: argparse.Namespace) -> None:
    """Finetune, or evaluate with `--eval`.

    Raises:
        UserError: arguments, checkpoint or data do not fit; no training has started then.
    """
    device, log, content = engine_finetune.begin(args)
    source = open_source(args.data_path, "val")
    train = None if args.eval else open_source(args.data_path, "train")
    if train is not None and args.nb_classes is None and not args.resume:
        args.nb_classes = len(train.classes)

    from pretrained import Checkpoint

    found = None if content is None else Checkpoint(args.resume or args.finetune, content, args.model_key)
    model, val = prepare(args, found, source, device)
    if train is not None:
        finetune(args, found, model, train, val, device, log)
    elif found is not None:
        from Evaluation.reports.classifier_report import evaluate_checkpoint

        evaluate_checkpoint(args, found, model, val, device, log)


def prepare(
    args: argparse.Namespace, found: Checkpoint | None, source: Source, device: torch.device
) -> tuple[ARMClassifier, ImageDataset]:
    """Return the classifier, with random weights, and the images to validate; choose the kernels.

    Raises:
        UserError: see `build_classifier`; or the kernels are not there.
    """
    from Evaluation.features import eval_images

    if found is not None:
        new = set() if args.resume or args.eval else {"global_pool"}
        found.say_guesses(new | arguments.given(args, "global_pool", "input_size").keys())
    model = build_classifier(args, found)
    pixels = engine_finetune.choose_pixels(args, found)
    val = eval_images(args, source)
    idle = {"augment": "it carries out RandAugment on the training device: --aa rand..., --loader fast"}
    augments = not args.eval and args.loader != "pil" and (args.aa or "").startswith("rand")
    if augments:
        idle = {} if pixels.channels == 3 else {"augment": "its kernels are for images of 3 channels"}
    kernel_choice.choose(args, device, model.embed_dim, idle)
    return model, val


def finetune(
    args: argparse.Namespace,
    found: Checkpoint | None,
    model: ARMClassifier,
    source: Source,
    val: ImageDataset,
    device: torch.device,
    log: Log,
) -> None:
    """Train on the images of `source`; evaluate after every epoch and keep the best weights.

    Raises:
        UserError: arguments, checkpoint or data do not fit; no training has started then.
    """
    from util.data.datasets import ImageDataset, pixels_by
    from util.data.loaders import eval_loader, train_loader
    from util.data.transforms import finetune_transform

    with as_user_error(AssertionError, ValueError, KeyError, prefix=f"--aa {args.aa}: "):
        transform = finetune_transform(arguments.image_size(args), args)
    train, classes = ImageDataset(source, pixels_by(args.loader, transform)), source.classes
    kernel_choice.fuse_augmentation(train.transform)
    check_same_images(source, val.source)
    if len(classes) > args.nb_classes:
        raise UserError(f"{source.root} has {len(classes)} classes, the classifier {args.nb_classes}: --nb_classes")
    for line in match_classes(val.source, classes, source.root):
        log.say(line)
    names = names_by_output(source, args.nb_classes)
    record_images(args, source)
    if mixes(args) and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: mixup and cutmix pair images and need an even batch")
    for side in args.input_size if args.cutmix_minmax else ():
        low, high = (int(side * size) for size in args.cutmix_minmax)
        if low >= high:
            raise UserError(f"--cutmix_minmax: of {side} pixels that is from {low} to below {high}, which is nothing")
    loader, val_loader = train_loader(train, args, device), eval_loader(val, args, device)
    if len(classes) < args.nb_classes:
        log.say(f"{len(classes)} classes, and {args.nb_classes} outputs: --nb_classes")
    if found is not None and not args.resume:
        start_from(args, found, model, names, log)
    if args.freeze is not None:
        log.say(engine_finetune.describe_frozen(model, f"--freeze {args.freeze}", bool(found and found.is_pretraining)))
    mixup, criterion = training_loss(args)
    task = Task(
        model,
        loader,
        loss_of=partial(engine_finetune.loss_of, criterion=criterion, mixup=mixup),
        evaluate=lambda weights, title, stop: evaluate(weights, val_loader, device, log, title, stop),
        describe=describe_result,
        best="acc1",
        class_names=names,
    )
    engine_finetune.finetune(task, args, device, log, found.content if found and args.resume else None)


def start_from(args: argparse.Namespace, found: Checkpoint, model: ARMClassifier, names: list[str], log: Log) -> None:
    """Load the weights of `--finetune`, and say whether its head is kept, which needs the classes of this run.

    `names` are those of this run's classes, by output. Raises UserError if the checkpoint does not fit the model.
    """
    from timm.layers import trunc_normal_

    file, saved = found.name, found.class_names
    fits = found.load_into(model, keep_head=False)
    others = differing(saved, names)
    if not fits or others:
        trunc_normal_(model.head.weight, std=2e-5)
        nn.init.zeros_(model.head.get_parameter("bias"))
    if found.task != "classification":
        return
    if not fits:
        log.say(f"the head is new: that of {file} has another number of outputs")
    elif others:
        log.say(f"the head is new: the classes of {file} are others: {some(others)}")
    elif any(saved) and any(names):
        log.say(f"the head is that of {file}, which has the same classes")
    else:
        unnamed = args.data_path if any(saved) else file
        log.say(f"the head is that of {file}, output by output: {unnamed} does not name its classes")


def mixes(args: argparse.Namespace) -> bool:
    """Return whether mixup or cutmix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def training_loss(args: argparse.Namespace) -> tuple[Mixup | None, nn.Module]:
    """Return (mixup or None, criterion)."""
    from timm.data import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if not mixes(args):
        return None, LabelSmoothingCrossEntropy(args.smoothing)
    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.nb_classes,
    )
    return mixup, SoftTargetCrossEntropy()


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
