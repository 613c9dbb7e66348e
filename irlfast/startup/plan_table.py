"""The table of docs/scaling.md: a stage of IRFT with models of 1.4B, 7B and 70B parameters on 1, 8 and 32 GPUs."""

import json
import tempfile
from pathlib import Path
from typing import Any

from irlfast.config.read import make_config
from irlfast.engine.hardware import Cluster
from irlfast.startup.plan_memory import TRAINING_MOMENTS, Room, gib, total
from irlfast.startup.plan_run import plan_run, work_of
from irlfast.startup.plan_seconds import assumed_rates
from irlfast.startup.sizes import model_size

SHAPES: dict[str, dict[str, Any]] = {  # of the models' own config.json
    "1.4B (Pythia)": {
        "model_type": "gpt_neox",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
    },
    "7B (Mistral)": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    },
    "70B (Llama 3)": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}
KEYS: dict[str, Any] = {
    "dataset_name": "organisation/demonstrations",
    "dtype": "bfloat16",
    "zero_stage": 3,
    "gradient_checkpointing": True,
    "use_vllm": True,
    "max_train_samples": 10_000,
    "stages": 1,
    "inner_epochs": 1.0,
    "global_batch_size": 64,
    "max_prompt_length": 512,
    "max_length": 1024,
    "max_new_tokens": 512,
}
SPLIT = {"70B (Llama 3)"}  # models that vLLM splits over all GPUs of a node
GPU = "H100-80G"
CLUSTERS = (Cluster(GPU, 1, 1), Cluster(GPU, 8, 1), Cluster(GPU, 8, 4))
HEADER = ("model", "GPUs", "weights", "gradients", "optimiser", "activations", "all", "a step", "a stage", "GPU-hours")


def table() -> str:
    """Return the table in Markdown."""
    rows = [HEADER, ("---",) * len(HEADER)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        for name, shape in SHAPES.items():
            path.write_text(json.dumps(shape))
            keys = {"config_name": str(path), "train_tokenizer": shape["vocab_size"]}
            for cluster in CLUSTERS:
                split = {"vllm_tensor_parallel_size": cluster.per_node} if name in SPLIT else {}
                rows.append((name, *figures(keys | split, cluster)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def figures(keys: dict[str, Any], cluster: Cluster) -> tuple[str, ...]:
    """Return the figures of a run with ``keys`` on a cluster; without times where the run does not fit."""
    config = make_config(KEYS | keys)
    size, rates = model_size(config), assumed_rates(cluster, config)
    assert size
    room = Room(cluster.gpu.memory, cluster.processes, on_gpu=True, runtime=rates.runtime)
    work = work_of(config, None)
    plan = plan_run(config, size, room, rates, work)
    parts = max((plan.memory[moment] for moment in TRAINING_MOMENTS), key=total)
    memory = [gib(parts.get(part, 0.0)) for part in ("weights", "gradients", "optimiser state", "activations")]
    row = (str(cluster.processes), *memory, gib(total(parts)))
    if too_large := [moment for moment, parts in plan.memory.items() if total(parts) > room.memory]:
        return (*row, f"no room for {', '.join(too_large)}", "", "")
    [stage] = plan.phases
    hours = plan.seconds() / 3600
    return (*row, f"{sum(stage.step.values()):.2f} s", f"{hours:.2f} h", f"{hours * cluster.processes:.1f}")
