"""`--loader fast` equals Pillow, torchvision and timm: decoding, crops, operations of RandAugment, erasing."""

import argparse
import copy
import random
import struct

import numpy as np
import pytest
import torch
from helpers import MEAN, STD, encoded, finetune_args
from PIL import Image
from randaugment_helpers import (
    CPU,
    OPERATIONS,
    POLICIES,
    against_timm,
    carried_out,
    policy,
    single_operation,
    uint8_transform,
)
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from util import seeding
from util.data import decode, randaugment
from util.data import transforms as our_transforms
from util.data.pixels import IMAGENET
from util.data.uint8_transform import Uint8Transform

PRETRAIN = argparse.Namespace(scale=[0.2, 1.0], hflip=0.5)


def levels(images):
    """Return normalised images (B, 3, H, W) as values from 0 to 255."""
    return (images * STD + MEAN) * 255


# ---- decoding

MODES = {
    "grey JPEG": lambda photo: encoded(photo.convert("L")),
    "CMYK JPEG": lambda photo: encoded(photo.convert("CMYK")),
    "progressive JPEG": lambda photo: encoded(photo, progressive=True),
    "JPEG with restart markers": lambda photo: encoded(photo, restart_marker_rows=1),
    "JPEG that EXIF says to rotate": lambda photo: encoded(photo, exif=rotated()),
    "JPEG of 1 x 1": lambda photo: encoded(photo.resize((1, 1))),
    "JPEG and more bytes": lambda photo: encoded(photo) + b"more",
    "PNG of 1 x 1": lambda photo: encoded(photo.resize((1, 1)), "PNG"),
    "palette": lambda photo: encoded(photo.quantize(16), "PNG"),
    "palette with transparency": lambda photo: encoded(photo.quantize(16), "PNG", transparency=3),
    "alpha": lambda photo: encoded(alpha(photo), "PNG"),
    "grey with alpha": lambda photo: encoded(alpha(photo).convert("LA"), "PNG"),
    "bits": lambda photo: encoded(photo.convert("1"), "PNG"),
    "GIF": lambda photo: encoded(photo, "GIF"),
    "WebP": lambda photo: encoded(photo, "WEBP"),
    "BMP": lambda photo: encoded(photo, "BMP"),
}


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    return exif


def alpha(photo):
    photo = photo.convert("RGBA")
    photo.putalpha(photo.convert("L"))
    return photo


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode_are_those_of_pillow(photographs, tmp_path, mode):
    (tmp_path / "image").write_bytes(MODES[mode](photographs[0].resize((90, 60))))
    data = (tmp_path / "image").read_bytes()
    with Image.open(tmp_path / "image") as image:
        want = np.array(image.convert("RGB"))
    assert want.shape == ((60, 90, 3) if "1 x 1" not in mode else (1, 1, 3))  # EXIF's rotation is not applied
    assert np.array_equal(decode.crop_of(data), want)
    assert np.array_equal(np.array(decode.with_pillow(data)), want)


GREY_16 = {
    "PNG": lambda pixels: encoded(Image.fromarray(pixels), "PNG"),
    "TIFF": lambda pixels: encoded(Image.fromarray(pixels), "TIFF"),
    "big-endian TIFF": lambda pixels: encoded(
        Image.frombytes("I;16B", pixels.shape[::-1], pixels.astype(">u2").tobytes()), "TIFF"
    ),
    "PGM": lambda pixels: b"P5 8 8 65535\n" + pixels.astype(">u2").tobytes(),
    "PGM in words": lambda pixels: b"P2 8 8 65535\n" + b" ".join(b"%d" % value for value in pixels.flat),
}


@pytest.mark.parametrize("kind", GREY_16)
def test_16_bit_grey_keeps_the_upper_8_bits(kind):
    """Pillow's own conversion saturates: all values above 255 of 65535 would be white."""
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1021
    file = GREY_16[kind](pixels)
    for got in (decode.crop_of(file), np.array(decode.with_pillow(file))):
        assert np.array_equal(got, np.repeat((pixels >> 8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("white", [1023, 4095, 65535])
def test_pgm_values_are_scaled_to_their_maximum(white):
    file = b"P5 3 1 %d\n" % white + np.array([0, white // 2, white], ">u2").tobytes()
    assert np.array(decode.with_pillow(file))[0, :, 0].tolist() == [0, 127, 255]


def test_12_bit_tiffs_keep_the_upper_8_bits():
    grey = np.arange(2, dtype=np.uint16)[None]
    file = encoded(Image.fromarray(grey), "TIFF", compression=None)  # 2 pixels of 16 bits; the next lines make it 12
    depth = file.index(bytes([2, 1, 3, 0, 1, 0, 0, 0, 16, 0]))
    file = file[: depth + 8] + bytes([12, 0]) + file[depth + 10 : -4] + bytes([0xFF, 0xF8, 0x00])
    assert np.array(decode.with_pillow(file))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("bits", "values"), [(1, [0, 1]), (4, [0, 5, 15]), (8, [0, 100, 255]), (16, [0, 25700, 65535])]
)
def test_tiffs_with_white_as_zero(order, bits, values):
    """Pillow inverts up to 8 bits; it cannot read 16 bits in big-endian order, which are broken images."""
    stored = "".join(f"{value:0{bits}b}" for value in values).ljust(48, "0")
    pixels = int(stored, 2).to_bytes(6, "big")
    if bits == 16:
        pixels = np.array(values, f"{order}u2").tobytes()
    tags = {
        256: len(values),
        257: 1,
        258: bits,
        259: 1,
        262: 0,
        273: 8,
        277: 1,
        278: 1,
        279: -(-bits * len(values) // 8),
    }
    entries = (struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value) for tag, value in tags.items())
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 14)
    file = header + pixels + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)
    for read in (decode.with_pillow, decode.crop_of):
        if (order, bits) == (">", 16):
            with pytest.raises(decode.BrokenImage):
                read(file)
        else:
            grey = 255 - np.array(values) * 255 // (2**bits - 1)
            assert np.asarray(read(file)).tolist() == [[[value] * 3 for value in grey.tolist()]]


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "TIFF"), (np.float32, "TIFF"), (np.float32, "PPM")])
@pytest.mark.parametrize("most", [1, 255, 65535, 10**6])
def test_grey_with_unknown_white_is_broken(dtype, kind, most):
    file = encoded(Image.fromarray(np.linspace(0, most, 64).reshape(8, 8).astype(dtype)), kind)
    for read in (decode.with_pillow, decode.crop_of):
        with pytest.raises(decode.BrokenImage, match="which value is white is unknown"):
            read(file)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_crops_equal_those_of_the_decoded_image(photographs, subsampling, options):
    """Although rows below a crop are not decoded, the colours of its last rows are right."""
    rng = random.Random(0)
    for _ in range(20):
        width, height = rng.randint(1, 200), rng.randint(1, 200)
        data = encoded(photographs[0].resize((width, height)), quality=93, subsampling=subsampling, **options)
        h, w = rng.randint(1, height), rng.randint(1, width)
        top, left = rng.randint(0, height - h), rng.randint(0, width - w)
        got = decode.crop_of(data, lambda *_, part=(top, left, h, w): part)
        want = np.array(decode.with_pillow(data))[top : top + h, left : left + w]
        assert np.array_equal(got, want), (width, height, top, left, h, w)


def test_rows_below_a_crop_are_not_decoded(photographs, monkeypatch):
    simplejpeg, shapes = pytest.importorskip("simplejpeg"), []
    jpeg = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: shapes.append(jpeg(*a, **k).shape) or jpeg(*a, **k))
    decode.crop_of(encoded(photographs[0]), lambda *_: (10, 20, 100, 50))
    decode.crop_of(encoded(photographs[0].resize((2500, 1700))), lambda *_: (0, 0, 1200, 1300), (192, 192))
    assert shapes == [(112, 640, 3), (301, 625, 3)]  # the second one at a quarter of its sides


@pytest.mark.parametrize("crop", [(96, 200, 608, 600), (0, 0, 1200, 1200), (8, 0, 1192, 1800), (40, 80, 580, 580)])
def test_large_crops_are_decoded_at_a_lower_resolution(photographs, crop):
    """The difference is within the bound in the docstring of `crop_of`."""
    for photo in photographs:
        data = encoded(photo.resize((1800, 1203), Image.Resampling.BICUBIC), quality=93)
        small, full = (decode.crop_of(data, lambda *_: crop, size) for size in ((192, 192), None))
        assert 1.5 * 192 <= min(small.shape[:2]) <= min(full.shape[:2]) / 2
        small, full = (np.array(Image.fromarray(x).resize((192, 192), Image.Resampling.BICUBIC)) for x in (small, full))
        assert np.abs(small.astype(int) - full).mean() < 1


# ---- crops and flips


def pair(transform):
    return our_transforms.PillowTransform(transform), Uint8Transform(transform)


def finished(transform, data, seed):
    """Return the image (3, H, W) that the model gets."""
    seeding.seed_sample(seed)
    pixels, todo = transform(data)
    return transform.finish(pixels[None], torch.tensor([todo], dtype=torch.float64), CPU)[0]


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_crops_and_flips_equal_those_of_the_released_code(photographs, recipe):
    """The same random numbers give the same crop and flip; pixels differ only by rounding."""
    make = our_transforms.pretrain_transform if recipe == "pretrain" else our_transforms.finetune_transform
    args = PRETRAIN if recipe == "pretrain" else finetune_args(aa="none", reprob=0.0)
    released, fast = pair(make((96, 64), args))
    for seed in range(40):
        data = encoded(photographs[seed % 2].resize((200 + seed, 150)), quality=93)
        difference = (levels(finished(released, data, seed)) - levels(finished(fast, data, seed))).abs()
        assert difference.max() < 2.5, seed
        assert difference.mean() < 0.2, seed


@pytest.mark.parametrize("how", [our_transforms.PillowTransform, Uint8Transform])
def test_areas_ratios_and_flip_rate_of_crops(how):
    """The pixels of this image are their own coordinates, so a crop shows its position."""
    side = 256
    row, column = np.mgrid[0:side, 0:side].astype(np.uint8)
    data = encoded(Image.fromarray(np.stack([row, column, row], axis=2)), "PNG")
    transform = how(our_transforms.pretrain_transform((64, 64), PRETRAIN))
    areas, ratios, flips = [], [], 0
    for seed in range(400):
        pixels = levels(finished(transform, data, seed))
        height = (pixels[0, -1] - pixels[0, 0]).mean().item() * 64 / 63
        width = (pixels[1, :, -1] - pixels[1, :, 0]).mean().item() * 64 / 63
        areas.append(abs(height * width) / side**2)
        ratios.append(abs(width / height))
        flips += width < 0
    assert 0.18 < min(areas) < 0.25
    assert 0.9 < max(areas) < 1.02
    assert np.mean(areas) == pytest.approx(0.541, abs=0.03)  # 0.6, minus large crops whose ratio does not fit
    assert 0.72 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.38
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.03)
    assert flips / 400 == pytest.approx(0.5, abs=0.08)


def test_crops_of_the_smallest_images_are_not_empty():
    """timm's crop of 8 % of one pixel is empty, which gives a black image in Pillow."""
    transform = Uint8Transform(our_transforms.finetune_transform((8, 8), finetune_args(aa="none", reprob=0.0)))
    data = encoded(Image.new("RGB", (1, 1), (10, 200, 30)), "PNG")
    for seed in range(20):
        seeding.seed_sample(seed)
        assert (transform(data)[0] == torch.tensor([10, 200, 30])).all()


@pytest.mark.parametrize(
    ("size", "resize"), [((224, 224), "square"), ((96, 80), "shorter"), ((384, 384), "square"), ((384, 384), "shorter")]
)
def test_evaluation_transforms_agree(photographs, size, resize):
    released, fast = pair(our_transforms.eval_transform(size, resize))
    for photo in photographs:
        data = encoded(photo, quality=93)
        difference = (levels(finished(released, data, 0)) - levels(finished(fast, data, 0))).abs()
        assert difference.max() < 2.5
        assert difference.mean() < 0.2


IN_PILLOW = ["rand-m9-t3a", "rand-m9-t3aw", "v0", "3a", "augmix-m3-w2"]  # policies that the device does not support


@pytest.mark.parametrize("aa", ["none", *POLICIES, *IN_PILLOW])
def test_policies_and_colour_jitter_equal_those_of_the_released_code(photographs, aa):
    """The same random numbers give the same images, except for rounding in the crop."""
    changes = {"aa": aa, "color_jitter": 0.4 if aa == "none" else None}
    released, fast = pair(our_transforms.finetune_transform((64, 64), finetune_args(hflip=0.0, reprob=0.0, **changes)))
    assert (fast.draw is not None) == (aa in POLICIES)
    assert len(fast.augment) == (aa not in POLICIES)
    data = encoded(photographs[0].resize((200, 150)), quality=93)
    differences = [
        (levels(finished(released, data, seed)) - levels(finished(fast, data, seed))).abs().mean() for seed in range(20)
    ]
    assert np.median(differences) < 1


# ---- RandAugment


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_timm(photographs, name):
    """Bit-identical at 30 random magnitudes, also on dark and bright photographs of low contrast."""
    images = [np.array(photographs[seed % 2].resize((224, 200))) for seed in range(30)]
    images = [(image, image // 3 + 40, image // 3 + 170)[seed % 3] for seed, image in enumerate(images)]
    want, got = against_timm(name, images)
    assert np.array_equal(got, want)
    assert sum(not np.array_equal(*pair) for pair in zip(got, images, strict=True)) > 15


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (2, 7), (3, 3), (31, 64)])
def test_operation_on_small_images_equals_timm(name, size):
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (8, *size, 3), dtype=np.uint8))
    images += [np.full((*size, 3), (3, 200, 255), np.uint8)] * 4  # of one colour
    want, got = against_timm(name, images)
    assert np.array_equal(got, want)


def test_autocontrast_of_every_range():
    """Ramps between all pairs of levels, one per channel."""
    low, high = np.triu_indices(256, 1)  # 32,640 pairs
    ramps = np.clip(np.arange(256)[:, None], low, high).astype(np.uint8)
    images = list(ramps.T.reshape(-1, 3, 1, 256).transpose(0, 2, 3, 1))  # (256, 3 n) -> n times (1, 256, 3)
    want, got = against_timm("AutoContrast", images)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("aa", POLICIES)
def test_randaugment_equals_timm(photographs, aa):
    """The same seeds give the same operations in the same order, and the same state of the generators."""
    step = policy(aa)
    transform = uint8_transform(step)
    images, want, notes = [], [], []
    for seed in range(60):
        image = photographs[seed % 2].resize((224, 200))
        images.append(np.array(image))
        seeding.seed_sample(seed)
        want.append(np.array(step(image)))
        state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        seeding.seed_sample(seed)
        numbers = transform.draw([])
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
        notes.append(numbers + randaugment.NO_OPERATION * (step.num_layers - len(numbers) // randaugment.NOTE))
    assert np.array_equal(carried_out(transform, images, notes), np.stack(want))


def test_randaugment_draws_the_same_as_timm():
    """Operations, magnitudes and rates are those of timm's recipe."""
    released = our_transforms.finetune_transform((224, 224), finetune_args())
    (step,) = (t for t in released.transforms if isinstance(t, auto_augment.RandAugment))
    draw, functions, drawn = Uint8Transform(released).draw, list(randaugment.OPERATIONS), []
    calls = copy.deepcopy(step)
    for op in calls.ops:
        op.aug_fn = lambda done, *magnitude, _function=op.aug_fn, **_: [*done, (_function, *magnitude)]
    for seed in range(2000):
        seeding.seed_sample(seed)
        want = calls([])
        seeding.seed_sample(seed)
        got = draw([])
        assert [functions[number] for number in got[:: randaugment.NOTE]] == [function for function, *_ in want]
        for first, second, (function, *magnitude) in zip(got[1::3], got[2::3], want, strict=True):
            if function is auto_augment.rotate:
                (degrees,) = magnitude
                assert np.rad2deg(-np.arctan2(second, first)) == pytest.approx(degrees, abs=1e-9)
            else:
                assert (first, second) == (*magnitude, *[0.0, 0.0][len(magnitude) :])
        drawn += [function for function, *_ in want]
    assert len(drawn) / 4000 == pytest.approx(0.5, abs=0.03)  # two layers, each at a rate of 0.5
    rates = [drawn.count(op.aug_fn) / len(drawn) for op in step.ops]
    assert rates == pytest.approx([1 / 15] * 15, abs=0.02)


def test_an_image_does_not_depend_on_its_batch(photographs):
    transform = Uint8Transform(our_transforms.finetune_transform((64, 48), finetune_args()))
    pixels, todo = [], []
    for seed in range(64):
        seeding.seed_sample(seed)
        image, numbers = transform(encoded(photographs[seed % 2].resize((200, 150))))
        pixels.append(image)
        todo.append(numbers)
    pixels, todo = torch.stack(pixels), torch.tensor(todo, dtype=torch.float64)
    assert set(todo[:, [1, 4]].flatten().tolist()) == {-1.0, *map(float, range(15))}
    batch = transform.finish(pixels, todo, CPU)
    for i in range(64):
        assert torch.equal(transform.finish(pixels[i : i + 1], todo[i : i + 1], CPU)[0], batch[i])
    groups = [transform.finish(pixels[i::3], todo[i::3], CPU) for i in range(3)]
    assert all(torch.equal(group, batch[i::3]) for i, group in enumerate(groups))


def test_the_number_of_images_per_operation_does_not_matter(photographs):
    """A GPU processes several images per operation, a CPU one."""
    images = [np.array(photographs[seed % 2].resize((224, 200))) for seed in range(5)]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (n, H, W, 3) -> (n, 3, H, W)
    fill = torch.tensor((124, 116, 104), dtype=torch.uint8)[:, None, None]
    for name, op in OPERATIONS.items():
        _, transform = single_operation(name)
        notes = []
        for seed in range(5):
            seeding.seed_sample(seed)
            notes.append(transform.draw([]))
        parameters = torch.tensor(notes, dtype=torch.float64)[:, 1:, None, None, None].unbind(1)
        got = randaugment.OPERATIONS[op.aug_fn](batch, *parameters, fill)
        want = carried_out(transform, images, notes)
        assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), want), name


def test_unsupported_policies_are_left_to_pillow():
    jitter, bilinear = transforms.ColorJitter(0.4), Image.Resampling.BILINEAR
    assert uint8_transform(jitter, policy("rand-m9")).draw is not None
    for steps in (
        [policy("rand-m9"), jitter],  # the order is kept
        [policy("rand-m9", interpolation=(bilinear, Image.Resampling.BICUBIC))],  # drawn for each image
        [policy("rand-m9", interpolation=bilinear)],
    ):
        transform = uint8_transform(*steps)
        assert transform.draw is None
        assert transform.augment == steps


# ---- erasing


@pytest.mark.parametrize("count", [1, 3])
def test_erased_boxes_are_those_of_timm(photographs, count):
    """Boxes only: each loader draws its own colours."""
    args = finetune_args(aa="none", hflip=0.0, reprob=0.5, remode="const", recount=count)
    released, fast = pair(our_transforms.finetune_transform((64, 48), args))
    erased = 0
    for seed in range(60):
        data = encoded(photographs[seed % 2].resize((100, 80)))
        want, got = finished(released, data, seed), finished(fast, data, seed)
        assert torch.equal(want == 0, got == 0)
        erased += bool((want == 0).any())
    assert erased / 60 == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(("mode", "deviation", "within"), [("pixel", 1, 1), ("rand", 1, 0), ("const", 0, 0)])
def test_colours_of_erased_boxes(mode, deviation, within):
    step = RandomErasing(1.0, mode=mode, device="cpu")
    normalize = transforms.Normalize([0.5] * 3, [0.25] * 3)
    transform = Uint8Transform(our_transforms.Recipe([transforms.Resize((8, 8)), normalize, step], IMAGENET))
    box = [8, 40, 16, 48]
    todo = torch.tensor([[0, seed, *box] for seed in range(64)])
    images = transform.finish(torch.full((64, 64, 64, 3), 200, dtype=torch.uint8), todo, CPU)
    boxes = images[:, :, 8:40, 16:48].clone()
    assert boxes.std().item() == pytest.approx(deviation, abs=0.1)
    assert boxes.std(dim=(2, 3)).mean().item() == pytest.approx(within, abs=0.02)
    images[:, :, 8:40, 16:48] = (200 / 255 - 0.5) / 0.25
    assert images.std() < 1e-6  # nothing else has changed; up to the rounding of float32 sums
    alone = transform.finish(torch.full((1, 64, 64, 3), 200, dtype=torch.uint8), todo[5:6], CPU)
    assert torch.equal(alone[0, :, 8:40, 16:48], boxes[5])  # independent of the batch
