"""Shared by the tests: no network and an empty home, golden values, small images, scripts run in this process."""

# ruff: noqa: E402

import gc
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

# Before the other imports, which read them: no test needs the network, nor a cache, a setting or a token of the user.
# xdist's workers share the home of the session: kernels are compiled once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    HOME = tempfile.TemporaryDirectory(prefix="home-")  # removed when Python ends
    os.environ["HOME"] = HOME.name
TESTS = str(Path(__file__).resolve().parent)
for name in [*os.environ]:
    if name.startswith(("XDG_", "HF_", "HUGGING_FACE_", "TORCH_HOME", "MPLCONFIGDIR", "TRITON_HOME", "TRITON_CACHE")):
        del os.environ[name]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
sys.path.insert(0, TESTS)
sys.modules.pop("sitecustomize", None)  # of the system

import pytest
import sitecustomize  # noqa: F401
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on CPU tensors

from helpers import SLOW, Golden, noise_images
from PIL import Image
from sklearn.datasets import load_sample_images


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW & {item.path.parent.name, item.path.stem, item.originalname, f"{item.path.stem}::{item.originalname}"}:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Keep garbage collections short: they need not look at what imports have made, and a quarter of the CPU time was
    theirs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Skip, with the reason, what needs the fast CPU kernels where there is no C compiler, which is optional."""
    from ops import BackendUnavailable

    try:
        return (yield)
    except BackendUnavailable as error:
        if "no C compiler found" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def golden():
    return Golden


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Three classes of coloured noise of odd sizes: 8 images each to train, 7 in all to validate."""
    return noise_images(tmp_path_factory.mktemp("images"), train=8, height=37)


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """The two photographs that scikit-learn carries, 640 x 427."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@pytest.fixture(scope="session")
def jpeg_folder(tmp_path_factory, photographs) -> Path:
    """Three classes of crops of photographs as JPEG: 8 images each to train, 7 in all to validate."""
    root = tmp_path_factory.mktemp("jpegs")
    for split, counts in (("train", (8, 8, 8)), ("val", (3, 2, 2))):
        for label, count in enumerate(counts):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                box = (30 * i, 20 * i, 30 * i + 260 + label, 20 * i + 200)
                photographs[label % 2].crop(box).save(folder / f"{i}.jpg", quality=93)
    return root


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tensors so small further threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_script(monkeypatch):
    """Run a main script in this process with a command line."""
    from util import cli

    def run(script, *argv: object) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
        cli.run_main(script.main, script.get_args_parser())

    return run
