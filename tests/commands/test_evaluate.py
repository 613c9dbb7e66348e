"""``irlfast evaluate`` on real tiny models: its numbers, its files, its resumption, and its errors."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from irlfast.models.tokenizers import train_tokenizer
from irlfast.sampling.generation import read_samples
from tests.helpers.endpoint import prefers_longer, serving
from tests.helpers.runs import DEMO, PYTHON, ROOT, Forked, contents, printed
from tests.helpers.runs import run as train
from tests.helpers.tiers import slow

DATASET = ROOT / "irlfast/demo/test.jsonl"
KEEP_WORK = """
import irlfast.evaluate as command

command.remove = lambda folder: None
command.main()
"""
KEYS = {"max_eval_samples": 24, "num_generations": 2}


def arguments_of(output: Path, *models: Path | str, dataset: Path = DATASET, **keys) -> list[str]:
    pairs = [f"{name}={value}" for name, value in {**KEYS, "output_dir": output, **keys}.items()]
    return ["-m", "irlfast.evaluate", *map(str, models), "--dataset", str(dataset), *pairs]


def evaluated(output: Path, *models: Path | str, code: int = 0, **keys) -> tuple[str, str]:
    """Run the command, and return what it printed."""
    return printed(arguments_of(output, *models, **keys), code=code)


def rows_of(output: Path, name: str) -> list[dict]:
    parts = sorted((output / "models" / name).glob("part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run under a short name, of which each policy answers otherwise."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(folder, **DEMO)
    return folder


@pytest.fixture(scope="module")
def evaluation(run, tmp_path_factory):
    """An evaluation of the run's policies, whose sampled token ids are in ``work`` beside it, and what it printed."""
    output = tmp_path_factory.mktemp("evaluation") / "all"
    program = output.with_name("evaluate.py")
    program.write_text(KEEP_WORK)
    said = printed([str(program), *arguments_of(output, run)[2:]])
    (output / "work").rename(output.with_name("work"))
    return output, *said


def test_a_run_means_its_policies_and_the_first_is_the_baseline(evaluation):
    output, _, err = evaluation
    assert "rows read as prompt and completion\nprompts: 24 of " in err
    names = ["tiny/sft", "tiny/stage-00", "tiny/stage-01"]
    assert [*yaml.safe_load((output / "evaluation.yaml").read_text())["models"]] == names
    figures = json.loads((output / "figures.json").read_text())
    assert [*figures["models"]] == names
    assert figures["baseline"] == "tiny/sft"
    assert all(len(rows_of(output, name)) == 24 for name in names)


def test_likelihoods_are_those_that_transformers_computes(evaluation, run):
    output, _, _ = evaluation
    prompts = [json.loads(line) for line in (output / "prompts.jsonl").read_text().splitlines()]
    for name in ("sft", "stage-01"):
        model = transformers.AutoModelForCausalLM.from_pretrained(run / name / "policy").double().eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(run / name / "policy")
        for given, row in zip(prompts, rows_of(output, f"tiny/{name}"), strict=True):
            asked = [{"role": "user", "content": given["prompt"]}]
            start = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            ids = tokenizer([start, given["expert"] + tokenizer.eos_token]).input_ids  # the prompt ends with a space
            ids, begin = ids[0] + ids[1], len(ids[0])
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = [logps[at - 1, ids[at]].item() for at in range(begin, len(ids))]
            assert row["figures"]["nll"] == pytest.approx(-sum(expected), abs=1e-4)
            assert row["figures"]["nll_per_token"] == pytest.approx(-sum(expected) / len(expected), abs=1e-4)
            assert [logp for _, logp in row["expert_tokens"]] == pytest.approx(expected, abs=1e-4)
            assert "".join(text for text, _ in row["expert_tokens"]).startswith(given["expert"])


def test_a_rerun_of_the_same_command_writes_the_same_figures_and_measures_nothing(evaluation, run):
    output, _, _ = evaluation
    before = contents(output / "models/tiny/stage-01"), (output / "figures.json").read_bytes()
    _, err = evaluated(output, run)
    assert "tokens/s" not in err
    assert (contents(output / "models/tiny/stage-01"), (output / "figures.json").read_bytes()) == before


def test_the_command_measures_what_training_measured(evaluation, run):
    """The held-out rows of the run are the same prompts."""
    figures = json.loads((evaluation[0] / "figures.json").read_text())["models"]
    for phase in ("sft", "stage-00", "stage-01"):
        metrics = json.loads((run / phase / "eval.json").read_text())
        for name in ("exact_match", "nll", "nll_per_token"):
            assert figures[f"tiny/{phase}"][name]["mean"] == pytest.approx(metrics[name], rel=1e-5), name


def test_margins_and_kl_are_differences_of_log_probabilities_to_the_baseline(evaluation, run):
    output, _, _ = evaluation
    policies = [run / phase / "policy" for phase in ("stage-01", "sft")]
    models = [transformers.AutoModelForCausalLM.from_pretrained(policy).double().eval() for policy in policies]
    tokenizer = transformers.AutoTokenizer.from_pretrained(policies[0])
    drawn, compared = (
        read_samples([*(output.with_name("work") / "00000000/tiny" / phase / "drawn").glob("*.jsonl")])
        for phase in ("stage-01", "sft")
    )

    def log_ratio(prompt, answer):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = [model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models]
        new, old = (logps.gather(-1, ids[0, len(prompt) :, None]).sum() for logps in logits)
        return (new - old).item()

    given = [json.loads(line) for line in (output / "prompts.jsonl").read_text().splitlines()]
    for number, (texts, row) in enumerate(zip(given, rows_of(output, "tiny/stage-01"), strict=True)):
        asked = [{"role": "user", "content": texts["prompt"]}]
        start = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        prompt, expert = tokenizer([start, texts["expert"] + tokenizer.eos_token]).input_ids
        own, others = ([*each[2 * number : 2 * number + 2]] for each in (drawn, compared))
        assert row["sample_figures"]["kl"] == pytest.approx([log_ratio(prompt, answer) for answer in own], abs=1e-4)
        margins = [log_ratio(prompt, expert) - log_ratio(prompt, x) for x in others if x.tolist() != expert]
        assert row["figures"]["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
        assert row["figures"]["reward_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)


def test_a_model_is_measured_alone_and_by_its_folder(run, tmp_path):
    """A policy of a run has the run's keys of texts and lengths."""
    evaluated(tmp_path / "one", run / "final", num_generations=2, max_eval_samples=4)
    settings = yaml.safe_load((tmp_path / "one" / "evaluation.yaml").read_text())
    assert settings["models"] == {"tiny/final": str(run / "final")}
    assert settings["max_prompt_length"] == 64
    assert not {"margin", "kl"} & {*rows_of(tmp_path / "one", "tiny/final")[0]["figures"]}


MOMENTS = (
    "data.json",
    "work/00000000/tiny/sft/greedy/00000.jsonl",
    "models/tiny/sft/part-00000.jsonl",
    "work/00000000/tiny/stage-00/scores.safetensors",
    "work/00000000/tiny/stage-01/drawn",
)


def test_an_evaluation_that_is_killed_again_and_again_ends_with_the_same_bytes(evaluation, run, tmp_path):
    output, _, _ = evaluation
    again = tmp_path / "again"
    for moment in MOMENTS:
        assert not (again / moment).exists(), f"{moment}: the evaluation has passed it"
        started = Forked(arguments_of(again, run))
        while not (again / moment).exists():
            assert started.processes[0].is_alive(), started.wait(0)
            time.sleep(0.002)
        started.wait(0)
    assert not (again / "figures.json").exists()
    evaluated(again, run)
    assert (again / "figures.json").read_bytes() == (output / "figures.json").read_bytes()
    for phase in ("sft", "stage-00", "stage-01"):
        assert contents(again / "models/tiny" / phase) == contents(output / "models/tiny" / phase)
    assert not (again / "work").exists()


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model with random weights and another tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "other"
    rows = [json.loads(line) for line in DATASET.read_text().splitlines()]
    tokenizer = train_tokenizer((f"{row['prompt']} {row['completion']}" for row in rows), 280)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=280, max_position_embeddings=128, **sizes, eos_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_with_another_tokenizer_reads_its_own_token_ids_and_has_no_margin(run, other, tmp_path):
    output = tmp_path / "two"
    _, err = evaluated(output, run / "final", other, max_eval_samples=6)
    assert "other: another tokenizer or chat template than tiny/final's" in err
    rows = rows_of(output, "other")
    assert [*rows[0]["figures"]] and not {"margin", "reward_accuracy"} & {*rows[0]["figures"]}
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    prompts = [json.loads(line) for line in (output / "prompts.jsonl").read_text().splitlines()]
    for given, row in zip(prompts, rows, strict=True):
        ids = tokenizer(given["expert"] + tokenizer.eos_token).input_ids
        assert [text for text, _ in row["expert_tokens"]] == [tokenizer.decode([token]) for token in ids]


def test_prompts_without_answers_have_the_figures_of_samples_alone(run, tmp_path):
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": f"{n} hours"}) + "\n" for n in ("two", "three", "four")))
    evaluated(tmp_path / "out", run / "sft/policy", run / "final", dataset=dataset)
    for name in ("tiny/sft", "tiny/final"):
        for row in rows_of(tmp_path / "out", name):
            assert not {"exact_match", "nll", "margin"} & {*row["figures"]}
            assert row["figures"]["length"] > 0
            assert row["expert_tokens"] == []
    assert rows_of(tmp_path / "out", "tiny/final")[0]["sample_figures"]["kl"]


def test_preference_pairs_have_gaps_and_margins(run, tmp_path):
    dataset = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{n} hours", "chosen": "60 min", "rejected": "1 min"} for n in ("two", "three", "four")]
    dataset.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    evaluated(tmp_path / "out", run / "sft/policy", run / "final", dataset=dataset)
    for row in rows_of(tmp_path / "out", "tiny/final"):
        figures = row["figures"]
        assert figures["preference_gap_accuracy"] == (figures["preference_gap"] > 0)
        assert figures["preference_accuracy"] == (figures["preference_margin"] > 0)
    base = rows_of(tmp_path / "out", "tiny/sft")
    assert "preference_margin" not in base[0]["figures"]
    gaps = [row["figures"]["preference_gap"] for row in base]
    for row, gap in zip(rows_of(tmp_path / "out", "tiny/final"), gaps, strict=True):
        assert row["figures"]["preference_margin"] == pytest.approx(row["figures"]["preference_gap"] - gap, abs=1e-4)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"seed": 1}, "another configuration (seed: 0 -> 1)"),
        ({"temprature": 1}, "unknown key 'temprature' on the command line; did you mean temperature?"),
        ({"dataset": "no-such.jsonl"}, "no such file or folder: no-such.jsonl"),
        ({"models": ["sft/policy", "stage-00/policy"]}, "its evaluation is of tiny/sft, tiny/stage-00, tiny/stage-01"),
        ({"models": ["sft/policy", "sft/policy"]}, "found the name 'tiny/sft' twice"),
        ({"models": ["nowhere/at/all"]}, "nowhere/at/all: no such folder"),
        ({"models": ["data"]}, "found neither config.json nor adapter_config.json, expected a model or a run"),
        ({"models": ["unloadable"], "output_dir": "NEW"}, "found no weights"),
        ({"dataset": "EMPTY", "output_dir": "NEW"}, "found no prompt"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(evaluation, run, tmp_path, keys, expected):
    (tmp_path / "empty.jsonl").write_text("")
    shutil.copytree(run / "sft/policy", run / "unloadable", dirs_exist_ok=True)
    (run / "unloadable/model.safetensors").unlink()
    keys = {name: str(tmp_path / value.lower()) if value in ("NEW",) else value for name, value in keys.items()}
    if keys.get("dataset") == "EMPTY":
        keys["dataset"] = tmp_path / "empty.jsonl"
    output = keys.pop("output_dir", evaluation[0])
    models = [run / name for name in keys.pop("models", ["."])]
    _, err = evaluated(output, *models, code=2, **keys)
    assert len(err.strip().splitlines()) == 1
    assert expected in err


def test_a_judge_compares_the_greedy_answers_and_its_key_is_in_no_file(evaluation, run, monkeypatch):
    output, _, _ = evaluation
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    with serving(prefers_longer) as server:
        keys = {"judge": server.url, "judge_model": "strong"}
        _, err = evaluated(output, run, **keys)
        asked = len(server.requests)
        evaluated(output, run, **keys)
        assert len(server.requests) == asked > 0
    assert "tokens/s" not in err
    assert {request["key"] for request in server.requests} == {"Bearer sk-secret-1234"}
    base = [row["answer"] for row in rows_of(output, "tiny/sft")]
    for name in ("tiny/stage-00", "tiny/stage-01"):
        own = [row["answer"] for row in rows_of(output, name)]
        lines = (output / "judge" / name / "outcomes.jsonl").read_text().splitlines()
        outcomes = [json.loads(line)["outcome"] for line in lines]
        lengths = [(len(one), len(other)) for one, other in zip(own, base, strict=True)]
        assert outcomes == [(one > other) + 0.5 * (one == other) for one, other in lengths]
        assert f"{name} against tiny/sft, judged by strong: {outcomes.count(1)} wins" in err
    assert not [path for path in output.rglob("*") if path.is_file() and b"sk-secret" in path.read_bytes()]


# ---------------------------------------------------------------- many prompts

PROGRAM = """
import resource, sys
import irlfast.evaluate as command
import irlfast.evaluation.prompts as prompts

command.CHUNK = prompts.CHUNK = 512
measure_chunk = command.measure_chunk

def measured(*given):
    measure_chunk(*given)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)

command.measure_chunk = measured
sys.exit(command.main())
"""


@slow
def test_the_memory_of_two_models_on_2000_prompts_is_that_of_the_first_chunk(run, tmp_path):
    keys = {"max_eval_samples": 2000, "max_new_tokens": 4, "per_device_eval_batch_size": 256}
    dataset = ROOT / "irlfast/demo/train.jsonl"
    arguments = arguments_of(tmp_path / "many", run / "sft/policy", run / "final", dataset=dataset, **keys)
    _, err = printed(["-c", PROGRAM, *arguments[2:]], how=PYTHON)
    peaks = [int(line.split()[1]) for line in err.splitlines() if line.startswith("peak")]
    assert len(peaks) == 4
    assert peaks[-1] - peaks[1] < 30_000, peaks  # KiB; the rows of 2,000 prompts alone are more
    assert len(rows_of(tmp_path / "many", "tiny/final")) == 2000
