"""Measure the gain of shared prompts: answer tokens per second, shared and separate.

    pytest benchmarks/test_sharing.py -s && python -m benchmarks.plot benchmarks/results/DATE-sharing-DEVICE.json

Prompts are 0.25 to 4 × as long as an answer, with n synthetic answers each. The passes are forward and backward passes
of the pair loss with a cached reference; both layouts take turns. The gain is compared with the operation count. On a
CPU, CPU seconds count, so that other programs may run on the machine. A missed goal fails no test.
"""

import statistics
import time
from typing import Any

import torch

from benchmarks.conftest import goal_lines, write_result
from benchmarks.test_throughput import QUICK, SHAPE, VOCABULARY
from irlfast import ops
from irlfast.data.batching import micro_batches
from irlfast.data.packing import Layout, PromptGroup, pack, token_counts
from irlfast.losses.inputs import arguments
from irlfast.models.costs import costs_of, operations
from irlfast.models.forward import hidden_states
from irlfast.ops import lm_head

PROMPTS, SYNTHETIC = (0.25, 0.5, 1, 2, 4), (1, 2, 4)  # prompt length / answer length, and synthetic answers per prompt
GPU_SHAPE = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16}
ON_CPU = {"answer": 64, "groups": 4, "limit": 1024, "rounds": 5}
ON_GPU = {"answer": 256, "groups": 32, "limit": 16384, "rounds": 3}
GOAL = 0.15  # the largest relative error of the predicted gain


def make_model(shape: dict[str, int], vocabulary: int, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape)).to(dtype).train()
    if device.type == "cuda":
        model.set_attn_implementation("flex_attention")
    return model


def seconds(model: Any, groups: list[PromptGroup], layout: Layout, limit: int) -> float:
    """Time all passes over ``groups``: CPU seconds, or wall time on a GPU."""
    answers = len(groups[0].answers)
    chosen = micro_batches(range(len(groups)), groups, layout, limit)
    batches = [pack([groups[i] for i in part], layout).to(model.device) for part in chosen]
    now = time.perf_counter if model.device.type == "cuda" else time.process_time
    begun = now()
    for batch in batches:
        firsts = torch.arange(0, batch.cu_seqlens.numel() - 1, answers, device=model.device)
        pairs = torch.stack([firsts.repeat(answers - 1), torch.cat([firsts + k for k in range(1, answers)])], 1)
        given = arguments(lm_head(model), batch) | {"ref_logps": batch.targets.new_zeros(len(batch.targets)).float()}
        ops.pair_loss(hidden_states(model, batch), **given, pairs=pairs, beta=0.1).loss.backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    spent = now() - begun
    model.zero_grad()
    return spent


def curve(model: Any, sizes: dict[str, int]) -> list[dict[str, Any]]:
    one_row = model.device.type == "cuda"
    layouts = {"shared": Layout(one_row=one_row), "separate": Layout(shared=False, one_row=one_row)}
    points = []
    for n in SYNTHETIC:
        for ratio in PROMPTS:
            prompt = [1 + i % 200 for i in range(round(ratio * sizes["answer"]))]
            answer = [1 + i * 7 % 200 for i in range(sizes["answer"])]
            groups = [PromptGroup(prompt, (answer,) * (n + 1))] * sizes["groups"]
            times: dict[str, list[float]] = {name: [] for name in layouts}
            for _ in range(sizes["rounds"] + 1):
                for name, layout in layouts.items():
                    times[name].append(seconds(model, groups, layout, sizes["limit"]))
            middle = {name: statistics.median(taken[1:]) for name, taken in times.items()}  # the first warms up
            tokens = sizes["answer"] * (n + 1) * sizes["groups"]
            costs = costs_of(model, model.lm_head.weight)
            counted = {name: operations(costs, token_counts(groups, layout)) for name, layout in layouts.items()}
            gain, predicted = (both["separate"] / both["shared"] for both in (middle, counted))
            rates = {name: tokens / spent for name, spent in middle.items()}
            points.append({"n": n, "ratio": ratio, "rates": rates, "gain": gain, "predicted": predicted})
    return points


def test_sharing(pytestconfig):
    quick, gpu = pytestconfig.getoption("quick"), torch.cuda.is_available()
    sizes = {"answer": 8, "groups": 2, "limit": 64, "rounds": 1} if quick else ON_GPU if gpu else ON_CPU
    shape = QUICK if quick else GPU_SHAPE if gpu else SHAPE
    model = make_model(shape, 300 if quick else VOCABULARY, torch.device("cuda" if gpu else "cpu"))
    points = curve(model, sizes)
    assert all(point["predicted"] > 1 for point in points)
    worst = max(abs(point["gain"] / point["predicted"] - 1) for point in points)
    goal = {"what": "gain of sharing against the count", "measured": worst, "limit": GOAL, "met": worst <= GOAL}
    for point in points:
        print({key: value if isinstance(value, dict) else round(value, 2) for key, value in point.items()})
    print(*goal_lines([goal]), sep="\n")
    if not quick:
        kind = "cuda" if gpu else "cpu"
        write_result(f"sharing-{kind}", {"shape": shape, **sizes, "sharing": points, "goals": [goal]})
