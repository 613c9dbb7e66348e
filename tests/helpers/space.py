"""Calls of every operation, drawn from the space of layouts in memory, dtypes, options and settings of the process.

A call's results and gradients are held against the plain backend's in fp64, on contiguous copies of the same values and
without the settings.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from irlfast import ops
from tests.helpers import divergence_cases, ops_cases, reward_cases
from tests.helpers.ops_cases import random_pairs

LENGTHS = [5, 3, 0, 7, 1, 0, 4, 6]
VOCABULARY = 37


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x


def offset(x: torch.Tensor) -> torch.Tensor:
    """It starts where no vector of several elements is aligned."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def strided(x: torch.Tensor) -> torch.Tensor:
    """Every second element of memory."""
    return x.new_empty(*x.shape, 2)[..., 0].copy_(x)


def padded(x: torch.Tensor) -> torch.Tensor:
    """Rows that are further apart than they are long."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] + 3)[..., : x.shape[-1]].copy_(x)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Column-major."""
    return x.T.contiguous().T if x.dim() == 2 else strided(x)


def expanded(x: torch.Tensor) -> torch.Tensor:
    """The first row for every row, without memory of its own."""
    return x[:1].expand(x.shape)


def expanded_along_rows(x: torch.Tensor) -> torch.Tensor:
    """The first element of each row for every element of it, without memory of its own."""
    return x[..., :1].expand(x.shape)


COPIES = [contiguous, offset, strided, padded, transposed]
LAYOUTS = [*COPIES, expanded, expanded_along_rows]


@contextlib.contextmanager
def settings_of(factors: dict[str, Any]) -> Iterator[None]:
    """torch's default dtype and default device during the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(factors["default_dtype"])
    try:
        with contextlib.nullcontext() if factors["default_device"] is None else torch.device(factors["default_device"]):
            yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "default_dtype": [torch.float32, torch.bfloat16, torch.float64, torch.float16],
    "default_device": [None, "meta"],
}


class Operation(NamedTuple):
    arguments: Callable[[dict[str, Any]], dict[str, Any]]  # of the factors
    outputs: Callable[..., list[torch.Tensor]]  # of the arguments and the backend; those with a gradient come first
    factors: dict[str, list[Any]]  # its options, and the layouts of its tensors


def linear_arguments(factors: dict[str, Any]) -> dict[str, Any]:
    options = {name: factors[name] for name in ("dtype", "softcap", "reference", "frozen", "ignored")}
    return ops_cases.make(LENGTHS, vocabulary=VOCABULARY, size=8, rows=True, bias=True, scale=0.7, **options) | {
        "buffer_mb": factors["rows_in_buffer"] * VOCABULARY * 4 / 2**20
    }


def pair_arguments(factors: dict[str, Any]) -> dict[str, Any]:
    loss = {"beta": 0.3, "nll_weight": 0.2, "skip_mass": factors["skip_mass"]}
    return linear_arguments(factors) | {"pairs": random_pairs(len(LENGTHS), seed=0)} | loss


def logits_arguments(factors: dict[str, Any]) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    case: dict[str, Any] = {
        name: (3 * torch.randn(sum(LENGTHS), VOCABULARY, generator=random)).to(factors["dtype"])
        for name in ("logits", "ref_logits")
    }
    case["logits"].requires_grad_()
    case["targets"] = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=random)
    case["targets"][::5] = -100
    case["inplace_backward"], case["logit_softcap"] = factors["inplace"], factors["softcap"]
    return case


def ratio_arguments(factors: dict[str, Any]) -> dict[str, Any]:
    case = logits_arguments(factors) | {"cu_seqlens": ops_cases.sequences(LENGTHS)}
    if factors["reference"] != "logits":
        del case["ref_logits"]
    if factors["reference"] in ("token", "sequence"):
        count = sum(LENGTHS) if factors["reference"] == "token" else len(LENGTHS)
        case["ref_logps"] = -torch.rand(count, generator=torch.Generator().manual_seed(1)).to(factors["dtype"])
    return case


def token_arguments(factors: dict[str, Any]) -> dict[str, Any]:
    case = logits_arguments(factors)
    del case["ref_logits"]
    return case


def head_arguments(factors: dict[str, Any]) -> dict[str, Any]:
    return reward_cases.make(LENGTHS, dtype=factors["dtype"]) | {"pooling": factors["pooling"]}


def discriminator_arguments(factors: dict[str, Any]) -> dict[str, Any]:
    name, pooling = factors["form"]
    case = head_arguments(factors | {"pooling": pooling}) | reward_cases.options_of(name)
    paired = name in reward_cases.PAIRED
    pairs = random_pairs(len(LENGTHS), seed=1) if paired else None
    return case | {"labels": None if paired else reward_cases.labels_of(LENGTHS), "pairs": pairs}


def pair_outputs(backend: str, **arguments: Any) -> list[torch.Tensor]:
    return list(ops.pair_loss(**arguments, backend=backend))


def log_ratio_outputs(backend: str, **arguments: Any) -> list[torch.Tensor]:
    return list(ops.log_ratio(**arguments, backend=backend)[:4])


def statistics_from_hidden_outputs(backend: str, **arguments: Any) -> list[torch.Tensor]:
    return list(ops.log_ratio(**arguments, token_statistics=True, backend=backend))


def token_outputs(backend: str, **arguments: Any) -> list[torch.Tensor]:
    return [ops.token_logps(**arguments, backend=backend)]


def statistics_outputs(backend: str, **arguments: Any) -> list[torch.Tensor]:
    return list(ops.token_statistics(**arguments, backend=backend))


def divergence_arguments(factors: dict[str, Any]) -> dict[str, Any]:
    options = {name: factors[name] for name in ("kind", "dtype", "softcap", "frozen", "top_k", "rows_in_buffer")}
    return divergence_cases.make(**options, vocabulary=VOCABULARY, rows=factors["chosen"], bias=True, scale=0.7)


def divergence_outputs(backend: str, **arguments: Any) -> list[torch.Tensor]:
    return [ops.token_divergence(**arguments, backend=backend)]


def logits_ratio_outputs(backend: str, **arguments: Any) -> list[torch.Tensor]:
    return list(ops.logits_log_ratio(**arguments, backend=backend)[:4])


def head_outputs(backend: str, **arguments: Any) -> list[torch.Tensor]:
    return [ops.reward_head(**arguments, backend=backend)]


def discriminator_outputs(backend: str, **arguments: Any) -> list[torch.Tensor]:
    return list(ops.discriminator_loss(**arguments, backend=backend))


LINEAR: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16],
    "softcap": [None, 2.0],
    "reference": ["none", "hidden", "token", "sequence"],
    "frozen": [False, True],
    "ignored": [False, True],
    "rows_in_buffer": [10**6, 9, 1],
    "weight": [*COPIES, expanded_along_rows],  # with all rows equal, the gradient by hidden would be 0 and its rounding
    **dict.fromkeys(("hidden", "bias", "targets", "rows", "upstream"), LAYOUTS),
    **dict.fromkeys(("ref_hidden", "ref_weight", "ref_bias", "ref_logps"), LAYOUTS),
    "cu_seqlens": COPIES,
}
LOGITS: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "softcap": [None, 3.0],
    "inplace": [False, True],
    **dict.fromkeys(("logits", "targets", "upstream"), LAYOUTS),
}
HEADS: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16],
    "pooling": reward_cases.POOLINGS,
    **dict.fromkeys(("hidden", "head", "bias", "rows", "upstream"), LAYOUTS),
    "cu_seqlens": COPIES,
}
OPERATIONS = {
    "pair_loss": Operation(pair_arguments, pair_outputs, LINEAR | {"pairs": LAYOUTS, "skip_mass": [0.0, 1e-12]}),
    "log_ratio": Operation(linear_arguments, log_ratio_outputs, LINEAR),
    "token_logps": Operation(token_arguments, token_outputs, LOGITS),
    "logits_log_ratio": Operation(
        ratio_arguments,
        logits_ratio_outputs,
        LOGITS
        | {"reference": ["none", "logits", "token", "sequence"], "cu_seqlens": COPIES}
        | dict.fromkeys(("ref_logits", "ref_logps"), LAYOUTS),
    ),
    "log_ratio with token_statistics": Operation(linear_arguments, statistics_from_hidden_outputs, LINEAR),
    "token_statistics": Operation(token_arguments, statistics_outputs, LOGITS),
    "token_divergence": Operation(
        divergence_arguments,
        divergence_outputs,
        {name: divergence_cases.FACTORS[name] for name in ("kind", "softcap", "frozen", "top_k", "rows_in_buffer")}
        | {name: LINEAR[name] for name in ("dtype", "hidden", "weight", "bias", "rows", "upstream")}
        | {"chosen": ["both", "reference", "none"], "ref_rows": LAYOUTS}
        | dict.fromkeys(("ref_hidden", "ref_weight", "ref_bias"), COPIES),  # equal logits have no top k
    ),
    "reward_head": Operation(head_arguments, head_outputs, HEADS),
    "discriminator_loss": Operation(
        discriminator_arguments,
        discriminator_outputs,
        HEADS | {"form": reward_cases.FORMS, "labels": LAYOUTS, "pairs": LAYOUTS},
    ),
}


def placed(arguments: dict[str, Any], factors: dict[str, Any], device: str) -> dict[str, Any]:
    """The tensors on the device, each in its layout, as new leaves."""
    return {
        name: factors[name](value.detach().to(device)).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }


def copied_in_fp64(arguments: dict[str, Any]) -> dict[str, Any]:
    """Contiguous copies, as new leaves."""
    copies: dict[str, Any] = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            copy = value.detach().clone(memory_format=torch.contiguous_format)
            copies[name] = (copy.double() if copy.is_floating_point() else copy).requires_grad_(value.requires_grad)
    return copies


def gradients(outputs: list[torch.Tensor], leaves: list[torch.Tensor], layout: Callable) -> list[torch.Tensor]:
    """The gradients of a sum of the outputs, each with its own upstream gradient in this layout."""
    outputs = [output for output in outputs if output.requires_grad]
    random = torch.Generator().manual_seed(2)
    upstream = []
    for output in outputs:
        values = torch.randn(output.shape or (1,), generator=random, dtype=torch.float64, device="cpu")
        given = layout(values.to(output.device, output.dtype))
        upstream.append(given if output.dim() else given[0])
    return list(torch.autograd.grad(outputs, leaves, upstream, allow_unused=True))


# The slopes of these operations cancel in their product with the weight, which takes them in the weight's dtype.
CANCELLING = ("log_ratio with token_statistics", "token_divergence")


def sum_of_magnitudes(operation: Operation, case: dict[str, Any], upstream: Callable) -> float:
    """The largest Σ |slope| · |weight| of a number of d hidden, by the slopes ``[N, V]`` of the tokens' logits."""
    hidden, weight = case["hidden"].detach(), case["weight"].detach()
    on = {"device": hidden.device}
    tokens = torch.arange(len(hidden), **on) if case.get("rows") is None else case["rows"].long()
    logits = hidden[tokens] @ weight.T
    logits = logits if case["bias"] is None else logits + case["bias"].detach()
    per_token = {"hidden": logits.requires_grad_(), "weight": torch.eye(len(weight), dtype=torch.float64, **on)}
    per_token |= {"bias": None, "rows": None}
    if case.get("ref_hidden") is not None:
        ref_rows = case.get("ref_rows")
        per_token["ref_hidden"] = case["ref_hidden"][tokens if ref_rows is None else ref_rows.long()]
    if "ref_rows" in case:
        per_token["ref_rows"] = None
    [slopes] = gradients(operation.outputs("plain", **case | per_token), [logits], upstream)
    sums = torch.zeros_like(hidden).index_add(0, tokens, slopes.abs() @ weight.abs())
    return float(sums.max())


def check_call(name: str, factors: dict[str, Any], backend: str, device: str) -> None:
    operation = OPERATIONS[name]
    if backend != "triton":
        factors = factors | {"skip_mass": 0.0}
    if factors.get("logits") not in (contiguous, offset, padded):
        factors = factors | {"inplace": False}  # no gradient can be written there
    arguments = placed(operation.arguments(factors), factors, device)
    double = copied_in_fp64(arguments)
    leaves, exact_leaves = (
        [value for value in case.values() if getattr(value, "requires_grad", False)] for case in (arguments, double)
    )
    expected = operation.outputs("plain", **double)
    exact = gradients(expected, exact_leaves, factors["upstream"])
    with settings_of(factors):
        actual = operation.outputs(backend, **arguments)
        computed = gradients(actual, leaves, factors["upstream"])
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=3e-5)
    for leaf, gradient, right in zip(leaves, computed, exact, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        half_ulp = 0 if leaf.dtype == torch.float32 else torch.finfo(leaf.dtype).eps
        # Products in 16 bits round both operands; the sum is rounded to the tensor's dtype.
        bound = right.abs().max() * (1e-4 + half_ulp) + 1e-9
        if name in CANCELLING and backend == "triton" and leaf is arguments["hidden"]:
            bound += half_ulp / 2 * sum_of_magnitudes(operation, double, factors["upstream"])
        assert (gradient.double() - right).abs().max() <= bound
