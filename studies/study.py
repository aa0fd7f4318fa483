"""The parts of a study: arms that differ in flags of the scripts, and a budget that all arms share."""

import importlib
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from util.errors import UserError, as_user_error

Flags = dict[str, list[str]]
CATALOGUE = Path(__file__).parent / "catalogue"
SEEDS = (0, 1, 2)  # of pretraining, finetuning and the choice of few labels


@dataclass(frozen=True)
class Budget:
    """The size of a study: flags of the scripts and datasets that all its runs share."""

    common: str  # flags of both scripts; `--batch_size` is the effective one, for any number of processes
    pretrain: str  # flags of pretraining
    finetune: str  # flags of finetuning
    few: str  # flags of finetuning on few labels
    all: str  # flags of finetuning on all labels
    labels: tuple[str, ...] = ("few",)  # that studies finetune on by default: any of "few" and "all"
    per_class: int = 100  # images of each class in a dataset with few labels, drawn with the run's seed
    repeats: int = 10  # how often an epoch has each of these images
    runs_per_gpu: int = 1  # runs that share a GPU; each of them is one process
    one_run: bool = False  # whether a run takes all GPUs
    images_per_class: int | None = None  # that train/ and val/ are limited to; None uses all


@dataclass(frozen=True)
class Arm:
    """A setting of the method: flags beside the budget's."""

    pretrain: str | None = ""  # None finetunes from random weights
    finetune: str = ""
    budgets: tuple[str, ...] | None = None  # that have this arm; None means all


@dataclass(frozen=True)
class Study:
    """A question, and the arms that answer it."""

    question: str  # one sentence
    arms: dict[str, Arm]  # by name; the others are compared with the first
    labels: tuple[str, ...] | None = None  # see `Budget.labels`, which None takes


def names() -> list[str]:
    """Return the names of all studies: the files in studies/catalogue/."""
    return sorted(path.stem for path in CATALOGUE.glob("[!_]*.py"))


def load(name: str) -> Study:
    """Return the study of a name.

    Raises:
        UserError: there is no such study.
    """
    if name not in names():
        raise UserError(f"unknown study {name!r}; choose from {', '.join(names())}")
    return importlib.import_module(f"studies.catalogue.{name}").STUDY


def only(study: Study, budget: str, arms: list[str] | None = None) -> Study:
    """Return a study with the arms that a budget has, or with those of them that `arms` names.

    Raises:
        UserError: there is no such arm.
    """
    found = {name: arm for name, arm in study.arms.items() if arm.budgets is None or budget in arm.budgets}
    for arm in arms or ():
        if arm not in found:
            raise UserError(f"budget {budget} has no arm {arm!r}; choose from {', '.join(map(repr, found))}")
    return replace(study, arms={name: arm for name, arm in found.items() if arms is None or name in arms})


def flags(*texts: str) -> Flags:
    """Return the values of flags by name; of a flag that stands twice, the last values count.

    Raises:
        UserError: a text does not begin with a flag, or a quotation in it does not end.
    """
    found: Flags = {}
    for text in texts:
        values = None
        with as_user_error(ValueError, prefix=f"{text}: "):
            words = shlex.split(text)
        for word in words:
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                found[name] = values = [value] if equals else []
            elif values is None:
                raise UserError(f"{word}: flags begin with --")
            else:
                values.append(word)
    return found


def command_text(found: Flags) -> str:
    """Return flags as text for a command."""
    return shlex.join(word for name, values in found.items() for word in (name, *values))
