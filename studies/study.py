"""What a study is: arms that differ in flags of the scripts, and a budget that all of them share."""

import importlib
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from util.errors import UserError, as_user_error

Flags = dict[str, list[str]]
CATALOGUE = Path(__file__).parent / "catalogue"
SEEDS = (0, 1, 2)  # of pretraining, finetuning and the drawing of few labels


@dataclass(frozen=True)
class Budget:
    """What all runs of a study share, and so its size. Flags are those of the scripts.

    Attributes:
        common: flags of both scripts. `--batch_size` is that of an update, whatever the number of processes.
        pretrain: flags of pretraining.
        finetune: flags of finetuning.
        labels: which training labels studies finetune with, where they do not say: any of `few` and `all`.
        few, all: flags of finetuning on few labels, and on all.
        per_class: few labels are so many images of each class, drawn with the run's seed.
        repeats: how often an epoch has each of these images.
        runs_per_gpu: runs that share a GPU, where each is one process.
        one_run: whether a run takes all GPUs.
        images_per_class: of each class only so many are used, for training and for val/; None uses all.
    """

    common: str
    pretrain: str
    finetune: str
    few: str
    all: str
    labels: tuple[str, ...] = ("few",)
    per_class: int = 100
    repeats: int = 10
    runs_per_gpu: int = 1
    one_run: bool = False
    images_per_class: int | None = None


@dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
        pretrain: flags added to those of the budget; None finetunes random weights.
        finetune: flags added to those of the budget.
        budgets: the budgets that have this arm; None is all.
    """

    pretrain: str | None = ""
    finetune: str = ""
    budgets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Study:
    """A question, and the arms that answer it.

    Attributes:
        question: in a sentence.
        arms: by name; the first one is what the others are compared with.
        labels: see `Budget.labels`; None takes the budget's.
    """

    question: str
    arms: dict[str, Arm]
    labels: tuple[str, ...] | None = None


def names() -> list[str]:
    """The studies that there are: the files in studies/catalogue/."""
    return sorted(path.stem for path in CATALOGUE.glob("[!_]*.py"))


def load(name: str) -> Study:
    """The study of this name.

    Raises:
        UserError: there is none.
    """
    if name not in names():
        raise UserError(f"unknown study {name!r}; choose from {', '.join(names())}")
    return importlib.import_module(f"studies.catalogue.{name}").STUDY


def only(study: Study, budget: str, arms: list[str] | None = None) -> Study:
    """A study with those of its arms that a budget has, or with some of these, in its own order.

    Raises:
        UserError: there is no such arm.
    """
    found = {name: arm for name, arm in study.arms.items() if arm.budgets is None or budget in arm.budgets}
    for arm in arms or ():
        if arm not in found:
            raise UserError(f"budget {budget} has no arm {arm!r}; choose from {', '.join(map(repr, found))}")
    return replace(study, arms={name: arm for name, arm in found.items() if arms is None or name in arms})


def flags(*texts: str) -> Flags:
    """Flags with their values, by name; of one that is given twice the last values count.

    Raises:
        UserError: the text does not begin with a flag, or a quotation in it does not end.
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


def in_words(found: Flags) -> str:
    """The text of flags, for a command."""
    return shlex.join(word for name, values in found.items() for word in (name, *values))
