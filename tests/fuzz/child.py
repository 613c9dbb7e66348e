"""One process of the fuzz: give inputs to a target until the time is up, and note in a file what became of them.

    python -m tests.fuzz.child TARGET atheris|hypothesis SECONDS FOLDER SEED

FOLDER gets ``state.json``, which is written anew every second, ``last``, the input that is being read, and ``stack``,
where a hang or a crash leaves the stack. An input that takes longer than ``LIMIT`` seconds of CPU time, or than
``LONGEST`` of the clock, ends the process.
"""

import faulthandler
import gc
import json
import mmap
import os
import pickle
import resource
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

LIMIT = 10  # seconds of CPU time per input, which a busy machine does not lengthen
LONGEST = 120  # seconds of the clock, for an input that waits for something
ROOM = 3 * 2**30  # bytes of address space that inputs may take
LARGEST = 2**16  # bytes of an input that ``last`` can hold


class Notes:
    """The counts and faults of a process, and the files that outlive it."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.end = time.monotonic() + seconds
        self.inputs = 0
        self.slowest = 0.0
        self.slowest_input = ""
        self.faults: dict[str, dict[str, Any]] = {}
        self.memory_after_100 = 0
        self.written = 0.0
        self.stack = (folder / "stack").open("w")
        file = (folder / "last").open("w+b")
        file.truncate(LARGEST + 4)
        self.last = mmap.mmap(file.fileno(), LARGEST + 4)
        faulthandler.enable(self.stack)
        faulthandler.register(signal.SIGPROF, self.stack, chain=True)  # and then end the process

    def begin(self, content: bytes) -> None:
        """Note the input that is read from now on."""
        content = content[:LARGEST]
        self.last[: 4 + len(content)] = struct.pack("<I", len(content)) + content
        faulthandler.dump_traceback_later(LONGEST, exit=True, file=self.stack)
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        self.begun = time.process_time()

    def finish(self, drawn: Any) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        seconds = time.process_time() - self.begun
        self.inputs += 1
        if seconds > self.slowest and self.inputs > 5:  # the first ones import modules
            self.slowest, self.slowest_input = seconds, shortened(drawn)
        if self.inputs == 100:
            self.memory_after_100 = peak_memory()
        if time.monotonic() > self.written + 1:
            self.write()

    def fault(self, error: BaseException, drawn: Any) -> None:
        """Note a fault; one with the same error at the same line is the same fault."""
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/irlfast/" in frame.filename] or frames
        name = f"{type(error).__name__} at {'/'.join(Path(ours[-1].filename).parts[-3:])}:{ours[-1].lineno}"
        known = self.faults.setdefault(name, {"count": 0, "input": "x" * 10**6})
        known["count"] += 1
        if len(text := repr(drawn)) < len(known["input"]):
            place = f"{frames[-1].filename}:{frames[-1].lineno}"
            known |= {"input": text, "message": shortened(error), "raised_at": place}

    def write(self) -> None:
        from tests.fuzz.guards import OUTCOMES

        self.written = time.monotonic()
        state = {
            "inputs": self.inputs,
            "seconds": self.seconds - (self.end - time.monotonic()),
            **OUTCOMES,
            "slowest_seconds": round(self.slowest, 3),
            "slowest_input": self.slowest_input,
            "memory_growth_mib": (peak_memory() - self.memory_after_100) // 2**20 if self.memory_after_100 else 0,
            "faults": self.faults,
        }
        temporary = self.folder / "state.tmp"
        temporary.write_text(json.dumps(state))
        temporary.replace(self.folder / "state.json")


def shortened(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 600 else f"{text[:600]} …"


def peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def limit_memory() -> None:
    """Let the address space grow by ``ROOM``; an input that asks for more meets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def fuzz(target: str, engine: str, notes: Notes, seed: int) -> None:
    """Give inputs to a target until the time is up."""
    from tests.fuzz.targets import CORPUS, drawn_inputs, module_of, one_input

    module = module_of(target)
    one_input(target)(b"\0" * 4096)  # imports what the target imports
    limit_memory()
    gc.freeze()  # statsmodels collects garbage at every call, which would look at all imported modules
    notes.end = time.monotonic() + notes.seconds  # the imports do not count
    if engine == "hypothesis":
        drawn_inputs(lambda drawn: watched(module.check, drawn, notes, pickle.dumps(drawn)), module.INPUTS, 10**9)
    else:
        import atheris

        check, module.check = module.check, lambda drawn: watched(check, drawn, notes)
        test = one_input(target)

        def take(data: bytes) -> None:
            notes.begin(data)
            test(data)
            if time.monotonic() > notes.end:
                end(notes)

        own = notes.folder.parent / "corpus"
        own.mkdir(exist_ok=True)
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        options = ["-max_len=4096", f"-seed={seed}", "-timeout=100000", "-rss_limit_mb=0", "-reload=0", "-verbosity=1"]
        options.append(f"-artifact_prefix={notes.folder}/")  # for inputs that libFuzzer finds slow by the clock
        atheris.Setup([sys.argv[0], *options, str(own), str(CORPUS / target)], take)
        atheris.Fuzz()


def watched(check: Any, drawn: Any, notes: Notes, content: bytes | None = None) -> None:
    """Check an input, and note a fault in place of raising it."""
    from tests.fuzz.guards import guarded

    if content is not None:
        notes.begin(content)
    try:
        guarded(check)(drawn)
    except Exception as error:
        notes.fault(error, drawn)
    notes.finish(drawn)
    if time.monotonic() > notes.end:
        end(notes)


def end(notes: Notes) -> None:
    notes.write()
    os._exit(0)


def main() -> None:
    target, engine, seconds, folder, seed = sys.argv[1:]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    notes = Notes(Path(folder), float(seconds))
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["irlfast", "yaml", "jinja2"]):
            fuzz(target, engine, notes, int(seed))
    else:
        fuzz(target, engine, notes, int(seed))


if __name__ == "__main__":
    main()
