"""Helpers of the tests of ``irlfast.ops``: inputs, an independent oracle in loops, a recorder of what is computed."""

import itertools
import math
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode


def sequences(lengths: list[int]) -> torch.Tensor:
    """``cu_seqlens`` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make(
    lengths: list[int],
    *,
    vocabulary: int = 7,
    size: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    rows: bool = False,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    ignored: bool = False,
    reference: str = "none",
    frozen: bool = False,
) -> dict[str, Any]:
    """Arguments of ``log_ratio``. Logits spread over a few nats, as those of a trained model do."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * spread).to(dtype)

    tokens = sum(lengths)
    height = max(1, tokens // 2) + 1 if rows else tokens  # fewer rows than tokens: some are used twice, some never
    targets = torch.randint(vocabulary, (tokens,), generator=random)
    if ignored:
        targets[torch.rand(tokens, generator=random) < 0.3] = -100
    case: dict[str, Any] = {
        "hidden": normal(height, size).requires_grad_(),
        "weight": normal(vocabulary, size, spread=2 * size**-0.5).requires_grad_(not frozen),
        "targets": targets,
        "cu_seqlens": sequences(lengths),
        "bias": normal(vocabulary).requires_grad_(not frozen) if bias else None,
        "logit_scale": scale,
        "logit_softcap": softcap,
        "rows": torch.randint(height, (tokens,), generator=random) if rows else None,
    }
    if reference == "hidden":
        case |= {"ref_hidden": normal(height, size + 3), "ref_weight": normal(vocabulary, size + 3)}
        case |= {"ref_bias": normal(vocabulary) if bias else None}
    elif reference != "none":
        count = tokens if reference == "token" else len(lengths)
        case["ref_logps"] = -torch.rand(count, generator=random).double()
    return case


def converted(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same values in another dtype, as new leaves."""
    return {
        name: value.detach().to(dtype).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in case.items()
    }


def gradients(output: torch.Tensor, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradient by every argument that requires one."""
    leaves = {name: case[name] for name in ("hidden", "weight", "bias") if getattr(case[name], "requires_grad", False)}
    return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values())), strict=True))


def random_pairs(count: int, seed: int, pairs: int = 4) -> torch.Tensor:
    """Pairs in which an expert has several synthetic answers, and some sequences have no pair."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(count, (pairs if count else 0, 2), generator=random)


# ---------------------------------------------------------------- an oracle of the plain backend: loops over sequences


def token_by_token(case: dict[str, Any], prefix: str = "") -> list[list[torch.Tensor]]:
    """The log-probability of each token, by sequence; None where the target is skipped."""
    hidden, weight, bias = (case.get(prefix + name) for name in ("hidden", "weight", "bias"))
    rows, cap, ends = case["rows"], case["logit_softcap"], case["cu_seqlens"].tolist()
    result = []
    for start, end in itertools.pairwise(ends):
        result.append([])
        for n in range(start, end):
            logits = weight @ hidden[n if rows is None else rows[n]]
            logits = (logits if bias is None else logits + bias) * case["logit_scale"]
            logits = logits if cap is None else cap * (logits / cap).tanh()
            target = case["targets"][n]
            result[-1].append(logits[target] - logits.exp().sum().log() if target >= 0 else None)
    return result


# Each loss of PAIR_LOSSES as its paper has it, of the log-ratios ρ(y) and ρ(ỹ), and β.
PAIR_LOSS_ORACLES = {
    "sigmoid": lambda y, s, beta: (1 + (-beta * (y - s)).exp()).log(),
    "hinge": lambda y, s, beta: (1 - beta * (y - s)).clamp(min=0),
    "linear": lambda y, s, beta: -beta * (y - s),
}


def looped_pair_loss(case: dict[str, Any], pairs: torch.Tensor, beta: float, loss_type: str, nll_weight: float) -> Any:
    """The loss and the log-ratios, as their definition reads."""
    policy = [[x for x in sequence if x is not None] for sequence in token_by_token(case)]
    ratio = [sum(sequence, torch.zeros(()).double()) for sequence in policy]
    if case.get("ref_hidden") is not None:
        for s, sequence in enumerate(token_by_token(case, "ref_")):
            ratio[s] = ratio[s] - sum(x.detach() for x in sequence if x is not None)
    elif case.get("ref_logps") is not None:
        ends = case["cu_seqlens"].tolist()
        for s in range(len(ratio)):
            span = range(ends[s], ends[s + 1])
            if case["ref_logps"].numel() == case["targets"].numel():
                ratio[s] = ratio[s] - sum(case["ref_logps"][n] for n in span if case["targets"][n] >= 0)
            else:
                ratio[s] = ratio[s] - case["ref_logps"][s]
    loss = torch.zeros(()).double()
    for expert, synthetic in pairs.tolist():
        loss = loss + PAIR_LOSS_ORACLES[loss_type](ratio[expert], ratio[synthetic], beta) / len(pairs)
    experts = sorted(set(pairs[:, 0].tolist()))
    tokens = max(1, sum(len(policy[s]) for s in experts))
    for s in experts:
        loss = loss - nll_weight * sum(policy[s]) / tokens
    return loss, torch.stack(ratio) if ratio else torch.zeros(0).double()


# ---------------------------------------------------------------- what a backend computes


class Recorder(TorchDispatchMode):
    """Record the largest tensor that the block makes, and the floating-point operations of its matrix products."""

    largest = 0
    operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "irlfast":  # tensors and products inside the operation count too
            with self:
                return OPDEFS[function.name().removesuffix(".default")]._init_fn(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = [argument for argument in args if isinstance(argument, torch.Tensor)][-2:]
            self.operations += 2 * math.prod(left.shape) * right.shape[1]
        return out
