"""The dtype of activations, and the scale of the loss with float16."""

import argparse
import logging
import math
import os
import re

import pytest
import torch
from helpers import REPOSITORY, TINY_PRETRAIN, Batches, loop_args, read_log, torchrun
from training_helpers import FAST, NotedLog, final_weights, one_weight_run, plain_sgd

import main_pretrain
from util.checkpoints import checkpoint_file
from util.errors import RunError, UserError
from util.tracking.run_log import Log
from util.training import precision
from util.training.loop import train_epoch
from util.training.run_state import Run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    """Other tests compute in the default dtype."""
    monkeypatch.setattr(precision, "_chosen", None)


@pytest.fixture
def fp16(monkeypatch):
    monkeypatch.setattr(precision, "_chosen", "fp16")


@pytest.mark.parametrize(
    ("asked", "device", "capability", "want", "said"),
    [
        (None, "cpu", None, "fp32", ""),
        (None, "cuda", (9, 0), "bf16", ""),
        (None, "cuda", (8, 0), "bf16", ""),
        (None, "cuda", (7, 5), "fp16", "this GPU does not compute in bfloat16: activations are float16"),
        ("bf16", "cuda", (7, 0), "bf16", ""),
        ("fp32", "cuda", (9, 0), "fp32", ""),
        ("fp16", "cpu", None, "fp16", ""),
    ],
)
def test_the_dtype_follows_the_flag_then_the_device(monkeypatch, caplog, asked, device, capability, want, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    args = argparse.Namespace(dtype=asked)
    with caplog.at_level(logging.INFO):
        precision.choose(args, torch.device(device))
    assert args.dtype == want
    assert said in caplog.text if said else not caplog.records
    want = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[want]
    assert precision.activation_dtype(torch.device(device)) == want
    with precision.autocast(CPU):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == want


def test_the_scale_follows_that_of_torch(fp16):
    """After each of 30 updates, with a growth every third: state by state, as saved."""
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    own = precision.LossScale()
    own.load_state_dict(scaler.state_dict())
    own.start(CPU)
    parameter = torch.nn.Parameter(torch.ones(()))
    optimizer = plain_sgd([parameter])
    for step in range(30):
        overflows = step in (4, 5, 9, 22)
        parameter.grad = None
        scaler.scale(parameter * (math.inf if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        own.update(torch.tensor(float(overflows)))
        assert own.state_dict() == scaler.state_dict()
    assert own.state_dict()["scale"] == 2.0**20
    torch.amp.GradScaler("cpu").load_state_dict(own.state_dict())
    torch.testing.assert_close(own.scaled(torch.tensor(3.0)), 3 * own.scale)


def test_an_overflow_halves_the_scale_and_trains_on(fp16):
    """The gradient of w * 5 overflows float16 above 65504 / 5 = 13101: three updates are skipped, and none counts."""
    log = NotedLog()
    weight, _ = one_weight_run([5.0] * 5, log=log, max_nonfinite=1)
    assert weight == 1 - 5 - 5
    assert log.said == [
        "epoch 0, batch 4: skipped updates with a non-finite gradient: 3; the loss is scaled by 8192 now"
    ]
    assert (log.points[-1]["loss_scale"], log.points[-1]["grad_norm"]) == (8192, 5)


def test_gradients_are_clipped_and_accumulated_as_without_a_scale(fp16):
    # the first update is skipped: 2^16 itself overflows
    assert one_weight_run([0.5] * 4, clip_grad=0.25)[0] == pytest.approx(1 - 3 * 0.25, rel=1e-4)
    weight, _ = one_weight_run([0.5, 0.25] * 3, accum_iter=2)
    assert weight == 1 - 2 * 0.375


def test_small_gradients_do_not_vanish(fp16):
    """2^-26 is zero in float16; scaled by 2^16 it is not."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    run = Run(loop_args(), model, plain_sgd(model.parameters()))
    train_epoch(model, Batches([torch.tensor([[1.0]])]), lambda x: 2.0**-26 * model(x).float().mean(), run, CPU, Log())
    assert model.weight.item() == -(2.0**-26)


def test_a_gradient_that_no_scale_mends_ends_the_run(fp16, tmp_path):
    """2^16 is halved 16 times; then three updates in a row count, and the run ends."""
    log = NotedLog()
    with pytest.raises(RunError, match="not finite in 3 updates in a row, from batch 16 of epoch 0"):
        one_weight_run([math.nan] * 20, log=log, output_dir=str(tmp_path))
    state = checkpoint_file.read(tmp_path / "nonfinite-epoch0-batch16" / "state.pth")
    assert state["scaler"]["scale"] == precision.FLOOR == 1.0
    assert one_weight_run([math.nan] * 18)[0] == 1  # 16 that do not count, and two


PROCESSES = """
import argparse, math, torch
from helpers import Batches, loop_args
from util.distributed.parallel import distribute, full_tensor
from util.distributed.processes import end_groups, init_device, rank
from util.tracking.run_log import Log
from util.training import precision
from util.training.run_state import Run
from util.training.loop import train_epoch

device = init_device("cpu")
precision.choose(argparse.Namespace(dtype="fp16"), device)
for sharded in (False, True):
    bare = torch.nn.Linear(1, 2, bias=False)
    torch.nn.init.ones_(bare.weight)
    samples = [[1.0, 1.0, 0.5, 0.5], [1.0, 1e5, 0.5, 0.5]][rank()]  # 1e5 is infinite in float16
    loader = Batches(*([torch.tensor([[sample]])] for sample in samples))
    model = distribute(bare, device, sharded)
    run = Run(loop_args(lr=0.1, min_lr=0.1), bare, torch.optim.AdamW(bare.parameters(), lr=0.1, fused=True))
    train_epoch(model, loader, lambda x: model(x).float().mean(), run, device, Log())
    weights = full_tensor(bare.weight.detach()).flatten().tolist()
    print(f"rank {rank()}, sharded {sharded}: {weights}, scale {run.content()['scaler']['scale']}\\n", end="")
end_groups()
"""


def test_processes_scale_alike(tmp_path, monkeypatch):
    """An overflow on one of two processes halves the scale on both, with DDP and with FSDP."""
    (tmp_path / "script.py").write_text(PROCESSES)
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
    out = torchrun(tmp_path / "script.py")
    alone = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([alone], lr=0.1, fused=True)
    for sample in (1.0, 0.5, 0.5):  # the second update is skipped
        alone.grad = torch.tensor(sample / 2)  # the mean over two outputs
        optimizer.step()
    for rank in (0, 1):
        for sharded in (False, True):
            found = re.search(rf"rank {rank}, sharded {sharded}: \[(.*), (.*)\], scale 32768.0", out)
            assert [float(number) for number in found.groups()] == pytest.approx([alone.item()] * 2, rel=1e-6), out


@pytest.fixture(scope="module")
def run_with(image_folder, tmp_path_factory):
    """Pretrain for two epochs of three updates; the scale doubles after every second one."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, *more):
        words = [
            *TINY_PRETRAIN,
            "--norm_pix_loss",
            *FAST,
            "--batch_size",
            8,
            "--vis_freq",
            0,
            "--data_path",
            image_folder,
        ]
        words = [str(word) for word in (*words, "--output_dir", folder / name, *more)]
        with pytest.MonkeyPatch.context() as patch:
            init = precision.LossScale.__init__

            def often(self):
                init(self)
                self.factors["growth_interval"] = 2

            patch.setattr(precision.LossScale, "__init__", often)
            main_pretrain.main(main_pretrain.get_args_parser().parse_args(words))
        return folder / name

    return run


def test_losses_equal_those_of_float32(run_with):
    """They differ by the rounding of the activations; the scale doubles thrice, which the checkpoint keeps."""
    full = read_log(run_with("fp32", "--dtype", "fp32"))
    assert full == read_log(run_with("default"))
    for dtype, scale in (("fp16", 2.0**19), ("bf16", 2.0**16)):
        folder = run_with(dtype, "--dtype", dtype)
        for got, want in zip(read_log(folder), full, strict=True):
            assert got["train_loss"] != want["train_loss"]
            assert got["train_loss"] == pytest.approx(want["train_loss"], rel=2e-3)
        content = checkpoint_file.read(folder / "checkpoint-last.pth")
        assert (content["args"].dtype, content["scaler"]["scale"]) == (dtype, scale)


def test_a_resumed_run_equals_the_uninterrupted_one(run_with):
    """Bitwise, with the scale and the number of updates since it was doubled."""
    whole = run_with("whole", "--dtype", "fp16")
    half = run_with("half", "--dtype", "fp16", "--resume", whole / "checkpoint-0.pth")
    before, got, want = (
        checkpoint_file.read(path / name)
        for path, name in ((whole, "checkpoint-0.pth"), (half, "checkpoint-last.pth"), (whole, "checkpoint-last.pth"))
    )
    assert (before["scaler"]["scale"], before["scaler"]["_growth_tracker"]) == (2.0**17, 1)
    assert got["scaler"] == want["scaler"]
    for name, value in final_weights(whole).items():
        assert torch.equal(got["model"][name], value), name
    assert read_log(half) == read_log(whole)[1:]
    run_with("other", "--dtype", "fp32", "--resume", whole / "checkpoint-0.pth")  # rounding is not another run


@pytest.mark.parametrize("change", [{"scale": -1.0}, {"scale": math.nan}, {"_growth_tracker": 1.5}, None])
def test_a_damaged_scale_is_refused(run_with, tmp_path, change):
    content = checkpoint_file.read(run_with(f"before {change}") / "checkpoint-0.pth")
    content["scaler"] = [1.0] if change is None else content["scaler"] | change
    torch.save(content, tmp_path / "damaged.pth")
    with pytest.raises(UserError, match="impossible values of scaler"):
        run_with(f"after {change}", "--resume", tmp_path / "damaged.pth")
