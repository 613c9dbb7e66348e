"""Data, steps and prompts by the hundred thousand: CPU time and memory of the real code, on rows that it makes itself.

    python -m benchmarks.load rows       # prepare 100,000 and 1,000,000 short rows three times, then resume
    python -m benchmarks.load steps      # 10,000 optimiser steps of a tiny model
    python -m benchmarks.load prompts    # stages of IRFT and RFT of 100,000 prompts, a tiny model, answers of 4 tokens

Each part runs in a process of its own. Seconds are CPU seconds of that process and its threads, as the machine may be
shared. The peak is of resident memory, pages of mapped files included, which the system may drop; ``anonymous`` is what
is left at the end without them. It writes ``benchmarks/results/DATE-load-PART.json``.
"""

import argparse
import itertools
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conftest import write_result
from benchmarks.memory import memory_of_process
from tests.helpers.runs import PRELOADED

MIB = 2**20
TRIES = 3  # of the preparation of rows; the median counts, as a shared machine is slower at times
WORDS = "one two three four five six seven eight nine ten north south east west red green blue black white grey".split()
CHAT = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048, "vocab_size": 512}
STAGE = {"train_tokenizer": 300, "stages": 1, "sft_steps": 0, "inner_steps": 20, "max_new_tokens": 4}
STAGE |= {"per_device_eval_batch_size": 256, "sft_epochs": None, "logging_steps": 10}
METHODS: dict[str, dict[str, Any]] = {"irft": {}, "rft": {"num_generations": 2, "reward_steps": 20}}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*PRELOADED])


def write_rows(path: Path, count: int) -> None:
    """Write rows of a question of six words and a number, and an answer of two words."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            row = {
                "prompt": " ".join(draw.choices(WORDS, k=6)) + f" {number}",
                "completion": " ".join(draw.choices(WORDS, k=2)),
            }
            file.write(json.dumps(row) + "\n")


def measured(part: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run ``part`` in a process of its own. Return its figures, its CPU seconds and its memory in MiB."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=in_child, args=(sender, part, arguments))
    process.start()
    sender.close()
    figures = receiver.recv()
    process.join()
    return figures


def in_child(sender: Any, part: Callable[..., dict[str, Any]], arguments: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    before, begun = memory_of_process("VmRSS") / MIB, time.process_time()
    figures = part(*arguments)
    own = resource.getrusage(resource.RUSAGE_SELF)
    figures |= {"cpu_seconds": time.process_time() - begun, "system_seconds": own.ru_stime}
    peak, anonymous = (memory_of_process(field) / MIB for field in ("VmHWM", "RssAnon"))
    sender.send(figures | {"before": before, "peak": peak, "anonymous": anonymous})


def keys_of(folder: Path, **keys: Any) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(TINY))
    return {"config_name": str(folder / "config.json"), "output_dir": str(folder / "run"), "report_to": []} | keys


# ---------------------------------------------------------------- rows


def write_tokenizer(folder: Path, rows: Path) -> None:
    from irlfast.models.tokenizers import train_tokenizer

    with rows.open() as lines:
        train_tokenizer(
            (" ".join(json.loads(line).values()) for line, _ in zip(lines, range(5000), strict=False)), 2000
        ).save_pretrained(folder)


def prepare_rows(keys: dict[str, Any]) -> dict[str, Any]:
    """Prepare a run's data, or find it prepared."""
    from irlfast.config import make_config
    from irlfast.startup.prepare import write_data

    config = make_config(keys)
    _, lines = write_data(config, Path(config.output_dir), prompts_only=False)
    return {"used_again": "used again" in lines[-1]}


def rows(quick: bool, up_to: int) -> dict[str, Any]:
    results = []
    for count, template in ((100_000, None), (100_000, CHAT), (1_000_000, None)):
        if count > up_to:
            continue
        count = count // 500 if quick else count
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "rows.jsonl", count)
            write_tokenizer(folder / "tokenizer", folder / "rows.jsonl")
            keys = keys_of(
                folder, dataset_name=str(folder / "rows.jsonl"), tokenizer_name_or_path=str(folder / "tokenizer")
            )
            keys |= {"chat_template": template} if template else {}
            tries = [measured(prepare_rows, keys | {"output_dir": str(folder / f"run-{i}")}) for i in range(TRIES)]
            prepared = sorted(tries, key=lambda each: each["cpu_seconds"])[TRIES // 2]
            resumed = measured(prepare_rows, keys | {"output_dir": str(folder / "run-0")})
            assert resumed["used_again"] and not any(each["used_again"] for each in tries)
            facts = json.loads((folder / "run-0" / "data.json").read_text())
            tokens = facts["train"]["prompt_tokens"] + facts["train"]["answer_tokens"]
            size = (folder / "rows.jsonl").stat().st_size
        result = {"rows": count, "template": "ChatML by Jinja" if template else "prompt_template"}
        result |= {
            "cpu_seconds_of_each_try": [each["cpu_seconds"] for each in tries],
            "bytes_per_row": size / count,
            "tokens_per_row": tokens / count,
            "prepared": prepared,
            "resumed": resumed,
        }
        result["rows_per_cpu_second"] = count / prepared["cpu_seconds"]
        results.append(result)
        print(
            f"{count:,} rows ({result['template']}): {result['rows_per_cpu_second']:,.0f} per CPU second, peak "
            f"{prepared['peak']:,.0f} MiB; resumed in {resumed['cpu_seconds']:.2f} s, peak {resumed['peak']:,.0f} MiB",
            flush=True,
        )
    return {"cases": results}


# ---------------------------------------------------------------- steps and prompts


def train_run(keys: dict[str, Any]) -> dict[str, Any]:
    from irlfast.config import make_config
    from irlfast.train import train

    train(make_config(keys))
    return {}


def slope(rows: list[dict[str, Any]]) -> float:
    """Return by how many MiB the memory of the logged steps grows per 1,000 steps, after the first fifth of them."""
    later = [row for row in rows if row["step"] > rows[-1]["step"] / 5]
    return 1000 * float(np.polyfit([row["step"] for row in later], [1024 * row["memory_gib"] for row in later], 1)[0])


def steps(quick: bool, up_to: int) -> dict[str, Any]:
    count = 40 if quick else min(10_000, up_to)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", 2000)
        keys = keys_of(
            folder, dataset_name=str(folder / "rows.jsonl"), train_tokenizer=300, method="sft", sft_steps=count
        )
        keys |= {
            "global_batch_size": 4,
            "logging_steps": count // 40,
            "save_steps": count // (2 if quick else 10),
            "max_eval_samples": 8,
        }
        figures = measured(train_run, keys)
        logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    memory = [[row["step"], 1024 * row["memory_gib"]] for row in logged]
    result = {"steps": count, "mib_per_1000_steps": slope(logged), "memory_mib": memory} | figures
    print(f"{count:,} steps: {result['mib_per_1000_steps']:+.2f} MiB per 1,000 steps, peak {figures['peak']:,.0f} MiB")
    return result


def prompts(quick: bool, up_to: int) -> dict[str, Any]:
    results = []
    for method, count in itertools.product(METHODS, (100,) if quick else (10_000, 100_000)):
        if count > up_to:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "rows.jsonl", count)
            keys = STAGE | METHODS[method] | {"method": method, "eval_fraction": 8 / count}
            figures = measured(train_run, keys_of(folder, dataset_name=str(folder / "rows.jsonl"), **keys))
        results.append({"method": method, "prompts": count, **figures})
        print(
            f"{method}, {count:,} prompts: {figures['cpu_seconds']:,.0f} CPU seconds, peak {figures['peak']:,.0f} MiB, "
            f"{figures['anonymous']:,.0f} MiB at the end without mapped files",
            flush=True,
        )
    return {"cases": results}


PARTS = {"rows": rows, "steps": steps, "prompts": prompts}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("part", choices=PARTS)
    arguments.add_argument("--quick", action="store_true", help="few rows and steps, to check that everything runs")
    arguments.add_argument("--up-to", type=int, default=10**9, help="leave out cases of more rows, steps or prompts")
    options = arguments.parse_args()
    print(write_result(f"load-{options.part}", PARTS[options.part](options.quick, options.up_to)))


if __name__ == "__main__":
    main()
