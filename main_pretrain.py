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

import models_arm
from engine_pretrain import train_one_epoch
from ops import BackendUnavailable, fused
from util import cli, sheet
from util.datasets import image_dataset, pretrain_transform, train_loader
from util.dist import distribute, init_device, is_main, seed_everything
from util.errors import as_user_error
from util.fsdp import whole
from util.metrics import clock, open_log
from util.run import Run, fingerprint, starting_point
from util.train_loop import autocast, choose_kernels


class Target(argparse.Action):
    """`--target`, the other spelling of `--norm_pix_loss`."""

    def __call__(self, parser: object, namespace: argparse.Namespace, value: str, option: object = None) -> None:
        namespace.norm_pix_loss = value == "norm_pix"


def get_args_parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of the published base recipe."""
    parser = cli.Parser("main_pretrain.py", description=__doc__.splitlines()[0])
    cli.add_shared_arguments(parser)
    group = parser.add_argument_group("pretraining")
    group.add_argument("--cluster_size", type=cli.side, default=4, help="patches a side (default: %(default)s)")
    group.add_argument("--dec_embed_dim", type=cli.side, help="decoder channels (default: 512; tiny 192, small 384)")
    group.add_argument("--dec_depth", type=cli.few, default=4, help="decoder blocks (default: %(default)s)")
    group.add_argument(
        "--order",
        choices=models_arm.ORDERS,
        default="row",
        help="in which clusters are read; random is one permutation for all images, random_per_image another for each "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--taps",
        choices=models_arm.TAPS,
        default="even",
        help="what the decoder's blocks read: the encoder evenly from its middle to its end, or all of them its last "
        "block (default: %(default)s)",
    )
    group.add_argument("--norm_pix_loss", action="store_true", help="standardise the target pixels of each patch")
    group.add_argument(
        "--target",
        choices=("norm_pix", "pix"),
        action=Target,
        default=argparse.SUPPRESS,
        help="norm_pix is --norm_pix_loss, pix the pixels as they are (default: pix)",
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
        type=cli.natural,
        default=20,
        metavar="N",
        help="epochs between sheets of what is predicted of four images of val/, or of train/ where there is no val/; "
        "0 draws none (default: %(default)s)",
    )
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
            img_size=cli.image_size(args),
            norm_pix_loss=args.norm_pix_loss,
            scan_backend=args.scan_backend,
            cluster_size=args.cluster_size,
            dec_depth=args.dec_depth,
            **cli.given(args, "patch_size", "embed_dim", "depth", "dec_embed_dim", "order", "taps", "objective"),
        )


def main(args: argparse.Namespace) -> None:
    """Pretrain.

    Raises:
        UserError: something that was asked for cannot be; no training has started then.
    """
    cli.check_arguments(args)
    device = init_device(args.device, args.dist_timeout, args.deterministic)
    folders = cli.output_folders(args)
    log = open_log(*folders, tracker=args.tracker)
    content = starting_point(args, folders[0], log.say)
    dataset = image_dataset(args.data_path, "train", pretrain_transform(cli.image_size(args), args), args.loader)
    args.data = fingerprint(dataset.source)
    seed_everything(args.seed)
    model = build_model(args).to(device)
    compiles = models_arm.compiles(args.compile, device)
    idle = {"augment": "pretraining only crops and flips"} | (
        {} if compiles else {"casts": "the model is not compiled"}
    )
    choose_kernels(args, device, model.embed_dim, idle)
    loader = train_loader(dataset, args, device)
    shown = None
    if args.vis_freq and is_main():
        shown = sheet.fixed_images(args.data_path, cli.image_size(args))
    wrapped = distribute(model, device, args.fsdp)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    run = Run(args, model, optimizer)
    if content is not None:
        run.restore(content, len(dataset))
    if compiles:
        model.compile(**fused.compile_options())
    run.keep_in(folders[0], log)

    log.say(cli.describe(args, model, len(dataset), device, run.epoch))
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
                with whole(model), autocast(device):  # rank 0 alone draws
                    figures = [] if shown is None else sheet.draw_sheets(model, shown.to(device))
                log.images(epoch, **{f"image_{i}": sheet.pixels(figure) for i, figure in enumerate(figures)})
            loader.report(log)  # which may end the run
            passed = clock(start, run.epoch - first, args.epochs - first)
            log.say(f"epoch {epoch}: loss {stats['train_loss']:.4f}; {passed}")
        run.close()


if __name__ == "__main__":
    cli.run(main, get_args_parser())
