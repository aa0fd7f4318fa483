"""Images of other than one or three channels."""

import io

import numpy as np
import pytest
import torch
from data_helpers import put, run_pack, warnings_of, write_shard
from helpers import TINY_FINETUNE, TINY_PRETRAIN, encoded, finetune_args
from PIL import Image, ImageOps

import main_pretrain
import pretrained
from Finetuning import main_finetune
from util import seeding
from util.data import arrays, datasets, decode, transforms
from util.data.pixels import Pixels
from util.data.sources import readers
from util.errors import UserError

FIVE = Pixels((0.5,) * 5, (0.25,) * 5, 5)


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
    exif = Image.Exif()
    exif[0x0112] = orientation
    channels = [encoded(Image.fromarray(channel), "PNG", exif=exif) for channel in image.transpose(2, 0, 1)]
    upright = [np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(channel)))) for channel in channels]
    for turning, want in ((True, np.dstack(upright)), (False, image)):
        got = arrays.crop_of(file.getvalue(), whole, FIVE._replace(exif=turning))
        np.testing.assert_allclose(got * 255, want, atol=1e-4)


def test_a_tiff_of_several_bands_needs_a_library(monkeypatch, photographs):
    monkeypatch.setattr(arrays, "find_spec", lambda name: None)
    with pytest.raises(decode.BrokenImage, match="needs tifffile: pip install tifffile"):
        arrays.crop_of(encoded(photographs[0], "TIFF"), whole, FIVE)


def test_a_truncated_tiff_is_broken(photographs, caplog):
    """With a reason, and without lines of the library that do not name the file."""
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, bands(photographs), photometric="minisblack", planarconfig="contig", compression="zlib")
    for end in (20, 300, len(file.getvalue()) - 50):
        with pytest.raises(decode.BrokenImage):
            arrays.crop_of(file.getvalue()[:end], whole, FIVE)
    assert not caplog.records


def test_bands_of_other_files(photographs):
    """A PNG with four bands can be read with four channels."""
    image = photographs[0].convert("RGBA")
    got = arrays.crop_of(encoded(image, "PNG"), whole, Pixels((0.5,) * 4, (0.5,) * 4, 4))
    np.testing.assert_allclose(got, np.asarray(image) / 255, atol=1e-7)


def test_arrays_are_images_where_there_are_no_others(photographs, tmp_path, caplog):
    """In class folders and in shards; beside images, also those of another shard, they are left out and counted."""
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
    beside = "arrays (.npy) are read only where there are no other images and are left out; the first:"
    assert said == f"{tmp_path / 'both' / 'train'}: 1 {beside} a/1.npy"
    assert [source.read(index) for index in range(len(source.labels))] == [png]
    (tmp_path / "mixed").mkdir()
    write_shard(tmp_path / "mixed" / "train.tar", [("a/1.npy", image), ("a/1.png", png), ("a/1.cls", b"0")])
    members = [("a/2.npy", image), ("a/2.cls", b"0"), ("b/3.npy", image), ("b/3.mask.npy", image), ("b/4.txt", b"")]
    write_shard(tmp_path / "mixed" / "train-1.tar", members)
    source, (said,) = warnings_of(caplog, f"wds:{tmp_path / 'mixed'}")
    assert [source.read(index) for index in range(len(source.labels))] == [png]
    unused = "1 keys have neither an image of a known format nor a label and are left out; the first:"
    assert said == f"{source.root}: 2 {beside} train-1.tar: a/2.npy; {unused} train-1.tar: b/4 (.txt)"
    (tmp_path / "mixed" / "train.tar").unlink()
    with pytest.raises(UserError, match="b/3 has no label"):
        readers.open_source(f"wds:{tmp_path / 'mixed'}", "train")


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


def test_an_array_needs_another_number_of_channels(photographs):
    for read in (decode.with_pillow, decode.crop_of):
        with pytest.raises(decode.BrokenImage, match="NumPy is read only with --in_chans other than 1 and 3, not 3"):
            read(npy(bands(photographs)))


def test_a_run_of_five_channels(photographs, tmp_path, run_script, capsys):
    """Pretrained, finetuned and evaluated; every part that cannot take them says so."""
    for split, count in (("train", 8), ("val", 2)):
        for name in ("a", "b"):
            for i in range(count):
                put(tmp_path, f"{split}/{name}/{i}.npy", content=npy(bands(photographs, np.uint16)[i:]))
    common = ["--data_path", tmp_path, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 8]
    pretrain = [*TINY_PRETRAIN, *common, "--vis_freq", 1, "--in_chans", 5]
    with pytest.raises(SystemExit):
        run_script(main_pretrain, *pretrain, "--output_dir", tmp_path / "none")
    assert "images of 5 channels have no usual mean and deviation: give --mean and --std" in capsys.readouterr().err
    run_script(main_pretrain, *pretrain, "--output_dir", tmp_path / "out", "--mean", 0.5, "--std", 0.25)
    file = tmp_path / "out" / "checkpoint-last.pth"
    assert pretrained.read(file).pixels == FIVE._replace(mean=(0.5,) * 5, std=(0.25,) * 5)
    finetune = [*TINY_FINETUNE, *common, "--finetune", file, "--output_dir"]
    with pytest.raises(SystemExit):
        run_script(main_finetune, *finetune, tmp_path / "none")
    assert "--aa none" in capsys.readouterr().err
    run_script(main_finetune, *finetune, tmp_path / "tuned", "--aa", "none", "--mixup", 0.8, "--cutmix", 1)
    capsys.readouterr()
    run_script(main_finetune, *TINY_FINETUNE, *common, "--eval", "--resume", tmp_path / "tuned" / "checkpoint-last.pth")
    assert "on 4 images" in capsys.readouterr().out
