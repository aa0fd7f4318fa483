"""Studies and the demo start scripts; here these are forked."""

import os
import subprocess
from types import SimpleNamespace

import pytest
from fork_server import ForkedScript

from util import launch


@pytest.fixture(autouse=True)
def _forked_scripts(monkeypatch):
    """A start ends with its parent, as `launch.start` has it: that is tested with a parent of its own."""

    def popen(words: list[str], **options: object) -> ForkedScript:
        return ForkedScript(words[words.index(str(os.getpid())) + 1 :], **options)

    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))
