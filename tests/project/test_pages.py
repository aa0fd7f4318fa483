"""README.md, docs/ and recipes: commands parse, examples run, links lead somewhere, files that they name exist."""

import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from fork_server import run_forked
from helpers import REPOSITORY
from PIL import Image
from sklearn.datasets import load_sample_images

import main_pretrain
import models_arm
import studies.run
from demo import compare_loaders, cutouts, photographs, trees, watch_cost
from demo.web import measure_page
from Detection import main_detect
from Evaluation import features, probe, robustness, segment_knn, verdict
from Finetuning import main_finetune
from Segmentation import main_segment
from tools import compare, export, pack_images, plot_log, predict, visualize
from util.errors import UserError

SCRIPTS = {
    "main_pretrain.py": main_pretrain,
    "Finetuning/main_finetune.py": main_finetune,
    "Detection/main_detect.py": main_detect,
    "Segmentation/main_segment.py": main_segment,
    "Evaluation/probe.py": probe,
    "Evaluation/robustness.py": robustness,
    "Evaluation/segment_knn.py": segment_knn,
    "Evaluation/verdict.py": verdict,
    "demo/compare_loaders.py": compare_loaders,
    "demo/cutouts.py": cutouts,
    "demo/photographs.py": photographs,
    "demo/trees.py": trees,
    "demo/watch_cost.py": watch_cost,
    "demo/web/measure_page.py": measure_page,
    "studies.run": studies.run,
    "tools/compare.py": compare,
    "tools/export.py": export,
    "tools/pack_images.py": pack_images,
    "tools/plot_log.py": plot_log,
    "tools/predict.py": predict,
    "tools/visualize.py": visualize,
}


README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return [
        body for found, body in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S) if found == language
    ]


def commands(pages: list[Path]) -> list[str]:
    """Each line of Python or of a launcher in some pages: those of blocks, and those within a text."""
    found = []
    for page in pages:
        lines = [line for body in blocks(page, "") for line in body.replace("\\\n", " ").splitlines()]
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
        found += [line for line in lines if re.match(r"(python|torchrun|sbatch) .*(\.py\b|-m )", line)]
    return found


def parsed(words: list[str]) -> argparse.Namespace:
    """The arguments that the script in a command gets; of the installed package it is the module."""
    words = [re.sub(r"^arm_vision\.([\w.]+)$", lambda name: f"{name[1].replace('.', '/')}.py", word) for word in words]
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or word in SCRIPTS)
    return SCRIPTS[words[at]].get_args_parser().parse_args(words[at + 1 :])


@pytest.mark.parametrize("command", [command for command in commands(PAGES) if "benchmarks/" not in command])
def test_commands_of_the_pages_parse(command):
    args = parsed(shlex.split(command))
    if any(name in command for name in ("main_", "probe.py")):
        assert args.data_path
    assert getattr(args, "model", None) in (None, *models_arm.SIZES)


@pytest.mark.parametrize("command", [command for command in commands(PAGES) if "benchmarks/" in command])
def test_benchmarks_of_the_pages_exist(command):
    """Importing them would change the process; their flags stand in their source, those with numbers in a table."""
    _, script, *words = shlex.split(command)
    source = "".join((REPOSITORY / file).read_text() for file in (script, "benchmarks/command_line.py"))
    for word in words:
        assert not word.startswith("-") or f'"{word}"' in source or f'"{word[2:]}": (' in source


EVERY = sorted((REPOSITORY / "recipes").glob("*_*.sh"))  # those of one command
RECIPES = [path for path in EVERY if path.stem.startswith(("pretrain_", "finetune_"))]
OF_TASKS = [path for path in EVERY if path.stem.startswith(("detect_", "segment_"))]


def parsed_recipe(path: Path, *more: str) -> argparse.Namespace:
    """The arguments that a recipe's script gets."""
    environment = {**os.environ, "LAUNCH": r"printf %s\n"}
    done = subprocess.run(["bash", path, "/data", *more], env=environment, capture_output=True, text=True, check=True)
    return parsed(done.stdout.splitlines())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes(path):
    """They parse, state accuracy and duration, and resume the run that they have begun."""
    kind, size, *resolution = path.stem.split("_")
    args, data = parsed_recipe(path, "--seed", "7"), ["/data"] if kind == "pretrain" else "/data"
    assert (args.model, args.data_path, args.resume, args.seed) == (f"arm_{size}_pz16", data, "auto", 7)
    assert args.input_size == ([int(resolution[0])] if resolution else [192] if kind == "pretrain" else None)
    header = path.read_text().partition("\nset ")[0]
    for word in ("Recipe: published" if size in ("base", "large") else "Recipe: not published", "Reaches: ", "Takes: "):
        assert f"\n# {word}" in header
    assert f"recipes/{path.name} " in header


@pytest.mark.parametrize("path", OF_TASKS, ids=lambda path: path.name)
def test_recipes_of_tasks(path):
    """They parse, say where they come from and that they were not run, and resume the run that they have begun."""
    args = parsed_recipe(path, "--seed", "7")
    assert (args.model, args.data_path, args.resume, args.seed) == ("arm_base_pz16", "/data", "auto", 7)
    header = path.read_text().partition("\nset ")[0]
    for word in ("Recipe: the field's", "Reaches: not measured", "Takes: not measured", f"    recipes/{path.name} "):
        assert f"\n# {word}" in header


def test_the_recipe_that_measures():
    """It names its place on the hub unless it is given one, and says that it was not run."""
    path = REPOSITORY / "recipes" / "verify_released.sh"
    assert {*EVERY} == {*RECIPES, *OF_TASKS, path}
    args = parsed_recipe(path)
    assert (args.weights, args.data_path, args.sizes) == ("hf://OliverRen/ARM", "/data", [224, 384])
    args = parsed_recipe(path, "hf://me/mine", "--probe", "none")
    assert (args.weights, args.data_path, args.probe) == ("hf://me/mine", "/data", ["none"])
    environment = {**os.environ, "LAUNCH": r"printf %s\n"}
    alone = subprocess.run(["bash", path], env=environment, capture_output=True, text=True, check=True)
    with pytest.raises(UserError, match="--data_path: expected one argument"):  # as of all recipes: exit status 2
        parsed(alone.stdout.splitlines())
    header = path.read_text().partition("\nset ")[0]
    for word in ("Reaches: not measured", "Takes: not measured", f"    recipes/{path.name} "):
        assert f"\n# {word}" in header


@pytest.mark.parametrize("command", [command for command in commands(PAGES) if "--blr" in command])
def test_published_recipes_are_those_of_the_readme(command):
    want = parsed(shlex.split(command))
    kind, size = "finetune" if "main_finetune" in command else "pretrain", want.model.split("_")[1]
    got = parsed_recipe(REPOSITORY / "recipes" / f"{kind}_{size}.sh")
    for args in (got, want):
        for path in ("data_path", "output_dir", "resume", "finetune"):
            vars(args).pop(path, None)
    assert got == want


def run_examples(page: Path) -> dict:
    """The names that a page's blocks of Python leave behind."""
    names = {}
    for code in blocks(page, "python"):
        exec(code, names)
    return names


@pytest.fixture
def example_files(tmp_path, monkeypatch):
    """A folder with the files that examples read: checkpoints of the smallest size, and a photograph."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out_b").mkdir()
    (tmp_path / "out_finetune_b").mkdir()
    args = main_pretrain.get_args_parser().parse_args(["--data_path", "x", "--model", "arm_tiny_pz16"])
    model = models_arm.create_pretrain_model("arm_tiny_pz16")
    torch.save({"model": model.state_dict(), "args": args}, "out_b/checkpoint-1599.pth")
    model = models_arm.create_classifier("arm_tiny_pz16", num_classes=10)
    args = argparse.Namespace(input_size=[224, 224], global_pool=True)
    torch.save({"model": model.state_dict(), "args": args}, "out_finetune_b/checkpoint-best.pth")
    Image.fromarray(load_sample_images().images[0]).save("photo.jpg")


def test_the_example_of_the_readme_runs(example_files, capsys):
    (code,) = blocks(README, "python")
    assert sum(map(bool, code.splitlines())) <= 10
    names = run_examples(README)
    assert capsys.readouterr().out == "torch.Size([1, 192])\n"
    tokens = features.encode(names["model"], names["image"][None], range(12, 13))
    assert torch.allclose(names["features"], features.pool(names["model"], tokens), atol=1e-5)


SHARING = REPOSITORY / "docs/sharing.md"
EXAMPLES = [page for page in PAGES[1:] if page != SHARING and blocks(page, "python")]


def test_the_examples_of_sharing_run(tmp_path, run_script):
    """In a process of their own: they register the models again, and read a folder that `export` has written."""
    torch.manual_seed(0)
    model = models_arm.create_classifier("arm_tiny_pz16", embed_dim=32, depth=1, img_size=32, num_classes=10)
    args = argparse.Namespace(input_size=[32, 32], global_pool=True)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "checkpoint-best.pth")
    run_script(export, tmp_path / "checkpoint-best.pth", "--to", "hf", "--no_measure")
    Image.fromarray(load_sample_images().images[0]).save(tmp_path / "photo.jpg")
    code = "\n".join(blocks(SHARING, "python")).replace("/path/to/this/checkout", str(REPOSITORY))
    code += "\nassert (logits.shape, len(answers), image.shape) == ((1, 10), 5, (3, 32, 32))"
    offline = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = run_forked(["-c", code], cwd=tmp_path, env=offline)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(example_files, page):
    names = run_examples(page)
    if page.name == "using.md":
        assert names["loss"].shape == (128,)
        assert names["latents"].shape == (2, 128, 192, 4)
        assert names["tokens"].shape == (2, 169, 192)
        assert names["features"].shape == (2, 192)
        assert (names["clusters"].shape, names["maps"].shape) == ((1, 192, 192), (1, 192, 16, 12))
        assert (names["wide"].image_size, names["padded"].shape) == ((256, 192), (1, 192, 16, 13))
        assert names["pooled"].shape == (1, 192)
        assert names["model"].grid_size == (14, 12)
        assert names["blocks"].feature_info.channels() == [768] * 3
        assert (names["finest"].shape, names["coarsest"].shape) == ((1, 256, 63, 50), (1, 256, 8, 7))
        assert [level.shape[-2:] for level in names["levels"]] == [(12, 8), (6, 4), (3, 2)]
        assert names["masks"].shape == (1, 3, 64, 96)


def test_readme_has_the_four_recipes():
    models = [re.search(r"--model (\w+)", command) for command in commands([README])]
    assert [m[1] for m in models if m].count("arm_base_pz16") >= 2
    assert [m[1] for m in models if m].count("arm_large_pz16") >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_have_no_marks_left(page):
    """Files that a page names exist, and no place waits for a figure."""
    text = page.read_text()
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b", text.replace("PIP_FLAGS", ""))
    folders = "benchmarks|recipes|demo|slurm|util|tests|Detection|Segmentation|Evaluation|Finetuning"
    for name in re.findall(rf"\b(?:{folders})/[\w./*-]+\.\w+", text):
        assert list(REPOSITORY.glob(name)), name


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them of its headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tests_that_the_pages_name_exist():
    """They may stand without their file; with it, they are in it."""
    defined = {
        (file.name, name)
        for file in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    names = {name for _, name in defined}
    for page in (REPOSITORY / "docs" / "faults.md", REPOSITORY / "CONTRIBUTING.md"):
        for file, name in re.findall(r"`(?:[\w/]*/)?(?:(test_\w+\.py): )?(test_\w+)`", page.read_text()):
            assert (file, name) in defined if file else name in names, f"{page.name}: {file} {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_each_page_is_linked_from_the_readme():
    text = README.read_text()
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in text, page.name


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_column_of_a_table_has_a_header(page):
    """But the column of the rows' names may have none."""
    for header in re.findall(r"^\|(.*)\|\n\| ---", page.read_text(), re.M):
        assert all(cell.strip() for cell in header.split("|")[1:]), header
