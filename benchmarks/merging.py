"""Compare three ways to merge a LoRA adapter into bf16: rounding to nearest, rounding by chance, weights in fp32.

    python -m benchmarks.merging

A policy of one million parameters learns the shipped task by SFT in fp32. Rounded to bf16, it is the base that a LoRA
adapter continues from, at several learning rates. The table has three numbers for each learning rate and way to merge:
the share of the adapter that is kept, ⟨kept, δ⟩ / ⟨δ, δ⟩; the distance of the log-probabilities on held-out answers
from the unmerged adapter's (nats per token); and the held-out NLL (nats per answer). All are computed in fp32, so that
only the weights differ. The script writes ``benchmarks/results/DATE-merging.json``. A stopped run resumes.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.conftest import ROOT, write_result
from benchmarks.runs import parser, train
from irlfast.config import make_config
from irlfast.data.store import load_examples
from irlfast.models.load import load_model
from irlfast.models.lora import round_stochastically

TASK = {
    "config_name": ROOT / "irlfast/demo/config.json",
    "dataset_name": ROOT / "irlfast/demo/train.jsonl",
    "eval_dataset_name": ROOT / "irlfast/demo/test.jsonl",
    "train_tokenizer": 384,
    "max_train_samples": 8000,
    "max_eval_samples": 200,
    "max_prompt_length": 96,
    "max_length": 128,
    "max_new_tokens": 24,
    "logging_steps": 25,
    "save_steps": 0,
    "method": "sft",
    "sft_optim": "adamw_torch",
    "sft_global_batch_size": 64,
    "per_device_eval_batch_size": 200,
    "lr_scheduler_type": "constant",
}
BASE = {"sft_steps": 150, "sft_learning_rate": 2e-3}
ADAPTER = {"sft_steps": 50, "use_peft": "true", "dtype": "bfloat16", "config_name": "null", "train_tokenizer": "null"}
RATES = (1e-6, 1e-5, 1e-4, 1e-3)


def nearest(exact: Tensor, _: torch.Generator) -> Tensor:
    return exact.bfloat16().float()


def by_chance(exact: Tensor, generator: torch.Generator) -> Tensor:
    return round_stochastically(exact, generator).float()


def in_fp32(exact: Tensor, _: torch.Generator) -> Tensor:
    return exact


WAYS = {"nearest": nearest, "by chance": by_chance, "fp32": in_fp32}


def logps_of(model: Any, examples: list) -> list[Tensor]:
    """Return the log-probability of every token of each example's answer."""
    answer_logps = []
    for example in examples:
        ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        answer_logps.append(logps[-len(example.answer_ids) :])
    return answer_logps


@torch.no_grad()
def compare(output: Path) -> dict[str, dict[str, float]]:
    """Measure the policy of a run: without its adapter, with the adapter, and merged in every way."""
    config = make_config(yaml.safe_load((output / "config.yaml").read_text()))
    examples = load_examples(output / "data" / "eval.safetensors")
    model = load_model(output / "sft" / "policy", config).eval().float()
    unmerged = logps_of(model, examples)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    bases = {name: layer.get_base_layer().weight.clone() for name, layer in layers.items()}
    deltas = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    merged = model.unload()
    rows = {"base": metrics_of(logps_of(merged, examples), unmerged), "unmerged": metrics_of(unmerged, unmerged)}
    generator = torch.Generator().manual_seed(0)
    for way, round_weight in WAYS.items():
        kept = learned = 0.0
        for name, delta in deltas.items():
            weight = round_weight(bases[name] + delta, generator)
            merged.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(weight)
            kept += ((weight - bases[name]) * delta).sum().item()
            learned += delta.square().sum().item()
        rows[way] = {"kept": kept / learned} | metrics_of(logps_of(merged, examples), unmerged)
    return rows


def metrics_of(logps: list[Tensor], unmerged: list[Tensor]) -> dict[str, float]:
    distance = (torch.cat(logps) - torch.cat(unmerged)).abs().mean().item()
    return {"nats_per_token": distance, "nll": -sum(own.sum().item() for own in logps) / len(logps)}


def main() -> None:
    options = parser(__doc__, "merging").parse_args()
    folder = options.output.resolve()
    train(folder / "base", **TASK | BASE)
    rates = {}
    for rate in RATES:
        output = folder / f"rate-{rate:g}"
        train(output, **TASK | ADAPTER | {"model_name_or_path": folder / "base" / "final", "sft_learning_rate": rate})
        rates[f"{rate:g}"] = compare(output)
        print(f"learning rate {rate:g}")
        for way, row in rates[f"{rate:g}"].items():
            print(f"  {way:10}" + "".join(f"  {name} {value:.5f}" for name, value in row.items()))
    keys = {"all": {name: value for name, value in TASK.items() if not isinstance(value, Path)}}
    print(write_result("merging", {"keys": keys | {"base": BASE, "adapter": ADAPTER}, "rates": rates}))


if __name__ == "__main__":
    main()
