"""Autoregressive pretraining of ARM.

    torchrun --standalone --nproc_per_node=8 main_pretrain.py --batch_size 256 --model arm_base_pz16 \
        --norm_pix_loss --epochs 1600 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 \
        --data_path /path/to/ImageNet --output_dir ./out_b

Writes checkpoint-last.pth after every epoch, checkpoint-{epoch}.pth every --save_freq epochs and after the last,
log.txt and TensorBoard files; --resume auto goes on with whatever was last written. The paper reaches 83.2 % on
ImageNet-1k with this run and Finetuning/main_finetune.py.
"""

import argparse
import time

import torch
from timm.optim import param_groups_weight_decay

import kernels
import models_arm
from decoder import TAPS
from engine_pretrain import train_one_epoch
from mamba import ORDERS
from ops import BackendUnavailable
from util import arguments, cli
from util.data.datasets import image_dataset
from util.data.loaders import train_loader
from util.data.transforms import pretrain_transform
from util.distributed.parallel import distribute, unsharded
from util.distributed.processes import init_device, is_main
from util.errors import as_user_error
from util.seeding import seed_everything
from util.tracking import prediction_figures
from util.tracking.run_log import clock, open_log
from util.training.precision import autocast
from util.training.run import Run, fingerprint, starting_point


def get_args_parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of the published base recipe."""
    parser = cli.Parser("main_pretrain.py", description=__doc__.splitlines()[0])
    arguments.add_shared_arguments(parser)
    group = parser.add_argument_group("pretraining")
    group.add_argument("--cluster_size", type=arguments.side, default=4, help="patches a side (default: %(default)s)")
    group.add_argument(
        "--dec_embed_dim", type=arguments.side, help="decoder channels (default: 512; tiny 192, small 384)"
    )
    group.add_argument("--dec_depth", type=arguments.few, default=4, help="decoder blocks (default: %(default)s)")
    group.add_argument(
        "--order",
        choices=ORDERS,
        default="row",
        help="in which clusters are read; random is one permutation for all images, random_per_image another for each "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--taps",
        choices=TAPS,
        default="even",
        help="what the decoder's blocks read: the encoder evenly from its middle to its end, or all of them its last "
        "block (default: %(default)s)",
    )
    group.add_argument("--norm_pix_loss", action="store_true", help="standardise the target pixels of each patch")
    group.add_argument(
        "--no_norm_pix_loss", action="store_false", dest="norm_pix_loss", help="predict pixels as they are (default)"
    )
    group.add_argument(
        "--objective",
        choices=tuple(models_arm.OBJECTIVES),
        default="arm",
        help="arm predicts the next cluster; mae, a baseline, 75 %% of the patches, hidden at random (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--vis_freq",
        type=arguments.natural,
        default=20,
        metavar="N",
        help="epochs between sheets of what is predicted of four images of val/, or of train/ where there is no val/; "
        "0 draws none (default: %(default)s)",
    )
    kernels.add_arguments(parser.add_argument_group("kernels"))
    parser.set_defaults(
        model="arm_base_pz16",
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


def build_model(args: argparse.Namespace) -> models_arm.PretrainModel:
    """The model that the command line, or the arguments saved in a checkpoint, ask for.

    Raises:
        UserError: sizes that do not fit together.
    """
    with as_user_error(ValueError, BackendUnavailable):
        return models_arm.create_pretrain_model(
            args.model,
            img_size=arguments.image_size(args),
            norm_pix_loss=args.norm_pix_loss,
            scan_backend=args.scan_backend,
            cluster_size=args.cluster_size,
            dec_depth=args.dec_depth,
            **arguments.given(args, "patch_size", "embed_dim", "depth", "dec_embed_dim", "order", "taps", "objective"),
        )


def main(args: argparse.Namespace) -> None:
    """Pretrain.

    Raises:
        UserError: something that was asked for cannot be; no training has started then.
    """
    arguments.check_arguments(args)
    device = init_device(args.device, args.dist_timeout, args.deterministic)
    folders = arguments.output_folders(args)
    log = open_log(folders, tracker=args.tracker)
    content = starting_point(args, folders[0], log.say)
    dataset = image_dataset(args.data_path, "train", pretrain_transform(arguments.image_size(args), args), args.loader)
    args.data = fingerprint(dataset.source)
    seed_everything(args.seed)
    model = build_model(args).to(device)
    kernels.choose(args, device, model.embed_dim, {"augment": "pretraining only crops and flips"})
    loader = train_loader(dataset, args, device)
    shown = None
    if args.vis_freq and is_main():
        shown = prediction_figures.fixed_images(args.data_path, arguments.image_size(args))
    wrapped = distribute(model, device, args.fsdp)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    kernels.compile_models(args, device, model)
    run = Run(
        args, model, optimizer, content=content, images=len(dataset), folder=folders[0], say=log.say,
        graphs=kernels.block_graphs(args, model),
    )  # fmt: skip

    log.say(run.describe(len(dataset), device))
    target = "normalised pixels" if args.norm_pix_loss else "pixels as they are"
    log.say(
        f"objective {args.objective}, {target}, clusters of {args.cluster_size} x {args.cluster_size}, {args.order}"
    )
    start, first = time.monotonic(), run.epoch
    with run:
        while run.epoch < args.epochs:
            epoch = run.epoch
            stats = train_one_epoch(wrapped, loader, run, device, log)
            log.epoch(**stats, epoch=epoch)
            run.end_epoch()
            if args.vis_freq and run.epoch % args.vis_freq == 0:
                with unsharded(model), autocast(device):  # rank 0 alone draws
                    figures = [] if shown is None else prediction_figures.draw_sheets(model, shown.to(device))
                log.images(
                    epoch, **{f"image_{i}": prediction_figures.pixels(figure) for i, figure in enumerate(figures)}
                )
            loader.report(log.say)  # which may end the run
            passed = clock(start, run.epoch - first, args.epochs - first)
            log.say(f"epoch {epoch}: loss {stats['train_loss']:.4f}; {passed}")


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
