"""The triton backend of reward_head and discriminator_loss against the oracle in fp64, and documented properties."""

import itertools
from typing import Any

import pytest
import torch

from irlfast import ops
from irlfast.ops.rewards import custom_op
from irlfast.ops.rewards.losses import Options
from tests.helpers.ops_cases import random_pairs, sequences
from tests.helpers.reward_cases import FORMS, LENGTHS, PAIRED, POOLINGS, gradients, in_fp64, labels_of, make, options_of
from tests.helpers.tiers import full, sweep
from tests.kernels.device import DEVICE
from tests.ops.test_rewards import check_autocast_and_checkpointing, check_bf16, check_compiled

DTYPES = [torch.float32, torch.bfloat16]


def check_gradients(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    half_ulp = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    sizes = {name: x.abs().max().item() if x.numel() else 0 for name, x in exact.items()}
    sizes["bias"] = max(sizes.values())  # a pair's two parts of it cancel
    for name, expected in exact.items():
        assert actual[name].dtype == dtype
        assert actual[name].isfinite().all()
        error = (actual[name].double() - expected).abs()
        assert (error <= expected.abs() * half_ulp * 1.01 + 1e-4 * sizes[name] + 1e-30).all(), name


def check_head(case: dict[str, Any], pooling: str) -> None:
    double = in_fp64(case)
    expected = ops.reward_head(**double, pooling=pooling, backend="plain")
    actual = ops.reward_head(**case, pooling=pooling, backend="triton")
    assert actual.dtype == torch.float32
    largest = expected.detach().abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6 * largest)
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = gradients((expected * upstream).sum(), double)
    check_gradients(gradients((actual * upstream).sum(), case), exact, case["hidden"].dtype)


def check_loss(case: dict[str, Any], **inputs: Any) -> ops.DiscriminatorLoss:
    double = in_fp64(case)
    exact = ops.discriminator_loss(**double, **inputs, backend="plain")
    actual = ops.discriminator_loss(**case, **inputs, backend="triton")
    apart = 1e-6 * max(1, exact.logits.abs().max().item() if exact.logits.numel() else 0)  # of logits, by fp32 sums
    torch.testing.assert_close(actual.logits.double(), exact.logits, rtol=1e-5, atol=apart)
    # An exponential of h errs relatively by as much as h does absolutely.
    torch.testing.assert_close(actual.reward.double(), exact.reward, rtol=1e-5 + 3 * apart, atol=apart)
    torch.testing.assert_close(actual.loss.double(), exact.loss, rtol=1e-5 + 3 * apart, atol=apart)
    check_gradients(gradients(actual.loss, case), gradients(exact.loss, double), case["hidden"].dtype)
    return actual


# ---------------------------------------------------------------- results and gradients


@sweep(dtype=DTYPES, size=[8, 64, 96, 512, 1000], heads=[1, 3, 8, 16], pooling=POOLINGS)
def test_heads_match_the_oracle_in_fp64(dtype, size, heads, pooling):
    both = heads in (3, 8)
    check_head(make(LENGTHS, size=size, heads=heads, dtype=dtype, rows=both, bias=both, device=DEVICE), pooling)


@sweep(full, form=FORMS, dtype=DTYPES)
def test_losses_match_the_oracle_in_fp64(form, dtype):
    name, pooling = form
    for rows, heads in ((False, 3), (True, 1)):
        case = make(LENGTHS, size=40, heads=heads, dtype=dtype, rows=rows, bias=rows, device=DEVICE)
        check_loss(case, labels=labels_of(LENGTHS, DEVICE), pooling=pooling, **options_of(name))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 1], [1, 0], [63, 0], [0, 0, 2, 0, 0, 61]], ids=str)
def test_empty_and_tiny_inputs_match_the_oracle(lengths):
    for index, (name, pooling) in enumerate(FORMS):
        case = make(lengths, rows=index // 2 % 2 == 0, dtype=torch.float32, device=DEVICE)
        if name in ("bce", "bradley_terry"):
            check_head(case, pooling)
        if name != "bradley_terry" or len(lengths) % 2 == 0:
            inputs = {"labels": labels_of(lengths, DEVICE), "pooling": pooling}
            pairs = torch.zeros(0, 2).long().to(DEVICE) if len(lengths) % 2 and name in PAIRED else None
            check_loss(case, **inputs, pairs=pairs, **options_of(name))


@pytest.mark.parametrize(("name", "pooling"), [("gail", "token"), ("alpha", "last"), ("bradley_terry", "last")])
def test_many_sequences_are_counted_and_found(name, pooling):
    """There are more than a program counts per iteration, and more than the small blocks take."""
    lengths = torch.randint(0, 4, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    case = make(lengths, rows=False, dtype=torch.float32, device=DEVICE)
    check_loss(case, labels=labels_of(lengths, DEVICE), pooling=pooling, **options_of(name))


def test_sequences_of_thousands_of_tokens_match_the_oracle():
    lengths = [3000, 0, 5000, 200]
    case = make(lengths, heads=2, rows=False, dtype=torch.float32, device=DEVICE)
    case["hidden"].requires_grad_(False)
    loss, expected = (
        ops.discriminator_loss(**c, labels=labels_of(lengths, DEVICE), pooling="token", kind="fairl", backend=backend)
        for c, backend in ((case, "triton"), (in_fp64(case), "plain"))
    )
    for actual, exact in zip(loss, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_may_share_sequences_and_leave_some_out(name):
    case = make(LENGTHS, dtype=torch.float32, device=DEVICE)
    for seed, dtype in itertools.product(range(4), (torch.int32, torch.int64)):
        pairs = random_pairs(len(LENGTHS), seed, pairs=seed * 7).to(DEVICE, dtype)
        actual = check_loss(case, labels=None, pairs=pairs, **options_of(name))
        torch.testing.assert_close(actual.logits, ops.reward_head(**case, backend="triton"), rtol=1e-6, atol=1e-6)


@sweep(full, form=FORMS, clamp=[20.0, 80.0])
def test_logits_of_80_match_the_oracle(form, clamp):
    name, pooling = form
    case = make(LENGTHS, rows=False, bias=False, dtype=torch.float32, largest=80.0, device=DEVICE)
    inputs = {"labels": labels_of(LENGTHS, DEVICE), "pooling": pooling} | options_of(name)
    result = check_loss(case, **inputs, clamp=clamp)
    assert all(x.isfinite().all() for x in result)


def test_small_rewards_and_slopes_keep_their_digits():
    """Near h = 0 and far below it: neither exp(h) − 1 nor log(1 + exp(h)) may cancel."""
    h = torch.tensor([-80, -40, -20, -5, -0.5, -1e-3, -1e-6, 0, 1e-6, 1e-3, 0.5, 5, 20], device=DEVICE)
    case = {"hidden": h[:, None], "head": torch.ones(1, 1, device=DEVICE)}
    case |= {"cu_seqlens": sequences([1] * len(h)).to(DEVICE), "labels": torch.zeros(len(h), device=DEVICE)}
    for options in (
        {"kind": "gail"},
        {"kind": "fairl"},
        {"kind": "alpha", "alpha": 0.3},
        {"kind": "alpha", "alpha": 0.999},
    ):
        actual = ops.discriminator_loss(**case, **options, backend="triton").reward[:, 0]
        expected = ops.discriminator_reward(h.double(), **options)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_bf16_errs_less_than_pytorch_does(pooling):
    check_bf16("triton", pooling, DEVICE)


def test_fp16_matches_the_oracle():
    case = make(LENGTHS, size=64, dtype=torch.float16, device=DEVICE)
    for pooling in POOLINGS:
        check_head(case, pooling)
        check_loss(case, labels=labels_of(LENGTHS, DEVICE), pooling=pooling)


def test_tensors_may_lie_in_memory_in_any_way():
    case = make(LENGTHS, size=16, dtype=torch.float32, device=DEVICE)
    expected = ops.reward_head(**case, backend="triton")
    case["hidden"], case["head"] = (case[name].detach().T.contiguous().T for name in ("hidden", "head"))
    case["rows"] = case["rows"].int().repeat_interleave(2)[::2]
    case["bias"] = case["bias"].detach().repeat_interleave(2)[::2]
    assert torch.equal(ops.reward_head(**case, backend="triton"), expected)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_nan_stays_in_its_sequence(pooling, value):
    lengths = [2, 2, 2, 2]
    case = make(lengths, rows=False, dtype=torch.float32, device=DEVICE)
    clean = ops.reward_head(**case, pooling=pooling, backend="triton")
    case["hidden"].data[3] = value  # the last token of the second sequence
    own = 3 if pooling == "token" else 1
    others = [n for n in range(len(clean)) if n != own]
    actual = ops.reward_head(**case, pooling=pooling, backend="triton")
    assert torch.equal(actual[others], clean[others]) and not actual[own].isfinite().any()
    # Nor does it reach the gradients of a loss that leaves its sequence alone.
    assert all(x.isfinite().all() for x in gradients(actual[others].sum(), case).values())
    for name, form in FORMS:
        if form == pooling:
            inputs = {"labels": labels_of(lengths, DEVICE), "pooling": pooling, "backend": "triton"} | options_of(name)
            result = ops.discriminator_loss(**case, **inputs)
            assert result.reward[others].isfinite().all() and not result.reward[own].isfinite().all()
            kept = [n for n in range(8) if n != 3 and not (n == 1 and name in PAIRED)]
            assert gradients(result.loss, case)["hidden"][kept].isfinite().all()
            if value != value:
                assert result.loss.isnan()


@pytest.mark.parametrize("frozen", [("hidden",), ("head",), ("head", "bias"), ("hidden", "bias")], ids=str)
def test_a_frozen_tensor_has_no_gradient_and_changes_no_other(frozen):
    case, labels = make(LENGTHS, dtype=torch.float32, device=DEVICE), labels_of(LENGTHS, DEVICE)
    whole = gradients(ops.discriminator_loss(**case, labels=labels, backend="triton").loss, case)
    for name in frozen:
        case[name].requires_grad_(False)
    ops.discriminator_loss(**case, labels=labels, backend="triton").loss.backward()
    for name, gradient in whole.items():
        assert case[name].grad is None if name in frozen else torch.equal(case[name].grad, gradient)


def test_gradient_scales_with_the_upstream_gradient_and_can_be_taken_twice():
    case, labels = make(LENGTHS, dtype=torch.float32, device=DEVICE), labels_of(LENGTHS, DEVICE)
    loss = ops.discriminator_loss(**case, labels=labels, backend="triton").loss
    leaves = [case[name] for name in ("hidden", "head", "bias")]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    four = torch.autograd.grad(4 * loss, leaves)
    assert all(torch.equal(4 * a, b) for a, b in zip(once, four, strict=True))


def test_without_gradients_the_loss_carries_none():
    case = {
        name: x if x is None else x.detach() for name, x in make(LENGTHS, device=DEVICE, dtype=torch.float32).items()
    }
    assert not ops.discriminator_loss(**case, labels=labels_of(LENGTHS, DEVICE), backend="triton").loss.requires_grad


# ---------------------------------------------------------------- registration and compilation


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("token", [False, True])
def test_torch_accepts_the_registered_operations(token, rows):
    case = make(LENGTHS, dtype=torch.float32, rows=rows, device=DEVICE)
    inputs = case["hidden"], case["head"], case["bias"], case["rows"], case["cu_seqlens"]
    torch.library.opcheck(custom_op.head_logits, (*inputs, token))
    labels = labels_of(LENGTHS, DEVICE) != 0
    torch.library.opcheck(custom_op.discriminate, (*inputs, labels, None, token, *Options("alpha", 0.3)))
    if not token:
        pairs = random_pairs(len(LENGTHS), 0).to(DEVICE)
        options = Options("bradley_terry", label_smoothing=0.1)
        torch.library.opcheck(custom_op.discriminate, (*inputs, None, pairs, token, *options))
    slopes = torch.randn(len(case["hidden"]), 3, device=DEVICE)
    for wanted in ([True, True, True], [False, True, False]):
        leaves = case["hidden"].detach(), case["head"].detach(), slopes
        torch.library.opcheck(custom_op.gradients, (*leaves, torch.tensor(2.0, device=DEVICE), wanted))


def test_compiles_as_one_graph_of_any_length():
    check_compiled("triton", DEVICE)


def test_autocast_changes_nothing_and_activations_may_be_recomputed():
    check_autocast_and_checkpointing("triton", DEVICE)


def test_fp64_and_more_than_64_heads_are_refused():
    case = make([2, 3], device=DEVICE)
    with pytest.raises(ValueError, match=r"hidden: found .*float64.*by backend 'triton'"):
        ops.reward_head(**case, backend="triton")
    case = make([2, 3], heads=65, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match=r"head: found \[65, 6\].*at most 64 heads by backend 'triton'"):
        ops.reward_head(**case, backend="triton")
