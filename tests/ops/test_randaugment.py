"""RandAugment's Triton kernels against timm: interpreted on CPU tensors, natively where there is a GPU.

There the torch form of each operation, which the CPU's tests are about, is held to the same bytes.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from PIL import Image
from randaugment_helpers import (
    OPERATIONS,
    POLICIES,
    against_timm,
    carried_out,
    policy,
    single_operation,
    uint8_transform,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ops import fused, kernel_choice
from ops.fused import triton_randaugment
from util import seeding
from util.data import randaugment
from util.data.uint8_transform import Uint8Transform

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
SCALE, COUNT = (1, 30) if ON_GPU else (8, 9)  # of images: the interpreter is slow
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(params=["triton", "torch"] if ON_GPU else ["triton"], autouse=True)
def form(request, monkeypatch):
    fused.use(["augment" if request.param == "triton" else "none"], DEVICE)
    if request.param == "triton":
        monkeypatch.setattr(Uint8Transform, "carry_out", staticmethod(kernel_choice.carry_out_fused))
    torch.use_deterministic_algorithms(True, warn_only=ON_GPU)  # torch.empty is filled with 255: what is left so shows
    yield request.param
    torch.use_deterministic_algorithms(False)
    fused.use(["none"], DEVICE)


def test_operations_have_the_same_numbers_in_both_forms():
    names = [function.__name__.removesuffix("_rel") for function in randaugment.OPERATIONS.values()]
    assert [getattr(triton_randaugment, name.upper()).value for name in names] == list(range(len(names)))
    assert triton_randaugment.NOTE.value == randaugment.NOTE


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_against_timm(photographs, name):
    """Each at drawn magnitudes, also on dark and bright photographs of little contrast: the same bytes."""
    size = 224 // SCALE, 200 // SCALE
    images = [np.array(photographs[seed % 2].resize(size)) for seed in range(COUNT)]
    images = [(image, image // 3 + 40, image // 3 + 170)[seed % 3] for seed, image in enumerate(images)]
    want, got = against_timm(name, images, DEVICE)
    assert np.array_equal(got, want)
    assert sum(not np.array_equal(*pair) for pair in zip(got, images, strict=True)) > COUNT / 2


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (2, 7), (3, 3)])
def test_operation_on_small_images(name, size):
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (4, *size, 3), dtype=np.uint8))
    images += [np.full((*size, 3), (3, 200, 255), np.uint8)]  # of one colour
    want, got = against_timm(name, images, DEVICE)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Contrast"])
def test_statistics_of_more_pixels_than_are_read_at_a_time(name):
    """Images of a skewed histogram and 70 x 61 pixels, which neither kernel's blocks divide."""
    rng = np.random.default_rng(0)
    images = [(rng.random((61, 70, 3)) ** power * top).astype(np.uint8) for power, top in ((1, 256), (4, 200), (9, 3))]
    assert images[0][..., 0].size > triton_randaugment.READ
    want, got = against_timm(name, images, DEVICE)
    assert np.array_equal(got, want)


def test_autocontrast_of_every_range():
    """Ramps between two levels, three to an image: every two on a GPU, every 64th pair in the interpreter."""
    low, high = np.triu_indices(256, 1)  # 32,640 pairs
    ramps = np.clip(np.arange(256)[:, None], low, high).astype(np.uint8)
    images = list(ramps.T.reshape(-1, 3, 1, 256).transpose(0, 2, 3, 1))[:: SCALE**2]  # (256, 3 n) -> n (1, 256, 3)
    want, got = against_timm("AutoContrast", images, DEVICE)
    assert np.array_equal(got, want)


def test_grey_that_lies_half_way():
    """Colours whose brightness times 65536 ends in 32768, which is rounded up."""
    colours = np.random.default_rng(0).integers(0, 256, (2**20, 3), dtype=np.uint8)
    half = colours[colours @ np.array([19595, 38470, 7471]) % 65536 == 32768]
    assert len(half) > 8
    for name in ("Color", "Contrast"):
        want, got = against_timm(name, [half[None]] * 4, DEVICE)
        assert np.array_equal(got, want)


# parameters for which a point falls onto a border of the image, or onto the centre of a pixel; of images 16 x 16
ON_THE_GRID = {
    "ShearX": [0.0, 1.0, -1.0, 0.5, 1 / 16],
    "ShearY": [0.0, 1.0, -1.0, 0.5, 1 / 16],
    "TranslateXRel": [0.0, 0.5 / 16, -0.5 / 16, 1 / 16, -2.5 / 16, 1.0, -1.0],
    "TranslateYRel": [0.0, 0.5 / 16, -0.5 / 16, 1 / 16, -2.5 / 16, 1.0, -1.0],
    "Rotate": [0.0, 90.0, 180.0, 270.0, 45.0, -30.0],
}


@pytest.mark.parametrize("name", ON_THE_GRID)
def test_points_on_the_grid(name):
    op, transform = single_operation(name)
    images = list(np.random.default_rng(0).integers(0, 256, (len(ON_THE_GRID[name]), 16, 16, 3), dtype=np.uint8))
    want = [
        np.array(op.aug_fn(Image.fromarray(image), value, **op.kwargs))
        for image, value in zip(images, ON_THE_GRID[name], strict=True)
    ]
    notes = [randaugment._note(op.aug_fn, [], value) for value in ON_THE_GRID[name]]
    assert np.array_equal(carried_out(transform, images, notes, DEVICE), np.stack(want))


@pytest.mark.parametrize("aa", POLICIES)
def test_random_batches_against_timm(photographs, aa):
    """Whole policies of up to four layers, batches of noise and photographs in several sizes: the same bytes."""
    step = policy(aa)
    transform, rng = uint8_transform(step), np.random.default_rng(0)
    for batch, (height, width) in enumerate([(200, 224), (89, 64), (16, 112), (61, 33)]):
        size = width // SCALE, height // SCALE
        images, want, notes = [], [], []
        for seed in range(100 * batch, 100 * batch + COUNT):
            image = np.array(photographs[seed % 2].resize(size))
            image = rng.integers(0, 256, image.shape, dtype=np.uint8) if seed % 3 == 0 else image
            images.append(image)
            seeding.seed_sample(seed)
            want.append(np.array(step(Image.fromarray(image))))
            seeding.seed_sample(seed)
            numbers = transform.draw([])
            notes.append(numbers + randaugment.NO_OPERATION * (step.num_layers - len(numbers) // randaugment.NOTE))
        assert np.array_equal(carried_out(transform, images, notes, DEVICE), np.stack(want))


# ---- launches


class Operators(TorchDispatchMode):
    """Count the operators that torch runs, including views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


def test_the_number_of_launches_does_not_depend_on_the_operations(form, monkeypatch):
    """Two kernels per layer and a fixed number of torch's operators, whether a batch has all operations or none."""
    if form == "torch":
        pytest.skip("about the kernels")
    started = []
    for name in ("tables_kernel", "operations_kernel"):
        kernel = getattr(triton_randaugment, name)
        monkeypatch.setattr(kernel, "run", lambda *_, _kernel=kernel, **__: started.append(_kernel))
    transform = uint8_transform(policy("rand-m9-n2"))
    pixels, counts = torch.zeros(15, 4, 4, 3, dtype=torch.uint8), []
    for numbers in ([-1.0] * 15, range(15)):
        todo = torch.tensor([[0, number, 1, 0, number, 1, 0] for number in numbers], dtype=torch.float64)
        with Operators() as operators:
            transform.finish(pixels, todo, DEVICE)
        counts.append(operators.count)
        assert started == [triton_randaugment.tables_kernel, triton_randaugment.operations_kernel] * 2
        started.clear()
    assert counts[0] == counts[1] < 50


COMPILED = """
import re, sys
sys.path.insert(0, sys.argv[1])
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.fused import triton_randaugment

numbers = {"plane", "height", "width", "notes_stride"}
types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("images", "out", "tables", "fill"), "*u8") | {"notes": "*fp64"}
# Triton makes a constant of a 1
for capability, sides in ((80, {}), (90, {}), (100, {}), (90, {"plane": 1, "height": 1, "width": 1})):
    for kernel, block in ((triton_randaugment.tables_kernel, "READ"), (triton_randaugment.operations_kernel, "BLOCK")):
        constants = {name: value for name, value in sides.items() if name in kernel.arg_names}
        constants[block] = getattr(triton_randaugment, block)
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {"num_warps": triton_randaugment.WARPS, **triton_randaugment.EXACT}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx = compiled.asm["ptx"]
        print(kernel.__name__, len(re.findall(r"\\bfma\\.", ptx)), len(re.findall(r"\\b(?:mul|add|sub)\\.f", ptx)))
"""


def test_no_fused_multiply_adds(form):
    """They round once where Pillow rounds twice; every product and sum asks for its own rounding (mul.rn.f64)."""
    if form == "torch":
        pytest.skip("about the kernels")
    command, environment = [sys.executable, "-c", COMPILED, str(REPOSITORY)], os.environ | {"TRITON_INTERPRET": "0"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["tables_kernel 0 0", "operations_kernel 0 0"] * 4
