"""Real processes that something happens to."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fault_helpers import Started
from helpers import noise_images


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Three classes: 16 images each to train, 7 in all to validate."""
    return noise_images(tmp_path_factory.mktemp("images"), train=16, height=50)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, images) -> Callable[..., Path]:
    """Return the output folder of a run that nothing has happened to; each command runs once."""
    root, folders = tmp_path_factory.mktemp("finished"), {}

    def run(command: list, *more: object, **how: int) -> Path:
        key = str((command, more, how))
        if key not in folders:
            folders[key] = root / str(len(folders))
            words = [*command, "--data_path", images, "--output_dir", folders[key], *more]
            running = Started(root / f"{len(folders)}.txt", *words, **how)
            assert running.status() == 0, running.text
        return folders[key]

    return run


@pytest.fixture
def start(tmp_path, images):
    """Start a script on the images; what is still running at the end of the test is killed."""
    started = []

    def begin(command: list, *more: object, data: bool = True, **how: int) -> Started:
        words = [*command, *(["--data_path", images] if data else []), *more]
        started.append(Started(tmp_path / f"output-{len(started)}.txt", *words, **how))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.kill()
