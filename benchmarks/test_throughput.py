"""Compare pairs per second and memory of a training step with TRL's ``DPOTrainer``, scoring by the reference included.

    IRLFAST_DATA=DATA pytest benchmarks/test_throughput.py    # DATA/hh_harmless_test.jsonl, DATA/gsm8k_test.jsonl

Contenders take turns, each in its own process, with the same policy, reference, pairs, optimiser and batch; their first
losses must agree. CPU seconds are reported, too, for a machine that is not quiet. A missed goal fails no test.
On a GPU the model has a billion parameters, in bf16; ``--quick`` stays on the CPU, and forks a process.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.conftest import ROOT, write_result
from benchmarks.throughput import CONTENDERS

SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
QUICK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GPU_SHAPE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 16, "num_attention_heads": 16}
VOCABULARY, MAX_LENGTH, MAX_PROMPT = 32000, 512, 384
BATCH, STEPS, ROUNDS = 8, 5, 2  # pairs per step; the first step warms up
GPU_BATCH, GPU_STEPS, GPU_ROUNDS = 32, 8, 1
SEEN = 40  # pairs at the start of a file, by which the sizes were chosen, and which are left out
GOALS = {
    "hh": {"TRL, defaults": 6, "TRL, best": 4, "memory": 0.15},
    "gsm8k": {"TRL, defaults": 3, "TRL, best": 2},
}

Text = tuple[str, str, str]  # prompt, chosen, rejected


def hh(data: Path, count: int) -> list[Text]:
    """Read dialogues up to the last ``Assistant:`` and two answers, without equal answers or different prompts."""
    texts = []
    for line in (data / "hh_harmless_test.jsonl").read_text().splitlines():
        row = json.loads(line)
        (prompt, _, chosen), (other, _, rejected) = (
            row[name].rpartition("\n\nAssistant:") for name in ("chosen", "rejected")
        )
        if prompt == other and chosen != rejected and chosen.strip() and rejected.strip():
            texts.append((f"{prompt}\n\nAssistant:", chosen, rejected))
    return texts[:count]


def gsm8k(data: Path, count: int) -> list[Text]:
    """Read questions with their answer, and the answer of another question as the rejected answer."""
    rows = [json.loads(line) for line in (data / "gsm8k_test.jsonl").read_text().splitlines()][: count + 1]
    return [
        (f"{row['prompt']}\nAnswer:", f" {row['completion']}", f" {other['completion']}")
        for row, other in itertools.pairwise(rows)
    ]


def ids_of(texts: list[Text], vocabulary: int) -> list[list[list[int]]]:
    """Tokenise the texts by a tokenizer trained on them. Prompts are cut at their start, answers at their end."""
    from irlfast.models.tokenizers import train_tokenizer

    tokenizer = train_tokenizer([text for row in texts for text in row], vocabulary)
    pairs = []
    for row in texts:
        prompt, *answers = tokenizer(list(row)).input_ids
        prompt = prompt[-MAX_PROMPT:]
        room = MAX_LENGTH - len(prompt)
        pairs.append([prompt, *([*answer, tokenizer.eos_token_id][:room] for answer in answers)])
    return pairs


def make_models(folder: Path, shape: dict[str, int], vocabulary: int) -> None:
    """Write a policy and a reference that differ; otherwise every first loss would be log 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=MAX_LENGTH, **shape))
    model.save_pretrained(folder / "policy")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder / "reference")


def contend_in_forks(folder: Path, contender: str, processes: int = 1) -> dict[str, Any]:
    """Run a contender as ``--quick`` does: on the CPU, in forks of a process that has imported what runs do."""
    from tests.helpers.runs import Forked, as_torchrun

    variables = as_torchrun(processes) if processes > 1 else [{}]
    variables = [own | {"CUDA_VISIBLE_DEVICES": ""} for own in variables]
    code, out, err = Forked(["-m", "benchmarks.throughput", str(folder), contender], variables=variables).wait(600)
    assert code == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def contend(folder: Path, contender: str, shape: dict[str, int]) -> dict[str, Any]:
    if shape is QUICK:
        return contend_in_forks(folder, contender)
    command = [sys.executable, "-m", "benchmarks.throughput", str(folder), contender]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # spinning threads would slow down other programs
    environment |= {} if shape is GPU_SHAPE else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    folder: Path, texts: list[Text], shape: dict[str, int], batch: int, steps: int, rounds: int
) -> dict[str, Any]:
    vocabulary = 300 if shape is QUICK else VOCABULARY
    pairs = ids_of(texts, vocabulary)[: batch * steps]
    make_models(folder, shape, vocabulary)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "workload.json").write_text(json.dumps({"batch": batch}))
    runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in CONTENDERS}
    for _ in range(rounds):
        for contender, reports in runs.items():
            reports.append(contend(folder, contender, shape))
    answers = sum(len(answer) for _, *both in pairs for answer in both)
    lengths = [statistics.mean(len(pair[part]) for pair in pairs) for part in range(3)]
    return {
        "pairs": len(pairs),
        "mean_tokens": dict(zip(("prompt", "chosen", "rejected"), lengths, strict=True)),
        "rows": {contender: medians(reports, batch, len(pairs), answers) for contender, reports in runs.items()},
    }


def medians(runs: list[dict[str, Any]], batch: int, pairs: int, answers: int) -> dict[str, Any]:
    """Return medians over runs. The first step of a run warms up and does not count."""

    def median(clock: str) -> tuple[float, float]:
        """Return the seconds to score the pairs of a step, and the seconds of a step."""
        score = statistics.median(run[clock]["score"] for run in runs) / pairs * batch
        return score, statistics.median(seconds for run in runs for seconds in run[clock]["steps"][1:])

    score, step = median("seconds")
    return {
        "first_loss": runs[0]["loss"],
        "score_seconds_per_step": score,
        "train_seconds_per_step": step,
        "cpu_seconds_per_step": sum(median("cpu_seconds")),
        "pairs_per_second": batch / (score + step),
        "answer_tokens_per_second": batch * answers / pairs / (score + step),
        "peak_mib": statistics.median(run["mib"] for run in runs),
        "runs": runs,
    }


def goals(name: str, rows: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for what, limit in GOALS[name].items():
        if what == "memory":
            measured = rows["irlfast"]["peak_mib"] / rows["TRL, defaults"]["peak_mib"]
            met = measured <= limit
        else:
            measured = rows["irlfast"]["pairs_per_second"] / rows[what]["pairs_per_second"]
            met = measured >= limit
        lines.append({"what": what, "measured": measured, "limit": limit, "met": met})
    return lines


def check_losses(rows: dict[str, Any], relative: float) -> None:
    losses = [row["first_loss"] for row in rows.values()]
    assert abs(losses[0] - 0.6931) > 1e-3, "the reference must differ, or the losses show nothing"
    assert max(losses) - min(losses) < relative * max(losses)


@pytest.mark.parametrize("name", GOALS)
def test_throughput(pytestconfig, tmp_path, data, name):
    texts = {"hh": hh, "gsm8k": gsm8k}[name](data, 2000)[SEEN:]
    quick = pytestconfig.getoption("quick")
    on_gpu = torch.cuda.is_available() and not quick
    setting = (QUICK, BATCH, 2, 1) if quick else (SHAPE, BATCH, STEPS, ROUNDS)
    if on_gpu:
        setting = (GPU_SHAPE, GPU_BATCH, GPU_STEPS, GPU_ROUNDS)
    measured = measure(tmp_path, texts, *setting)
    check_losses(measured["rows"], relative=0.02 if on_gpu else 1e-4)
    result = {"shape": setting[0], **measured, "goals": goals(name, measured["rows"])}
    write_result(f"throughput-{name}{'-cuda' if on_gpu else ''}", result)
    for contender, row in measured["rows"].items():
        print(contender, {key: round(value, 3) for key, value in row.items() if isinstance(value, float)})
    print(*result["goals"], sep="\n")
