"""Shared by the tests of detection: few regions and narrow heads, coloured rectangles."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from small_detector import FEW, write_rectangles

from Detection import models_detect


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample few regions, and give the heads few channels: a thousand regions take seconds on a CPU."""
    for name, value in FEW.items():
        monkeypatch.setattr(models_detect, name, value)


@pytest.fixture(scope="session")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rectangles(tmp_path_factory.mktemp("rectangles"))
