"""The choice of a backend: what is available, what each computes, what takes over; the adapter to mamba-ssm."""

import importlib
import logging
import re
import subprocess
import sys
import types

import pytest
import torch
from scan_helpers import assert_same, conv_inputs, public, random_order, scan_inputs

import ops
from ops import BackendUnavailable, backends, naive
from ops.backends import cpu_backend, triton_backend

GPU = torch.device("cuda")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_unknown_backend():
    message = "unknown backend 'fast'; choose from auto, cpu, cuda, triton, mamba_ssm, torch, export"
    with pytest.raises(ValueError, match=message):
        ops.check_backend("fast")
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(**scan_inputs(), backend="fast")


@pytest.mark.parametrize("package", ["mamba_ssm", "causal_conv1d"])
def test_missing_cuda_packages(package, fresh, monkeypatch):
    stand_in_packages(monkeypatch)
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match=f"{package}.*pip install --no-build-isolation -r requirements-cuda"):
        ops.check_backend("mamba_ssm")
    ops.check_backend("auto")
    ops.check_backend("torch")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PATH", "", r"no C compiler found \(looked for cc, gcc, clang"),
        ("CC", "no-such-cc -O1", r"looked for no-such-cc -O1"),
        ("CC", "'", r"looked for '"),
        ("CC", "false", "`false -O3 .*`: exit status 1"),
        ("NATIVE", "-march=no-such-cpu", "no-such-cpu"),
    ],
)
def test_missing_compiler(name, value, message, fresh, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    if name == "NATIVE":
        monkeypatch.setattr(cpu_backend, name, value)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendUnavailable, match=message) as error:
        ops.check_backend("cpu")
    assert "\n" not in str(error.value)
    with pytest.raises(BackendUnavailable, match=message):
        ops.causal_conv1d(**conv_inputs(), backend="cpu")
    with caplog.at_level(logging.INFO, "arm"):
        for _ in range(3):
            assert ops.choose_backend("auto", torch.device("cpu"), torch.float32, 32) == "torch"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert ops.unavailable("cpu") in record.message


def test_odd_values_of_cc(fresh, monkeypatch, tmp_path):
    """A blank $CC counts as unset; a file that is no program is named, without an install hint."""
    monkeypatch.setenv("CC", " ")
    assert cpu_backend._compiler() in [[name] for name in cpu_backend.COMPILERS]
    program = tmp_path / "cc"
    program.write_text("nothing")
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    with pytest.raises(BackendUnavailable, match=f"{program} .*`: Exec format error$"):
        ops.check_backend("cpu")


@pytest.mark.parametrize(("rank", "logged"), [(None, 1), ("0", 1), ("1", 0)])
def test_the_choice_is_logged_once_by_rank_0(rank, logged, fresh, monkeypatch, caplog):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO, "arm"):
        for _ in range(3):
            assert ops.choose_backend("auto", torch.device("cpu"), torch.float32, 32) == "cpu"
    assert [record.levelname for record in caplog.records] == ["INFO"] * logged


@pytest.mark.parametrize(
    ("device", "dtype", "width", "missing", "expected"),
    [
        ("cpu", torch.float32, 32, [], "cpu"),
        ("cpu", torch.float32, 32, ["cpu"], "torch"),
        ("cpu", torch.float64, 32, [], "torch"),
        ("cpu", torch.bfloat16, 32, [], "torch"),
        ("cuda", torch.float32, 768, [], "triton"),
        ("cuda", torch.bfloat16, 768, [], "triton"),
        ("cuda", torch.bfloat16, 768, ["triton"], "mamba_ssm"),
        ("cuda", torch.bfloat16, 768, ["triton", "mamba_ssm"], "torch"),
        ("cuda", torch.bfloat16, 100, [], "mamba_ssm"),
        ("cuda", torch.float64, 768, [], "torch"),
        ("mps", torch.float32, 32, [], "torch"),
    ],
)
def test_auto(device, dtype, width, missing, expected, fresh, monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "unavailable", lambda name: f"no {name} here" if name in missing else None)
    monkeypatch.setattr(backends, "faster", lambda name, device: False)
    with caplog.at_level(logging.INFO, "arm"):
        assert ops.choose_backend("auto", torch.device(device), dtype, width) == expected
    assert ops.choose_backend("torch", torch.device(device), dtype, width) == "torch"
    (record,) = caplog.records
    assert f"{dtype} on {device}: {expected}" in record.message
    if expected == "triton":
        assert ops.choose_backend("auto", torch.device(device), dtype, width, 12) == "mamba_ssm"
    assert all(f"{name}: no {name} here" in record.message for name in missing)
    assert record.levelname == ("WARNING" if missing and expected == "torch" else "INFO")


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "width", "what"),
    [
        ("cpu", "cpu", torch.float64, 32, "torch.float64 on cpu"),
        ("cpu", "cpu", torch.bfloat16, 32, "torch.bfloat16 on cpu"),
        ("cpu", "cuda", torch.float32, 32, "torch.float32 on cuda"),
        ("mamba_ssm", "cpu", torch.float32, 32, "torch.float32 on cpu"),
        ("mamba_ssm", "cuda", torch.float64, 32, "torch.float64 on cuda"),
        ("triton", "cpu", torch.float32, 32, "torch.float32 on cpu"),
        ("triton", "cuda", torch.float64, 32, "torch.float64 on cuda"),
        ("triton", "cuda", torch.float32, 100, "100 channels (not a multiple of 32)"),
    ],
)
def test_a_requested_backend_refuses_other_tensors(backend, device, dtype, width, what, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    with pytest.raises(TypeError, match=re.escape(f"'{backend}' does not compute {what}: use backend 'torch'")):
        ops.choose_backend(backend, torch.device(device), dtype, width)


def test_the_choice_is_made_in_one_place(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "choose_backend", lambda *request: asked.append(request) or "torch")
    monkeypatch.setattr(cpu_backend, "load", None)
    ops.selective_scan(**scan_inputs(), backend="cpu")
    ops.causal_conv1d(**conv_inputs())
    given = torch.device("cpu"), torch.float32, 32
    assert asked == [("cpu", *given, 16), ("auto", *given)]  # 16 states


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("whole", "from ops.naive import causal_conv1d, selective_scan"),
        ("kernels", "from ops.backends.torch_backend import conv_backward, conv_forward\n"
                    "from ops.backends.torch_backend import scan_backward, scan_forward, scan_states"),
    ],
)  # fmt: skip
def test_a_new_backend_is_one_file_and_one_line(name, functions, fresh, monkeypatch, tmp_path, caplog):
    (tmp_path / f"{name}_backend.py").write_text(f"""
import torch
{functions}

INSTALL = "new-kernels"

def load():
    import new_kernels

def misfit(device, dtype, width, states):
    return None if dtype == torch.float64 else f"{{dtype}} on {{device.type}}"
""")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    monkeypatch.setattr(backends, "BACKENDS", {"auto": [], name: ["cpu"], **backends.BACKENDS})
    monkeypatch.setitem(sys.modules, "new_kernels", types.ModuleType("new_kernels"))
    for op, inputs in (("selective_scan", scan_inputs), ("causal_conv1d", conv_inputs)):
        assert_same(op, public(op, name), inputs(dtype=torch.float64), random_order(4, 37))
    with pytest.raises(TypeError, match=rf"'{name}' does not compute torch\.float32 on cpu: use backend 'torch'"):
        public("causal_conv1d", name)(**conv_inputs())
    with caplog.at_level(logging.INFO, "arm"):
        for dtype, chosen in ((torch.float64, name), (torch.float32, "cpu")):
            assert ops.choose_backend("auto", torch.device("cpu"), dtype, 32) == chosen
            assert caplog.messages[-1] == f"scan backend for {dtype} on cpu: {chosen}"
    monkeypatch.setitem(sys.modules, "new_kernels", None)
    ops.unavailable.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"new_kernels.*; to install it: pip install new-kernels$"):
        ops.check_backend(name)


def test_importing_ops_imports_neither_triton_nor_the_compiler():
    script = "import sys, ops.fused; print({'triton', 'torch._dynamo', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    ours, theirs = backends.constant(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs)


# ---- the CUDA kernels and their fallback ----


@pytest.fixture
def pretends(monkeypatch):
    """Pretend that every backend works, on a device that does not exist."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    backends._log_once.cache_clear()
    yield
    backends._log_once.cache_clear()


@pytest.mark.usefixtures("pretends")
def test_auto_uses_it_where_it_is_measured_to_be_faster(monkeypatch):
    for measured in (False, True):
        monkeypatch.setattr(backends, "faster", lambda name, device, measured=measured: measured)
        first = "cuda" if measured else "triton"
        assert ops.choose_backend("auto", GPU, torch.bfloat16, 768, 16) == first
        assert ops.choose_backend("auto", GPU, torch.bfloat16, 768) == first  # the convolution
        assert ops.choose_backend("auto", GPU, torch.float32, 768) == "triton"
        assert ops.choose_backend("auto", GPU, torch.bfloat16, 768, 8) == "triton"
        assert ops.choose_backend("auto", GPU, torch.bfloat16, 100) == "mamba_ssm"
        assert ops.choose_backend("cuda", GPU, torch.bfloat16, 768, 16) == "cuda"
    monkeypatch.setattr(backends, "unavailable", lambda name: "no NVRTC" if name == "cuda" else None)
    assert ops.choose_backend("auto", GPU, torch.bfloat16, 768, 16) == "triton"


@pytest.mark.usefixtures("pretends")
@pytest.mark.parametrize(
    ("dtype", "states", "what"),
    [
        (torch.float32, 16, "torch.float32 on cuda"),
        (torch.float16, 16, "torch.float16"),
        (torch.bfloat16, 8, "8 states"),
    ],
)
def test_requested_by_name_it_leaves_the_rest_to_triton(dtype, states, what, caplog):
    with caplog.at_level("INFO", "arm"):
        for _ in range(3):
            assert ops.choose_backend("cuda", GPU, dtype, 768, states) == "triton"
    (message,) = caplog.messages
    assert message.startswith(f"scan backend cuda does not compute {what}")
    assert message.endswith(": triton does")


@pytest.mark.usefixtures("pretends")
@pytest.mark.parametrize(
    ("device", "dtype", "width", "what"),
    [
        (GPU, torch.float64, 32, "torch.float64 on cuda"),
        (GPU, torch.bfloat16, 100, "100 channels (not a multiple of 32)"),
        (torch.device("cpu"), torch.bfloat16, 32, "torch.bfloat16 on cpu"),
    ],
)
def test_what_triton_does_not_compute_either(device, dtype, width, what):
    with pytest.raises(TypeError, match=re.escape(f"'cuda' does not compute {what}: use backend 'torch'")):
        ops.choose_backend("cuda", device, dtype, width)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("rank", "dt_dtype", "taken"), [(48, None, "cuda"), (12, None, "triton"), (48, torch.float32, "triton")]
)
def test_rows_that_are_not_aligned_are_left_to_triton(rank, dt_dtype, taken, compiled, monkeypatch, caplog):
    """B and C lie in one row with `rank` other numbers: 12 in arm_tiny, whose rows are not aligned."""
    backends._log_once.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(ops, "choose_backend", lambda name, *rest: name)
    seen, triton = [], triton_backend.scan_forward
    for name in ("cuda", "triton"):
        module = backends.backend_module(name)
        monkeypatch.setattr(module, "scan_forward", lambda *args, name=name: seen.append(name) or triton(*args))
        monkeypatch.setattr(module, "scan_states", triton_backend.scan_states)
    projected = torch.randn(1, 2, 3, rank + 32).bfloat16()
    inputs = {name: leaf.detach() for name, leaf in scan_inputs(K=1, L=3, varying=torch.bfloat16).items()}
    inputs |= {"dt": inputs["dt"].to(dt_dtype or torch.bfloat16)}
    inputs |= dict(zip(("B", "C"), projected.split([rank, 16, 16], dim=-1)[1:], strict=True))

    def compute():
        return ops.selective_scan(**inputs, backend="cuda")

    if compiled:
        compute = torch.compile(compute, fullgraph=True, backend="aot_eager")
    with caplog.at_level("INFO", "arm"):
        for _ in range(2):
            compute()
    assert seen == [taken] * 2
    said = [message for message in caplog.messages if "does not compute" in message]
    assert len(said) == (taken == "triton")


# ---- the adapter to mamba-ssm, with stand-ins that insist on what the CUDA kernels insist on ----


def stand_in_packages(monkeypatch):
    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert u.dtype == delta.dtype == B.dtype == C.dtype
        assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
        assert all(x.stride(-1) == 1 for x in (u, delta, B, C))
        assert u.shape[1:] == (len(A), u.shape[-1])
        assert B.shape == C.shape == (len(u), A.shape[1], u.shape[2])
        assert z is None
        assert delta_softplus
        inputs = (x[None] for x in (u.mT, delta.mT, A, B.mT, C.mT, D, delta_bias))
        return naive.selective_scan(*inputs)[0].mT

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        assert 2 <= weight.shape[1] <= 4
        assert weight.dtype == bias.dtype
        assert x.stride(-1) == 1
        assert activation == "silu"
        return naive.causal_conv1d(x.mT, weight[None], bias[None])[0].mT

    scan = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
    modules = {"mamba_ssm": types.ModuleType("mamba_ssm"), "mamba_ssm.ops": types.ModuleType("mamba_ssm.ops")}
    modules["mamba_ssm.ops.selective_scan_interface"] = scan
    modules["causal_conv1d"] = types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ops.backends.mamba_ssm_backend", raising=False)


@pytest.mark.parametrize(("K", "ordered"), [(1, False), (4, True)])
@pytest.mark.parametrize("varying", [torch.float32, torch.bfloat16])
def test_mamba_ssm_adapter(K, ordered, varying, fresh, monkeypatch):
    stand_in_packages(monkeypatch)
    adapter = importlib.import_module("ops.backends.mamba_ssm_backend")
    assert ops.unavailable("mamba_ssm") is None
    order = random_order(K, 37) if ordered else None
    scan = {**scan_inputs(K=K, varying=varying)}
    if varying == torch.bfloat16:
        scan["C"] = scan["C"].detach().float().requires_grad_()  # autocast may leave any mixture
    assert_same("selective_scan", adapter.selective_scan, scan, order)
    for W in (1, 2, 4, 5):
        assert_same("causal_conv1d", adapter.causal_conv1d, conv_inputs(K=K, W=W, varying=varying), order)
