"""Kill runs again and again, in every way, and check that each ends as an undisturbed run.

    python -m benchmarks.storm --kills 200 --seed 0

Each setting is run once undisturbed. Then come chains: a run is started and killed, in a drawn way at a drawn moment,
until it ends or was killed eight times, and is then left to end. Who is killed: one process, all, torchrun's agent or
the sampler's child. The moment: a time, as soon as a file or a folder has its name, or at a named point of the code.
In the end every file must be as in the undisturbed run, apart from times, with nothing more and nothing less. After
each kill all processes must have ended within 30 s.

The processes are forks of one that has imported what runs do; torchrun's agent is torch's own. In the setting
"torchrun" all start in earnest. In the place of vLLM is a module that is quick to start, in the real child process.
The draws follow from the seed: ``--only "irft, 1 process" --chain 3 --seed 0`` repeats a chain.
The folders of chains that end otherwise stay. The script writes ``benchmarks/results/DATE-storm.json``.
"""

import argparse
import math
import multiprocessing
import re
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.conftest import write_result
from benchmarks.runs import parser
from irlfast.common.logs import append_row
from tests.helpers.killable import warm
from tests.helpers.storm import TINY, Kill, Setting, Whole, chain, stand_in, undisturbed

REWARD = {"align_rounds": 2, "num_generations": 2, "reward_steps": 4, "reward_learning_rate": 1e-3}
METHODS = {
    "irft": {},
    "spin": {"method": "spin"},
    "rft": {"method": "rft", "stages": 1, **REWARD},
    "afd": {"method": "afd", **REWARD, "align_rounds": 1},
    "irft with LoRA": {"use_peft": True},
    "irft with a sampler": {"use_vllm": True},
    "rft with a sampler and LoRA": {"method": "rft", "stages": 1, **REWARD, "use_vllm": True, "use_peft": True},
}
HOW = ("1 process", "2 processes")
SHARES = {"1 process": 3, "2 processes": 2, "torchrun": 1}  # of the kills and of the time

Row = dict[str, Any]


def settings(folder: Path) -> list[Setting]:
    """Return what is run, and how. The interpreter of samplers is written to ``folder``."""
    python = stand_in(folder)
    pairs = [*((name, how) for how in HOW for name in METHODS), ("irft", "torchrun")]
    return [setting(name, how, python) for name, how in pairs]


def setting(name: str, how: str, python: str) -> Setting:
    keys = {**TINY, **METHODS[name], "global_batch_size": 4}
    return Setting(name, how, keys | ({"vllm_python": python} if keys.get("use_vllm") else {}))


def label(setting: Setting) -> str:
    return f"{setting.name}, {setting.how}"


def storm(setting: Setting, kills: int, options: argparse.Namespace, folder: Path, seconds: float) -> list[Row]:
    """Return the chains of a setting, until it was killed so often, or until the seconds are over."""
    warm()
    end = time.monotonic() + seconds
    whole = undisturbed(setting, cleared(folder / "undisturbed"))
    if options.chain is not None:
        return [one_chain(setting, whole, options.chain, options.seed, folder)]
    rows: list[Row] = []
    while sum(len(row["kills"]) for row in rows) < kills and time.monotonic() < end:
        rows.append(one_chain(setting, whole, len(rows), options.seed, folder))
    return rows


def cleared(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def one_chain(setting: Setting, whole: Whole, number: int, seed: int, folder: Path) -> Row:
    """Return a row of the result, and print it. The chain's folder stays if something is wrong."""
    place = cleared(folder / f"chain-{number}")
    done, wrong = chain(setting, whole, f"{seed}, {number}", place)
    print(
        f"{label(setting)}, chain {number}: {len(done)} kills, {'; '.join(wrong)[:2000] or 'as undisturbed'}",
        flush=True,
    )
    if wrong:
        print(f'  python -m benchmarks.storm --seed {seed} --only "{label(setting)}" --chain {number}', flush=True)
        for kill in done:
            print(f"  {kill.way}: code {kill.code}, {kill.seconds:.1f} s", flush=True)
    else:
        cleared(place)
    row = {"setting": label(setting), "chain": number, "wrong": wrong, "kills": [shown(kill) for kill in done]}
    append_row(folder.parent / "chains.jsonl", row)  # a storm that is stopped leaves what it has done
    return row


def shown(kill: Kill) -> Row:
    way = {"signal": kill.way.signal, "target": kill.way.target, "moment": kill.way.moment, **kill.way.at}
    return way | {"code": kill.code, "seconds": round(kill.seconds, 2), "orphans": kill.orphans}


def table(rows: list[Row]) -> str:
    """Return the number of kills per setting and kind, and what was wrong, in Markdown."""
    kinds = sorted({(kill["target"], kill["signal"]) for row in rows for kill in row["kills"]})
    head = ["run", *(f"{signal} to {target}" for target, signal in kinds), "kills", "ends", "as undisturbed", "orphans"]
    lines = [head, ["---"] * len(head)]
    for name in [*dict.fromkeys(row["setting"] for row in rows), "all"]:
        own = [row for row in rows if name in (row["setting"], "all")]
        kills = [kill for row in own for kill in row["kills"]]
        counts = Counter((kill["target"], kill["signal"]) for kill in kills)
        same = sum(not row["wrong"] for row in own)
        numbers = [*(counts[kind] for kind in kinds), len(kills), len(own), same, sum(k["orphans"] for k in kills)]
        lines.append([name, *map(str, numbers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    arguments = parser(__doc__, "storm")
    arguments.add_argument("--kills", type=int, default=200, help="kills of all settings together, at least")
    arguments.add_argument("--seed", type=int, default=0, help="decides who is killed when")
    arguments.add_argument("--minutes", type=float, default=240, help="no chain begins after these, about")
    arguments.add_argument("--jobs", type=int, default=1, help="settings at a time")
    arguments.add_argument("--only", default="", help="the settings whose names contain this")
    arguments.add_argument("--chain", type=int, help="this chain of each setting alone")
    options = arguments.parse_args()
    folder, seconds = options.output.resolve(), 60 * options.minutes * options.jobs
    chosen = [each for each in settings(folder) if options.only in label(each)]
    if options.quick:
        chosen, options.kills = chosen[:1], 2
    shares = [SHARES[each.how] / sum(SHARES[other.how] for other in chosen) for each in chosen]
    given = [
        (each, math.ceil(options.kills * share), options, folder / re.sub(r"\W+", "-", label(each)), seconds * share)
        for each, share in zip(chosen, shares, strict=True)
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [row for own in pool.map(storm, *zip(*given, strict=True)) for row in own]
    right = sum(not row["wrong"] for row in rows)
    print(f"{table(rows)}\n\n{right} of {len(rows)} chains end as the undisturbed run")
    if options.chain is None:
        print(write_result("storm", {"seed": options.seed, "chains": rows}))
    if right < len(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
