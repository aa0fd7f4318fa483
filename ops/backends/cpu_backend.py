"""Both ops in C for float32 on the CPU: `cpu_kernels.c`, compiled at first use and called through ctypes."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import BackendUnavailable
from .compiled import cached_or_private
from .torch_backend import dense_channels

INSTALL = ""  # a C compiler is no Python package
SOURCE = Path(__file__).with_name("cpu_kernels.c")
CHUNK = 16  # tokens between two stored states
COMPILERS = ("cc", "gcc", "clang")
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def misfit(device: torch.device, dtype: torch.dtype, width: int, states: int) -> str | None:
    """See torch_backend.py."""
    return None if device.type == "cpu" and dtype == torch.float32 else f"{dtype} on {device.type}"


def _compiler() -> list[str]:
    named = os.environ.get("CC", "").strip()
    candidates = [named] if named else COMPILERS
    for candidate in candidates:
        with suppress(ValueError):  # an unclosed quotation mark
            command = shlex.split(candidate)
            if shutil.which(command[0]):
                return command
    raise BackendUnavailable(f"no C compiler found (looked for {', '.join(candidates)}; $CC names another)")


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:  # not a program
        raise BackendUnavailable(f"`{shlex.join(command)}`: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines() or [f"exit status {done.returncode}"]
        raise BackendUnavailable(f"`{shlex.join(command)}`: {next((l for l in lines if 'error' in l), lines[-1])}")
    return done.stdout


@cache
def load(states: int = 16, taps: int = 4) -> ctypes.CDLL:
    """Return the kernels for N = `states` and W = `taps`, compiling them unless the cache has them.

    $CC names the compiler, as for any C program.

    Raises:
        BackendUnavailable: there is no C compiler, it fails, or its result cannot be loaded.
    """
    command = [*_compiler(), "-O3", NATIVE, "-shared", "-fPIC"]
    command += [f"-DSTATES={states}", f"-DTAPS={taps}", f"-DCHUNK={CHUNK}"]
    # The predefined macros tell the compiler's version and, through NATIVE, the instruction set of this CPU: different
    # machines may share a home folder.
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), shlex.join(command).encode(), macros])).hexdigest()[:16]

    def build(path: Path) -> None:
        _run([*command, "-o", str(path), str(SOURCE)])

    library = cached_or_private(f"cpu_kernels-{key}", ".so", build)
    try:
        kernels = ctypes.CDLL(str(library))
    except OSError as error:
        raise BackendUnavailable(f"cannot load the compiled kernels: {error}") from error
    # The OpenMP runtime of torch itself, found through torch's libraries: linking one would load a second pool of
    # threads that competes with torch's. If torch has no OpenMP, the kernels run on one thread.
    runtime = ctypes.CDLL(torch._C.__file__)
    if hasattr(runtime, "GOMP_parallel"):
        kernels.use_openmp(runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads)
    return kernels


class _Rows(ctypes.Structure):
    """`rows` of cpu_kernels.c: address and strides of (K, B, L, channels) with contiguous channels."""

    _fields_ = [("at", ctypes.c_void_p), ("k", ctypes.c_int64), ("b", ctypes.c_int64), ("t", ctypes.c_int64)]


def _fields(rows: str, addresses: str) -> list[tuple[str, type]]:
    kinds: dict[str, type] = {"K batch L width": ctypes.c_int64, rows: _Rows, addresses: ctypes.c_void_p}
    return [(name, kind) for names, kind in kinds.items() for name in names.split()]


class _ScanJob(ctypes.Structure):
    """`scan` of cpu_kernels.c."""

    _fields_ = _fields("u dt B C dy", "order A D bias y states du ddt dA dD dbias dB dC")


class _ConvJob(ctypes.Structure):
    """`conv` of cpu_kernels.c."""

    _fields_ = _fields("x dy", "order weight bias y dx dweight dbias")


def _job(kind: type[ctypes.Structure], sizes: tuple[int, ...], **tensors: Tensor | None) -> ctypes.Structure:
    """Describe tensors to a kernel by address; they must exist until it has run."""
    rows = [field[0] for field in kind._fields_ if field[1] is _Rows]
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    fields = {n: _Rows(x.data_ptr(), *x.stride()[:3]) if n in rows else x.data_ptr() for n, x in given.items()}
    return kind(*sizes, **fields)


def _checked(order: Tensor | None, L: int) -> Tensor | None:
    """Return `order` as the kernels read it, after a check: they would read from any address that it names."""
    if order is None:
        return None
    low, high = torch.aminmax(order)
    if low < 0 or high >= L:
        raise IndexError(f"order names tokens {low} to {high} of a sequence of {L}")
    return order.long().contiguous()


def scan_states(u: Tensor, A: Tensor) -> Tensor:
    """Return an empty tensor for the states that `scan_forward` returns: those before every chunk of tokens."""
    K, batch, L, width = u.shape
    return u.new_empty(K, batch, -(-L // CHUNK), A.shape[-1], width)


def _scan_inputs(inputs: Sequence[Tensor], order: Tensor | None) -> dict[str, Tensor | None]:
    u, dt, A, B, C, D, dt_bias = (x.float() for x in inputs)
    rows = {"u": u, "dt": dt, "B": B, "C": C}
    constant = {"A": A.mT, "D": D, "bias": dt_bias}  # A: (K, N, D)
    described = {name: dense_channels(x) for name, x in rows.items()}
    described |= {name: x.contiguous() for name, x in constant.items()}
    return described | {"order": _checked(order, u.shape[2])}


def scan_forward(inputs: Sequence[Tensor], order: Tensor | None, trains: bool) -> tuple[Tensor, Tensor | None]:
    """See torch_backend.py; u in float32."""
    u, _, A, *_ = inputs
    described = _scan_inputs(inputs, order)
    states, y = scan_states(u, A) if trains else None, u.new_empty(u.shape)
    job = _job(_ScanJob, u.shape, **described, states=states, y=y)
    load(states=A.shape[-1]).scan_forward(ctypes.byref(job), torch.get_num_threads())
    return y, states


def scan_backward(dy: Tensor, inputs: Sequence[Tensor], order: Tensor | None, states: Tensor) -> tuple[Tensor, ...]:
    """See torch_backend.py; u in float32."""
    u, _, A, *_ = inputs
    described = _scan_inputs(inputs, order)
    (K, batch, L, width), N = u.shape, A.shape[-1]
    kernels = load(states=N)
    du, ddt = u.new_empty(u.shape), u.new_empty(u.shape)
    # Partial sums, one per image or group of channels: added up here in a fixed order.
    dA, dD, dbias = (u.new_empty(K, batch, *shape) for shape in ((N, width), (width,), (width,)))
    dB, dC = u.new_empty(2, kernels.scan_groups(width), K, batch, L, N)
    grads = {"du": du, "ddt": ddt, "dA": dA, "dB": dB, "dC": dC, "dD": dD, "dbias": dbias}
    dy = dense_channels(dy)
    job = _job(_ScanJob, u.shape, **described, states=states, dy=dy, **grads)
    kernels.scan_backward(ctypes.byref(job), torch.get_num_threads())
    return du, ddt, dA.sum(1).mT, dB.sum(0), dC.sum(0), dD.sum(1), dbias.sum(1)


def _conv_inputs(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> dict[str, Tensor | None]:
    return {
        "x": dense_channels(x)[None],  # (1, B, L, D)
        "weight": weight.float().flip(-1).mT.contiguous(),  # (K, W, D), the tap of the present token first
        "bias": bias.float().contiguous(),
        "order": _checked(order, x.shape[1]),
    }


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """See torch_backend.py; x in float32."""
    inputs, sizes = _conv_inputs(x, weight, bias, order), (len(weight), *x.shape)
    y = x.new_empty(sizes)
    job = _job(_ConvJob, sizes, **inputs, y=y)
    load(taps=weight.shape[-1]).conv_forward(ctypes.byref(job), torch.get_num_threads())
    return y


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See torch_backend.py; x in float32."""
    inputs, (K, width, W) = _conv_inputs(x, weight, bias, order), weight.shape
    dx = x.new_empty(x.shape)
    dweight, dbias = x.new_empty(len(dx), K, W, width), x.new_empty(len(dx), K, width)  # per image
    dy = dense_channels(dy)
    job = _job(_ConvJob, (K, *dx.shape), **inputs, dy=dy, dx=dx, dweight=dweight, dbias=dbias)
    load(taps=W).conv_backward(ctypes.byref(job), torch.get_num_threads())
    return dx, dweight.sum(0).mT.flip(-1), dbias.sum(0)
