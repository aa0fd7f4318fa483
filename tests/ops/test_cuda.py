"""The CUDA kernels of the scan without a GPU: emulated against the oracle, compiled and counted, and their host code.

test_ops_gpu.py runs them where there is one.
"""

import contextlib
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import types
from functools import cache

import pytest
import torch
import triton
from helpers import REPOSITORY, TINY_PRETRAIN
from scan_helpers import kernel_resources, random_order, run, scan_inputs, threads

import main_pretrain
import ops
from mamba import scan_orders
from ops import naive, operators
from ops.backends import cuda_backend
from ops.backends.cuda_backend import Args, Variant

# Of the largest number: bfloat16 results are rounded to 8 bits, products of tensor cores (dB, dC) count to 10.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 2e-6}
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """Return a function of a variant that compiles the kernels for this CPU."""

    @cache
    def compiled(variant):
        library = tmp_path_factory.mktemp("emulation") / "kernels.so"
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *variant.definitions()]
        subprocess.run([*command, REPOSITORY / "tests" / "ops" / "cuda_emulation.cpp", "-o", library], check=True)
        return ctypes.CDLL(library)

    return compiled


@pytest.fixture
def emulate(emulator, monkeypatch, poisoned_memory):
    """Run the kernels on CPU tensors; return a function that sets the tokens per chunk, 8 at first."""

    def start(kernel, variant, blocks, args, device):
        emulator(variant).run(kernel == "scan_forward", blocks, ctypes.byref(args))

    def chunk_of(tokens):
        monkeypatch.setattr(cuda_backend, "_chunk", lambda device: tokens)

    chunk_of(8)
    monkeypatch.setattr(cuda_backend, "_start", start)
    return chunk_of


def scan(*, order=None, **tensors):
    return operators.selective_scan(*tensors.values(), order, "cuda", True)[0]


def check(order=None, views=lambda inputs: inputs, grad=torch.randn, leaves=None, **sizes):
    """Compare y and the gradients of all leaves with those of the oracle in float64."""
    leaves = leaves or scan_inputs(**sizes, varying=torch.bfloat16)
    dy = grad(views(leaves)["u"].shape).bfloat16()
    got = run(scan, leaves, order, views, dy)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    with threads(1):
        want = run(naive.selective_scan, exact, order, views, dy)
    for name, like, g, w in zip(["y", *leaves], [leaves["u"], *leaves.values()], got, want, strict=True):
        assert g.dtype == like.dtype, name
        assert g.shape == w.shape, name
        error = ((g - w).abs().max() / w.abs().max().clamp(min=1e-30)).item()
        assert error < TOLERANCE[g.dtype], f"{name} differs by {error:.1e}"


# ---- values and gradients ----


@needs_gxx
@pytest.mark.parametrize(
    ("chunk", "D", "ordered"),
    [(8, 64, False), (8, 64, True), (4, 64, True), (8, 96, False), (4, 32, False), (8, 128, True)],
)
def test_directions_chunks_and_warps(chunk, D, ordered, emulate):
    emulate(chunk)
    check(random_order(2, 21) if ordered else None, K=2, L=21, D=D)


@needs_gxx
@pytest.mark.parametrize("L", [1, 7, 8, 9, 16])
def test_lengths(L, emulate):
    check(random_order(1, L), K=1, L=L, D=64)


@needs_gxx
def test_the_four_orders_of_the_classifier(emulate):
    check(scan_orders((3, 4)), K=4, batch=1, L=13, D=64)


@needs_gxx
def test_views(emulate):
    """B and C inside one projection and in token order of their own, u shared by directions, dt with gaps."""
    K, batch, L, D, N, R = 2, 2, 9, 64, 16, 8
    torch.manual_seed(0)
    shapes = {"u": (batch, L, D), "dt": (batch, K, L, 2 * D), "B": (K, batch, L, R + 2 * N), "C": (L, K, batch, N)}
    leaves = {name: torch.randn(shape).bfloat16().requires_grad_() for name, shape in shapes.items()}
    leaves |= {name: torch.randn(shape).requires_grad_() for name, shape in {"A": (K, N, D), "D": D, "bias": D}.items()}

    def views(x):
        tensors = {"u": x["u"].expand(K, batch, L, D), "dt": x["dt"].transpose(0, 1)[..., D:], "A": -x["A"].mT.exp()}
        tensors |= {"B": x["B"][..., R : R + N], "C": x["C"].permute(1, 2, 0, 3), "D": x["D"].expand(K, D)}
        return tensors | {"dt_bias": x["bias"].expand(K, D)}

    order = random_order(K, L).T.contiguous().T  # strided too
    check(order, views, leaves=leaves)


@needs_gxx
@pytest.mark.parametrize(
    "grad",
    [
        lambda shape: torch.randn(1, *shape[1:]).expand(shape),
        lambda shape: torch.randn(*shape[:2], shape[3], shape[2]).mT,
        lambda shape: torch.ones(()).expand(shape),
        lambda shape: torch.randn(*shape[:3], shape[3] + 1)[..., 1:],
    ],
    ids=["same in all directions", "transposed", "one number", "not aligned"],
)
def test_gradients_of_results_with_strides(grad, emulate):
    check(random_order(2, 6), grad=grad, K=2, L=6)


@needs_gxx
def test_rows_that_are_not_aligned_are_copied(emulate):
    """Their layout changes after the backend was chosen; before, they are left to Triton."""

    def views(x):
        moved = {name: torch.cat([x[name][..., :1], x[name]], -1)[..., 1:] for name in ("u", "dt", "B", "C", "A")}
        return x | moved

    check(None, views, K=1, L=9)


@needs_gxx
def test_without_states(emulate):
    leaves = [leaf.detach() for leaf in scan_inputs(K=2, L=9, varying=torch.bfloat16).values()]
    (y, none), (want, _) = (operators.selective_scan(*leaves, None, "cuda", trains) for trains in (False, True))
    assert none.numel() == 0
    assert torch.equal(y, want)


@needs_gxx
def test_two_runs_are_equal_bit_for_bit(emulate):
    leaves, order = scan_inputs(K=2, L=9, D=64, varying=torch.bfloat16), random_order(2, 9)
    dy = torch.randn(leaves["u"].shape)
    for name, a, b in zip(["y", *leaves], *(run(scan, leaves, order, dict, dy) for _ in range(2)), strict=True):
        assert torch.equal(a, b), name


@needs_gxx
def test_not_a_number_shows(emulate):
    """NaN shows from its token on, only in its own channel."""
    leaves = {name: leaf.detach() for name, leaf in scan_inputs(K=1, L=11, varying=torch.bfloat16).items()}
    leaves["dt"][..., 0], leaves["dt"][..., 1] = 1e4, -1e4  # delta of 1e4 and of 0
    y, want = scan(**leaves), naive.selective_scan(**{name: leaf.double() for name, leaf in leaves.items()})
    assert ((y - want).abs().amax((0, 1, 2)) / want.abs().amax((0, 1, 2))).max() < 5e-3
    leaves["u"][0, 0, 9, 3] = leaves["dt"][0, 1, 9, 3] = float("nan")
    leaves["A"][0, 4, 2] = float("nan")
    broken = scan(**leaves).isnan()
    assert broken[:, :, 9:, 3].all()
    assert broken[..., 4].all()
    assert broken.sum() == broken[:, :, 9:, 3].sum() + broken[..., 4].sum()


@needs_gxx
@pytest.mark.parametrize("empty", ["batch", "D"])
def test_no_images_or_no_channels(empty, emulate):
    leaves = scan_inputs(K=2, L=5, varying=torch.bfloat16, **{empty: 0})
    y = scan(**leaves)
    assert y.numel() == 0
    for name, grad in zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
        assert grad.shape == leaves[name].shape, name
        assert not grad.any(), name


@needs_gxx
def test_opcheck(emulate):
    torch.use_deterministic_algorithms(False)  # it compares memory that is not filled in both runs
    inputs = [leaf.detach() for leaf in scan_inputs(K=2, L=11, D=64, varying=torch.bfloat16).values()]
    order = random_order(2, 11)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    torch.library.opcheck(operators.selective_scan, (*leaves, order, "cuda", True))
    y, states = operators.selective_scan(*inputs, None, "cuda", True)
    torch.library.opcheck(operators.selective_scan_backward, (y, *inputs, None, states, "cuda"))


def test_an_operator_called_directly_refuses_what_the_kernels_do_not_read(emulate):
    for wrong in (
        {},
        {"varying": torch.float16},
        {"varying": torch.bfloat16, "N": 8},
        {"varying": torch.bfloat16, "D": 40},
    ):
        with pytest.raises(TypeError, match="'cuda' computes only bfloat16, 16 states and multiples of 32 channels"):
            scan(**scan_inputs(K=1, L=3, **wrong))


# ---- compiling, loading and starting ----


def has_bindings():
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:  # not even `cuda`
        return False


needs_nvrtc = pytest.mark.skipif(not has_bindings(), reason="needs cuda.bindings")


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "arm-ops"


def compile_or_skip(capability, variant):
    try:
        return cuda_backend.compile_kernels(capability, variant)
    except RuntimeError as error:
        if "libnvrtc" in str(error):
            pytest.skip(f"needs NVRTC: {error}")
        raise


@needs_nvrtc
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize("capability", cuda_backend.CHUNKS)
def test_no_spills(capability, warps, ordered, own_cache):
    """In the kernels of the defaults; a thread can have 255 registers, which leaves 8 warps per multiprocessor."""
    variant = Variant(warps, cuda_backend.CHUNKS[capability], ordered)
    cubin = compile_or_skip(capability, variant)
    assert [path.read_bytes() for path in own_cache.iterdir()] == [cubin]
    tool = triton.knobs.nvidia.cuobjdump.path
    (file,) = own_cache.iterdir()
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = {name: (int(r), int(s)) for name, r, s in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage)}
    assert found.keys() == set(cuda_backend.KERNELS)
    assert found["scan_forward"] <= (104, 0)
    assert found["scan_backward"][1] == 0


@needs_nvrtc
def test_instructions_per_step():
    """Of the defaults on 9.0 (Triton's kernels: 183 and 510), with room for as many warps as those have."""
    compile_or_skip((9, 0), Variant(1, 4, False))
    rows, _ = kernel_resources("--backends", "cuda", "--capabilities", 90)
    rows = [row for row in rows if row["variant"] == "cuda chunk 8, default"]
    assert sorted((row["kernel"], row["directions"]) for row in rows) == sorted(
        (kernel, K) for kernel in cuda_backend.KERNELS for K in (1, 4)
    )
    for row in rows:
        forward = row["kernel"] == "scan_forward"
        assert 100 < row["instructions"] <= (140 if forward else 355), row
        assert row["warps"] >= (16 if forward else 8), row


@needs_nvrtc
def test_the_cache_is_used_and_tells_versions_apart(own_cache, monkeypatch):
    from cuda.bindings import nvrtc

    variant, compilations = Variant(1, 4, False), []
    start = nvrtc.nvrtcCompileProgram
    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", lambda *args: compilations.append(args) or start(*args))
    first = compile_or_skip((9, 0), variant)
    assert compile_or_skip((9, 0), variant) == first
    assert len(compilations) == 1
    (file,) = own_cache.iterdir()
    file.write_bytes(first[:-1])  # damaged
    assert compile_or_skip((9, 0), variant) == first
    assert len(compilations) == 2
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (nvrtc.nvrtcResult.NVRTC_SUCCESS, 99, 1))
    assert compile_or_skip((9, 0), variant) == first
    assert len(compilations) == 3
    assert len(list(own_cache.iterdir())) == 2


@needs_nvrtc
def test_a_source_that_does_not_compile(own_cache, monkeypatch):
    compile_or_skip((9, 0), Variant(1, 4, False))
    monkeypatch.setattr(ctypes, "sizeof", lambda kind: 8)
    with pytest.raises(RuntimeError, match=r"nvrtcCompileProgram: cuda_kernels.cu\(\d+\): error: .* other arguments"):
        cuda_backend.compile_kernels((9, 0), Variant(1, 4, False))


class Driver(types.ModuleType):
    """Replacement of cuda.bindings.driver that records the calls and lets the one named in `fails` fail."""

    class CUfunction_attribute:
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
        CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9

    def __init__(self):
        super().__init__("driver")
        self.calls, self.fails = [], None

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))
            if name == "cuLaunchKernel":  # the arguments live as long as the call
                (address,) = (ctypes.c_void_p * 1).from_address(args[-2])
                self.args = Args.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(Args)))
            failed = name == self.fails
            return types.SimpleNamespace(name="CUDA_ERROR_X") if failed else 0, (name, *args)

        if not name.startswith("cu"):
            raise AttributeError(name)
        call.__name__ = name
        return call


@pytest.fixture
def driver(monkeypatch):
    """Pretend to be an H200 whose kernels do nothing."""
    stand_in = Driver()
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = stand_in
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(cuda_backend, "compile_kernels", lambda capability, variant: b"cubin")
    monkeypatch.setattr(cuda_backend.triton_backend, "load", lambda: None)
    monkeypatch.setattr(cuda_backend.torch, "zeros", lambda *shape, device: torch.ones(shape))
    known = (cuda_backend.load, cuda_backend._functions, cuda_backend._context, ops.unavailable)
    for function in known:
        function.cache_clear()
    yield stand_in
    for function in known:
        function.cache_clear()


def test_arguments_that_reach_the_driver(driver):
    u, dt, A, B, C, D, bias = (
        leaf.detach() for leaf in scan_inputs(K=2, batch=3, L=9, D=192, varying=torch.bfloat16).values()
    )
    order = random_order(2, 9).int()
    for _ in range(2):
        y, states = cuda_backend.scan_forward((u, dt, A, B, C, D, bias), order, True)
    assert states.shape == (2, 3, 2, 6, 4, 32, 4)
    names = [call[0] for call in driver.calls]
    loading = ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuModuleLoadData"]
    loading += ["cuModuleGetFunction"] * 2 + ["cuFuncSetAttribute"] * 4
    assert names == [*loading, "cuLaunchKernel", "cuCtxSetCurrent", "cuLaunchKernel"]  # loaded once
    shared = {call[1][-1]: call[3] for call in driver.calls if call[0] == "cuFuncSetAttribute" and call[2] == 8}
    assert shared == {b"scan_forward": 2 * 4608, b"scan_backward": 2 * 27648}
    _, _, *launch = driver.calls[-1]
    assert launch[:-2] == [2 * 3 * 3, 1, 1, 64, 1, 1, 2 * 4608, 77]  # 6 groups of channels, two of them a block
    args = driver.args
    assert (args.images, args.length, args.width) == (3, 9, 192)
    assert (args.u, args.y, args.states) == (u.data_ptr(), y.data_ptr(), states.data_ptr())
    assert [getattr(args.B_strides, n) for n in ("direction", "image", "token")] == list(B.stride()[:3])
    assert args.order not in (None, order.data_ptr())  # made int64
    driver.calls.clear()
    cuda_backend.scan_backward(y, (u, dt, A, B, C, D, bias), None, states)
    assert "cuModuleLoadData" in [call[0] for call in driver.calls]  # without orders
    assert driver.args.order is None
    assert driver.calls[-1][2:-2] == (18, 1, 1, 64, 1, 1, 2 * 27648, 77)


@pytest.mark.parametrize(
    "fails", ["cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuFuncSetAttribute", "cuLaunchKernel"]
)
def test_errors_of_the_driver(fails, driver):
    driver.fails = fails
    with pytest.raises(RuntimeError, match=f"^{fails}: CUDA_ERROR_X$"):
        scan(**{name: leaf.detach() for name, leaf in scan_inputs(K=1, L=1, varying=torch.bfloat16).items()})
    with pytest.raises(
        ops.BackendUnavailable, match=f"'cuda' is not available: cannot .* kernel: {fails}: CUDA_ERROR_X$"
    ):
        ops.check_backend("cuda")


def test_it_loads_where_it_works(driver, monkeypatch):
    ops.check_backend("cuda")
    assert driver.calls[-1][0] == "cuLaunchKernel"
    for capability in ((7, 5), (8, 6), (10, 0)):
        cuda_backend.load.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, capability=capability: capability)
        with pytest.raises(
            ops.BackendUnavailable, match="for compute capability 8.0 and 9.0, this GPU has {}.{}".format(*capability)
        ):
            cuda_backend.load()


@pytest.mark.parametrize("error", [ImportError("No module named 'cuda'"), RuntimeError("libnvrtc.so.13 not found")])
def test_missing_packages(error, driver, monkeypatch):
    def compile_kernels(*_):
        raise error

    monkeypatch.setattr(cuda_backend, "compile_kernels", compile_kernels)
    reason = ops.unavailable("cuda")
    assert str(error) in reason
    assert reason.endswith("pip install cuda-bindings") == isinstance(error, ImportError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_requested_without_a_gpu(run_script, image_folder, tmp_path, capsys):
    words = ["--data_path", image_folder, "--output_dir", tmp_path, "--scan_backend", "cuda"]
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *TINY_PRETRAIN, *words)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "backend 'cuda' is not available: it needs a CUDA GPU" in line
