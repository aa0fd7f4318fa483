"""COCO's metrics equal those of pycocotools, for any number of processes, and what was never evaluated is noticed."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from data_helpers import write_coco
from faster_coco_eval.core import mask as library

from benchmarks import bench_coco
from Detection import coco_metrics
from Detection.coco_metrics import Results, encode
from util.data.sources.coco import open_coco
from util.errors import RunError, UserError

PLACES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    None,
    None,
    "ar",
    "ar_small",
    "ar_medium",
    "ar_large",
)


def quadrangle(box, slant):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + slant * h]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images with crowds, masks of both kinds, small and large objects; and noisy detections with equal scores."""
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(60, 300, 2).tolist()) for _ in range(60)]
    objects, found = [], [[] for _ in sizes]
    for image, (height, width) in enumerate(sizes):
        for _ in range(rng.integers(0, 8)):
            x, y = rng.random(2) * (0.7 * width, 0.7 * height)
            box = [x, y, 5 + rng.random() * (width - x - 6), 5 + rng.random() * (height - y - 6)]
            (rle,) = library.frPyObjects([quadrangle(box, 0.7)], height, width)
            whole = {"size": rle["size"], "counts": rle["counts"].decode()}
            crowd, category = int(rng.random() < 0.1), int(rng.choice([3, 90]))
            objects.append({"image": image, "category": category, "bbox": box, "area": float(library.area(rle))})
            objects[-1] |= {"iscrowd": crowd, "segmentation": whole if rng.random() < 0.5 else [quadrangle(box, 0.7)]}
            for _ in range(rng.integers(0, 4)):
                box_found = np.maximum(box + rng.normal(0, 6, 4), [-3, -3, 2, 2]).astype(np.float32).tolist()
                (rle,) = library.frPyObjects([quadrangle(box_found, 0.8)], height, width)
                label = rng.integers(2) if rng.random() < 0.2 else int(category == 90)
                found[image].append((box_found, round(rng.random(), 2), label, library.decode(rle)))
    return open_coco(write_coco(tmp_path_factory.mktemp("coco"), sizes, objects), "val"), found


def add(results, found, images):
    for index in images:
        boxes, scores, labels, masks = (
            (list(part) for part in zip(*found[index], strict=True)) if found[index] else [[]] * 4
        )
        boxes = np.array(boxes).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.tensor(np.array(masks)) if masks else torch.zeros(0, 1, 1)
        results.add(index, torch.tensor(boxes), torch.tensor(scores, dtype=torch.float64), torch.tensor(labels), masks)
    return results


def summary(results):
    results.collect()
    return results.summary()


def test_equal_to_pycocotools(made, tmp_path):
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    source, found = made
    results = add(Results(source, masks=True, max_detections=3), found, range(60))
    got = summary(results)
    results.write(tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
    truth = coco.COCO(str(source.annotation_file))
    for kind, its in (("box", "bbox"), ("mask", "segm")):
        records = [{k: v for k, v in r.items() if k != "bbox" or kind == "box"} for r in written]
        theirs = evaluation.COCOeval(truth, truth.loadRes(records), its)
        theirs.params.maxDets = [1, 2, 3]
        theirs.evaluate()
        theirs.accumulate()
        recall, precision = theirs.eval["recall"][..., 2], theirs.eval["precision"][..., 2]
        want = {f"{kind}_ap/{name}": precision[:, :, c, 0] for c, name in enumerate(("cat", "ant"))}
        for place, size in enumerate(("", "_small", "_medium", "_large")):
            want |= {f"{kind}_ap{size}": precision[..., place], f"{kind}_ar{size}": recall[..., place]}
        want |= {f"{kind}_ap50": precision[0, ..., 0], f"{kind}_ap75": precision[5, ..., 0]}
        want = {name: 100 * values[values > -1].mean() for name, values in want.items()}
        assert {k: v for k, v in got.items() if k.startswith(kind)} == pytest.approx(want, abs=1e-10)  # percent
        assert 0 < want[f"{kind}_ap_small"] < want[f"{kind}_ap"] < want[f"{kind}_ap_large"] < 100
    again = Results(source, masks=True, max_detections=3)
    again.read(tmp_path / "results.json")
    assert summary(again) == pytest.approx(got, abs=1e-9)


def test_any_number_of_processes_give_the_same(made, monkeypatch):
    """Equal scores are in the order of the images, whoever evaluated them."""
    source, found = made
    alone = add(Results(source), found, range(60))
    whole = summary(alone)
    for count in (2, 3):
        shares = [add(Results(source), found, range(first, 60, count)) for first in range(count)]
        values = [(share.found, share.broken) for share in shares]
        monkeypatch.setattr(coco_metrics, "gather", lambda _, values=values: values)
        assert summary(shares[0]) == whole
        assert shares[0].records() == alone.records()
    monkeypatch.setattr(coco_metrics, "gather", None)  # each process has all of them
    assert summary(add(Results(source, distributed=False), found, range(60))) == whole


def test_images_that_are_evaluated_twice_or_never(made):
    source, found = made
    for images, name in ((range(59), "59.jpg"), ([*range(60), 7], "7.jpg")):
        with pytest.raises(RunError, match=rf"not all images were evaluated once: .*/{name}$"):
            add(Results(source), found, images).collect()
    broken = add(Results(source), found, range(59))
    broken.add(-1, *[np.zeros(0)] * 3)
    none = [*found[:59], []]
    assert summary(broken) == summary(add(Results(source), none, range(60))) | {"broken": 1}


def test_without_detections_or_objects(tmp_path):
    """No detections give 0; without objects of a size there is nothing to find, and NaN is null in JSON."""
    objects = [
        {"image": 0, "category": 3, "bbox": [1, 1, 9, 9], "area": 81, "segmentation": [quadrangle([1, 1, 9, 9], 1)]}
    ]
    source = open_coco(write_coco(tmp_path, [(30, 40)], objects), "val")
    results = Results(source, masks=True)
    results.add(0, np.zeros((0, 4)), np.zeros(0), np.zeros(0), np.zeros((0, 30, 40)))
    got = summary(results)
    assert (got["box_ap"], got["mask_ap"], got["box_ar"], got["box_ap/cat"], got["box_ap_small"]) == (0,) * 5
    assert all(math.isnan(got[name]) for name in ("box_ap_large", "mask_ap_medium", "box_ap/ant", "mask_ar_large"))
    perfect = Results(source, masks=True)
    perfect.add(0, np.array([[1, 1, 10, 10]]), np.array([0.5]), np.array([0]), source.masks(0))
    got = summary(perfect)
    assert got["box_ap"] == got["mask_ap"] == 100


def test_detections_that_are_not_finite(made, caplog):
    source, _ = made
    results = Results(source)
    boxes = torch.tensor([[0, 0, 5, 5], [0, 0, math.nan, 5], [0, 0, 5, 5.0]])
    results.add(3, boxes, torch.tensor([0.5, 0.5, math.inf]), torch.tensor([0, 1, 1]))
    assert [len(part) for part in results.found[0][1]] == [1] * 4
    assert caplog.messages == [f"2 detections are not finite and left out: {source.name(3)}"]


def test_classes_that_the_file_does_not_have(tmp_path):
    """They are neither counted nor written, as such ids mean nothing there."""
    objects = [{"image": 0, "category": 90, "bbox": [1, 1, 9, 9], "area": 81}]
    source = open_coco(write_coco(tmp_path, [(30, 40)], objects), "val")
    source.match(["bee", "ant"], "model.pth")
    results = Results(source)
    results.add(0, np.array([[1, 1, 10, 10]] * 2), np.array([0.9, 0.5]), np.array([0, 1]))
    assert summary(results)["box_ap/ant"] == 100
    assert [record["category_id"] for record in results.records()] == [90]
    with pytest.raises(UserError, match="1 of 1 objects have no segmentation"):
        Results(source, masks=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("{}", r"\[0\] is no detection"),
        ('[{"image_id": 10}]', r"\[0\] is no detection .*KeyError 'bbox'"),
        ('[{"image_id": 9, "category_id": 3, "bbox": [1, 1, 1, 1], "score": 1}]', "KeyError 9"),
        ('[{"image_id": 10, "category_id": 3, "bbox": [1, 1, 1], "score": 1}]', "not enough values"),
        ('[{"image_id": 10, "category_id": 3, "bbox": [1, 1, 1, "a"], "score": 1}]', "TypeError"),
    ],
)
def test_damaged_results(made, tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message) as error_info:
        Results(made[0]).read(tmp_path / "results.json")
    assert "results.json" in str(error_info.value)


def test_masks_are_coded_by_columns():
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[1, 2, 1:] = True
    assert (library.decode(encode(masks)).transpose(2, 0, 1) == masks.numpy()).all()
    assert encode(masks[:0]) == []


def test_without_the_library(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        Results(made[0])


def test_libraries_are_compared(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pycocotools")
    monkeypatch.setattr(bench_coco, "apart", lambda call: call())
    monkeypatch.setattr(bench_coco, "find_spec", lambda name: name != "torchmetrics")
    words = "--images 3 --objects 4 --detections 6 --rounds 1".split()
    bench_coco.main(bench_coco.get_args_parser().parse_args([*words, "--output", str(tmp_path / "coco.json")]))
    rows = json.loads((tmp_path / "coco.json").read_text())["results"]
    assert [row["library"] for row in rows] == [*bench_coco.LIBRARIES] * 2
    for row in rows:
        if row["library"] == "torchmetrics":
            assert row["left_out"] == "pip install torchmetrics"
        else:
            assert row["stats"].keys() == set(bench_coco.STATS)
            assert row["differs_at_most"] < 1e-12
            assert 0 < row["stats"]["map"] < 1
    assert "torchmetrics, mask" in capsys.readouterr().out
