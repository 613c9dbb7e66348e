"""pair_loss: mixtures of losses, losses of one's own, weights of pairs and of tokens, other divergences."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irlfast import ops
from irlfast.ops.pair_loss import cpu_slab
from irlfast.ops.pair_loss.divergences import F_DIVERGENCES
from irlfast.ops.pair_loss.losses import PAIR_LOSSES
from tests.helpers.ops_cases import Recorder, gradients, looped_pair_loss, make
from tests.helpers.pair_loss_oracles import (
    ALPHA,
    OPTIONS,
    PAIR_LOSS_ORACLES,
    PER_TOKEN,
    options_of,
)
from tests.helpers.tiers import full

BACKENDS = ["plain", "cpu"]
WITH_REFERENCE = [name for name, kind in PAIR_LOSSES.items() if not kind.without_reference]
OF_MARGIN = [name for name, kind in PAIR_LOSSES.items() if kind.of_margin]
FORM = {"rows": True, "bias": True, "softcap": 2.0, "ignored": True, "reference": "hidden"}


def mixed(names: list[str]) -> dict[str, Any]:
    """The mixture of these losses, and their options, as arguments of ``pair_loss``."""
    used = {option for name in names for option in PAIR_LOSSES[name].options}
    return {"loss_type": names} | {option: OPTIONS[option] for option in used}


@st.composite
def mixtures(draw):
    """A small problem, pairs of its sequences, and a loss with everything that weighs it."""
    lengths = draw(st.lists(st.integers(0, 4), max_size=5))
    options = {name: draw(st.sampled_from(values)) for name, values in CASES.items()}
    case = make(lengths, vocabulary=4, size=3, seed=draw(st.integers(0, 99)), **options)
    sequence = st.integers(0, max(0, len(lengths) - 1))
    pairs = draw(st.lists(st.tuples(sequence, sequence), max_size=4 if lengths else 0))
    divergence = draw(st.sampled_from([*F_DIVERGENCES, *["reverse_kl"] * 3]))
    if divergence != "reverse_kl":  # the oracles' powers of log-ratios overflow beyond a few nats
        case["hidden"] = (case["hidden"].detach() * 0.1).requires_grad_()
    names = [*(OF_MARGIN if divergence != "reverse_kl" else WITH_REFERENCE if "ref_logps" in case else PAIR_LOSSES)]
    if any(name.startswith("ref_") for name in case):
        names = [name for name in names if name in WITH_REFERENCE]
    names = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
    weights = st.floats(-1, 1, width=16)
    loss = mixed(names) | {
        "beta": draw(st.sampled_from([0.1, 1.0])) if divergence == "reverse_kl" else 0.1,
        "nll_weight": draw(st.sampled_from([0.0, 0.5])),
        "loss_weights": draw(st.sampled_from([None, [draw(weights) for _ in names]])),
        "pair_weights": draw(st.sampled_from([None, torch.tensor([draw(weights) for _ in pairs]).double()])),
        "token_weights": draw(st.sampled_from([None, torch.tensor([draw(weights) for _ in case["targets"]]).double()])),
        "f_divergence_type": divergence,
        "f_alpha_divergence_coef": ALPHA,
    }
    return case, torch.tensor(pairs, dtype=torch.long).view(-1, 2), loss


CASES = {
    "rows": [False, True],
    "ignored": [False, True],
    "frozen": [False, True],
    "reference": ["none", "hidden", "token", "sequence"],
}


@pytest.mark.parametrize("as_functions", [False, True], ids=["names", "functions"])
def test_any_loss_matches_loops_over_tokens_and_pairs(as_functions):
    """As functions, the oracles themselves are given: those of losses that the function can compute."""

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mixtures(), st.sampled_from([1024, 1e-4, 1e-9]))
    def check(problem, buffer_mb):
        case, pairs, loss = problem
        given_loss = loss
        if as_functions:
            if loss["f_divergence_type"] != "reverse_kl" or set(loss["loss_type"]) & PER_TOKEN:
                return
            others = {name: value for name, value in loss.items() if name not in OPTIONS}
            given_loss = others | {"loss_type": [PAIR_LOSS_ORACLES[name] for name in loss["loss_type"]]}
        expected, pair_losses, ratio = looped_pair_loss(case, pairs, **loss)
        # A loss that does not reach a leaf (no pairs, no tokens) has gradient zero there.
        anchor = expected + sum(0 * leaf.sum() for leaf in case.values() if getattr(leaf, "requires_grad", False))
        exact = gradients(anchor, case)
        for backend in BACKENDS:
            result = ops.pair_loss(**case, pairs=pairs, **given_loss, backend=backend, buffer_mb=buffer_mb)
            torch.testing.assert_close(result.loss.detach(), expected.detach())
            torch.testing.assert_close(result.pair_losses, pair_losses.detach())
            torch.testing.assert_close(result.log_ratio, ratio.detach())
            for name, gradient in gradients(result.loss, case).items():
                torch.testing.assert_close(gradient, exact[name], rtol=1e-6, atol=1e-9)

    check()


# ---------------------------------------------------------------- documented properties


def test_a_mixture_is_the_weighted_sum_of_its_losses():
    case = make([3, 2, 4, 1], **FORM)
    names, weights = ["sigmoid", "bco_pair", "ipo"], [0.8, 0.2, -1.0]
    whole = ops.pair_loss(**case, **mixed(names), loss_weights=weights, beta=0.3)
    parts = [ops.pair_loss(**case, **options_of(name), beta=0.3) for name in names]
    total = sum(weight * part.loss for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(whole.loss, total)
    exact = gradients(total, case)
    for name, gradient in gradients(whole.loss, case).items():
        torch.testing.assert_close(gradient, exact[name])


def test_space_with_one_synthetic_answer_per_expert_is_bco_without_a_shift():
    case = make([3, 2, 4, 1], **FORM)
    losses = [ops.pair_loss(**case, beta=1.0, loss_type=name).pair_losses for name in ("space", "bco_pair")]
    torch.testing.assert_close(*losses)


def test_simpo_is_the_length_normalised_sigmoid_of_a_policy_without_reference():
    case = make([3, 2, 4, 1])
    simpo = ops.pair_loss(**case, beta=2.0, loss_type="simpo", simpo_gamma=0.0).pair_losses
    torch.testing.assert_close(simpo, ops.pair_loss(**case, beta=2.0, loss_type="sigmoid_norm").pair_losses)


def test_triplets_of_tspin_are_pairs_with_weights():
    """Each prompt has an expert's answer, a synthetic one, and one of the first policy."""
    case = make([3, 2, 4, 1, 5, 2])
    pairs, weights = torch.tensor([[0, 1], [3, 4], [1, 2], [4, 5]]), torch.tensor([1.0, 1.0, 0.3, 0.3])
    result = ops.pair_loss(**case, beta=0.5, pairs=pairs, pair_weights=weights, num_pairs=2)
    logps = ops.log_ratio(**case).policy_logps.view(2, 3)
    now, before = (0.5 * (logps[:, k] - logps[:, k + 1]) for k in range(2))
    expected = -(torch.nn.functional.logsigmoid(now) + 0.3 * torch.nn.functional.logsigmoid(before)).mean()
    torch.testing.assert_close(result.loss, expected)


def test_weights_of_tokens_weigh_log_ratios_and_not_the_likelihood_of_experts():
    case = make([3, 2, 4, 1], **FORM)
    weights = torch.rand(10, generator=torch.Generator().manual_seed(0))
    plain = ops.pair_loss(**case, beta=0.3)
    one, other = (ops.pair_loss(**case, beta=0.3, token_weights=weights * factor) for factor in (1, 2))
    torch.testing.assert_close(2 * one.log_ratio, other.log_ratio)
    torch.testing.assert_close(2 * one.policy_logps, other.policy_logps)
    assert torch.equal(one.nll_loss, plain.nll_loss)
    ratio = ops.log_ratio(**case, token_weights=weights)
    assert all(map(torch.equal, ratio[:3], (one.log_ratio, one.policy_logps, one.ref_logps)))
    assert torch.equal(ratio.token_logps, ops.log_ratio(**case).token_logps)


def test_weights_of_skipped_tokens_do_not_matter():
    case = make([3, 2, 4, 1], **FORM)
    weights = torch.where(case["targets"] < 0, float("nan"), 1.0)
    result = ops.pair_loss(**case, beta=0.3, token_weights=weights)
    assert all(map(torch.equal, result, ops.pair_loss(**case, beta=0.3)))
    assert all(gradient.isfinite().all() for gradient in gradients(result.loss, case).values())


def test_losses_of_pairs_carry_no_gradient_and_no_weights():
    case = make([3, 2, 4, 1])
    weights = torch.tensor([0.0, 2.0], requires_grad=True)
    result = ops.pair_loss(**case, beta=0.3, pair_weights=weights)
    assert torch.equal(result.pair_losses, ops.pair_loss(**case, beta=0.3).pair_losses)
    assert not result.pair_losses.requires_grad
    torch.testing.assert_close(result.loss, result.pair_losses[1])
    result.loss.backward()
    assert weights.grad is None


def test_a_function_takes_three_passes_over_the_head(monkeypatch):
    monkeypatch.setattr(cpu_slab, "kernels", lambda operands: cpu_slab.EXACT)  # the recorder counts PyTorch's products
    case = make([20, 12, 12, 20], vocabulary=300, dtype=torch.float32)
    with Recorder() as recorder:
        ops.pair_loss(**case, beta=0.1, loss_type=lambda y, s, beta: (beta * (y - s) - 1) ** 2).loss.backward()
    assert recorder.operations == 3 * 2 * 64 * 300 * 8


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    ("form", "names"),
    [
        pytest.param(FORM, ["hinge", "exo_pair", "ipo"], id="three losses"),
        pytest.param({}, list(PAIR_LOSSES), marks=full, id="all losses"),
        pytest.param({"frozen": True, "reference": "token"}, WITH_REFERENCE, marks=full, id="all losses, frozen head"),
    ],
)
def test_mixtures_compile_as_one_graph_of_any_length(form, names):
    def loss(case: dict, pair_weights: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        weights = {"pair_weights": pair_weights, "token_weights": token_weights}
        whole = ops.pair_loss(**case, **mixed(names), **weights, beta=0.3, nll_weight=0.1)
        return whole.loss + whole.pair_losses.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([5, 3, 2, 7], [3, 1, 8, 3, 4, 6]):
        case = make(lengths, vocabulary=33, dtype=torch.float32, **form)
        weights = torch.rand(len(lengths) // 2), torch.rand(sum(lengths))
        with torch._dynamo.config.patch(error_on_recompile=True):
            expected, actual = loss(case, *weights), compiled(case, *weights)
        assert torch.equal(actual, expected)
        exact = gradients(expected, case)
        for name, gradient in gradients(actual, case).items():
            assert torch.equal(gradient, exact[name]), name


@pytest.mark.parametrize("form", [{}, {"frozen": True, "reference": "token"}], ids=["full", "frozen"])
def test_a_function_is_called_between_two_graphs(form):
    case = make([5, 3, 2, 7], vocabulary=33, dtype=torch.float32, **form)

    def loss(case: dict) -> torch.Tensor:
        hidden = case["hidden"] * 2
        function = PAIR_LOSS_ORACLES["discopop"]
        return 3 * ops.pair_loss(**case | {"hidden": hidden}, beta=0.3, loss_type=function).loss

    torch.compiler.reset()
    expected, actual = loss(case), torch.compile(loss, backend="aot_eager")(case)
    torch.testing.assert_close(actual, expected)
    exact = gradients(expected, case)
    for name, gradient in gradients(actual, case).items():
        torch.testing.assert_close(gradient, exact[name])
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="loss_type of pair_loss is a function"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(copy.copy(case))


# ---------------------------------------------------------------- errors

MARGIN = "f_divergence_type: found 'forward_kl', expected 'reverse_kl' where loss_type is not 'sigmoid', .* 'sigmoid_"
ERRORS = {
    "no loss": ({"loss_type": []}, "loss_type: found 'none', expected at least one"),
    "a number": ({"loss_type": [3]}, "loss_type: found 3, expected the name of a loss, or a function"),
    "a loss that sorts": ({"loss_type": "aot"}, "loss_type: found 'aot', expected a loss per pair; this one sorts"),
    "a reference unused": ({"loss_type": "simpo", "ref_logps": torch.zeros(2)}, "loss_type: found 'simpo', .* no ref"),
    "weights of other losses": ({"loss_weights": [1, 2]}, "loss_weights: found '2 numbers', expected 1, one per loss"),
    "a weight that is infinite": ({"loss_weights": [float("inf")]}, "loss_weights: found inf, expected numbers"),
    "an option unused": ({"label_smoothing": 0.1}, "label_smoothing: found 0.1, .* where loss_type is not 'cdpo', 'ro"),
    "no smoothing": ({"loss_type": "exo_pair"}, "label_smoothing: found 0.0, expected a number > 0 where loss_type is"),
    "smoothing by a half": ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing: .* from 0 to 0.49"),
    "tau is 0": ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau: found 0.0, expected a number >= 1e-6"),
    "unknown divergence": ({"f_divergence_type": "kl"}, "f_divergence_type: found 'kl', expected 'reverse_kl', 'forw"),
    "alpha is text": ({"f_alpha_divergence_coef": "1"}, "f_alpha_divergence_coef: found '1', expected a number"),
    "no margin": ({"f_divergence_type": "forward_kl", "loss_type": "bco_pair"}, MARGIN),
    "a function": ({"f_divergence_type": "forward_kl", "loss_type": PAIR_LOSS_ORACLES["hinge"]}, MARGIN),
    "a loss per batch": (
        {"loss_type": lambda y, s, beta: (y - s).sum()},
        r"loss_type\(.*found \[\].* expected \[1\], as",
    ),
    "a loss of ranks": (
        {"loss_type": lambda y, s, beta: (y - s).sort().values ** 2, "pairs": torch.tensor([[0, 1], [1, 0]])},
        "loss_type: found function, expected a function that treats each pair by itself",
    ),
    "a loss of deviations": (
        {"loss_type": lambda y, s, beta: y - s.mean(), "pairs": torch.tensor([[0, 1], [1, 0]])},
        "loss_type: found function, expected a function that treats each pair by itself",
    ),
    "weights of more pairs": ({"pair_weights": torch.ones(2)}, r"pair_weights: found \[2\] .* expected \[1\], one per"),
    "weights of pairs are integers": (
        {"pair_weights": torch.ones(1).long()},
        r"pair_weights: .* expected \[P\] float32",
    ),
    "weights of more tokens": (
        {"token_weights": torch.ones(4)},
        r"token_weights: found \[4\] .* expected \[5\], as tar",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error_names_argument_and_what_was_found_and_expected(arguments, message, backend):
    with pytest.raises(ValueError, match=message):
        ops.pair_loss(**{"beta": 0.1, "backend": backend} | make([2, 3]) | arguments)
