"""Probes of the frozen features of a checkpoint, of pretraining or finetuning.

    python Evaluation/probe.py out_b/checkpoint-last.pth --data_path /path/to/ImageNet --probe knn linear attentive

prints a table and writes it as JSON beside the checkpoint. Features are computed once, each process a share of the
images, and kept in --cache; under torchrun the processes share out queries and seeds, too, and the numbers are those
of one process.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from features import chosen_blocks, features, hash_of, load_model
from probes import AttentiveHead, LinearHead, knn, train_probe
from report import accuracy, output_file, table, with_interval, write_json
from util import cli
from util.class_names import match_classes
from util.datasets import eval_transform, image_dataset
from util.dist import gather_late, init_device, on_main, rank, reduce_sum, seed_everything, world_size
from util.errors import UserError
from util.hub import beside
from util.metrics import ScreenLog, SilentLog, open_log


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser("probe.py", description=__doc__.splitlines()[0])
    cli.add_machine_arguments(parser)
    cli.add_eval_arguments(parser)
    cli.add_checkpoint_arguments(parser)
    group = parser.add_argument_group("features")
    group.add_argument("--data_path", type=cli.filled, required=True, help="images with train and val, as for training")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--block", type=cli.few, metavar="N", help="the output of block N, from 1 (default: last)")
    which.add_argument("--average_last", type=cli.few, metavar="N", help="the mean of the last N blocks")
    group.add_argument("--cache", metavar="DIR", help="where features are kept (default: features/ beside CKPT)")
    group.add_argument(
        "--max_gb",
        type=cli.amount,
        default=32,
        help="largest file of features; the attentive probe keeps all tokens, in float16 (default: %(default)s)",
    )
    group = parser.add_argument_group("probes")
    group.add_argument("--probe", nargs="+", choices=("knn", "linear", "attentive"), default=["knn", "linear"])
    group.add_argument("--k", type=cli.positive, nargs="+", default=[10, 20, 100, 200], help="neighbours")
    group.add_argument("--temperature", type=cli.number(float, 1e-6, 1e9), default=0.07, help="of kNN's votes")
    group.add_argument("--seeds", type=cli.few, default=3, help="trained probes of a kind (default: %(default)s)")
    group.add_argument("--probe_epochs", type=cli.positive, default=50, help="(default: %(default)s)")
    group.add_argument("--probe_batch_size", type=cli.number(int, 2, 10**6), default=256, help="(default: %(default)s)")
    group.add_argument("--attn_heads", type=cli.side, help="of the attentive probe (default: 64 channels each)")
    group.add_argument("--seed", type=cli.seed_number, default=0, help="(default: %(default)s)")
    parser.set_defaults(dist_eval=True)
    return parser


def main(args: argparse.Namespace) -> None:
    """Compute features, train and evaluate probes.

    Raises:
        UserError: something that was asked for cannot be.
    """
    cli.check_input_size(args)
    if world_size() != int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise UserError("the processes share a file of features: run all of them on one machine")
    device, log = init_device(args.device, args.dist_timeout), open_log()
    seed_everything(args.seed)
    model = load_model(args, device)
    torch.set_float32_matmul_precision("highest")  # TF32 would choose other neighbours than a CPU
    source = beside(args.checkpoint)
    output = on_main(lambda: output_file(args.output, source.with_suffix(".probe.json")))
    args.cache = args.cache or source.parent / "features"
    blocks = chosen_blocks(args, len(model.layers))
    heads = args.attn_heads or max(1, model.embed_dim // 64)
    if "attentive" in args.probe and model.embed_dim % heads:
        raise UserError(f"--attn_heads {heads} does not divide the {model.embed_dim} channels")
    transform = eval_transform(cli.image_size(args), args.eval_resize)
    splits = {name: image_dataset(args.data_path, name, transform, args.eval_loader) for name in ("train", "val")}
    train = splits["train"].source
    for line in match_classes(splits["val"].source, train.classes, train.root):
        log.say(line)
    classes = len(train.classes)

    if "knn" in args.probe:
        possible(args.k, len(splits["train"]))
    # the larger files first: what is too large is refused before any work
    kept = {
        tokens: [features(args, model, data, name, blocks, tokens, device, log) for name, data in splits.items()]
        for tokens in sorted({probe == "attentive" for probe in args.probe}, reverse=True)
    }
    # under --eval_bad wrong: those of train are left out, those of val count as wrong
    broken = {name: int((y < 0).sum()) for name, (_, y) in zip(splits, next(iter(kept.values())), strict=True)}
    if any(broken.values()):
        log.say(f"broken images: {broken['train']} of train are left out, {broken['val']} of val count as wrong")
    pooled = [(x.to(device), y.to(device)) for x, y in kept.get(False, ())]
    rows = []
    if "knn" in args.probe:
        rows += evaluate_knn(*pooled, args, classes, log)
    if "linear" in args.probe:
        make_head = partial(LinearHead, model.embed_dim, classes)
        rows.append(train_seeds("linear", make_head, *pooled, args, device))
    if "attentive" in args.probe:
        make_head = partial(AttentiveHead, model.embed_dim, classes, heads)
        rows.append(train_seeds("attentive", make_head, *kept[True], args, device))

    log.say(f"{type(model).__name__}, block {', '.join(map(str, blocks))} of {len(model.layers)}")
    head = ["probe", "top-1 (95 % over images)", "deviation over seeds", "top-5", "images", "learning rate"]
    log.say(table(head, *map(cells, rows)))
    content = {"checkpoint": str(args.checkpoint), "weights": hash_of(model), "blocks": list(blocks), "broken": broken}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    on_main(lambda: write_json(output, {**content, "results": rows, "args": settings}))


def possible(ks: list[int], images: int) -> list[int]:
    """Those numbers of neighbours that there are images for.

    Raises:
        UserError: none is.
    """
    if min(ks) > images:
        raise UserError(f"--k {min(ks)}: there are {images} training images")
    return [k for k in dict.fromkeys(ks) if k <= images]


def evaluate_knn(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    classes: int,
    log: ScreenLog | SilentLog,
) -> list[dict]:
    """A row of results for each of `--k` that the training images suffice for; each process asks a share of `val`."""
    intact = train[1] >= 0
    ks = possible(args.k, intact.sum())
    if len(ks) < len(set(args.k)):
        log.say(f"{intact.sum()} training images: larger --k are left out")
    queries, labels = (part[rank() :: world_size()] for part in val)
    rows = []
    for k, best in knn(train[0][intact], train[1][intact], queries, ks, args.temperature, classes).items():
        hits = (best == labels[:, None]) & (labels[:, None] >= 0)  # (m, up to 5)
        counts = reduce_sum(torch.stack([hits[:, 0].sum(), hits.sum()]))
        rows.append({"probe": f"{k}-NN", "k": k, **accuracy(*counts.tolist(), len(val[1]))})
    return rows


def train_seeds(
    kind: str,
    make_head: Callable[[], nn.Module],
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    device: torch.device,
) -> dict:
    """A row of results of `--seeds` probes, their mean and its deviation; each process trains some of them."""
    shares = gather_late(
        [train_probe(make_head, train, val, args, s, device) for s in range(args.seeds)[rank() :: world_size()]]
    )
    runs = [shares[s % world_size()][s // world_size()] for s in range(args.seeds)]
    correct, correct5 = (statistics.mean(run[name] for run in runs) for name in ("correct", "correct5"))
    each = [100 * run["correct"] / len(val[1]) for run in runs]
    deviation = statistics.stdev(each) if len(each) > 1 else None
    return {"probe": kind, **accuracy(correct, correct5, len(val[1])), "acc1_std": deviation, "seeds": runs}


def cells(row: dict) -> list:
    """A row of results for the table."""
    deviation, runs = row.get("acc1_std"), row.get("seeds", [])
    rates = " ".join(f"{run['lr']:g}" for run in runs)
    spread = "" if deviation is None else f"{deviation:.2f} % of {len(runs)}"
    return [row["probe"], with_interval(row), spread, f"{row['acc5']:.2f} %", row["images"], rates]


if __name__ == "__main__":
    cli.run(main, get_args_parser())
