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

from Evaluation.features import chosen_blocks, features, hash_of, load_model
from Evaluation.probes import FEWEST, AttentiveHead, LinearHead, has_direction, held_out, knn, train_probe
from Evaluation.tables import accuracy, result_file, table, with_interval, write_result
from util import arguments, cli, hardware
from util.checkpoints.hub import beside
from util.data.class_names import match_classes
from util.data.datasets import image_dataset
from util.data.transforms import eval_transform
from util.distributed.processes import gather_late, init_device, rank, reduce_sum, world_size
from util.errors import UserError
from util.files import printable
from util.seeding import seed_everything
from util.tracking.run_log import Log, open_log
from util.training.run import fingerprint


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser("probe.py", description=__doc__.splitlines()[0])
    arguments.add_machine_arguments(parser)
    arguments.add_eval_arguments(parser)
    arguments.add_checkpoint_arguments(parser)
    group = parser.add_argument_group("features")
    group.add_argument(
        "--data_path", type=arguments.nonempty, required=True, help="images with train and val, as for training"
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument("--block", type=arguments.few, metavar="N", help="the output of block N, from 1 (default: last)")
    which.add_argument("--average_last", type=arguments.few, metavar="N", help="the mean of the last N blocks")
    group.add_argument(
        "--cache",
        type=arguments.nonempty,
        metavar="DIR",
        help="where features are kept (default: features/ beside CKPT)",
    )
    group.add_argument(
        "--max_gb",
        type=arguments.amount,
        default=32,
        help="largest file of features; the attentive probe keeps all tokens, in float16 (default: %(default)s)",
    )
    group = parser.add_argument_group("probes")
    group.add_argument("--probe", nargs="+", choices=("knn", "linear", "attentive"), default=["knn", "linear"])
    group.add_argument("--k", type=arguments.positive, nargs="+", default=[10, 20, 100, 200], help="neighbours")
    group.add_argument("--temperature", type=arguments.number(float, 1e-6, 1e9), default=0.07, help="of kNN's votes")
    group.add_argument("--seeds", type=arguments.few, default=3, help="trained probes of a kind (default: %(default)s)")
    group.add_argument("--probe_epochs", type=arguments.positive, default=50, help="(default: %(default)s)")
    group.add_argument(
        "--probe_batch_size", type=arguments.number(int, 2, 10**6), default=256, help="(default: %(default)s)"
    )
    group.add_argument("--attn_heads", type=arguments.side, help="of the attentive probe (default: 64 channels each)")
    group.add_argument("--seed", type=arguments.seed_number, default=0, help="(default: %(default)s)")
    parser.set_defaults(dist_eval=True)
    return parser


def main(args: argparse.Namespace) -> None:
    """Compute features, train and evaluate probes.

    Raises:
        UserError: something that was asked for cannot be.
    """
    arguments.check_input_size(args)
    if world_size() != int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise UserError("the processes share a file of features: run all of them on one machine")
    device, log = init_device(args.device, args.dist_timeout), open_log()
    seed_everything(args.seed)
    output = result_file(args, ".probe.json", list)
    model = load_model(args, device)
    torch.set_float32_matmul_precision("highest")  # TF32 would choose other neighbours than a CPU
    args.cache = beside(args.checkpoint).parent / "features" if args.cache is None else args.cache
    blocks = chosen_blocks(args, len(model.layers))
    heads = args.attn_heads or max(1, model.embed_dim // 64)
    if "attentive" in args.probe and model.embed_dim % heads:
        raise UserError(f"--attn_heads {heads} does not divide the {model.embed_dim} channels")
    transform = eval_transform(arguments.image_size(args), args.eval_resize)
    splits = {name: image_dataset(args.data_path, name, transform, args.eval_loader) for name in ("train", "val")}
    sources = {name: data.source for name, data in splits.items()}
    for line in match_classes(sources["val"], sources["train"].classes, sources["train"].root):
        log.say(line)
    names = [printable(name) for name in sources["train"].classes]
    check_images(args, *(torch.from_numpy(source.labels) for source in sources.values()), names)
    # the larger files first: what is too large is refused before any work
    kept = {
        tokens: [features(args, model, data, name, blocks, tokens, device, log) for name, data in splits.items()]
        for tokens in sorted({probe == "attentive" for probe in args.probe}, reverse=True)
    }
    # under --eval_bad wrong: those of train are left out, those of val count as wrong
    labels = {name: y for name, (_, y) in zip(splits, next(iter(kept.values())), strict=True)}
    broken = {name: int((y < 0).sum()) for name, y in labels.items()}
    if any(broken.values()):
        log.say(f"broken images: {broken['train']} of train are left out, {broken['val']} of val count as wrong")
        check_images(args, *labels.values(), names)
    images = len(labels["train"]) - broken["train"]
    trained_on = images - held_out(images)
    if trained_on < args.probe_batch_size and set(args.probe) != {"knn"}:
        log.say(f"--probe_batch_size {args.probe_batch_size}: batches have the {trained_on} images that are trained on")
    pooled = [(x.to(device), y.to(device)) for x, y in kept.get(False, ())]
    rows = []
    if "knn" in args.probe:
        rows += evaluate_knn(*pooled, args, len(names), log)
    if "linear" in args.probe:
        make_head = partial(LinearHead, model.embed_dim, len(names))
        rows.append(train_seeds("linear", make_head, *pooled, args, device, log))
    if "attentive" in args.probe:
        make_head = partial(AttentiveHead, model.embed_dim, len(names), heads)
        rows.append(train_seeds("attentive", make_head, *kept[True], args, device, log))

    log.say(f"{type(model).__name__}, block {', '.join(map(str, blocks))} of {len(model.layers)}")
    head = ["probe", "top-1 (95 % over images)", "deviation over seeds", "top-5", "images", "learning rate"]
    log.say(table(head, *map(cells, rows)))
    data = {
        name: {"root": printable(source.root), "images": len(source.labels), "fingerprint": fingerprint(source)}
        for name, source in sources.items()
    }
    content = {"weights": hash_of(model), "blocks": list(blocks), "data": data, "class_names": names, "broken": broken}
    write_result(output, vars(args), {**content, "machine": hardware.describe(device), "results": rows})


def check_images(args: argparse.Namespace, train: Tensor, val: Tensor, names: list[str]) -> None:
    """Refuse probes that need more images than there are.

    Args:
        args: `probe`, `k` and `data_path` count.
        train: (n,) int64, labels of the training images; the label -1 of a broken one does not count.
        val: (m,) int64, those of the validation images.
        names: of the classes, by label.

    Raises:
        UserError: says how many images there are, or which classes lack them.
    """
    images = int((train >= 0).sum())
    if "knn" in args.probe:
        possible(args.k, images)
    if set(args.probe) != {"knn"} and images < FEWEST:
        raise UserError(f"a probe trains on {FEWEST - 1} images and is chosen by one held out: there are {images}")
    lacking = sorted(set(val[val >= 0].tolist()) - set(train.tolist()))
    if lacking:
        named = ", ".join(names[label] or str(label) for label in lacking[:5])
        raise UserError(f"{args.data_path}: train has no image of {len(lacking)} classes that val has: {named}")


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
    log: Log,
) -> list[dict]:
    """A row of results for each of `--k` that the training images suffice for; each process asks a share of `val`.

    Features without a direction have no cosine: those of `train` are left out, those of `val` count as wrong.
    """
    lost = [int((~has_direction(x) & (y >= 0)).sum()) for x, y in (train, val)]
    if any(lost):
        log.say(f"kNN: features of {lost[0]} images of train have no direction and are left out")
        log.say(f"kNN: features of {lost[1]} images of val have no direction and count as wrong")
    intact = has_direction(train[0]) & (train[1] >= 0)
    ks = possible(args.k, int(intact.sum()))
    if len(ks) < len(set(args.k)):
        log.say(f"{intact.sum()} training images: larger --k are left out")
    queries, labels = (part[rank() :: world_size()] for part in val)
    labels = labels.masked_fill(~has_direction(queries), -1)
    rows = []
    for k, best in knn(train[0][intact], train[1][intact], queries, ks, args.temperature, classes).items():
        hits = (best == labels[:, None]) & (labels[:, None] >= 0)  # (m, up to 5)
        counts = reduce_sum(torch.stack([hits[:, 0].sum(), hits.sum()]))
        row = {"probe": f"{k}-NN", "k": k, **accuracy(*counts.tolist(), len(val[1]))}
        rows.append(row | ({"without_direction": lost[1]} if lost[1] else {}))
    return rows


def train_seeds(
    kind: str,
    make_head: Callable[[], nn.Module],
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    device: torch.device,
    log: Log,
) -> dict:
    """A row of results of `--seeds` probes, their mean and its deviation; each process trains some of them."""
    shares = gather_late(
        [train_probe(make_head, train, val, args, s, device) for s in range(args.seeds)[rank() :: world_size()]]
    )
    runs = [shares[s % world_size()][s // world_size()] for s in range(args.seeds)]
    for seed, run in enumerate(runs):
        if "nonfinite" in run:
            log.say(f"{kind} probe of seed {seed}: {run['nonfinite']} images have logits that are not finite: wrong")
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
    cli.run_main(main, get_args_parser())
