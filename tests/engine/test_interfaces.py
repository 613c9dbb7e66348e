"""The interface by which gloo reaches the other machines."""

import os
import socket
from types import SimpleNamespace

import pytest

from irlfast.common import ranks
from irlfast.common.files import InputError
from irlfast.engine import interfaces

HERE = {"lo": ["127.0.0.1", "127.0.1.1"], "docker0": ["172.17.0.1"], "eth0": ["10.77.0.1"]}


@pytest.fixture
def started(monkeypatch):
    """A function: this process is the first of two, and has and reaches the addresses; what is chosen is returned."""

    def chosen(own: str, other: str, towards: dict[str, str], given: str = "") -> str | None:
        known = {"address/1": other}
        monkeypatch.setattr(ranks, "STORE", SimpleNamespace(set=known.__setitem__, get=known.get))
        monkeypatch.setattr(ranks, "meet", lambda: None)
        monkeypatch.setattr(interfaces, "address_towards", lambda host: own if host == "node0" else towards[host])
        addresses = {name: [SimpleNamespace(address=each) for each in all_] for name, all_ in HERE.items()}
        monkeypatch.setattr(interfaces.psutil, "net_if_addrs", lambda: addresses)
        for name, value in {"MASTER_ADDR": "node0", "RANK": "0", "WORLD_SIZE": "2", interfaces.NAME: given}.items():
            monkeypatch.setenv(name, value)
        if not given:
            monkeypatch.delenv(interfaces.NAME)
        interfaces.choose_interface()
        return os.environ.get(interfaces.NAME)

    return chosen


@pytest.mark.parametrize("own", ["127.0.1.1", "10.77.0.1"])
def test_it_is_the_one_that_reaches_the_other_machines_whatever_address_the_own_name_has(started, own):
    assert started(own, "10.77.0.2", {"10.77.0.2": "10.77.0.1"}) == "eth0"


@pytest.mark.parametrize("other", ["127.0.0.1", ""])
def test_none_is_chosen_where_no_other_machine_is_there_or_is_reached(started, other):
    assert started("127.0.0.1", other, {}) is None


def test_one_that_is_given_is_kept_and_one_that_is_not_there_is_refused(started):
    assert started("127.0.1.1", "10.77.0.2", {}, "docker0") == "docker0"
    with pytest.raises(InputError, match=r"GLOO_SOCKET_IFNAME: found ib0, but \S+ has docker0, eth0, lo$"):
        started("127.0.1.1", "10.77.0.2", {}, "ib0")


def test_connections_that_fail_are_a_sentence_with_the_reason_and_the_variable(monkeypatch):
    said = "Gloo connectFullMesh failed with [/gloo/pair.cc:152] timed out connecting: refused, remote=[127.0.1.1]:14\n"
    monkeypatch.setenv(interfaces.NAME, "docker0")
    assert interfaces.advice(RuntimeError(said)) == (
        "the processes do not reach each other (timed out connecting: refused, remote=[127.0.1.1]:14): gloo listens on "
        f"{socket.gethostname()} at interface docker0 (GLOO_SOCKET_IFNAME); set GLOO_SOCKET_IFNAME on each machine to "
        "the interface that the other machines reach"
    )
