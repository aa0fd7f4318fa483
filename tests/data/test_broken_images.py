"""Broken image files: decoders refuse them, training replaces them, evaluation stops or counts them as wrong."""

import contextlib
import errno
import os
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from data_helpers import pretrain_words
from helpers import TINY_FINETUNE, encoded, end_of_torchrun, finetune_args, loader_args, torchrun
from PIL import EpsImagePlugin, Image

import main_pretrain
from Finetuning import main_finetune
from tools import pack_images
from util.data import datasets, decode, loaders, transforms
from util.data.pixels import IMAGENET
from util.data.sources import folders, readers
from util.errors import RunError

CPU = torch.device("cpu")


def large_jpeg(photo):
    """A small file with a size of 65,500 x 65,500 in its header."""
    data = bytearray(encoded(photo))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = 2 * (65500).to_bytes(2, "big")
    return bytes(data)


def large_png():
    """A valid image of 20,000 x 20,000 black pixels in 50 kB."""
    return encoded(Image.new("1", (20000, 20000)), "PNG")


def damaged_png(photo):
    data = bytearray(encoded(photo, "PNG"))
    middle = len(data) // 2
    data[middle : middle + 50] = zlib.compress(b"something else" * 9)[:50].ljust(50, b"x")
    return bytes(data)


BROKEN = {
    "empty.jpg": lambda photo: b"",
    "text.jpg": lambda photo: b"not an image, whatever its name says\n" * 20,
    "truncated.jpg": lambda photo: encoded(photo)[: len(encoded(photo)) // 2],
    "header.jpg": lambda photo: encoded(photo)[:300],
    "without_end.jpg": lambda photo: encoded(photo)[:-2],
    "progressive.jpg": lambda photo: encoded(photo, progressive=True)[:-400],
    "large.jpg": large_jpeg,
    "large.png": lambda photo: large_png(),
    "truncated.png": lambda photo: encoded(photo, "PNG")[:-500],
    "damaged.png": damaged_png,
}


PLACED = {name: f"{number % 8}_{name}" for number, name in enumerate(BROKEN)}  # each after a readable image


@pytest.fixture(scope="module")
def broken_files(photographs):
    photo = photographs[0].resize((90, 60))
    return {name: make(photo) for name, make in BROKEN.items()}


@pytest.mark.parametrize("name", BROKEN)
def test_both_decoders_refuse_broken_files(broken_files, name):
    with pytest.raises(decode.BrokenImage):
        decode.with_pillow(broken_files[name])
    with pytest.raises(decode.BrokenImage):
        decode.crop_of(broken_files[name])


BOTH = (decode.with_pillow, decode.crop_of)


def test_images_with_too_many_pixels_are_broken():
    most = encoded(Image.new("1", (9459, 9459)), "PNG")
    assert 9459 * 9459 < decode.MAX_PIXELS < 9460 * 9460
    assert decode.with_pillow(most).size == (9459, 9459)
    for read in BOTH:
        with pytest.raises(decode.BrokenImage, match="9460 x 9460 pixels are more than 89478485"):
            read(encoded(Image.new("1", (9460, 9460)), "PNG"))


def test_images_too_narrow_to_be_resized_are_broken():
    """With 256 pixels on the shorter side, the longer side of these images would have 1,280,000."""
    transform = transforms.eval_transform((224, 224), "shorter")
    for how in ("fast", "pil"):
        for size in ((1, 5000), (5000, 1)):
            for kind in ("PNG", "JPEG"):
                with pytest.raises(decode.BrokenImage, match="with 256 on the shorter side are more than"):
                    datasets.pixels_by(how, transform)(encoded(Image.new("RGB", size), kind))
        pixels, _ = datasets.pixels_by(how, transform)(encoded(Image.new("RGB", (1, 500)), "PNG"))
        assert sorted(pixels.shape) == [3, 224, 224]


@pytest.mark.parametrize("name", ["image.eps", "image.jpg"])
def test_ghostscript_is_never_started(tmp_path, monkeypatch, name):
    """Pillow without our list of formats starts it."""
    shown = tmp_path / "gs has run"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{shown}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # search for it again
    (tmp_path / name).write_bytes(encoded(Image.new("RGB", (9, 9)), "EPS"))
    data = (tmp_path / name).read_bytes()
    for read in BOTH:
        with pytest.raises(decode.BrokenImage, match="no image of a known format"):
            read(data)
    for how in ("fast", "pil"):
        with pytest.raises(decode.BrokenImage, match="no image of a known format"):
            datasets.pixels_by(how, transforms.eval_transform((32, 32), "square"))(data)
    assert not shown.exists()
    with contextlib.suppress(OSError), Image.open(tmp_path / name) as image:
        image.load()
    assert shown.exists()


def test_every_format_is_decoded(tmp_path):
    """The installed Pillow knows each format, and images that it writes with each suffix are decoded."""
    Image.init()
    assert set(decode.FORMATS) - set(decode.KNOWN) <= {"AVIF"}  # Pillow before 11.3
    written = Image.registered_extensions()
    for suffix in decode.SUFFIXES - {"jpx", "jpf", "jpc", "j2c"}:
        if written.get(f".{suffix}") not in Image.SAVE:
            continue
        Image.new("RGB", (40, 30), (200, 30, 40)).save(tmp_path / f"image.{suffix}")
        pixels = np.asarray(decode.with_pillow((tmp_path / f"image.{suffix}").read_bytes()))
        assert pixels.shape == (30, 40, 3)
        assert np.abs(pixels.astype(int) - (200, 30, 40)).max() < 12 or suffix in ("pgm", "pbm")


def test_formats_missing_in_pillow_are_named(monkeypatch):
    data = b"\0\0\0\x20ftypavif" + bytes(100)
    monkeypatch.setattr(decode.features, "check", lambda library: library != "avif")
    monkeypatch.setattr(decode, "KNOWN", tuple(name for name in decode.FORMATS if name != "AVIF"))
    for read in BOTH:
        with pytest.raises(decode.BrokenImage, match=r"\(the installed Pillow does not read AVIF\)$"):
            read(data)


def test_decoders_that_run_out_of_memory(photographs, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    data = encoded(photographs[0].resize((90, 60)))
    monkeypatch.setattr(Image, "open", exhausted)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", exhausted)
    for read in BOTH:
        with pytest.raises(decode.BrokenImage, match="not enough memory to decode it"):
            read(data)


def test_contradictory_headers_are_broken(photographs, monkeypatch):
    """A crop drawn for one size must not be cut from an image of another size."""
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda data: (500, 400, "CMYK", "444"))
    data = encoded(photographs[0].resize((90, 60)).convert("CMYK"))
    with pytest.raises(decode.BrokenImage, match="its headers contradict each other"):
        decode.crop_of(data, lambda height, width: (300, 200, 100, 100))


class Unreadable:
    """A source whose storage is gone; it counts the reads."""

    root, classes, labels = "somewhere", ["a"], np.zeros(5, np.int64)

    def __init__(self, error):
        self.error, self.reads = error, 0

    def read(self, index):
        self.reads += 1
        raise self.error

    def name(self, index):
        return f"image {index}"


@pytest.mark.parametrize("how", ["fast", "pil"])
def test_a_failed_read_is_a_broken_image(how):
    error = OSError(errno.EIO, os.strerror(errno.EIO), b"caf\xe9")
    source = Unreadable(error)
    dataset = datasets.ImageDataset(source, datasets.pixels_by(how, transforms.eval_transform((32, 32), "square")))
    (pixels, numbers), broken = dataset[3]
    assert broken == {3: "image 3: Input/output error"}
    assert numbers[-1] == -1
    assert 32 in pixels.shape
    assert source.reads == 1
    _, broken = datasets.SeededSamples(dataset, seed=0)[0, 3]
    assert list(broken) == [3, 4, 0, 1, 2]
    assert source.reads == 6


@pytest.mark.parametrize("error", [OSError("a bug"), KeyError("a bug"), RuntimeError("a bug")])
def test_a_bug_in_a_transform_is_not_a_broken_image(jpeg_folder, error):
    def transform(image):
        raise error

    recipe = transforms.PillowTransform(transforms.Recipe([transform], IMAGENET))
    dataset = datasets.ImageDataset(folders.Folder(str(jpeg_folder), "train"), recipe)
    with pytest.raises(type(error), match="a bug"):
        dataset[0]


def test_a_pipe_among_the_images(jpeg_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(jpeg_folder, folder)
    os.mkfifo(folder / "train" / "class_1" / "pipe.jpg")
    transform = transforms.pretrain_transform((32, 32), finetune_args())
    dataset = datasets.image_dataset(str(folder), "train", transform, "fast")
    loader = loaders.train_loader(dataset, loader_args(batch_size=25, max_bad_samples=1), CPU)
    assert len(list(loader)) == 1
    assert [text.rpartition("/")[2] for text in loader.broken.values()] == ["pipe.jpg: it is no regular file"]


@pytest.fixture
def broken_folder(jpeg_folder, broken_files, tmp_path):
    """24 readable and 10 broken training images, 7 readable validation images."""
    folder = tmp_path / "data"
    shutil.copytree(jpeg_folder, folder)
    for name, data in broken_files.items():
        (folder / "train" / "class_1" / PLACED[name]).write_bytes(data)
    return folder


def as_source(kind, folder, tmp_path):
    """Return the `--data_path` of a folder's images, after converting them to shards or a Hugging Face dataset."""
    if kind == "wds:":
        pack_images.main(pack_images.get_args_parser().parse_args([str(folder), str(tmp_path / "shards")]))
        return f"wds:{tmp_path / 'shards'}"
    if kind == "hfds:":
        hub = pytest.importorskip("datasets")
        splits = {}
        for split in ("train", "val"):
            source = folders.Folder(str(folder), split)
            images = [{"bytes": source.read(i), "path": None} for i in range(len(source.labels))]
            features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=source.classes)})
            rows = {"image": images, "label": source.labels}
            splits[split] = hub.Dataset.from_dict(rows, features=features)
        hub.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        return f"hfds:{tmp_path / 'saved'}"
    return str(folder)


def names_of(path, split, files):
    """Return the names, in messages, of the images with these contents."""
    source = readers.open_source(path, split)
    return [source.name(i) for i in range(len(source.labels)) if source.read(i) in files]


@pytest.mark.parametrize("how", ["fast", "pil"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_replaces_a_broken_one(broken_folder, how, workers):
    """Batches are full and do not depend on the number of workers; every broken file is named once."""
    dataset = datasets.image_dataset(
        str(broken_folder), "train", transforms.finetune_transform((32, 32), finetune_args()), how
    )
    args = loader_args(batch_size=17, num_workers=workers, max_bad_samples=len(BROKEN))
    loader = loaders.train_loader(dataset, args, CPU)
    loader.sampler.set_epoch(1)
    images = torch.cat([imgs for imgs, _ in loader])
    assert len(images) == 34
    named = sorted(os.path.basename(text.split(": ")[0]) for text in loader.broken.values())
    assert named == sorted(PLACED.values())
    samples = datasets.SeededSamples(dataset, seed=3)
    order = [index for _, index in loader.sampler]
    broken = set(loader.broken)
    for image, index in zip(images, order, strict=True):
        (pixels, numbers), met = samples[1, index]
        while index in met:
            index += 1
        assert index not in broken
        assert numbers[-1] == dataset.source.labels[index]
        want = dataset.transform.finish(pixels[None], torch.tensor([numbers[:-1]], dtype=torch.float64), CPU)[0]
        assert torch.equal(image, want)


def test_training_on_broken_images_only(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "train" / label / f"{number}.jpg").write_text("nothing")
    transform = transforms.finetune_transform((32, 32), finetune_args())
    for limit in (3, 100):
        dataset = datasets.image_dataset(str(tmp_path), "train", transform, "fast")
        loader = loaders.train_loader(dataset, loader_args(max_bad_samples=limit), CPU)
        with pytest.raises(
            RunError, match="broken images:"
        ):  # whatever the limit: training on blank images is never allowed
            list(loader)


def test_a_substitute_differs_from_the_same_image_at_its_own_place(jpeg_folder, tmp_path):
    shutil.copytree(jpeg_folder, tmp_path / "data")
    transform = transforms.pretrain_transform((32, 32), finetune_args())
    dataset = datasets.image_dataset(str(tmp_path / "data"), "train", transform, "fast")
    Path(dataset.source.name(3)).write_bytes(b"")
    samples = datasets.SeededSamples(dataset, seed=0)
    ((substitute, numbers), broken), ((own, own_numbers), _) = samples[5, 3], samples[5, 4]
    assert list(broken) == [3]
    assert numbers[-1] == own_numbers[-1]
    assert not torch.equal(substitute, own)
    assert torch.equal(samples[5, 3][0][0], substitute)


@pytest.mark.parametrize(("kind", "how"), [("", "fast"), ("", "pil"), ("wds:", "fast"), ("hfds:", "fast")])
def test_training_lists_broken_images(broken_folder, broken_files, tmp_path, run_script, capsys, kind, how):
    out, path = tmp_path / "out", as_source(kind, broken_folder, tmp_path)
    names = names_of(path, "train", broken_files.values())
    assert len(names) == 10
    run_script(main_pretrain, *pretrain_words(path, "--loader", how, "--max_bad_samples", 10, "--output_dir", out))
    assert (out / "checkpoint-last.pth").exists()
    report = capsys.readouterr().out.partition("10 broken images:\n")[2]
    assert all(re.search(rf"^  {re.escape(name)}: .+$", report, re.MULTILINE) for name in names)
    if not kind:
        assert sorted(map(os.path.basename, names)) == sorted(PLACED.values())


@pytest.mark.parametrize("limit", [["--max_bad_samples", 9], []])  # the default is 0.1 % of 34: none
def test_too_many_broken_images_end_the_run(broken_folder, tmp_path, run_script, capsys, limit):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_pretrain, *pretrain_words(broken_folder, *limit, "--output_dir", out))
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    count = int(re.match(r"main_pretrain\.py: rank 0: (\d+) broken images:\n", error)[1])
    assert len(re.findall(r"^  .*/class_1/\S+: .+$", error, re.MULTILINE)) == count >= (10 if limit else 1)
    assert f"more than {9 if limit else 0} of 34" in error
    assert "raise --max_bad_samples" in error
    assert not (out / "checkpoint-last.pth").exists()


def test_broken_images_of_two_processes_are_counted_together(broken_folder, tmp_path):
    """Each process meets some of them; the report lists all, and the limit applies to their sum."""
    words = pretrain_words(broken_folder, "--num_workers", 1, "--output_dir", tmp_path / "out")
    output = torchrun("main_pretrain.py", *words, "--max_bad_samples", 10)
    report = output.partition("10 broken images:\n")[2]
    assert all(f"/class_1/{name}: " in report for name in PLACED.values())
    done = end_of_torchrun("main_pretrain.py", *words, "--max_bad_samples", 9, "--output_dir", tmp_path)
    assert done.returncode == 1
    assert "10 broken images:\n" in done.stderr
    assert "more than 9 of 34" in done.stderr


# ---- evaluation


@pytest.fixture
def finetuned(jpeg_folder, tmp_path, run_script):
    words = [*TINY_FINETUNE, "--data_path", jpeg_folder, "--epochs", 1, "--batch_size", 8, "--lr", 0.01]
    run_script(main_finetune, *words, "--output_dir", tmp_path / "finetuned")
    return tmp_path / "finetuned" / "checkpoint-last.pth"


def evaluation(checkpoint, folder, *more):
    words = ["--eval", "--resume", checkpoint, "--data_path", folder, "--device", "cpu", "--num_workers", 0, *more]
    return [str(word) for word in words]


def test_evaluation_stops_at_broken_images_or_counts_them_as_wrong(
    finetuned, jpeg_folder, broken_files, tmp_path, run_script, capsys, caplog
):
    folder = tmp_path / "data"
    shutil.copytree(jpeg_folder, folder)
    capsys.readouterr()
    run_script(main_finetune, *evaluation(finetuned, folder))
    clean = re.search(r"top-1 ([\d.]+) %, top-5 [\d.]+ %, loss ([\d.]+) on 7 images$", capsys.readouterr().out, re.M)

    for name in ("truncated.jpg", "large.png"):
        (folder / "val" / "class_1" / name).write_bytes(broken_files[name])
    for more in ([], ["--eval_loader", "fast"]):
        with pytest.raises(SystemExit) as exit_info:
            run_script(main_finetune, *evaluation(finetuned, folder, *more))
        assert exit_info.value.code == 1
        out, error = capsys.readouterr()
        assert re.search(r"/val/class_1/(truncated.jpg|large.png): ", error)
        assert "--eval_bad wrong" in error
        assert "top-1" not in out

    correct = round(float(clean[1]) * 7 / 100)
    wanted = f"top-1 {100 * correct / 9:.2f} %, .* loss {clean[2]} on 9 images, 2 of them broken and counted as"
    caplog.clear()
    run_script(main_finetune, *evaluation(finetuned, folder, "--eval_bad", "wrong", "--batch_size", 4))
    assert re.search(wanted, capsys.readouterr().out)
    named = [record.getMessage() for record in caplog.records if record.getMessage().startswith("broken image: ")]
    assert sorted(os.path.basename(text.split(": ")[1]) for text in named) == ["large.png", "truncated.jpg"]
    words = evaluation(finetuned, folder, "--eval_bad", "wrong", "--batch_size", 2, "--dist_eval")
    assert re.search(wanted, torchrun("Finetuning/main_finetune.py", *words))  # 5 and 4 images


@pytest.mark.parametrize("kind", ["wds:", "hfds:"])
def test_evaluation_of_broken_images_in_shards_and_hub_datasets(
    finetuned, jpeg_folder, broken_files, tmp_path, run_script, capsys, caplog, kind
):
    folder = tmp_path / "data"
    shutil.copytree(jpeg_folder, folder)
    faults = [broken_files[name] for name in ("empty.jpg", "text.jpg", "truncated.jpg", "large.png")]
    for number, data in enumerate(faults):
        (folder / "val" / "class_1" / f"{number}x.jpg").write_bytes(data)
    path = as_source(kind, folder, tmp_path)
    names = names_of(path, "val", faults)
    assert len(names) == 4
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_finetune, *evaluation(finetuned, path))
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert any(f"  {name}: " in error for name in names)
    assert "--eval_bad wrong" in error
    caplog.clear()
    run_script(main_finetune, *evaluation(finetuned, path, "--eval_bad", "wrong", "--batch_size", 4))
    assert "on 11 images, 4 of them broken and counted as wrong" in capsys.readouterr().out
    messages = [record.getMessage() for record in caplog.records]
    for name in names:
        assert sum(message.startswith(f"broken image: {name}: ") for message in messages) == 1


def test_evaluation_of_broken_images_only(finetuned, jpeg_folder, tmp_path, run_script, capsys):
    folder = tmp_path / "data"
    shutil.copytree(jpeg_folder, folder)
    for file in (folder / "val").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_finetune, *evaluation(finetuned, folder, "--eval_bad", "wrong"))
    assert exit_info.value.code == 1
    assert "all 7 images are broken" in capsys.readouterr().err
