"""Images with masks: layouts, lists of classes, values, pairs, and what each mistake says."""

import os
import re

import numpy as np
import pytest
from data_helpers import SHAPES, masked_photograph, put, write_masked
from helpers import encoded
from PIL import Image

from util.data.decode import BrokenImage
from util.data.sources import mask_folder
from util.data.sources.mask_folder import IGNORED, open_masks
from util.data.sources.source import NoSplit
from util.errors import UserError
from util.training.run_state import fingerprint


def png(values):
    return encoded(Image.fromarray(np.asarray(values, getattr(values, "dtype", np.uint8))), "PNG")


@pytest.fixture
def folder(tmp_path, photographs):
    return write_masked(tmp_path / "data", photographs, train=3, val=2)


def small(root, *masks, classes="a\nb\nc", kind="png"):
    """Write an image of 4 x 2 pixels for each content of a mask."""
    if classes is not None:
        put(root, "classes.txt", content=classes.encode())
    for number, mask in enumerate(masks):
        put(root, f"images/train/{number}.png", content=encoded(Image.new("RGB", (4, 2)), "PNG"))
        put(root, f"annotations/train/{number}.{kind}", content=mask)
    return str(root)


VALUES = np.array([[0, 1, 2, 255], [2, 2, 1, 0]], np.uint8)


def test_images_and_masks_are_read_in_pairs(folder, photographs):
    """Each mask holds the classes that were drawn on its image, and no class on the outlines."""
    for split, numbers in (("train", [0, 1, 2]), ("val", [3, 4])):
        source = open_masks(str(folder), split)
        assert source.classes == SHAPES
        assert source.labels.tolist() == [0] * len(numbers)
        for index, number in enumerate(numbers):
            image, mask = masked_photograph(photographs[number % 2], number)
            assert source.read(index) == encoded(image, quality=95)
            assert source.name(index) == f"{folder}/images/{split}/{number}.jpg"
            drawn = np.asarray(mask).astype(np.int64)
            np.testing.assert_array_equal(source.read_mask(index), np.where(drawn == 255, IGNORED, drawn))


def test_the_layout_of_ade20k(tmp_path):
    """Its folders are called training and validation; 0 has no class, and the first of the table has the value 1."""
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName       \n1\t0.15\t9\t8\t1\twall\n2\t0.10\t9\t8\t1\tbuilding, edifice\n"
    put(tmp_path, "objectInfo150.txt", content=table.encode())
    for split, values in (("training", [[0, 1, 2]]), ("validation", [[2, 1, 1]])):
        put(tmp_path, f"images/{split}/ADE_00000001.jpg", content=encoded(Image.new("RGB", (3, 1))))
        put(tmp_path, f"annotations/{split}/ADE_00000001.png", content=png(np.array(values, np.uint8)))
    train, val = (open_masks(str(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == ["wall", "building, edifice"]
    assert train.read_mask(0).tolist() == [[IGNORED, 0, 1]]
    assert val.read_mask(0).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("kind", ["annotations", "masks", "labels"])
def test_folders_at_any_depth_and_other_names(tmp_path, kind):
    for name in ("b/0.JPG", "a/deep/0.jpg", "1.jpg"):
        stem = name.rpartition(".")[0]
        put(tmp_path, f"images/valid/{name}", content=encoded(Image.new("RGB", (4, 2))))
        put(tmp_path, f"{kind}/valid/{stem}.tif", content=encoded(Image.fromarray(VALUES), "TIFF"))
    put(tmp_path, "classes.txt", content=b"a\nb\nc\n\n")
    source = open_masks(str(tmp_path), "val")
    names = [source.name(i) for i in range(3)]
    assert sorted(names) == [f"{tmp_path}/images/valid/{name}" for name in ("1.jpg", "a/deep/0.jpg", "b/0.JPG")]
    for i, name in enumerate(names):
        assert source.mask_path(i) == name.replace("/images/", f"/{kind}/").rpartition(".")[0] + ".tif"


def palette(values):
    image = Image.fromarray(values, "P")
    image.putpalette(bytes(range(255, -1, -1)) * 3)
    return encoded(image, "PNG")


@pytest.mark.parametrize(
    "how", [png, palette, lambda v: png(v.astype(np.uint16)), lambda v: encoded(Image.fromarray(v), "BMP")]
)
def test_kinds_of_masks(tmp_path, how):
    """Grey values of 8 and 16 bits and numbers of a palette are the same classes."""
    source = open_masks(small(tmp_path, how(VALUES)), "train")
    assert source.read_mask(0).tolist() == [[0, 1, 2, IGNORED], [2, 2, 1, 0]]


def test_values_beyond_8_bits_and_of_one_bit(tmp_path):
    names = "\n".join(f"class {i}" for i in range(600))
    wide = open_masks(
        small(tmp_path / "a", png(np.array([[0, 254, 255, 256, 600]], np.uint16)), classes=names), "train"
    )
    assert wide.read_mask(0).tolist() == [[0, 254, IGNORED, 255, 599]]  # no class has the value 255
    one = open_masks(small(tmp_path / "b", encoded(Image.fromarray(VALUES > 1), "PNG")), "train")
    assert one.read_mask(0).tolist() == (VALUES > 1).astype(int).tolist()


def test_values_that_are_ignored(tmp_path):
    """The list names all other values, in order."""
    source = open_masks(
        small(tmp_path, png([[0, 1, 2, 3], [4, 255, 3, 3]]), classes="a\nb\nc"), "train", None, [0, 2, 255]
    )
    assert source.read_mask(0).tolist() == [[-1, 0, -1, 1], [2, -1, 1, 1]]
    every = open_masks(small(tmp_path / "all", png([[0, 1, 2, 2]]), classes="a\nb\nc"), "train", None, [])
    assert every.read_mask(0).tolist() == [[0, 1, 2, 2]]


def test_a_list_elsewhere(folder, tmp_path):
    (folder / "classes.txt").unlink()
    put(tmp_path, "names", content="\ufeffGround\r\nÄpfel\r\nbox\r\n".encode())
    source = open_masks(str(folder), "train", str(tmp_path / "names"))
    assert source.classes == ["Ground", "Äpfel", "box"]
    with pytest.raises(UserError, match=r"missing: .*No such file"):
        open_masks(str(folder), "train", str(tmp_path / "missing"))


def test_identity_and_state(folder):
    source = open_masks(str(folder), "train")
    marks = source.identity(), fingerprint(source), source.state()
    again = open_masks(str(folder), "train")
    assert (again.identity(), fingerprint(again), again.state()) == marks
    os.utime(folder / "annotations/train/1.png", (1, 1))
    assert source.state() != marks[2]  # the mask may have changed
    os.rename(folder / "images/train/1.jpg", folder / "images/train/7.jpg")
    os.rename(folder / "annotations/train/1.png", folder / "annotations/train/7.png")
    assert open_masks(str(folder), "train").identity() != marks[0]


def test_files_without_a_partner_are_counted(folder, caplog):
    (folder / "images/train/0.jpg").unlink()
    (folder / "annotations/train/1.png").unlink()
    source = open_masks(str(folder), "train")
    assert [source.name(i) for i in range(len(source.labels))] == [f"{folder}/images/train/2.jpg"]
    assert caplog.messages == [
        f"{folder}/images/train: 1 images have no mask and are left out; the first: 1.jpg; "
        "1 masks have no image and are left out; the first: 0.png"
    ]


def test_masks_of_one_class_are_announced(tmp_path, caplog):
    """So are masks of 0 and 255 where 255 is ignored, as drawing programs write them."""
    open_masks(small(tmp_path, png(np.array([[0, 255, 0, 255]], np.uint8))), "train")
    assert "the first masks hold the values 0, 255, so at most one of 3 classes; ignored: 255" in caplog.text


def rename(folder, old, new):
    os.rename(folder / old, folder / new)


def rename_masks(folder):
    for path in (folder / "annotations/train").iterdir():
        path.rename(path.with_name(f"{path.stem}_seg.png"))


def write(name, content=b""):
    return lambda folder: put(folder, name, content=content)


MISTAKES = [
    (lambda f: rename(f, "images", "x"), "needs a folder images and one of annotations, masks, .* and has annotations"),
    (lambda f: rename(f, "annotations", "x"), "needs a folder images and one of .* and has none of these"),
    (lambda f: (f / "masks").mkdir(), "and has annotations, masks"),
    (lambda f: rename(f, "annotations/train", "annotations/x"), "annotations has no folder 'train', as images has"),
    (rename_masks, "no mask in .*/train has the path and name of an image, as in 0.jpg and 0_seg.png"),
    (write("images/train/0.png"), "0.jpg and 0.png have one name: rename one"),
    (write("annotations/train/0.tif"), "0.png and 0.tif have one name: rename one"),
    (write("annotations/train/9.jpg"), "1 files are not PNG, TIFF or BMP.*the first: 9.jpg"),
    (
        lambda f: (f / "classes.txt").unlink(),
        "write classes.txt .* from 0, without 255; .* hold the values 0 to 2, 255",
    ),
    (write("classes.txt", b"a\n\nb"), "classes.txt: class 1 has no name"),
    (write("classes.txt", b"\n"), "classes.txt: it names 0 classes"),
    (write("classes.txt", b"a\nb\na"), "classes.txt: a comes twice"),
    (write("classes.txt", b"a\xff"), "classes.txt: .*utf-8"),
    (write("classes.txt", b"a\nb"), "mask .*/0.png: it holds the value 2, and 2 classes have the values 0 to 1: name "),
    (write("annotations/train/1.png", encoded(Image.new("RGB", (80, 60)), "PNG")), "mask .*/1.png: it holds colours"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_are_one_line(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        open_masks(str(folder), "train")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_missing_split(folder):
    os.rename(folder / "images/val", folder / "images/rest")
    with pytest.raises(NoSplit, match="no folder 'val' in images"):
        open_masks(str(folder), "val")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_masks(str(folder / "nowhere"), "val")


def test_damaged_and_wrong_masks_are_broken_when_they_are_read(tmp_path, monkeypatch):
    """A damaged mask among the first does not end the run before it starts; its content is not what is wrong."""
    damaged = bytearray(png(VALUES))
    damaged[-20] ^= 1
    monkeypatch.setattr(mask_folder, "FIRST", 2)
    source = open_masks(small(tmp_path, png(VALUES), bytes(damaged), png(VALUES + 1)), "train")
    with pytest.raises(BrokenImage, match=re.escape(f"mask {tmp_path}/annotations/train/1.png: chunk IDAT is damaged")):
        source.read_mask(1)
    with pytest.raises(
        BrokenImage, match=r"mask .*train/2.png: it holds the value 3, and 3 classes have the values 0 to 2"
    ):
        source.read_mask(2)
