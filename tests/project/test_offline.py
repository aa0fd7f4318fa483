"""Tests run as on a machine without a network, in this process and in those that they start, and with an empty home."""

import os
import pwd
import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from helpers import REPOSITORY, SLOW
from sitecustomize import is_local

# An address that belongs to nobody (TEST-NET-1, RFC 5737): without the hook, connecting to it takes until the timeout.
PROBE = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname(), timeout=5).close()
for reach in (
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 53)),
    lambda: socket.getaddrinfo("example.org", 80),
):
    try:
        reach()
    except OSError as error:
        print(error)
"""


def test_connections_beyond_this_machine_are_refused(tmp_path):
    with pytest.raises(OSError, match=r"tests have no network: 192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(URLError, match=r"tests have no network: example\.org"):
        urlopen("https://example.org/")
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert len(re.findall(r"tests have no network: (?:192\.0\.2\.1|example\.org)", done.stdout)) == 3


def test_data_sets_of_the_system_are_not_there():
    """Debian's Fashion-MNIST is on some machines; no test may need it."""
    with pytest.raises(FileNotFoundError, match="tests have no data sets of the system"):
        Path("/usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz").read_bytes()


@pytest.mark.parametrize("host", ["127.0.0.1", b"127.9.9.9", "::1", "localhost", "", None])
def test_this_machine(host):
    assert is_local(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "localhost.example.org", b"example.org"])
def test_other_machines(host):
    assert not is_local(host)


def test_the_home_is_not_the_user_s():
    """It is made for the session: nothing that a user or an earlier session has left lies in it."""
    assert str(Path.home()) == os.environ["HOME"] != pwd.getpwuid(os.getuid()).pw_dir
    assert Path.home().name.startswith("home-")
    assert not {"XDG_CACHE_HOME", "HF_HOME", "HF_TOKEN", "TORCH_HOME"} & os.environ.keys()


def test_slow_tests_exist():
    """Each name in the list of those that `make check` leaves out is a folder, a file or a function of tests."""
    names = set()
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        functions = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        names |= {path.parent.name, path.stem, *functions, *(f"{path.stem}::{name}" for name in functions)}
    assert names >= SLOW
