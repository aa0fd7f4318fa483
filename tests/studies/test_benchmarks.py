"""Run the benchmarks at toy size: check what they print and write, and that they reject mistakes."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import relative_error

import mamba
from benchmarks import (
    bench_augment,
    bench_data,
    bench_losses,
    bench_ops,
    bench_resilience,
    bench_scan,
    bench_train,
    released,
)
from demo import compare_loaders, watch_cost
from mamba import FOUR_DIRECTIONS, ONE_DIRECTION, Block, scan_orders
from ops import fused
from ops.backends import cuda_backend, torch_backend, triton_backend
from ops.fused import triton_randaugment
from util import hardware
from util.errors import RunError


def run(benchmark, *argv):
    benchmark.main(benchmark.get_args_parser().parse_args([str(word) for word in ("--device", "cpu", *argv)]))


# ---- scan ----


def test_scan(tmp_path, capsys):
    output = tmp_path / "new" / "scan.json"
    run(bench_scan, "--sizes", "1,2,8,5,4", "2,1,3,1,16", "--repetitions", 1, "--output", output)
    report, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert {"date", "torch", "cpu", "threads"} <= report.keys()
    assert [result["size"] for result in report["results"]] == [
        {"K": 1, "B": 2, "D": 8, "L": 5, "N": 4},
        {"K": 2, "B": 1, "D": 3, "L": 1, "N": 16},
    ]
    names = {"reference loop", "torch", "cpu"} | ({"mambapy"} if importlib.util.find_spec("mambapy") else set())
    for result in report["results"]:
        us = result["microseconds"]
        assert us.keys() == names
        for name, parts in us.items():
            assert parts["both"] >= 0.9 * (parts["forward"] + parts["backward"]) > 0
            assert name in printed
            assert f"{parts['backward']:.1f}" in printed
        for name, ratio in result["times_faster_than_mambapy"].items():
            assert ratio == pytest.approx(us["mambapy"]["both"] / us[name]["both"])


def test_scan_without_mambapy(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mambapy", None)
    run(bench_scan, "--sizes", "1,1,4,3,4", "--repetitions", 1, "--output", tmp_path / "scan.json")
    assert "pip install mambapy" in capsys.readouterr().out


def test_contestants_on_a_gpu(monkeypatch):
    """Each runs with its own chunk in every round; the defaults are restored."""
    device, seen = torch.device("cuda"), []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(bench_scan.ops, "unavailable", lambda name: "not here" if name == "mamba_ssm" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_backend, "CHUNK", 8)
    monkeypatch.setattr(cuda_backend, "CHUNKS", {(9, 0): 8})

    def scan(*inputs, backend):
        seen.append((backend, {"triton": triton_backend.CHUNK, "cuda": cuda_backend.CHUNKS[9, 0]}.get(backend)))

    monkeypatch.setattr(bench_scan.ops, "selective_scan", scan)
    u, A = (SimpleNamespace(device=device, dtype=torch.bfloat16, shape=shape) for shape in ((768,), (16,)))
    for _ in range(2):
        found = bench_scan.contestants([u, None, A])
        assert list(found) == ["torch", "mamba_ssm", "triton chunk 4", "triton", "cuda chunk 4", "cuda"]
        assert found.pop("mamba_ssm") == "not here"
        for compute in found.values():
            compute(u)
    assert seen == 2 * [("torch", None), ("triton", 4), ("triton", 8), ("cuda", 4), ("cuda", 8)]
    assert (triton_backend.CHUNK, cuda_backend.CHUNKS) == (8, {(9, 0): 8})
    A.shape = (4,)
    assert bench_scan.contestants([u, None, A])["cuda"] == "does not compute 4 states (not 16)"


@pytest.mark.parametrize("name", ["result", "gradient"])
def test_a_wrong_backend_is_not_timed(name, tmp_path, monkeypatch):
    function = {"result": "scan_forward", "gradient": "scan_backward"}[name]
    right = getattr(torch_backend, function)

    def wrong(*args):
        first, *others = right(*args)  # y, or the gradient of u
        return first * 1.01, *others

    monkeypatch.setattr(torch_backend, function, wrong)
    with pytest.raises(RunError, match=f"torch is wrong.*: {'y' if name == 'result' else 'u'} differs"):
        run(bench_scan, "--sizes", "1,2,8,5,4", "--output", tmp_path / "scan.json")


@pytest.mark.parametrize("answers", [True, False])
def test_a_backend_that_fails_is_not_timed(answers, tmp_path, monkeypatch):
    """The others are timed, unless the GPU is lost."""

    def fail(*args):
        raise ValueError("it broke\nand more")

    monkeypatch.setattr(torch_backend, "scan_forward", fail)
    monkeypatch.setattr(hardware, "answers", lambda device: answers)
    output = tmp_path / "scan.json"
    with pytest.raises(RunError, match=r"torch is not timed, it fails: ValueError: it broke$"):
        run(bench_scan, "--sizes", "1,2,8,5,4", "1,2,8,6,4", "--repetitions", 1, "--output", output)
    results = json.loads(output.read_text())["results"]
    assert len(results) == (2 if answers else 1)
    assert results[0]["wrong"] == {"torch": "torch is not timed, it fails: ValueError: it broke"}
    assert ("cpu" in results[0]["microseconds"]) == answers
    assert results[0]["left_out"].get("cpu") == (None if answers else "it is right, but the GPU is lost")


# ---- images ----


def test_augment(tmp_path, capsys, monkeypatch):
    """Both forms are timed; without a GPU the kernels are interpreted, and there is one clock."""
    monkeypatch.setattr(fused, "_USED", set())  # set by the benchmark
    output = tmp_path / "augment.json"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    words = ["--device", device, "--batch_size", 4, "--input_size", 8, "--rounds", 1, "--output", output]
    run(bench_augment, *words)
    report, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert {"date", "torch", "cpu", "threads"} <= report.keys()
    assert report["forms"].keys() == {"torch", "triton"}
    clocks = {"ms_per_image"}
    if device == "cuda":
        clocks |= {"host_ms_per_image", "event_ms_per_image", "launches"}
    for rows in report["forms"].values():
        assert rows.keys() == {"with_erasing", "without_erasing"}
        for row in rows.values():
            assert row.keys() == clocks
            assert min(row.values()) > 0
            assert f"{row['ms_per_image']:.4g}" in printed


def test_a_form_of_augmentation_that_is_wrong_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "_USED", set())
    monkeypatch.setattr(triton_randaugment, "carry_out", lambda images, notes, fill: images + 1)
    with pytest.raises(RuntimeError, match="the two forms of RandAugment differ"):
        run(bench_augment, "--batch_size", 4, "--input_size", 8, "--output", tmp_path / "augment.json")


def test_epochs_with_and_without_the_devices_part(jpeg_folder):
    loader = bench_data.loader_of("finetune", bench_data.CPU, jpeg_folder, "--batch_size", 8, "--num_workers", 0)
    finish, calls = loader.finish, []
    loader.finish = lambda *batch: calls.append(batch) or finish(*batch)
    assert (bench_data.epochs_of(loader)(), len(calls)) == (24, 0)
    assert (bench_data.epochs_of(loader, finished=True)(), len(calls)) == (24, 3)


# ---- fused operators ----


@pytest.fixture
def swiglu_otherwise(monkeypatch):
    """Replace the fused SwiGLU: other operators compute the activation times `factor`."""
    plain, form = mamba.SwiGLU.forward, SimpleNamespace(factor=1.0)

    def forward(mlp, x):
        if not fused.uses("swiglu"):
            return plain(mlp, x)
        gate = mlp.w1(x)
        return mlp.w3(gate * gate.sigmoid() * mlp.w2(x) * form.factor)

    monkeypatch.setattr(fused, "_USED", set())
    monkeypatch.setattr(mamba.SwiGLU, "forward", forward)
    bench_ops.missing.cache_clear()
    yield form
    bench_ops.missing.cache_clear()


WORDS = "--device cpu --sizes pretraining_toy finetuning_toy --repetitions 2 --operators".split()


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on a CPU")
def test_operators(tmp_path, capsys, swiglu_otherwise):
    run(bench_ops, *WORDS, "swiglu", "--output", tmp_path / "ops.json")
    report, printed = json.loads((tmp_path / "ops.json").read_text()), capsys.readouterr().out
    assert [row["size"] for row in report["results"]] == ["pretraining_toy", "finetuning_toy"]
    for row in report["results"]:
        assert row["microseconds"].keys() == row["largest_error"].keys() == {"compiled", "fused"}
        assert max(row["largest_error"].values()) < 1e-5
        for us in row["microseconds"].values():
            assert us["both"] >= 0.9 * (us["forward"] + us["backward"]) > 0
            assert us["spread"] >= 0
            assert f"{us['both']:.1f}" in printed
    assert fused.use(["none"], torch.device("cpu")) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on a CPU")
def test_an_operator_that_is_wrong_is_not_timed(tmp_path, swiglu_otherwise):
    swiglu_otherwise.factor = 1.01
    with pytest.raises(RunError, match=r"swiglu, pretraining_toy: the fused form is wrong: output differs by 1\.0e-02"):
        run(bench_ops, *WORDS, "swiglu", "--output", tmp_path / "ops.json")
    rows = json.loads((tmp_path / "ops.json").read_text())["results"]
    assert all("microseconds" not in row for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on a CPU")
@pytest.mark.parametrize("operator", bench_ops.OPERATORS)
def test_bricks(operator):
    """Each brick computes the same with the Triton backend, interpreted, as in float64 with torch's."""
    device = torch.device("cpu")
    for size in ("pretraining_toy", "finetuning_toy"):
        module, inputs = bench_ops.brick(operator, bench_ops.SIZES[size], "triton", device)
        errors = bench_ops.check(operator, bench_ops.SIZES[size], {"compiled": module}, module, inputs)
        assert len(errors["compiled"]) == 2 + len(list(module.parameters()))


def test_operators_after_one_that_fails(tmp_path, monkeypatch, capsys):
    def missing(operator, device):
        if operator == "swiglu":
            raise ValueError("it broke\nand more")
        return "it is not there"

    monkeypatch.setattr(bench_ops, "missing", missing)
    with pytest.raises(RunError, match="swiglu, pretraining_toy: it fails: ValueError: it broke;"):
        run(bench_ops, *WORDS, "swiglu", "conv", "--output", tmp_path / "ops.json")
    rows = json.loads((tmp_path / "ops.json").read_text())["results"]
    assert [row.get("wrong") or row["left_out"] for row in rows] == 2 * [
        "it fails: ValueError: it broke", "it is not there"
    ]  # fmt: skip
    assert "and more" in capsys.readouterr().err
    assert bench_train.unavailable("swiglu", torch.device("cpu")) == "it fails: ValueError: it broke"


def test_an_operator_that_is_not_there(swiglu_otherwise, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(fused, "uses", lambda name: False)
    assert "there is no such operator" in bench_ops.missing("swiglu", device)
    bench_ops.missing.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        assert "the model is on cpu" in bench_ops.missing("swiglu", device)


# ---- losses ----


def test_losses(tmp_path, capsys, monkeypatch):
    """Forms with equal kernels have equal losses; an error of a thousandth in a kernel is found."""
    output = tmp_path / "losses.json"
    words = ["--cases", "pretrain_toy", "--steps", 3, "--batch_size", 2, "--output", output, "--forms"]
    right, calls = torch_backend.scan_forward, []

    def switched(name, device, compiled, without):
        calls.append(name)
        if name == "norm":
            return "it is not there"
        monkeypatch.setattr(torch_backend, "scan_forward", off if name == "cuda" else right)
        return bench_train.Composition("torch", False, False, False, [])

    def off(*args):
        y, *others = right(*args)
        return y * 1.001, *others

    monkeypatch.setattr(bench_losses, "switched", switched)
    run(bench_losses, *words, "again", "eager", "cuda", "norm")
    rows = {row["form"]: row for row in json.loads(output.read_text())["results"]}
    assert calls == ["none", "none", "none", "cuda", "norm"]
    assert [len(rows["none"][key]) for key in ("loss", "grad_norm")] == [3, 3]
    assert rows["none"]["loss"] == rows["again"]["loss"] == rows["eager"]["loss"]
    assert len(set(rows["none"]["loss"])) == 3  # it trains
    assert rows["again"]["difference"] == {"loss": 0, "grad_norm": 0}
    assert rows["cuda"]["difference"]["grad_norm"] > 0
    assert rows["cuda"]["within_rounding"] is False
    assert rows["norm"]["left_out"] == "it is not there"
    assert "left out: it is not there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("benchmark", "words", "message"),
    [
        (bench_scan, "--sizes 1,2,3,4", "argument --sizes: '1,2,3,4' is not K,B,D,L,N, five positive numbers"),
        (bench_scan, "--sizes 1,1,2,3,0", "argument --sizes: '1,1,2,3,0' is not K,B,D,L,N"),
        (bench_scan, "--sizes a,b,c,d,e", "argument --sizes: invalid size value: 'a,b,c,d,e'"),
        (bench_scan, "--sizes 99999,99999,99999,99999,16", "of a product up to"),
        (bench_scan, "--device cuda:-1", "--device cuda:-1: cuda and cpu are supported"),
        (bench_scan, "--device meta", "--device meta: cuda and cpu are supported"),
        (bench_scan, "--device cpu --output /dev/null/x.json", "--output /dev/null/x.json cannot be written"),
        (bench_train, "--device cuda:999", "--device cuda:999: "),
        (bench_train, "--device cpu --cases pretrain_huge9", "invalid choice: 'pretrain_huge9'"),
        (bench_train, "--device cpu --output /proc/x/y.json", "--output /proc/x/y.json cannot be written"),
        (bench_train, "--device cpu --profile /dev/null", "--profile /dev/null cannot be written"),
        (bench_train, "--device cpu --switches conv2", "invalid choice: 'conv2'"),
        (bench_train, "--device cpu --without all", "invalid choice: 'all'"),
        (bench_losses, "--device cpu --without none", "invalid choice: 'none'"),
        (bench_scan, "--device cpu --contestants tron", "--contestants tron: there are reference loop, mambapy"),
        (bench_ops, "--device cpu --operators augment", "invalid choice: 'augment'"),
        (bench_ops, "--device cpu --repetitions 0", "argument --repetitions: 0 is not at least 1"),
        (bench_ops, "--device cpu --output /dev/null/x.json", "cannot be written"),
        (bench_losses, "--device cpu --forms none", "invalid choice: 'none'"),
        (bench_losses, "--device cpu --output /dev/null/x.json", "cannot be written"),
        (bench_resilience, "--case pretrain_toy --output /dev/null/x.json", "cannot be written"),
        (bench_augment, "--batch_size 0", "argument --batch_size: 0 is not at least 1"),
        (bench_augment, "--output /dev/null/x.json", "cannot be written"),
        (bench_data, "--data_path /nowhere", "/nowhere"),
        (bench_data, "--parts loading --output /dev/null/x.json", "cannot be written"),
        (bench_data, "--images 2", "argument --images: 2 is not at least 4 and at most 1000000"),
        (compare_loaders, "--seeds 1", "argument --seeds: 1 is not at least 2 and at most 1000"),
        (compare_loaders, "--output /dev/null/x.json", "cannot be written"),
        (watch_cost, "--output /dev/null/x.json", "cannot be written"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes(run_script, capsys, benchmark, words, message):
    """A mistake gives one line before anything is measured."""
    with pytest.raises(SystemExit) as exit_info:
        run_script(benchmark, *words.split())
    err = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert err.count("\n") == 1
    assert message in err


# ---- training ----


@pytest.mark.parametrize("directions", [ONE_DIRECTION, FOUR_DIRECTIONS], ids=["one", "four"])
def test_the_released_mixer_computes_the_same(directions):
    torch.manual_seed(0)
    grid = (2, 3)
    mixer = Block(32, 2, directions, "torch").double().mixer
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    order = scan_orders(grid) if len(directions) == 4 else None
    want, got = mixer(x, order), released.mix(mixer, x, grid)
    assert relative_error(got, want) < 1e-12
    parameters = [x, *mixer.parameters()]
    gradients = (torch.autograd.grad(y.square().sum(), parameters) for y in (got, want))
    for g, w in zip(*gradients, strict=True):
        assert relative_error(g, w) < 1e-10


@pytest.mark.parametrize("name", ["pretrain_toy", "finetune_toy"])
def test_the_released_model_computes_the_same(name):
    case = bench_train.CASES[name]
    model = bench_train.build(case, "torch", torch.device("cpu")).double().eval()
    imgs = torch.randn(2, 3, case.img_size, case.img_size, dtype=torch.float64)
    want = model(imgs)
    released.use_released_blocks(model)
    assert relative_error(model(imgs), want) < 1e-12


def test_training(tmp_path, capsys):
    output = tmp_path / "train.json"
    run(bench_train, "--steps", 2, "--rounds", 1, "--batch_size", 2, "--profile", "--output", output)
    report, printed = json.loads(output.read_text()), capsys.readouterr().out
    found = [(row["case"], row["composition"]) for row in report["results"]]
    assert found == [(c, k) for c in ("pretrain_toy", "finetune_toy") for k in ("ours", "released (torch)")]
    for row in report["results"]:
        assert row["images_per_second"] == pytest.approx(1000 * 2 / row["ms_per_step"])
        assert f"{row['images_per_second']:.1f}" in printed
    assert "arm::selective_scan" in printed  # the profile, by operator


def test_switches(tmp_path, capsys, monkeypatch):
    """All cases run with a switch before the next switch; later rows are measured after one that fails."""
    output, profile = tmp_path / "train.json", tmp_path / "profile.txt"

    def measure(case, how, args):
        if case.task == "finetune":
            raise ValueError("it broke\nand more")
        return right(case, how, args)

    right = bench_train.measure
    monkeypatch.setattr(bench_train, "measure", measure)
    words = ["--steps", 1, "--rounds", 1, "--batch_size", 2, "--profile", profile, "--output", output]
    with pytest.raises(RunError, match="finetune_toy, none: ValueError: it broke; finetune_toy, released: "):
        run(bench_train, *words, "--switches", "none", "cuda_graph", "released")
    rows = json.loads(output.read_text())["results"]
    found = [(row["case"], row["composition"]) for row in rows]
    assert found == [(c, k) for k in ("none", "cuda_graph", "released") for c in ("pretrain_toy", "finetune_toy")]
    assert rows[0]["fused_ops"] == []
    assert rows[0]["busy_ms_per_step"] is None
    assert rows[0]["ms_per_step_of_rounds"] == [pytest.approx(rows[0]["ms_per_step"])]
    assert rows[1]["failed"] == "ValueError: it broke"
    assert rows[4]["released_loop"]
    if not torch.cuda.is_available():
        assert rows[2]["left_out"] == "it needs a GPU with CUDA, and the model is on cpu"
    text = profile.read_text()
    assert text.startswith(f"{bench_train.PROFILE}\n\npretrain_toy, none, 1 steps\n")
    assert text.count("Self CPU time total") == 2
    assert "aten::" not in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", [bench_train, bench_losses])
def test_a_kernel_that_makes_the_gpu_unusable(benchmark, tmp_path, monkeypatch):
    """Later rows are left out and do not count as failed."""

    def fail(*args):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(benchmark, "epoch_runner", fail)
    monkeypatch.setattr(hardware, "answers", lambda device: False)
    switches = ["--switches", "none", "all"] if benchmark is bench_train else ["--forms", "all"]
    output = tmp_path / "report.json"
    with pytest.raises(RunError, match="pretrain_toy, none"):
        run(benchmark, "--cases", "pretrain_toy", "--output", output, *switches)
    rows = json.loads(output.read_text())["results"]
    assert rows[0]["failed"] == "RuntimeError: an illegal memory access"
    assert [row.get("left_out") for row in rows] == [None, "pretrain_toy, none has lost the GPU"]


def test_kernels_that_are_left_out(monkeypatch):
    """They are left out alone and in "all"."""
    monkeypatch.setattr(bench_train, "unavailable", lambda switch, device: "not here" if switch == "casts" else None)
    device, off = torch.device("cpu"), ["cuda", "norm"]
    how = bench_train.switched("all", device, True, off)
    assert how == bench_train.Composition("auto", True, False, True, ["swiglu", "conv", "projections"])
    assert [bench_train.switched(name, device, True, off) for name in off] == 2 * ["--without it"]
    assert bench_train.switched("casts", device, True, off) == "not here"
    assert bench_train.switched("cuda", device, True).backend == "cuda"
    assert bench_train.switched("none", device, True, off).fused_ops == []


def test_a_composition_by_hand(tmp_path):
    words = ["--cases", "pretrain_toy", "--steps", 1, "--rounds", 1, "--batch_size", 2, "--output", tmp_path / "t.json"]
    run(bench_train, *words, "--backend", "torch", "--no_compile", "--released_loop")
    (row,) = json.loads((tmp_path / "t.json").read_text())["results"]
    assert (row["backend"], row["compiled"], row["released_loop"]) == ("torch", False, True)


def test_operations_of_an_image():
    """Compare with the products of ARM-base counted by hand: a multiplication and an addition are two operations."""
    C, R, N, hidden, L, Cd, pixels = 768, 48, 16, 2048, 128, 512, 768
    mixer = 3 * C * C + C * (R + 2 * N) + R * C
    encoder = 144 * pixels * C + 12 * L * (mixer + 3 * C * hidden)
    attention = L * (4 * Cd * Cd + 2 * L * Cd)  # projections; scores and their sum over 128 latents
    decoder = L * 4 * C * 4 * Cd + 4 * (attention + L * 8 * Cd * Cd) + L * Cd * pixels
    counted = bench_train.flops_per_image(bench_train.CASES["pretrain_base"])
    assert counted == pytest.approx(2 * (encoder + decoder), rel=0.01)


def test_names_of_result_files():
    about = {"date": "2030-01-02", "gpu": "NVIDIA H200"}
    assert hardware.result_file("train", about) == hardware.RESULTS / "nvidia-h200-2030-01-02-train.json"
    assert hardware.result_file("scan", {"date": "2030-01-02"}).name == "cpu-2030-01-02-scan.json"
