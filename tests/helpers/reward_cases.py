"""Helpers of the tests of reward heads: inputs, every kind of loss, an independent oracle in loops."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from tests.helpers.ops_cases import sequences

LENGTHS = [5, 3, 0, 7, 1, 0, 4, 6]
POOLINGS = ["last", "token"]
KINDS: dict[str, dict[str, Any]] = {
    "bce": {"kind": "bce"},
    "smoothed": {"kind": "bce", "label_smoothing": 0.1},
    "airl": {"kind": "airl"},
    "gail": {"kind": "gail"},
    "fairl": {"kind": "fairl"},
    "f-max": {"kind": "fairl", "f_max": True},
    "alpha": {"kind": "alpha", "alpha": 0.3},
    "alpha 2": {"kind": "alpha", "alpha": 2.0},
    "alpha near 1": {"kind": "alpha", "alpha": 1 - 1e-4},
}
PAIRED: dict[str, dict[str, Any]] = {
    "bradley_terry": {"kind": "bradley_terry"},
    "bradley_terry smoothed": {"kind": "bradley_terry", "label_smoothing": 0.2},
    "linear": {"kind": "linear", "regularization": 0.1},
}
# Every kind with every pooling that it allows.
FORMS = [*itertools.product(KINDS, POOLINGS), *itertools.product(PAIRED, ["last"])]


def options_of(name: str) -> dict[str, Any]:
    return (KINDS | PAIRED)[name]


def make(
    lengths: list[int],
    *,
    size: int = 6,
    heads: int = 3,
    dtype: torch.dtype = torch.float64,
    rows: bool = True,
    bias: bool = True,
    largest: float = 4.0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of ``reward_head``; the largest logit is about ``largest``. Where rows are given, some are shared."""
    random = torch.Generator().manual_seed(len(lengths))
    tokens = sum(lengths)
    height = max(1, tokens // 2) + 1 if rows else tokens
    hidden, head = torch.randn(height, size, generator=random), torch.randn(heads, size, generator=random)
    head *= largest / max(1e-3, (hidden @ head.T).abs().max().item() if height else 1)
    case = {
        "hidden": hidden.to(dtype),
        "head": head.to(dtype),
        "bias": torch.randn(heads, generator=random).to(dtype) if bias else None,
        "cu_seqlens": sequences(lengths),
        "rows": torch.randint(height, (tokens,), generator=random) if rows else None,
    }
    case = {name: None if value is None else value.to(device) for name, value in case.items()}
    for name in ("hidden", "head", "bias"):
        if case[name] is not None:
            case[name].requires_grad_()
    return case


def labels_of(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return (torch.arange(len(lengths), device=device) + 1) % 2


def in_fp64(case: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double().requires_grad_() if value is not None and value.is_floating_point() else value
        for name, value in case.items()
    }


def gradients(output: torch.Tensor, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    leaves = {name: case[name] for name in ("hidden", "head", "bias") if case[name] is not None}
    return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values())), strict=True))


# ---------------------------------------------------------------- an oracle of the plain backend: loops


def looped_logits(case: dict[str, Any], pooling: str) -> list[list[list[float]]]:
    """The logits by sequence, item and head."""
    result: list[list[list[float]]] = []
    for start, end in itertools.pairwise(case["cu_seqlens"].tolist()):
        result.append([])
        for n in range(start, end) if pooling == "token" else range(max(start, end - 1), end):
            x = case["hidden"][n if case["rows"] is None else case["rows"][n]]
            bias = [0.0] * len(case["head"]) if case["bias"] is None else case["bias"].tolist()
            result[-1].append([(x @ w).item() + b for w, b in zip(case["head"], bias, strict=True)])
    return result


def critic(kind: str, alpha: float = 0.5, **_: Any) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """The functions T = f′(eʰ) and f* of f-GAN, from the generator f of the divergence."""
    if kind == "airl":  # f(u) = −log u
        return lambda h: -math.exp(-h), lambda t: -1 - math.log(-t)
    if kind == "fairl":  # f(u) = u log u
        return lambda h: 1 + h, lambda t: math.exp(t - 1)
    if kind == "gail":  # f(u) = ½ (u log u − (1 + u) log((1 + u)/2))
        return lambda h: 0.5 * math.log(2 / (1 + math.exp(-h))), lambda t: -0.5 * math.log(2 - math.exp(2 * t))
    # f″(u) = u^(−1−α), f(1) = f′(1) = 0
    return (
        lambda h: (1 - math.exp(-alpha * h)) / alpha,
        lambda t: ((1 - alpha * t) ** ((alpha - 1) / alpha) - 1) / (1 - alpha),
    )


def log_sigmoid(z: float) -> float:
    return -math.log(1 + math.exp(-z))


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def looped_loss(case: dict[str, Any], pooling: str, options: dict[str, Any], pairs: list[list[int]]) -> float:
    items, kind, wrong = looped_logits(case, pooling), options["kind"], options.get("label_smoothing", 0.0)
    losses = []
    for m in range(len(case["head"])):
        logits = [[item[m] for item in sequence] for sequence in items]
        expert, synthetic = (list(itertools.chain(*logits[first::2])) for first in (0, 1))
        compared = [(logits[e][0], logits[s][0]) for e, s in pairs if logits[e] and logits[s]]
        if kind == "bradley_terry":
            margins = [e - s for e, s in compared]
            losses.append(mean([-(1 - wrong) * log_sigmoid(u) - wrong * log_sigmoid(-u) for u in margins]))
        elif kind == "linear":
            losses.append(mean([s - e + options["regularization"] * (e * e + s * s) for e, s in compared]))
        elif kind == "bce":
            right = expert + [-h for h in synthetic]
            losses.append(mean([-(1 - wrong) * log_sigmoid(z) - wrong * log_sigmoid(-z) for z in right]))
        else:
            witness, conjugate = critic(**options)
            losses.append(-mean([witness(h) for h in expert]) + mean([conjugate(witness(h)) for h in synthetic]))
    return mean(losses)
