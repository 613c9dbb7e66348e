"""The connection by which a process sees that the next one, on another machine, has ended."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from irlfast.common import ranks, watchdog
from irlfast.common.presence import Presence, address_towards


class Texts(dict):
    """The store of a run of two processes on two machines."""

    def __init__(self, *texts, machines: str = "01") -> None:
        super().__init__(*texts)
        self.known = {i: ranks.this_process()._replace(machine=f"node{name} boot") for i, name in enumerate(machines)}

    def set(self, name: str, text: str) -> None:
        self[name] = text

    def count(self, name: str) -> int:
        return self.get(name, 0)

    def member(self, number: int) -> ranks.Member:
        return self.known[number]

    def failure(self) -> None:
        return None


@pytest.fixture
def as_process(monkeypatch):
    """A function that makes this process that of a rank."""
    monkeypatch.setattr(ranks, "machine", lambda: f"node{ranks.rank()} boot")
    monkeypatch.setattr(ranks, "GONE", set())
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    return lambda rank: monkeypatch.setenv("RANK", str(rank))


@pytest.fixture
def connected(as_process):
    """The store, and both processes' presences, which are connected."""
    store, both = Texts(), [Presence(), Presence()]
    for number in (0, 1, 0, 1):
        as_process(number)
        assert both[number].gone(store) is None
    yield store, both
    for socket_ in [each for presence in both for each in (presence.door, presence.link) if each]:
        socket_.close()


def test_a_process_that_ends_is_seen_by_the_one_before_it_and_named_with_its_machine(as_process, connected):
    store, (own, other) = connected
    watch = watchdog.Watch(None, 0.0, None, presence=own)
    as_process(0)
    assert watchdog.gone_process(watch, store) == ""
    for end in (other.door, other.link):  # as the system does when the process is killed
        end.close()
    assert watchdog.gone_process(watch, store) == "process 1, on node1, ended without a word (killed?)"
    assert ranks.has_ended(store.member(1)) and not ranks.has_ended(store.member(0)._replace(pid=os.getpid()))


def test_a_process_that_has_left_as_all_do_is_not_missed(as_process, connected):
    store, (own, other) = connected
    other.door.close()
    store["left"] = 1
    as_process(0)
    assert own.gone(store)
    assert watchdog.gone_process(watchdog.Watch(None, 0.0, None, presence=own), store) == ""


def test_a_process_of_the_same_machine_that_ends_after_it_has_left_is_not_missed(as_process):
    """The slower one may still part from the process group, with its store open."""
    store, watch = Texts(machines="00"), watchdog.Watch(None, 0.0, None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store.known[1] = store.known[1]._replace(pid=ended.pid)
    as_process(0)
    assert watchdog.gone_process(watch, store) == "process 1 ended without a word (killed?)"
    store["left"] = 1
    assert watchdog.gone_process(watch, store) == ""


def test_a_door_that_does_not_open_is_tried_once(as_process):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store, presence = Texts({"door/1": f"127.0.0.1 {port}"}), Presence()
    as_process(0)
    assert presence.gone(store) is None
    assert presence.refused and not presence.link
    presence.door.close()


def test_processes_of_one_machine_keep_no_connection(as_process):
    presence = Presence()
    as_process(0)
    assert presence.gone(Texts(machines="00")) is None and not presence.door and not presence.link


def test_a_process_that_is_ending_asks_the_store_no_more():
    with ranks.ENDING:
        watchdog.look_at_others(watchdog.Watch(None, 0.0, None), None)


@pytest.mark.parametrize(("machines", "speaker"), [("aabb", 2), ("aaaa", 1), ("ab", 1)])
def test_when_process_0_is_gone_the_first_process_of_another_machine_says_so(as_process, machines, speaker):
    members = {number: ranks.Member(name, 7, 0.0) for number, name in enumerate(machines)}
    store, speakers = SimpleNamespace(known=members), []
    for number in members:
        as_process(number)
        speakers += [number] if watchdog.speaks_for_first(store) else []
    assert speakers == [speaker]


def test_an_address_towards_a_host_is_one_of_this_machine(monkeypatch):
    assert address_towards("127.0.0.1") == "127.0.0.1"

    def unknown(*given, **options):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert address_towards("node9") == ""
