"""Fixtures: the JPEG images as tar shards and as a Hugging Face dataset."""

import pytest
from data_helpers import run_pack


@pytest.fixture
def shards(jpeg_folder, tmp_path):
    """The unchanged images of the folder in shards of 5."""
    run_pack(jpeg_folder, tmp_path / "shards", "--shard_images", "5")
    return tmp_path / "shards"


@pytest.fixture
def hub_folder(jpeg_folder, tmp_path):
    """The same images as a dataset saved by Hugging Face's library."""
    hub = pytest.importorskip("datasets")
    hub.load_dataset(
        "imagefolder", data_dir=str(jpeg_folder), cache_dir=str(tmp_path / "cache")
    ).save_to_disk(tmp_path / "saved")  # fmt: skip
    return tmp_path / "saved"
