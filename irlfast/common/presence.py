"""A connection to the next process, where that is on another machine: it breaks when the process ends.

Nothing is sent over it. The system closes the connections of a process that is killed, and asks from time to time
whether the other machine is still there.
"""

import contextlib
import ipaddress
import os
import socket

from irlfast.common import ranks

CONNECT = 1.0  # seconds
# The system asks the other machine after 60 silent seconds, and gives it up after four questions without an answer.
ASKING = (
    {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
    if hasattr(socket, "TCP_KEEPIDLE")
    else {}
)


class Presence:
    """The open sockets of this process: one that waits for the process before it, one connected to the next process."""

    def __init__(self) -> None:
        self.door: socket.socket | None = None
        self.link: socket.socket | None = None
        self.refused = False

    def gone(self, store: ranks.Store) -> ranks.Member | None:
        """Return the next process if it has ended; None as long as nothing says so."""
        before, after = ((ranks.rank() + step) % ranks.world_size() for step in (-1, 1))
        if not self.door and is_away(store.member(before)):
            self.door = socket.create_server(("", 0))
            own = address_towards(os.environ["MASTER_ADDR"])  # a loopback address on that machine itself
            store.set(f"door/{ranks.rank()}", f"{own} {self.door.getsockname()[1]}")
        if not self.link and not self.refused and is_away(store.member(after)) and (door := store.get(f"door/{after}")):
            self.connect(*door.split(" "))
        return store.member(after) if self.link and is_closed(self.link) else None

    def connect(self, address: str, port: str) -> None:
        """Connect to a door. Where a firewall refuses it, the heartbeats alone tell."""
        host = address if address and not ipaddress.ip_address(address).is_loopback else os.environ["MASTER_ADDR"]
        try:
            self.link = socket.create_connection((host, int(port)), CONNECT)
        except OSError:
            self.refused = True
            return
        self.link.setblocking(False)
        self.link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ASKING.items():
            self.link.setsockopt(socket.IPPROTO_TCP, option, value)


def is_away(member: ranks.Member | None) -> bool:
    return member is not None and member.machine != ranks.machine()


def is_closed(link: socket.socket) -> bool:
    try:
        return link.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def address_towards(host: str) -> str:
    """Return this machine's address on the way to ``host``; an empty text if there is no way. Nothing is sent."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except socket.gaierror:
        return ""
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe, contextlib.suppress(OSError):
            probe.connect(address)
            return str(probe.getsockname()[0])
    return ""
