"""Finetune a pretrained ARM encoder to classify every pixel, and evaluate segmenters.

    torchrun --standalone --nproc_per_node 8 Segmentation/main_segment.py --batch_size 2 --model arm_base_pz16 \
        --finetune ./checkpoint-1599.pth --data_path /path/to/ADEChallengeData2016 --output_dir ./out_segment_b

Images and masks lie in folders as those of ADE20K. --head linear with --freeze all is dense linear probing.

    python Segmentation/main_segment.py --eval --resume ./out_segment_b/checkpoint-best.pth \
        --data_path /path/to/ADEChallengeData2016

prints mIoU, pixel accuracy and the IoU of classes, for the weights and for their EMA, and writes a report.

Writes checkpoint-last.pth after every epoch, checkpoint-{epoch}.pth every --save_freq epochs and after the last,
checkpoint-best.pth and checkpoint-best-ema.pth whenever the mIoU of the weights or of their EMA rises, log.txt and
TensorBoard files. --resume auto resumes from the checkpoint that was written last.
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from Finetuning import engine_finetune
from mamba import SIZES
from ops import BackendUnavailable, kernel_choice
from util import arguments, cli
from util.data.class_names import differing
from util.data.sources.mask_folder import MaskFolder, open_masks
from util.errors import UserError, as_user_error
from util.files import printable, some
from util.tracking.run_log import Log
from util.training.run_state import check_same_images, record_images

if TYPE_CHECKING:
    import torch

    from pretrained import Checkpoint
    from Segmentation.models_segment import Segmenter
    from Segmentation.segmentation_data import SegmentationDataset

LOGGER = logging.getLogger("arm")
SIZE = 512  # pixels, a side of the input

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its defaults are those of MAE's and BEiT's base models on ADE20K."""
    parser = cli.Parser("main_segment.py", description=__doc__.splitlines()[0])
    arguments.add_shared_arguments(parser, SIZES, classified=False)
    # A long help stands below its flag.
    # fmt: off
    add = arguments.add_finetune_arguments(parser).add_argument
    add("--head", choices=("upernet", "linear"),
        help="UperNet on a feature pyramid, or a linear layer on the tokens (default: upernet, or the checkpoint's)")
    add("--head_channels", type=arguments.side, metavar="N",
        help="channels of UperNet (default: 512, or the checkpoint's)")
    add("--head_dropout", type=arguments.rate, default=0.1, help="of UperNet's channels (default: %(default)s)")
    add("--vis_freq", type=arguments.natural, default=10, metavar="N",
        help="epochs between pictures of 4 images of val in TensorBoard; 0: none (default: %(default)s)")

    group = parser.add_argument_group("images and masks")
    arguments.add_mask_arguments(group)
    add = group.add_argument
    add("--scale", type=arguments.number(float, 0, 100), nargs=2, metavar=("LEAST", "MOST"),
        help="size of a training image, as a factor of the input (default: 0.5 2)")
    add("--max_share", type=arguments.number(float, 0, 1, above=True), default=0.75, metavar="X",
        help="draw a crop anew if one class has a larger share of it (default: %(default)s)")
    add("--distort", type=arguments.rate, default=0.5,
        help="rate of changes of brightness, contrast, saturation and hue (default: %(default)s)")

    kernel_choice.add_arguments(parser.add_argument_group("kernels"))
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="only evaluate --resume (or --finetune)")
    add("--inference", choices=("slide", "whole"), default="slide",
        help="average over windows of the input size, or pass an image at once (default: %(default)s)")
    add("--multi_scale", action="store_true", help="with --eval: average six scales and their mirrored images")
    add("--output", type=arguments.nonempty, metavar="DIR", help="report of --eval (default: CKPT.eval next to CKPT)")
    # fmt: on
    parser.set_defaults(
        batch_size=16,
        epochs=127,
        recipe_epochs=127,
        warmup_epochs=1,
        blr=1.6e-3,
        min_lr=0.0,
        scale=[0.5, 2.0],
        dist_eval=True,
        eval_bad=None,
    )  # fmt: skip
    return parser


def build_segmenter(args: argparse.Namespace, found: Checkpoint | None, classes: int) -> Segmenter:
    """Build the segmenter that the command line and the checkpoint to start from describe, with random weights.

    The command line comes first, then the checkpoint: the encoder, see `engine_finetune.encoder_sizes`; and the head
    of a segmenter. `args` is set to the values of the model.

    Args:
        args: of the script.
        found: the checkpoint.
        classes: outputs of the head.

    Raises:
        UserError: see `encoder_sizes`; sizes do not fit together; or there are fewer blocks than --freeze names.
    """
    from Segmentation.models_segment import create_segmenter, head_sizes

    sizes = engine_finetune.encoder_sizes(args, found, "segmentation")
    sizes.setdefault("img_size", SIZE)
    head: dict[str, Any] = {}
    if found is not None and found.task == "segmentation":
        with as_user_error(ValueError, prefix=f"{found.name}: "):
            head |= head_sizes(found.state_dict)
    head |= {"num_classes": classes, **arguments.given(args, "head")}
    if args.head_channels is not None:
        head["channels"] = args.head_channels
    if head.get("head") == "linear" and head.pop("channels", None) is not None and args.head_channels is not None:
        raise UserError(f"--head_channels {args.head_channels} is only for --head upernet: leave it out")
    with as_user_error(ValueError, BackendUnavailable):
        model = create_segmenter(
            args.model or "arm_base_pz16",
            drop_rate=args.head_dropout,
            drop_path_rate=args.drop_path,
            scan_backend=args.scan_backend,
            **head,
            **sizes,
        )
    args.head, args.head_channels = head.get("head", "upernet"), getattr(model.head, "channels", None)
    engine_finetune.set_up(args, model)
    return model


def main(args: argparse.Namespace) -> None:
    """Finetune, or evaluate with `--eval`.

    Raises:
        UserError: arguments, checkpoint or data do not fit; no training has started then.
    """
    if args.multi_scale and not args.eval:
        raise UserError("--multi_scale is for --eval: a run evaluates one scale after each epoch")
    device, log, content = engine_finetune.begin(args)
    train = None if args.eval else open_masks(args.data_path, "train", args.classes, args.ignore_label)
    val = open_masks(args.data_path, "val", args.classes, args.ignore_label)

    from pretrained import Checkpoint
    from Segmentation.segmentation_data import SegmentationDataset, WholeImage
    from util.data.loaders import eval_loader

    found = None if content is None else Checkpoint(args.resume or args.finetune, content, args.model_key)
    if found is not None:
        found.say_guesses(arguments.given(args, "input_size").keys())
        if args.eval and found.task == "segmentation" and (others := differing(found.class_names, val.classes)):
            raise UserError(f"{val.root} has other classes than {printable(found.name)}: {some(others)}")
    model = build_segmenter(args, found, len(val.classes))
    pixels = engine_finetune.choose_pixels(args, found)
    images = SegmentationDataset(val, WholeImage(arguments.image_size(args), pixels))
    kernel_choice.choose(args, device, model.backbone.embed_dim, {"augment": "it is for the images of classification"})
    if train is not None:
        finetune(args, found, model, train, images, device, log)
    elif found is not None:
        from Segmentation.segment_evaluation import evaluate_checkpoint

        evaluate_checkpoint(args, found, model, val, eval_loader(images, args, device), device, log)


def finetune(
    args: argparse.Namespace,
    found: Checkpoint | None,
    model: Segmenter,
    source: MaskFolder,
    val: SegmentationDataset,
    device: torch.device,
    log: Log,
) -> None:
    """Train on the images of `source`; evaluate after every epoch and keep the best weights.

    Raises:
        UserError: arguments, checkpoint or data do not fit; no training has started then.
    """
    from Segmentation.segment_evaluation import describe, evaluate, inference_of, numbers
    from Segmentation.segmentation_data import RandomView, SegmentationDataset
    from Segmentation.segmentation_pictures import FixedPictures
    from util.data.loaders import eval_loader, train_loader

    view = RandomView(
        arguments.image_size(args), val.transform.pixels, args.scale, args.max_share, args.hflip, args.distort
    )
    loader = train_loader(SegmentationDataset(source, view), args, device)
    val_loader, inference = eval_loader(val, args, device), inference_of(args)
    check_same_images(source, val.source)
    record_images(args, source)
    args.mask_values = source.values
    if found is not None and not args.resume:
        engine_finetune.start_from(found, model, "segmentation", model.head.OUTPUTS, source.classes, log)
    if args.freeze is not None:
        log.say(engine_finetune.describe_frozen(model, f"--freeze {args.freeze}", bool(found and found.is_pretraining)))
    evaluated = partial(evaluate, loader=val_loader, inference=inference, names=source.classes, device=device, log=log)
    task = engine_finetune.Task(
        model,
        loader,
        loss_of=lambda wrapped: wrapped,  # its forward returns the loss of images and masks
        evaluate=lambda weights, title, stop: numbers(evaluated(weights, title, stop)),
        describe=describe,
        best="miou",
        class_names=source.classes,
        draw=FixedPictures(val, source.classes, inference, device),
    )
    engine_finetune.finetune(task, args, device, log, found.content if found and args.resume else None)


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
