"""--fsdp computes the same as DDP, and writes the same files."""

import re
import signal
from pathlib import Path

import pytest
import torch
from fault_helpers import Started, written
from helpers import REPOSITORY, TINY_FINETUNE, TINY_PRETRAIN, noise_images, read_log, relative_error
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

import main_pretrain
import models_arm
from Finetuning import main_finetune
from util.checkpoints import checkpoint_file
from util.distributed.parallel import full_tensor, no_sync, shard, unsharded
from util.training import resume

# 48 images, 8 an update: 6 updates an epoch of two batches each on two processes
COMMON = "--epochs 2 --warmup_epochs 1 --lr 1e-3 --save_freq 1 --batch_size 2 --accum_iter 2 --dist_timeout 30".split()
PRETRAIN = [*TINY_PRETRAIN, "--norm_pix_loss", *COMMON, *"--clip_grad 0.05 --vis_freq 1".split()]
# all that is random
FINETUNE = [*TINY_FINETUNE, *COMMON, *"--drop_path 0.3 --mixup 0.8 --cutmix 1 --reprob 0.5 --ema_decay 0.9".split()]
SCRIPT = "Finetuning/main_finetune.py"

# Pretraining, but that on rank 1 some losses are not finite: one in update 2, and all from update 9 on.
BREAKS = """
import os, sys
sys.path.insert(0, {repository!r})
import engine_pretrain, main_pretrain
from util import cli

loss_of, calls = engine_pretrain.loss_of, []

def broken_loss_of(model):
    compute_loss = loss_of(model)
    def broken(imgs, labels):
        calls.append(None)
        breaks = os.environ["RANK"] == "1" and (len(calls) == 5 or len(calls) > 18)
        return compute_loss(imgs, labels) * (float("nan") if breaks else 1)
    return broken

engine_pretrain.loss_of = broken_loss_of
cli.run_main(main_pretrain.main, main_pretrain.get_args_parser())
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Five images to validate: of two processes one has a batch more than the other."""
    root = noise_images(tmp_path_factory.mktemp("images"), train=16, height=50)
    for label in (1, 2):
        (root / "val" / f"class_{label}" / "1.png").unlink()
    return root


def on_two(folder: Path, script: object, *argv: object) -> Started:
    """Begin a script on two processes."""
    folder.mkdir(exist_ok=True)
    return Started(folder / "output.txt", script, *argv, "--output_dir", folder, processes=2)


def assert_same(got: object, want: object, where: str = "") -> None:
    """Two checkpoints: the same names in the same order, shapes and types; values within 1e-5 of a tensor's largest."""
    assert type(got) is type(want), where
    if isinstance(want, dict):
        assert list(got) == list(want), where
        for name, value in want.items():
            assert_same(got[name], value, f"{where}.{name}")
    elif isinstance(want, torch.Tensor):
        assert (got.shape, got.dtype) == (want.shape, want.dtype), where
        if "attn2.kv.bias" in where:  # the gradient of the keys' is rounding noise, which AdamW makes steps of
            got, want = got.chunk(2)[1], want.chunk(2)[1]
        assert torch.equal(got.isnan(), want.isnan()), where
        assert relative_error(got.nan_to_num(neginf=-1), want.nan_to_num(neginf=-1) + 1e-30) < 1e-5, where
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-5), where
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            assert_same(one, other, f"{where}.{i}")
    elif not where.endswith(".args"):
        assert got == want, where


def assert_same_run(folder: Path, reference: Path, name: str = "checkpoint-last.pth", epochs: int = 2) -> None:
    """Two runs end alike; of the epochs that both have, they log the same."""
    assert_same(checkpoint_file.read(folder / name), checkpoint_file.read(reference / name))
    got, want = ({row["epoch"]: row for row in read_log(path)} for path in (folder, reference))
    assert len(want) == epochs
    for epoch, row in got.items():
        assert_same(row, want[epoch], f"epoch {epoch}")


def test_pretraining(images, tmp_path, run_script):
    """Gradient accumulation and clipping. Both processes skip a non-finite update of one, draw, and end with a dump.

    From it, in the middle of an epoch, one process resumes.
    """
    (tmp_path / "breaks.py").write_text(BREAKS.format(repository=str(REPOSITORY)))
    for name, more in (("ddp", []), ("fsdp", ["--fsdp"])):
        running = on_two(tmp_path / name, tmp_path / "breaks.py", *PRETRAIN, *more, "--data_path", images)
        assert running.status() == 1, running.text
        assert "skipped updates with a non-finite gradient: 1\n" in running.text
        assert "not finite in 3 updates in a row, from batch 6 of epoch 1" in running.text
        assert any(b"image_0" in path.read_bytes() for path in (tmp_path / name).glob("events.out.tfevents.*"))
    assert_same_run(tmp_path / "fsdp", tmp_path / "ddp", epochs=1)
    state = "nonfinite-epoch1-batch6/state.pth"
    assert_same_run(tmp_path / "fsdp", tmp_path / "ddp", state, epochs=1)
    for name in ("ddp", "fsdp"):
        more = ["--data_path", images, "--batch_size", 4, "--output_dir", tmp_path / f"{name} alone"]
        run_script(main_pretrain, *PRETRAIN, *more, "--resume", tmp_path / name / state)
    assert_same_run(tmp_path / "fsdp alone", tmp_path / "ddp alone", epochs=1)


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory) -> Path:
    """Uninterrupted finetuning runs: `ddp` and `fsdp`."""
    root = tmp_path_factory.mktemp("runs")
    for name, more in (("ddp", []), ("fsdp", ["--fsdp"])):
        every = "--dist_eval --save_every_steps 2 --keep 9".split()
        running = on_two(root / name, SCRIPT, *FINETUNE, *every, *more, "--data_path", images)
        assert running.status() == 0, running.text
    return root


def in_the_middle(folder: Path) -> Path:
    """The checkpoint after the second update of epoch 1."""
    (found,) = (p for p in folder.glob("*-last-*.pth") if resume.position(checkpoint_file.read(p)) == (1, 16))
    return found


def test_finetuning(runs, images, run_script, capsys):
    """With an EMA and unequal shares of the evaluated images; one process evaluates the file with the same result."""
    assert_same_run(runs / "fsdp", runs / "ddp")
    run_script(
        main_finetune, *TINY_FINETUNE, "--eval", "--resume", runs / "fsdp" / "checkpoint-last.pth",
        "--data_path", images,
    )  # fmt: skip
    row, found = read_log(runs / "ddp")[-1], re.findall(r"top-1 ([\d.]+) %.*? loss ([\d.]+)", capsys.readouterr().out)
    assert [tuple(map(float, pair)) for pair in found] == [
        (round(row[f"{kind}test_acc1"], 2), pytest.approx(row[f"{kind}test_loss"], abs=1e-4)) for kind in ("", "ema_")
    ]


def test_resumes_from_the_other(runs, images, tmp_path):
    """From DDP in the middle of an epoch, and to it after a signal; each process evaluating all images."""
    common = [*FINETUNE, "--data_path", images]
    resume = ["--fsdp", "--resume", in_the_middle(runs / "ddp")]
    running = on_two(tmp_path / "fsdp", SCRIPT, *common, *resume)
    assert running.status() == 0, running.text
    assert_same_run(tmp_path / "fsdp", runs / "ddp")

    running = on_two(tmp_path / "stopped", SCRIPT, *common, "--fsdp", "--save_every_steps", 1)
    running.until(lambda: written(tmp_path / "stopped" / "checkpoint-last.pth"))
    assert running.signal(signal.SIGTERM).status() == 1
    assert "stopped in epoch" in running.text
    running = on_two(tmp_path / "stopped", SCRIPT, *common, "--resume", "auto")
    assert running.status() == 0, running.text
    assert "resuming from" in running.text
    assert_same_run(tmp_path / "stopped", runs / "ddp")


# ---- one process, which has all shards


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [full_tensor(p.grad) for p in model.parameters() if p.grad is not None]


@pytest.mark.usefixtures("group_of_one")
def test_compiled_blocks_have_no_graph_breaks():
    """All blocks share one graph, and gathering is outside of it, also while the model is unsharded."""
    sizes = {"img_size": 24, "patch_size": 8, "num_classes": 3, "embed_dim": 32, "depth": 12}
    torch.manual_seed(0)
    plain = models_arm.create_classifier("arm_tiny_pz16", **sizes)
    model = models_arm.create_classifier("arm_tiny_pz16", **sizes)
    model.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    counters.clear()
    shard(model, torch.device("cpu"))
    model.compile(fullgraph=True, backend="aot_eager")
    imgs = torch.randn(4, 3, 24, 24)
    for one in (plain, model):
        one(imgs).square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for got, want in zip(gradients(model), gradients(plain), strict=True):
        assert relative_error(got, want) < 1e-5
    with torch.no_grad(), unsharded(model.eval()):
        assert relative_error(model(imgs), plain.eval()(imgs)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2  # of no gradient
    torch._dynamo.reset()


@pytest.mark.usefixtures("group_of_one")
def test_images_are_drawn_before_training():
    """As when a run resumes at the end of an epoch."""
    sizes = {"img_size": 32, "patch_size": 8, "cluster_size": 2, "embed_dim": 32, "dec_embed_dim": 64, "dec_depth": 2}
    model = models_arm.create_pretrain_model("arm_tiny_pz16", **sizes, depth=4)
    imgs = torch.randn(2, 3, 32, 32)
    want = model.predicted_images(imgs)[0]
    shard(model, torch.device("cpu"))
    with unsharded(model):
        assert torch.equal(model.predicted_images(imgs)[0], want)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())  # sharded again
    model(imgs).mean().backward()
    assert len(gradients(model)) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("group_of_one")
def test_gradients_are_all_reduced_once_per_update():
    model = torch.nn.Linear(2, 1)
    shard(model, torch.device("cpu"))
    for wait in (True, True, False):
        with no_sync(model, wait):
            model(torch.ones(1, 2)).sum().backward()
        assert (model.weight.grad is None) == wait
    assert gradients(model)[0].tolist() == [[3, 3]]
