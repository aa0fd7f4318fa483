"""Refuse every connection but those to this machine, and data sets of the system, as on a machine that has neither.

conftest.py imports this, and so does every Python that a test starts: conftest.py puts this folder on PYTHONPATH.
"""

import errno
import ipaddress
import socket
import sys

DATA_SETS = "/usr/share/datasets"  # of Debian's packages, which are not installed everywhere
LOCAL_NAMES = "localhost", "ip6-localhost", socket.gethostname()


def is_local(host: str | bytes | None) -> bool:
    """Return whether a host is this machine: nothing is looked up."""
    host = host.decode(errors="replace") if isinstance(host, (bytes, bytearray)) else host
    if not host or host in LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse(event: str, arguments: tuple) -> None:
    """Hook of `sys.addaudithook`: raise where a socket reaches out or a data set of the system is read."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        connection, address = arguments
        if connection.family in (socket.AF_INET, socket.AF_INET6) and address and not is_local(address[0]):
            raise OSError(errno.ENETUNREACH, f"tests have no network: {address[0]}")
    elif event == "open" and str(arguments[0]).startswith(DATA_SETS):
        raise FileNotFoundError(errno.ENOENT, "tests have no data sets of the system", arguments[0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and not is_local(arguments[0]):
        raise socket.gaierror(socket.EAI_AGAIN, f"tests have no network: {arguments[0]}")


sys.addaudithook(refuse)
