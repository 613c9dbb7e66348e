"""The choice of an attention: it follows from what shared prompts save on the phase's data, and is logged."""

import pytest

from irlfast.config import make_config
from irlfast.data.packing import Layout, PromptGroup
from irlfast.models.attention import choose, sharing
from irlfast.models.costs import costs_of
from irlfast.models.forward import attention_of
from irlfast.models.prepare import prepare_model
from tests.data.test_packing import model_of


def of_lengths(prompt: int, *answers: int) -> list[PromptGroup]:
    return [PromptGroup([1] * prompt, tuple([2] * answer for answer in answers))] * 3


def test_the_saving_of_shared_prompts_follows_from_the_lengths():
    model = model_of("Llama")
    costs = costs_of(model, model.lm_head.weight)
    several = ((80, 20), (20, 80, 80), (80, 20, 20), (80, *[20] * 4))
    savings = [sharing(costs, of_lengths(*lengths))[0] for lengths in several]
    assert savings[0] == 0  # a single answer shares nothing
    assert savings == sorted(savings)
    assert sharing(costs, of_lengths(400, 1, 1))[0] == pytest.approx(0.5, abs=0.01)  # one of two prompts
    assert sharing(costs, of_lengths(80, 20, 40))[1] == "on average prompts of 80 tokens with 2 answers of 30"
    assert sharing(costs, of_lengths(80, 20))[1] == "on average prompts of 80 tokens with 1 answer of 20"


def test_the_log_gives_the_chosen_attention_with_the_lengths_that_decided(capsys):
    config = make_config({"dataset_name": __file__, "model_name_or_path": "."})
    model = model_of("Llama")
    first, second = (prepare_model(model, config, of_lengths(80, 20, 20)) for _ in range(2))
    assert first.layout == second.layout
    assert first.layout[:3] == Layout()[:3]
    saving = sharing(first.costs, of_lengths(80, 20, 20))[0]
    line = (
        f"attention: sdpa; sharing prompts saves {saving:.0%} of the operations: on average prompts of 80 tokens with 2"
    )
    assert capsys.readouterr().err.count(line) == 1


def test_the_checks_of_a_model_that_ran_before_do_not_compile_flex_attention():
    """On a GPU, a compilation takes seconds. On a CPU, where ``auto`` keeps the attention of the checks, it is seen."""
    model = model_of("Llama")
    model.set_attn_implementation("flex_attention")
    prepare_model(model, make_config({"dataset_name": __file__, "model_name_or_path": "."}), of_lengths(80, 20, 20))
    assert attention_of(model) == "sdpa"


CHOICES = [
    (True, 0.4, "varlen", "flex_attention"),
    (True, 0.0, "varlen", "varlen"),
    (True, 0.0, None, "flex_attention"),
    (False, 0.4, "flash_attention_2", "flash_attention_2"),
    (False, 0.4, None, "sdpa"),
]


@pytest.mark.parametrize("flex, saving, unshared, expected", CHOICES)
def test_a_gpus_attention_follows_from_the_saving_of_shared_prompts(flex, saving, unshared, expected):
    assert choose(flex, saving, unshared) == expected
