"""Every figure on the pages is computed from a committed file: `figures.md` quotes the pages and says how."""

import json
import math
import re
import statistics
from pathlib import Path
from pkgutil import resolve_name as code
from typing import NamedTuple

import pytest
import torch
from helpers import REPOSITORY

import models_arm
from studies import report

SOURCES = Path(__file__).with_name("figures.md")
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text()
    for folder in (".", "docs")
    for path in sorted((REPOSITORY / folder).glob("*.md"))
}
PAGES |= {f"recipes/{path.name}": path.read_text().partition("\nset ")[0] for path in REPOSITORY.glob("recipes/*.sh")}


# ---- what counts as a figure

NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
UNIT = (
    "%|points?|times|passed|digits|million|M|ns|µs|ms|s|seconds?|min|minutes?|h|hours?|days?|bytes?|[kMG]B|GHz|images/s|"
    "(?:kernel )?launches|kernels|operators|instructions|registers"
)
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
WORD = "|".join(WORDS[2:])
FIGURE = re.compile(
    rf"(?<![\w.,])(?:{NUMBER}(?:(?:,| and| or| to| against| ±| \+) {NUMBER})*(?:-|\s+(?:# )?)(?:{UNIT})(?![\w/-])|"
    rf"{NUMBER}(?!\w))|"
    rf"(?i:\b(?:{WORD})) (?:seconds|minutes|hours|days)\b"
)
CELL = re.compile(rf"(?<=\| )[+-]?\d(?:[\d\s.,+±()–-]|to|{UNIT})*(?= \|)")  # of a table, with numbers and units alone
NO_FIGURE = re.compile(
    r"^```.*?^```$|`[^`]*`"  # code
    r"|\]\([^)]*\)|https?://\S+"  # links
    r"|\d{4}-\d\d-\d\d"  # dates
    r"|(?:Apache|GPL|CC [A-Z-]+)[- ]\d\.\d"  # licences
    r"|95 %(?=\s+(?:Wilson\s+)?interval|\))"
    r"|(?:torch|Triton|Python|NVRTC|timm|mamba-ssm|before|needs|release|capabilit(?:y|ies)) \d+\.[\d.]*\d"  # versions
    r"(?:(?:,| and| or| to) \d+\.[\d.]*\d)*",
    re.MULTILINE | re.DOTALL,
)


def figures(text: str) -> list[re.Match]:
    """Numbers with a unit, numbers with decimals, and all numbers of a table's cell if it has nothing else."""
    text = NO_FIGURE.sub(lambda found: re.sub(r"[^\n]", "~", found[0]), text)
    cells = [cell.span() for cell in CELL.finditer(text)]
    whole = re.compile(r"\d+(?:,\d{3})*")
    return [
        found
        for found in FIGURE.finditer(text)
        if not whole.fullmatch(found[0]) or any(start <= found.start() < end for start, end in cells)
    ]


def test_what_counts_as_a_figure():
    text = """In 0.3
s on torch 2.14.1, 17 images at `0.5` and [8 %](a.md#5-s), 95 % interval, of 3 rows, ten minutes.
| 4 + 1,005 | 1 or 4 directions | +5.5 | 2 cores |"""
    assert [found[0] for found in figures(text)] == ["0.3\ns", "8 %", "ten minutes", "4", "1,005", "5.5"]


# ---- what the expressions of figures.md use


class Entries(dict):
    """An object of a JSON file; `data.a` is `data["a"]`."""

    __getattr__ = dict.__getitem__


class Text(str):
    """Any other file."""

    def found(self, pattern: str) -> str:
        """The group of a pattern, which has one value in the file."""
        (value,) = set(re.findall(pattern, self, re.MULTILINE))
        return value

    def number(self, pattern: str) -> float:
        """The same as a number."""
        return float(self.found(pattern))


def file(path: str) -> Entries | Text:
    """A file of the repository."""
    text = (REPOSITORY / path).read_text()
    return json.loads(text, object_hook=Entries) if path.endswith(".json") else Text(text)


def default(script: str, flag: str) -> float:
    """The default of a script's flag."""
    return code(f"{script}:get_args_parser")().get_default(flag)


def published(value: float, source: str) -> float:
    """A figure that others have published."""
    assert source
    return value


def written(value: float | str, form: str) -> str:
    """Format a number; halves are rounded up, as people do."""
    return format(value * (1 + 1e-9) if form and isinstance(value, float) else value, form)


def listed(values: list[float], form: str = ".1f") -> str:
    """Write "1.0, 2.0 and 3.0"."""
    *first, last = (written(value, form) for value in values)
    return f"{', '.join(first)} and {last}"


def word(value: float) -> str:
    """Write "ten"."""
    return WORDS[round(value)]


def millions(model: str, create: str) -> float:
    """The parameters of a model."""
    with torch.device("meta"):
        made = getattr(models_arm, create)(model)
    return sum(parameter.numel() for parameter in made.parameters()) / 1e6


def table(study: str) -> str:
    """The table of a study's results."""
    return report.markdown(file(f"studies/results/{study}/results.json")).partition("\n\n")[0]


def accuracies(study: str, arm: str, labels: str = "1,000 labels") -> list[float]:
    """The accuracies of a study's arm, by seed."""
    return [run["accuracy"] for run in report.groups(file(f"studies/results/{study}/results.json").runs)[labels][arm]]


def gains(study: str, arm: str, other: str, labels: str = "1,000 labels") -> list[float]:
    """The differences of two arms, by seed."""
    pairs = zip(accuracies(study, arm, labels), accuracies(study, other, labels), strict=True)
    return [a - b for a, b in pairs]


def compared(study: str, arm: str, other: str, labels: str = "1,000 labels") -> Entries:
    """Mean `difference`, `std`, `interval` and `effect` of two arms."""
    return Entries(report.compare(accuracies(study, arm, labels), accuracies(study, other, labels)))


def minutes(study: str) -> float:
    """How long the runs of a study took, one after the other."""
    runs = file(f"studies/results/{study}/results.json").runs
    return sum({step.run: step.seconds for run in runs for step in (run.pretrain, run.finetune) if step}.values()) / 60


# ---- the pages

FIELD = re.compile(r"\{([^{}]+?)(?::([+,]*\.?\d*[dfg]))?\}")


class Quotation(NamedTuple):
    """An item of figures.md."""

    line: int
    page: str
    text: str


def quotations() -> list[Quotation]:
    """The items of figures.md, each with the heading above it."""
    found, page = [], ""
    for number, line in enumerate(SOURCES.read_text().splitlines(), 1):
        if line.startswith("## "):
            page = line[3:]
        elif line.startswith("- "):
            found.append(Quotation(number, page, line[2:]))
        elif line.startswith("  "):
            found[-1] = found[-1]._replace(text=f"{found[-1].text} {line.strip()}")
    return found


@pytest.fixture(scope="module")
def names() -> dict:
    """Everything that an expression may use: this module, and the names that figures.md begins with."""
    known = {**globals(), "math": math, "mean": statistics.mean, "stdev": statistics.stdev}
    for item in quotations():
        if item.page == "Names":
            name, _, expression = item.text.partition(" = ")
            assert re.search("[a-z]", expression), f"no source: {item.text}"
            known[name] = eval(expression, known)
    return known


def of_words(text: str) -> str:
    """A pattern that finds a text although its lines break elsewhere."""
    return r"\s+(?:# )?".join(map(re.escape, re.split(r"\s+", text)))


def spans(item: Quotation, names: dict) -> list[tuple[int, int]]:
    """Where the figures of a quotation stand on its page; raises ValueError if the page says something else."""
    fields = FIELD.findall(item.text)
    assert all(re.search("[a-z]", expression) for expression, _ in fields), f"no source: {item.text}"
    values = [written(eval(expression, names), form) for expression, form in fields]
    literals = [of_words(text) for text in FIELD.sub("\0", item.text).split("\0")]
    exact = [rf"(?<![\d.])({re.escape(value)})(?!\d|[.,]\d)" for value in values]
    pattern = "".join(a + b for a, b in zip(literals, [*exact, ""], strict=True))
    matches = re.finditer(pattern, PAGES[item.page], re.IGNORECASE)
    found = [match.span(n) for match in matches for n in range(1, len(values) + 1)]
    if not found:
        near = re.search(r"(\S[^\n]{0,100}?)".join(literals) + r"(?=\W|$)", PAGES[item.page])
        said = f"says {'; '.join(near.groups())}" if near and any(literals) else "has no such words"
        given = "; ".join(values)
        raise ValueError(f"figures.md:{item.line}: its files give {given}, but the page {said}: {item.text}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_figures(page, names):
    """Those that figures.md quotes are on the page, and the page has no other ones."""
    problems, traced, lines = [], [], {}
    for item in quotations():
        if item.page == page:
            try:
                traced += spans(item, names)
            except ValueError as error:
                problems.append(f"{page}: {error}")
    for found in figures(PAGES[page]):
        numbers = [found.start() + number.start() for number in re.finditer(rf"{NUMBER}|^[a-zA-Z]+", found[0])]
        if not all(any(start <= number < end for start, end in traced) for number in numbers):
            lines.setdefault(PAGES[page].count("\n", 0, found.start()) + 1, []).append(" ".join(found[0].split()))
    for line, untraced in lines.items():
        problems.append(f"{page}:{line}: {', '.join(untraced)}: say in tests/project/figures.md which file it is from")
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_figures_md_quotes_pages_that_exist():
    assert {item.page for item in quotations()} - {"Names", *PAGES} == set()
