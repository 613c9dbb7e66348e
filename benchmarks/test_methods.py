"""The parts of benchmarks.methods on problems with known answers: budgets, tasks and schedules."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import conftest
from benchmarks.conftest import ROOT
from benchmarks.methods import arms_of, summary
from benchmarks.protocol import page
from benchmarks.protocol.arms import ARMS, CONTINUED, START
from benchmarks.protocol.budget import counted
from benchmarks.protocol.generate import column_addition, is_right_sum, modes_of, sums, two_modes, with_wrong_answers
from benchmarks.protocol.jobs import Job, keys_of, schedule
from benchmarks.protocol.tasks import SIZES, TASKS, write_files
from benchmarks.small import write_data
from irlfast.common.files import read_jsonl, write_json
from irlfast.config.read import make_config


def test_column_addition_is_right_and_ends_with_the_sum():
    assert column_addition(58, 67) == "8+7=15 5+6+1=12 125"
    for row in sums(500, 3, random.Random(0)):
        a, b = map(int, row["prompt"].split("+"))
        *steps, result = row["completion"].split(" ")
        assert int(result) == a + b and is_right_sum(row["prompt"], row["completion"])
        assert all(eval(step.split("=")[0]) == int(step.split("=")[1]) for step in steps) and len(steps) == 3
    assert not is_right_sum("58+67", "8+7=15 5+6+1=12 126") and not is_right_sum("58+67", "")


def test_both_modes_are_written_about_equally_often():
    rows = two_modes(2000, 5, random.Random(0))
    assert len({row["prompt"] for row in rows}) == 2000
    written = Counter(modes_of(row["prompt"]).index(row["completion"]) for row in rows)
    assert abs(written[0] - written[1]) < 4 * 2000**0.5 and sum(written.values()) == 2000
    assert modes_of("dbca") == ("abcd", "acbd")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_share_of_wrong_answers_is_exact_and_they_are_answers_to_other_prompts(share):
    rows = [{"prompt": str(i), "completion": str(i // 2)} for i in range(400)]
    noisy = with_wrong_answers(rows, share, random.Random(0))
    assert sum(one != other for one, other in zip(rows, noisy, strict=True)) == round(share * 400)
    assert sorted(row["completion"] for row in noisy) == sorted(row["completion"] for row in rows)


def test_a_schedule_has_the_planned_prompts_and_takes_new_ones_while_there_are_some():
    assert schedule({"method": "sft"}, 2048, 500, 64) == {"sft_steps": 32, "max_train_samples": 500}
    split = schedule({"method": "irft"}, 512, 600, 32)
    assert split == {"stages": 2, "inner_steps": 8, "prompts_per_stage": "split", "max_train_samples": 512}
    again = schedule({"method": "irft"}, 2048, 500, 32)
    assert again["prompts_per_stage"] == "all" and again["stages"] * again["inner_steps"] * 32 == 2048 + 32
    assert schedule({"method": "rft"}, 128, 500, 16)["reward_steps"] == 4


@pytest.mark.parametrize("task", TASKS)
def test_the_keys_of_every_arm_of_a_task_are_a_configuration(task, tmp_path):
    write_data(tmp_path)
    size = SIZES["quick"]
    write_files(task, size, 0, tmp_path, tmp_path / "runs")
    for arm in (START, *arms_of(task)):
        if not ARMS[arm].of:
            job = Job(task, size, 0, tmp_path / "runs", tmp_path, arm, 1e-4, 200)
            job.folder.mkdir(parents=True)
            job.start.mkdir(parents=True, exist_ok=True)
            config = make_config(keys_of(job))
            assert config.method == ARMS[arm].keys.get("method", "sft")
            assert config.output_dir == str(job.folder / "run")


def test_the_page_shows_the_methods_that_beat_sft_continued_and_those_that_do_not(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    shift = {START: -0.2, CONTINUED: 0.0, "DFT": 0.1, "SPIN": 0.0, "GAD": -0.1}

    def drawn(arm: str, seed: int) -> dict:
        noise = np.random.default_rng(seed).normal(size=50)  # common to the arms of a seed
        figures = {"phonemes": (noise + shift[arm] + 0.01 * generator.normal(size=50)).tolist()}
        figures |= dict.fromkeys(("exact", "likelihood"), figures["phonemes"])
        own = {"figures": figures, "counts": {"trained": 1000, "sampled": 500}, "seconds": 1.0, "test_counts": {}}
        return own | {"rate": 1e-3, "prompts": 64}

    results = {(arm, seed): drawn(arm, seed) for arm in shift for seed in range(5)}
    results |= {("SPACE", seed): {"failed": "the loss is not finite", "rate": 1e-3} for seed in range(5)}
    job = Job("few", SIZES["hour"], 0, tmp_path, None)
    result = summary(job, {arm: ARMS[arm] for arm in (CONTINUED, "DFT", "SPIN", "GAD", "SPACE")}, results)
    monkeypatch.setattr(conftest, "RESULTS_FOLDER", tmp_path)
    (tmp_path / "2026-01-02-methods-few.json").write_text(
        json.dumps(result | {"date": "2026-01-02T00:00", "device": "a machine"})
    )
    document = tmp_path / "page.md"
    document.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter")
    page.write_section(document)
    text = document.read_text()
    assert text.startswith("before") and text.endswith("after") and "old" not in text
    assert (
        "| DFT | `few` | – | – |" in text and "| GAD | – | `few` | – |" in text and "| SPIN | – | – | `few` |" in text
    )
    assert "| **DFT** | 0." in text and "+0.10" in text and "failed: the loss is not finite" in text
    assert text.count("| 1.00 | 1.0 |") == 5
    assert (tmp_path / "2026-01-02-methods.svg").exists()


def test_the_counted_tokens_are_those_that_the_files_of_a_run_tell(tmp_path):
    from tests.helpers.runs import SERVER

    child = SERVER.Process(target=count_both_ways, args=(tmp_path,))
    child.start()
    child.join()
    counts, told = (json.loads((tmp_path / name).read_text()) for name in ("counted.json", "told.json"))
    assert counts["sampled"] == told["sampled"] > 500
    # Before a model is sampled, scored or trained, it is tried on a few tokens.
    assert all(0 <= counts[kind] - told[kind] < 200 and told[kind] > 1000 for kind in ("trained", "scored"))


def count_both_ways(folder: Path) -> None:
    """Do a stage of IRFT on the shipped demonstrations; write the counted tokens, and those that its files tell."""
    import torch

    from irlfast.methods.irft import irft_stage
    from irlfast.sampling.generation import read_samples
    from irlfast.startup.prepare import prepare
    from tests.helpers.runs import SMALL

    torch.set_num_threads(1)
    own = {"config_name": str(ROOT / SMALL["config_name"]), "dataset_name": str(ROOT / SMALL["dataset_name"])}
    keys = SMALL | own | {"eval_dataset_name": None, "sft_steps": 0, "stages": 1, "output_dir": str(folder / "run")}
    run = prepare(make_config(keys))
    with counted() as counts:
        irft_stage(run, 0, run.initial, run.initial)
    metrics = [row for _, row in read_jsonl(run.output / "metrics.jsonl")]
    answers = read_samples([*(run.output / "stage-00" / "samples").glob("*.jsonl")])
    prompts = [len(x.prompt_ids) for x in run.train]
    # An answer's last token is drawn or given, but no model reads it.
    read = [len(x.answer_ids) + len(y) - 2 for x, y in zip(run.train, answers, strict=True)]
    told = {
        "trained": round(sum(row["tokens_per_second"] * row["seconds"] for row in metrics)),
        "sampled": sum(len(answer) - 1 for answer in answers),
        "scored": sum(prompts) + sum(prompts) + sum(read),  # the samples' prompts, then the pairs under the reference
    }
    write_json(folder / "counted.json", counts)
    write_json(folder / "told.json", told)
