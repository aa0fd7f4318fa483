"""Both ops in C for float32 on the CPU: `cpu_kernels.c`, compiled at first use and called through ctypes."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import BackendUnavailable

SOURCE = Path(__file__).with_name("cpu_kernels.c")
COMPILERS = ("cc", "gcc", "clang")
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _compiler() -> list[str]:
    candidates = [os.environ["CC"]] if os.environ.get("CC") else COMPILERS
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise BackendUnavailable(f"no C compiler found (looked for {', '.join(candidates)}; $CC names another)")


def _run(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines() or [f"exit status {done.returncode}"]
        raise BackendUnavailable(f"`{shlex.join(command)}`: {next((l for l in lines if 'error' in l), lines[-1])}")
    return done.stdout


@cache
def _private_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="arm-ops-")


def _cache_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "arm-ops" if cache.is_absolute() else Path(_private_folder().name)  # relative: there is no home


def _built(folder: Path, name: str, command: list[str]) -> Path:
    """Return the library `name` in `folder`, compiled unless it is there."""
    library = folder / name
    if not library.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch, name)
            _run([*command, "-o", str(fresh), str(SOURCE)])
            fresh.replace(library)  # atomic: of ranks that build at the same time each finds a whole file
    return library


@cache
def load(states: int = 16, taps: int = 4) -> ctypes.CDLL:
    """Return the kernels for N = `states` and W = `taps`, compiling them unless the cache has them.

    $CC names the compiler, as for any C program.

    Raises:
        BackendUnavailable: there is no C compiler, it fails, or its result cannot be loaded.
    """
    command = [*_compiler(), "-O3", NATIVE, "-shared", "-fPIC", f"-DSTATES={states}", f"-DTAPS={taps}"]
    # The predefined macros name the compiler's version and, through NATIVE, what this CPU can do: a home folder
    # may be shared by different machines.
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), shlex.join(command).encode(), macros])).hexdigest()[:16]
    name = f"cpu_kernels-{key}.so"
    try:
        library = _built(_cache_folder(), name, command)
    except OSError:  # the cache cannot be written: build for this process alone
        library = _built(Path(_private_folder().name), name, command)
    try:
        kernels = ctypes.CDLL(str(library))
    except OSError as error:
        raise BackendUnavailable(f"cannot load the compiled kernels: {error}") from error
    # The OpenMP runtime that torch itself runs on, found through torch's own libraries: linking one would load a
    # second pool of threads that spins against torch's. Without OpenMP in torch the kernels run on one thread.
    runtime = ctypes.CDLL(torch._C.__file__)
    if hasattr(runtime, "GOMP_parallel"):
        kernels.use_openmp(runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads)
    return kernels


class _Rows(ctypes.Structure):
    """`rows` of cpu_kernels.c: address and strides of (K, B, L, channels) with contiguous channels."""

    _fields_ = [("at", ctypes.c_void_p), ("k", ctypes.c_int64), ("b", ctypes.c_int64), ("t", ctypes.c_int64)]


def _fields(rows: str, addresses: str) -> list[tuple[str, type]]:
    kinds = ("K batch L width", ctypes.c_int64), (rows, _Rows), (addresses, ctypes.c_void_p)
    return [(name, kind) for names, kind in kinds for name in names.split()]


class _ScanJob(ctypes.Structure):
    """`scan` of cpu_kernels.c."""

    _fields_ = _fields("u dt B C dy", "order A D bias y states du ddt dA dD dbias dB dC")


class _ConvJob(ctypes.Structure):
    """`conv` of cpu_kernels.c."""

    _fields_ = _fields("x dy", "order weight bias y dx dweight dbias")


def _job(kind: type[ctypes.Structure], sizes: tuple[int, ...], **tensors: Tensor | None) -> ctypes.Structure:
    """Describe tensors to a kernel by address: they must outlive its run."""
    rows = [name for name, field in kind._fields_ if field is _Rows]
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    fields = {n: _Rows(x.data_ptr(), *x.stride()[:3]) if n in rows else x.data_ptr() for n, x in given.items()}
    return kind(*sizes, **fields)


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _checked(order: Tensor | None, L: int) -> Tensor | None:
    """Return `order` as the kernels read it; they would follow any number in it to any address."""
    if order is None:
        return None
    low, high = torch.aminmax(order)
    if low < 0 or high >= L:
        raise IndexError(f"order names tokens {low} to {high} of a sequence of {L}")
    return order.long().contiguous()


class _SelectiveScan(torch.autograd.Function):
    """The scan in float32; arguments as in `ops.selective_scan`."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, dt_bias, order, trains):
        N, kernels = A.shape[-1], load(states=A.shape[-1])
        u, dt, B, C = (_dense_channels(x) for x in (u, dt, B, C))
        A, D, dt_bias = A.mT.contiguous(), D.contiguous(), dt_bias.contiguous()  # A: (K, N, D)
        K, batch, L, width = u.shape
        y = u.new_empty(u.shape)
        states = u.new_empty(K, batch, kernels.scan_chunks(L), N, width) if trains else None
        inputs = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "bias": dt_bias, "order": order, "states": states}
        job = _job(_ScanJob, u.shape, **inputs, y=y)
        kernels.scan_forward(ctypes.byref(job), torch.get_num_threads())
        ctx.save_for_backward(*inputs.values())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        names = ("u", "dt", "A", "B", "C", "D", "bias", "order", "states")
        inputs = dict(zip(names, ctx.saved_tensors, strict=True))
        u, N = inputs["u"], inputs["A"].shape[1]
        K, batch, L, width = u.shape
        kernels = load(states=N)
        du, ddt = u.new_empty(u.shape), u.new_empty(u.shape)
        # Partial sums, one per image or group of channels: added up here in a fixed order.
        dA, dD, dbias = (u.new_empty(K, batch, *shape) for shape in ((N, width), (width,), (width,)))
        dB, dC = u.new_empty(2, kernels.scan_groups(width), K, batch, L, N)
        grads = {"du": du, "ddt": ddt, "dA": dA, "dB": dB, "dC": dC, "dD": dD, "dbias": dbias}
        dy = _dense_channels(dy)
        job = _job(_ScanJob, u.shape, **inputs, dy=dy, **grads)
        kernels.scan_backward(ctypes.byref(job), torch.get_num_threads())
        return du, ddt, dA.sum(1).mT, dB.sum(0), dC.sum(0), dD.sum(1), dbias.sum(1), None, None


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, order: Tensor | None = None
) -> Tensor:
    """Selective scan of `ops.selective_scan`; args and result are the same, u in float32."""
    inputs = (x.float() for x in (u, dt, A, B, C, D, dt_bias))
    return _SelectiveScan.apply(*inputs, _checked(order, u.shape[2]), torch.is_grad_enabled())


class _CausalConv1d(torch.autograd.Function):
    """The convolution in float32; arguments as in `ops.causal_conv1d`."""

    @staticmethod
    def forward(ctx, x, weight, bias, order):
        K, _, W = weight.shape
        weight = weight.flip(-1).mT.contiguous()  # (K, W, D), the tap of the present token first
        x, bias = _dense_channels(x)[None], bias.contiguous()  # (1, B, L, D)
        sizes = (K, *x.shape[1:])
        y = x.new_empty(sizes)
        inputs = {"x": x, "weight": weight, "bias": bias, "order": order}
        job = _job(_ConvJob, sizes, **inputs, y=y)
        load(taps=W).conv_forward(ctypes.byref(job), torch.get_num_threads())
        ctx.save_for_backward(*inputs.values())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        inputs = dict(zip(("x", "weight", "bias", "order"), ctx.saved_tensors, strict=True))
        x, (K, W, width) = inputs["x"], inputs["weight"].shape
        dx = x.new_empty(x.shape[1:])
        dweight, dbias = x.new_empty(len(dx), K, W, width), x.new_empty(len(dx), K, width)  # per image
        grads = {"dx": dx, "dweight": dweight, "dbias": dbias}
        dy = _dense_channels(dy)
        job = _job(_ConvJob, (K, *dx.shape), **inputs, dy=dy, **grads)
        load(taps=W).conv_backward(ctypes.byref(job), torch.get_num_threads())
        return dx, dweight.sum(0).mT.flip(-1), dbias.sum(0), None


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None = None) -> Tensor:
    """Causal depthwise convolution and SiLU of `ops.causal_conv1d`; args and result are the same, x in float32."""
    return _CausalConv1d.apply(x, weight.float(), bias.float(), _checked(order, x.shape[1]))
