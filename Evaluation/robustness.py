"""Evaluate a classifier on datasets that test its robustness.

    python Evaluation/robustness.py out_finetune_b/checkpoint-best.pth --data imagenet=/path/ImageNet/val \
        imagenet-a=/path/imagenet-a imagenet-r=/path/imagenet-r sketch=/path/sketch \
        v2=/path/imagenetv2-matched-frequency-format-val c=/path/imagenet-c real=/path/ImageNet/val

prints a table and writes it as JSON beside the checkpoint. Each of these sets of ImageNet is a folder as it is
published: one folder a synset; for v2 folders 0 to 999; for c corruption/severity/synset; for real the validation
images under their published names.

    python Evaluation/robustness.py out/checkpoint-best.pth --data clean=/path/val night=/path/night c=/path/corrupted

takes any classifier with named classes. Each set is a folder of class folders with some of these names; for c
corruption/severity/class.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from Evaluation.tables import UNANSWERED, accuracy, escaped, result_file, table, with_interval, write_result
from util import arguments, cli, hardware
from util.checkpoints.hub import locate
from util.data.class_names import known_names
from util.data.sources.folders import Folder
from util.distributed.processes import init_device
from util.errors import UserError, as_user_error
from util.files import printable, some
from util.tracking.run_log import Log, open_log
from util.training.evaluation import evaluate, score_labels

if TYPE_CHECKING:
    from models_arm import ARMClassifier

# timm, torchvision and the models are imported after the checks, so that --help and mistakes take half of the time.

# Errors of AlexNet in percent, averaged over the five severities; mCE divides by them. Source: Hendrycks & Dietterich
# 2019 (arXiv 1903.12261), with the digits of the authors' code (github.com/hendrycks/robustness).
ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}  # fmt: skip
SEVERITIES = range(1, 6)
Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # see util.training.evaluation.evaluate
OF_IMAGENET = ("imagenet", "imagenet-a", "imagenet-r", "sketch", "v2", "real")
CLEAN = ("clean", "imagenet")  # sets with which c is compared


class Part(NamedTuple):
    """Images that are evaluated together.

    Attributes:
        source: images and labels.
        score: compares logits with labels.
        unlabelled: number of images that are left out because they have no label.
        corruption: of c, and its `severity`.
    """

    source: Folder
    score: Score = score_labels
    unlabelled: int = 0
    corruption: str = ""
    severity: str = ""


def timm_list(name: str) -> list:
    """Return a list that comes with timm: synsets, one a line, or JSON."""
    text = (resources.files("timm.data") / "_info" / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else text.split()


def named_path(text: str) -> tuple[str, Path]:
    """Parse SET=FOLDER."""
    name, _, path = text.partition("=")
    if not path or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not SET=FOLDER")
    return printable(name), Path(path)


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("robustness.py", description=__doc__.splitlines()[0])
    arguments.add_machine_arguments(parser)
    arguments.add_eval_arguments(parser)
    arguments.add_result(arguments.add_checkpoint_arguments(parser))
    sets = f"of ImageNet {', '.join(OF_IMAGENET)}; any name for class folders of your own; c: corruption/severity/class"
    add = parser.add_argument_group("data").add_argument
    add("--data", type=named_path, nargs="+", required=True, metavar="SET=FOLDER", help=sets)
    parser.set_defaults(dist_eval=True)
    return parser


def parts_of(name: str, path: Path, names: list[str], imagenet: bool) -> dict[str, Part]:
    """Return the parts of a set by title: one, or for c one a folder.

    Args:
        name: of the set.
        path: its folder.
        names: of the classifier's classes, by output.
        imagenet: they are ImageNet's synsets, in their order.

    Raises:
        UserError: there is no such folder, or it does not have the layout of the set.
    """
    with as_user_error(OSError, prefix=f"--data {name}: "):
        if not path.is_dir():
            raise UserError(f"--data {name}={path}: no such folder")
        if name == "c":
            folders = published_folders(path) if imagenet else own_folders(path)
            return {
                f"{corruption} {severity}": Part(labelled(folder, names), corruption=corruption, severity=severity)
                for (corruption, severity), folder in folders.items()
            }
    if name in ("imagenet-a", "imagenet-r"):
        subset = timm_list(f"{name.replace('-', '_')}_synsets.txt")
        columns = [names.index(synset) for synset in subset]
        return {name: Part(labelled(path, subset), lambda logits, labels: score_labels(logits[:, columns], labels))}
    if name == "real":
        return {name: real_labelled(path, timm_list("imagenet_real_labels.json"))}
    return {name: Part(labelled(path, [str(n) for n in range(1000)] if name == "v2" else names))}


def published_folders(path: Path) -> dict[tuple[str, str], Path]:
    """Return the folders of ImageNet-C by corruption and severity; raise UserError if any is missing."""
    folders = {(c, str(s)): path / c / str(s) for c in ALEXNET for s in SEVERITIES}
    if missing := [str(folder) for folder in folders.values() if not folder.is_dir()]:
        raise UserError(f"--data c={path}: {len(missing)} folders are missing: {', '.join(missing[:3])}")
    return folders


def own_folders(path: Path) -> dict[tuple[str, str], Path]:
    """Return the folders of one's own corruptions by corruption and severity, whatever there is.

    Raises:
        UserError: a corruption has no severity, or there is no corruption.
    """
    folders: dict[tuple[str, str], Path] = {}
    for corruption in [path, *folders_in(path)]:
        if not folders_in(corruption):
            raise UserError(f"--data c={path}: no folder is in {corruption}; the layout is corruption/severity/class")
        if corruption != path:
            folders |= {(printable(corruption.name), printable(s.name)): s for s in folders_in(corruption)}
    return folders


def folders_in(path: Path) -> list[Path]:
    """Return the folders in a folder that are not hidden: numbers in their order, then names."""
    found = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(found, key=lambda p: (not p.name.isdecimal(), int(p.name) if p.name.isdecimal() else 0, p.name))


def labelled(path: Path, names: list[str]) -> Folder:
    """Return the images of a folder of classes; the label of an image is the position of its class in `names`.

    Raises:
        UserError: there are no images, or a class that is not in `names`.
    """
    source = Folder(str(path), "")
    if unknown := sorted(set(source.classes) - set(names)):
        raise UserError(f"{path}: {len(unknown)} folders are no class of this set: {', '.join(unknown[:3])}")
    source.labels = np.array([names.index(name) for name in source.classes])[source.labels]
    return source


def real_labelled(path: Path, real: list[list[int]]) -> Part:
    """Return ImageNet's validation images without those that have no ReaL label (Beyer et al. 2020).

    `real` holds the right classes of each of the 50,000 images, by its number.

    Raises:
        UserError: the name of a file does not hold its number, or no image has a label.
    """
    source = Folder(str(path), "")
    found = [re.search(rb"ILSVRC2012_val_(\d{8})", name) for name in source.paths]
    numbers = np.array([int(match[1]) - 1 if match else -1 for match in found])
    strange = np.flatnonzero((numbers < 0) | (numbers >= len(real)))
    if len(strange):
        raise UserError(f"{source.name(strange[0])}: no number from 1 to {len(real)} follows ILSVRC2012_val_ in it")
    first = np.unique(numbers, return_index=True)[1]
    if len(first) < len(numbers):
        again = np.setdiff1d(np.arange(len(numbers)), first)
        raise UserError(f"{source.name(again[0])}: {len(again)} images have the number of another one; remove them")
    kept = np.flatnonzero([bool(real[number]) for number in numbers])
    if not len(kept):
        raise UserError(f"{path}: none of the images has a ReaL label")
    source.paths, source.labels = source.paths[kept], numbers[kept]
    classes = pad_sequence([torch.tensor(own or [-1]) for own in real], batch_first=True, padding_value=-1)
    return Part(source, partial(score_sets, classes), len(numbers) - len(kept))


def score_sets(classes: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Score predictions where several classes are right; see `evaluate`.

    The loss is minus the log of the summed probability of the right classes.

    Args:
        classes: (n, most) int64, the right classes of each image, padded with -1.
        logits: (B, num_classes) float32.
        labels: (B,) numbers of images, or -1.
    """
    own = classes.to(labels.device)[labels].masked_fill(labels[:, None] < 0, -1)  # (B, most)
    hits = (logits.topk(5).indices[:, :, None] == own[:, None]).any(dim=-1)  # (B, 5, most) -> (B, 5)
    right = F.one_hot(own + 1, logits.shape[1] + 1).any(dim=1)[:, 1:]  # (B, most, num_classes + 1) -> (B, num_classes)
    together = logits.log_softmax(dim=1).masked_fill(~right, -torch.inf).logsumexp(dim=1)
    return hits, -together[labels >= 0].sum()


def result_of(parts: dict[str, Part], results: dict[str, dict], imagenet: bool) -> dict:
    """Return the result of a set from the results of its parts.

    That of c has means over the corruptions of means over their severities, and each corruption's top-1 in percent
    (`corruptions`); of ImageNet-C also `mce` in percent.
    """
    if not next(iter(parts.values())).corruption:
        (result,) = results.values()
        correct, correct5 = (result[key] * result["images"] / 100 for key in ("acc1", "acc5"))
        return result | accuracy(correct, correct5, result["images"])
    counts = {kind: sum(result.get(kind, 0) for result in results.values()) for kind in ("images", *UNANSWERED)}
    means = {}
    for key in ("acc1", "acc5"):
        found: dict[str, list[float]] = {}
        for title, part in parts.items():
            found.setdefault(part.corruption, []).append(results[title][key])
        means[key] = {corruption: float(np.mean(values)) for corruption, values in found.items()}
    row = {key: float(np.mean(list(values.values()))) for key, values in means.items()}
    row |= {kind: count for kind, count in counts.items() if count}
    if imagenet:
        row["mce"] = float(np.mean([100 * (100 - means["acc1"][c]) / ALEXNET[c] for c in ALEXNET]))
    return {**row, "corruptions": means["acc1"], "parts": results}


def corruption_table(parts: dict[str, Part], row: dict, clean: float | None) -> str:
    """Return the table of c: top-1 for each corruption and severity, and percentage points below the clean set's."""
    severities = list(dict.fromkeys(part.severity for part in parts.values()))
    found = {(part.corruption, part.severity): row["parts"][title]["acc1"] for title, part in parts.items()}
    lines = []
    for corruption, mean in row["corruptions"].items():
        below = [] if clean is None else [f"{round(clean - mean, 2) + 0.0:.2f}"]  # no -0.00
        cells = [f"{found[corruption, s]:.2f} %" if (corruption, s) in found else "" for s in severities]
        lines.append([escaped(corruption), f"{mean:.2f} %", *below, *cells])
    head = ["corruption", "top-1", *["points below clean"] * (clean is not None)]
    return table([*head, *(f"severity {escaped(s)}" for s in severities)], *lines)


def main(args: argparse.Namespace) -> None:
    """Evaluate on each set.

    Raises:
        UserError: arguments, checkpoint or data do not fit; nothing has been evaluated then.
    """
    arguments.check_input_size(args)
    if len(dict(args.data)) < len(args.data):
        raise UserError("--data names a set twice")
    device, log = init_device(args.device, args.dist_timeout), open_log()
    output = result_file(args, ".robustness.json", dict)
    locate(args.checkpoint)

    from Evaluation.features import hash_of, load_model
    from models_arm import ARMClassifier

    model = load_model(args, device)
    weights, synsets = hash_of(model), timm_list("imagenet_synsets.txt")
    if not isinstance(model, ARMClassifier) or not model.num_classes:
        raise UserError(f"{args.checkpoint} has no classifier's head: a checkpoint of Finetuning/ is needed")
    names, imagenet = sorted_classes(args, model, synsets, log)
    sets = open_sets(args.data, names, imagenet, log)
    rows = {name: measure(args, model, name, parts, imagenet, device, log) for name, parts in sets.items()}
    head = ["data", "top-1 (95 % over images)", "top-5", "images", "mCE"]
    log.say(table(head, *([escaped(name), *cells(row)] for name, row in rows.items())))
    if "c" in rows:
        clean = next((rows[name]["acc1"] for name in CLEAN if name in rows), None)
        if clean is not None:
            below = {corruption: clean - acc1 for corruption, acc1 in rows["c"]["corruptions"].items()}
            rows["c"] |= {"below_clean": clean - rows["c"]["acc1"], "corruptions_below_clean": below}
        log.say("\n" + corruption_table(sets["c"], rows["c"], clean))
    settings = vars(args) | {"data": {name: printable(path) for name, path in args.data}}
    content = {"weights": weights, "class_names": names, "machine": hardware.describe(device), "results": rows}
    write_result(output, settings, content)


def sorted_classes(
    args: argparse.Namespace, model: ARMClassifier, synsets: list[str], log: Log
) -> tuple[list[str], bool]:
    """Return the names of a classifier's outputs, and whether they are ImageNet's; these are sorted as the `synsets`.

    `args.class_names`, from the checkpoint, get ImageNet's names where they are assumed.

    Raises:
        UserError: the classes are not those that a set of `args.data` needs.
    """
    args.class_names, assumed = known_names(args.class_names, model.num_classes, (), args.checkpoint)
    if assumed:
        log.say(assumed)
    imagenet = set(args.class_names) == set(synsets)
    names = synsets if imagenet else args.class_names
    check_sets(args, model, imagenet, synsets)
    if imagenet:
        sort_outputs(model, args.class_names, synsets)
    return names, imagenet


def open_sets(data: list[tuple[str, Path]], names: list[str], imagenet: bool, log: Log) -> dict[str, dict[str, Part]]:
    """Return the parts of each set, (name, folder), for classes of these names; say what is left out.

    Raises:
        UserError: a set is missing, or does not fit the classes.
    """
    sets = {name: parts_of(name, path, names, imagenet) for name, path in data}
    for name, path in data:
        if imagenet and name not in (*OF_IMAGENET, *CLEAN, "c"):
            log.say(f"{name}: no published set; its images are classified among all {len(names)} classes")
        for line in left_out(name, path, sets[name], len(names), imagenet):
            log.say(f"{name}: {line}")
    return sets


def measure(
    args: argparse.Namespace,
    model: ARMClassifier,
    name: str,
    parts: dict[str, Part],
    imagenet: bool,
    device: torch.device,
    log: Log,
) -> dict:
    """Evaluate on a set and return its result; see `result_of`, `open_sets` and `sorted_classes`."""
    from Evaluation.features import eval_images
    from util.data.loaders import eval_loader

    ratio = 1.0 if name == "c" and imagenet else None  # images of ImageNet-C are stored cropped
    results: dict[str, Any] = {}
    for title, part in parts.items():
        loader = eval_loader(eval_images(args, part.source, ratio), args, device)
        results[title] = evaluate(model, loader, device, log, title, score=part.score)
        results[title]["classes"] = len(part.source.classes)
    return result_of(parts, results, imagenet)


def check_sets(args: argparse.Namespace, model: ARMClassifier, imagenet: bool, synsets: list[str]) -> None:
    """Raise UserError if the classifier does not have the classes that a set needs.

    Args:
        args: of the script, with the classifier's `class_names`.
        model: the classifier.
        imagenet: its classes are ImageNet's.
        synsets: of ImageNet.
    """
    if not any(args.class_names):
        outputs = f"has {model.head.out_features} outputs, not the {len(synsets)} of ImageNet"
        raise UserError(f"{args.checkpoint} {outputs}, and does not name them: sets are matched by name")
    of_imagenet = [name for name, _ in args.data if name in OF_IMAGENET]
    if of_imagenet and not imagenet:
        other = some(sorted(set(args.class_names) ^ set(synsets)))
        raise UserError(
            f"{args.checkpoint} has other classes than ImageNet's synsets: {other}; --data {of_imagenet[0]} is a set "
            "of ImageNet: give a folder of your own another name"
        )


def sort_outputs(model: ARMClassifier, names: list[str], synsets: list[str]) -> None:
    """Sort the outputs of a classifier, `names`, as the synsets; its head is changed in place."""
    order = [names.index(synset) for synset in synsets]
    for parameter in model.head.parameters():
        parameter.copy_(parameter[order])


def left_out(name: str, path: Path, parts: dict[str, Part], outputs: int, imagenet: bool) -> list[str]:
    """Return lines that count what is not evaluated of a set: classes without images, other files and folders.

    `outputs` is the number of the classifier's classes. A set of one's own is classified among all of them.
    """
    if name == "real":
        (part,) = parts.values()
        return [f"{part.unlabelled} images without a ReaL label are left out"] * bool(part.unlabelled)
    classes, lines = 200 if name in ("imagenet-a", "imagenet-r") else outputs, []
    missing = [classes - len(set(part.source.labels.tolist())) for part in parts.values()]
    if any(missing):
        where = f" in {sum(map(bool, missing))} of {len(parts)} folders" if name == "c" else ""
        lines.append(f"up to {max(missing)} of its {classes} classes have no image{where}")
    if name == "c":
        used = {part.source.folder for part in parts.values()}
        kept = {str(Path(folder).parent) for folder in used}
        other = [p.name for p in path.iterdir() if str(p) not in kept]
        other += [f"{p.parent.name}/{p.name}" for folder in kept for p in Path(folder).iterdir() if str(p) not in used]
        if other:
            what = "are no part of mCE" if imagenet else "are no corruption or severity"
            lines.append(f"{len(other)} files or folders {what} and left out: {some(sorted(other))}")
    return lines


def cells(row: dict) -> list:
    """Return a row of results as cells of the table, for c without an interval: its images are copies of a few."""
    wrong = "".join(f", {row[kind]} of them {what}" for kind, what in UNANSWERED.items() if kind in row)
    top1 = with_interval(row) if "interval" in row else f"{row['acc1']:.2f} %"
    return [top1, f"{row['acc5']:.2f} %", f"{row['images']}{wrong}", f"{row['mce']:.1f} %" if "mce" in row else ""]


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
