"""The fast path against Pillow, torchvision and timm: decoding, crops, every operation of RandAugment, erasing."""

import argparse
import copy
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from conftest import encoded
from test_data import MEAN, STD, finetune_args, photograph
from util import augment, datasets, decode

CPU = torch.device("cpu")
PRETRAIN = argparse.Namespace(scale=[0.2, 1.0], hflip=0.5)


def whole(height, width):
    return 0, 0, height, width


def levels(images):
    """Normalised images (B, 3, H, W) as values from 0 to 255."""
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
def test_images_of_every_kind_are_those_of_pillow(photographs, tmp_path, mode):
    (tmp_path / "image").write_bytes(MODES[mode](photographs[0].resize((90, 60))))
    data = (tmp_path / "image").read_bytes()
    with Image.open(tmp_path / "image") as image:
        want = np.array(image.convert("RGB"))
    assert want.shape == ((60, 90, 3) if "1 x 1" not in mode else (1, 1, 3))  # nothing is rotated
    assert np.array_equal(decode.crop_of(data, whole), want)
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
def test_16_bits_keep_their_upper_8(kind):
    """Pillow's own conversion saturates: all that is brighter than 255 of 65535 would be white."""
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1021
    file = GREY_16[kind](pixels)
    for got in (decode.crop_of(file, whole), np.array(decode.with_pillow(file))):
        assert np.array_equal(got, np.repeat((pixels >> 8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("white", [1023, 4095, 65535])
def test_bits_of_a_pgm_are_those_below_its_white(white):
    file = b"P5 3 1 %d\n" % white + np.array([0, white // 2, white], ">u2").tobytes()
    assert np.array(decode.with_pillow(file))[0, :, 0].tolist() == [0, 127, 255]


def test_12_bits_of_a_tiff_keep_their_upper_8():
    grey = np.arange(2, dtype=np.uint16)[None]
    file = encoded(Image.fromarray(grey), "TIFF", compression=None)  # 2 pixels of 16 bits, where 12 are written now
    depth = file.index(bytes([2, 1, 3, 0, 1, 0, 0, 0, 16, 0]))
    file = file[: depth + 8] + bytes([12, 0]) + file[depth + 10 : -4] + bytes([0xFF, 0xF8, 0x00])
    assert np.array(decode.with_pillow(file))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "TIFF"), (np.float32, "TIFF"), (np.float32, "PPM")])
@pytest.mark.parametrize("most", [1, 255, 65535, 10**6])
def test_bits_whose_white_is_not_known_are_broken(dtype, kind, most):
    file = encoded(Image.fromarray(np.linspace(0, most, 64).reshape(8, 8).astype(dtype)), kind)
    for read in (decode.with_pillow, lambda data: decode.crop_of(data, whole)):
        with pytest.raises(decode.BrokenImage, match="which value is white is not known"):
            read(file)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_crops_are_those_of_the_whole_image(photographs, subsampling, options):
    """Rows below a crop are not decoded, and the colours of its last rows do not show it."""
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
    shapes = []
    jpeg = decode.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        decode.simplejpeg, "decode_jpeg", lambda *a, **k: shapes.append(jpeg(*a, **k).shape) or jpeg(*a, **k)
    )
    decode.crop_of(encoded(photographs[0]), lambda *_: (10, 20, 100, 50))
    decode.crop_of(encoded(photographs[0].resize((2500, 1700))), lambda *_: (0, 0, 1200, 1300), (192, 192))
    assert shapes == [(112, 640, 3), (301, 625, 3)]  # the second one at a quarter of its sides


@pytest.mark.parametrize("crop", [(96, 200, 608, 600), (0, 0, 1200, 1200), (8, 0, 1192, 1800), (40, 80, 580, 580)])
def test_a_crop_much_larger_than_the_input_is_decoded_smaller(photographs, crop):
    """The bound that `crop_of` states."""
    for photo in photographs:
        data = encoded(photo.resize((1800, 1203), Image.Resampling.BICUBIC), quality=93)
        small, full = (decode.crop_of(data, lambda *_: crop, size) for size in ((192, 192), None))
        assert 1.5 * 192 <= min(small.shape[:2]) <= min(full.shape[:2]) / 2
        small, full = (np.array(Image.fromarray(x).resize((192, 192), Image.Resampling.BICUBIC)) for x in (small, full))
        assert np.abs(small.astype(int) - full).mean() < 1


# ---- crops and flips


def pair(transform):
    return datasets.PillowTransform(transform), augment.Uint8Transform(transform)


def finished(transform, data, seed):
    """An image (3, H, W) as it reaches the model."""
    datasets._seed_generators(seed)
    pixels, todo = transform(data)
    return transform.finish(pixels[None], torch.tensor([todo]), CPU)[0]


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_crops_and_flips_are_those_of_the_released_path(photographs, recipe):
    """The same random numbers give the same crop and flip: pixels differ by rounding only."""
    make = datasets.pretrain_transform if recipe == "pretrain" else datasets.finetune_transform
    args = PRETRAIN if recipe == "pretrain" else finetune_args(aa="none", reprob=0.0)
    released, fast = pair(make((96, 64), args))
    for seed in range(40):
        data = encoded(photographs[seed % 2].resize((200 + seed, 150)), quality=93)
        difference = (levels(finished(released, data, seed)) - levels(finished(fast, data, seed))).abs()
        assert difference.max() < 2.5, seed
        assert difference.mean() < 0.2, seed


@pytest.mark.parametrize("how", [datasets.PillowTransform, augment.Uint8Transform])
def test_crops_have_the_recipe_s_area_ratio_and_flip_rate(how):
    """Crops of an image whose pixels are their own coordinates show where they were taken."""
    side = 256
    row, column = np.mgrid[0:side, 0:side].astype(np.uint8)
    data = encoded(Image.fromarray(np.stack([row, column, row], axis=2)), "PNG")
    transform = how(datasets.pretrain_transform((64, 64), PRETRAIN))
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
    assert np.mean(areas) == pytest.approx(0.541, abs=0.03)  # 0.6, less the large crops that do not fit their ratio
    assert 0.72 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.38
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.03)
    assert flips / 400 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("size", "resize"), [((224, 224), "square"), ((96, 80), "shorter"), ((384, 384), "square"), ((384, 384), "shorter")]
)
def test_evaluation_transforms_agree(photographs, size, resize):
    released, fast = pair(datasets.eval_transform(size, resize))
    for photo in photographs:
        data = encoded(photo, quality=93)
        difference = (levels(finished(released, data, 0)) - levels(finished(fast, data, 0))).abs()
        assert difference.max() < 2.5
        assert difference.mean() < 0.2


def test_colour_jitter_and_other_policies_go_through_pillow(photographs):
    """With the same random numbers they give the same images, but for the pixels of the crop, which are rounded."""
    data = encoded(photographs[0].resize((200, 150)), quality=93)
    for changes in ({"aa": "none", "color_jitter": 0.4}, {"aa": "v0"}, {"aa": "augmix-m3-w2"}):
        released, fast = pair(datasets.finetune_transform((64, 64), finetune_args(hflip=0.0, reprob=0.0, **changes)))
        differences = [
            (levels(finished(released, data, seed)) - levels(finished(fast, data, seed))).abs().mean()
            for seed in range(20)
        ]
        assert np.median(differences) < 1, changes


# ---- RandAugment

EXACT = 0, 0
ROUNDED = 1, 1.01  # of 255: mean and largest difference
# Pillow interpolates with another bicubic kernel (a = -1) than OpenCV (a = -0.75), which shows at edges
BOUNDS = {
    "AutoContrast": EXACT,
    "Equalize": EXACT,
    "Invert": EXACT,
    "PosterizeIncreasing": EXACT,
    "SolarizeIncreasing": EXACT,
    "SolarizeAdd": EXACT,
    "BrightnessIncreasing": EXACT,
    "ContrastIncreasing": (1, 2),  # the mean of the image may round to the next level
    "ColorIncreasing": (1, 2),
    "SharpnessIncreasing": ROUNDED,
    "Rotate": (1.5, 10),  # mean, and 99th percentile
    "ShearX": (1.5, 10),
    "ShearY": (1.5, 10),
    "TranslateXRel": (1, 1),
    "TranslateYRel": (1, 1),
}


def recipe_steps():
    released = datasets.finetune_transform((224, 224), finetune_args())
    (step,) = (t for t in released.transforms if isinstance(t, auto_augment.RandAugment))
    return step, augment.on_arrays(step)


def test_randaugment_draws_what_timm_draws():
    """The operations of the recipe are timm's, with timm's rates and magnitudes; none is left to Pillow."""
    released, fast = recipe_steps()
    assert [op.name for op in fast.ops] == [op.name for op in released.ops] == list(BOUNDS_ORDER)
    for op, fast_op in zip(released.ops, fast.ops, strict=True):
        assert fast_op.aug_fn is augment.OPERATIONS[op.aug_fn]
        assert (fast_op.level_fn, fast_op.prob, fast_op.magnitude) == (op.level_fn, op.prob, op.magnitude)
        assert (fast_op.magnitude_std, fast_op.magnitude_max) == (op.magnitude_std, op.magnitude_max)


BOUNDS_ORDER = [op.name for op in recipe_steps()[0].ops]


@pytest.mark.parametrize("name", BOUNDS_ORDER)
def test_operation_against_timm(photographs, name):
    """Each operation at 30 drawn magnitudes; README states these bounds."""
    op, fast = (next(op for op in copy.deepcopy(step.ops) if op.name == name) for step in recipe_steps())
    op.prob = fast.prob = 1
    differences, changed = [], 0
    for seed in range(30):
        image = photographs[seed % 2].resize((224, 200))
        pixels = np.array(image)
        random.seed(seed)
        want = np.array(op(image)).astype(int)
        random.seed(seed)
        got = fast(pixels).astype(int)
        differences.append(np.abs(got - want))
        changed += not np.array_equal(got, pixels)
        assert np.array_equal(pixels, np.array(image))  # the argument is left alone
    mean, largest = BOUNDS[name]
    assert max(d.mean() for d in differences) <= mean
    if name.startswith(("Rotate", "Shear", "Translate")):
        assert max(np.percentile(d, 99) for d in differences) <= largest
    else:
        assert max(d.max() for d in differences) <= largest
    assert changed > 20 or name == "AutoContrast"  # these photographs use all 256 levels


def test_autocontrast_stretches():
    pixels = np.array(photograph(50, 40)) // 3 + 40
    got = augment.auto_contrast(pixels)
    assert np.array_equal(got, np.array(auto_augment.auto_contrast(Image.fromarray(pixels))))
    assert (got.min(), got.max()) == (0, 255)


@pytest.mark.parametrize("operation", ["auto_contrast", "equalize"])
def test_an_image_of_one_colour_stays(operation):
    pixels = np.full((9, 7, 3), (3, 200, 255), np.uint8)
    assert np.array_equal(getattr(augment, operation)(pixels), pixels)


def test_randaugment_as_a_whole(photographs):
    """The same seed gives the same operations in the same order."""
    released, fast = recipe_steps()
    differences = []
    for seed in range(150):
        image = photographs[seed % 2].resize((224, 224))
        datasets._seed_generators(seed)
        want = np.array(released(image)).astype(int)
        datasets._seed_generators(seed)
        differences.append(np.abs(fast(np.array(image)) - want).mean())
    assert np.median(differences) < 1
    # an equalised or solarised rounding error can be large, but not in many images
    assert np.mean(np.array(differences) > 5) < 0.05


# ---- erasing


@pytest.mark.parametrize("count", [1, 3])
def test_boxes_are_those_of_timm(photographs, count):
    """Without colours, which each path draws for itself."""
    args = finetune_args(aa="none", hflip=0.0, reprob=0.5, remode="const", recount=count)
    released, fast = pair(datasets.finetune_transform((64, 48), args))
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
    transform = augment.Uint8Transform(transforms.Compose([transforms.Resize((8, 8)), normalize, step]))
    box = [8, 40, 16, 48]
    todo = torch.tensor([[0, seed, *box] for seed in range(64)])
    images = transform.finish(torch.full((64, 64, 64, 3), 200, dtype=torch.uint8), todo, CPU)
    boxes = images[:, :, 8:40, 16:48].clone()
    assert boxes.std().item() == pytest.approx(deviation, abs=0.1)
    assert boxes.std(dim=(2, 3)).mean().item() == pytest.approx(within, abs=0.02)
    images[:, :, 8:40, 16:48] = (200 / 255 - 0.5) / 0.25
    assert images.std() < 1e-6  # nothing else is touched; values are copies of one number, summed in float32
    alone = transform.finish(torch.full((1, 64, 64, 3), 200, dtype=torch.uint8), todo[5:6], CPU)
    assert torch.equal(alone[0, :, 8:40, 16:48], boxes[5])  # whatever the batch
