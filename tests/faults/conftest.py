"""Real processes that something happens to."""

from pathlib import Path

import pytest
from helpers import noise_images


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Three classes: 16 images each to train, 7 in all to validate."""
    return noise_images(tmp_path_factory.mktemp("images"), train=16, height=50)
