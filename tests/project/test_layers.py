"""The structure of the project: imports run downwards, files and folders stay small enough to be read."""

import ast
import subprocess
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import REPOSITORY

# From the top to the bottom: folders and files, without suffixes. A file imports from its own floor or from those below
# it; files that are imported by name, as models_arm.OBJECTIVES and READERS of util/data/sources do, are not seen here.
FLOORS = """
    tests
    benchmarks demo studies hubconf arm_vision
    tools
    main_pretrain Finetuning Detection Segmentation
    Evaluation Segmentation/segmentation_data
    engine_pretrain pretrained ops/kernel_choice
    models_mae
    models_arm Detection/models_detect Segmentation/models_segment
    models_classifier models_pretrain objectives
    timm_models decoder mamba
    util/training
    util/tracking
    util/checkpoints
    util/arguments util/cli
    util/data
    util/seeding
    util/distributed
    ops
    util/lock util/hardware util/launch
    util/errors util/files util/package util/pos_embed util/lr_sched util/lr_decay
""".split("\n")[1:-1]
ROWS = 450  # of a file; kernels may be longer
FILES = 12  # of Python in a folder


def python_files() -> list[Path]:
    """Return the Python files of the repository, below its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()
    return [Path(name) for name in listed if (REPOSITORY / name).is_file() and name != "docs/draw_method.py"]


def floor_of(file: Path) -> int | None:
    """Return the number of a file's floor, 0 at the top; the longest entry that the file lies in counts."""
    entries = {entry: number for number, floor in enumerate(FLOORS) for entry in floor.split()}
    places = ["/".join(file.with_suffix("").parts[:count]) for count in range(len(file.parts), 0, -1)]
    return next((entries[place] for place in places if place in entries), None)


def imported(file: Path) -> set[Path]:
    """Return the files of the repository that a file imports when it runs, at its head or later."""
    found = set()
    tree = ast.parse((REPOSITORY / file).read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*file.parts[: -node.level], *filter(None, [node.module])]) if node.level else node.module
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            path = Path(*name.split("."))
            found |= {p for p in (path.with_suffix(".py"), path / "__init__.py") if (REPOSITORY / p).is_file()}
    return found - {file}


def test_imports_run_downwards():
    for file in python_files():
        assert floor_of(file) is not None, f"{file} is on none of the FLOORS"
        for other in imported(file):
            assert floor_of(other) >= floor_of(file), f"{file} imports {other}, which is above it"
            private = other.parts[0] in ("tests", "benchmarks", "demo")
            assert not private or file.parts[0] in ("tests", other.parts[0]), f"{file} imports {other}"


def test_imports_have_no_circle():
    """`TopologicalSorter` raises CycleError with the files of a circle."""
    list(TopologicalSorter({file: imported(file) for file in python_files()}).static_order())


def test_util_imports_neither_models_nor_ops():
    for file in python_files():
        if file.parts[0] == "util":
            assert {other.parts[0] for other in imported(file)} <= {"util"}, file


@pytest.mark.parametrize("file", python_files(), ids=str)
def test_files_are_short(file):
    rows = (REPOSITORY / file).read_bytes().count(b"\n")
    assert rows <= ROWS or file.parts[0] == "ops"


def test_folders_are_small():
    for folder, count in Counter(file.parent for file in python_files()).items():
        assert count <= FILES, f"{folder} has {count} files"


def test_file_names_are_unique():
    """But for those that Python and pytest look for, and the studies, whose files have their names."""
    files = [file for file in python_files() if file.parent != Path("studies/catalogue")]
    names = Counter(file.name for file in files if file.name not in ("__init__.py", "conftest.py"))
    assert not [name for name, count in names.items() if count > 1]
