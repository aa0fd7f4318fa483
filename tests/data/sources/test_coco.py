"""Images and objects in COCO's format: layouts, kinds of masks, and faults, each with one line that names it."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import put, write_coco
from faster_coco_eval.core import mask as library

from util.data.sources.coco import open_coco
from util.errors import UserError
from util.files import from_json
from util.training.run_state import check_same_images, record_images

RECTANGLE = np.zeros((30, 40), np.uint8)
RECTANGLE[5:11, 6:21] = 1
CORNERS = [6, 5, 21, 5, 21, 11, 6, 11]
BOX = [6, 5, 15, 6]


def counts(mask):
    """The lengths of runs of zeros and ones, columns first."""
    values = mask.T.ravel()
    ends = np.flatnonzero(np.diff(values)) + 1
    return np.diff([0, *ends, len(values)]).tolist()


SEGMENTATIONS = {
    "a polygon": [CORNERS],
    # and two that are none: the points of the last are not pairs
    "two polygons": [
        [6, 5, 13, 5, 13, 11, 6, 11],
        [13, 5, 21, 5, 21, 11, 13, 11],
        [1, 1, 2, 2],
        [0, 0, 30, 0, 30, 30, 0],
    ],
    "run lengths": {"size": [30, 40], "counts": counts(RECTANGLE)},
    "compressed": {"size": [30, 40], "counts": library.encode(np.asfortranarray(RECTANGLE))["counts"].decode()},
}


def rectangle(**more):
    return {"image": 0, "category": 3, "bbox": BOX, "area": 90, "segmentation": [CORNERS], **more}


@pytest.mark.parametrize("segmentation", SEGMENTATIONS.values(), ids=SEGMENTATIONS)
def test_kinds_of_masks(tmp_path, segmentation):
    objects = [rectangle(segmentation=segmentation), rectangle(image=1, segmentation=[[0, 0, 9, 0, 9, 9]])]
    objects += [rectangle(image=1, segmentation=None, iscrowd=1)]
    source = open_coco(write_coco(tmp_path, [(30, 40), (20, 20)], objects), "val")
    source.check_masks()  # a crowd needs none
    assert (source.masks(0) == RECTANGLE).all()
    assert source.masks(0).shape == (1, 30, 40)
    assert (source.areas(0).tolist(), source.objects(1).labels.tolist()) == ([90], [0, 0])


def test_objects_of_an_image(tmp_path, caplog):
    """Ids with gaps, in any order; boxes are clipped; crowds are told apart; what has no area is left out."""
    objects = [
        rectangle(image=1, category=90, bbox=[-4, 15, 100, 100], iscrowd=1, area=None),
        rectangle(),
        rectangle(bbox=[40, 5, 9, 9]),
        rectangle(image=1, segmentation=None, area=None),
        rectangle(bbox=[5, 5, 0, 9]),
    ]
    root = write_coco(tmp_path, [(30, 40), (20, 24), (8, 8)], objects)
    with caplog.at_level(logging.INFO):
        source = open_coco(f"coco:{root}", "val")
    assert (source.classes, source.category_ids.tolist()) == (["cat", "ant"], [3, 90])
    assert (source.image_ids.tolist(), source.sizes.tolist()) == ([10, 11, 12], [[30, 40], [20, 24], [8, 8]])
    assert source.labels.tolist() == [0, 0, 0]
    found = source.objects(1)
    assert found.boxes.tolist() == [[0, 15, 24, 20], [6, 5, 21, 11]]
    assert (found.labels.tolist(), found.crowd.tolist(), found.segments[1]) == ([1, 0], [True, False], None)
    assert source.areas(1).tolist() == [source.masks(1)[0].sum(), 90]
    assert len(source.objects(0).labels) == 1
    assert source.objects(2).boxes.shape == (0, 4)
    assert source.masks(2).shape == (0, 8, 8)
    assert [r.getMessage() for r in caplog.records] == [
        f"{root}/annotations/instances_val2017.json: 2 of 5 objects have no area in their image and are left out; the "
        "first: annotations[2]"
    ]
    with pytest.raises(UserError, match="1 of 3 objects have no segmentation, the first in the image with the id 11"):
        source.check_masks()
    assert source.read(2)[:2] == b"\xff\xd8"
    assert source.name(2) == f"{root}/val2017/2.jpg"


def test_training_leaves_out_images_without_objects(tmp_path, caplog):
    objects = [rectangle(image=3), rectangle(image=1, iscrowd=1), rectangle(image=3, category=90), rectangle(image=0)]
    file = "annotations/instances_train2017.json"
    root = write_coco(tmp_path, [(30, 40)] * 3 + [(50, 60)], objects, file, "train2017")
    with caplog.at_level(logging.INFO):
        source = open_coco(root, "train")
    assert f"{root}/{file}: 2 of 4 images have no object and are left out" in caplog.text
    assert (source.image_ids.tolist(), source.sizes.tolist()) == ([10, 13], [[30, 40], [50, 60]])
    assert ([source.objects(i).labels.tolist() for i in range(2)], source.name(1)[-5:]) == ([[0], [0, 1]], "3.jpg")


@pytest.mark.parametrize(
    ("file", "folder", "split"),
    [
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_val2014.json", "images/val2014", "val"),
        ("annotations/my-train.json", "images/train", "train"),
        ("annotations/train.json", "train", "train"),
        ("annotations/val.json", "images", "val"),
        ("annotations/Validation_1.json", ".", "val"),
        ("train/_annotations.coco.json", "train", "train"),
        ("valid/_annotations.coco.json", "valid", "val"),
    ],
)
def test_layouts(tmp_path, file, folder, split):
    root = write_coco(tmp_path, [(30, 40)], [rectangle()], file, folder)
    put(root, "annotations/captions_train2017.json", "annotations/trainval.json")
    if file.startswith("annotations/instances_train"):
        assert len(open_coco(root, split).read(0)) > 100
    else:  # captions are read where there are no instances: they have no categories
        (tmp_path / "annotations" / "captions_train2017.json").unlink()
        assert len(open_coco(root, split).read(0)) > 100


def test_places_without_annotations_or_images(tmp_path):
    with pytest.raises(UserError, match=r"--data_path coco:/nowhere: no such folder"):
        open_coco("coco:/nowhere", "val")
    with pytest.raises(
        UserError, match=r"no annotations for val: neither annotations/\*.json with the word val or vali"
    ):
        open_coco(str(tmp_path), "val")
    root = write_coco(tmp_path, [(30, 40)], [rectangle()])
    put(root, "annotations/instances_val2014.json")
    with pytest.raises(UserError, match=r"several files .* val: .*instances_val2014.json, .*val2017.json. Leave one"):
        open_coco(root, "val")
    (tmp_path / "annotations" / "instances_val2014.json").unlink()
    (tmp_path / "val2017" / "0.jpg").unlink()
    with pytest.raises(
        UserError, match=r"no image like 0.jpg in any of images/val2017, val2017, images/val, val, images"
    ):
        open_coco(root, "val")


FAULTS = {
    "it has no list of categories": {"categories": None},
    "it has no categories": {"categories": []},
    "it has no images": {"images": []},
    r"categories\[0\] lacks an id": {"categories": [{"id": "3", "name": "cat"}]},
    "the same name or id: cat": {"categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "cat"}]},
    r"images\[0\] lacks an id, a height": {"images": [{"id": 1, "file_name": "0.jpg", "height": 30}]},
    r"images\[0\] has no or more than": {"images": [{"id": 1, "file_name": "0.jpg", "height": 0, "width": 5}]},
    "an id: Python int too large": {"images": [{"id": 1 << 70, "file_name": "0.jpg", "height": 9, "width": 5}]},
    "two images have the id 1": {"images": [{"id": 1, "file_name": "0.jpg", "height": 9, "width": 5}] * 2},
    r"annotations\[0\] lacks an image_id": {"annotations": [{"image_id": 10}]},
    r"annotations\[1\] lacks an image_id": {"annotations": [{"image_id": 10, "category_id": 3, "bbox": BOX}, 0]},
}
OBJECT_FAULTS = {
    "1 of 2 annotations have a image_id that is not listed; the first is annotations.1. with 99": {"image_id": 99},
    "1 of 2 annotations have a category_id that is not listed; .* with 4": {"category_id": 4},
    r"annotations\[1\] lacks": {"bbox": [1, 2, 3]},
    r"annotations\[1\] lacks .* \(integers\)": {"image_id": "10"},
    r"annotations\[1\] .* other than polygons": {"segmentation": [1, 2, 3]},
    r"annotations\[1\] .* and run lengths": {"segmentation": {"counts": "a"}},
    r"annotations\[1\] has run lengths of another size": {"segmentation": {"size": [9, 9], "counts": "a"}},
}


@pytest.mark.parametrize("message", [*FAULTS, *OBJECT_FAULTS])
def test_faults(tmp_path, message):
    objects = [rectangle(), rectangle(**OBJECT_FAULTS.get(message, {}))]
    root = write_coco(tmp_path, [(30, 40)], objects, **FAULTS.get(message, {}))
    with pytest.raises(UserError, match=message) as error_info:
        open_coco(root, "val")
    assert str(error_info.value).startswith(f"{root}/annotations/instances_val2017.json: ")
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize("content", [b"{", b"[[", b"\xff", b'{"images": NaN}', b"[" * 10**5], ids=range(5))
def test_broken_json(tmp_path, content):
    root = write_coco(tmp_path, [(30, 40)], [rectangle()])
    put(root, "annotations/instances_val2017.json", content=content)
    with pytest.raises(UserError, match=r"instances_val2017.json is damaged: "):
        open_coco(root, "val")


@pytest.mark.parametrize("lengths", ["a~~b", "99999", "", [3], [10**6], [-5, 1205]], ids=range(6))
def test_damaged_run_lengths_name_their_image(tmp_path, lengths):
    objects = [rectangle(segmentation={"size": [30, 40], "counts": lengths})]
    source = open_coco(write_coco(tmp_path, [(30, 40)], objects), "val")
    with pytest.raises(UserError, match=r"instances_val2017.json, image 10: the run lengths of an object"):
        source.masks(0)


def test_without_the_library(tmp_path, monkeypatch):
    source = open_coco(write_coco(tmp_path, [(30, 40)], [rectangle()]), "val")
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval.core", None)
    assert source.objects(0).boxes.tolist() == [[6, 5, 21, 11]]  # boxes need none
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        source.masks(0)


def test_identity_depends_on_images_and_objects(tmp_path):
    """A run resumes only with the same ones, wherever they lie."""

    def recorded(name, *objects, sizes=((30, 40),)):
        args = SimpleNamespace()
        source = open_coco(write_coco(tmp_path / name, sizes, objects), "val")
        check_same_images(source)
        record_images(args, source)
        return args.images, args.data

    first = recorded("a", rectangle())
    assert first[0].startswith("CocoSource ")
    assert recorded("b", rectangle()) == first
    others = [(rectangle(category=90),), (rectangle(bbox=[6, 5, 15, 5]),), (rectangle(iscrowd=1),), ()]
    others += [(rectangle(segmentation=[CORNERS[:6]]),), (rectangle(segmentation=[[*CORNERS[:-1], 10]]),)]
    seen = {recorded(f"c{number}", *objects)[0] for number, objects in enumerate(others)}
    assert len(seen | {first[0], recorded("d", rectangle(), sizes=((30, 41),))[0]}) == 8


def test_classes_are_matched_by_name(tmp_path, caplog):
    objects = [rectangle(category=90), rectangle(category=3)]
    source = open_coco(write_coco(tmp_path, [(30, 40)], objects), "val")
    source.match(["cat", "ant"], "model.pth")
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        source.match(["ant", "bee", "cat"], "model.pth")
    assert "they are matched by name" in caplog.text
    assert (source.classes, source.category_ids.tolist()) == (["ant", "bee", "cat"], [90, -1, 3])
    assert source.objects(0).labels.tolist() == [0, 2]
    source.match(["cat", "ant"], "model.pth")
    assert source.objects(0).labels.tolist() == [1, 0]
    cats = open_coco(write_coco(tmp_path / "cats", [(30, 40)], [rectangle()]), "val")
    cats.match(["cat", "bee"], "model.pth")  # the file has no ants, but has the category
    assert cats.category_ids.tolist() == [3, -1]
    with pytest.raises(UserError, match=r"objects of 1 classes that model.pth does not have: ant"):
        source.match(["cat"], "model.pth")


def test_objects_of_json_can_be_replaced():
    assert from_json(b'{"a": {"b": [{}]}}', replace=lambda found: sorted(found)) == ["a"]
    assert from_json(json.dumps({"a": 1})) == {"a": 1}
