"""Orientation, mean and deviation of images, and grey ones."""

import argparse
import copy
import io
import json
import logging
import math

import numpy as np
import pytest
import torch
from data_helpers import put, run_pack
from helpers import TINY_FINETUNE, TINY_PRETRAIN, encoded, finetune_args
from PIL import Image, ImageOps
from randaugment_helpers import OPERATIONS

import main_pretrain
import models_arm
import pretrained
from Evaluation import probe
from Finetuning import main_finetune
from tools import export
from util import seeding
from util.checkpoints import checkpoint_file, inspection
from util.data import datasets, decode, randaugment, transforms
from util.data.pixels import IMAGENET, Pixels
from util.data.sources import readers
from util.errors import UserError

GREY = Pixels((0.5,), (0.25,), 1)


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
        ({"mean": [120], "std": [60]}, "--mean: the values of these images are from 0 to 1, .*; divide by 255"),
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


# ---- runs


def test_scripts_take_the_values_of_the_checkpoint(image_folder, tmp_path, run_script, capsys, caplog):
    """Finetuning, evaluation, probes and exports; flags come first. A run resumes with its own values only."""
    common = ["--data_path", image_folder, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 8]
    pretrain = [*TINY_PRETRAIN, *common, "--vis_freq", 0]
    run_script(main_pretrain, *pretrain, "--output_dir", tmp_path, "--mean", 0.5, "--std", 0.1, 0.2, 0.3, "--exif")
    line = "images of 3 channels with mean 0.5 and deviation 0.1 0.2 0.3, turned as EXIF says"
    assert f"{line}\n" in capsys.readouterr().out
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
    assert f"{line}; what no flag says is as in {file}" in caplog.text
    assert pretrained.read(tmp_path / "same" / "checkpoint-last.pth").pixels == own
    run_script(main_finetune, *finetune, tmp_path / "other", "--mean", 0.25, "--std", 1, "--exif", "False")
    other = tmp_path / "other" / "checkpoint-last.pth"
    assert pretrained.read(other).pixels == Pixels((0.25,) * 3, (1.0,) * 3)

    words = ["--data_path", image_folder, "--probe", "knn", "--k", 3, "--batch_size", 8, "--device", "cpu"]
    run_script(probe, file, *words, "--num_workers", 0, "--output", tmp_path / "probe.json")
    saved = json.loads((tmp_path / "probe.json").read_text())["args"]
    assert {name: saved[name] for name in own.arguments()} == own.arguments()
    run_script(export, "--no_measure", other, "--to", "safetensors")
    about = json.loads(other.with_suffix(".json").read_text())
    assert (about["pretrained_cfg"]["mean"], about["pretrained_cfg"]["std"]) == ([0.25] * 3, [1.0] * 3)
    assert pretrained.read(other.with_suffix(".safetensors")).pixels == pretrained.read(other).pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_one_line_tells_that_images_are_grey(channels, image_folder, tmp_path, run_script, caplog):
    """A checkpoint that says so needs no flag. Of ImageNet's three channels there is no line."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_classes": 3, "in_chans": channels}
    torch.save(models_arm.create_classifier("arm_tiny_pz16", **sizes).state_dict(), tmp_path / "c.pth")
    words = ["--eval", "--resume", tmp_path / "c.pth", "--data_path", image_folder, "--device", "cpu"]
    with caplog.at_level(logging.INFO):
        run_script(main_finetune, *words, "--num_workers", 0)
    line = f"images of 1 channels with mean 0.459 and deviation 0.2256; what no flag says is as in {tmp_path / 'c.pth'}"
    assert (line in caplog.text) == (channels == 1)
    assert ("with mean" in caplog.text) == (channels == 1)


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
