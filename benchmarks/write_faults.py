"""Spoil the calls by which a run writes, one per run: the run must end in a sentence, and resume to the same bytes.

    python -m benchmarks.write_faults                    # every call in every way: hours
    python -m benchmarks.write_faults --draws 8          # eight drawn calls per way
    python -m benchmarks.write_faults --each-kind        # one drawn call per way, kind of call and kind of file
    python -m benchmarks.write_faults --each-kind --minutes 60 --rows FILE     # begin, or go on, for an hour
    python -m benchmarks.write_faults --each-kind --share 0/4 --rows FILE-0    # a quarter of the faults, on one core
    cat FILE-* > FILE; python -m benchmarks.write_faults --minutes 0 --rows FILE    # the result of all quarters

A library that is loaded before libc numbers the calls that change files (tests/helpers/faulty_disk.c). The ways are:
a disk that is full from this call on, one error of the disk, a kill after half of the bytes, and half of the bytes with
success reported. The script writes ``benchmarks/results/DATE-write-faults.json``.
"""

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.conftest import write_result
from irlfast.common.files import read_jsonl, remove
from irlfast.common.logs import append_row
from tests.helpers.runs import ROOT, command, ended

WAYS = ("full", "eio", "torn", "lying")
WRITES = ("write", "pwrite", "writev", "sendfile", "copy_file_range")  # the calls that a lying disk can spoil
SMALLEST = {"stages": 1, "sft_steps": 2, "inner_steps": 4, "max_train_samples": 48, "max_eval_samples": 8}
SMALLEST["async_save"] = False  # a thread's calls would have other numbers in each start
ONE_LAYER = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
CHANGES = ("starts.jsonl", "report.html", ".lock", "trace.json")  # files that tell when and where a run was started
TIMED = ("seconds", "sample_seconds", "score_seconds", "begun", "made_from")  # keys of the JSON files
GOOD = ("finished", "sentence", "killed")


def build(folder: Path) -> Path:
    """Compile the faulty disk, and return the library."""
    library = folder / "faulty_disk.so"
    source = ROOT / "tests/helpers/faulty_disk.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


class Disk:
    """A folder on a faulty disk: ``run`` in it is the run's, and ``tmp`` has the temporary files of all libraries."""

    def __init__(self, folder: Path):
        self.folder, self.output, self.temporary = folder, folder / "run", folder / "tmp"
        model = folder.with_name("config.json")
        model.write_text(json.dumps(ONE_LAYER))
        self.keys = SMALLEST | {"config_name": str(model)}

    def empty(self) -> None:
        for each in (self.output, self.temporary):
            remove(each)
        self.temporary.mkdir(parents=True)

    def start(self, way: str = "", call: int = 0, log: str = "") -> tuple[int, str]:
        """Start the run's command, and return its exit code and what it printed to stderr."""
        settings = {"FAULTY_WAY": way, "FAULTY_CALL": str(call), "FAULTY_LOG": log, "TMPDIR": str(self.temporary)}
        os.environ |= settings | {"FAULTY_FOLDER": str(self.folder)}
        try:
            code, _, err = ended(command(self.output, **self.keys))
        finally:
            os.environ |= {"FAULTY_FOLDER": ""}
        return code, err

    def files(self) -> dict[str, bytes]:
        """Return all files of the run that must be the same whatever has happened, and the names of temporary ones."""
        paths = [path for path in sorted(self.output.rglob("*")) if path.is_file() and path.name not in CHANGES]
        left = {f"tmp/{path.name}": b"" for path in self.temporary.iterdir()}
        return {path.relative_to(self.output).as_posix(): content(path) for path in paths} | left


def content(path: Path) -> bytes:
    """Return the bytes of a file, without what depends on the time."""
    if path.name in ("MANIFEST", "metrics.jsonl"):
        return b""
    if path.name in ("eval.json", "pairs.json", "data.json", "inputs.json"):
        values = json.loads(path.read_text())
        return json.dumps({name: value for name, value in values.items() if name not in TIMED}).encode()
    return path.read_bytes()


def outcome(disk: Disk, way: str, call: int, whole: dict[str, bytes]) -> tuple[str, str]:
    """Do one fault, start the run again, and return how it ended, and what was wrong."""
    disk.empty()
    code, err = disk.start(way, call)
    end = {0: "finished", 2: "sentence", -9: "killed"}.get(code, f"exit code {code}")
    last = (err.splitlines() or [""])[-1]
    if "Traceback" in err or (code == 2 and not last.startswith("irlfast: ")):
        end = "traceback"
    if end not in GOOD:
        return end, err[-1500:]
    code, err = disk.start()
    if code or "Traceback" in err:
        return f"{end}, then exit code {code}", err[-1500:]
    files = disk.files()
    quarantined = [name for name in files if name.startswith("quarantine/")] if way == "lying" else []
    temporary = [name for name in files if name.startswith("tmp/")] if way == "torn" else []  # other libraries' own
    left = sorted(files.keys() - whole.keys() - {*quarantined, *temporary})
    if left:
        return f"{end}, then files left", ", ".join(left)
    other = sorted(name for name in whole if files.get(name) != whole[name])
    if other:
        return f"{end}, then other files", ", ".join(other)
    return end, last if end == "sentence" else ", ".join(quarantined)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, help="calls per way, instead of every call")
    parser.add_argument("--each-kind", action="store_true", help="one drawn call per way, kind of call and of file")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    parser.add_argument("--rows", type=Path, help="a file that gets a row per fault, and is continued")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no fault after so many minutes [no end]")
    parser.add_argument("--share", default="0/1", help="2/8: the third of eight shares of the faults [0/1]")
    parser.add_argument("--quick", action="store_true", help="one call per way, to check that everything runs")
    options = parser.parse_args()
    if options.quick:
        options.draws = 1
    if "FAULTY_FOLDER" in os.environ:
        do_faults(options)
        return 0
    with tempfile.TemporaryDirectory() as place:
        rows_path = options.rows or Path(place) / "rows.jsonl"
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"LD_PRELOAD": str(build(Path(place))), "FAULTY_FOLDER": "", "PYTHONPATH": paths}
        again = [sys.executable, "-m", "benchmarks.write_faults", *sys.argv[1:], "--rows", str(rows_path)]
        subprocess.run(again, env=environment, check=True)
        rows = [row for _, row in read_jsonl(rows_path)]
    ends = Counter(f"{row['way']}: {row['end']}" for row in rows)
    for end, count in sorted(ends.items()):
        print(f"{end:40} {count:5}")
    bad = [row for row in rows if row["end"] not in GOOD]
    kinds = len({which_kind(row) for row in rows})
    result = {"draws": options.draws, "faults": len(rows), "kinds": kinds, "ends": ends, "bad": bad}
    print(write_result("write-faults", result))
    return int(bool(bad))


def do_faults(options: argparse.Namespace) -> None:
    """Do the faults that are asked for, but those that have a row already, and append a row for each."""
    end_of_faults = time.monotonic() + 60 * options.minutes
    rows = [row for _, row in read_jsonl(options.rows)] if options.rows.exists() else []
    key = which_kind if options.each_kind else which_call
    done = {key(row) for row in rows}
    with tempfile.TemporaryDirectory() as place:
        disk, log = Disk(Path(place).resolve() / "disk"), Path(place) / "calls"
        disk.empty()
        disk.start()  # the first run also makes the caches of libraries, which later runs find
        disk.empty()
        code, err = disk.start(log=str(log))
        assert code == 0, err
        calls, whole = own_calls(log, disk.output), disk.files()
        print(f"{len(calls)} calls of the run change files", flush=True)
        share, shares = map(int, options.share.split("/"))
        for way, number in faults(calls, options):
            name, path = calls[number]
            at = {"way": way, "call": number, "name": name, "path": path.removeprefix(str(disk.folder))}
            own = zlib.crc32(repr(key(at)).encode()) % shares == share
            if own and key(at) not in done and time.monotonic() < end_of_faults:
                end, why = outcome(disk, way, number, whole)
                append_row(options.rows, at | {"end": end, "why": why})


def which_call(row: dict[str, Any]) -> tuple:
    return row["way"], row["call"]


def which_kind(row: dict[str, Any]) -> tuple:
    """Return the way and the kind of a row's fault: another start of the run may number its calls otherwise."""
    return row["way"], kind_of(row["name"], row["path"])


def own_calls(log: Path, output: Path) -> dict[int, tuple[str, str]]:
    """Return the name and the path of each call of the run's process, by its number."""
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    own = next(process for process, *_, path in lines if path.startswith(str(output)))
    return {int(number): (name, path) for process, number, name, _, path in lines if process == own}


def faults(calls: dict[int, tuple[str, str]], options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return each way, and the number of a call to spoil in it: of all calls, of drawn ones, or of one per kind."""
    draw = random.Random(options.seed)
    chosen = []
    for way in WAYS:
        numbers = [number for number, (name, _) in calls.items() if way != "lying" or name in WRITES]
        if options.each_kind:
            kinds: dict[tuple[str, str], int] = {}
            for number in draw.sample(numbers, len(numbers)):
                kinds.setdefault(kind_of(*calls[number]), number)
            numbers = [*kinds.values()]
        chosen += [
            (way, number) for number in sorted(draw.sample(numbers, options.draws) if options.draws else numbers)
        ]
    return draw.sample(chosen, len(chosen)) if options.each_kind else chosen


def kind_of(name: str, path: str) -> tuple[str, str]:
    """Return the call's name, and the file's without numbers and without the random part of a temporary name."""
    return name, re.sub(r"tmp\w+|\d+", "", Path(path).name)


if __name__ == "__main__":
    sys.exit(main())
