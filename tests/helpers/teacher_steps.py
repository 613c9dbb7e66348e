"""Started by test_teacher.py: train a few steps under DeepSpeed beside a teacher, and compare it with its definition.

The arguments are a folder and cases, such as ``averaged, ZeRO 2``. Prints JSON. For every case: the largest difference
of a weight of the teacher from its definition, and of the policy from its start; whether the teacher's base and its
other weights lie in the policy's memory; whether all processes have the same teacher; and whether a run that stops and
resumes after half of the steps ends with the same weights.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from irlfast import ops
from irlfast.common import dist
from irlfast.common.files import remove
from irlfast.config import Config, make_config
from irlfast.data.packing import PromptGroup
from irlfast.engine.checkpoint import resume, save_checkpoint
from irlfast.engine.deepspeed_engine import make_engine
from irlfast.engine.memory import TokenLimit
from irlfast.engine.meters import Stopwatch
from irlfast.engine.plan import Plan
from irlfast.engine.step import prepare_steps, train_step
from irlfast.engine.teacher import follow
from tests.helpers.results import print_results
from tests.helpers.small_llama import start_with_llama

STEPS, BATCH = 6, 4
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KEYS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "averaged": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.05, "ref_model_sync_steps": 1},
    "every second step": {"sync_ref_model": True, "ref_model_mixup_alpha": 1, "ref_model_sync_steps": 2},
    "live": {"sync_ref_model": True, "ref_model_mixup_alpha": 1, "ref_model_sync_steps": 1},
}
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 1 in bf16": {"zero_stage": 1, "dtype": "bfloat16"},
    "LoRA in bf16": {"zero_stage": 2, "dtype": "bfloat16", "use_peft": True, "lora_r": 4},
}
GROUPS = [
    PromptGroup([1, word], ([word, 4, 5, 2], [6, 2]), teacher_prompt=[1, word, 7, 8, word]) for word in range(3, 11)
]


def loss(hidden: Any, head: Any, batch: Any, normalisers: Any, *, teacher: Any) -> tuple[torch.Tensor, dict]:
    """The forward KL from the teacher, which needs every part of ``Teacher``, and the answers' likelihood."""
    assert not teacher.hidden.requires_grad and not teacher.head.weight.requires_grad
    given = {"weight": head.weight, "rows": batch.rows}
    taught = {"ref_hidden": teacher.hidden, "ref_weight": teacher.head.weight, "ref_rows": teacher.rows}
    kl = ops.token_divergence(hidden, **given, **taught, kind="forward_kl")
    logps = ops.log_ratio(hidden, **given, targets=batch.targets, cu_seqlens=batch.cu_seqlens).policy_logps
    return (kl.sum() - logps.sum()) / normalisers.pairs, {"count": torch.tensor(1), "kl": kl.detach().sum()}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}


def trained(config: Config, folder: Path, first: int, last: int) -> tuple[Any, list[dict[str, torch.Tensor]], list]:
    """Take the steps after ``first`` up to ``last``, and leave a checkpoint. Return the policy's weights after each."""
    plan = Plan(0, [np.arange(BATCH) + step % 2 * BATCH for step in range(STEPS)], 1e-2, "adamw_torch")
    engine = make_engine(folder / "model", loss, plan, config, GROUPS, folder / "model")
    assert resume(engine, folder / "checkpoint", plan)["step"] == first
    history, metrics = [weights(engine.module.model)], []
    steps = prepare_steps(plan.steps[first:last], GROUPS, engine.module.prepared.layout, TokenLimit(64, auto=False))
    for step, prepared in enumerate(steps, first + 1):
        sums = train_step(engine, prepared, 0.0, Stopwatch()).metrics
        follow(engine.module.teacher, step, config)
        history.append(weights(engine.module.model))
        metrics.append(sums["kl"].item())
    save_checkpoint(engine, folder / "checkpoint", {"step": last}, {}, plan)
    return engine, history, metrics


def expected(history: list[dict[str, torch.Tensor]], config: Config) -> dict[str, torch.Tensor]:
    """The teacher by its definition, in fp32."""
    teacher = {name: weight.clone() for name, weight in history[0].items()}
    for step, policy in enumerate(history[1:], 1):
        if config.sync_ref_model and step % config.ref_model_sync_steps == 0:
            share = config.ref_model_mixup_alpha
            teacher = {name: share * policy[name] + (1 - share) * weight for name, weight in teacher.items()}
    return teacher


def case(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    given = {"dataset_name": ".", "model_name_or_path": str(folder / "model"), "max_tokens_per_batch": 64}
    own = folder / f"{dist.rank()}.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": keys["zero_stage"]}}))
    config = make_config(given | {"deepspeed": str(own), "method": "sdft", "sync_ref_model": False} | keys)
    engine, history, metrics = trained(config, folder, 0, STEPS)
    teacher = engine.module.teacher.prepared.model
    ends, wanted = weights(teacher), expected(history, config)
    dtype = getattr(torch, config.dtype)
    gap = max((ends[name] - wanted[name].to(dtype).float()).abs().max().item() for name in wanted)
    moved = max((history[-1][name] - history[0][name]).abs().max().item() for name in wanted)
    policy = dict(engine.module.model.named_parameters())
    shared = {name: each.data_ptr() == policy[name].data_ptr() for name, each in teacher.named_parameters()}
    base = [shared[name] for name, each in policy.items() if not each.requires_grad]
    adapters = [shared[name] for name, each in policy.items() if each.requires_grad]
    everywhere = dist.all_gather_object({name: weight.tolist() for name, weight in ends.items()})
    engine.destroy()

    def forget() -> None:
        dist.barrier()
        if dist.is_main():
            remove(folder / "checkpoint")
        dist.barrier()

    forget()
    first, _, _ = trained(config, folder, 0, STEPS // 2)
    first.destroy()
    second, _, later = trained(config, folder, STEPS // 2, STEPS)
    again, policy_again = weights(second.module.teacher.prepared.model), weights(second.module.model)
    second.destroy()
    forget()
    return {
        "gap": gap,
        "moved": moved,
        "base shared": all(base),
        "trained shared": any(adapters),
        "same on all": all(each == everywhere[0] for each in everywhere),
        "resumed": all(torch.equal(again[name], ends[name]) for name in ends)
        and all(torch.equal(policy_again[name], history[-1][name]) for name in policy_again)
        and later == metrics[STEPS // 2 :],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    start_with_llama(folder, vocab_size=13, **SHAPE)
    results = {
        f"{kind}, {engine}": case(folder, KEYS[kind] | ENGINES[engine])
        for kind, engine in (name.split(", ") for name in sys.argv[2:])
    }
    print_results(results)


if __name__ == "__main__":
    main()
