"""log_ratio and pair_loss on a GPU: each backend against the oracle in fp64, and documented properties."""

import pytest
import torch
import triton
import triton.language as tl

from irlfast import ops
from irlfast.kernels.linear import grouped
from irlfast.ops.common import checks
from irlfast.ops.common.types import IGNORE
from irlfast.ops.pair_loss.losses import PAIR_LOSSES
from tests.helpers.ops_cases import converted, gradients, make, random_pairs
from tests.helpers.pair_loss_oracles import PAIR_LOSS_ORACLES
from tests.helpers.tiers import covering_cases, full
from tests.kernels.device import DEVICE, on_device

LENGTHS = [5, 3, 0, 7, 1, 0, 4, 6]
FACTORS = {
    "dtype": [torch.float32, torch.bfloat16],
    "vocabulary": [1, 7, 1000, 32000, 50304],
    "size": [8, 64, 96],
    "rows": [False, True],
    "bias": [False, True],
    "scale": [1.0, 0.3],
    "softcap": [None, 30.0, 2.0],
    "ignored": [False, True],
    "reference": ["none", "hidden", "token", "sequence"],
    "frozen": [False, True],
    "loss_type": ["sigmoid", "hinge", "nca_pair", "ipo"],
    "nll_weight": [0.0, 0.3],
    "coupling": ["default", "random"],
    "rows_in_buffer": [1, 9, 10**6],
}
LOSS = ("loss_type", "nll_weight", "coupling", "rows_in_buffer")
STATISTICS = ("log_ratio", "policy_logps", "ref_logps")


@pytest.mark.parametrize("factors", covering_cases(FACTORS, drawn=60))
def test_pair_loss_matches_the_oracle_in_fp64(factors, backend):
    case = make(LENGTHS, **{name: value for name, value in factors.items() if name not in LOSS})
    case = on_device(case)
    pairs = None if factors["coupling"] == "default" else random_pairs(len(LENGTHS), seed=0).to(DEVICE)
    loss = {"pairs": pairs, "beta": 0.3, "loss_type": factors["loss_type"], "nll_weight": factors["nll_weight"]}
    double = converted(case, torch.float64)
    expected = ops.pair_loss(**double, **loss, backend="plain")
    buffer_mb = factors["rows_in_buffer"] * factors["vocabulary"] * 4 / 2**20
    result = ops.pair_loss(**case, **loss, backend=backend, buffer_mb=buffer_mb)
    for name in ("loss", "nll_loss", *STATISTICS):
        torch.testing.assert_close(getattr(result, name).double(), getattr(expected, name), rtol=1e-5, atol=3e-5)
    exact = gradients(expected.loss, double)
    ours = gradients(result.loss, case)
    assert {name: gradient.dtype for name, gradient in ours.items()} == {name: case[name].dtype for name in ours}
    for name, gradient in ours.items():
        error, largest = (gradient.double() - exact[name]).abs().max(), exact[name].abs().max()
        share = 1e-4 if factors["dtype"] == torch.float32 else 2**-7
        # Of a vocabulary of one token, the exact gradient is 0, and what rounding leaves of 1 - p remains.
        assert error <= share * largest + (1e-9 if factors["vocabulary"] > 1 else 1e-7), name


@pytest.mark.parametrize("rows_in_buffer", [1, 9, 10**6])
def test_every_loss_and_weight_matches_the_oracle_in_fp64(rows_in_buffer, backend):
    """All losses as one mixture, because a kernel does not know the loss; one more is a function."""
    names = [name for name, kind in PAIR_LOSSES.items() if not kind.without_reference]
    case = on_device(make(LENGTHS, vocabulary=40, dtype=torch.float32, rows=True, ignored=True, reference="token"))
    random = torch.Generator().manual_seed(0)
    loss = {
        "pairs": random_pairs(len(LENGTHS), seed=0).to(DEVICE),
        "beta": 0.3,
        "loss_type": [*names, PAIR_LOSS_ORACLES["hinge"]],
        "loss_weights": [*(1.0 / (1 + number % 2) for number in range(len(names))), 2.0],
        "pair_weights": torch.rand(4, generator=random).to(DEVICE),
        "token_weights": torch.rand(sum(LENGTHS), generator=random).to(DEVICE),
        "label_smoothing": 0.1,
    }
    double = converted(case, torch.float64)
    expected = ops.pair_loss(**double, **loss, backend="plain")
    result = ops.pair_loss(**case, **loss, backend=backend, buffer_mb=rows_in_buffer * 40 * 4 / 2**20)
    torch.testing.assert_close(result.pair_losses.double(), expected.pair_losses, rtol=1e-5, atol=1e-5)
    exact = gradients(expected.loss, double)
    for name, gradient in gradients(result.loss, case).items():
        assert (gradient.double() - exact[name]).abs().max() <= 1e-4 * exact[name].abs().max(), name


SMALL, LARGE = (FACTORS | {"vocabulary": sizes} for sizes in ([1, 7, 1000], [32000, 50304]))


@pytest.mark.parametrize("factors", covering_cases(SMALL, drawn=15))
def test_log_ratio_matches_the_oracle_in_fp64(factors, backend):
    check_log_ratio([70, 0, 1, 129], factors, backend)


@full  # the interpreter takes up to a minute for each
@pytest.mark.parametrize("factors", covering_cases(LARGE)[:2])
def test_log_ratio_of_a_large_vocabulary_matches_the_oracle_in_fp64(factors, backend):
    check_log_ratio(LENGTHS, factors, backend)


def check_log_ratio(lengths: list[int], factors: dict, backend: str) -> None:
    case = on_device(make(lengths, **{name: value for name, value in factors.items() if name not in LOSS}))
    expected = ops.log_ratio(**converted(case, torch.float64), backend="plain")
    result = ops.log_ratio(**case, backend=backend)
    for name in (*STATISTICS, "token_logps"):
        torch.testing.assert_close(getattr(result, name).double(), getattr(expected, name), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("blocks", [1, 7, 8, 9, 27])
def test_each_program_of_a_grouped_grid_has_its_own_block_and_part(blocks):
    parts = 5
    places = torch.zeros(blocks * parts, 2, dtype=torch.int32, device=DEVICE)
    grouped_places[(blocks * parts,)](places, blocks, GROUP=8)
    expected = [(first + within, part) for first in range(0, blocks, 8) for part in range(parts) for within in range(8)]
    assert places.tolist() == [[block, part] for block, part in expected if block < blocks]


@triton.jit
def grouped_places(places, blocks, GROUP: tl.constexpr):
    program = tl.program_id(0)
    block, part = grouped(program, blocks, tl.num_programs(0), GROUP)
    tl.store(places + 2 * program, block)
    tl.store(places + 2 * program + 1, part)


def bf16_logps(case: dict) -> torch.Tensor:
    """PyTorch's log-probabilities in bf16 with an fp32 softmax: logits and their derivatives are rounded."""
    logits = torch.nn.functional.linear(case["hidden"], case["weight"])
    return logits.float().log_softmax(-1).gather(1, case["targets"][:, None]).squeeze(1)


@pytest.mark.parametrize("vocabulary", [1000, 32000])
def test_bf16_errs_less_than_pytorch_does(vocabulary, backend):
    case = on_device(make([40, 23], vocabulary=vocabulary, size=96, dtype=torch.bfloat16))
    upstream = torch.randn(63, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    double = converted(case, torch.float64)
    exact = ops.log_ratio(**double, backend="plain").token_logps
    ours, theirs = ops.log_ratio(**case, backend=backend).token_logps, bf16_logps(case)
    assert (ours - exact).abs().max() < 1e-4 < (theirs - exact).abs().max()
    wanted = gradients(exact @ upstream.double(), double)
    actual, peer = gradients(ours @ upstream, case), gradients(theirs @ upstream, case)
    for name, gradient in wanted.items():
        errors = [(other[name].double() - gradient).norm() for other in (actual, peer)]
        assert errors[0] < 1.1 * errors[1], name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_ratio_and_its_gradient(dtype, frozen, backend):
    case = on_device(make(LENGTHS, vocabulary=1000, size=64, dtype=dtype, rows=True, reference="hidden", frozen=frozen))
    double = converted(case, torch.float64)
    expected = ops.log_ratio(**double, backend="plain")
    result = ops.log_ratio(**case, backend=backend, buffer_mb=9 * 1000 * 4 / 2**20)
    for name in (*STATISTICS, "token_logps"):
        torch.testing.assert_close(getattr(result, name).double(), getattr(expected, name), rtol=1e-5, atol=3e-5)
    exact = gradients(expected.log_ratio.square().sum(), double)
    for name, gradient in gradients(result.log_ratio.square().sum(), case).items():
        bound = (1e-4 if dtype == torch.float32 else 2**-7) * exact[name].abs().max()
        assert (gradient.double() - exact[name]).abs().max() <= bound, name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("buffer_mb", [1024, 0.02])  # 0.02: five rows, fewer than a pair has
def test_a_policy_equal_to_its_reference_has_ratio_zero(buffer_mb, frozen, backend):
    case = on_device(make(LENGTHS, vocabulary=1000, size=64, rows=True, dtype=torch.bfloat16, frozen=frozen))
    same = {"ref_hidden": case["hidden"].detach(), "ref_weight": case["weight"].detach()}
    same |= {"backend": backend, "buffer_mb": buffer_mb}
    assert ops.log_ratio(**case, **same).log_ratio.eq(0).all()
    assert ops.pair_loss(**case, **same, beta=0.1).log_ratio.eq(0).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="a GPU's products alone may be of TF32")
def test_fp32_is_multiplied_as_such_whatever_the_users_setting(backend):
    case = on_device(make(LENGTHS, vocabulary=1000, size=64, dtype=torch.float32))
    expected = ops.pair_loss(**converted(case, torch.float64), beta=0.1, backend="plain").log_ratio
    torch.set_float32_matmul_precision("high")
    try:
        actual = ops.pair_loss(**case, beta=0.1, backend=backend).log_ratio
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=3e-5)


MAGNITUDES = {
    "products": [torch.float16, torch.bfloat16],
    "beta": [0.01, 5.0],
    "num_pairs": [1e5, 1.0, 1e3, 1e9],
    "nll_weight": [0.0, 1.0],
    "upstream": [1.0, 2.0**16, 1e-6],
    "rows_in_buffer": [9, 10**6],
    "operation": ["pair_loss", "log_ratio"],
}


@pytest.mark.parametrize("factors", covering_cases(MAGNITUDES, drawn=20))
def test_gradients_of_any_magnitude_keep_their_digits(factors, backend):
    """The arguments are in fp32, under autocast: no gradient is rounded after the products in 16 bits."""
    products, names = factors["products"], ("beta", "num_pairs", "nll_weight")
    case = make(LENGTHS, vocabulary=100, size=32, dtype=products, bias=True)
    case = on_device(converted(case, torch.float32))
    double = converted(case, torch.float64)

    def loss_of(case: dict, **options) -> torch.Tensor:
        if factors["operation"] == "pair_loss":
            return ops.pair_loss(**case, **{name: factors[name] for name in names}, num_tokens=30, **options).loss
        return ops.log_ratio(**case, **options).log_ratio.square().sum() * (factors["beta"] / factors["num_pairs"])

    expected = gradients(loss_of(double, backend="plain") * factors["upstream"], double)
    with torch.autocast(DEVICE, products):
        loss = loss_of(case, backend=backend, buffer_mb=factors["rows_in_buffer"] * 100 * 4 / 2**20)
    for name, gradient in gradients(loss * factors["upstream"], case).items():
        error = (gradient.double() - expected[name]).norm() / expected[name].norm()
        assert error < torch.finfo(products).eps, name


def test_a_nan_in_one_sequence_stays_there(backend):
    case = on_device(make([3, 4, 5], vocabulary=1000, size=64, dtype=torch.float32))
    clean = ops.log_ratio(**case, backend=backend).policy_logps.detach()
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            hidden = case["hidden"].clone()
            hidden[3:7, 0] = value
        actual = ops.log_ratio(**case | {"hidden": hidden}, backend=backend).policy_logps
        assert torch.equal(actual[[0, 2]], clean[[0, 2]])
        assert not actual[1].isfinite()


def test_large_logits_and_a_constant_added_to_all_of_them(backend):
    case = on_device(make([40], vocabulary=1000, size=64, dtype=torch.float32))
    with torch.no_grad():
        case["hidden"] *= 80 / (case["hidden"] @ case["weight"].T).abs().max()
    plain = ops.log_ratio(**converted(case, torch.float64), backend="plain").token_logps
    for bias in (None, torch.full((1000,), 40.0, device=DEVICE)):
        actual = ops.log_ratio(**case | {"bias": bias}, backend=backend).token_logps
        torch.testing.assert_close(actual.double(), plain, rtol=1e-5, atol=3e-5)


def test_a_target_outside_the_vocabulary_is_nan_where_values_are_not_checked(monkeypatch, backend):
    monkeypatch.setattr(checks, "values_visible", lambda device: False)
    case = on_device(make([3, 2, 1, 4], vocabulary=1000, size=8, dtype=torch.float32))
    for sequence, target in ((0, 1000), (2, 10**12)):
        case["targets"][case["cu_seqlens"][sequence]] = target
    ratio = ops.pair_loss(**case, beta=0.3, backend=backend).log_ratio
    assert ratio.isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [1, 0]])
def test_empty_and_tiny_inputs_work(lengths, backend):
    case = on_device(make(lengths, size=8, reference="token"))
    case = converted(case, torch.float32)
    result = ops.log_ratio(**case, backend=backend)
    torch.testing.assert_close(result.log_ratio, ops.log_ratio(**case, backend="plain").log_ratio)
    gradients(result.log_ratio.sum(), case)


def test_targets_that_are_skipped_never_matter(backend):
    case = on_device(make([6, 5], vocabulary=100, size=8, ignored=True, dtype=torch.float32))
    result = ops.pair_loss(**case, beta=1.0, backend=backend)
    gradient = gradients(result.loss, case)["hidden"]
    assert gradient[case["targets"] == IGNORE].eq(0).all()
    with torch.no_grad():
        changed = case["hidden"].clone()
        changed[case["targets"] == IGNORE] = 1e4
    assert torch.equal(ops.pair_loss(**case | {"hidden": changed}, beta=1.0, backend=backend).loss, result.loss)


@pytest.fixture
def deterministic():
    """Without deterministic algorithms, a GPU adds the gradients of shared rows in any order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_memory_is_read_before_it_is_written(scored, frozen, backend, deterministic):
    """Under deterministic algorithms, torch fills new memory with NaN."""
    case = on_device(make(LENGTHS, vocabulary=40, size=8, dtype=torch.float32, rows=True, bias=True, frozen=frozen))
    if not scored:
        case["targets"].fill_(IGNORE)
    pair = ops.pair_loss(**case, beta=0.3, backend=backend, buffer_mb=0.002)
    for loss in (pair.loss, ops.log_ratio(**case, backend=backend).log_ratio.sum()):
        actual = gradients(loss, case)
        assert all(gradient.isfinite().all() for gradient in actual.values())
        assert any(gradient.any() for gradient in actual.values()) == scored


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_of_zero_or_below_matches_the_oracle(scale, backend):
    case = on_device(make(LENGTHS, vocabulary=40, size=8, dtype=torch.float32, reference="hidden", scale=scale))
    double = converted(case, torch.float64)
    actual, exact = (ops.pair_loss(**each, beta=0.3, backend=of) for each, of in ((case, backend), (double, "plain")))
    torch.testing.assert_close(actual.log_ratio.double(), exact.log_ratio, rtol=1e-5, atol=3e-5)
    expected = gradients(exact.loss, double)
    for name, gradient in gradients(actual.loss, case).items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_and_deterministic_code_gives_the_same_bits(frozen, backend, deterministic):
    case = on_device(make(LENGTHS, vocabulary=1000, size=64, dtype=torch.bfloat16, rows=True, frozen=frozen))

    def loss(case: dict) -> torch.Tensor:
        ratio = ops.log_ratio(**case, backend=backend).log_ratio
        return ops.pair_loss(**case, beta=0.3, backend=backend).loss + ratio.square().sum()

    torch.compiler.reset()
    expected = loss(case)
    exact = gradients(expected, case)
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        actual = run(case)
        assert torch.equal(actual, expected)
        assert all(torch.equal(gradient, exact[name]) for name, gradient in gradients(actual, case).items())
