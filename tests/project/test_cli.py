"""The command lines: a frozen list of flags, all that README.md and docs/ say to run, one line for each mistake."""

import argparse
import errno
import importlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, TINY_FINETUNE, TINY_PRETRAIN
from PIL import Image
from sklearn.datasets import load_sample_images

import main_pretrain
import models_arm
import studies.run
from Evaluation import features, probe, robustness
from Finetuning import main_finetune
from tools import export, pack_images, plot_log, replay_nonfinite, visualize
from util import arguments, cli
from util.distributed.processes import init_device
from util.errors import UserError
from util.training import precision

SHARED = """
    model input_size patch_size embed_dim depth scan_backend
    batch_size accum_iter epochs warmup_epochs lr blr min_lr weight_decay clip_grad
    data_path loader max_bad_samples scale hflip num_workers worker_timeout pin_mem no_pin_mem
    output_dir log_dir tracker save_freq save_every_steps keep resume start_epoch allow_changed_args
    device seed deterministic compile no_compile cuda_graph no_cuda_graph fused_ops fsdp max_nonfinite dist_timeout
"""
PRETRAIN = SHARED + "cluster_size dec_embed_dim dec_depth norm_pix_loss no_norm_pix_loss order taps objective vis_freq"
FINETUNE = (
    SHARED
    + """
    finetune model_key ignore_keys nb_classes global_pool cls_token directions drop_path layer_decay ema_decay
    color_jitter aa smoothing reprob remode recount
    mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode
    eval dist_eval eval_resize eval_loader eval_bad
"""
)
EXAMINE = """
    model_key ignore_keys input_size output device batch_size scan_backend num_workers worker_timeout pin_mem no_pin_mem
    dist_timeout eval_resize eval_loader eval_bad
"""
PROBE = (
    EXAMINE
    + """
    data_path block average_last cache max_gb
    probe k temperature seeds probe_epochs probe_batch_size attn_heads seed
"""
)
ROBUSTNESS = EXAMINE + "data"
SCRIPTS = {"main_pretrain.py": main_pretrain, "Finetuning/main_finetune.py": main_finetune}
SCRIPTS |= {"Evaluation/probe.py": probe, "Evaluation/robustness.py": robustness}
SCRIPTS |= {
    f"tools/{tool.__name__.removeprefix('tools.')}.py": tool for tool in (export, pack_images, plot_log, visualize)
}
MODULES = {"studies.run": studies.run}


@pytest.mark.parametrize(
    ("script", "flags"),
    [(main_pretrain, PRETRAIN), (main_finetune, FINETUNE), (probe, PROBE), (robustness, ROBUSTNESS)],
)
def test_flags_are_frozen(script, flags):
    """Others write job scripts against these: adding one is a decision, removing one breaks somebody."""
    options = {o for action in script.get_args_parser()._actions for o in action.option_strings}
    assert options == {f"--{flag}" for flag in flags.split()} | {"-h", "--help"}


README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """What stands between the fences of a page."""
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
    """The arguments that the script in a command gets."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or word in MODULES)
    script = MODULES.get(words[at]) or SCRIPTS[Path(words[at]).name]
    return script.get_args_parser().parse_args(words[at + 1 :])


@pytest.mark.parametrize("command", [command for command in commands(PAGES) if "benchmarks/" not in command])
def test_commands_of_the_pages_parse(command):
    args = parsed(shlex.split(command))
    if any(name in command for name in ("main_", "probe.py")):
        assert args.data_path
    assert getattr(args, "model", None) in (None, *models_arm.SIZES)


@pytest.mark.parametrize("command", [command for command in commands(PAGES) if "benchmarks/" in command])
def test_benchmarks_of_the_pages_exist(command):
    """Importing them would change the process; their flags stand in their source."""
    _, script, *words = shlex.split(command)
    source = (REPOSITORY / script).read_text()
    for word in words:
        assert not word.startswith("-") or f'"{word}"' in source


RECIPES = sorted((REPOSITORY / "recipes").iterdir())


def parsed_recipe(path: Path, *more: str) -> argparse.Namespace:
    """The arguments that a recipe's script gets."""
    environment = {**os.environ, "LAUNCH": r"printf %s\n"}
    done = subprocess.run(["bash", path, "/data", *more], env=environment, capture_output=True, text=True, check=True)
    return parsed(done.stdout.splitlines())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes(path):
    """They parse, say what they reach and how long it takes, and go on with the run that they have begun."""
    kind, size, *resolution = path.stem.split("_")
    args = parsed_recipe(path, "--seed", "7")
    assert (args.model, args.data_path, args.resume, args.seed) == (f"arm_{size}_pz16", "/data", "auto", 7)
    assert args.input_size == ([int(resolution[0])] if resolution else [192] if kind == "pretrain" else None)
    header = path.read_text().partition("\nset ")[0]
    for word in ("Recipe: published" if size in ("base", "large") else "Recipe: not published", "Reaches: ", "Takes: "):
        assert f"\n# {word}" in header
    assert f"recipes/{path.name} " in header


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


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=lambda page: page.name)
def test_the_examples_of_a_page_run(example_files, page):
    names = run_examples(page)
    if page.name == "using.md":
        assert names["loss"].shape == (128,)
        assert names["latents"].shape == (2, 128, 192, 4)
        assert names["tokens"].shape == (2, 169, 192)
        assert names["features"].shape == (2, 192)
        assert names["pooled"].shape == (1, 192)
        assert names["model"].grid_size == (14, 12)
        assert names["pyramid"].feature_info.channels() == [768] * 3


def test_readme_has_the_four_recipes():
    models = [re.search(r"--model (\w+)", command) for command in commands([README])]
    assert [m[1] for m in models if m].count("arm_base_pz16") >= 2
    assert [m[1] for m in models if m].count("arm_large_pz16") >= 2


def test_defaults_are_the_base_recipe():
    args = main_pretrain.get_args_parser().parse_args(["--data_path", "x"])
    assert (args.input_size, args.epochs, args.warmup_epochs, args.blr) == ([192], 1600, 40, 1.5e-4)
    assert (args.min_lr, args.weight_decay, args.clip_grad, args.scale) == (0, 0.05, 3.0, [0.2, 1.0])
    args = main_finetune.get_args_parser().parse_args(["--data_path", "x"])
    assert (args.epochs, args.warmup_epochs, args.blr, args.min_lr) == (100, 5, 5e-4, 1e-6)
    assert (args.layer_decay, args.drop_path, args.clip_grad, args.ema_decay) == (0.65, 0.1, None, None)
    assert (args.aa, args.reprob, args.remode, args.smoothing) == ("rand-m9-mstd0.5-inc1", 0.25, "pixel", 0.1)
    assert (args.global_pool, args.eval_resize) == (None, "square")


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ("", None),  # True, or what the checkpoint was finetuned with
        ("--global_pool", True),
        ("--global_pool True", True),
        ("--global_pool true", True),
        ("--global_pool False", False),
        ("--global_pool 0", False),
        ("--cls_token", False),
    ],
)
def test_global_pool(words, want):
    """The released code parses `--global_pool False` as true."""
    args = main_finetune.get_args_parser().parse_args(["--data_path", "x", *words.split()])
    assert args.global_pool is want


def test_global_pool_is_neither():
    with pytest.raises(UserError, match="'maybe' is neither true nor false"):
        main_finetune.get_args_parser().parse_args(["--data_path", "x", "--global_pool", "maybe"])


@pytest.mark.parametrize(
    ("words", "want"),
    [([], False), (["--norm_pix_loss"], True), (["--norm_pix_loss", "--no_norm_pix_loss"], False)],
)
def test_norm_pix_loss(words, want):
    """The released code normalises whatever the flag says."""
    args = main_pretrain.get_args_parser().parse_args([*TINY_PRETRAIN, "--data_path", "x", *words])
    assert main_pretrain.build_model(args).norm_pix_loss is want


def test_learning_rate_follows_the_effective_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    words = "--data_path x --batch_size 32 --accum_iter 4 --blr 5e-4".split()
    args = main_finetune.get_args_parser().parse_args(words)
    arguments.check_arguments(args)
    assert args.lr == pytest.approx(5e-4 * 32 * 4 * 8 / 256)
    args = main_finetune.get_args_parser().parse_args([*words, "--lr", "0.1"])
    arguments.check_arguments(args)
    assert args.lr == 0.1


@pytest.mark.parametrize(
    ("script", "words", "warmup", "said"),
    [
        (main_pretrain, "", 40, ""),
        (main_pretrain, "--epochs 41", 40, ""),
        (main_pretrain, "--epochs 40", 1, "warm-up of 1 epochs in a run of 40: the share of the recipe's 40 in 1600"),
        (main_pretrain, "--epochs 10", 0.25, "warm-up of 0.25 epochs in a run of 10: the share"),
        (main_finetune, "--epochs 6", 5, ""),
        (main_finetune, "--epochs 5", 0.25, "warm-up of 0.25 epochs in a run of 5: the share of the recipe's 5 in 100"),
        (main_finetune, "--epochs 5 --warmup_epochs 4", 4, ""),
        (main_finetune, "--epochs 5 --warmup_epochs 0", 0, ""),
        (main_finetune, "--epochs 1 --warmup_epochs 1", 1, "its learning rate only rises"),
        (main_finetune, "--epochs 3 --warmup_epochs 5 --eval", 5, ""),
    ],
)
def test_a_warm_up_is_shorter_than_the_run(script, words, warmup, said, caplog):
    args = script.get_args_parser().parse_args(["--data_path", "x", *words.split()])
    with caplog.at_level(logging.INFO):
        arguments.check_arguments(args)
    assert args.warmup_epochs == warmup
    assert said in caplog.text if said else not caplog.records
    if not getattr(args, "eval", False):
        assert not hasattr(args, "recipe_epochs")  # checkpoints hold the arguments


# ---- mistakes: exit status 2, one line on stderr, before any training

PRETRAIN_MISTAKES = {
    "--batch_size 0": "argument --batch_size: 0 is not at least 1",
    "--model arm_giant": "unknown model 'arm_giant'; choose from arm_base_pz16",
    "--input_size 40 32": r"image size 40 does not divide .* nearest: 32 or 48",
    "--input_size 1 2 3": "--input_size takes one side",
    "--dec_embed_dim 65": "decoder width 65 is not a multiple of 64",
    "--dec_depth 4": "depth 4 is too small for 4 decoder blocks",
    "--scan_backend warp": "unknown backend 'warp'",
    "--scan_backend mamba_ssm": "pip install --no-build-isolation -r requirements-cuda.txt",
    "--data_path /nowhere": "--data_path /nowhere: no such folder",
    "--fsdp": "--fsdp shards over processes, and there is one: start several with torchrun",
    "--accum_iter 25": "24 training images do not fill one update: batch size 4 x 1 processes x 25",
    "--batch_size 25": "24 training images do not fill one update: batch size 25",
    "--resume none.pth": "no checkpoint file none.pth",
    "--warmup_epochs 2": "--warmup_epochs 2 is not shorter than the run of --epochs 1: the learning rate would never",
    "--epochs 3 --warmup_epochs 3": "--warmup_epochs 3 is not shorter than the run of --epochs 3",
    "--epochs 9 --warmup_epochs 40": "--warmup_epochs 40 is not shorter than the run",
    "--start_epoch 9": "--start_epoch 9: the run has epochs 0 to 0",
    "--device cuda": "finds no GPU",
    "--unknown 1": "unrecognized arguments: --unknown 1",
    "--scale 1 0.2": "--scale: the smaller area comes first",
    "--scale 0 0": "--scale: .* the larger one is above 0",
    "--resume=": "argument --resume: it is empty",
    "--output_dir=": "argument --output_dir: it is empty",
    "--scale 0.2 1.5": "1.5 is not at least 0 and at most 1",
    "--embed_dim 30": "encoder width 30 is not a multiple of 4",
    "--lr -1": "-1 is not at least 0",
    "--lr nan": "nan is not at least 0",
    "--lr fast": "invalid float value: 'fast'",
    "--seed -1": "-1 is not at least 0",
    "--clip_grad 0": "0 is not above 0",
    "--device meta": "--device meta: cuda and cpu are supported",
    "--log_dir /dev/null/x": "--log_dir /dev/null/x cannot be written",
}
FINETUNE_MISTAKES = {
    "--nb_classes 2": "has 3 classes, the classifier 2",
    "--finetune none.pth": "no checkpoint file none.pth",
    "--resume none.pth --model_key model_ema": "--model_key chooses among the weights of --finetune",
    "--eval": "--eval needs a checkpoint",
    "--input_size 50": "image size 50 does not divide into patches of 8 pixels; nearest: 48 or 56",
    "--mixup 0.8 --batch_size 3": "need an even batch",
    "--smoothing 1": "1 is not at least 0 and at most 0.999",
    "--drop_path -1": "-1 is not at least 0 and at most 1",
    "--nb_classes -1": "-1 is not at least 1",
    "--remode foo": "invalid choice: 'foo'",
    "--aa foo": "--aa foo: ",
    "--cutmix_minmax 0.9 0.2": r"--cutmix_minmax: of \d+ pixels that is from \d+ to below \d+, which is nothing",
    "--cutmix_minmax 0.5 0.5": "which is nothing",
    "--finetune=": "argument --finetune: it is empty",
    "--ema_decay 2": "2 is not at least 0 and at most 1",
    "--layer_decay 0": "0 is not above 0 and at most 1",
    "--cutmix -1": "-1 is not at least 0",
}
MISTAKES = [(main_pretrain, TINY_PRETRAIN, *item) for item in PRETRAIN_MISTAKES.items()]
MISTAKES += [(main_finetune, TINY_FINETUNE, *item) for item in FINETUNE_MISTAKES.items()]


def assert_one_line(capsys, exit_info, message):
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"main_\w+\.py: error: .{,2000}\n", err), err
    assert re.search(message, err), err
    assert "epoch 0" not in out


@pytest.mark.parametrize(("script", "tiny", "words", "message"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_mistakes(run_script, image_folder, tmp_path, capsys, script, tiny, words, message):
    if words == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    common = ["--data_path", image_folder, "--output_dir", tmp_path / "out", "--batch_size", 4, "--epochs", 1]
    with pytest.raises(SystemExit) as exit_info:
        run_script(script, *tiny, *common, *words.split())
    assert_one_line(capsys, exit_info, message)
    assert not list(tmp_path.rglob("*.pth"))


# the last, kernel_resources, chooses Triton's compiler when it is imported, and its numbers are choices
BENCHMARKS = "bench_augment", "bench_data", "bench_losses", "bench_ops", "bench_resilience", "bench_scan", "bench_train"
BENCHMARKS += "compare_loaders", "gpu_check"


def numeric_arguments() -> list:
    """Every argument of every script that takes a number, as (id, parser, action)."""
    found = []
    scripts = [*SCRIPTS.values(), *MODULES.values(), replay_nonfinite]
    scripts += [importlib.import_module(f"benchmarks.{name}") for name in BENCHMARKS]
    for parser in [script.get_args_parser() for script in scripts]:
        for action in parser._actions:
            # a type of ours carries the name of what it makes; anything else may still be a bare int or float
            if getattr(action.type, "__name__", "") in ("int", "float") and not action.choices:
                found.append(pytest.param(parser, action, id=f"{parser.prog} {action.dest}"))
    return found


@pytest.mark.parametrize(("parser", "action"), numeric_arguments())
def test_numbers_have_bounds(parser, action):
    """One line names the argument and, of what is a number, its bounds."""
    flag, count = action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1
    for text in (str(10**18), "9" * 400, "9" * 5000, "1e308", "inf", "nan", "-1"):
        with pytest.raises(UserError, match=f"argument {flag}: ") as raised:
            parser.parse_args([flag, *[text] * count])
        assert "\n" not in str(raised.value)
        if text == str(10**18):
            assert re.search(r"is not (at least|above) [\d.e-]+ and at most [\d.]+$", str(raised.value))


def test_there_are_numeric_arguments():
    """The table above does not become empty without a word."""
    names = {param.id for param in numeric_arguments()}
    assert {"main_pretrain.py keep", "probe.py k", "pack_images shard_images", "bench_train.py steps"} <= names
    assert len(names) > 100


@pytest.mark.parametrize("flag", ["loader", "eval_loader"])
def test_the_fast_loader_without_its_decoder(flag, run_script, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--loader", "pil", f"--{flag}", "fast"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_finetune, *TINY_FINETUNE, *words)
    assert_one_line(capsys, exit_info, f"--{flag} fast needs simplejpeg: pip install simplejpeg, or take --{flag} pil")


@pytest.mark.parametrize(
    "device", ["cuda:999", "cuda:-1", "cuda:99999999999999999999", "cuda:007", "cuda:٣", "mps", "meta", "cuda:", ""]
)
@pytest.mark.parametrize("gpus", [0, 2])
def test_devices_that_are_none(monkeypatch, run_script, capsys, tmp_path, device, gpus):
    """torch itself takes cuda:999 as device 65511."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, "--data_path", "x", "--output_dir", tmp_path, f"--device={device}")
    assert_one_line(capsys, exit_info, "--device")


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR"])
def test_a_world_size_without_torchrun(monkeypatch, run_script, capsys, tmp_path, name):
    """Some clusters set it for every container."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, "--data_path", "x", "--output_dir", tmp_path)
    assert_one_line(capsys, exit_info, "WORLD_SIZE is set, but not all that torchrun sets: .*RANK expected")


@pytest.mark.parametrize("flag", ["--output_dir", "--log_dir"])
@pytest.mark.parametrize("kind", ["file", "fifo", "loop", "device", "long", "longer"])
def test_folders_that_are_none(run_script, image_folder, tmp_path, capsys, flag, kind):
    path = (
        Path("/dev/null") if kind == "device" else tmp_path / {"long": "x" * 300, "longer": "x" * 5000}.get(kind, kind)
    )
    if kind == "file":
        path.touch()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(tmp_path / "other")
        (tmp_path / "other").symlink_to(path)
    words = ["--data_path", image_folder, "--output_dir", tmp_path / "out", flag, path]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, *words)
    reason = "File name too long" if "long" in kind else "File exists"
    assert_one_line(capsys, exit_info, f"{flag} .{{,500}} cannot be written: {reason}")


def ended(code: str, *argv: object, redirection: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run a script of Python with `cli` imported, in a shell that redirects its output."""
    command = f'"$0" "$@" {redirection}'
    words = ["bash", "-c", command, sys.executable, "-c", f"from util import cli\n{code}", *map(str, argv)]
    return subprocess.run(
        words,
        cwd=REPOSITORY,
        capture_output=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


PRINTS = """
parser = cli.Parser("script")
parser.add_argument("path", nargs="?")
def main(args):
    for _ in range(100_000): print(args.path, "a name", flush=True)
cli.run_main(main, parser)
"""


def test_outputs_that_end_early():
    """A reader that has gone ends a script quietly, a full disk in one line, and no output at all is not missed."""
    done = ended(PRINTS, redirection="| head -1; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"None a name\n", b"")
    done = ended(PRINTS, redirection="> /dev/full")
    assert (done.returncode, done.stderr) == (1, b"script: [Errno 28] No space left on device\n")
    done = ended(PRINTS, redirection=">&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = ended(PRINTS, "--help", redirection="| true; exit ${PIPESTATUS[0]}")
    assert done.stderr == b""


def test_names_that_an_output_cannot_show():
    """Bytes that are not UTF-8, and an output that is ASCII."""
    code = PRINTS.replace("100_000", "1")
    for path, shown in ((b"caf\xe9", rb"caf\udce9"), ("Käse", rb"K\xe4se"), ("日本", rb"\u65e5\u672c")):
        done = ended(code, os.fsdecode(path), PYTHONIOENCODING="ascii", LC_ALL="C")
        assert (done.returncode, done.stdout, done.stderr) == (0, shown + b" a name\n", b"")
    done = ended(code, "--flag", os.fsdecode(b"caf\xe9\n\x1b[31m"), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == rb"script: error: unrecognized arguments: --flag" + b"\n"


@pytest.mark.parametrize("words", [["--resume", "none"], ["--finetune", "none"], ["--data_path", "none"], ["--none"]])
def test_mistakes_whose_names_are_not_utf8(run_script, image_folder, tmp_path, capsys, words):
    *flag, name = words
    words = [*flag, os.fsdecode(name.encode() + b"\xe9\n")]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_finetune, *TINY_FINETUNE, "--data_path", image_folder, "--output_dir", tmp_path / "out", *words)
    assert_one_line(capsys, exit_info, r"none\\xe9\\n")


def test_a_run_whose_names_are_not_utf8(run_script, image_folder, tmp_path, capsys):
    """It works; only TensorBoard does not take such a folder, and that is said first."""
    data, out = (os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/d\xe9 ta", b"/o\xfft"))
    shutil.copytree(image_folder, data)
    words = [*TINY_PRETRAIN, "--data_path", data, "--output_dir", out, "--batch_size", 8, "--epochs", 1]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *words, "--warmup_epochs", 0)
    assert_one_line(capsys, exit_info, r"--log_dir .*o\\xfft: TensorBoard needs a name in UTF-8")
    assert not os.path.exists(out)
    words += ["--log_dir", tmp_path / "log", "--warmup_epochs", 0]
    run_script(main_pretrain, *words)
    run_script(main_pretrain, *words, "--resume", f"{out}/checkpoint-last.pth")
    assert "all of them done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("CUDA error: out of memory\nCompile with ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
        RuntimeError("unable to mmap 9 bytes from file </torch_1>: Cannot allocate memory (12)"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_memory_that_runs_out(monkeypatch, capsys, error):
    def main(args: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["script", "--data_path", "x"])
    with pytest.raises(SystemExit) as exit_info:
        cli.run_main(main, main_pretrain.get_args_parser())
    assert exit_info.value.code == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"main_pretrain.py: rank 0: out of memory: .+; a smaller --batch_size or .+ needs less\n", err)


def test_other_errors_keep_their_traceback(monkeypatch):
    """A fault of ours is not hidden behind a line."""
    monkeypatch.setattr(sys, "argv", ["script"])
    for error in (RuntimeError("shapes differ"), OSError(errno.EBADF, "bad"), BrokenPipeError(), ValueError("x")):
        with pytest.raises(type(error)):
            cli.run_main(lambda args, error=error: (_ for _ in ()).throw(error), cli.Parser("script"))


LIMITED = """
import resource, main_pretrain
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 2**29, resource.RLIM_INFINITY))
cli.run_main(main_pretrain.main, main_pretrain.get_args_parser())
"""


def test_a_memory_limit(image_folder, tmp_path):
    """As `ulimit -v` sets it: weights of a decoder of 16,384 channels do not fit into 512 MB."""
    words = [*TINY_PRETRAIN, "--dec_embed_dim", 16384, "--data_path", image_folder, "--output_dir", tmp_path]
    done = ended(LIMITED, *words, "--batch_size", 4)
    assert done.returncode == 1
    assert re.fullmatch(rb"main_pretrain.py: rank 0: out of memory: .*memory.*needs less\n", done.stderr), done.stderr


def test_data_path_is_required(run_script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain)
    assert_one_line(capsys, exit_info, "required: --data_path")


def damaged(folder: Path, damage: str) -> None:
    if damage == "no train":
        shutil.rmtree(folder / "train")
    elif damage == "no val":
        shutil.rmtree(folder / "val")
    elif damage == "empty class":
        (folder / "train" / "class_x").mkdir()
    elif damage == "no class":
        shutil.rmtree(folder / "train")
        (folder / "train").mkdir()
    elif damage == "other classes":
        (folder / "val" / "class_2").rename(folder / "val" / "class_x")


@pytest.mark.parametrize(
    ("script", "tiny", "damage", "message"),
    [
        (main_pretrain, TINY_PRETRAIN, "no train", "there is no folder 'train'"),
        (main_pretrain, TINY_PRETRAIN, "empty class", "no image in 1 of 4 class folders: class_x"),
        (main_pretrain, TINY_PRETRAIN, "no class", "Couldn't find any class folder"),
        (main_finetune, TINY_FINETUNE, "no train", "there is no folder 'train'"),
        (main_finetune, TINY_FINETUNE, "no val", "there is no folder 'val'"),
        (
            main_finetune,
            TINY_FINETUNE,
            "other classes",
            "val has images of 1 classes that .*train does not have: class_x",
        ),
    ],
)
def test_damaged_data_folder(run_script, image_folder, tmp_path, capsys, script, tiny, damage, message):
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    damaged(folder, damage)
    with pytest.raises(SystemExit) as exit_info:
        run_script(script, *tiny, "--data_path", folder, "--output_dir", tmp_path / "out", "--epochs", 1)
    assert_one_line(capsys, exit_info, message)


def test_output_folder_that_cannot_be_written(run_script, image_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_info:
        run_script(
            main_pretrain, *TINY_PRETRAIN, "--data_path", image_folder, "--output_dir", tmp_path / "file" / "out"
        )
    assert_one_line(capsys, exit_info, "--output_dir .* cannot be written: Not a directory")


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_checkpoint_that_is_foreign(run_script, image_folder, tmp_path, capsys, flag):
    path = tmp_path / "vit.pth"
    torch.save({"model": {"blocks.0.attn.qkv.weight": torch.ones(3)}}, path)
    common = ["--data_path", image_folder, "--output_dir", tmp_path / "out", "--epochs", 1]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_finetune, *TINY_FINETUNE, *common, flag, path)
    assert_one_line(capsys, exit_info, "not one of ARM")


def test_under_torchrun_one_process_speaks(image_folder):
    """Several processes find the same mistake; it is stated once, and they all end with status 2."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        REPOSITORY / "main_pretrain.py",
        *TINY_PRETRAIN,
        "--data_path",
        image_folder,
        "--dec_depth",
        "4",
        "--batch_size",
        "4",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("main_pretrain.py: error: depth 4 is too small") == 1
    assert re.search(r"exitcode\s*: 2 ", done.stderr)
    assert not re.search(r"^\[rank\d\]: Traceback", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("environment", "device", "gpus", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}, None, 2, "8 processes, but 2 GPUs"),
        ({}, "cuda:2", 2, "--device cuda:2: 1 processes, 2 GPUs"),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, "cuda:1", 2, "under torchrun say --device cuda"),
    ],
)
def test_gpus_that_are_not_there(monkeypatch, environment, device, gpus, message):
    """Every process finds the mistake, before any of them waits for the others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        init_device(device)


def test_backend_that_cannot_use_the_device(monkeypatch, run_script, image_folder, tmp_path, capsys):
    monkeypatch.setattr(precision, "activation_dtype", lambda device: torch.bfloat16)  # as on a GPU
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--scan_backend", "cpu"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, *words)
    assert_one_line(capsys, exit_info, "backend 'cpu' does not compute torch.bfloat16")


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main_finetune.get_args_parser().parse_args(["--help"])
    assert exit_info.value.code == 0
    assert "--layer_decay" in capsys.readouterr().out


def test_images_of_any_mode_are_read(run_script, image_folder, tmp_path):
    """Grey, palette and alpha images train like the others."""
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (40, 30)).save(folder / "train" / "class_0" / f"mode_{mode}.png")
    run_script(
        main_pretrain, *TINY_PRETRAIN, "--data_path", folder, "--output_dir", tmp_path / "out", "--epochs", 1,
        "--batch_size", 28, "--warmup_epochs", 0,
    )  # fmt: skip
    assert (tmp_path / "out" / "checkpoint-0.pth").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_have_no_marks_left(page):
    """Files that a page names exist, and no place waits for a figure."""
    text = page.read_text()
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b", text)
    folders = "benchmarks|recipes|demo|slurm|util|tests|Evaluation|Finetuning"
    for name in re.findall(rf"\b(?:{folders})/[\w./*-]+\.\w+", text):
        assert list(REPOSITORY.glob(name)), name


def anchors(page: Path) -> set[str]:
    """What can follow a # in a link to a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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


def test_the_ratios_of_the_readme_are_those_of_the_tables():
    """Its table of speeds repeats six figures."""
    section = README.read_text().partition("\n## Speed\n")[2].partition("\n## ")[0]
    ratios = re.findall(r"\| (\d+\.\d) \(", section)
    tables = "".join((REPOSITORY / "docs" / name).read_text() for name in ("kernels.md", "data.md"))
    assert len(ratios) == 6
    for ratio in ratios:
        assert f"({ratio})" in tables, ratio
