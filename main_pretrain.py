"""Pretrain ARM.

    torchrun --standalone --nproc_per_node=8 main_pretrain.py --batch_size 256 --model arm_base_pz16 \
        --norm_pix_loss --epochs 1600 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 \
        --data_path /path/to/ImageNet --output_dir ./out_b

Writes checkpoint-last.pth after every epoch, checkpoint-{epoch}.pth every --save_freq epochs and after the last epoch,
log.txt and TensorBoard files; --resume auto resumes from the newest checkpoint. The paper reports 83.2 % on ImageNet-1k
for this run, finetuned by Finetuning/main_finetune.py.
"""

import argparse
import time
from typing import TYPE_CHECKING

import torch

from decoder import TAPS
from engine_pretrain import train_one_epoch
from mamba import ORDERS, SIZES
from objectives import OBJECTIVES
from ops import BackendUnavailable, kernel_choice
from util import arguments, cli
from util.data.pixels import IMAGENET, Pixels
from util.data.sources.readers import open_source
from util.distributed.parallel import distribute, unsharded
from util.distributed.processes import init_device, is_main
from util.errors import UserError, as_user_error
from util.seeding import seed_everything
from util.tracking.run_log import clock, open_log
from util.training.precision import autocast
from util.training.run_state import Run, check_same_images, record_images, starting_point

if TYPE_CHECKING:
    from models_pretrain import PretrainModel

# `main` imports timm, torchvision and matplotlib after its checks, so that --help and mistakes take half of the time.

PROBE_IMAGES = 2000


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser; its defaults are the published recipe of the base model."""
    parser = cli.Parser("main_pretrain.py", description=__doc__.splitlines()[0])
    arguments.add_shared_arguments(parser, SIZES, pretraining=True)
    add = parser.add_argument_group("pretraining").add_argument
    add("--cluster_size", type=arguments.side, default=4, help="patches a side (default: %(default)s)")
    add("--dec_embed_dim", type=arguments.side, help="decoder channels (default: 512; tiny 192, small 384)")
    add("--dec_depth", type=arguments.few, default=4, help="decoder blocks (default: %(default)s)")
    add(
        "--order",
        choices=ORDERS,
        default="row",
        help="of the clusters; random: one for all images; random_per_image: one for each (default: %(default)s)",
    )
    add(
        "--taps",
        choices=TAPS,
        default="even",
        help="encoder blocks that the decoder reads: evenly from middle to last, or the last (default: %(default)s)",
    )
    add("--norm_pix_loss", action="store_true", help="standardise the target pixels of each patch")
    add("--no_norm_pix_loss", action="store_false", dest="norm_pix_loss", help="predict pixels as they are (default)")
    add(
        "--objective",
        choices=tuple(OBJECTIVES),
        default="arm",
        help="arm predicts the next cluster; mae, a baseline, random 75 %% of the patches (default: %(default)s)",
    )
    add(
        "--vis_freq",
        type=arguments.natural,
        default=20,
        metavar="N",
        help="epochs between figures of predictions of 4 images of val/, else train/; 0: none (default: %(default)s)",
    )
    add = parser.add_argument_group("watching").add_argument
    add("--val_freq", type=arguments.natural, default=0, metavar="N", help="epochs between losses on val/ (0: none)")
    add(
        "--probe_freq",
        type=arguments.natural,
        default=0,
        metavar="N",
        help="epochs between kNN accuracy, where there are labels, and effective rank of the features (0: none)",
    )
    add(
        "--probe_images",
        type=arguments.number(int, 4, 10**6),
        metavar="N",
        help=f"number of images for --probe_freq (default: {PROBE_IMAGES})",
    )
    kernel_choice.add_arguments(parser.add_argument_group("kernels"))
    parser.set_defaults(
        model="arm_base_pz16",
        in_chans=3,
        input_size=[192],
        epochs=1600,
        recipe_epochs=1600,
        warmup_epochs=40,
        blr=1.5e-4,
        min_lr=0.0,
        clip_grad=3.0,
        scale=[0.2, 1.0],
    )
    return parser


def build_model(args: argparse.Namespace) -> "PretrainModel":
    """Build the model of a command line, or of the arguments saved in a checkpoint.

    Raises:
        UserError: sizes that do not fit together.
    """
    import models_arm

    with as_user_error(ValueError, BackendUnavailable):
        model = models_arm.create_pretrain_model(
            args.model,
            img_size=arguments.image_size(args),
            norm_pix_loss=args.norm_pix_loss,
            scan_backend=args.scan_backend,
            cluster_size=args.cluster_size,
            dec_depth=args.dec_depth,
            **arguments.given(
                args, "patch_size", "embed_dim", "depth", "dec_embed_dim", "order", "taps", "objective", "in_chans"
            ),
        )
    model.set_grad_checkpointing(getattr(args, "grad_checkpointing", False))
    return model


def main(args: argparse.Namespace) -> None:
    """Pretrain.

    Raises:
        UserError: a mistake in the arguments or the data, before training starts.
    """
    arguments.check_arguments(args)
    if args.probe_images is not None and not args.probe_freq:
        raise UserError("--probe_images is only for --probe_freq: leave it out, or give both")
    args.probe_images = args.probe_images or PROBE_IMAGES
    pixels = Pixels.of(args)
    vars(args).update(pixels.arguments())
    device = init_device(args.device, args.dist_timeout, args.deterministic)
    folders = arguments.output_folders(args)
    log = open_log(folders, args.tracker, args.print_freq)
    content = starting_point(args, folders[0], log.say)
    if pixels != IMAGENET:
        log.say(str(pixels))
    source = open_source(args.data_path, "train", labels=False)

    from timm.optim import param_groups_weight_decay

    from Evaluation import online
    from util.data.datasets import ImageDataset, pixels_by
    from util.data.loaders import train_loader
    from util.data.transforms import pretrain_transform
    from util.tracking import prediction_figures

    size = arguments.image_size(args)
    dataset = ImageDataset(source, pixels_by(args.loader, pretrain_transform(size, args)))
    record_images(args, source)
    check_same_images(source)
    watch = online.Watch(args, source, device, log.say)
    seed_everything(args.seed)
    model = build_model(args).to(device)
    kernel_choice.choose(args, device, model.embed_dim, {"augment": "pretraining only crops and flips"})
    loader = train_loader(dataset, args, device)
    if args.vis_freq and is_main():
        shown = prediction_figures.fixed_images(args.data_path, size, source, pixels)
    else:
        shown = None
    wrapped = distribute(model, device, args.fsdp)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    kernel_choice.compile_models(args, device, model)
    run = Run(
        args, model, optimizer, content=content, images=len(dataset), folder=folders[0], say=log.say,
        graphs=kernel_choice.block_graphs(args, model),
    )  # fmt: skip

    log.say(run.describe(len(dataset), device))
    target, side = "normalised pixels" if args.norm_pix_loss else "pixels as they are", args.cluster_size
    log.say(f"objective {args.objective}, {target}, clusters of {side} x {side}, {args.order}")
    start, first = time.monotonic(), run.epoch
    with run:
        while run.epoch < args.epochs:
            epoch = run.epoch
            stats = train_one_epoch(wrapped, loader, run, device, log)
            stats |= (found := watch.measure(model, run, log))
            log.epoch(**stats, epoch=epoch)
            run.end_epoch()
            if args.vis_freq and run.epoch % args.vis_freq == 0:
                with unsharded(model), autocast(device):  # only rank 0 draws
                    figures = [] if shown is None else prediction_figures.draw_sheets(model, shown.to(device), pixels)
                panels = {f"image_{i}": prediction_figures.pixels(figure) for i, figure in enumerate(figures)}
                log.images(epoch, **panels)
            loader.report(log.say)  # may end the run
            passed = clock(start, run.epoch - first, args.epochs - first)
            log.say(f"epoch {epoch}: loss {stats['train_loss']:.4f}{online.describe(found)}; {passed}")


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
