"""The selective scan in CUDA C++: `cuda_kernels.cu`, compiled through NVRTC at first use. Convolutions are Triton's.

It computes bfloat16 activations with 16 states; everything else is left to Triton.
"""

import ctypes
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import BackendUnavailable, triton_backend
from .compiled import cached_or_private
from .triton_backend import conv_backward, conv_forward  # noqa: F401 - part of the interface

INSTALL = triton_backend.INSTALL
FALLBACK = "triton"
ROW_ALIGNMENT = 16  # the kernels read 16 bytes at a time
SOURCE = Path(__file__).with_name("cuda_kernels.cu")
KERNELS = ("scan_forward", "scan_backward")
STATES, GROUP = 16, 32  # states of a channel, channels of a warp

# Tokens between two stored states, for each compute capability that the kernels are for. Longer chunks take fewer
# instructions and less memory; on 8.0 shared memory has room for 4 warps with chunks of 8, and 8 with chunks of 4.
# 8.6 and 8.9 have less of it, and NVRTC 13.0 spills on 10.0: Triton's kernels count as faster there.
CHUNKS = {(8, 0): 4, (9, 0): 8}


def misfit(device: torch.device, dtype: torch.dtype, width: int, states: int) -> str | None:
    """See torch_backend.py."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return f"{dtype} on {device.type}"
    if width % GROUP:
        return f"{width} channels (not a multiple of {GROUP})"
    return f"{states} states (not {STATES})" if states != STATES else None


class Variant(NamedTuple):
    """The constants that the kernels are compiled with."""

    warps: int  # of a block
    chunk: int
    ordered: bool

    def shared_bytes(self, kernel: str) -> int:
        """Return the size of a block's shared memory."""
        return self.warps * {"scan_forward": 576 * self.chunk, "scan_backward": 3200 * self.chunk + 2048}[kernel]

    def definitions(self) -> list[str]:
        """Return the compile-time constants of the source as options; it checks the sizes."""
        constants = {"WARPS": self.warps, "CHUNK": self.chunk, "ORDERED": int(self.ordered)}
        constants |= {f"{name.upper()}_BYTES": self.shared_bytes(name) for name in KERNELS}
        constants["ARGS_BYTES"] = ctypes.sizeof(Args)
        return [f"-D{name}={value}" for name, value in constants.items()]


class _Strides(ctypes.Structure):
    """`Strides` of cuda_kernels.cu."""

    _fields_ = [(name, ctypes.c_int64) for name in ("direction", "image", "token")]


class Args(ctypes.Structure):
    """`Args` of cuda_kernels.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "u dt B C dy A D dt_bias order states y du ddt".split()),
        *((name, ctypes.c_void_p) for name in "dCB dA dD ddt_bias".split()),
        *((f"{name}_strides", _Strides) for name in "u dt B C dy".split()),
        *((name, ctypes.c_int) for name in "images length width".split()),
    ]


def _call(function: Callable[..., tuple], *args: object) -> Any:
    """Call a function of CUDA and return its result.

    Raises:
        RuntimeError: it reports an error.
    """
    status, *results = function(*args)
    if status:
        raise RuntimeError(f"{function.__name__}: {status.name}")
    return results[0] if len(results) == 1 else results


def nvrtc_version() -> str:
    """Return the version of the compiler."""
    from cuda.bindings import nvrtc

    return "{}.{}".format(*_call(nvrtc.nvrtcVersion))


def compile_kernels(capability: tuple[int, int], variant: Variant) -> bytes:
    """Return both kernels as machine code (a cubin); needs no GPU.

    Raises:
        ImportError: cuda.bindings is not installed.
        RuntimeError: NVRTC is missing, or refuses the source.
    """
    from cuda.bindings import nvrtc

    source, target = SOURCE.read_bytes(), "--gpu-architecture=sm_{}{}".format(*capability)
    options = [option.encode() for option in (target, "--std=c++17", *variant.definitions())]

    def build(path: Path) -> None:
        program = _call(nvrtc.nvrtcCreateProgram, source, SOURCE.name.encode(), 0, [], [])
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status:
            log = bytes(_call(nvrtc.nvrtcGetProgramLogSize, program))
            _call(nvrtc.nvrtcGetProgramLog, program, log)
            lines = [line for line in log.decode(errors="replace").splitlines() if "error" in line]
            raise RuntimeError(f"nvrtcCompileProgram: {next(iter(lines), status.name)}")
        cubin = bytes(_call(nvrtc.nvrtcGetCUBINSize, program))  # filled in place
        _call(nvrtc.nvrtcGetCUBIN, program, cubin)
        _call(nvrtc.nvrtcDestroyProgram, program)
        path.write_bytes(cubin)

    key = hashlib.sha256(b"\0".join([source, *options, nvrtc_version().encode()])).hexdigest()[:16]
    return cached_or_private(f"cuda_kernels-{key}", ".cubin", build).read_bytes()


@cache
def _context(device: int) -> object:
    """Return the context of torch on a device."""
    from cuda.bindings import driver

    return _call(driver.cuDevicePrimaryCtxRetain, _call(driver.cuDeviceGet, device))


@cache
def _functions(device: int, variant: Variant) -> dict[str, object]:
    """Return both kernels as the driver starts them on a device, whose context is the current one."""
    from cuda.bindings import driver

    module = _call(driver.cuModuleLoadData, compile_kernels(torch.cuda.get_device_capability(device), variant))
    functions = {name: _call(driver.cuModuleGetFunction, module, name.encode()) for name in KERNELS}
    attributes = driver.CUfunction_attribute
    for name, function in functions.items():
        dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES  # more than 48 KB must be requested
        _call(driver.cuFuncSetAttribute, function, dynamic, variant.shared_bytes(name))
        # Nothing is read twice through the L1 cache, which lies in the same memory.
        carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _call(driver.cuFuncSetAttribute, function, carveout, 100)
    return functions


def _start(kernel: str, variant: Variant, blocks: int, args: Args, device: torch.device) -> None:
    """Start a kernel on torch's current stream; it is compiled and loaded at the first call."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        _call(driver.cuCtxSetCurrent, _context(device.index))  # a thread of autograd may have none yet
        function = _functions(device.index, variant)[kernel]
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        stream, shared = torch.cuda.current_stream(device).cuda_stream, variant.shared_bytes(kernel)
        grid, block = (blocks, 1, 1), (32 * variant.warps, 1, 1)
        _call(driver.cuLaunchKernel, function, *grid, *block, shared, stream, ctypes.addressof(parameters), 0)


@cache
def load() -> None:
    """Prove that the kernels work here: compile what most models use, and run it.

    Raises:
        BackendUnavailable: there is no fitting GPU, or cuda.bindings or NVRTC is missing.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailable("it needs a CUDA GPU")
    if (capability := torch.cuda.get_device_capability()) not in CHUNKS:
        fit, here = (" and ".join("{}.{}".format(*c) for c in some) for some in (CHUNKS, [capability]))
        raise BackendUnavailable(f"its kernels are for compute capability {fit}, this GPU has {here}; use triton")
    triton_backend.load()  # for the convolution
    channels = torch.zeros(1, 4 * GROUP, device="cuda")
    u, A = channels.bfloat16()[None, None], channels[..., None].repeat(1, 1, STATES)  # (1, 1, 1, D), (1, D, N)
    try:
        scan_forward((u, u, A, u[..., :STATES], u[..., :STATES], channels, channels), None, False)
    except ImportError as error:
        raise BackendUnavailable(f"{error}; to install it: pip install cuda-bindings") from error
    except (RuntimeError, OSError) as error:
        raise BackendUnavailable(f"cannot compile or start a CUDA kernel: {error}") from error


def _chunk(device: torch.device) -> int:
    return CHUNKS[torch.cuda.get_device_capability(device)]


def block_warps(width: int) -> int:
    """Return the warps of a block, up to 4: more of them leave fewer partial sums of dB and dC."""
    return math.gcd(width // GROUP, 4)


def _aligned(x: Tensor) -> Tensor:
    """Return x, or a copy where its channels are not contiguous or its rows not aligned."""
    starts = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    fits = x.stride(-1) == 1 and all(start % ROW_ALIGNMENT == 0 for start in starts)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _fields(inputs: Sequence[Tensor], order: Tensor | None, **more: Tensor) -> dict[str, Tensor | None]:
    """Return the inputs as the kernels read them, by the name of their field in `Args`."""
    u, dt, A, B, C, D, dt_bias = inputs
    rows = {"u": u, "dt": dt, "B": B, "C": C, **more}
    if A.shape[-1] != STATES or u.shape[-1] % GROUP or any(x.dtype != torch.bfloat16 for x in rows.values()):
        raise TypeError(f"backend 'cuda' computes only bfloat16, {STATES} states and multiples of {GROUP} channels")
    order = triton_backend.checked_order(order, u.shape[2])
    return {
        **{name: _aligned(x) for name, x in rows.items()},
        "A": _aligned(A.float().contiguous()),
        "D": D.float().contiguous(),
        "dt_bias": dt_bias.float().contiguous(),
        "order": None if order is None else order.long(),
    }


def _launch(kernel: str, u: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    """Start a kernel for all directions, images and channels of u; `tensors` are the fields of `Args`."""
    K, batch, L, width = u.shape
    variant = Variant(block_warps(width), _chunk(u.device), tensors["order"] is not None)
    args = Args(images=batch, length=L, width=width)
    for name, x in tensors.items():
        if x is not None:
            setattr(args, name, x.data_ptr())
            if hasattr(args, f"{name}_strides"):
                setattr(args, f"{name}_strides", _Strides(*x.stride()[:3]))
    if blocks := K * batch * (width // (GROUP * variant.warps)):
        _start(kernel, variant, blocks, args, u.device)


def scan_states(u: Tensor, A: Tensor) -> Tensor:
    """Return an empty tensor for the states that `scan_forward` returns: those before every chunk of tokens.

    The states of a group of 32 channels are stored as (N / 4, 32, 4): a warp moves each of the four parts at once.
    """
    K, batch, L, width = u.shape
    groups, quarters = width // GROUP, A.shape[-1] // 4
    return u.new_empty(K, batch, -(-L // _chunk(u.device)), groups, quarters, GROUP, 4, dtype=torch.float32)


def scan_forward(inputs: Sequence[Tensor], order: Tensor | None, trains: bool) -> tuple[Tensor, Tensor | None]:
    """See torch_backend.py; u, dt, B and C in bfloat16."""
    u, _, A, *_ = inputs
    fields = _fields(inputs, order)
    y, states = u.new_empty(u.shape), scan_states(u, A) if trains else None
    _launch("scan_forward", u, fields | {"y": y, "states": states})
    return y, states


def scan_backward(dy: Tensor, inputs: Sequence[Tensor], order: Tensor | None, states: Tensor) -> tuple[Tensor, ...]:
    """See torch_backend.py; dy, u, dt, B and C in bfloat16."""
    u, fields = inputs[0], _fields(inputs, order, dy=dy)
    K, batch, L, width = u.shape
    du, ddt = u.new_empty(u.shape), u.new_empty(u.shape)
    # Partial sums, of one image or of the channels of one block: added up here in a fixed order.
    blocks = width // GROUP // block_warps(width)
    dA, dCB = states.new_empty(K, batch, *states.shape[3:]), states.new_empty(K, batch, L, blocks, 2 * STATES)
    dD, dbias = (states.new_empty(K, batch, width) for _ in range(2))
    grads = {"du": du, "ddt": ddt, "dA": dA, "dCB": dCB, "dD": dD, "ddt_bias": dbias}
    _launch("scan_backward", u, fields | grads | {"states": states})
    dC, dB = dCB.sum(3).split(STATES, dim=-1)
    dA = dA.sum(1).transpose(2, 3)  # (K, D / 32, N / 4, 32, 4) -> (K, D / 32, 32, N / 4, 4)
    return du, ddt, dA.reshape(K, width, STATES), dB, dC, dD.sum(1), dbias.sum(1)
