"""Flags: a frozen list of them, their defaults and bounds, and what they stand for."""

import importlib
import logging
import re
import subprocess
import sys

import pytest
from helpers import REPOSITORY, SCRIPTS_BY_PATH, TINY_PRETRAIN

import main_pretrain
import studies.run
from demo import compare_loaders, watch_cost
from demo.web import measure_page
from Detection import main_detect
from Evaluation import probe, robustness, segment_knn, verdict
from Finetuning import main_finetune
from mamba import SIZES
from Segmentation import main_segment
from tools import compare, export, pack_images, plot_log, predict, replay_nonfinite, visualize
from util import arguments
from util.errors import UserError

SHARED = """
    model input_size patch_size in_chans embed_dim depth scan_backend grad_checkpointing
    batch_size accum_iter epochs warmup_epochs lr blr min_lr weight_decay clip_grad
    data_path loader max_bad_samples scale hflip mean std exif dtype num_workers worker_timeout pin_mem no_pin_mem
    output_dir log_dir tracker print_freq save_freq save_every_steps keep resume start_epoch allow_changed_args
    device seed deterministic compile no_compile cuda_graph no_cuda_graph fused_ops fsdp max_nonfinite dist_timeout
"""
PRETRAIN = (
    SHARED
    + """
    cluster_size dec_embed_dim dec_depth norm_pix_loss no_norm_pix_loss order taps objective vis_freq
    val_freq probe_freq probe_images
"""
)
FINETUNE = (
    SHARED
    + """
    finetune model_key ignore_keys nb_classes global_pool cls_token directions drop_path layer_decay ema_decay freeze
    color_jitter aa smoothing reprob remode recount
    mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode
    eval dist_eval output eval_resize eval_loader eval_bad
"""
)
EXAMINE = """
    model_key ignore_keys input_size output device batch_size scan_backend num_workers worker_timeout pin_mem no_pin_mem
    dtype dist_timeout eval_resize eval_loader
"""
PROBE = (
    EXAMINE
    + """
    eval_bad data_path block average_last cache max_gb
    probe k temperature seeds probe_epochs probe_batch_size attn_heads seed
"""
)
SEGMENT_KNN = (
    EXAMINE.replace("eval_loader", "")
    + "data_path classes ignore_label block average_last k temperature max_tokens seed"
)
ROBUSTNESS = EXAMINE + "eval_bad data"
VERDICT = """
    data_path robustness sizes resizes probe output_dir device batch_size dtype scan_backend num_workers worker_timeout
    pin_mem no_pin_mem dist_timeout eval_loader eval_bad
"""
PREDICT = EXAMINE + "topk score features block average_last"
MACHINE = """
    device dtype batch_size scan_backend num_workers worker_timeout pin_mem no_pin_mem dist_timeout
"""
EXPORT = MACHINE + "to output model_key ignore_keys encoder data_path no_measure"
COMPARE = MACHINE + "model_key data_path eval_resize output rounds no_measure"
DETECT = SHARED.replace(" loader ", " ") + (
    """
    finetune model_key ignore_keys directions drop_path layer_decay ema_decay freeze boxes_only head_channels vis_freq
    eval output eval_bad
"""
)

SEGMENT = SHARED.replace(" loader ", " ") + (
    """
    finetune model_key ignore_keys directions drop_path layer_decay ema_decay freeze head head_channels head_dropout
    vis_freq classes ignore_label max_share distort eval inference multi_scale output
"""
)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (main_pretrain, PRETRAIN),
        (main_finetune, FINETUNE),
        (main_detect, DETECT),
        (main_segment, SEGMENT),
        (probe, PROBE),
        (robustness, ROBUSTNESS),
        (segment_knn, SEGMENT_KNN),
        (verdict, VERDICT),
        (predict, PREDICT),
        (export, EXPORT),
        (compare, COMPARE),
    ],
)
def test_flags_are_frozen(script, flags):
    """Others write job scripts against these: adding one is a decision, removing one breaks somebody."""
    options = {o for action in script.get_args_parser()._actions for o in action.option_strings}
    assert options == {f"--{flag}" for flag in flags.split()} | {"-h", "--help"}


def test_defaults_are_the_base_recipe():
    args = main_pretrain.get_args_parser().parse_args(["--data_path", "x"])
    assert (args.input_size, args.epochs, args.warmup_epochs, args.blr) == ([192], 1600, 40, 1.5e-4)
    assert (args.min_lr, args.weight_decay, args.clip_grad, args.scale) == (0, 0.05, 3.0, [0.2, 1.0])
    args = main_finetune.get_args_parser().parse_args(["--data_path", "x"])
    assert (args.epochs, args.warmup_epochs, args.blr, args.min_lr) == (100, 5, 5e-4, 1e-6)
    assert (args.layer_decay, args.drop_path, args.clip_grad, args.ema_decay) == (0.65, 0.1, None, None)
    assert (args.aa, args.reprob, args.remode, args.smoothing) == ("rand-m9-mstd0.5-inc1", 0.25, "pixel", 0.1)
    assert (args.global_pool, args.eval_resize) == (None, "square")
    args = main_segment.get_args_parser().parse_args(["--data_path", "x", "--batch_size", "16"])
    assert (args.epochs, args.warmup_epochs, args.blr * 16 / 256, args.min_lr) == (127, 1, 1e-4, 0)
    assert (args.layer_decay, args.drop_path, args.weight_decay, args.scale) == (0.65, 0.1, 0.05, [0.5, 2.0])


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


BENCHMARKS = "augment coco data losses ops resilience scan tokens train".split()
BENCHMARKS = [f"bench_{name}" for name in BENCHMARKS] + ["export.bench_export", "gpu_check"]


def numeric_arguments() -> list:
    """Every argument of every script that takes a number, as (id, parser, action)."""
    found = []
    scripts = [main_pretrain, main_finetune, main_detect, main_segment, probe, robustness, segment_knn, studies.run]
    scripts += [compare, compare_loaders, export, measure_page, pack_images, plot_log, predict]
    scripts += [replay_nonfinite, verdict, visualize, watch_cost]
    scripts += [importlib.import_module(f"benchmarks.{name}") for name in BENCHMARKS]
    for parser in [script.get_args_parser() for script in scripts]:
        for action in parser._actions:
            # a type of ours carries the name of what it makes; anything else may still be a bare int or float
            if getattr(action.type, "__name__", "") in ("int", "float", "frozen") and not action.choices:
                found.append(pytest.param(parser, action, id=f"{parser.prog} {action.dest}"))
    return found


@pytest.mark.parametrize(("parser", "action"), numeric_arguments())
def test_numbers_have_bounds(parser, action):
    """One line names the argument and, of what is a number, its bounds."""
    flag, count = action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1
    for text in (str(10**18), "9" * 400, "9" * 5000, "1e308", "inf", "nan", *["-1"] * (flag != "--mean")):
        with pytest.raises(UserError, match=f"argument {flag}: ") as raised:
            parser.parse_args([flag, *[text] * count])
        assert "\n" not in str(raised.value)
        if text == str(10**18):
            assert re.search(r"is not (at least|above) [\d.e-]+ and at most [\d.]+$", str(raised.value))


def test_there_are_numeric_arguments():
    """The table above does not become empty without a word."""
    names = {param.id for param in numeric_arguments()}
    assert {"main_pretrain.py keep", "main_finetune.py freeze", "probe.py k", "bench_train.py steps"} <= names
    assert len(names) > 100


@pytest.mark.parametrize("script", [main_pretrain, main_finetune, main_detect, main_segment])
def test_help_names_every_flag_and_model(script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.get_args_parser().parse_args(["--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert "--weight_decay" in shown
    assert all(name in shown for name in SIZES)


@pytest.mark.parametrize(
    "script",
    [
        *(main_pretrain, main_finetune, main_detect, main_segment, probe, robustness),
        *(segment_knn, verdict, predict, compare),
    ],
)
def test_help_is_true_of_each_script(script):
    """Only finetuning takes values of a checkpoint; and every flag stands under a heading of its own."""
    parser = script.get_args_parser()
    assert [action.dest for action in parser._optionals._group_actions] == ["help"]
    if script in (main_pretrain, main_finetune, main_detect, main_segment):
        helps = {action.dest: action.help for action in parser._actions}
        for name in ("in_chans", "mean", "std", "exif"):
            assert ("or the checkpoint's)" in helps[name]) == (script is not main_pretrain)


LATE = "timm", "torchvision", "models_arm", "matplotlib", "tensorboard", "torch._dynamo", "sympy", "datasets", "onnx"
MISTAKES = """
import runpy, sys

late, scripts = sys.argv[1].split(), sys.argv[2:]
for script in scripts:
    sys.argv = [script, "--no_such_flag"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(script, end.code, *sorted(sys.modules.keys() & {*late}))
"""


def test_help_and_mistakes_import_little():
    """They answer within 2.5 s of CPU time, which is a matter of what is imported: the same for both."""
    command = [sys.executable, "-c", MISTAKES, " ".join(LATE), *SCRIPTS_BY_PATH]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [f"{script} 2" for script in SCRIPTS_BY_PATH]
    assert done.stderr.count(": error: ") == len(SCRIPTS_BY_PATH)
