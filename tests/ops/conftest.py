"""Fixtures of the tests of ops/."""

import pytest
import torch

import ops
from ops import backends
from ops.backends import compiled, cpu_backend


@pytest.fixture
def poisoned_memory():
    """Fill torch.empty with NaN, so that unwritten results are found."""
    # On a GPU cuBLAS and some kernels have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh(monkeypatch):
    """Clear what the process knows about backends, before and after a test that changes the machine."""

    def forget():
        for known in (ops.unavailable, backends._log_once, cpu_backend.load, compiled.private_folder):
            known.cache_clear()

    monkeypatch.delenv("RANK", raising=False)
    forget()
    yield
    monkeypatch.undo()
    forget()
