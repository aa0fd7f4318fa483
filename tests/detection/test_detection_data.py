"""Boxes and masks follow their objects through jitter, crop and flip; samples do not depend on who loads them."""

import io
import math

import numpy as np
import pytest
import torch
from data_helpers import put, write_coco
from faster_coco_eval.core import mask as library
from helpers import encoded, loader_args
from PIL import Image, ImageDraw

from Detection.detection_data import DetectionDataset, Fit, Jitter, Placement
from util.data import loaders
from util.data.decode import BrokenImage
from util.data.pixels import Pixels
from util.data.sources.coco import open_coco
from util.errors import UserError
from util.seeding import seed_sample

CPU = torch.device("cpu")
SIZE = 96, 128
PIXELS = Pixels()
SIZES = (150, 100), (60, 240), (90, 90), (40, 60)


def outline(box):
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def run_lengths(box, height, width):
    (rle,) = library.frPyObjects([outline(box)], height, width)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def write_rectangles(folder, split="train", exif=None):
    """Black images with a red and a green rectangle each, whose masks are a polygon and run lengths, and a crowd."""
    rng, objects, images = np.random.default_rng(1), [], []
    for number, (height, width) in enumerate(SIZES):
        image = Image.new("RGB", (width, height))
        for category, colour in ((3, "red"), (90, "lime")):
            x, y = rng.integers(0, (0.4 * width, 0.4 * height)).tolist()
            box = [x, y, x + width // 3, y + height // 3]
            ImageDraw.Draw(image).rectangle((x, y, box[2] - 1, box[3] - 1), fill=colour)
            kind = [outline(box)] if category == 3 else run_lengths(box, height, width)
            objects.append({"image": number, "category": category, "bbox": [x, y, width // 3, height // 3]})
            objects[-1]["segmentation"] = kind
        objects.append({"image": number, "category": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1})
        images.append(image)
    root = write_coco(folder, SIZES, objects, f"annotations/{split}.json", split)
    for number, image in enumerate(images):
        put(root, f"{split}/{number}.jpg", content=encoded(image, "PNG"))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_coco(write_rectangles(tmp_path_factory.mktemp("rectangles")), "train")


def finished(dataset, *indices):
    return dataset.finish(dataset.collate([dataset.sample(index) for index in indices]), CPU)


def extent(mask):
    rows, columns = (np.flatnonzero(mask.any(dim=axis).numpy()) for axis in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def pixels_of(image):
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXELS.mean, PIXELS.std))
    return image * std + mean


def test_boxes_and_masks_follow_the_objects(source):
    """Of every object that is to be seen, box, mask and coloured region are the same within a pixel."""
    dataset = DetectionDataset(source, Jitter(SIZE), PIXELS, masks=True)
    seen, scales, cut, compared = set(), [], 0, 0
    for draw in range(60):
        seed_sample(draw)
        index = draw % 4
        (image,), (target,) = finished(dataset, index)
        assert image.shape == (3, *SIZE)
        h, w = target["size"]
        scales.append(h / SIZES[index][0] / min(SIZE[0] / SIZES[index][0], SIZE[1] / SIZES[index][1]))
        assert not image[:, h:].any()
        assert not image[:, :, w:].any()
        assert (target["original"], target["index"]) == (SIZES[index], index)
        assert target["boxes"].dtype == torch.float32
        assert target["masks"].shape == (len(target["boxes"]), *SIZE)
        colours = pixels_of(image)[:, :h, :w]
        for label, box, mask in zip(target["labels"].tolist(), target["boxes"], target["masks"], strict=True):
            seen.add(label)
            assert 0 <= box[0] < box[2] <= w
            assert 0 <= box[1] < box[3] <= h
            np.testing.assert_allclose(box, extent(mask), atol=1)
            assert not mask[h:].any()
            assert not mask[:, w:].any()
            shown = colours[label - 1] > 0.5  # red is 1, green is 2, and green lies on top
            if label == 2:
                assert torch.equal(shown, mask[:h, :w].bool())
                compared += 1
            elif shown.any():  # polygons are rasterised, images are resized
                outside = (shown & ~mask[:h, :w].bool()).sum()
                assert outside <= shown.any(0).sum() + shown.any(1).sum()
            cut += bool((box[:2] == 0).any() or box[2] == w or box[3] == h)
    assert seen == {1, 2}
    assert min(scales) < 0.4 < 1 <= max(scales)
    assert cut > 10
    assert compared > 30


def test_a_placement_is_drawn_as_published():
    """The scale is uniform: at 1 the image just fits. Of larger ones a random part is taken; half of all is flipped."""
    jitter = Jitter((100, 100))
    torch.manual_seed(0)
    drawn = [jitter(200, 400) for _ in range(2000)]
    for placed in drawn:
        top, left, height, width = placed.crop
        assert 0 <= top <= 200 - height
        assert 0 <= left <= 400 - width
        assert height == 200  # at scale 2 it just fits
        assert abs(placed.size[0] / height - placed.size[1] / width) < 0.01 * max(1, 100 / min(placed.size))
    widths = np.array([placed.size[1] / placed.crop[3] * 4 for placed in drawn])  # the scale, 1 where 400 become 100
    assert 0.09 < widths.min() < 0.12
    assert 1.98 < widths.max() < 2.02
    assert np.histogram(widths, 10, (0.1, 2))[0].min() > 150
    assert 0.45 < np.mean([placed.flip for placed in drawn]) < 0.55
    assert len({placed.seed for placed in drawn}) == 2000
    lefts = [placed.crop[1] / (400 - placed.crop[3]) for placed in drawn if placed.crop[3] < 300]
    assert np.histogram(lefts, 4, (0, 1))[0].min() > 0.2 * len(lefts)
    tight = Jitter((2, 2), (2, 2))  # one of two rows and columns is left out on either side
    assert {tight(3, 3).crop[:2] for _ in range(100)} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert not any(Jitter((9, 9), flip=0)(20, 20).flip for _ in range(20))


def test_points_move_with_the_pixels():
    placed = Placement((10, 20, 50, 100), (25, 25), flip=True)
    assert placed.move(np.array([[20, 10], [120, 60], [60, 20]])).tolist() == [[25, 0], [0, 25], [15, 5]]


def test_polygons_are_rasterised_where_they_are(tmp_path):
    """Only their surroundings are rasterised: the mask is that on the whole canvas, up to the rounding of points.

    What remains of an object has the box of its mask.
    """
    rng = np.random.default_rng(0)
    polygons = [(rng.random(2) * (150, 100) + rng.normal(0, 25, (5, 2))).clip(0, (150, 100)) for _ in range(40)]
    square = {"image": 0, "category": 3, "bbox": [0, 0, 150, 100]}
    objects = [{**square, "segmentation": [polygon.ravel().tolist()]} for polygon in polygons]
    source = open_coco(write_coco(tmp_path, [(100, 150)], objects), "val")
    different, pixels, seen = 0, 0, set()
    for draw in range(5):
        seed_sample(draw)
        sample = DetectionDataset(source, place := Jitter(SIZE), PIXELS, masks=True)
        _, (target,) = finished(sample, 0)
        seed_sample(draw)
        placed = place(100, 150)
        whole = [library.frPyObjects([placed.move(polygon).ravel().tolist()], *placed.size)[0] for polygon in polygons]
        want = [mask for mask in library.decode(whole).transpose(2, 0, 1) if mask.any()]
        masks = target["masks"][:, : placed.size[0], : placed.size[1]].numpy()
        different += (np.stack(want) != masks).sum()
        pixels += masks.sum()
        whole_boxes = [[0, 0, placed.size[1], placed.size[0]]] * len(masks)  # as annotated
        cut = placed.crop[2:] != (100, 150)
        seen.add(cut)
        assert target["boxes"].tolist() == ([*map(extent, target["masks"])] if cut else whole_boxes)
    assert different <= pixels // 10_000
    assert seen == {True, False}


def test_the_whole_image_in_evaluation(source):
    dataset = DetectionDataset(source, Fit(SIZE), PIXELS)
    images, targets = finished(dataset, 0, 1, 2, 3)
    assert [target["size"] for target in targets] == [(96, 64), (32, 128), (96, 96), (85, 128)]
    assert "masks" not in targets[0]
    for index, target in enumerate(targets):
        found = source.objects(index)
        (height, width), (h, w) = target["original"], target["size"]
        boxes = target["boxes"] * torch.tensor([width / w, height / h] * 2)
        torch.testing.assert_close(boxes, torch.tensor(found.boxes[~found.crowd]), atol=0.5, rtol=0)
        assert target["labels"].tolist() == [1, 2]
    assert images.dtype == torch.float32
    whole = torch.tensor(np.array(Image.open(io.BytesIO(source.read(2))))).permute(2, 0, 1) / 255  # 90 x 90 -> 96 x 96
    want = torch.nn.functional.interpolate(whole[None], (96, 96), mode="bilinear", antialias=True)[0]
    assert (pixels_of(images[2])[:, :96, :96] - want).abs().max() < 0.01


def test_a_smaller_image_is_the_mean_of_its_pixels(tmp_path):
    root = write_coco(tmp_path, [(48, 48)], [])
    stripes = Image.fromarray(np.tile(np.array([0, 0, 255], np.uint8), (48, 16)))
    put(root, "val2017/0.jpg", content=encoded(stripes, "PNG"))
    (image,), _ = finished(DetectionDataset(open_coco(root, "val"), Fit((12, 12)), PIXELS), 0)
    assert (pixels_of(image)[:, 1:-1, 1:-1] - 1 / 3).abs().max() < 0.05


def test_a_mask_outside_of_the_image(tmp_path):
    """Its box contradicts it: nothing of the object is to be seen."""
    beyond = {"image": 0, "category": 3, "bbox": [30, 20, 10, 10], "segmentation": [outline([40, 30, 60, 60])]}
    source = open_coco(write_coco(tmp_path, [(30, 40)], [beyond]), "val")
    _, (target,) = finished(DetectionDataset(source, Fit((30, 40)), PIXELS, masks=True), 0)
    assert target["boxes"].shape == (0, 4)


def test_samples_do_not_depend_on_workers_and_processes(source, monkeypatch):
    def batches(count=1, workers=0, batch_size=1):
        found = {}
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(count))
            dataset = DetectionDataset(source, Jitter(SIZE), PIXELS, masks=True)
            args = loader_args(batch_size=batch_size, num_workers=workers, seed=3)
            loader = loaders.train_loader(dataset, args, CPU)
            loader.sampler.set_epoch(1)
            for images, targets in loader:
                for image, target in zip(images, targets, strict=True):
                    found[target["index"]] = (image.clone(), {**target, "masks": target["masks"].clone()})
        return [found[index] for index in range(4)]

    whole = batches()
    for other in (batches(count=2), batches(batch_size=2), batches(workers=1, batch_size=2)):
        torch.testing.assert_close(other, whole, rtol=0, atol=0)
    torch.manual_seed(0)
    dataset = DetectionDataset(source, Jitter(SIZE), PIXELS, masks=True)
    assert not torch.equal(finished(dataset, 0)[0], whole[0][0][None])


def test_broken_images_and_masks(tmp_path):
    objects = [
        {"image": i, "category": 3, "bbox": [1, 1, 9, 9], "segmentation": [outline([1, 1, 9, 9])]} for i in range(4)
    ]
    objects[3]["segmentation"] = {"size": [30, 40], "counts": "a"}
    root = write_coco(tmp_path, [(30, 40)] * 4, objects)
    (tmp_path / "val2017" / "0.jpg").unlink()
    put(root, "val2017/1.jpg", content=encoded(Image.new("RGB", (30, 40))))
    dataset = DetectionDataset(open_coco(root, "val"), Fit(SIZE), PIXELS, masks=True)
    for index, message in enumerate(
        ["No such file or directory", "it has 30 x 40 pixels, and its annotations are for 40 x 30"]
    ):
        with pytest.raises(BrokenImage, match=f"{index}.jpg: {message}"):
            dataset.sample(index)
    with pytest.raises(BrokenImage, match=r"3.jpg: the run lengths of an object"):
        dataset.sample(3)
    args = loader_args(batch_size=2, num_workers=0, eval_bad="wrong", dist_eval=False)
    loader = loaders.eval_loader(dataset, args, CPU)
    targets = [target for _, targets in loader for target in targets]
    assert [target["index"] for target in targets] == [-1, -1, 2, -1]
    assert [target["masks"].shape[0] for target in targets] == [0, 0, 1, 0]


def test_turned_images(tmp_path):
    """Annotations belong to the image as it is decoded: upright with --exif, else as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored rows become columns
    root = write_coco(tmp_path, [(40, 30)], [{"image": 0, "category": 3, "bbox": [1, 1, 9, 9]}])
    put(root, "val2017/0.jpg", content=encoded(Image.new("RGB", (40, 30)), exif=exif))
    source = open_coco(root, "val")
    assert DetectionDataset(source, Fit(SIZE), Pixels(exif=True)).sample(0).numbers[:4] == (96, 72, 40, 30)
    with pytest.raises(BrokenImage, match="40 x 30 pixels, and its annotations are for 30 x 40"):
        DetectionDataset(source, Fit(SIZE), PIXELS).sample(0)


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels(tmp_path, channels):
    pixels = Pixels((0.5,) * channels, (0.25,) * channels, channels)
    objects = [{"image": 0, "category": 3, "bbox": [4, 4, 8, 8]}]
    root = write_coco(tmp_path, [(24, 32)], objects)
    if channels == 5:
        file = io.BytesIO()
        np.save(file, np.full((24, 32, 5), 0.75, np.float32))
        put(root, "val2017/0.jpg", content=file.getvalue())
    dataset = DetectionDataset(open_coco(root, "val"), Fit((48, 80)), pixels)
    (image,), (target,) = finished(dataset, 0)
    assert target["size"] == (48, 64)
    want = (128 / 255 - 0.5) / 0.25 if channels == 1 else 1.0
    torch.testing.assert_close(image[:, :, :64], torch.full((channels, 48, 64), want))
    assert not image[:, :, 64:].any()
    assert dataset.blank().pixels.shape == (48, 80, channels)
    assert dataset.blank().pixels.dtype == dataset.sample(0).pixels.dtype


def test_boxes_without_masks(tmp_path):
    """They need no segmentation; masks do."""
    root = write_coco(tmp_path, [(30, 40)], [{"image": 0, "category": 3, "bbox": [4, 4, 8, 8]}])
    source = open_coco(root, "val")
    with pytest.raises(UserError, match="masks cannot be learned"):
        DetectionDataset(source, Fit(SIZE), PIXELS, masks=True)
    dataset = DetectionDataset(source, Jitter((33, 33), (1.9, 2.0)), PIXELS)
    kept = 0
    for draw in range(30):
        seed_sample(draw)
        (_, (target,)) = finished(dataset, 0)
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        kept += len(target["boxes"])
    assert 0 < kept < 30
    assert math.prod(dataset.blank().boxes.shape) == 0
