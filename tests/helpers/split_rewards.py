"""Started by test_split_rewards.py in several processes: score by others' reward models that ZeRO-3 splits.

The arguments are a folder, and "gaps" or "peaks". Prints JSON. Gaps: for each model and number of conversations, the
largest difference of a score from that of the whole model, of each process. Peaks: the bytes of a large model, and how
much more memory each process had at most while it loaded that model and scored with it.
"""

import datetime
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from irlfast.common import dist
from irlfast.config import make_config
from irlfast.data.rows import Demonstration
from irlfast.engine.process_group import init_process_group
from irlfast.sampling import reward_external
from irlfast.sampling.reward_external import load_external
from irlfast.startup.prepare import quiet
from tests.helpers.results import print_results
from tests.helpers.split_load import LARGE, resident
from tests.helpers.tokenizers_like import qwen

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
MODELS = ("llama", "bfloat16", "deberta")  # deberta's encoder reads the weight of a module that it never calls
NOW = datetime.datetime(2026, 1, 1)


def small_models(common: dict[str, Any]) -> dict[str, Any]:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    shape = common | SMALL | {"initializer_range": 0.5}
    return {
        "llama": LlamaForSequenceClassification(LlamaConfig(**shape)),
        "bfloat16": LlamaForSequenceClassification(LlamaConfig(**shape)).bfloat16(),
        "deberta": DebertaV2ForSequenceClassification(DebertaV2Config(**shape, **relative)),
    }


def write_models(folder: Path, what: str) -> None:
    torch.manual_seed(0)
    tokenizer = qwen()
    common: dict[str, Any] = {"vocab_size": len(tokenizer) + 1, "num_labels": 1, "pad_token_id": len(tokenizer)}
    large = LlamaConfig(**common, **LARGE)
    models = small_models(common)
    if what == "peaks":
        models["large"] = LlamaForSequenceClassification(large)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def own_rows(count: int) -> list[Demonstration]:
    """This process's share of ``count`` conversations of different lengths."""
    numbers = range(count)[dist.rank() :: dist.world_size()]
    asked = ([{"role": "user", "content": "Why? " * (1 + number % 4)}] for number in numbers)
    answers = ({"role": "assistant", "content": f"Because of {number}. " * number} for number in numbers)
    return [Demonstration(prompt, answer, where="") for prompt, answer in zip(asked, answers, strict=True)]


def scores(folder: Path, stage: int, rows: list[Demonstration]) -> torch.Tensor:
    keys = {"dataset_name": ".", "model_name_or_path": ".", "zero_stage": stage, "per_device_eval_batch_size": 2}
    return load_external(str(folder), make_config(keys), NOW)(rows)


def gap(folder: Path, count: int) -> float:
    rows = own_rows(count)
    with mock.patch.object(reward_external, "is_split", wraps=reward_external.is_split) as looked:
        split = scores(folder, 3, rows)
    assert reward_external.is_split(looked.call_args.args[0])
    whole = scores(folder, 2, rows)
    return (split - whole).abs().max().item() if rows else 0.0


def gaps(folder: Path) -> dict[str, list[float]]:
    cases = [("llama", 1), *((name, 9) for name in MODELS)]
    return {f"{name}, {count}": dist.all_gather_object(gap(folder / name, count)) for name, count in cases}


def peaks(folder: Path) -> dict[str, Any]:
    scores(folder / "llama", 3, own_rows(8))  # so that all modules are imported
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    scores(folder / "large", 3, own_rows(8))
    peak = resident("VmHWM") - before
    whole = sum(path.stat().st_size for path in (folder / "large").glob("*.safetensors"))
    return {"whole": whole, "peaks": dist.all_gather_object(peak)}


def main() -> None:
    quiet()
    init_process_group()
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if dist.is_main():
        write_models(folder, what)
    dist.barrier()
    print_results(gaps(folder) if what == "gaps" else peaks(folder))


if __name__ == "__main__":
    main()
