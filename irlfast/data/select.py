"""Keep the best demonstrations by a reward model: the data preparation of the IRFT paper (arXiv 2405.17888, section 6).

    irlfast select DATASET REWARD_MODEL OUTPUT.jsonl --keep 10000

The command reads the rows as training does and scores them in shards, which it keeps in ``OUTPUT.jsonl.scores/`` by
their content: after a kill, the same command resumes. It writes the ``--keep`` rows with the highest reward, unchanged
and in their order, each with its ``reward``. It prints reward, length and diversity of these rows' answers, and of as
many rows at random: a reward that favours one kind of answer shows there.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from irlfast.common.artefacts import checksums, intact, keep_jsonl
from irlfast.common.command import run_command, writing_to
from irlfast.common.files import InputError, find_path, read_jsonl, write_jsonl
from irlfast.common.messages import Progress
from irlfast.common.printable import printable
from irlfast.config import Config
from irlfast.data.diversity import describe_answers
from irlfast.data.read import read_demonstrations
from irlfast.data.rows import Demonstration
from irlfast.data.sources import sources_of
from irlfast.sampling.reward_external import load_external

SHARD = 1024  # rows


def select(dataset: str, split: str, reward: str, output: Path, keep: int, batch_size: int) -> None:
    config = Config(dataset_name=dataset, dataset_train_split=split, per_device_eval_batch_size=batch_size)
    rewards = score_rows(config, reward, output.with_name(output.name + ".scores"))
    if not rewards:
        raise InputError(f"dataset {dataset}, split {split!r}: found no rows, expected demonstrations")
    chosen = {*np.argsort(-np.array(rewards), kind="stable")[:keep].tolist()}
    drawn = {*np.random.default_rng(0).choice(len(rewards), len(chosen), replace=False).tolist()}
    kept: list[dict] = []
    answers: dict[int, str] = {}
    for i, demonstration in enumerate(read_demonstrations(config, sources_of(config), [])):  # a second pass
        if i in chosen:
            kept.append({**demonstration.row, "reward": rewards[i]})
        if demonstration.answer and (i in chosen or i in drawn):
            answers[i] = demonstration.answer.get("content", "")
    write_jsonl(output, kept)
    lowest = min(rewards[i] for i in chosen)
    print(f"{len(chosen):,} of {len(rewards):,} rows: {printable(output)} (reward from {lowest:.3f})")
    for name, numbers in (("selected", chosen), ("at random", drawn)):
        mean = np.mean([rewards[i] for i in numbers])
        print(f"{name}: reward {mean:.3f}, {describe_answers([answers[i] for i in numbers])}")


def score_rows(config: Config, reward: str, folder: Path) -> list[float]:
    """Return the rewards of all rows. The shards that are in ``folder`` already, and intact, are kept."""
    rewards: list[float] = []
    score = None
    rows, local = read_demonstrations(config, sources_of(config), []), find_path(reward)
    model = [reward, checksums(local) if local else None]
    with Progress("scoring", None, "row", seconds=10.0) as progress:
        while shard := list(itertools.islice(rows, SHARD)):
            path = folder / f"{content_of(model, shard)}.jsonl"
            if not intact(path):
                score = score or load_external(reward, config, datetime.datetime.now())
                keep_jsonl(path, [{"reward": value} for value in score(shard).tolist()])
            rewards += [row["reward"] for _, row in read_jsonl(path)]
            progress.advance(len(shard))
            progress.show()
    return rewards


def content_of(model: list, shard: list[Demonstration]) -> str:
    """Return a name for the scores of a shard: other rows, or another reward model, have another name."""
    content = [model, [(row.prompt, row.answer, row.tools) for row in shard]]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:32]


def command() -> None:
    parser = argparse.ArgumentParser(
        prog="irlfast select", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="jsonl, json, parquet or csv file, saved dataset, or hub name")
    parser.add_argument("reward", help="AutoModelForSequenceClassification with one label: a folder or hub name")
    parser.add_argument("output", type=Path, help="jsonl file to write")
    parser.add_argument("--split", default="train", help="the dataset's split [train]")
    parser.add_argument("--keep", type=int, default=10_000, help="rows to keep [10000]")
    parser.add_argument("--batch_size", type=int, default=16, help="rows that are scored together [16]")
    options = parser.parse_args()
    with writing_to(str(options.output)):
        select(options.dataset, options.split, options.reward, options.output, options.keep, options.batch_size)


def main() -> int:
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
