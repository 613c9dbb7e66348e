"""Ways to call the operations that a caller may try: each gives the right result, or is refused in one sentence.

Wrong shapes, layouts and devices of every argument; torch.inference_mode; several uses of one result; torch.func and
forward-mode derivatives; subclasses of Tensor.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from irlfast import ops
from tests.helpers.ops_cases import sequences

Arguments = dict[str, Tensor]
LENGTHS = [3, 2, 1, 4]


class Subclass(Tensor):
    """A subclass without behaviour of its own."""


def log_ratio_with_statistics(**arguments: Any) -> ops.LogRatio:
    return ops.log_ratio(**arguments, token_statistics=True)


def pair_loss(**arguments: Any) -> ops.PairLoss:
    return ops.pair_loss(**arguments, beta=0.1, nll_weight=0.5)


def pair_loss_of_function(**arguments: Any) -> ops.PairLoss:
    return ops.pair_loss(**arguments, beta=0.1, loss_type=lambda expert, synthetic, beta: (expert - synthetic) * beta)


def token_divergence(**arguments: Any) -> Tensor:
    return ops.token_divergence(**arguments, kind="jensen_shannon")


def reward_per_token(**arguments: Any) -> Tensor:
    return ops.reward_head(**arguments, pooling="token")


def bradley_terry(**arguments: Any) -> ops.DiscriminatorLoss:
    return ops.discriminator_loss(**arguments, labels=None, kind="bradley_terry")


def discriminator_reward(**arguments: Any) -> Tensor:
    return ops.discriminator_reward(**arguments, kind="gail")


def flatten_labels(**arguments: Any) -> ops.FlatLabels:
    return ops.flatten_labels(**arguments, shifted=False)


def arguments_of() -> dict[str, tuple[Callable[..., Any], Arguments]]:
    """Every public operation in the forms that save different tensors for the backward, with small arguments."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    tokens, vocabulary, size = sum(LENGTHS), 7, 4
    scored = {"targets": torch.randint(vocabulary, (tokens,), generator=random), "cu_seqlens": sequences(LENGTHS)}
    hidden, weight, bias = (normal(*n).requires_grad_() for n in ((tokens, size), (vocabulary, size), (vocabulary,)))
    policy = {"hidden": hidden, "weight": weight, "bias": bias}
    frozen = {"hidden": hidden, "weight": weight.detach()}
    reference = {"ref_hidden": normal(tokens, size + 1), "ref_weight": normal(vocabulary, size + 1)}
    rows = {"rows": torch.arange(tokens)}
    logits = {"logits": normal(tokens, vocabulary).requires_grad_()}
    head = {"head": normal(2, size).requires_grad_(), "bias": normal(2).requires_grad_()}
    head |= {"hidden": hidden, "cu_seqlens": sequences(LENGTHS)}
    pairs = {"pairs": torch.tensor([[0, 1], [2, 3], [0, 3]])}
    cached = {"ref_logps": -normal(tokens).abs(), "token_weights": normal(tokens).abs()}
    return {
        "log_ratio": (ops.log_ratio, policy | scored | reference),
        "log_ratio, frozen head": (ops.log_ratio, frozen | scored | rows | cached),
        "log_ratio, statistics": (log_ratio_with_statistics, policy | scored | rows),
        "pair_loss": (pair_loss, policy | scored | reference | pairs | {"pair_weights": normal(3).abs()}),
        "pair_loss, frozen head": (pair_loss, frozen | scored | rows | pairs),
        "pair_loss, function": (pair_loss_of_function, policy | scored | cached),
        "token_divergence": (token_divergence, policy | reference | rows),
        "token_divergence, frozen head": (token_divergence, frozen | reference),
        "token_logps": (ops.token_logps, logits | {"targets": scored["targets"]}),
        "token_statistics": (ops.token_statistics, logits | {"targets": scored["targets"]}),
        "logits_log_ratio": (ops.logits_log_ratio, logits | scored | {"ref_logits": normal(tokens, vocabulary)}),
        "reward_head": (ops.reward_head, head | rows),
        "reward_head, tokens": (reward_per_token, head | rows),
        "discriminator_loss": (ops.discriminator_loss, head | {"labels": torch.tensor([1, 0, 1, 0])}),
        "bradley_terry": (bradley_terry, head | pairs),
        "discriminator_reward": (discriminator_reward, {"logits": normal(4, 2).requires_grad_()}),
        "flatten_labels": (flatten_labels, {"labels": scored["targets"].view(2, 5)}),
    }


CASES = arguments_of()
DIFFERENTIABLE = [name for name in CASES if name != "flatten_labels"]
# Those that are PyTorch's own operations by the backend of a CPU: they have all of PyTorch's derivatives.
OF_TORCH = ["reward_head", "reward_head, tokens", "discriminator_loss", "bradley_terry", "discriminator_reward"]
BY_KERNELS = [name for name in DIFFERENTIABLE if name not in OF_TORCH]
every_case = pytest.mark.parametrize("name", CASES)
every_argument = pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, (_, arguments) in CASES.items() for argument in arguments]
)
differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)


def results(output: Any) -> list[Tensor]:
    """The tensors that an operation returns."""
    return [x for x in (output if isinstance(output, tuple) else (output,)) if x is not None]


def leaves_of(arguments: Arguments) -> list[Tensor]:
    return [x for x in arguments.values() if x.requires_grad]


def total(output: Any) -> Tensor:
    """A loss that uses every differentiable result, each with other slopes."""
    terms = [(k + 1) * x.sin().sum() for k, x in enumerate(results(output)) if x.requires_grad]
    return torch.stack(terms).sum()


def gradients(operation: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    leaves = leaves_of(arguments)
    return list(torch.autograd.grad(total(operation(**arguments)), leaves)) if leaves else []


def check_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.detach().as_subclass(Tensor), other.detach())


# ---------------------------------------------------------------- what is refused by the argument's name


@every_argument
def test_a_wrong_shape_layout_or_type_of_any_argument_is_refused_by_a_name(name, argument):
    """The name may be that of another argument, which does not fit the wrong one."""
    operation, arguments = CASES[name]
    value = arguments[argument].detach()
    wrong = [value.to_sparse(), value.to(torch.complex64), [1], "text"]
    if argument != "logits" or name != "discriminator_reward":  # which takes any shape
        wrong += [value.reshape(-1)[0], value[None], value[..., None]]
    for x in wrong:
        with pytest.raises(ValueError, match=r"^[a-z_]+(\[-?\d\])?: found .*, expected ") as refusal:
            operation(**arguments | {argument: x})
        assert "\n" not in str(refusal.value)
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            assert str(refusal.value).startswith(f"{argument}: ")


@every_argument
def test_a_tensor_on_another_device_is_refused_by_a_name(name, argument):
    operation, arguments = CASES[name]
    if len(arguments) == 1:
        pytest.skip("no other tensor")
    with pytest.raises(ValueError, match=r"^[a-z_]+: found .* on (cpu|meta), expected "):
        operation(**arguments | {argument: arguments[argument].detach().to("meta")})


@every_case
def test_tensors_without_values_are_refused_or_give_shapes(name):
    operation, arguments = CASES[name]
    without = {key: x.detach().to("meta") for key, x in arguments.items()}
    if len(arguments) == 1:
        assert [x.shape for x in results(operation(**without))] == [x.shape for x in results(operation(**arguments))]
    else:
        with pytest.raises(ValueError, match=r"^(hidden|logits): found .* on meta, expected a tensor with values$"):
            operation(**without)


# ---------------------------------------------------------------- inference mode


@every_case
def test_inference_mode_gives_the_same_values_without_gradients(name):
    operation, arguments = CASES[name]
    expected = results(operation(**arguments))
    with torch.inference_mode():
        actual = results(operation(**arguments))
        copies = {key: x.clone() for key, x in arguments.items()}
        inside = results(operation(**copies))
    for values in (actual, inside, results(operation(**copies))):
        check_equal(values, expected)
        assert not any(x.requires_grad for x in values)


@every_argument
def test_one_tensor_of_inference_mode_changes_no_gradient(name, argument):
    operation, arguments = CASES[name]
    with torch.inference_mode():
        made = arguments[argument].clone()
    expected = gradients(operation, arguments | {argument: arguments[argument].detach()})
    check_equal(gradients(operation, arguments | {argument: made}), expected)


# ---------------------------------------------------------------- several uses of one result


@differentiable
def test_the_gradients_of_several_backwards_add_up(name):
    operation, arguments = CASES[name]
    leaves = leaves_of(arguments)
    output = operation(**arguments)
    parts = [(k + 1) * x.sin().sum() for k, x in enumerate(results(output)) if x.requires_grad]
    [whole, again] = [torch.autograd.grad(total(output), leaves, retain_graph=True) for _ in range(2)]
    check_equal(list(again), list(whole))
    one_by_one = [
        torch.autograd.grad(part, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for part in parts
    ]
    twice = torch.autograd.grad(total(output) + total(output), leaves)
    for each, two, expected in zip(zip(*one_by_one, strict=True), twice, whole, strict=True):
        torch.testing.assert_close(torch.stack(each).sum(0), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(two, 2 * expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- torch.func and forward-mode derivatives


def first_leaf(name: str, **options: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The first result's sum as a function of the first differentiable argument, and this argument's value."""
    operation, arguments = CASES[name]
    [leaf, *_] = [key for key, x in arguments.items() if x.requires_grad]
    fixed = {key: x.detach() for key, x in arguments.items()}
    return lambda x: results(operation(**fixed | {leaf: x}, **options))[0].sum(), fixed[leaf]


TRANSFORMATIONS: dict[str, Callable[..., Any]] = {
    "grad": lambda function, x: torch.func.grad(function)(x),
    "vmap": lambda function, x: torch.func.vmap(function)(torch.stack([x, x])),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "vmap of grad": lambda function, x: torch.func.vmap(torch.func.grad(function))(torch.stack([x, x])),
}


def with_tangent(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        tangent: Tensor | None = forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent
    return tangent


@pytest.mark.parametrize("name", BY_KERNELS)
def test_kernels_refuse_torch_func_and_tangents(name):
    function, x = first_leaf(name)
    for transform in TRANSFORMATIONS.values():
        with pytest.raises(ValueError, match=r"^(backend|loss_type): found .* inside a transformation of torch\.func$"):
            transform(function, x)
    with pytest.raises(ValueError, match=r"^(hidden|logits): found a tensor with a tangent, expected none by backend"):
        with_tangent(function, x)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name != "pair_loss, function"])
def test_torch_func_and_tangents_are_right_by_the_plain_backend(name):
    plain = {} if name == "discriminator_reward" else {"backend": "plain"}
    function, x = first_leaf(name, **plain)
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    [gradient] = torch.autograd.grad(value, leaf)
    slope = (gradient * x).sum()
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}  # torch keeps some tangents of fp32 values in fp64
    run = {key: transform(function, x) for key, transform in TRANSFORMATIONS.items()}
    torch.testing.assert_close(run["grad"], gradient, **close)
    torch.testing.assert_close(run["vmap"], value.detach().expand(2), **close)
    torch.testing.assert_close(torch.stack(run["jvp"]), torch.stack([value.detach(), slope]), **close)
    torch.testing.assert_close(run["vmap of grad"], torch.stack([gradient, gradient]), **close)
    torch.testing.assert_close(with_tangent(function, x), slope, **close)


# ---------------------------------------------------------------- subclasses


@every_case
@pytest.mark.parametrize("kind", ["Parameter", "Subclass"])
def test_subclasses_of_tensor_give_the_same_values_and_gradients(name, kind):
    operation, arguments = CASES[name]

    def subclassed(x: Tensor) -> Tensor:
        if kind == "Parameter":
            return torch.nn.Parameter(x.detach(), requires_grad=x.requires_grad)
        return x.detach().as_subclass(Subclass).requires_grad_(x.requires_grad)

    others = {key: subclassed(x) for key, x in arguments.items()}
    check_equal(results(operation(**others)), results(operation(**arguments)))
    check_equal(gradients(operation, others), gradients(operation, arguments))


def test_a_function_as_loss_is_refused_where_it_cannot_run():
    function, x = first_leaf("pair_loss, function", backend="plain")
    refused = pytest.raises(ValueError, match=r"^loss_type: found 'a function', expected a name for fake tensors and ")
    with refused:
        torch.func.grad(function)(x)
    operation, arguments = CASES["pair_loss, function"]
    with refused, FakeTensorMode() as mode:
        operation(**{key: mode.from_tensor(value) for key, value in arguments.items()})


@pytest.mark.parametrize("name", [name for name in CASES if name != "pair_loss, function"])
def test_fake_tensors_give_shapes_dtypes_and_gradients(name):
    operation, arguments = CASES[name]
    with FakeTensorMode() as mode:
        fakes = {key: mode.from_tensor(x) for key, x in arguments.items()}
        actual = results(operation(**fakes)), gradients(operation, fakes)
    expected = results(operation(**arguments)), gradients(operation, arguments)
    for ours, theirs in zip(actual, expected, strict=True):
        assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]
