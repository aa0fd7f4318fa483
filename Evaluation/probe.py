"""Evaluate the frozen features of a checkpoint, of pretraining or finetuning, by probes.

    python Evaluation/probe.py out_b/checkpoint-last.pth --data_path /path/to/ImageNet --probe knn linear attentive

prints a table and writes it as JSON beside the checkpoint. Features are computed once and kept in --cache. Under
torchrun each process takes a share of the images, queries and seeds; the results are those of one process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from Evaluation.probes import PROBES, Task
from Evaluation.tables import result_file, table, with_interval, write_result
from util import arguments, cli, hardware
from util.checkpoints.hub import beside, locate
from util.data.class_names import match_classes
from util.data.sources.readers import open_source
from util.data.sources.source import Source
from util.distributed.processes import check_one_machine, init_device
from util.errors import UserError
from util.files import printable
from util.seeding import seed_everything
from util.tracking.run_log import Log, open_log
from util.training.run_state import fingerprint

if TYPE_CHECKING:
    from pretrained import Model

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("probe.py", description=__doc__.splitlines()[0])
    arguments.add_machine_arguments(parser)
    arguments.add_eval_arguments(parser)
    arguments.add_result(arguments.add_checkpoint_arguments(parser))
    group = parser.add_argument_group("features")
    add = group.add_argument
    add("--data_path", type=arguments.nonempty, required=True, help="images with train and val, as for training")
    arguments.add_block_arguments(group)
    add("--cache", type=arguments.nonempty, metavar="DIR", help="folder of features (default: features/ beside CKPT)")
    add(
        "--max_gb",
        type=arguments.amount,
        default=32,
        help="largest file of features; the attentive probe keeps all tokens, in float16 (default: %(default)s)",
    )
    group = parser.add_argument_group("probes")
    add = group.add_argument
    add("--probe", nargs="+", choices=tuple(PROBES), default=["knn", "linear"])
    add("--seeds", type=arguments.few, default=3, help="trained probes of each kind (default: %(default)s)")
    add("--probe_epochs", type=arguments.positive, default=50, help="(default: %(default)s)")
    add("--probe_batch_size", type=arguments.number(int, 2, 10**6), default=256, help="(default: %(default)s)")
    add("--seed", type=arguments.seed_number, default=0, help="(default: %(default)s)")
    for probe in PROBES.values():
        probe.add_arguments(group)
    parser.set_defaults(dist_eval=True)
    return parser


def main(args: argparse.Namespace) -> None:
    """Compute features, train and evaluate probes.

    Raises:
        UserError: arguments, checkpoint or data do not fit.
    """
    arguments.check_input_size(args)
    check_one_machine()
    device, log = init_device(args.device, args.dist_timeout), open_log()
    seed_everything(args.seed)
    output = result_file(args, ".probe.json", list)
    locate(args.checkpoint)
    sources = {name: open_source(args.data_path, name) for name in ("train", "val")}

    from Evaluation.features import load_model

    content = measure(args, load_model(args, device), sources, device, log)
    head = ["probe", "top-1 (95 % over images)", "deviation over seeds", "top-5", "images", "learning rate"]
    log.say(table(head, *map(cells, content["results"])))
    write_result(output, vars(args), content)


def measure(
    args: argparse.Namespace, model: Model, sources: dict[str, Source], device: torch.device, log: Log
) -> dict[str, Any]:
    """Compute features, train and evaluate the probes of `args.probe`.

    Args:
        args: of this script, as `load_model` has left them.
        model: frozen.
        sources: images of `train` and `val`; the labels of `val` become those of `train`.
        device: of the model.
        log: of this rank.

    Returns:
        Content of the JSON file, with rows of "results".

    Raises:
        UserError: arguments and data do not fit.
        RunError: images are broken, or features or weights of a probe are not finite.
    """
    from Evaluation.features import chosen_blocks, eval_images, features, hash_of

    torch.set_float32_matmul_precision("highest")  # TF32 would choose other neighbours than a CPU
    args.cache = args.cache or beside(args.checkpoint).parent / "features"
    blocks = chosen_blocks(args, len(model.layers))
    probes = [probe for name, probe in PROBES.items() if name in args.probe]
    splits = {name: eval_images(args, source) for name, source in sources.items()}
    for line in match_classes(sources["val"], sources["train"].classes, sources["train"].root):
        log.say(line)
    names = [printable(name) for name in sources["train"].classes]
    check_images(args, model.embed_dim, {name: torch.from_numpy(s.labels) for name, s in sources.items()}, names)
    kinds = {probe.tokens for probe in probes}
    data = {name: features(args, model, part, name, blocks, kinds, log) for name, part in splits.items()}
    labels = {name: next(iter(parts.values()))[1] for name, parts in data.items()}
    broken = {name: int((y < 0).sum()) for name, y in labels.items()}  # under --eval_bad wrong
    if any(broken.values()):
        log.say(f"broken images: {broken['train']} of train are left out, {broken['val']} of val count as wrong")
    for line in check_images(args, model.embed_dim, labels, names):
        log.say(line)
    for parts in data.values():
        if False in parts:
            parts[False] = parts[False][0].to(device), parts[False][1].to(device)
    rows: list[dict] = []
    for probe in probes:
        train, val = (data[name][probe.tokens] for name in ("train", "val"))
        rows += probe.evaluate(Task(train, val, len(names), args, device, log))

    log.say(f"{type(model).__name__}, block {', '.join(map(str, blocks))} of {len(model.layers)}")
    about = {
        name: {"root": printable(source.root), "images": len(source.labels), "fingerprint": fingerprint(source)}
        for name, source in sources.items()
    }
    content = {"weights": hash_of(model), "blocks": list(blocks), "data": about, "class_names": names, "broken": broken}
    return {**content, "machine": hardware.describe(device), "results": rows}


def check_images(args: argparse.Namespace, dim: int, labels: dict[str, Tensor], names: list[str]) -> list[str]:
    """Check that the images are enough for every probe.

    Args:
        args: of this script.
        dim: channels of the features.
        labels: of `train` and of `val`, (n,) int64 each; the label -1 of a broken image does not count.
        names: of the classes, by label.

    Returns:
        Lines that tell the user what differs from the arguments.

    Raises:
        UserError: a probe is not possible, or `train` lacks a class that `val` has.
    """
    train, val = labels["train"], labels["val"]
    images = int((train >= 0).sum())
    lines = dict.fromkeys(line for name in args.probe for line in PROBES[name].check(args, images, dim))
    if lacking := sorted(set(val[val >= 0].tolist()) - set(train.tolist())):
        named = ", ".join(names[label] or str(label) for label in lacking[:5])
        raise UserError(f"{args.data_path}: train has no image of {len(lacking)} classes that val has: {named}")
    return list(lines)


def cells(row: dict) -> list:
    """Return a row of results as the cells of the table."""
    deviation, runs = row.get("acc1_std"), row.get("seeds", [])
    rates = " ".join(f"{run['lr']:g}" for run in runs)
    spread = "" if deviation is None else f"{deviation:.2f} % of {len(runs)}"
    return [row["probe"], with_interval(row), spread, f"{row['acc5']:.2f} %", row["images"], rates]


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
