"""pair_loss against TRL's own code: the same losses and gradients for each of TRL's losses and divergences."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from torch import Tensor

from irlfast import ops

SORTING = ["aot", "aot_unpaired"]
OF_TRL = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.05},
    "sigmoid_norm": {},
}
DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
OF_MARGIN = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]
BETA, VOCABULARY = 0.4, 11


def problem(seed: int) -> dict[str, Tensor]:
    """Two pairs of different lengths, with prompts and padding, and log-ratios of a few nats."""
    random = torch.Generator().manual_seed(seed)
    completion = torch.zeros(4, 9, dtype=torch.long)
    for row, (start, end) in enumerate([(2, 7), (3, 9), (2, 4), (3, 5)]):
        completion[row, start:end] = 1
    case = {
        "hidden": torch.randn(4, 9, 8, generator=random, dtype=torch.float64).requires_grad_(),
        "weight": torch.randn(VOCABULARY, 8, generator=random, dtype=torch.float64) / 2,
        "input_ids": torch.randint(VOCABULARY, (4, 9), generator=random),
        "completion_mask": completion,
    }
    noise = torch.randn(4, generator=random, dtype=torch.float64)
    return case | {"ref_logps": token_logps(case).sum(1).detach() + noise}


def token_logps(case: dict[str, Tensor]) -> Tensor:
    """Log-probabilities ``[4, 8]`` of the tokens after the first, 0 in prompts and padding."""
    logps = (case["hidden"] @ case["weight"].T).log_softmax(-1)[:, :-1].gather(-1, case["input_ids"][:, 1:, None])
    return logps.squeeze(-1).masked_fill(case["completion_mask"][:, 1:] == 0, 0)


def trls_loss(case: dict[str, Tensor], dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    """The loss that ``DPOTrainer._compute_loss`` returns for a model with these log-probabilities."""
    ids, mask, logps = case["input_ids"], case["completion_mask"], token_logps(case).to(dtype)
    unused = torch.zeros_like(logps)
    outputs = SimpleNamespace(
        log_probs=logps, entropy=unused, mean_logits=unused, is_top1=unused.bool(), log_sum_sq_probs=unused
    )

    def model(**_: Any) -> SimpleNamespace:
        return outputs

    model.training = True
    usual = {
        "loss_types": [],
        "loss_weights": [1.0] * len(options["loss_types"]),
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
    }
    trainer = SimpleNamespace(
        **usual | {name: value for name, value in options.items() if name in usual},
        model=model,
        beta=BETA,
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau")),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        use_weighting=False,
        _metrics=DefaultOfLists(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = case["ref_logps"].to(dtype).chunk(2)
    inputs = {"input_ids": ids, "completion_mask": mask, "attention_mask": torch.ones_like(ids)}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


class DefaultOfLists(dict):
    """The metrics of TRL's trainer: lists by mode and name."""

    def __missing__(self, key: str) -> Any:
        self[key] = DefaultOfLists() if key in ("train", "eval") else []
        return self[key]


def ours(case: dict[str, Tensor], **options: Any) -> ops.PairLoss:
    labels = case["input_ids"].masked_fill(case["completion_mask"] == 0, -100)
    flat = ops.flatten_labels(labels, shifted=False)
    arguments = {"ref_logps": case["ref_logps"], "pairs": torch.arange(4).view(2, 2).T, "beta": BETA} | options
    return ops.pair_loss(case["hidden"].flatten(0, 1), case["weight"], *flat, **arguments)


def check_same(case: dict[str, Tensor], loss: Tensor, expected: Tensor, **tolerance: Any) -> None:
    torch.testing.assert_close(loss, expected.to(loss.dtype), **tolerance)
    [gradient], [exact] = (torch.autograd.grad(each, case["hidden"]) for each in (loss, expected))
    torch.testing.assert_close(gradient, exact, **tolerance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "options"), OF_TRL.items(), ids=OF_TRL.keys())
def test_a_loss_is_that_of_trl(name, options, seed):
    case = problem(seed)
    check_same(case, ours(case, loss_type=name, **options).loss, trls_loss(case, loss_types=[name], **options))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", OF_MARGIN)
def test_a_loss_of_another_divergence_is_that_of_trl(name, divergence):
    """In fp32: TRL has no alpha divergence of fp64."""
    case = problem(seed=3)
    options = OF_TRL[name] | {"f_divergence_type": divergence, "f_alpha_divergence_coef": 0.3}
    expected = trls_loss(case, torch.float32, loss_types=[name], **options)
    check_same(case, ours(case, loss_type=name, **options).loss, expected, rtol=2e-4, atol=1e-5)


def test_a_mixture_with_nll_is_that_of_trl():
    """MPO's. TRL's loss ``sft`` is the NLL of the chosen answers, which is no loss of log-ratios."""
    case = problem(seed=4)
    expected = trls_loss(case, loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    check_same(
        case, ours(case, loss_type=["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2], nll_weight=1.0).loss, expected
    )


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "apo_down"])
def test_ld_alpha_of_trl_is_a_weight_of_tokens(name):
    """The tokens beyond the length of a pair's shorter answer weigh less."""
    case = problem(seed=5)
    position, length = case["completion_mask"].cumsum(1), case["completion_mask"].sum(1)
    shared = torch.minimum(*length.chunk(2)).repeat(2)
    weights = torch.where(position > shared[:, None], 0.3, 1.0)
    shifted = torch.nn.functional.pad(weights, (0, 1))[:, 1:].flatten()  # position t predicts token t + 1
    check_same(
        case,
        ours(case, loss_type=name, token_weights=shifted).loss,
        trls_loss(case, loss_types=[name], ld_alpha=0.3),
    )


def test_every_loss_of_trl_is_here_sorts_or_is_the_nll():
    source = trl.DPOConfig.__doc__
    names = [name for name in (*OF_TRL, *SORTING, "sft") if f"'{name}'" in source]
    assert names == [*OF_TRL, *SORTING, "sft"]
    with pytest.raises(ValueError, match="Unknown loss type: none") as error:
        trls_loss(problem(0), loss_types=["none"])
    listed = str(error.value).partition("[")[2]
    assert sorted(listed.replace("'", "").rstrip("]").split(", ")) == sorted(names)
