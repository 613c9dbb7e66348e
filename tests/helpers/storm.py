"""Chains of kills: a run is started and killed, again and again, until it ends, and must end as an undisturbed one."""

import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from irlfast.common.artefacts import MANIFEST, checksums, notes
from tests.helpers.killable import Start, until
from tests.helpers.runs import settings

TINY = {"max_train_samples": 24, "max_eval_samples": 8, "max_new_tokens": 6, "sft_steps": 4}  # keys of a run of seconds
LONGEST = 600.0  # seconds of one start
MOST = 8  # kills of a chain
PARTS = 4  # a kill comes within the next of so many parts of a run
OURS = re.compile(r'File "[^"]*/irlfast/\w+')  # in a traceback
# Keys whose values are times, or memory, or (settings, in data.json) the checksum of a time and other things.
TIMES = re.compile(r"time/.*|.*seconds|.*_per_second|tflops|memory_gib|begun|settings")
LOGS = ("report.html", "starts.jsonl", ".lock")  # each start writes its own
TORN = "a part of a checkpoint"  # the fault point whose file may be half written
SIGNALS = (*["SIGKILL"] * 6, *["SIGTERM"] * 3, "SIGINT", "SIGUSR1")  # as often as they are drawn
SAVE_STEPS = (1, 2, 4)  # a key that may change from start to start


class Setting(NamedTuple):
    """A run of the storm, and how it is started."""

    name: str
    how: str  # as :class:`tests.helpers.killable.Start` has it
    keys: dict[str, Any]


class Whole(NamedTuple):
    """An undisturbed run."""

    output: Path
    seconds: float
    names: list[str]  # of files and folders within the output, in the order in which they appeared
    calls: dict[int, dict[str, int]]  # rank -> fault point -> number of calls


class Way(NamedTuple):
    """How a start is killed: the signal, who gets it, and when."""

    signal: str
    target: str  # one process, all, launcher, or sampler
    moment: str  # a time, a file, a point, or the sampler
    at: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.signal} to {self.target} at {self.moment} {json.dumps(self.at)}"


class Kill(NamedTuple):
    """The effects of a kill."""

    way: Way
    code: int | None  # the exit code of the process, or of the launcher
    seconds: float  # until all processes had ended
    orphans: int  # processes that lived on after 30 s
    traceback: bool  # whether one of irlfast's files is in a traceback


def undisturbed(setting: Setting, folder: Path) -> Whole:
    """Run to the end without a kill, and note what can be killed."""
    record, output = folder / "record", folder / "run"
    record.mkdir(parents=True)
    begun = time.monotonic()
    start = started(setting, output, folder, {"record": str(record)})
    assert not to_its_end(start), start.printed()
    seconds = time.monotonic() - begun
    calls, names = {}, {}
    for path in sorted(record.iterdir()):
        noted = json.loads(path.read_text())
        calls[int(path.name)] = noted["calls"]
        inside = (name for name in noted["names"] if name.startswith(f"{output}{os.sep}"))
        names |= dict.fromkeys(os.path.relpath(name, output) for name in inside)
    return Whole(output, seconds, list(names), calls)


def started(setting: Setting, output: Path, folder: Path, plan: dict[str, Any], **keys: Any) -> Start:
    words = settings(output, **setting.keys | keys)
    return Start(setting.how, ["-m", "tests.helpers.fault_points", json.dumps(plan), "irlfast.train", *words], folder)


def to_its_end(start: Start) -> str:
    """Wait until a start ends by itself, and return what is wrong with its end."""
    try:
        if not start.gone(LONGEST):
            return f"a start did not end in {LONGEST:.0f} s"
        return f"a start ended with {start.code()}: {start.printed()}" if start.code() else ""
    finally:
        start.clear()


def stand_in(folder: Path) -> str:
    """Write an interpreter whose vLLM is quick to start, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    python, place = folder / "python", Path(__file__).with_name("stand_in")
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{place}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)


# ---------------------------------------------------------------- what is drawn


def draw_way(setting: Setting, whole: Whole, draw: random.Random) -> Way:
    """Draw who is killed, by what and when. Numbers are shares, so that they mean the same on a slower machine."""
    several, samples = setting.how != "1 process", setting.keys.get("use_vllm")
    name = draw.choice(SIGNALS)
    target = draw.choice(["one process", "one process", "all", "launcher"]) if several else "one process"
    moment = draw.choice(["a time", "a file", "a point", "a point", *(["the sampler"] * 2 if samples else [])])
    if moment == "the sampler":
        return Way("SIGKILL", "sampler", moment, {"seconds": round(draw.uniform(0, 0.5), 3)})
    at: dict[str, Any] = {"share": round(draw.random(), 3), "rank": draw.randrange(2 if several else 1)}
    if moment == "a point":
        point = draw.choice(sorted(whole.calls[at["rank"]]))
        torn = ["half"] if point == TORN and name == "SIGKILL" and target != "launcher" else []
        at |= {"point": point, "when": draw.choice(["before", "after", *torn])}
    return Way(name, target, moment, at)


def plan_of(way: Way, whole: Whole, marker: Path) -> dict[str, Any]:
    """The plan of the fault point at which the run stops: one of the next calls."""
    if way.moment != "a point":
        return {}
    calls = whole.calls[way.at["rank"]][way.at["point"]]
    number = 1 + int(way.at["share"] * calls / PARTS)
    return {**{key: way.at[key] for key in ("rank", "point", "when")}, "number": number, "marker": str(marker)}


def condition_of(way: Way, whole: Whole, start: Start, output: Path, marker: Path) -> Callable[[], Any]:
    """Return a function that says whether it is time to kill."""
    if way.moment == "a point":
        return lambda: marker.exists() and has_stopped(marker.read_text())
    if way.moment == "the sampler":
        return start.samplers
    if way.moment == "a file":
        there = [number for number, name in enumerate(whole.names) if (output / name).exists()]
        later = whole.names[max(there, default=-1) + 1 :] or whole.names[-1:]
        path = output / later[min(int(way.at["share"] * len(whole.names) / PARTS), len(later) - 1)]
        return lambda: os.path.lexists(path)
    end = time.monotonic() + way.at["share"] * whole.seconds / 2
    return lambda: time.monotonic() > end


def has_stopped(pid: str) -> bool:
    """Whether a process has reached its fault point, shortly after it has written its id there."""
    try:
        return bool(pid) and psutil.Process(int(pid)).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def targets_of(way: Way, start: Start) -> list[psutil.Process]:
    """The processes that the signal goes to."""
    if way.target == "sampler":
        return start.samplers()[:1]
    if way.target == "launcher":
        return start.launcher()
    ranks = start.ranks()
    if way.target == "one process":
        return ranks[way.at["rank"] :][:1]
    return [*start.launcher(), *ranks]


# ---------------------------------------------------------------- kills


def kill(setting: Setting, whole: Whole, way: Way, folder: Path, save_steps: int) -> Kill | str:
    """Start the run, and kill it. If it ends before the moment comes, return what is wrong with its end."""
    output, marker = folder / "run", folder / "marker"
    marker.unlink(missing_ok=True)
    start = started(setting, output, folder, plan_of(way, whole, marker), save_steps=save_steps)
    come = condition_of(way, whole, start, output, marker)
    pause = 0.02 if way.moment == "the sampler" else 0.001
    targets: list[psutil.Process] = []
    while start.code() is None and not targets:  # a sampler may have ended by now
        until(lambda: start.code() is not None or (come() and targets_of(way, start)), LONGEST, pause)
        time.sleep(way.at.get("seconds", 0))
        targets = targets_of(way, start)
    if start.code() is not None:
        return to_its_end(start)
    begun = time.monotonic()
    for process in targets:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(getattr(signal, way.signal))
    if way.moment == "a point":
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int(marker.read_text())).resume()
    if way.target == "sampler":  # the run may do without the sampler
        until(lambda: start.code() is not None, LONGEST, pause=0.05)
    start.gone()
    orphans = len(start.alive())
    start.clear()
    return Kill(way, start.code(), time.monotonic() - begun, orphans, bool(OURS.search(start.printed())))


def chain(setting: Setting, whole: Whole, seed: str, folder: Path, most: int = MOST) -> tuple[list[Kill], list[str]]:
    """Kill a run in ways that ``seed`` draws until it ends. Return the kills, and what is wrong in the end."""
    draw, kills, end = random.Random(f"{setting.name}, {setting.how}, {seed}"), [], ""
    while len(kills) < most:
        way, save_steps = draw_way(setting, whole, draw), draw.choice(SAVE_STEPS)
        done = kill(setting, whole, way, folder, save_steps)
        if isinstance(done, str):
            end = done
            break
        kills.append(done)
    wrong = [end, to_its_end(started(setting, folder / "run", folder, {}))]
    wrong += [f"{each.orphans} processes lived on after {each.way}" for each in kills if each.orphans]
    wrong += [f"a traceback after {each.way}" for each in kills if each.traceback]
    wrong += [f"left in the temporary folder: {name}" for name in left_in(folder) - left_in(whole.output.parent)]
    return kills, [each for each in [*wrong, *differences(folder / "run", whole.output)] if each]


def left_in(folder: Path) -> set[str]:
    """Return the names in the folder of temporary files, without that for the logs of a launcher that was killed."""
    return {path.name for path in (folder / "temporary").iterdir() if not path.name.startswith("torchelastic_")}


# ---------------------------------------------------------------- what is compared


def differences(output: Path, whole: Path) -> list[str]:
    """How a run's folder differs from that of the undisturbed run, and from its own checksums."""
    names, expected = (set(files_of(each)) for each in (output, whole))
    wrong = [f"left: {name}" for name in sorted(names - expected)]
    wrong += [f"missing: {name}" for name in sorted(expected - names)]
    both = sorted(name for name in names & expected if Path(name).name not in (*LOGS, MANIFEST))
    roots = (output, whole)
    wrong += [f"other content: {name}" for name in both if content(name, output, roots) != content(name, whole, roots)]
    return wrong + [f"not as its checksum says: {path}" for path in damaged(output)]


def files_of(output: Path) -> Iterator[str]:
    """The names of all files, and of all folders without files."""
    for path in sorted(output.rglob("*")):
        if path.is_file() or not any(path.iterdir()):
            yield path.relative_to(output).as_posix()


def content(name: str, output: Path, roots: tuple[Path, Path]) -> Any:
    """A file's content, without times and the names of the runs' folders."""
    content = (output / name).read_bytes()
    for root in roots:
        content = content.replace(str(root).encode(), b"ROOT")
    if name.endswith((".json", ".jsonl")) and not name.startswith("final/"):
        return [without_times(json.loads(row)) for row in (content.splitlines() if name[-1] == "l" else [content])]
    return content


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if not TIMES.fullmatch(key)}
    return value


def damaged(output: Path) -> list[str]:
    """The artefacts whose files are not as ``MANIFEST`` says."""
    folders = [manifest.parent for manifest in output.rglob(MANIFEST)]
    noted = [(folder / name, files) for folder in folders for name, files in notes(folder).items()]
    return [str(path.relative_to(output)) for path, files in noted if path.exists() and checksums(path) != files]
