"""Measure the pair loss: inputs, exact values in fp64, interleaved timing, and peak extra memory."""

import gc
import json
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.memory import memory_of_process
from benchmarks.peers import BETA, IGNORE, PEERS, Inputs, Result, reason_not_to_run
from irlfast.ops import log_ratio, pair_loss

ROOT = Path(__file__).parent.parent
MIB = 2**20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Rounds of timing, and the seconds after which a row with at least two runs stops.
ROUNDS, BUDGET = (30, 1.0) if DEVICE.type == "cuda" else (5, 4.0)

# The largest allowed error of the loss, and of a gradient: ‖measured − exact‖ / ‖exact‖. Peers sum log-probabilities in
# fp32 before they subtract the reference's. Peers that round logits to bf16 lose one or two nats per sequence. β times
# this loss is in the loss, and changes the coefficients of all tokens: for pairs whose answers share most words, the
# gradients were off by a seventh. In bf16 our gradients are compared with PyTorch's own errors.
OURS = {"float32": (1e-5, 1e-4), "bfloat16": (2e-4, None)}
THEIRS = {"float32": (1e-4, 1e-3), "bfloat16": (0.2, 0.5)}


class Case(NamedTuple):
    """Inputs, and the rows to measure on them: ``peer`` or ``peer; variant`` (see :func:`vary`)."""

    name: str
    rows: tuple[str, ...]
    pairs: int
    tokens: int  # T, the length of each sequence
    hidden: int
    vocabulary: int
    dtype: str = "float32"
    half: bool = False  # the first half of every sequence is not scored
    trained: bool = False
    memory: tuple[str, ...] = ()  # rows whose memory is measured on a CPU, which takes seconds per row; a GPU has all


def measure(case: Case) -> dict[str, Any]:
    """Measure every row of a case: its errors against fp64, then the time and memory of the rows that are right."""
    torch.compiler.reset()  # otherwise a peer's third shape is compiled for any shape, and runs slower than the first
    inputs = make_inputs(case)
    exact = exact_values(inputs)
    rows = {row: check(row, inputs, exact, case) for row in case.rows}
    runnable = {row: step_of(row, inputs, exact.ref_logps) for row, result in rows.items() if result["status"] == "ok"}
    exact = None  # frees the fp64 tensors
    for row, seconds in interleave(runnable, inputs).items():
        spread = {"seconds": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "runs": seconds}
        rows[row].update(spread)
    for row, extra in extra_memory(case, runnable, inputs).items():
        sums = gradient_mib(inputs, row, 4 if row.startswith("irlfast") else None)
        rows[row] |= {"extra_mib": extra, "working_mib": None if extra is None else extra - sums}
    return {**case._asdict(), "gradient_mib": gradient_mib(inputs), "rows": rows}


def gradient_mib(inputs: Inputs, row: str = "", itemsize: int | None = None) -> float:
    """Return the MiB of the gradients, or of sums with ``itemsize`` bytes per element that become the gradients."""
    tensors = [inputs.hidden] if "frozen" in row else [inputs.hidden, inputs.weight]
    return sum(tensor.numel() * (itemsize or tensor.element_size()) for tensor in tensors) / MIB


def vary(inputs: Inputs, variant: str, ref_logps: Tensor) -> Inputs:
    """Apply a variant. ``cached``: the reference's log-probabilities are given. ``frozen``: no gradient of the head."""
    if "cached" in variant:
        inputs = inputs._replace(ref_hidden=None, ref_weight=None, ref_logps=ref_logps)
    return inputs._replace(weight=inputs.weight.detach()) if "frozen" in variant else inputs


def step_of(row: str, inputs: Inputs, ref_logps: Tensor) -> Callable[[], Result]:
    """Return a function that does one forward and backward pass of a row."""
    name, _, variant = row.partition("; ")
    varied = vary(inputs, variant, ref_logps)

    def step() -> Result:
        result = PEERS[name](varied)
        if result.loss.requires_grad:
            result.loss.backward()
        return result

    return step


def drop_gradients(inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.weight.grad = None


# ---------------------------------------------------------------- inputs


def make_inputs(case: Case) -> Inputs:
    torch.manual_seed(0)
    hidden, weight, targets, ref_hidden, ref_weight = trained(case) if case.trained else random(case)
    if case.half:
        targets[:, : case.tokens // 2] = IGNORE
    dtype = getattr(torch, case.dtype)
    policy = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight))
    return Inputs(*policy, targets, ref_hidden.to(dtype), ref_weight.to(dtype), None)


def random(case: Case) -> tuple[Tensor, ...]:
    """Draw inputs whose logits have standard deviation 1; the reference's logits differ by about a seventh."""
    sequences, width = 2 * case.pairs, case.hidden
    hidden = torch.randn(sequences, case.tokens, width, device=DEVICE)
    weight = torch.randn(case.vocabulary, width, device=DEVICE) / width**0.5
    targets = torch.randint(case.vocabulary, (sequences, case.tokens), device=DEVICE)
    ref_hidden = hidden + 0.1 * torch.randn_like(hidden)
    ref_weight = weight + 0.1 * torch.randn_like(weight) / width**0.5
    return hidden, weight, targets, ref_hidden, ref_weight


def trained(case: Case, steps: int = 80, last: int = 2) -> tuple[Tensor, ...]:
    """Return inputs from a one-layer Llama that is briefly trained on the shipped demonstrations.

    The reference is the same model, ``last`` steps earlier. Experts are demonstrations that the model has not seen. The
    synthetic answers are the same demonstrations with their completions exchanged. The tokens are words at random
    places of the vocabulary, as the frequent tokens of a large model are.
    """
    import transformers

    lines = (ROOT / "irlfast/demo/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    words = {"\n": 0}
    places = torch.randperm(case.vocabulary, device=DEVICE)

    def encode(rows: list[dict[str, str]], completions: list[dict[str, str]]) -> Tensor:
        pairs = zip(rows, completions, strict=True)
        text = "".join(f"{row['prompt']}\n{other['completion']}\n" for row, other in pairs)
        ids = [words.setdefault(word, len(words)) for word in re.findall(r"\w+|\W", text)]
        return places[torch.tensor(ids, device=DEVICE) % case.vocabulary]

    config = transformers.LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=2 * case.hidden,
        num_hidden_layers=1,
        num_attention_heads=max(1, case.hidden // 64),
        tie_word_embeddings=True,
        max_position_embeddings=case.tokens,
        pad_token_id=None,
    )
    with DEVICE:
        model = transformers.LlamaForCausalLM(config)
    training_tokens = encode(rows[:2000], rows[:2000])
    unseen, others = rows[2000:], rows[2001:] + rows[2000:2001]
    shape = case.pairs, case.tokens + 1
    halves = [encode(unseen, completions)[: shape[0] * shape[1]].view(shape) for completions in (unseen, others)]
    tokens = torch.cat(halves)
    head, backbone = model.lm_head.weight, model.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1 / case.hidden)
    for step in range(steps):
        if step == steps - last:
            with torch.no_grad():
                ref_hidden, ref_weight = backbone(tokens[:, :-1]).last_hidden_state, head.clone()
        start = torch.randint(len(training_tokens) - 64, (8, 1), device=DEVICE)
        batch = training_tokens[start + torch.arange(64, device=DEVICE)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        hidden = backbone(tokens[:, :-1]).last_hidden_state
    return hidden, head.detach(), tokens[:, 1:].clone(), ref_hidden, ref_weight


# ---------------------------------------------------------------- checks against fp64


class ExactValues(NamedTuple):
    """Loss, log-ratios and gradients in fp64."""

    loss: float
    log_ratio: Tensor  # [S]
    ref_logps: Tensor  # [S, T] fp32
    d_hidden: Tensor  # [S, T, H]
    d_weight: Tensor  # [V, H]


def exact_values(inputs: Inputs) -> ExactValues:
    """Compute the exact values by the plain backend, one pair at a time, because fp64 logits of a batch may not fit."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (inputs.hidden, inputs.weight))
    ref_weight, targets = inputs.ref_weight.double(), inputs.targets
    count, length = len(targets) // 2, targets.shape[1]
    cu_seqlens = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=targets.device)
    ratios, ref_logps = hidden.new_zeros(2 * count), torch.zeros(targets.shape, device=targets.device)
    loss = 0.0
    for pair in range(count):
        both = [pair, pair + count]
        own = targets[both].flatten()
        ref_hidden = inputs.ref_hidden[both].flatten(0, 1).double()
        reference = log_ratio(ref_hidden, ref_weight, own, cu_seqlens, backend="plain").token_logps
        options = {"beta": BETA, "num_pairs": count, "ref_logps": reference, "backend": "plain"}
        result = pair_loss(hidden[both].flatten(0, 1), weight, own, cu_seqlens, **options)
        result.loss.backward()
        loss += result.loss.item()
        ratios[both], ref_logps[both] = result.log_ratio, reference.view(2, length).float()
    return ExactValues(loss, ratios, ref_logps, hidden.grad, weight.grad)


def check(row: str, inputs: Inputs, exact: ExactValues, case: Case) -> dict[str, Any]:
    """Return a row's errors, its ``status`` (``ok``, ``wrong``, ``failed`` or ``cannot run``) and the reason for it."""
    name, _, variant = row.partition("; ")
    reason = reason_not_to_run(name, vary(inputs, variant, exact.ref_logps))
    if reason:
        return {"status": "cannot run", "reason": reason}
    try:
        measured = errors(row, inputs, exact)
    except Exception as error:  # the table shows whatever a peer raises
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}".partition("\n")[0][:160]}
    limit = limits(row, inputs, exact, case)
    above = [key for key in limit if key in measured and not measured[key] <= limit[key]]  # NaN counts as above
    if not above:
        return {"status": "ok", **measured}
    reason = ", ".join(f"{key} is {measured[key]:.2g}, at most {limit[key]:.2g} is right" for key in above)
    return {"status": "wrong", "reason": reason, **measured}


def errors(row: str, inputs: Inputs, exact: ExactValues) -> dict[str, float]:
    """Return the errors of a row's log-ratios, loss and gradients. The floor has none, because it computes no loss."""
    try:
        result = step_of(row, inputs, exact.ref_logps)()
        if result.log_ratio is None:
            return {}
        measured = {
            "nats": (result.log_ratio.detach().double() - exact.log_ratio).abs().max().item(),
            "loss_error": abs(result.loss.item() - exact.loss),
            "hidden_error": relative_error(inputs.hidden.grad, exact.d_hidden),
        }
        if "frozen" not in row:
            measured["weight_error"] = relative_error(inputs.weight.grad, exact.d_weight)
        return measured
    finally:
        drop_gradients(inputs)


def limits(row: str, inputs: Inputs, exact: ExactValues, case: Case) -> dict[str, float]:
    """Return the largest allowed errors. Our gradients in bf16 may have twice PyTorch's error on the same inputs."""
    name, _, variant = row.partition("; ")
    is_exact = name.startswith("irlfast") and name != "irlfast, skipping"
    loss, gradient = (OURS if is_exact else THEIRS)[case.dtype]
    limit = {"loss_error": loss, "hidden_error": gradient, "weight_error": gradient}
    if gradient is None:
        plain = errors(f"torch; {variant}", inputs, exact)
        limit |= {key: 2 * plain[key] for key in ("hidden_error", "weight_error") if key in plain}
    return limit


def relative_error(measured: Tensor, exact: Tensor) -> float:
    return ((measured.double() - exact).norm() / exact.norm()).item()


# ---------------------------------------------------------------- time


def interleave(steps: dict[str, Callable[[], Result]], inputs: Inputs) -> dict[str, list[float]]:
    """Return the seconds of every run. Rows take turns, so that a slow minute of the machine slows all of them."""
    seconds: dict[str, list[float]] = {row: [] for row in steps}

    def timed(step: Callable[[], Result]) -> float:
        drop_gradients(inputs)
        return seconds_of(step)

    if DEVICE.type == "cuda":
        for step in [*steps.values()] * 2:
            timed(step)
    for _ in range(ROUNDS):
        for row, step in steps.items():
            if len(seconds[row]) < 2 or sum(seconds[row]) < BUDGET:
                seconds[row].append(timed(step))
    return seconds


def seconds_of(step: Callable[[], object]) -> float:
    if DEVICE.type == "cpu":
        start_time = time.perf_counter()
        step()
        return time.perf_counter() - start_time
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Flush the last run from the L2 cache, and keep the GPU busy (5 ms) until the host has queued the step.
    other = torch.empty(1024 * MIB, dtype=torch.int8, device=DEVICE)
    for _ in range(16):
        other.zero_()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


# ---------------------------------------------------------------- peak extra memory, gradients included


def extra_memory(case: Case, steps: dict[str, Callable[[], Result]], inputs: Inputs) -> dict[str, float | None]:
    if DEVICE.type == "cuda":
        return {row: gpu_memory(step, inputs) for row, step in steps.items()}
    rows = [row for row in case.memory if row in steps]
    # One process per row, forked from a process with the peers' imports; two at a time, because nothing is timed.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["benchmarks.measure", "liger_kernel.chunked_loss", "trl.trainer.utils"])
    with ProcessPoolExecutor(2, server, max_tasks_per_child=1) as pool:
        return dict(zip(rows, pool.map(partial(cpu_memory, case, torch.get_num_threads()), rows), strict=True))


def gpu_memory(step: Callable[[], Result], inputs: Inputs) -> float:
    drop_gradients(inputs)
    gc.collect()  # some peers leave inputs in reference cycles, which would be freed at any time
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - base) / MIB


def cpu_memory(case: Case, threads: int, row: str) -> float | None:
    """Return the growth of the peak resident size in a forward and backward pass; None if the system cannot tell.

    The allocator is the system's with its defaults, as in a user's process: memory that it keeps counts.
    """
    if sys.platform != "linux":
        return None
    torch.set_num_threads(threads)
    inputs = make_inputs(case)
    warm = inputs if "compile" in row else make_inputs(case._replace(tokens=8, hidden=64, vocabulary=512))
    step_of(row, warm, torch.zeros(warm.targets.shape))()  # loads libraries and compiles code, which do not count
    del warm
    drop_gradients(inputs)
    step = step_of(row, inputs, torch.zeros(inputs.targets.shape))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current resident size
    except OSError:  # a sandbox without this file
        return None
    base = memory_of_process("VmRSS")
    step()
    return (memory_of_process("VmHWM") - base) / MIB
