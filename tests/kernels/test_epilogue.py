"""The pair slab with the exponential in the product's epilogue, and its gradient products over the heavy tiles."""

import pytest
import torch

from irlfast import ops
from irlfast.kernels import exponentials, heavy_tiles
from irlfast.ops.pair_loss import triton_slab
from tests.helpers.ops_cases import converted, gradients, make, random_pairs
from tests.helpers.tiers import covering_cases, first_then_full, full
from tests.kernels.test_pair_loss import DEVICE, FACTORS, LENGTHS, LOSS, STATISTICS, on_device

EPILOGUE = FACTORS | {"dtype": [torch.bfloat16], "vocabulary": [1, 7, 200, 1000, 3001], "skip_mass": [0.0, 1e-12]}


@pytest.fixture(autouse=True)
def epilogue(monkeypatch):
    monkeypatch.setattr(triton_slab, "EPILOGUE_BY_DEFAULT", True)


@pytest.mark.parametrize("factors", covering_cases(EPILOGUE, drawn=30))
def test_loss_and_gradients_match_the_oracle_in_fp64(factors):
    options = (*LOSS, "skip_mass")
    case = on_device(make(LENGTHS, **{name: value for name, value in factors.items() if name not in options}))
    pairs = None if factors["coupling"] == "default" else random_pairs(len(LENGTHS), seed=0).to(DEVICE)
    loss = {"pairs": pairs, "beta": 0.3, "loss_type": factors["loss_type"], "nll_weight": factors["nll_weight"]}
    double = converted(case, torch.float64)
    expected = ops.pair_loss(**double, **loss, backend="plain")
    buffer_mb = factors["rows_in_buffer"] * factors["vocabulary"] * 2 / 2**20
    actual = ops.pair_loss(**case, **loss, backend="triton", buffer_mb=buffer_mb, skip_mass=factors["skip_mass"])
    for name in ("loss", "nll_loss", *STATISTICS):
        torch.testing.assert_close(getattr(actual, name).double(), getattr(expected, name), rtol=1e-5, atol=3e-5)
    exact = gradients(expected.loss, double)
    for name, gradient in gradients(actual.loss, case).items():
        error, largest = (gradient.double() - exact[name]).abs().max(), exact[name].abs().max()
        assert error <= 2**-7 * largest + 1e-9, name


def exponentials_of(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernel's results for these logits [n, V], which must be exact in bf16, and its slab."""
    n, vocabulary = logits.shape
    slab = torch.full((n, -(-vocabulary // 16) * 16), torch.nan, dtype=torch.bfloat16, device=DEVICE)[:, :vocabulary]
    hidden = torch.eye(n, dtype=torch.bfloat16, device=DEVICE)
    weight = logits.T.to(DEVICE, torch.bfloat16).contiguous()
    results = exponentials.exponentials(hidden, weight, None, targets.to(DEVICE), slab, 1.0, None, True)
    return *(result.cpu() for result in results), slab.cpu()


@pytest.mark.parametrize("below", first_then_full([0, 30, 60, -20, -200]))
def test_log_probabilities_are_exact_to_6e_6_wherever_the_target_lies(below):
    """The target's logit is ``below`` the others', or above them, and less than 88 below the largest."""
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(40, 1000, generator=random) * 3).bfloat16().double()
    targets = torch.randint(1000, (40,), generator=random)
    logits.scatter_add_(1, targets[:, None], torch.full((40, 1), float(-below)).double())
    logits = logits.bfloat16().double()
    expected = logits.log_softmax(1)
    logps, v, sums, slab = exponentials_of(logits, targets)
    torch.testing.assert_close(logps.double(), expected.gather(1, targets[:, None]).squeeze(1), rtol=1e-7, atol=6e-6)
    derivatives = v[:, None].double() * slab.double()
    exact = torch.nn.functional.one_hot(targets, 1000) - expected.exp()
    torch.testing.assert_close(derivatives, exact, rtol=2**-8, atol=1e-15)
    assert sums.shape == (8, 40)


def test_a_target_far_below_the_others_is_computed_without_exponentials_in_the_epilogue(monkeypatch):
    case = on_device(make([40, 23], vocabulary=1000, size=64, dtype=torch.bfloat16))
    with torch.no_grad():
        case["hidden"] *= 60
    logps, *_ = exponentials_of((case["hidden"] @ case["weight"].T).detach()[:8], case["targets"][:8].cpu())
    assert logps.isinf().any()
    actual = ops.pair_loss(**case, beta=0.3, backend="triton")
    monkeypatch.setattr(triton_slab, "EPILOGUE_BY_DEFAULT", False)
    expected = ops.pair_loss(**case, beta=0.3, backend="triton")
    assert torch.equal(actual.policy_logps, expected.policy_logps)
    exact = gradients(expected.loss, case)
    assert all(torch.equal(gradient, exact[name]) for name, gradient in gradients(actual.loss, case).items())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("buffer_mb", [1024, 0.01])  # 0.01: five rows, fewer than a pair has
def test_a_policy_equal_to_its_reference_has_ratio_zero(buffer_mb, frozen):
    case = on_device(make(LENGTHS, vocabulary=1000, size=64, rows=True, dtype=torch.bfloat16, frozen=frozen))
    same = {"ref_hidden": case["hidden"].detach(), "ref_weight": case["weight"].detach(), "buffer_mb": buffer_mb}
    assert ops.pair_loss(**case, **same, beta=0.1, backend="triton").log_ratio.eq(0).all()


def test_a_target_outside_the_vocabulary_is_nan_and_writes_nothing():
    memory = torch.zeros(4, 16, dtype=torch.bfloat16, device=DEVICE)
    hidden, weight = torch.eye(2, dtype=torch.bfloat16, device=DEVICE), memory.new_ones(16, 2)
    targets = torch.tensor([3, 16 + 2], device=DEVICE)  # the second would write to the row below
    logps, *_ = exponentials.exponentials(hidden, weight, None, targets, memory[:2], 1.0, None, True)
    assert logps.isnan().tolist() == [False, True]
    assert memory[2:].eq(0).all()


# ---------------------------------------------------------------- products over the heavy tiles


def confident(spread: float = 2.0) -> dict:
    """A case whose probability is on few tiles of the vocabulary, as in a trained model: rare tokens have high ids."""
    case = make([60, 40, 30, 70], vocabulary=4000, size=64, dtype=torch.float64, rows=True)
    case["hidden"] = (case["hidden"].detach() * spread).requires_grad_()
    case["bias"] = torch.linspace(0, -80, 4000).double()
    case["targets"] = case["targets"] % 500
    return on_device(converted(case, torch.bfloat16))


PAIRS = torch.tensor([[0, 1], [0, 2], [3, 1]])  # the sequences' derivatives differ


@pytest.mark.parametrize("skip_mass", first_then_full([1e-3, 1e-6, 0.1]))
def test_the_error_of_skipping_is_within_its_bound(skip_mass):
    case = confident()
    loss = {"pairs": PAIRS.to(DEVICE), "beta": 0.3, "loss_type": "linear", "backend": "triton"}
    runs = [ops.pair_loss(**case, **loss, skip_mass=value) for value in (1e-30, skip_mass)]
    assert torch.equal(runs[0].policy_logps, runs[1].policy_logps)
    exact, actual = (gradients(run.loss, case) for run in runs)
    limit = skip_mass * 0.3 * 2 / 3  # sequences 0 and 1 are in two of three pairs
    # A hidden row is used by as many tokens as rows says; each leaves out at most every tile.
    uses = case["rows"].bincount(minlength=len(case["hidden"]))
    lost = (actual["hidden"] - exact["hidden"]).double().norm(dim=1)
    bound = uses * limit * -(-4000 // 128) * case["weight"].norm(dim=1).max()
    assert (lost <= bound + 2**-7 * exact["hidden"].norm(dim=1)).all()
    lost = (actual["weight"] - exact["weight"]).double().norm(dim=1)
    bound = limit * case["hidden"][case["rows"]].norm(dim=1).sum()
    assert (lost <= bound + 2**-7 * exact["weight"].norm(dim=1)).all()
    left_out, underflown = (weight.eq(0).all(1).sum() for weight in (actual["weight"], exact["weight"]))
    assert left_out > underflown + 1000


@full
def test_sums_over_the_heavy_tiles_are_deterministic():
    case = confident()
    case["rows"], case["hidden"] = None, case["hidden"].detach()[case["rows"]].requires_grad_()
    loss = {"beta": 0.3, "backend": "triton", "skip_mass": 0.1, "buffer_mb": 0.6}  # two slabs
    first, second = (gradients(ops.pair_loss(**case, **loss).loss, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@full
def test_a_head_that_lies_in_columns_gets_the_same_gradients():
    case = confident()
    loss = {"beta": 0.3, "backend": "triton", "skip_mass": 1e-3, "buffer_mb": 0.6}
    expected = gradients(ops.pair_loss(**case, **loss).loss, case)
    case |= {name: case[name].detach().T.contiguous().T.requires_grad_() for name in ("hidden", "weight")}
    actual = gradients(ops.pair_loss(**case, **loss).loss, case)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_skipping_loses_no_nan():
    case = confident()
    with torch.no_grad():
        hidden = case["hidden"].clone()
        hidden[case["rows"][70]] = float("nan")
    case["hidden"] = hidden.requires_grad_()
    result = ops.pair_loss(**case, beta=0.3, backend="triton", skip_mass=0.1)
    gradient = gradients(result.loss, case)["hidden"]
    assert gradient[case["rows"][70]].isnan().all()


@pytest.mark.parametrize(("n", "vocabulary"), [(1, 1), (64, 128), (70, 129), (200, 3000)])
def test_lists_have_exactly_the_tiles_that_weigh_more_than_the_limit(n, vocabulary):
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(n, vocabulary, generator=random) * 6).bfloat16()
    targets, g = torch.randint(vocabulary, (n,), generator=random), torch.randn(n, generator=random)
    logps, v, sums, _ = exponentials_of(logits, targets)
    scale, skip_mass = 0.5, 0.01
    inputs = (tensor.to(DEVICE) for tensor in (sums, logps, targets, v * scale * g, g))
    heavy = heavy_tiles.heavy_tiles(*inputs, scale, skip_mass)

    derivatives = torch.nn.functional.one_hot(targets, vocabulary) - logits.double().softmax(1)
    weights = (g[:, None] * derivatives).abs()
    weights = torch.nn.functional.pad(weights, (0, -vocabulary % 128, 0, -n % 64))
    mass = weights.view(-1, 64, weights.shape[1] // 128, 128).sum(3).amax(1)
    expected = mass > skip_mass * g.abs().max()
    assert ((mass / (skip_mass * g.abs().max()) - 1).abs() > 1e-3).all()  # none is at the limit
    for lists, counts, rows in ((heavy[0], heavy[1], expected), (heavy[2], heavy[3], expected.T)):
        assert [row[:count].tolist() for row, count in zip(lists, counts.tolist(), strict=True)] == [
            row.nonzero().flatten().tolist() for row in rows
        ]


def test_a_batch_without_scored_tokens_has_a_gradient_of_zeros():
    case = confident()
    case["targets"].fill_(-100)
    result = ops.pair_loss(**case, beta=0.3, backend="triton", skip_mass=0.1)
    assert all(gradient.eq(0).all() for gradient in gradients(result.loss, case).values())
