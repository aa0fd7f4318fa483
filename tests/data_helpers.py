"""Helpers of the tests of data: write image folders and shards, open and read them."""

import io
import os
import tarfile

import pytest
from helpers import TINY_PRETRAIN, encoded, finetune_args
from PIL import Image

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


def denied(path, **_):
    raise PermissionError(13, "Permission denied", str(path))


def pretrain_words(folder, *more):
    words = [*TINY_PRETRAIN, "--data_path", folder, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 17, *more]
    return [str(word) for word in words]
