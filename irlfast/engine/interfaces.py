"""The network interface by which gloo reaches the processes on other machines.

Gloo takes the address that this machine's own name has. A hosts file often says that it is 127.0.1.1 (Debian), which
the other machines cannot reach.
"""

import ipaddress
import os
import socket

import psutil

from irlfast.common import ranks
from irlfast.common.files import InputError
from irlfast.common.presence import address_towards

NAME = "GLOO_SOCKET_IFNAME"


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME, where it is not set, to the interface that reaches the other machines of the run.

    It is the one by which this process reaches the machine of MASTER_ADDR; on that machine, it is the one by which
    another machine is reached. Nothing is set where all processes are on one machine.

    Raises:
        InputError: GLOO_SOCKET_IFNAME names an interface that this machine does not have.
    """
    store = ranks.STORE
    if not store:
        return
    own = address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address/{ranks.rank()}", own)
    ranks.meet()
    addresses = [store.get(f"address/{number}") or "" for number in range(ranks.world_size())]
    far = [address for address in addresses if address and not ipaddress.ip_address(address).is_loopback]
    names = {each.address: name for name, all_of_it in psutil.net_if_addrs().items() for each in all_of_it}
    if given := os.environ.get(NAME):
        if unknown := sorted({*given.split(",")} - {*names.values()}):
            here = ", ".join(sorted({*names.values()}))
            raise InputError(f"{NAME}: found {unknown[0]}, but {socket.gethostname()} has {here}")
    elif far:
        name = names.get(own if own in far else address_towards(far[0]))
        if name:
            os.environ[NAME] = name


def advice(error: RuntimeError) -> str:
    """Return one sentence about connections that gloo could not make."""
    reason = str(error).rsplit("] ", 1)[-1].strip()
    taken = os.environ.get(NAME)
    by = f"interface {taken} ({NAME})" if taken else "the address that its name has"
    return (
        f"the processes do not reach each other ({reason}): gloo listens on {socket.gethostname()} at {by}; set {NAME} "
        "on each machine to the interface that the other machines reach"
    )
