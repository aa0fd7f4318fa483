"""Helpers of the tests of data: write image folders and shards, open and read them."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from helpers import TINY_PRETRAIN, encoded, finetune_args
from PIL import Image, ImageDraw

from tools import pack_images
from util.data import datasets, decode, transforms
from util.data.sources import readers


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_labelled(path, *keys):
    """Write a shard with an image for every KEY=LABEL."""
    image = encoded(Image.new("RGB", (20, 20)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [key.split("=") for key in keys]
    write_shard(path, [m for key, label in pairs for m in ((f"{key}.jpg", image), (f"{key}.cls", label.encode()))])


def run_pack(*words):
    pack_images.main(pack_images.get_args_parser().parse_args([str(word) for word in (*words, "--num_workers", 2)]))


def put(root, *paths, content=b"x"):
    """Write files and create their folders; names may be bytes."""
    for path in paths:
        path = os.path.join(os.fsencode(root), os.fsencode(path))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def contents(source):
    return sorted((source.classes[source.labels[i]], source.read(i)) for i in range(len(source.labels)))


def warnings_of(caplog, path, split="train"):
    """Open a source; return it and the messages that it logs."""
    caplog.clear()
    return readers.open_source(str(path), split), [record.getMessage() for record in caplog.records]


def broken(source, index=0):
    """Return the reason why an image is broken, as training reports it."""
    with pytest.raises(decode.BrokenImage) as error:
        dataset_of(source).sample(index)
    return str(error.value)


def dataset_of(source):
    transform = transforms.finetune_transform((32, 32), finetune_args())
    return datasets.ImageDataset(source, datasets.pixels_by("fast", transform))


def write_coco(root, sizes, objects, file="annotations/instances_val2017.json", folder="val2017", **more):
    """Write annotations of grey JPEGs 0.jpg, 1.jpg ... of these sizes (height, width), whose ids are 10, 11 ...

    An object is a dict of the place of its image, its category (3 is "cat", 90 is "ant"), its box and whatever else.
    """
    images = []
    for number, (height, width) in enumerate(sizes):
        put(root, f"{folder}/{number}.jpg", content=encoded(Image.new("L", (width, height), 128), "JPEG"))
        images.append({"id": 10 + number, "file_name": f"{number}.jpg", "height": height, "width": width})
    annotations = [
        {"id": i + 1, "image_id": 10 + o["image"], "category_id": o["category"], **o} for i, o in enumerate(objects)
    ]
    categories = [{"id": 90, "name": "ant"}, {"id": 3, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories} | more
    put(root, file, content=json.dumps(content).encode())
    return str(root)


def denied(path, **_):
    raise PermissionError(13, "Permission denied", str(path))


def pretrain_words(folder, *more):
    words = [*TINY_PRETRAIN, "--data_path", folder, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 17, *more]
    return [str(word) for word in words]


SHAPES = ["ground", "disc", "box"]  # classes of `write_masked`


def masked_photograph(photograph, number, size=(80, 60)):
    """Draw a red disc and a striped box on a crop of a photograph: image and mask, outlines of the mask ignored."""
    rng = np.random.default_rng(number)
    width, height = size
    left, top = (int(rng.integers(0, whole - side)) for whole, side in zip(photograph.size, size, strict=True))
    image, mask = photograph.crop((left, top, left + width, top + height)), Image.new("L", size)
    x, y = int(rng.integers(2, width // 2 - 2)), int(rng.integers(2, height // 2 - 2))
    disc, box = (x, y, x + width // 3, y + width // 3), (x + width // 4, y + height // 4, width - 4, height - 3)
    ImageDraw.Draw(image).ellipse(disc, fill=(210, 40 + 5 * (number % 8), 30))
    ImageDraw.Draw(mask).ellipse(disc, fill=1, outline=255)
    ImageDraw.Draw(image).rectangle(box, fill=(20, 30, 200 - 5 * (number % 8)))
    for line in range(box[1], box[3], 4):
        ImageDraw.Draw(image).line((box[0], line, box[2], line), fill=(240, 240, 90))
    ImageDraw.Draw(mask).rectangle(box, fill=2, outline=255)
    return image, mask


def write_masked(root, photographs, train=6, val=3, size=(80, 60)):
    """Write photographs with shapes of three classes and their masks, as `MaskFolder` reads them; returns `root`."""
    put(root, "classes.txt", content="\n".join(SHAPES).encode())
    for start, split, count in ((0, "train", train), (train, "val", val)):
        for number in range(start, start + count):
            image, mask = masked_photograph(photographs[number % 2], number, size)
            put(root, f"images/{split}/{number}.jpg", content=encoded(image, quality=95))
            put(root, f"annotations/{split}/{number}.png", content=encoded(mask, "PNG"))
    return root
