"""This repository as a package in a program that has a module `util` of its own: by torch.hub and by pip."""

import argparse
import ast
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import REPOSITORY

import models_arm
import ops
import pretrained
from util import launch, package

SIZES = {"embed_dim": 32, "depth": 1, "patch_size": 8}
# A program with a module `util` of its own gets models by torch.hub or from the installed package.
PROGRAM = """
import runpy
import sys
import torch
import util
assert util.MINE

place, finetuned, pretraining, picture, output = sys.argv[1:]
if place:
    torch.hub._get_cache_or_reload = lambda *_, **__: place  # instead of a download
    found = {"names": torch.hub.list("owner/name"), "help": torch.hub.help("owner/name", "arm_base_pz16")}
    create = lambda **sizes: torch.hub.load(place, "arm_tiny_pz16", source="local", **sizes)
    load = lambda *args, **how: torch.hub.load(place, "arm", *args, source="local", **how)
    package = "arm_vision_"
else:
    from arm_vision import hubconf, pretrained
    create, load, found, package = hubconf.arm_tiny_pz16, pretrained.load, {}, "arm_vision"
    sys.argv[1:] = ["--help"]
    try:
        runpy.run_module("arm_vision.tools.export", run_name="__main__")
    except SystemExit as end:
        assert not end.code
torch.manual_seed(0)
found["tiny"] = create(num_classes=2, depth=1, img_size=32).state_dict()
model, checkpoint = load(finetuned)
found |= {"classes": checkpoint.class_names, "image": checkpoint.read_image(picture)}
encoder, _ = load(pretraining, encoder=True)
with torch.no_grad():
    found |= {"logits": model(found["image"][None]), "tokens": encoder.forward_features(torch.ones(1, 3, 64, 64))}
assert sys.modules["util"] is util
files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
assert {"Detection", "models_arm", "ops", "tools", "util.files"}.isdisjoint(files)
found["own"] = {file for name, file in files.items() if name.startswith(package)}
found["packages"] = {name.partition(".")[0] for name in files}
torch.save(found, output)
"""


@pytest.fixture
def results(tmp_path, photographs):
    """Run PROGRAM and return what it found, after a comparison with what this process computes."""
    torch.manual_seed(0)
    model = models_arm.create_classifier("arm_tiny_pz16", **SIZES, img_size=(48, 32), num_classes=3).eval()
    known = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2], "class_names": ["cat", "dog", "emu"]}
    arguments = argparse.Namespace(**known, input_size=(48, 32), global_pool=True)
    torch.save({"model": model.state_dict(), "args": arguments}, tmp_path / "a.pth")
    sizes = SIZES | {"img_size": 64, "dec_embed_dim": 64, "dec_depth": 1}
    masked = models_arm.create_pretrain_model("arm_tiny_pz16", "mae", **sizes).eval()
    torch.save({"model": masked.state_dict()}, tmp_path / "b.pth")
    photographs[0].save(tmp_path / "picture.png")
    (tmp_path / "program").mkdir()
    (tmp_path / "program/util.py").write_text("MINE = True")
    (tmp_path / "program/program.py").write_text(PROGRAM)

    def run(repository="", **environment):
        environment |= {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        words = [tmp_path / "program/program.py", repository]
        words += [tmp_path / name for name in ("a.pth", "b.pth", "picture.png", "found")]
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = torch.load(tmp_path / "found", weights_only=False)
        torch.manual_seed(0)
        tiny = models_arm.create_classifier("arm_tiny_pz16", num_classes=2, depth=1, img_size=32).state_dict()
        assert found["tiny"].keys() == tiny.keys()
        assert all(torch.equal(found["tiny"][name], tiny[name]) for name in tiny)
        assert found["classes"] == known["class_names"]
        image = pretrained.read(tmp_path / "a.pth").read_image(tmp_path / "picture.png")
        assert torch.equal(found["image"], image)
        with torch.no_grad():
            assert torch.allclose(found["logits"], model(image[None]), atol=1e-6)
            assert torch.allclose(found["tokens"], masked.forward_features(torch.ones(1, 3, 64, 64)), atol=1e-5)
        return found

    return run


def test_torch_hub(results):
    found = results(REPOSITORY)
    assert found["names"] == sorted(["arm", *models_arm.SIZES])
    assert "Return the classifier arm_base_pz16 with random weights" in found["help"]
    text = (REPOSITORY / "requirements.txt").read_text()
    required = {{"pillow": "PIL"}.get(name, name) for name in re.findall(r"^(\w+)[<>=]", text, re.MULTILINE)}
    listed = {*runpy.run_path(str(REPOSITORY / "hubconf.py"))["dependencies"]}
    assert required & found["packages"] <= listed <= required


def test_pip_install(results, tmp_path):
    """Only one name lands in site-packages, with all that the models and scripts need."""
    pytest.importorskip("setuptools", minversion="77")
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()
    inside = ("Detection", "Evaluation", "Finetuning", "Segmentation", "ops", "tools", "util")
    wanted = {name for name in listed if "/" not in name or name.split("/")[0] in inside}
    for name in (*wanted, "arm_vision/__init__.py"):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / "copy" / name)
    pip = "-m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile --target site ./copy".split()
    subprocess.run([sys.executable, *pip], cwd=tmp_path, check=True)
    site = tmp_path / "site"
    assert sorted(path.name for path in site.iterdir()) == ["arm_vision", "arm_vision-0.dist-info"]
    there = {path.relative_to(site / "arm_vision/sources").as_posix() for path in site.rglob("sources/**/*.*")}
    assert {name for name in wanted if name.endswith((".py", ".c", ".cu"))} <= there
    found = results(PYTHONPATH=str(site))
    assert all(file.startswith(str(site)) for file in found["own"] if file)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("import os, util.files", "import os\nimport p.util.files\nfrom p import util"),
        ("import ops.naive as n", "import p.ops.naive as n"),
        ("from models_arm import SIZES", "from p.models_arm import SIZES"),
        ("def f():\n    import mamba", "def f():\n    import p.mamba\n    from p import mamba"),
        ("from . import files\nfrom .a import b\nfrom torch import nn", None),
    ],
)
def test_imports(text, changed):
    assert ast.unparse(package._Imports("p").visit(ast.parse(text))) == (changed or text)


def test_names_of_modules(monkeypatch, tmp_path):
    """Tables of objectives and readers name modules as files do; they may name a user's own."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    name = "arm_vision_of_a_test"
    package.as_package(name)
    inner = importlib.import_module(f"{name}.util.package")
    assert inner.imported("util.lr_sched").__name__ == f"{name}.util.lr_sched"
    assert not [*tmp_path.rglob("lr_sched*")]  # scripts would read the compiled file, with imports of a package
    assert inner.imported("wave").__name__ == "wave"
    assert package.imported("util.lr_sched") is sys.modules["util.lr_sched"]
    assert sys.modules["util"].__name__ == "util"


def test_operators_of_two_copies():
    """They have two names: where torch replaces an operator, calls of the first one crash."""
    package.as_package("arm_vision_of_a_test")
    copy = importlib.import_module("arm_vision_of_a_test.ops")
    names = [place.operators.selective_scan._qualname for place in (ops, copy)]
    assert names == ["arm::selective_scan", "arm_vision_of_a_test::selective_scan"]
    inputs = torch.randn(1, 5, 4), torch.randn(1, 4, 4), torch.randn(1, 4), None, "torch"
    assert torch.equal(ops.causal_conv1d(*inputs), copy.causal_conv1d(*inputs))


def test_the_commit_is_not_that_of_a_repository_around(tmp_path, monkeypatch):
    git = "git -c user.name=a -c user.email=a".split()
    subprocess.run([*git, "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "theirs"], cwd=tmp_path, check=True)
    (tmp_path / "installed").mkdir()
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    assert launch.commit()
    monkeypatch.setattr(launch, "ROOT", tmp_path / "installed")
    assert launch.commit() is None
