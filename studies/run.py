"""Run a study: every arm with every seed, through the training scripts, and say what it found.

    python -m studies.run pretrain_vs_scratch

writes results.json, table.md and plot.png to out_studies/pretrain_vs_scratch-cpu/ (or -gpu, -imagenet). The same
command goes on after any end; what is finished is not repeated, also where another study asks for it.
"""

import argparse
import hashlib
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import main_pretrain
from Finetuning import main_finetune
from studies import fashion_mnist, report
from studies.budgets import BUDGETS
from studies.shards import alone, write_subset
from studies.steps import SCRIPTS, Machine, Step, run_steps
from studies.study import SEEDS, Arm, Budget, Study, flags, load, names, only
from util import arguments, cli
from util.data.readers import open_source
from util.errors import UserError, as_user_error
from util.files import json_with, output_file, save_figure, write_json, write_text
from util.launch import ROOT

PARSERS = {"pretrain": main_pretrain.get_args_parser, "finetune": main_finetune.get_args_parser}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser("studies.run", description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(names())}")
    parser.add_argument(
        "--data_path", type=arguments.nonempty, help="images, as the scripts take them (default: Fashion-MNIST)"
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these of the study, by name (default: all)")
    parser.add_argument("--seeds", type=arguments.seed_number, nargs="+", help="(default: 0 1 2)")
    parser.add_argument(
        "--budget", choices=sorted(BUDGETS), help="(default: cpu without a GPU; else imagenet for 1000 classes, or gpu)"
    )
    parser.add_argument("--smoke", action="store_const", const="smoke", dest="budget", help="--budget smoke: tiny")
    parser.add_argument(
        "--processes", type=arguments.few, help="of each run (default: 1; for ImageNet the number of GPUs)"
    )
    parser.add_argument(
        "--jobs",
        type=arguments.few,
        help="runs side by side (default: one a core, or what the budget puts on each GPU)",
    )
    for kind in ("", "pretrain_", "finetune_"):
        scripts = SCRIPTS.get(kind.removesuffix("_"), "both scripts")
        parser.add_argument(
            f"--{kind}flags", default="", metavar="'...'", help=f"more flags of {scripts}, for all arms"
        )
    parser.add_argument("--output", type=Path, default=Path("out_studies"), help="folder (default: %(default)s)")
    return parser


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed: finetuning, and the pretraining before it, if any."""

    arm: str
    setting: Arm
    labels: str
    seed: int
    pretrain: Step | None
    finetune: Step

    def result(self, in_words: dict[str, str]) -> dict:
        """What results.json holds of it."""
        pretrained, finetuned = self.pretrain and self.pretrain.result(), self.finetune.result()
        accuracy, loss, images = (finetuned.pop(f"test_{name}") for name in ("acc1", "loss", "images"))
        return {
            "arm": self.arm,
            "labels": in_words[self.labels],
            "seed": self.seed,
            "setting": {"pretrain": self.setting.pretrain, "finetune": self.setting.finetune},
            "accuracy": accuracy,
            "loss": loss,
            "images": images,
            "curve": finetuned.pop("curve"),
            "pretrain": pretrained,
            "finetune": finetuned,
        }


@dataclass(frozen=True)
class Data:
    """What runs train on, as the scripts take it: everything, and few labels by seed, where a study asks for them."""

    everything: str
    few: dict[int, str]
    classes: int


def plan(study: Study, budget: Budget, seeds: list[int], data: Data, runs: Path, more: dict[str, str]) -> list[ArmRun]:
    """All runs of a study.

    Args:
        study: what to run.
        budget: what all runs share.
        seeds: of each arm.
        data: what they train on.
        runs: folder of all runs, of all studies.
        more: flags of the command line by script, and by "" for both; where an arm says otherwise, that counts.
    """
    found = []
    for labels, (arm, setting), seed in itertools.product(study.labels or budget.labels, study.arms.items(), seeds):
        pretrain = None
        if setting.pretrain is not None:
            words = budget.common, budget.pretrain, more[""], more["pretrain"], setting.pretrain
            pretrain = Step("pretrain", seed, flags(*words) | {"--data_path": [data.everything]}, runs)
        of_labels, images = (budget.few, data.few[seed]) if labels == "few" else (budget.all, data.everything)
        words = budget.common, budget.finetune, of_labels, more[""], more["finetune"], setting.finetune
        given = {"--data_path": [images], "--nb_classes": [str(data.classes)]}
        found.append(
            ArmRun(arm, setting, labels, seed, pretrain, Step("finetune", seed, flags(*words) | given, runs, pretrain))
        )
    return found


def parse(step: Step, machine: Machine) -> argparse.Namespace:
    """The arguments of a run as its script will see them.

    Raises:
        UserError: the script would refuse them.
    """
    parser = PARSERS[step.kind]()
    parser.allow_abbrev = False  # a step knows its flags by their whole names
    args = parser.parse_args(shlex.split(step.arguments(machine)))
    if args.batch_size * machine.processes != step.batch_size:
        raise UserError(f"--processes {machine.processes} cannot share out a batch of {step.batch_size}")
    with _world_size(machine.processes):
        arguments.check_arguments(args)
    return args


@contextmanager
def _world_size(processes: int) -> Iterator[None]:
    """Let checks see as many processes as torchrun will start."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        os.environ.update({} if before is None else {"WORLD_SIZE": before})


def check(steps: list[Step], machine: Machine) -> None:
    """Refuse what the scripts would refuse, before any of them runs.

    Raises:
        UserError: flags that there are not, or sizes that do not fit together.
    """
    for step in steps:
        args = parse(step, machine)
        args.resume = None  # there is no checkpoint yet to take sizes from
        if step.kind == "pretrain":
            main_pretrain.build_model(args)
        else:
            main_finetune.build_classifier(args, None)


def steps_of(runs: list[ArmRun]) -> list[Step]:
    """Return the steps of runs, each once, pretraining first."""
    steps = {step.name: step for run in runs for step in (run.pretrain, run.finetune) if step is not None}
    return sorted(steps.values(), key=lambda step: step.kind != "pretrain")


def find_budget(data_path: str | None) -> str:
    """Return the budget for this machine and data, where the command line names none; None is Fashion-MNIST.

    Raises:
        UserError: the data are not there.
    """
    if not torch.cuda.is_available():
        return "cpu"
    return "imagenet" if data_path and len(open_source(data_path, "train").classes) == 1000 else "gpu"


def find_machine(args: argparse.Namespace, budget: Budget) -> Machine:
    """How runs are started here.

    Raises:
        UserError: more processes are asked for than there are GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    gpus = gpus if torch.cuda.is_available() else []
    processes = args.processes or (max(1, len(gpus)) if budget.one_run else 1)
    if gpus and processes > len(gpus):
        raise UserError(f"--processes {processes}: there are {len(gpus)} GPUs")
    room = len(gpus) // processes * budget.runs_per_gpu if gpus else len(os.sched_getaffinity(0)) // processes
    return Machine(processes, args.jobs or max(1, room), tuple(gpus))


def find_data(data_path: str, folder: Path, budget: Budget, labels: tuple[str, ...], seeds: list[int]) -> Data:
    """What the runs of a budget train on; subsets are written once, to a folder: of few labels if `labels` has them.

    Raises:
        UserError: the data are not there, or a class has fewer images than the budget asks for.
    """
    digest = hashlib.sha256(os.fsencode(data_path.replace(f"{folder.parent}/", ""))).hexdigest()[:6]
    name = f"{Path(data_path.partition(':')[2] or data_path).name}-{digest}"
    if budget.images_per_class is not None:
        count = budget.images_per_class
        write_subset(data_path, data_path, folder / f"{name}-{count}", count, 0, val_per_class=count)
        name, data_path = f"{name}-{count}", f"wds:{folder}/{name}-{count}"
    seeds = seeds if "few" in labels else []
    few = {seed: f"{folder}/{name}-few{budget.per_class}x{budget.repeats}-seed{seed}" for seed in seeds}
    val = data_path
    for seed, path in few.items():
        write_subset(data_path, val, Path(path), budget.per_class, seed, budget.repeats)
        val = f"wds:{path}"
    classes = len(open_source(data_path, "train").classes)
    return Data(data_path, {seed: f"wds:{path}" for seed, path in few.items()}, classes)


def commit() -> str | None:
    """The commit of this repository, with "-dirty" where files differ from it; None where git does not tell."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--match="]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(args: argparse.Namespace) -> None:
    """Run a study and write what it found.

    Raises:
        UserError: something that was asked for cannot be; no run has started then.
        RunError: a run failed.
        Interrupted: asked to stop; the same command goes on.
    """
    study = load(args.name)
    more = {"": args.flags, "pretrain": args.pretrain_flags, "finetune": args.finetune_flags}
    arguments.check_utf8("--output", args.output)
    output = Path(os.path.realpath(args.output))  # also of links in a circle, which Path.resolve refuses
    if ROOT in output.parents:
        output = Path(os.path.relpath(args.output, ROOT))
    name = args.budget or find_budget(args.data_path)
    budget, study = BUDGETS[name], only(study, name, args.arms)
    seeds = list(dict.fromkeys(args.seeds or (SEEDS[:1] if name == "smoke" else SEEDS)))
    machine = find_machine(args, budget)
    # mistakes are found before data are downloaded or unpacked: paths and classes do not matter to them
    check(steps_of(plan(study, budget, seeds, Data("data", dict.fromkeys(seeds, "data"), 10), output, more)), machine)
    data_path = args.data_path
    with alone(output / "data"):
        if data_path is None:
            fashion_mnist.unpack(output / "data" / "fashion_mnist")
            data_path = f"wds:{output}/data/fashion_mnist"
        data = find_data(data_path, output / "data", budget, study.labels or budget.labels, seeds)
    train = open_source(data_path, "train")
    runs = plan(study, budget, seeds, data, output / "runs", more)
    steps = steps_of(runs)
    folder = ROOT / output / f"{args.name}-{name}"
    result = output_file(folder / "results.json", json_with(study=str, budget=str, summary=list, runs=list))
    for name in ("table.md", "plot.png"):
        output_file(folder / name, lambda _: result.is_file())  # they are of the results beside them
    print(study.question, flush=True)
    run_steps(steps, machine, commit())

    few = budget.per_class * data.classes
    in_words = {"few": f"{few:,} labels", "all": f"all {len(open_source(data.everything, 'train').labels):,} labels"}
    found = [run.result(in_words) for run in runs]
    results = {
        "study": args.name,
        "question": study.question,
        "budget": name,
        "command": shlex.join(["python", "-m", "studies.run", *sys.argv[1:]]),
        "commit": commit(),
        "machines": report.machines(found, machine.describe()),
        "data": {"data_path": data_path, "classes": data.classes, "images": len(train.labels)},
        "summary": report.summary(found),
        "runs": found,
    }
    write_json(result, results)
    text = report.markdown(results)
    with as_user_error(OSError):
        write_text(folder / "table.md", text)
        save_figure(report.draw(found), folder / "plot.png", "ARM study", dpi=150)
    print(f"\n{text}\nresults.json, table.md and plot.png are in {output}/{args.name}-{name}")


if __name__ == "__main__":
    cli.run_main(main, get_args_parser())
