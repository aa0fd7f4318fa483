"""A process group for tests of one process."""

from collections.abc import Iterator

import pytest
import torch

from util.distributed.processes import end_groups


@pytest.fixture
def group_of_one(tmp_path) -> Iterator[None]:
    """Create a process group of this process only."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    end_groups()
