"""Helpers of the tests of ``irlfast.ops``: inputs, an independent oracle in loops, a recorder of what is computed."""

import itertools
import math
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.pair_loss_oracles import PAIR_LOSS_ORACLES, PER_TOKEN, REWARD_ORACLES


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


def looped_log_ratios(case: dict[str, Any], token_weights: torch.Tensor | None) -> list[torch.Tensor]:
    """The log-ratio of each sequence, token by token."""
    ratios = []
    ref_logps = case.get("ref_logps")
    per_token = ref_logps is not None and ref_logps.numel() == case["targets"].numel()
    reference = token_by_token(case, "ref_") if case.get("ref_hidden") is not None else None
    for s, sequence in enumerate(token_by_token(case)):
        ratio = torch.zeros(()).double()
        for k, logp in enumerate(sequence):
            n = int(case["cu_seqlens"][s]) + k
            if logp is not None:
                other = reference[s][k].detach() if reference else ref_logps[n] if per_token else 0
                ratio = ratio + (1 if token_weights is None else token_weights[n]) * (logp - other)
        ratios.append(ratio if ref_logps is None or per_token else ratio - ref_logps[s])
    return ratios


def looped_pair_loss(
    case: dict[str, Any],
    pairs: torch.Tensor,
    *,
    beta: float,
    loss_type: str | list[str],
    loss_weights: list[float] | None = None,
    pair_weights: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    f_divergence_type: str = "reverse_kl",
    nll_weight: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, the loss of each pair and the log-ratios, as their definition reads."""
    policy = [[x for x in sequence if x is not None] for sequence in token_by_token(case)]
    ratios = looped_log_ratios(case, token_weights)
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    pair_losses = torch.zeros(len(pairs)).double()
    for p, pair in enumerate(pairs.tolist()):
        for name, factor in zip(names, loss_weights or [1.0] * len(names), strict=True):
            rewards = [REWARD_ORACLES[f_divergence_type](ratios[s].exp()) for s in pair]
            if name in PER_TOKEN:
                rewards = [reward / max(1, len(policy[s])) for reward, s in zip(rewards, pair, strict=True)]
            term = torch.zeros(len(pairs)).double()
            term[p] = factor * PAIR_LOSS_ORACLES[name](*rewards, beta)
            pair_losses = pair_losses + term
    loss = (pair_losses * (1 if pair_weights is None else pair_weights)).sum() / max(1, len(pairs))
    experts = sorted(set(pairs[:, 0].tolist()))
    tokens = max(1, sum(len(policy[s]) for s in experts))
    for s in experts:
        loss = loss - nll_weight * sum(policy[s]) / tokens
    return loss, pair_losses, torch.stack(ratios) if ratios else torch.zeros(0).double()


# ---------------------------------------------------------------- what a backend computes


class Recorder(TorchDispatchMode):
    """Record what the block computes."""

    largest = 0  # elements of the largest tensor that it makes
    operations = 0  # floating-point operations of its matrix products
    launches = 0  # operations that compute: on a GPU, each is a kernel

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "irlfast":  # tensors and products inside the operation count too
            with self:
                return OPDEFS[function.name().removesuffix(".default")]._init_fn(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        name = function.overloadpacket.__name__
        self.launches += not (shares_memory(function, args, out) or "empty" in name)
        if name in ("mm", "addmm", "addmm_"):
            left, right = [argument for argument in args if isinstance(argument, torch.Tensor)][-2:]
            self.operations += 2 * math.prod(left.shape) * right.shape[1]
        return out


def shares_memory(function: Any, args: Any, out: Any) -> bool:
    """Return whether the result is a view, or several, of the first argument. A cast may be one, or a copy."""
    if not function.is_view:
        return False
    if not isinstance(out, torch.Tensor):
        return True
    return out.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
