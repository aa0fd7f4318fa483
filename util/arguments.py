"""Command-line arguments shared by the scripts: definitions, bounds and checks."""

import argparse
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from util.data.sources.mask_folder import VALUES
from util.data.sources.readers import READERS
from util.distributed.processes import world_size
from util.errors import UserError, as_user_error
from util.hardware import available_cores

LOGGER = logging.getLogger("arm")
LOG_EVERY = 20  # steps between two log points
RESIZES = "square", "shorter"  # of evaluated images


def number(kind: type, low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """Return an argument type: a number of `kind` from `low` (with `above`, greater than it) to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (above and value == low):  # no bound holds for NaN
            least = "above" if above else "at least"
            raise argparse.ArgumentTypeError(f"{text} is not {least} {low:.15g} and at most {high:.15g}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it if the text is no number
    return parse


def nonempty(text: str) -> str:
    """Argument type: a text that is not empty, as an unset variable of a shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


# Bounds of numeric arguments: far above sensible values, and below what overflows. Models bound their total size.
positive, natural = number(int, 1, 10**9), number(int, 0, 10**9)  # steps, epochs, images
few = number(int, 1, 1000)  # blocks, checkpoints, erased boxes
side = number(int, 1, 2**14)  # channels, patches
pixels = number(int, 1, 2**12)  # a side of the input
batch = number(int, 1, 10**6)  # images in memory at a time
workers = number(int, 0, 1024)  # processes on this machine
seconds = number(int, 1, 10**6)  # 11 days; 25 overflow the milliseconds of poll(2)
seed_number = number(int, 0, 2**32 - 1)  # seeds of numpy and torch
rate, amount = number(float, 0, 1), number(float, 0, 1e9)


class WarmUp(argparse.Action):
    """Store `--warmup_epochs`, and note that it is not the recipe's default; see `check_warmup`."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        namespace.warmup_epochs, namespace.recipe_epochs = values, None


# A long help stands below its flag.
# fmt: off
def add_shared_arguments(
    parser: argparse.ArgumentParser, models: Iterable[str], pretraining: bool = False, classified: bool = True
) -> None:
    """Add the arguments that pretraining and finetuning share; each sets its defaults by `parser.set_defaults`.

    `models` are the names that --model takes. In `pretraining`, `--data_path` takes several places, and images without
    labels; otherwise what is not given can come from a checkpoint to start from. Whole images are `classified`, or a
    task has data and scales of its own. One of the defaults is `recipe_epochs`, the length of the run that the default
    of `--warmup_epochs` is for.
    """
    inherited = "" if pretraining else ", or the checkpoint's"
    add_machine_arguments(parser)
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=tuple(models), metavar="NAME", help=f"one of {', '.join(models)}")
    add("--input_size", type=pixels, nargs="+", metavar="PX", help="side, or height and width, of the input")
    add("--patch_size", type=side, help="pixels a side")
    add("--in_chans", type=number(int, 1, 64), help=f"channels of the images (default: 3{inherited})")
    add("--embed_dim", type=side, help="number of channels, instead of the model's")
    add("--depth", type=few, help="number of blocks, instead of the model's")

    add = parser.add_argument_group("optimisation").add_argument
    add("--accum_iter", type=positive, default=1, help="gradient accumulation: batches per update (default: 1)")
    add("--epochs", type=positive, help="length of the run")
    add("--warmup_epochs", type=natural, action=WarmUp,
        help="linear warm-up of the learning rate (default: %(default)s, less in a shorter run)")
    add("--lr", type=amount, help="absolute learning rate, instead of --blr")
    add("--blr", type=amount, help="learning rate for an effective batch size of 256")
    add("--min_lr", type=amount, help="learning rate at the end")
    add("--weight_decay", type=amount, default=0.05, help="of AdamW")
    add("--clip_grad", type=number(float, 0, 1e9, above=True), help="largest gradient norm")

    add = parser.add_argument_group("data").add_argument
    if classified:
        add("--data_path", type=nonempty, required=True, nargs="+" if pretraining else None, metavar="PATH",
            help="; ".join(text for _, text in READERS.values()) + "; images need neither labels nor train/; several "
            "places are mixed, and PATH*N takes each image N times" * pretraining)
        add("--loader", choices=("fast", "pil"), default="fast",
            help="fast: decode training images with libjpeg-turbo and augment them on the training device; pil: do "
            "both in Pillow as the released code does")
        add("--scale", type=rate, nargs=2, help="least and largest area of crops")
    add("--max_bad_samples", type=natural, metavar="N",
        help="end the run after an epoch with more broken training images than this (default: 0.1 %% of the images)")
    add("--hflip", type=rate, default=0.5, help="rate of horizontal flips")
    add("--mean", type=number(float, -1e9, 1e9), nargs="+", metavar="X",
        help=f"of the channels, for values from 0 to 1: one number, or one each (default: ImageNet's{inherited})")
    add("--std", type=number(float, 0, 1e9, above=True), nargs="+", metavar="X",
        help=f"standard deviation, likewise (default: ImageNet's{inherited})")
    add("--exif", type=boolean, nargs="?", const=True,
        help=f"turn images as the orientation in their EXIF data says (default: False{inherited})")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", type=nonempty, default="./output_dir", help="checkpoints and log.txt")
    add("--log_dir", type=nonempty, help="TensorBoard files (default: the output folder)")
    add("--tracker", choices=("tensorboard", "wandb", "trackio"), default="tensorboard", help="experiment tracker")
    add("--print_freq", type=positive, default=LOG_EVERY, metavar="N",
        help="steps between lines on the screen and points of curves (default: %(default)s)")
    add("--save_freq", type=positive, default=20, help="epochs between kept checkpoints")
    add("--save_every_steps", type=positive, metavar="N", help="also write checkpoint-last.pth every N updates")
    add("--keep", type=few, default=2, metavar="N",
        help="number of the newest checkpoints to keep: checkpoint-last.pth, checkpoint-last-1.pth and so on")
    add("--resume", type=nonempty, metavar="FILE",
        help="resume from this checkpoint: path, URL or hf://OWNER/REPO/FILE; auto: from the newest in the output "
        "folder, if there is one")
    add("--allow_changed_args", action="store_true",
        help="resume although arguments differ from the checkpoint's and change the result")
    add("--start_epoch", type=natural, help="first epoch (default: where the checkpoint was written)")
    add("--compile", action="store_true", default=None,
        help="torch.compile the blocks (default: when training on a GPU)")
    add("--no_compile", action="store_false", dest="compile", help="run them eagerly")
    add("--grad_checkpointing", action="store_true",
        help="recompute each block in the backward pass, for less memory and more time; the result is the same")
    add("--fsdp", action="store_true",
        help="shard weights, gradients and moments over torchrun's processes (FSDP2), for models too large for one GPU")
    add("--deterministic", action="store_true",
        help="use deterministic algorithms, which are slower, so that runs on a GPU are repeatable")
    add("--max_nonfinite", type=positive, default=3, metavar="N",
        help="end the run after N updates in a row with a non-finite gradient")
    add("--seed", type=seed_number, default=0, help="of all random numbers")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every script: the device, and how images are loaded."""
    add = parser.add_argument_group("machine").add_argument
    add("--batch_size", type=batch, default=64, help="images per process and step")
    add("--device", type=nonempty, help="cuda or cpu (default: cuda where there is a GPU)")
    add("--dtype", choices=("bf16", "fp16", "fp32"),
        help="of activations; fp16 also scales the loss (default: bf16 on a GPU, fp16 on one before Ampere, else fp32)")
    add("--scan_backend", default="auto", help="auto, triton, cuda, mamba_ssm, cpu or torch")
    add("--num_workers", type=workers, default=min(10, available_cores()),
        help="processes that load images (default: 10, or the number of cores)")
    add("--worker_timeout", type=number(int, 0, 10**6), default=300, metavar="S",
        help="end the run if loading a batch takes longer; 0 waits without limit (default: %(default)s seconds)")
    add("--pin_mem", action="store_true", default=True, help="pin memory for the GPU (default)")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="do not pin memory")
    add("--dist_timeout", type=seconds, default=600, metavar="S",
        help="timeout of collectives, after which the run ends (default: %(default)s seconds)")


def add_finetune_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what all tasks of finetuning share, but for evaluation, and return the group; the task adds its own."""
    group = parser.add_argument_group("finetuning")
    add = group.add_argument
    add("--finetune", type=nonempty, metavar="FILE",
        help="start from these weights, of pretraining or finetuning: path, URL or hf://OWNER/REPO/FILE")
    add("--model_key", choices=("model", "model_ema"), help="which weights of --finetune, or to evaluate")
    add_ignore_keys(group)
    add("--directions", type=int, choices=(4, 1),
        help="scans: rows and columns, forward and backward, or the pretrained one (default: 4, or the checkpoint's)")
    add("--freeze", type=frozen, metavar="N",
        help="train neither the embeddings nor the first N blocks; all: nothing of the encoder (default: train "
        "everything)")
    add("--drop_path", type=rate, default=0.1, help="stochastic depth rate (default: %(default)s)")
    add("--layer_decay", type=number(float, 0, 1, above=True), default=0.65,
        help="lr factor per layer (default: %(default)s)")
    add("--ema_decay", type=rate, help="also keep a moving average of the weights, with this decay")
    return group


def add_eval_arguments(parser: argparse.ArgumentParser, scored: bool = True) -> None:
    """Add the arguments of how images are evaluated; broken ones have a choice only if images are `scored`."""
    add = parser.add_argument_group("evaluated images").add_argument
    add("--eval_resize", choices=RESIZES, default="square",
        help="resize images to a square as the released code does, or their shorter side and crop the center")
    add_eval_loader(add)
    if scored:
        add_eval_bad(add)


def add_eval_loader(add: Callable[..., argparse.Action]) -> None:
    """Add how evaluated images are decoded."""
    add("--eval_loader", choices=("fast", "pil"), default="pil",
        help="decode and resize images with libjpeg-turbo and torch (fast), or with Pillow")


def add_eval_bad(add: Callable[..., argparse.Action]) -> None:
    """Add what a broken image does to an evaluation."""
    add("--eval_bad", choices=("stop", "wrong"), default="stop",
        help="a broken image stops the evaluation, or counts as wrong")


def add_mask_arguments(group: argparse._ArgumentGroup) -> None:
    """Add images with masks, and what the values of masks mean; see `MaskFolder`."""
    add = group.add_argument
    add("--data_path", type=nonempty, required=True, metavar="PATH",
        help="folder with images/ and annotations/ (or masks/), in each of them training/ and validation/")
    add("--classes", type=nonempty, metavar="FILE",
        help="names of the classes, a line each (default: classes.txt or objectInfo150.txt in the folder)")
    add("--ignore_label", type=number(int, 0, VALUES - 1), nargs="+", metavar="N",
        help="values of masks without a class (default: 255, or 0 with objectInfo150.txt)")


def add_block_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the choice of the blocks whose outputs are features; see `Evaluation.features.chosen_blocks`."""
    add = group.add_mutually_exclusive_group().add_argument
    add("--block", type=few, metavar="N", help="the output of block N, from 1 (default: last)")
    add("--average_last", type=few, metavar="N", help="the mean of the last N blocks")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add which checkpoint a script examines, and return the group; the script adds `--output`."""
    group = parser.add_argument_group("checkpoint")
    add = group.add_argument
    add("checkpoint", type=nonempty, metavar="CKPT", help="file of pretraining or finetuning")
    add("--model_key", choices=("model", "model_ema"), help="weights to take (default: model)")
    add_ignore_keys(group)
    add("--input_size", type=pixels, nargs="+", metavar="PX", help="side, or height and width (default: as trained)")
    return group


def add_result(group: argparse._ArgumentGroup) -> None:
    """Add `--output`, the JSON file of a result; see `Evaluation.tables.result_file`."""
    group.add_argument("--output", metavar="FILE", help="JSON file of the result (default: next to CKPT)")


def frozen(text: str) -> int | str:
    """Argument type: a number of blocks, or all."""
    try:
        return text if text == "all" else int(number(int, 0, 1000)(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of blocks nor all") from error


def add_ignore_keys(parser: argparse._ActionsContainer) -> None:
    """Add `--ignore_keys`, patterns of parameters of a checkpoint to leave out; see `checkpoint_file.read`."""
    parser.add_argument("--ignore_keys", nargs="+", default=[], metavar="PATTERN",
        help="leave out parameters of the checkpoint that no model here has, e.g. '*angle_embed'")


# fmt: on


def boolean(text: str) -> bool:
    """Argument type: true/false, yes/no, 1/0."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def check_arguments(args: argparse.Namespace, processes: int | None = None) -> None:
    """Derive `args.lr` and a shorter warm-up if they are not given; raise UserError if arguments contradict others.

    `processes` is the number that the run will have; None takes the number of this run.
    """
    check_input_size(args)
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        raise UserError(f"--start_epoch {args.start_epoch}: the run has epochs 0 to {args.epochs - 1}")
    if not getattr(args, "eval", False):
        check_warmup(args)
    if args.scale[0] > args.scale[1] or args.scale[1] == 0:
        raise UserError("--scale: the smaller value comes first, and the larger one must be above 0")
    args.world_size = processes or world_size()
    for flag in ("loader", "eval_loader"):
        if getattr(args, flag, None) == "fast" and importlib.util.find_spec("simplejpeg") is None:
            raise UserError(f"--{flag} fast needs simplejpeg: pip install simplejpeg, or take --{flag} pil")
    if args.fsdp and getattr(args, "eval", False):
        raise UserError("--eval does not shard the model: leave --fsdp out")
    if args.fsdp and args.world_size == 1:
        raise UserError("--fsdp shards over processes, and there is one: start several with torchrun")
    for other in ("fsdp", "deterministic", "grad_checkpointing", "eval"):
        if getattr(args, other, False):
            if args.cuda_graph:
                raise UserError(f"--cuda_graph does not go together with --{other}: leave one of them out")
            args.cuda_graph = False
    if args.lr is None:
        args.lr = args.blr * args.batch_size * args.accum_iter * args.world_size / 256


def check_warmup(args: argparse.Namespace) -> None:
    """Raise UserError if a given warm-up is not shorter than the run; reduce a default one to the recipe's fraction.

    The reduced one may be below one epoch. One epoch of warm-up in a run of one epoch is accepted, since the flag has
    no smaller value but 0.
    """
    warmup, epochs, recipe_epochs = args.warmup_epochs, args.epochs, vars(args).pop("recipe_epochs", None)
    if warmup < epochs:
        return
    if recipe_epochs is not None:
        args.warmup_epochs = epochs * warmup / recipe_epochs
        share = args.warmup_epochs, epochs, warmup, recipe_epochs
        LOGGER.info("warm-up of %g epochs in a run of %d: the share of the recipe's %d in %d", *share)
    elif warmup == epochs == 1:
        LOGGER.info("--warmup_epochs 1 is the whole run: its learning rate only rises")
    else:
        run = f"the run of --epochs {epochs}"
        raise UserError(f"--warmup_epochs {warmup} is not shorter than {run}: the learning rate would never fall")


def check_input_size(args: argparse.Namespace) -> None:
    """Raise UserError, which names the argument, for more than two numbers."""
    if args.input_size is not None and len(args.input_size) > 2:
        raise UserError(f"--input_size takes one side, or height and width, not {len(args.input_size)} numbers")


def effective_batch_size(args: argparse.Namespace) -> int:
    """Return the number of images per update over all processes."""
    return args.batch_size * args.accum_iter * world_size()


def image_size(args: argparse.Namespace) -> tuple[int, int]:
    """Return height and width of the input."""
    return args.input_size[0], args.input_size[-1]


def given(args: argparse.Namespace, *names: str) -> dict:
    """Return those of the named arguments that have a value; checkpoints of earlier versions may lack some."""
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def output_folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """Create the folders for checkpoints and for TensorBoard; raise UserError if files cannot be written there."""
    if args.tracker == "tensorboard":
        check_utf8("--log_dir", args.log_dir or args.output_dir)
    folders = Path(args.output_dir), Path(args.log_dir or args.output_dir)
    for name, folder in zip(("output_dir", "log_dir"), folders, strict=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"--{name} {folder} cannot be written: {error.strerror}") from error
    return folders


def check_utf8(flag: str, folder: str | Path) -> None:
    """Raise UserError, which names the flag, for a folder that TensorBoard cannot write to."""
    with as_user_error(UnicodeEncodeError, prefix=f"{flag} {folder}: TensorBoard needs a name in UTF-8: "):
        str(folder).encode()
