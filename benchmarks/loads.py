"""The CPU seconds that a stage of IRFT and of RFT saves, as a policy is loaded once to answer, to score and to train.

    IRLFAST_VLLM_PYTHON=PYTHON python -m benchmarks.loads    # 2 minutes on two quiet cores

A start of vLLM is measured as the CPU seconds of all its processes until it has answered a prompt by one token; a load
of a policy as those of this process until it is ready to score. Both are multiplied by the starts and loads that a
policy had before, less those that it has now, which tests/runs/test_loads.py counts (docs/scaling.md). No run is
repeated in the older order. Without IRLFAST_VLLM_PYTHON, only loads are measured.
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.conftest import write_result

# Of a policy that a stage starts from, with `reference: stage`: before, and now.
STARTS = {"irft": (2, 1), "rft": (4, 1)}
LOADS = {"irft": (3, 1), "rft": (3, 2)}
SHAPES: dict[str, dict[str, int]] = {  # of Llama's architecture
    "1 million": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 2048},
    "160 million": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 32_000},
}
TIMES = 3  # loads, of which the quickest counts


def main() -> None:
    quick, python = "--quick" in sys.argv, os.environ.get("IRLFAST_VLLM_PYTHON", "")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in list(SHAPES.items())[: 1 if quick else None]:
            policy = Path(folder, name)
            parameters = save_policy(policy, shape)
            load = min(load_seconds(policy) for _ in range(TIMES + 1))  # the first one also imports
            start = start_seconds(policy, python) if python and not quick else None
            rows += [row_of(method, parameters, load, start) for method in STARTS]
    print(table(rows))
    write_result("loads", {"rows": rows})


def save_policy(folder: Path, shape: dict[str, int]) -> int:
    """Save a random policy in float32, and return the number of its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, max_position_embeddings=256))
    model.save_pretrained(folder)
    return model.num_parameters()


def load_seconds(policy: Path) -> float:
    """Return the CPU seconds of this process in which it loads a policy and prepares it to score."""
    from irlfast.config import make_config
    from irlfast.data.packing import PromptGroup
    from irlfast.models.prepare import forget, prepare_to_score

    config = make_config({"dataset_name": ".", "model_name_or_path": str(policy)})
    forget()
    begun = time.process_time()
    prepare_to_score(policy, config, [PromptGroup([3, 4, 5], ([6, 7, 2], [8, 2]))])
    return time.process_time() - begun


def start_seconds(policy: Path, python: str) -> float:
    """Return the CPU seconds of the processes of one start of vLLM that answers one prompt by one token."""
    from irlfast.sampling.shards import GREEDY, Shard
    from irlfast.sampling.vllm_sampler import generate_vllm

    shards: Iterator[Shard] = iter([Shard(0, [[3, 4, 5]], [0], 1, GREEDY, 1, [2])])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answers = list(generate_vllm(policy, lambda: next(shards, None), python=python, dtype="float32", max_model_len=64))
    assert len(answers) == 1
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def row_of(method: str, parameters: int, load: float, start: float | None) -> dict[str, Any]:
    starts, loads = (before - now for before, now in (STARTS[method], LOADS[method]))
    return {
        "method": method,
        "parameters": parameters,
        "seconds of a start": start,
        "seconds of a load": load,
        "starts saved": starts,
        "loads saved": loads,
        "seconds saved": starts * (start or 0.0) + loads * load,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of docs/scaling.md in Markdown."""
    header = ("method", "parameters", "a start of vLLM", "a load", "saved per stage")
    lines = [header, ("---",) * len(header)]
    for row in rows:
        start = "–" if row["seconds of a start"] is None else f"{row['seconds of a start']:.1f} s"
        counts = (row["starts saved"], "start"), (row["loads saved"], "load")
        what = " and ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in counts)
        saved = f"{what}: {row['seconds saved']:.1f} s"
        size = f"{row['parameters'] / 1e6:.0f} million"
        lines.append((row["method"], size, start, f"{row['seconds of a load']:.2f} s", saved))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
