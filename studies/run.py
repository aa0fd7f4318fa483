"""Run a study: every arm with every seed, by the training scripts, and report the results.

    python -m studies.run pretrain_vs_scratch

writes results.json, table.md and plot.png to out_studies/pretrain_vs_scratch-cpu/ (or -gpu, -imagenet). After any
interruption the same command resumes. Finished runs are not repeated, and studies share them.
"""

import argparse
import hashlib
import importlib.util
import itertools
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import main_pretrain
from Finetuning import main_finetune
from studies import fashion_mnist
from studies.budgets import BUDGETS
from studies.shards import write_subset
from studies.steps import SCRIPTS, Machine, Step, acquire, run_steps
from studies.study import SEEDS, Arm, Budget, Study, flags, load, names, only
from util import arguments, cli, hardware
from util.data.sources.readers import open_source
from util.errors import UserError, as_user_error
from util.files import json_with, output_file, save_figure, write_json, write_text
from util.launch import ROOT, commit

PARSERS = {"pretrain": main_pretrain.get_args_parser, "finetune": main_finetune.get_args_parser}


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser("studies.run", description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(names())}")
    text = "dataset, as for the training scripts (default: Fashion-MNIST)"
    parser.add_argument("--data_path", type=arguments.nonempty, help=text)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms of the study (default: all)")
    parser.add_argument("--seeds", type=arguments.seed_number, nargs="+", help="(default: 0 1 2)")
    text = "(default: cpu without a GPU; else imagenet for 1000 classes, or gpu)"
    parser.add_argument("--budget", choices=sorted(BUDGETS), help=text)
    parser.add_argument("--smoke", action="store_const", const="smoke", dest="budget", help="--budget smoke: tiny runs")
    parser.add_argument("--processes", type=arguments.few, help="of each run (default: 1; for imagenet all GPUs)")
    text = "runs at a time (default: one per core, or as many per GPU as the budget says)"
    parser.add_argument("--jobs", type=arguments.few, help=text)
    for kind in ("", "pretrain_", "finetune_"):
        text = f"more flags of {SCRIPTS.get(kind.removesuffix('_'), 'both scripts')}, for all arms"
        parser.add_argument(f"--{kind}flags", default="", metavar="'...'", help=text)
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

    def result(self, label_names: dict[str, str]) -> dict[str, Any]:
        """Return its entry in results.json."""
        pretrained, finetuned = self.pretrain and self.pretrain.result(), self.finetune.result()
        tested = {"accuracy": "test_acc1", "loss": "test_loss", "images": "test_images", "curve": "curve"}
        return {
            "arm": self.arm,
            "labels": label_names[self.labels],
            "seed": self.seed,
            "setting": {"pretrain": self.setting.pretrain, "finetune": self.setting.finetune},
            **{name: finetuned.pop(key) for name, key in tested.items()},
            "pretrain": pretrained,
            "finetune": finetuned,
        }


@dataclass(frozen=True)
class Data:
    """Datasets as the scripts take them: with all labels, and by seed with few, if the study asks for them."""

    everything: str
    few: dict[int, str]
    classes: int


def plan(study: Study, budget: Budget, seeds: list[int], data: Data, runs: Path, more: dict[str, str]) -> list[ArmRun]:
    """Return all runs of a study; `runs` is the folder of all runs of all studies.

    `more` holds the command line's flags by script, and by "" for both; an arm's own flags replace them.
    """
    found = []
    for labels, (arm, setting), seed in itertools.product(study.labels or budget.labels, study.arms.items(), seeds):
        pretrain = None
        if setting.pretrain is not None:
            words = [budget.common, budget.pretrain, more[""], more["pretrain"], setting.pretrain]
            pretrain = Step("pretrain", seed, flags(*words) | {"--data_path": [data.everything]}, runs)
        of_labels, images = (budget.few, data.few[seed]) if labels == "few" else (budget.all, data.everything)
        words = [budget.common, budget.finetune, of_labels, more[""], more["finetune"], setting.finetune]
        given = {"--data_path": [images], "--nb_classes": [str(data.classes)]}
        finetune = Step("finetune", seed, flags(*words) | given, runs, pretrain)
        found.append(ArmRun(arm, setting, labels, seed, pretrain, finetune))
    return found


def parse(step: Step, machine: Machine) -> argparse.Namespace:
    """Return the arguments of a run, as its script parses them.

    Raises:
        UserError: the script would refuse them.
    """
    parser = PARSERS[step.kind]()
    parser.allow_abbrev = False  # a flag must have one spelling, as runs are named by their flags
    args = parser.parse_args(shlex.split(step.arguments(machine)))
    if args.batch_size * machine.processes != step.batch_size:
        raise UserError(f"--processes {machine.processes} cannot share out a batch of {step.batch_size}")
    arguments.check_arguments(args, machine.processes)
    return args


def check(steps: list[Step], machine: Machine) -> None:
    """Parse all arguments and build all models, to find mistakes before any run starts.

    Raises:
        UserError: a flag is unknown, or sizes do not fit together.
    """
    for step in steps:
        args = parse(step, machine)
        args.resume = None  # there is no checkpoint yet
        if step.kind == "pretrain":
            main_pretrain.build_model(args)
        else:
            main_finetune.build_classifier(args, None)


def steps_of(runs: list[ArmRun]) -> list[Step]:
    """Return the steps of runs without duplicates, pretraining first."""
    steps = {step.name: step for run in runs for step in (run.pretrain, run.finetune) if step is not None}
    return sorted(steps.values(), key=lambda step: step.kind != "pretrain")


def find_budget(data_path: str | None) -> str:
    """Return the default budget for this machine and a dataset; None is Fashion-MNIST.

    Raises:
        UserError: there is no such dataset.
    """
    if not torch.cuda.is_available():
        return "cpu"
    return "imagenet" if data_path and len(open_source(data_path, "train").classes) == 1000 else "gpu"


def find_machine(args: argparse.Namespace, budget: Budget) -> Machine:
    """Return how runs share this machine.

    Raises:
        UserError: `--processes` is larger than the number of GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    gpus = gpus if torch.cuda.is_available() else []
    processes = args.processes or (max(1, len(gpus)) if budget.one_run else 1)
    if gpus and processes > len(gpus):
        raise UserError(f"--processes {processes}: there are {len(gpus)} GPUs")
    jobs = len(gpus) // processes * budget.runs_per_gpu if gpus else hardware.available_cores() // processes
    return Machine(processes, args.jobs or max(1, jobs), tuple(gpus))


def find_data(data_path: str, folder: Path, budget: Budget, labels: tuple[str, ...], seeds: list[int]) -> Data:
    """Return the datasets of a budget's runs; write those that are subsets below a folder, unless they are there.

    If "few" is among the labels, there is a subset with few labels for each seed.

    Raises:
        UserError: there is no such dataset, or a class has too few images.
    """
    digest = hashlib.sha256(os.fsencode(data_path.replace(f"{folder.parent}/", ""))).hexdigest()[:6]
    name = f"{Path(data_path.partition(':')[2] or data_path).name}-{digest}"
    if (count := budget.images_per_class) is not None:
        name = f"{name}-{count}"
        write_subset(data_path, data_path, folder / name, count, 0, val_per_class=count)
        data_path = f"wds:{folder}/{name}"
    few, val = {}, data_path
    for seed in seeds if "few" in labels else ():
        path = f"{folder}/{name}-few{budget.per_class}x{budget.repeats}-seed{seed}"
        write_subset(data_path, val, Path(path), budget.per_class, seed, budget.repeats)
        few[seed] = val = f"wds:{path}"
    return Data(data_path, few, len(open_source(data_path, "train").classes))


def main(args: argparse.Namespace) -> None:
    """Run a study and write its results.

    Raises:
        UserError: a mistake in the command line; no run has started.
        RunError: a run failed.
        Interrupted: the study was asked to stop; the same command resumes.
    """
    if importlib.util.find_spec("scipy") is None:
        raise UserError("studies need scipy: pip install scipy")
    study = load(args.name)
    more = {"": args.flags, "pretrain": args.pretrain_flags, "finetune": args.finetune_flags}
    arguments.check_utf8("--output", args.output)
    output = Path(os.path.realpath(args.output))  # Path.resolve fails on links that form a circle
    if ROOT in output.parents:
        output = Path(os.path.relpath(args.output, ROOT))
    name = args.budget or find_budget(args.data_path)
    budget, study = BUDGETS[name], only(study, name, args.arms)
    seeds = list(dict.fromkeys(args.seeds or (SEEDS[:1] if name == "smoke" else SEEDS)))
    machine = find_machine(args, budget)
    # find mistakes before a dataset is downloaded or unpacked; its path and classes do not matter here
    check(steps_of(plan(study, budget, seeds, Data("data", dict.fromkeys(seeds, "data"), 10), output, more)), machine)
    data_path = args.data_path or f"wds:{output}/data/fashion_mnist"
    with acquire(output / "data" / "making.lock"):  # another runner waits, and then finds the datasets
        if args.data_path is None:
            fashion_mnist.unpack(output / "data" / "fashion_mnist")
        data = find_data(data_path, output / "data", budget, study.labels or budget.labels, seeds)
    images = len(open_source(data_path, "train").labels)
    runs = plan(study, budget, seeds, data, output / "runs", more)
    folder = ROOT / output / f"{args.name}-{name}"
    result = output_file(folder / "results.json", json_with(study=str, budget=str, summary=list, runs=list))
    for file in ("table.md", "plot.png"):
        output_file(folder / file, lambda _: result.is_file())  # they belong to the results beside them
    print(study.question, flush=True)
    run_steps(steps_of(runs), machine, commit())

    labels = len(open_source(data.everything, "train").labels)
    label_names = {"few": f"{budget.per_class * data.classes:,} labels", "all": f"all {labels:,} labels"}

    from studies import report  # imports matplotlib

    found = [run.result(label_names) for run in runs]
    results = {
        "study": args.name,
        "question": study.question,
        "budget": name,
        "command": shlex.join(["python", "-m", "studies.run", *sys.argv[1:]]),
        "commit": commit(),
        "machines": report.machines(found, machine.describe()),
        "data": {"data_path": data_path, "classes": data.classes, "images": images},
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
