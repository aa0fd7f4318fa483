"""Channels, orientation, mean and deviation of images."""

import argparse
import copy
import io
import json
import logging
import math

import numpy as np
import pytest
import torch
from data_helpers import put, run_pack, warnings_of, write_shard
from helpers import TINY_FINETUNE, TINY_PRETRAIN, encoded, finetune_args
from PIL import Image, ImageOps
from randaugment_helpers import OPERATIONS

import main_pretrain
import pretrained
from Evaluation import probe
from Finetuning import main_finetune
from tools import export
from util import seeding
from util.checkpoints import checkpoint_file, inspection
from util.data import arrays, datasets, decode, randaugment, transforms
from util.data.pixels import IMAGENET, Pixels
from util.data.sources import readers
from util.errors import UserError

GREY, FIVE = Pixels((0.5,), (0.25,), 1), Pixels((0.5,) * 5, (0.25,) * 5, 5)


def flags(**values):
    return argparse.Namespace(**values)


# ---- which values


@pytest.mark.parametrize(
    ("args", "saved", "want"),
    [
        ({}, {}, Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 3, False)),  # the released code's
        ({"mean": None, "std": None, "exif": None, "in_chans": None}, {}, IMAGENET),
        ({"mean": [0.5], "std": [0.25]}, {}, Pixels((0.5,) * 3, (0.25,) * 3)),
        ({"mean": [0.1, 0.2, 0.3], "std": [1.0]}, {}, Pixels((0.1, 0.2, 0.3), (1.0,) * 3)),
        ({"in_chans": 1}, {}, Pixels((0.459,), (0.2256,), 1)),  # 0.299 x 0.485 + 0.587 x 0.456 + 0.114 x 0.406
        ({"in_chans": 2, "mean": [0.5], "std": [1.0]}, {}, Pixels((0.5,) * 2, (1.0,) * 2, 2)),
        ({}, {"mean": [0.5] * 3, "std": [0.25] * 3, "exif": True}, Pixels((0.5,) * 3, (0.25,) * 3, 3, True)),
        ({"exif": False}, {"exif": True}, IMAGENET),
        ({"in_chans": 1}, {"mean": [0.5] * 3, "std": [0.25] * 3, "in_chans": 3}, Pixels((0.459,), (0.2256,), 1)),
        ({"mean": [0.1], "std": [0.2]}, {"mean": [0.5] * 3, "std": [0.5] * 3}, Pixels((0.1,) * 3, (0.2,) * 3)),
    ],
)
def test_values_come_from_the_flags_then_from_the_checkpoint(args, saved, want):
    found = Pixels.of(flags(**args), saved)
    assert found == want
    assert Pixels.of(flags(**found.arguments())) == found


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mean": [0.5]}, "--mean and --std belong together"),
        ({"std": [0.5], "mean": None}, "--mean and --std belong together"),
        ({"mean": [0.5] * 2, "std": [0.5]}, "--mean has 2 numbers, and images 3 channels: give one number, or 3"),
        ({"mean": [0.5], "std": [0.5] * 3, "in_chans": 1}, "--std has 3 numbers, .* 1 channels: give one number$"),
        ({"in_chans": 5}, "images of 5 channels have no usual mean .*: give --mean and --std, one number or 5 each"),
    ],
)
def test_values_that_do_not_fit(args, message):
    with pytest.raises(UserError, match=message):
        Pixels.of(flags(**args), {"mean": [0.5] * 3, "std": [0.5] * 3})


def test_every_transform_normalises_with_them(photographs):
    """The value 255 becomes (1 - mean) / std of its channel, with both loaders."""
    args = finetune_args(mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0], aa="none", reprob=0.0)
    white = encoded(Image.new("RGB", (40, 40), "white"), "PNG")
    steps = transforms.eval_transform((16, 16), "square", Pixels.of(args))
    for recipe in (transforms.pretrain_transform((16, 16), args), transforms.finetune_transform((16, 16), args), steps):
        for loader in ("pil", "fast"):
            transform = datasets.pixels_by(loader, recipe)
            image, numbers = transform(white)
            got = transform.finish(image[None], torch.tensor([numbers]), torch.device("cpu"))
            want = torch.tensor([0.9 / 0.5, 0.8 / 1.0, 0.7 / 2.0])[None, :, None, None].expand(1, 3, 16, 16)
            torch.testing.assert_close(got, want)


# ---- orientation


def oriented(image, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_does(photographs, orientation, kind):
    """Whole, and any crop, equal to Pillow's; without --exif images stay as they are stored, except TIFFs."""
    data = oriented(photographs[0].resize((61, 42)), orientation, kind)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    turning = IMAGENET._replace(exif=True)
    assert np.array_equal(np.asarray(decode.with_pillow(data, turning)), upright)
    assert np.array_equal(decode.crop_of(data, pixels=turning), upright)
    height, width = upright.shape[:2]
    assert (height, width) == ((61, 42) if orientation > 4 else (42, 61))
    for top, left, h, w in ((0, 0, 11, 7), (height - 9, 3, 9, 20), (5, width - 12, 17, 12)):
        got = decode.crop_of(data, lambda *size, box=(top, left, h, w): box, (h, w), turning)
        assert np.array_equal(got, upright[top : top + h, left : left + w])
    for stored in (np.asarray(decode.with_pillow(data)), decode.crop_of(data)):
        assert stored.shape == (upright.shape if kind == "TIFF" else (42, 61, 3))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_large_crops_are_turned_at_a_lower_resolution(photographs, orientation):
    data = oriented(photographs[1].resize((1200, 800), Image.Resampling.BICUBIC), orientation, "JPEG")
    turning = IMAGENET._replace(exif=True)
    box, size = (96, 48, 640, 208), (200, 65)
    small = decode.crop_of(data, lambda *_: box, size, turning)
    full = decode.crop_of(data, lambda *_: box, None, turning)
    assert small.shape[0] * 2 <= full.shape[0]
    small, full = (np.asarray(Image.fromarray(x).resize(size[::-1], Image.Resampling.BICUBIC)) for x in (small, full))
    assert np.abs(small.astype(int) - full).mean() < 1


def test_an_image_is_turned_before_it_is_cropped(photographs):
    """A crop is drawn for the upright image: the same one as of a copy that was turned beforehand."""
    args = finetune_args(aa="none", reprob=0.0, exif=True)
    data = oriented(photographs[0], 6, "PNG")
    copy = encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), "PNG")
    for loader in ("pil", "fast"):
        transform = datasets.pixels_by(loader, transforms.finetune_transform((32, 24), args))
        got = []
        for content in (data, copy):
            seeding.seed_sample(0, 1, 2)
            got.append(transform(content)[0])
        assert torch.equal(*got)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_packed_images_keep_their_orientation(photographs, tmp_path, kind):
    """Reduced and encoded anew, they are turned as the original is, or not, depending on --exif alone."""
    name = f"photo.{kind.lower()}"
    data = oriented(photographs[0], 6, kind)
    put(tmp_path, f"train/a/{name}", content=data)
    run_pack(tmp_path, tmp_path / "shards", "--short_side", 100)
    packed = readers.open_source(f"wds:{tmp_path / 'shards'}", "train").read(0)
    assert packed != data
    for exif, size in ((True, (100, 149)), (False, (100, 149) if kind == "TIFF" else (149, 100))):
        pixels = IMAGENET._replace(exif=exif)
        image, original = decode.with_pillow(packed, pixels), decode.with_pillow(data, pixels)
        assert image.size == size
        difference = np.asarray(image).astype(int) - original.resize(size, Image.Resampling.BICUBIC)
        assert np.abs(difference).mean() < 4  # another image, or one that is turned otherwise, differs by 40


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(photographs, value):
    data = oriented(photographs[0].resize((20, 10)), value, "JPEG")
    assert decode.with_pillow(data, IMAGENET._replace(exif=True)).size == (20, 10)


def test_damaged_exif_turns_nothing(photographs):
    data = encoded(photographs[0].resize((20, 10)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff nothing")
    assert decode.with_pillow(data, IMAGENET._replace(exif=True)).size == (20, 10)
    assert decode.crop_of(data, pixels=IMAGENET._replace(exif=True)).shape == (10, 20, 3)


# ---- grey


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "JPEG2000"])
def test_colours_become_grey(photographs, kind):
    """Both loaders: 0.299 red + 0.587 green + 0.114 blue, as Pillow's L; libjpeg's own grey differs by rounding."""
    data = encoded(photographs[0], kind)
    colours = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)
    want = colours @ (0.299, 0.587, 0.114)
    image = decode.with_pillow(data, GREY)
    fast = decode.crop_of(data, pixels=GREY)
    assert (image.mode, fast.shape, fast.dtype) == ("L", (427, 640, 1), np.uint8)
    assert np.abs(np.asarray(image) - want).max() <= 0.51
    difference = np.abs(fast[..., 0] - want)
    assert difference.mean() < 0.5
    assert np.quantile(difference, 0.99) <= 1.6  # where RGB was clipped, it is larger


def test_grey_files_stay_as_they_are(photographs):
    grey = np.asarray(photographs[0].convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 7)
    for data in (encoded(Image.fromarray(grey), "PNG"), encoded(deep, "PNG"), encoded(deep, "TIFF")):
        assert np.array_equal(np.asarray(decode.with_pillow(data, GREY)), grey)
        assert np.array_equal(decode.crop_of(data, pixels=GREY)[..., 0], grey)
    jpeg = encoded(Image.fromarray(grey), "JPEG")
    assert np.array_equal(decode.crop_of(jpeg, pixels=GREY)[..., 0], np.asarray(decode.with_pillow(jpeg, GREY)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_randaugment_of_grey_images_equals_timms(photographs, name):
    """Each operation of the training device gives the bytes of timm's in Pillow, for images of mode L."""
    grey = photographs[1].convert("L").resize((50, 41))
    step = copy.deepcopy(OPERATIONS[name])
    step.prob, step.kwargs["fillcolor"] = 1.0, (117,)
    recorded = randaugment.recording_copy(randaugment.RandAugment([step], num_layers=1))
    for seed in range(3):
        seeding.seed_everything(seed)
        want = np.asarray(step(grey))
        seeding.seed_everything(seed)
        notes = torch.tensor([recorded.ops[0]([])], dtype=torch.float64)
        images = torch.from_numpy(np.array(grey))[None, None]
        fill = torch.full((1, 1, 1), 117, dtype=torch.uint8)
        got = randaugment.carry_out_layers(images, notes, notes, torch.zeros(1, 1, dtype=torch.long), fill)
        assert np.array_equal(got[0, 0].numpy(), want)


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "3a", "none"])
def test_grey_images_are_augmented(photographs, aa):
    """Both loaders draw the same crops and operations; what differs is rounding, and the flip comes later in one."""
    args = finetune_args(in_chans=1, aa=aa, hflip=0.0, reprob=0.0, color_jitter=None)
    data, got = encoded(photographs[0], "PNG"), []
    for loader in ("pil", "fast"):
        transform = datasets.pixels_by(loader, transforms.finetune_transform((32, 24), args))
        seeding.seed_sample(0, 0, 5)
        image, numbers = transform(data)
        batch = transform.finish(image[None], torch.tensor([numbers], dtype=torch.float64), torch.device("cpu"))
        assert batch.shape == (1, 1, 32, 24)
        got.append(batch * 0.2256 * 255)
    assert (got[0] - got[1]).abs().mean() < 1.5


# ---- other numbers of channels


def bands(photographs, dtype=np.uint8):
    """Return red, green and blue of a photograph, its grey and its reverse grey, (47, 64, 5)."""
    small = photographs[0].resize((64, 47))
    image = np.dstack([small, small.convert("L"), 255 - np.asarray(small.convert("L"))])
    return (image.astype(np.float64) / 255 * (np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1)).astype(dtype)


def npy(array, **how):
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


def whole(height, width):
    return 0, 0, height, width


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i2", "<u4", "f2", ">f4", "f8"])
def test_arrays(photographs, dtype):
    """Integers are divided by the largest of their type, floating point is kept; any layout of the memory is read."""
    image = bands(photographs, np.dtype(dtype))
    want = image.astype(np.float64) / (np.iinfo(dtype).max if image.dtype.kind in "iu" else 1)
    for layout in (image, np.asfortranarray(image)):
        got = arrays.crop_of(npy(layout), whole, FIVE)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=1e-7)
    part = arrays.crop_of(npy(image), lambda height, width: (3, 5, 20, 10), FIVE)
    np.testing.assert_allclose(part, want[3:23, 5:15], atol=1e-7)


def test_version_2_of_the_format(photographs):
    file = io.BytesIO()
    np.lib.format.write_array(file, bands(photographs), version=(2, 0))
    assert arrays.crop_of(file.getvalue(), whole, FIVE).shape == (47, 64, 5)


@pytest.mark.parametrize("how", ["bands", "planes", "pages", "tiles", "deflated"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiffs_of_several_bands(photographs, how, dtype):
    tifffile = pytest.importorskip("tifffile")
    image, file = bands(photographs, dtype), io.BytesIO()
    options = {
        "bands": {"photometric": "minisblack", "planarconfig": "contig"},
        "planes": {"photometric": "minisblack", "planarconfig": "separate"},
        "pages": {"photometric": "minisblack", "metadata": {"axes": "CYX"}},
        "tiles": {"photometric": "minisblack", "planarconfig": "contig", "tile": (16, 16)},
        "deflated": {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"},
    }[how]
    tifffile.imwrite(file, image.transpose(2, 0, 1) if how in ("planes", "pages") else image, **options)
    got = arrays.crop_of(file.getvalue(), whole, FIVE)
    np.testing.assert_allclose(got, image / (1 if dtype == np.float32 else np.iinfo(dtype).max), atol=1e-7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_of_several_bands_is_turned(photographs, orientation):
    tifffile = pytest.importorskip("tifffile")
    image, file = bands(photographs), io.BytesIO()
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(file, image, photometric="minisblack", planarconfig="contig", extratags=tag)
    for exif, turn in ((True, orientation), (False, 1)):
        want = [
            np.asarray(
                decode.with_pillow(oriented(Image.fromarray(image[..., i]), turn, "PNG"), GREY._replace(exif=True))
            )
            for i in range(5)
        ]
        got = arrays.crop_of(file.getvalue(), whole, FIVE._replace(exif=exif))
        np.testing.assert_allclose(got * 255, np.dstack(want), atol=1e-4)


def test_bands_of_other_files(photographs):
    """A PNG with four bands can be read with four channels."""
    image = photographs[0].convert("RGBA")
    got = arrays.crop_of(encoded(image, "PNG"), whole, Pixels((0.5,) * 4, (0.5,) * 4, 4))
    np.testing.assert_allclose(got, np.asarray(image) / 255, atol=1e-7)


def test_arrays_are_images_where_there_are_no_others(photographs, tmp_path, caplog):
    """In class folders and in shards; beside images they are left out, and in folders counted, as before."""
    image, png = npy(bands(photographs, np.uint16)), encoded(photographs[0], "PNG")
    put(tmp_path / "own", "train/a/1.npy", "train/a/2.NPY", "train/b/deep/3.npy", content=image)
    own = readers.open_source(str(tmp_path / "own"), "train")
    assert (own.classes, own.labels.tolist()) == (["a", "b"], [0, 0, 1])
    run_pack(tmp_path / "own", tmp_path / "shards")
    packed = readers.open_source(f"wds:{tmp_path / 'shards'}", "train")
    assert sorted(packed.labels.tolist()) == [0, 0, 1]
    for source in (own, packed):
        assert [source.read(index) for index in range(3)] == [image] * 3
    put(tmp_path / "both", "train/a/1.npy", content=image)
    put(tmp_path / "both", "train/a/1.png", content=png)
    source, (said,) = warnings_of(caplog, tmp_path / "both")
    assert "1 files have no suffix of an image format" in said
    assert [source.read(index) for index in range(len(source.labels))] == [png]
    (tmp_path / "mixed").mkdir()
    write_shard(tmp_path / "mixed" / "train.tar", [("a/1.npy", image), ("a/1.png", png), ("a/1.cls", b"0")])
    source = readers.open_source(f"wds:{tmp_path / 'mixed'}", "train")
    assert [source.read(index) for index in range(len(source.labels))] == [png]


def of_size(shape, dtype="|u1"):
    """The header of a .npy file, and no data."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.zeros((8, 9, 4), np.uint8)), "shape 8 x 9 x 4, not height x width x 5 channels"),
        (npy(np.zeros((5, 8, 9), np.uint8)), "shape 5 x 8 x 9, not height x width x 5 channels"),
        (npy(np.zeros((8, 9), np.uint8)), "shape 8 x 9, not"),
        (npy(np.zeros((8, 0, 5), np.uint8)), "8 x 0 x 5 values are none"),
        (npy(np.full((8, 9, 5), np.nan)), "not finite"),
        (npy(np.full((8, 9, 5), np.inf, np.float32)), "not finite"),
        (npy(np.full((8, 9, 5), 1e300)), "not finite in float32"),
        (npy(np.array([[[None] * 5]]), allow_pickle=True), "type object, and are no"),
        (npy(np.zeros((8, 9, 5), complex)), "type complex128"),
        (npy(np.zeros((8, 9, 5), bool)), "type bool"),
        (npy(np.zeros((8, 9), [("a", "f4")])), "type"),
        (of_size((10**9, 10**9, 5)), "values are none, or more than"),
        (of_size((-8, -9, 5)), "ends after|values|negative"),
        (of_size((100, 100, 5), "<f4"), "ends after 0 of 200000 bytes"),
        (npy(np.zeros((8, 9, 5), np.uint8))[:40], "."),
        (b"\x93NUMPY\x09\x00", "."),
        (b"II*\0", "."),
        (b"", "no image of a known format"),
        (encoded(Image.new("RGB", (9, 8)), "PNG"), "shape 8 x 9 x 3, not height x width x 5 channels"),
        (encoded(Image.new("L", (9, 8)), "JPEG"), "shape 8 x 9 x 1, not height x width x 5 channels"),
    ],
)
def test_arrays_that_cannot_be_read(data, reason):
    with pytest.raises(decode.BrokenImage, match=reason):
        arrays.crop_of(data, whole, FIVE)


def test_images_of_other_channels_are_cropped_flipped_and_erased(photographs):
    """By the values of the crop, resized as torchvision does; RandAugment and colour jitter are refused."""
    image = bands(photographs, np.uint16)
    args = finetune_args(in_chans=5, mean=[0.5], std=[0.25], aa="none", reprob=0.0, scale=[1.0, 1.0], hflip=1.0)
    for recipe in (transforms.finetune_transform((16, 16), args), transforms.pretrain_transform((16, 16), args)):
        transform = datasets.pixels_by("pil", recipe)  # one line says that this loader cannot
        seeding.seed_sample(0, 0, 0)
        pixels, numbers = transform(npy(image))
        got = transform.finish(pixels[None], torch.tensor([numbers], dtype=torch.float64), torch.device("cpu"))
        assert (got.shape, got.dtype) == ((1, 5, 16, 16), torch.float32)
        channels = got[0].flip(2) * 0.25 + 0.5
        torch.testing.assert_close(channels[4], 1 - channels[3], atol=2e-3, rtol=0)
        torch.testing.assert_close(
            channels.mean((1, 2)), torch.tensor(image / 65535).float().mean((0, 1)), atol=0.1, rtol=0
        )
    erasing = finetune_args(**vars(args) | {"reprob": 1.0, "remode": "const"})
    transform = datasets.pixels_by("fast", transforms.finetune_transform((16, 16), erasing))
    pixels, numbers = transform(npy(image))
    got = transform.finish(pixels[None], torch.tensor([numbers], dtype=torch.float64), torch.device("cpu"))
    assert 0 < (got == 0).all(dim=1).sum() < 256
    for change in ({"aa": "rand-m9"}, {"color_jitter": 0.4}):
        with pytest.raises(UserError, match="--aa none"):
            transforms.finetune_transform((16, 16), finetune_args(**vars(args) | change))


# ---- runs


def test_an_array_needs_another_number_of_channels(photographs):
    for read in (decode.with_pillow, decode.crop_of):
        with pytest.raises(decode.BrokenImage, match="NumPy is read only with --in_chans other than 1 and 3, not 3"):
            read(npy(bands(photographs)))


def test_scripts_take_the_values_of_the_checkpoint(image_folder, tmp_path, run_script, capsys, caplog):
    """Finetuning, evaluation, probes and exports; flags come first. A run resumes with its own values only."""
    common = ["--data_path", image_folder, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 8]
    pretrain = [*TINY_PRETRAIN, *common, "--vis_freq", 0]
    run_script(main_pretrain, *pretrain, "--output_dir", tmp_path, "--mean", 0.5, "--std", 0.1, 0.2, 0.3, "--exif")
    file, own = tmp_path / "checkpoint-last.pth", Pixels((0.5,) * 3, (0.1, 0.2, 0.3), 3, True)
    assert pretrained.read(file).pixels == own
    with pytest.raises(SystemExit):
        run_script(main_pretrain, *pretrain, "--output_dir", tmp_path / "again", "--resume", file)
    said = capsys.readouterr().err
    for change in ("exif True -> False", "mean [0.5, 0.5, 0.5] -> [0.485,", "std [0.1, 0.2, 0.3] -> [0.229,"):
        assert change in said

    finetune = [*TINY_FINETUNE, *common, "--finetune", file, "--output_dir"]
    with caplog.at_level(logging.INFO):
        run_script(main_finetune, *finetune, tmp_path / "same")
    assert "images of 3 channels with mean 0.5 and deviation 0.1 0.2 0.3, turned as EXIF says; what no" in caplog.text
    assert pretrained.read(tmp_path / "same" / "checkpoint-last.pth").pixels == own
    run_script(main_finetune, *finetune, tmp_path / "other", "--mean", 0.25, "--std", 1, "--exif", "False")
    other = tmp_path / "other" / "checkpoint-last.pth"
    assert pretrained.read(other).pixels == Pixels((0.25,) * 3, (1.0,) * 3)

    words = ["--data_path", image_folder, "--probe", "knn", "--k", 3, "--batch_size", 8, "--device", "cpu"]
    run_script(probe, file, *words, "--num_workers", 0, "--output", tmp_path / "probe.json")
    saved = json.loads((tmp_path / "probe.json").read_text())["args"]
    assert {name: saved[name] for name in own.arguments()} == own.arguments()
    run_script(export, other, "--to", "safetensors")
    about = json.loads(other.with_suffix(".json").read_text())
    assert (about["pretrained_cfg"]["mean"], about["pretrained_cfg"]["std"]) == ([0.25] * 3, [1.0] * 3)
    assert pretrained.read(other.with_suffix(".safetensors")).pixels == pretrained.read(other).pixels


def test_an_older_checkpoint_has_imagenets_values(image_folder, tmp_path, run_script, capsys):
    """It does not say which; a run that continues it keeps them."""
    words = [*TINY_PRETRAIN, "--data_path", image_folder, "--epochs", 2, "--warmup_epochs", 0, "--batch_size", 8]
    run_script(main_pretrain, *words, "--vis_freq", 0, "--save_freq", 1, "--output_dir", tmp_path / "new")
    content = checkpoint_file.read(tmp_path / "new" / "checkpoint-0.pth")
    for name in ("mean", "std", "exif", "in_chans", "dtype"):
        delattr(content["args"], name)
    torch.save(content, tmp_path / "old.pth")
    assert pretrained.read(tmp_path / "old.pth").pixels == IMAGENET
    more = ["--vis_freq", 0, "--resume", tmp_path / "old.pth", "--output_dir"]
    run_script(main_pretrain, *words, *more, tmp_path / "resumed")
    with pytest.raises(SystemExit):
        run_script(main_pretrain, *words, *more, tmp_path / "other", "--mean", 0.5, "--std", 0.5)
    assert "mean [0.485, 0.456, 0.406] -> [0.5, 0.5, 0.5]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [{"mean": [0.5, "x"]}, {"std": [0.0] * 3}, {"mean": [], "std": []}, {"exif": 1}, {"mean": [math.nan] * 3}]
)
def test_a_damaged_checkpoint_is_refused(args):
    with pytest.raises(UserError, match=f"its args say {next(iter(args))}"):
        inspection.saved_arguments({"args": argparse.Namespace(**args)})
