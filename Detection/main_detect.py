"""Finetune a pretrained ARM encoder as a detector of objects and their masks, and evaluate detectors.

    torchrun --standalone --nproc_per_node 8 Detection/main_detect.py --batch_size 8 --model arm_base_pz16 \
        --finetune ./checkpoint-1599.pth --data_path coco:/path/to/coco --output_dir ./out_detect_b

Objects and classes are those of the annotations in COCO's format. --boxes_only detects boxes without masks.

    python Detection/main_detect.py --eval --resume ./out_detect_b/checkpoint-best.pth --data_path coco:/path/to/coco

prints the average precision of boxes and masks, for the weights and for their EMA, and writes a report.

Writes checkpoint-last.pth after every epoch, checkpoint-{epoch}.pth every --save_freq epochs and after the last,
checkpoint-best.pth and checkpoint-best-ema.pth whenever the box AP of the weights or of their EMA rises, log.txt and
TensorBoard files. --resume auto resumes from the checkpoint that was written last.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from Finetuning import engine_finetune
from Finetuning.engine_finetune import Task
from mamba import SIZES
from ops import BackendUnavailable, kernel_choice
from util import arguments, cli
from util.checkpoints.inspection import outputs_of
from util.data.sources.coco import CocoSource, open_coco
from util.errors import UserError, as_user_error
from util.tracking.run_log import Log
from util.training.run_state import check_same_images, record_images

if TYPE_CHECKING:
    from Detection.models_detect import Detector
    from pretrained import Checkpoint

LOGGER = logging.getLogger("arm")
DEFAULT_SIZE = 1024  # pixels a side

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its defaults are ViTDet's for a base encoder."""
    parser = cli.Parser("main_detect.py", description=__doc__.splitlines()[0])
    arguments.add_shared_arguments(parser, SIZES, classified=False)
    add = arguments.add_finetune_arguments(parser).add_argument
    add("--boxes_only", action="store_true", help="Faster R-CNN: no masks (default: Mask R-CNN)")
    channels = "channels of the feature maps and heads (default: 256, or the checkpoint's)"
    add("--head_channels", type=arguments.side, metavar="N", help=channels)
    add(
        "--vis_freq",
        type=arguments.natural,
        default=1,
        metavar="N",
        help="epochs between pictures of detections in 4 images of val; 0: none (default: %(default)s)",
    )
    add = parser.add_argument_group("objects").add_argument
    add(
        "--data_path",
        type=arguments.nonempty,
        required=True,
        metavar="PATH",
        help="coco:FOLDER with annotations/*.json and images, as COCO has them",
    )
    add(
        "--scale",
        type=arguments.number(float, 0, 10),
        nargs=2,
        metavar=("LEAST", "MOST"),
        help="large-scale jitter: size of a training image, as a factor of the input",
    )

    kernel_choice.add_arguments(parser.add_argument_group("kernels"))
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="only evaluate --resume (or --finetune)")
    add("--output", type=arguments.nonempty, metavar="DIR", help="report of --eval (default: CKPT.eval next to CKPT)")
    arguments.add_eval_bad(add)
    parser.set_defaults(
        batch_size=8, epochs=100, recipe_epochs=100, warmup_epochs=1, blr=4e-4, min_lr=1e-6, weight_decay=0.1,
        layer_decay=0.7, scale=[0.1, 2.0], dist_eval=True,
    )  # fmt: skip
    return parser


def build_detector(args: argparse.Namespace, found: Checkpoint | None, classes: int) -> Detector:
    """Build the detector that the command line and the checkpoint to start from describe, with random weights.

    For the encoder see `engine_finetune.encoder_sizes`; the default is base at 1024 pixels. `args` is set to the values
    of the model.

    Raises:
        UserError: see `engine_finetune.encoder_sizes`; sizes do not fit together, there are fewer blocks than --freeze
            names, or the checkpoint to resume from detects masks and this run does not, or the other way round.
    """
    from Detection.models_detect import Detector, channels_of
    from models_arm import create_pyramid

    if args.head_channels is None:
        args.head_channels = channels_of(found.state_dict) if found is not None and found.task == "detection" else 256
    sizes = {"img_size": DEFAULT_SIZE} | engine_finetune.encoder_sizes(args, found, "detection")
    if found is not None and (args.eval or args.resume):
        with_masks = any(name.startswith("roi_heads.mask_") for name in found.state_dict)
        args.boxes_only |= args.eval and not with_masks
        if args.boxes_only == with_masks and not args.eval:
            what = "masks: leave --boxes_only out" if with_masks else "boxes only: add --boxes_only"
            raise UserError(f"{found.name} detects {what}")
    with as_user_error(ValueError, BackendUnavailable):
        encoder = create_pyramid(
            args.model or "arm_base_pz16",
            out_chans=args.head_channels,
            drop_path_rate=args.drop_path,
            scan_backend=args.scan_backend,
            **sizes,
        )
    model = Detector(encoder, classes, masks=not args.boxes_only)
    engine_finetune.set_up(args, model)
    return model


def main(args: argparse.Namespace) -> None:
    """Finetune, or evaluate with `--eval`.

    Raises:
        UserError: arguments, checkpoint or data do not fit; no training has started then.
    """
    device, log, content = engine_finetune.begin(args)
    val = open_coco(args.data_path, "val")
    train = None if args.eval else open_coco(args.data_path, "train")

    from pretrained import Checkpoint

    found = None if content is None else Checkpoint(args.resume or args.finetune, content, args.model_key)
    if found is not None:
        found.say_guesses(arguments.given(args, "input_size").keys())
    names = train.classes if train is not None else classes_of(found, val)
    val.match(names, train.root if train is not None else args.resume or args.finetune)
    if not len(val.rows):
        raise UserError(f"{val.root}: there are no objects to evaluate with")
    engine_finetune.choose_pixels(args, found)
    model = build_detector(args, found, len(names))
    kernel_choice.choose(args, device, model.backbone.embed_dim, {"augment": "detection has its own transforms"})
    if train is not None:
        finetune(args, found, model, train, val, device, log)
    elif found is not None:
        from Detection.detection_report import evaluate_checkpoint

        evaluate_checkpoint(args, found, model, val, device, log)


def classes_of(found: Checkpoint | None, val: CocoSource) -> list[str]:
    """Return the names of the classes that a checkpoint detects: its own, or those of `val` if it does not name them.

    Raises UserError if it does not, and `val` has another number of classes.
    """
    if found is None or found.task != "detection":
        return val.classes  # `build_detector` will refuse it
    outputs = outputs_of(found.state_dict)
    if not any(found.class_names) and outputs != len(val.classes):
        raise UserError(f"{found.name} detects {outputs} classes, which it does not name; {val.root} has others")
    return found.class_names or val.classes


def finetune(
    args: argparse.Namespace,
    found: Checkpoint | None,
    model: Detector,
    source: CocoSource,
    val: CocoSource,
    device: torch.device,
    log: Log,
) -> None:
    """Train on the images of `source`; evaluate after every epoch and keep the best weights.

    Raises:
        UserError: arguments, checkpoint or data do not fit; no training has started then.
    """
    from Detection.coco_metrics import Results
    from Detection.detection_data import DetectionDataset, Fit, Jitter
    from Detection.detection_pictures import FixedPictures
    from Detection.detection_results import describe, evaluate
    from util.data.loaders import eval_loader, train_loader
    from util.data.pixels import Pixels

    masks, pixels, size = not args.boxes_only, Pixels.of(args), arguments.image_size(args)
    Results(val, masks)  # a mistake in the annotations ends the run before it trains
    train = DetectionDataset(source, Jitter(size, tuple(args.scale), args.hflip), pixels, masks)
    shown = DetectionDataset(val, Fit(size), pixels)
    check_same_images(source, val)
    record_images(args, source)
    args.category_ids = source.category_ids.tolist()
    loader, val_loader = train_loader(train, args, device), eval_loader(shown, args, device)
    if found is not None and not args.resume:
        engine_finetune.start_from(found, model, "detection", model.OUTPUTS, source.classes, log)
    if args.freeze is not None:
        log.say(engine_finetune.describe_frozen(model, f"--freeze {args.freeze}", bool(found and found.is_pretraining)))
    task = Task(
        model,
        loader,
        loss_of=lambda wrapped: wrapped,
        evaluate=lambda weights, *how: evaluate(weights, val_loader, Results(val, masks), device, log, *how),
        describe=describe,
        best="box_ap",
        class_names=source.classes,
        draw=FixedPictures(shown, device),
    )
    engine_finetune.finetune(task, args, device, log, found.content if found and args.resume else None)


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
