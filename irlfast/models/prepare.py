"""The one door to a model that scores or trains: load it, check it, choose its attention and measure its costs, once.

The result is a ``PreparedModel``. Scoring and training read everything from it, and probe nothing again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.config import Config
from irlfast.data.packing import Layout, PromptGroup
from irlfast.models.attention import arrange, set_uncompiled
from irlfast.models.checks import can_share_prompts, check_forward, check_layout, check_logits
from irlfast.models.costs import Costs, costs_of
from irlfast.models.load import is_reward_model, is_run_split, load_model, load_to_train
from irlfast.models.split import runnable
from irlfast.ops import Head
from irlfast.ops.common.heads import linear_module, scale_and_softcap, unwrapped


class PreparedModel(NamedTuple):
    """A policy, reference or reward model that is ready to run packed batches, and what was measured of it."""

    model: Any  # in eval(), on this process's device; PEFT's wrapper if the model has an adapter
    base: Any  # the Transformers model in that wrapper, or ``model`` itself
    head_module: torch.nn.Linear  # the LM head, or a reward model's heads
    logit_scale: float  # logits are softcap(logit_scale * head_module(hidden))
    logit_softcap: float | None
    layout: Layout  # how prompt groups are packed for this model and its attention
    costs: Costs  # operations per token

    def head(self) -> Head:
        """Return the head with its tensors as they are now.

        Ask for it in each forward pass: training changes the tensors, and ZeRO-3 gathers them only when a module's
        forward reads them from ``head_module``.
        """
        return Head(self.head_module.weight, self.head_module.bias, self.logit_scale, self.logit_softcap)


KEPT: dict[tuple[str, ...], Any] = {}  # the language model that was loaded last, by what it was loaded with


def frozen_model(name: Path | str, config: Config, heads: int = 0, in_4bit: bool = False, split: bool = False) -> Any:
    """Load a frozen model on this process's device. A language model that was loaded last is there still.

    So a policy is loaded once to answer, to score and to train, where nothing else is loaded in between. With
    ``split``, it is one that ZeRO-3 splits: it computes within :func:`irlfast.models.split.runnable`.

    Raises:
        InputError: as :func:`irlfast.models.load.load_model`.
    """
    model = None if heads else kept_model(name, config, in_4bit, split)
    if model is None:
        forget()
        model = load_model(name, config, heads, in_4bit, split=split).to(dist.device()).eval()
        if not heads:
            KEPT[key_of(name, config, in_4bit, split)] = model
    return model


def kept_model(name: Path | str, config: Config, in_4bit: bool, split: bool) -> Any:
    """Return the language model that was loaded last, if it is this one; else None.

    A split model is there only if every process has its part: one that samples alone has given up its own.
    """
    model = KEPT.get(key_of(name, config, in_4bit, split))
    if split and not all(dist.all_gather_object(model is not None)):
        return None
    return model


def forget() -> None:
    """Give up the model that was loaded last: another one, or vLLM, takes its memory."""
    KEPT.clear()


def key_of(name: Path | str, config: Config, in_4bit: bool, split: bool) -> tuple[str, ...]:
    keys = (config.dtype, config.attn_implementation, config.model_revision, config.trust_remote_code)
    return (str(name), *map(str, keys), str(in_4bit), str(split))


def prepare_to_score(
    name: Path | str, config: Config, groups: Sequence[PromptGroup], heads: int = 0, in_4bit: bool = False
) -> PreparedModel:
    """Load and prepare a frozen model that scores ``groups``: a reward model if it has ``heads``.

    ZeRO-3 splits it, as it does those in training.

    Raises:
        InputError: as :func:`irlfast.models.load.load_model` and :func:`prepare_model`.
    """
    model = frozen_model(name, config, heads, in_4bit, split=is_run_split(config, in_4bit))
    return prepare_model(model, config, groups)


def prepare_to_train(
    name: Path | str, config: Config, groups: Sequence[PromptGroup], reward: dict[str, Any] | None = None
) -> PreparedModel:
    """Load and prepare a model that trains on ``groups``; ``reward`` as for :func:`load_to_train`.

    Raises:
        InputError: as :func:`irlfast.models.load.load_model` and :func:`prepare_model`.
    """
    split = is_run_split(config, config.load_in_4bit)
    kept = None if reward else kept_model(name, config, config.load_in_4bit, split)
    forget()  # training changes the model
    model = load_to_train(name, config, reward=reward, in_4bit=config.load_in_4bit, loaded=kept)
    return prepare_model(model.to(dist.device()).eval(), config, groups)


def prepare_model(model: Any, config: Config, groups: Sequence[PromptGroup]) -> PreparedModel:
    """Check a loaded model, choose its attention and layout for ``groups``, and measure its costs.

    Raises:
        InputError: the model does not run on token ids alone, its logits do not follow from its last hidden states by
            its head, or its attention mixes the sequences of a row.
    """
    base = unwrapped(model)
    reward = is_reward_model(base)
    try:
        module = linear_module(base, getattr(base, "score", None) if reward else base.get_output_embeddings())
        scale, softcap = scale_and_softcap(base, module)
    except ValueError as error:
        raise InputError(str(error)) from error
    head = Head(module.weight, module.bias, scale, softcap)
    costs = costs_of(base, head.weight)
    set_uncompiled(base, config)
    with runnable(model, config):
        separate_states = check_forward(base)
        if not reward:
            check_logits(base, head, separate_states)
        layout = arrange(base, config, costs, groups, can_share_prompts(base, separate_states))
        if layout.one_row:
            check_layout(base, layout, separate_states)
    layout = layout._replace(
        keep_last_token=reward,
        answer_cost=costs.answer_token / costs.token,
        attended_cost=costs.attended / costs.token,
    )
    return PreparedModel(model, base, module, scale, softcap, layout, costs)
