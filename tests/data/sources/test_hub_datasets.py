"""Hugging Face datasets: splits, columns, labels, mistakes."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from data_helpers import broken
from helpers import REPOSITORY
from hub_server import Server
from PIL import Image

from util.data import decode
from util.data.sources import readers
from util.errors import UserError

COMMIT = "3" * 40


@pytest.fixture
def hub():
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def test_without_hugging_face(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        readers.open_source("hfds:name", "train")


def test_columns_of_a_hub_dataset(tmp_path):
    """Columns are found by their type; of two label columns, the one called label is used."""
    hub = pytest.importorskip("datasets")
    features = {
        "picture": hub.Image(),
        "coarse": hub.ClassLabel(names=["x"]),
        "label": hub.ClassLabel(names=["a", "b"]),
        "caption": hub.Value("string"),
    }
    rows = {"picture": [Image.new("RGB", (9, 9))] * 2, "coarse": [0, 0], "label": [1, 0], "caption": ["", ""]}
    train = hub.Dataset.from_dict(rows, features=hub.Features(features))
    hub.DatasetDict({"train": train, "test": train}).save_to_disk(tmp_path / "two")
    source = readers.open_source(f"hfds:{tmp_path / 'two'}", "val")
    assert (source.labels.tolist(), source.classes, "(test)" in source.root) == ([1, 0], ["a", "b"], True)
    assert source.labels.flags.writeable  # else torch warns
    assert decode.crop_of(source.read(1)).shape == (9, 9, 3)
    hub.DatasetDict({"train": train.rename_column("label", "fine")}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="one ClassLabel column or one called 'label'; found: coarse, fine"):
        readers.open_source(f"hfds:{tmp_path / 'other'}", "train")
    with pytest.raises(UserError, match="it has the splits train, and none for val"):
        readers.open_source(f"hfds:{tmp_path / 'other'}", "val")


def test_labels_of_a_hub_dataset_are_read_at_once(tmp_path):
    """Even if rows were selected and shuffled before saving; rows without a label are refused."""
    hub = pytest.importorskip("datasets")
    labels = np.random.default_rng(0).integers(0, 9, 10**5)
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(num_classes=9)})
    rows = {"image": [{"bytes": b"%d" % label, "path": None} for label in labels], "label": labels}
    train = hub.Dataset.from_dict(rows, features=features)
    val = train.shuffle(seed=0).select(range(1000, 3000, 2))
    hub.DatasetDict({"train": train, "val": val}).save_to_disk(tmp_path / "saved")
    start = time.monotonic()
    source = readers.open_source(f"hfds:{tmp_path / 'saved'}", "train")
    assert time.monotonic() - start < 2  # row by row it took 5 seconds
    assert np.array_equal(source.labels, labels)
    source = readers.open_source(f"hfds:{tmp_path / 'saved'}", "val")
    assert len(source.labels) == 1000
    assert [int(source.read(index)) for index in range(1000)] == source.labels.tolist()
    some = hub.Dataset.from_dict({"image": rows["image"][:3], "label": [0, None, -1]}, features=features)
    hub.DatasetDict({"train": some}).save_to_disk(tmp_path / "some")
    with pytest.raises(UserError, match="2 of 3 images have no label"):
        readers.open_source(f"hfds:{tmp_path / 'some'}", "train")


def saved(folder, split=None, **columns):
    """Save a single dataset with these columns of (feature, values); return its `--data_path`."""
    hub = pytest.importorskip("datasets")
    features = hub.Features({name: feature for name, (feature, _) in columns.items()})
    rows = {name: values for name, (_, values) in columns.items()}
    hub.Dataset.from_dict(rows, features=features, split=split and hub.Split(split)).save_to_disk(folder)
    return f"hfds:{folder}"


def test_a_single_saved_dataset(tmp_path):
    hub = pytest.importorskip("datasets")
    image, label = (hub.Image(), [{"bytes": b"x", "path": None}]), (hub.ClassLabel(names=["a"]), [0])
    path = saved(tmp_path / "alone", image=image, label=label)
    source = readers.open_source(path, "train")
    assert (source.classes, source.labels.tolist(), source.read(0)) == (["a"], [0], b"x")
    with pytest.raises(UserError, match="the splits train, and none for val; a single saved dataset counts"):
        readers.open_source(path, "val")
    path = saved(tmp_path / "val", "validation", image=image, label=label)
    assert readers.open_source(path, "val").labels.tolist() == [0]
    with pytest.raises(UserError, match="the splits validation, and none for train"):
        readers.open_source(path, "train")


@pytest.mark.parametrize("kind", ["int64", "uint8", "uint64"])
def test_labels_in_integer_columns(tmp_path, kind):
    hub = pytest.importorskip("datasets")
    images = (hub.Image(), [{"bytes": b"x", "path": None}, None])
    path = saved(tmp_path / "data", picture=images, label=(hub.Value(kind), [3, 1]), id=(hub.Value("int64"), [7, 8]))
    source = readers.open_source(path, "train")
    assert (source.labels.tolist(), source.labels.dtype, source.classes) == ([3, 1], np.dtype(np.int64), [""] * 4)
    assert (source.read(0), source.read(1)) == (b"x", b"")
    assert broken(source, 1) == f"hfds:{tmp_path}/data (train) row 1: no image of a known format"


def test_mistakes_of_hub_datasets(tmp_path):
    hub = pytest.importorskip("datasets")
    images = (hub.Image(), [{"bytes": b"x", "path": None}] * 2)
    name = hub.ClassLabel(names=["a", "b"])
    cases = {
        "empty": ({"image": (hub.Image(), []), "label": (name, [])}, "it is damaged or empty: "),
        "without columns": ({}, "it is damaged or empty: "),
        "without images": ({"label": (name, [0, 1])}, "it needs one Image column"),
        "without labels": ({"image": images}, "it needs one ClassLabel column or one called 'label'; found: none$"),
        "only ids": ({"image": images, "id": (hub.Value("int64"), [0, 1])}, "it needs one ClassLabel column"),
        "fractions": ({"image": images, "label": (hub.Value("float32"), [0, 1])}, r"'label' holds Value\('float32'\)"),
        "truths": ({"image": images, "label": (hub.Value("bool"), [0, 1])}, r"'label' holds Value\('bool'\)"),
        "words": ({"image": images, "label": (hub.Value("string"), ["0", "1"])}, r"'label' holds Value\('string'\)"),
        "no numbers": ({"image": images, "label": (hub.Value("int64"), [None, None])}, "2 of 2 images have no label"),
        "below 0": ({"image": images, "label": (hub.Value("int32"), [-1, 0])}, "1 of 2 images have no label"),
        "an id": ({"image": images, "label": (hub.Value("int64"), [10**18, 0])}, r"label 10{18} is not below 1000000"),
    }
    for case, (columns, message) in cases.items():
        path = saved(tmp_path / case, **columns)
        with pytest.raises(UserError, match=message) as error:
            readers.open_source(path, "train")
        assert str(error.value).isprintable(), case
        assert path in str(error.value), case
    for damage in ("{", "[" * 10**5, "null", "[]", '{"_data_files": [{"filename": "/dev/zero"}]}'):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "state.json").write_text(damage)
        (tmp_path / "damaged" / "dataset_info.json").write_text(damage)
        with pytest.raises(UserError, match="damaged: ") as error:
            readers.open_source(f"hfds:{tmp_path / 'damaged'}", "train")
        assert str(error.value).isprintable()


OPEN = """
import sys
from util.data.sources import readers
from util.errors import UserError
for path in sys.argv[1:]:
    try:
        source = readers.open_source(path, "val")
        print(source.root, source.classes, source.labels.tolist(), source.read(0))
    except UserError as error:
        print(error)
"""


def test_folders_of_a_hub_dataset(hub, tmp_path):
    """A folder of a revision is read without its script and its other folders, later also without the hub."""
    library = pytest.importorskip("datasets")
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": b"x", "path": None}, {"bytes": b"y", "path": None}], "label": [1, 0]}
    library.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows")
    content = (tmp_path / "rows").read_bytes()
    files = {f"160px/{split}-0.parquet": content for split in ("train", "validation")}
    files |= {"ette.py": b"", "full/train-0.parquet": b"larger images"}
    hub.repositories["arm/ette"] = dict.fromkeys(("main", "v1", COMMIT), (COMMIT, files))

    def opened(*paths, **environment):
        command = [sys.executable, "-c", OPEN, *paths]
        how = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **environment}
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, **how})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    found = "['a', 'b'] [1, 0] b'x'"
    paths = ["hfds:arm/ette/160px", "hfds:arm/ette@v1/160px/", f"hfds:arm/ette@{COMMIT}/160px"]
    whole, wrong, unknown, other, *folders = opened(
        "hfds:arm/ette", "hfds:arm/ette/80px", "hfds:arm/ette@v2/160px", "hfds:arm/other/160px", *paths
    )
    assert folders == [f"{path} (validation) {found}" for path in paths]
    assert not hub.bodies("full/train-0.parquet")
    assert whole.startswith("--data_path hfds:arm/ette: Dataset scripts are no longer supported")
    assert whole.endswith("name a folder of its data files: hfds:OWNER/NAME/FOLDER or hfds:OWNER/NAME@REVISION/FOLDER")
    assert wrong == "--data_path hfds:arm/ette/80px: the dataset has no folder 80px"
    assert unknown.startswith("--data_path hfds:arm/ette@v2/160px: 404")
    assert other.startswith("--data_path hfds:arm/other/160px: ")
    assert opened(paths[2], HF_HUB_OFFLINE="1") == folders[2:]
