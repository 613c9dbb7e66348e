"""Rewards of answers, from reward models, policies and Python functions (docs/design.md §3, RFT and AfD).

Every answer is scored once, and the scores are kept in files. A reward is one of:

- a reward model that this project trained (``method: reward``, ``rft`` or ``afd``): heads on a body, read at the
  answer's last token or at every token. ``irlfast_reward`` in its config.json says how;
- any other ``AutoModelForSequenceClassification`` with its tokenizer: its logit of the conversation
  (:mod:`irlfast.sampling.reward_external`);
- the implicit reward β·Σ_t log π(y_t)/π_ref(y_t) of a policy and its reference, which IRFT, SPIN and SFT learn
  (arXiv 2405.17888, section 4). Without a reference it is β·log π(y): the reference of maximum-entropy IRL is uniform.
  Both may be policies of the run itself, such as SFT's and that of its first part (arXiv 2510.02493);
- the match of an answer's features with the demonstration's (:mod:`irlfast.sampling.features`);
- a Python function (:mod:`irlfast.sampling.reward_function`).
"""

import functools
import operator
from array import array
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irlfast import ops
from irlfast.common import dist
from irlfast.common.artefacts import intact, keep_json
from irlfast.common.files import InputError, find_path, read_json
from irlfast.common.messages import explain_errors, log
from irlfast.config import Config
from irlfast.config.methods import OWN_POLICIES
from irlfast.data.encoding import Encoder
from irlfast.data.packing import Batch, PromptGroup
from irlfast.data.store import Mapped, cut
from irlfast.losses.rewards import GAUSSIAN
from irlfast.models.lora import base_and_adapter
from irlfast.ops import Head
from irlfast.runs.run import Run
from irlfast.sampling.features import feature_rewards
from irlfast.sampling.reward_external import external_rewards
from irlfast.sampling.reward_function import function_rewards
from irlfast.sampling.scoring import Scores, by_group, score_each_answer

POLICY_ENDINGS = ("ForCausalLM", "LMHeadModel")  # of the names of architectures
LOST_SCALES = "is damaged or missing, and later answers give other scales; put the file back, or take a new output_dir"
# How reward models that an earlier version saved spell their divergence.
EARLIER = {"reverse_kl": "airl", "js": "gail", "forward_kl": "fairl"}


def recipe(config: Config) -> dict[str, Any]:
    """Return how a reward model of this run is read; this is written into the model's config.json."""
    how = {"level": config.reward_level, "divergence": config.divergence, "alpha": config.divergence_alpha}
    return how | ({"variance": True} if config.reward_loss == GAUSSIAN else {})


def rewards_of(run: Run, learned: Sequence[Path], groups: Sequence[PromptGroup], folder: Path, scales: Path) -> Tensor:
    """Return the reward ``[S]`` fp64 of every answer of ``groups``: the ``learned`` and the added rewards, combined.

    The ``learned`` models are one reward. The values of each reward are kept in ``folder``, and its scale in the file
    ``scales`` (:func:`normalised`). NaN marks an answer that ``reward_overlong`` leaves out.

    Raises:
        InputError: ``reward_combine`` asks for an ensemble, but there is one reward of one head.
    """
    return combine([summed(values) for values in weighted(run, learned, groups, folder, scales)], run.config)


def token_rewards(
    run: Run, learned: Sequence[Path], groups: Sequence[PromptGroup], folder: Path, scales: Path
) -> Scores:
    """Return the reward of each token of every answer, fp64; their sums are those of :func:`rewards_of`.

    With ``reward_credit: sequence``, the whole reward of an answer is at its last token. With ``token``, so is a reward
    that judges whole answers, and a reward of tokens is at each of them.
    """
    lengths = np.array(array("i", (len(answer) for group in groups for answer in group.answers)))
    if run.config.reward_credit == "sequence":
        flat = at_ends(one_by_one(rewards_of(run, learned, groups, folder, scales)), lengths)
    else:
        each = weighted(run, learned, groups, folder, scales)
        flat = combine([at_ends(values, lengths) for values in each], run.config)
    return by_group(cut(flat, lengths), groups)


def weighted(
    run: Run, learned: Sequence[Path], groups: Sequence[PromptGroup], folder: Path, scales: Path
) -> list[Sequence[Tensor]]:
    """Return the values of each reward, times its weight: of every answer ``[k, M]``, as :func:`reward_of` has them."""
    config = run.config
    implicit = zip_longest(config.implicit_reward_policy, config.implicit_reward_reference)
    scorers: list[Callable[..., Sequence[Tensor]]] = [
        *([functools.partial(learned_reward, run, learned)] if learned else []),
        *(functools.partial(reward_of, run, model) for model in config.reward_model_name_or_path),
        *(functools.partial(implicit_reward, run, *both) for both in implicit),
        *([functools.partial(feature_rewards, run)] if config.feature_reward else []),
    ]
    paths = [folder / f"reward-{number}.safetensors" for number in range(len(scorers) + len(config.reward_function))]
    of_models: Sequence[Sequence[Tensor]] = [scorer(groups, path) for scorer, path in zip(scorers, paths, strict=False)]
    functions = zip(config.reward_function, paths[len(scorers) :], strict=True)
    of_functions = [function_rewards(run, name, groups, path) for name, path in functions]
    if config.reward_normalize:
        of_models, of_functions = normalised(of_models, of_functions, scales)
    if config.reward_combine != "mean" and sum(v[0].shape[1] for v in of_models) + len(of_functions) < 2:
        raise InputError(f"reward_combine: found {config.reward_combine!r}, but one reward of one head")
    heard = without_none(of_functions, alone=not of_models, combined=config.reward_combine)
    each = [*of_models, *map(one_by_one, heard)]
    weights = config.reward_weights or [1.0] * len(each)
    return [Mapped(functools.partial(operator.mul, w), values) for w, values in zip(weights, each, strict=True)]


def one_by_one(rewards: Tensor) -> Sequence[Tensor]:
    """Return the rewards of each answer, ``[1, …]``, from those of all, ``[S, …]``."""
    return cut(rewards, np.ones(len(rewards), np.int32))


def learned_reward(run: Run, models: Sequence[Path], groups: Sequence[PromptGroup], path: Path) -> Sequence[Tensor]:
    """Return the rewards of every answer by all heads of the ``models``, as :func:`reward_of` those of one."""
    paths = [path.with_stem(f"{path.stem}-{number}" if number else path.stem) for number in range(len(models))]
    each = [reward_of(run, str(model), groups, own) for model, own in zip(models, paths, strict=True)]
    return Mapped(lambda *values: torch.cat(values, 1), *each)


def normalised(
    of_models: Sequence[Sequence[Tensor]], of_functions: Sequence[Tensor], path: Path
) -> tuple[Sequence[Sequence[Tensor]], list[Tensor]]:
    """Shift and scale each reward by the mean and the standard deviation that the file ``path`` keeps.

    Where there is no file, they are those of these answers, of the mean of a reward's heads. NaN counts as no answer.
    An answer's rewards of tokens are scaled, and the mean is taken off at the last token.
    """
    if not dist.on_main(intact, path):
        answers = [*(summed(values).mean(1) for values in of_models), *(values[:, 0] for values in of_functions)]
        known = [rewards[~rewards.isnan()] for rewards in answers]
        if dist.is_main():
            scales = [{"mean": x.mean().item(), "std": x.std().item() or 1.0} for x in known]
            keep_json(path, scales, f"{path}: {LOST_SCALES}")
        dist.barrier()
    each = [(scale["mean"], scale["std"]) for scale in read_json(path)]
    models = [Mapped(functools.partial(scaled, *scale), values) for values, scale in zip(of_models, each, strict=False)]
    later = each[len(of_models) :]
    return models, [(values - mean) / std for values, (mean, std) in zip(of_functions, later, strict=True)]


def scaled(mean: float, std: float, values: Tensor) -> Tensor:
    """Take the mean off an answer's last value, and divide all by the standard deviation."""
    return torch.cat([values[:-1], values[-1:] - mean]) / std


def summed(values: Sequence[Tensor]) -> Tensor:
    """Sum the values ``[k, M]`` of each answer: ``[S, M]``."""
    sums = values[0].new_empty(len(values), *values[0].shape[1:])
    for number, own in enumerate(values):
        sums[number] = own.sum(0)
    return sums


def at_ends(values: Sequence[Tensor], lengths: np.ndarray) -> Tensor:
    """Put the k values of each answer at its last k tokens, and 0 at the tokens before: ``[N, …]``."""
    placed = values[0].new_zeros(int(lengths.sum()), *values[0].shape[1:])
    for own, end in zip(values, lengths.cumsum().tolist(), strict=True):
        placed[end - len(own) : end] = own
    return placed


def without_none(rewards: Sequence[Tensor], alone: bool, combined: str) -> list[Tensor]:
    """Return functions' rewards ``[S, 1]`` with 0 in place of NaN: the function returned None, so it adds nothing.

    Raises:
        InputError: no reward judges an answer, or ``reward_combine`` is not the mean, so that 0 would count.
    """
    if not rewards:
        return []
    silent = torch.cat(list(rewards), 1).isnan()
    if silent.any() and combined != "mean":
        raise InputError(f"reward_function: found None with reward_combine {combined!r}, expected a number")
    if alone and silent.all(1).any():
        count = int(silent.all(1).sum())
        raise InputError(f"reward_function: found None for {count:,} answers, with no other reward; expected one")
    return [values.nan_to_num(0.0) for values in rewards]


def complete(rewards: Tensor) -> list[int]:
    """Return the numbers of the prompts whose answers all have a reward, from rewards ``[P, n]``; log the others.

    ``reward_overlong: drop`` leaves out answers whose text is too long.

    Raises:
        InputError: no prompt is complete.
    """
    numbers = (~rewards.isnan().any(1)).nonzero().flatten().tolist()
    if not numbers:
        raise InputError("reward_overlong: found drop, and every prompt has an answer whose text is too long")
    if len(numbers) < len(rewards):
        left_out = len(rewards) - len(numbers)
        log(f"reward_overlong: {left_out:,} of {len(rewards):,} prompts are left out, as an answer's text was too long")
    return numbers


def reward_of(run: Run, reward: str, groups: Sequence[PromptGroup], path: Path) -> Sequence[Tensor]:
    """Return the rewards of every answer by the M heads of a reward model, fp64; ``path`` keeps them.

    An answer has the rewards ``[k, M]`` of its k tokens, or those ``[1, M]`` of the whole answer.

    Raises:
        InputError: there is no such reward model, or a learned one has another tokenizer than the policy.
    """
    config = reward_config(reward, run.config)
    how = getattr(config, "irlfast_reward", None)
    if how is None:
        return one_by_one(external_rewards(run, reward, groups, path))
    check_tokenizer(f"reward model {reward}", reward, run.encoder, run.config)
    measure = functools.partial(head_rewards, **how)
    return Mapped(Tensor.double, score_each_answer(run, reward, groups, path, measure, heads=config.num_labels))


def reward_config(reward: str, config: Config) -> Any:
    """Load the Transformers config of a reward model.

    Raises:
        InputError: there is no config, or it is of another kind of model.
    """
    model_config = any_config(reward, config)
    kind = model_config.architectures[0]
    if not kind.endswith("ForSequenceClassification"):
        hint = "; a policy goes to implicit_reward_policy" if kind.endswith(POLICY_ENDINGS) else ""
        raise InputError(f"reward model {reward}: found {kind}, expected one ForSequenceClassification{hint}")
    return model_config


def check_policy(policy: str, config: Config) -> None:
    """Check that the policy or reference of an implicit reward is a causal language model.

    Raises:
        InputError: there is no config, or it is of another kind of model.
    """
    kind = any_config(policy, config).architectures[0]
    if not kind.endswith(POLICY_ENDINGS):
        raise InputError(f"implicit reward {policy}: found {kind}, expected one ForCausalLM")


def any_config(model: str, config: Config) -> Any:
    import transformers

    name, _ = base_and_adapter(model)
    with explain_errors(f"reward model {model}: cannot be loaded"):
        model_config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    model_config.architectures = model_config.architectures or ["no architecture"]
    return model_config


def head_rewards(
    hidden: Tensor, head: Head, batch: Batch, *, level: str, divergence: str, alpha: float, variance: bool = False
) -> Sequence[Tensor]:
    """Return the reward ``[1, M]`` of each answer from its heads' logits, or at the level ``token`` that of each token.

    With ``variance``, each head has two outputs, the mean and the log-variance of a reward; the mean is the reward.

    Source: docs/design.md §3; f-MAX (arXiv 1911.02256), see :mod:`irlfast.ops.rewards.losses`.
    """
    pooling = "token" if level == "token" else "last"
    logits = ops.reward_head(hidden, head.weight, batch.cu_seqlens, rows=batch.rows, bias=head.bias, pooling=pooling)
    logits = logits[:, 0::2] if variance else logits
    rewards = ops.discriminator_reward(logits, kind=EARLIER.get(divergence, divergence), alpha=alpha).cpu()
    lengths = batch.cu_seqlens.diff().tolist() if level == "token" else [1] * (len(batch.cu_seqlens) - 1)
    return rewards.split(lengths)


def combine(rewards: Sequence[Tensor], config: Config) -> Tensor:
    """Combine rewards ``[S, M]`` into one reward ``[S]``, or those ``[N, M]`` of tokens into one ``[N]``.

    ``mean`` adds the rewards up, each the mean of its heads. The other two take all heads of all rewards as one
    ensemble: ``min`` is the least reward, ``mean_std`` is the mean minus k standard deviations.
    """
    if config.reward_combine == "mean":
        return torch.stack([values.mean(1) for values in rewards]).sum(0)
    every = torch.cat(list(rewards), 1)
    if config.reward_combine == "min":
        return every.amin(1)
    return every.mean(1) - config.reward_std_weight * every.std(1, correction=min(1, every.shape[1] - 1))


def implicit_reward(
    run: Run, policy: str, reference: str | None, groups: Sequence[PromptGroup], path: Path
) -> Sequence[Tensor]:
    """Return β·log π(y_t)/π_ref(y_t) of the k tokens of every answer, ``[k, 1]`` fp64.

    Without a reference, the values are β·log π(y_t).

    Raises:
        InputError: policy or reference have another tokenizer than the run's policy.
    """
    for model in (policy, reference):
        if model and model not in OWN_POLICIES:
            check_tokenizer(f"implicit reward {model}", model, run.encoder, run.config)
    new, old = score_each_answer(run, policy_of(run, policy), groups, path), None
    if reference:
        own = path.with_name(f"{path.stem}-reference.safetensors")
        old = score_each_answer(run, policy_of(run, reference), groups, own)
    beta = run.config.at("beta", 0)
    ratio = Mapped(lambda a, b: a.double() - b.double(), new, old) if old else Mapped(Tensor.double, new)
    return Mapped(lambda values: beta * values[:, None], ratio)


def policy_of(run: Run, name: str) -> Path | str:
    """Return the policy of an implicit reward: one of the run's own, or that in a folder or on the hub."""
    if name not in OWN_POLICIES:
        return name
    return run.initial if name == "initial" else run.output / name / "policy"


def check_tokenizer(what: str, model: str, encoder: Encoder, config: Config) -> None:
    """Check that a model reads the same token ids as the run's policy; the padding token may differ.

    Raises:
        InputError: the model's tokenizer cannot be loaded, or is another one; the message begins with ``what``.
    """
    import transformers

    name = str(find_path(model) or model)
    with explain_errors(f"{what}: its tokenizer cannot be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    padding = {(each.pad_token, each.pad_token_id) for each in (tokenizer, encoder.tokenizer)}
    if (tokenizer.get_vocab().items() ^ encoder.tokenizer.get_vocab().items()) - padding:
        raise InputError(f"{what}: found another tokenizer than the policy's; expected the same")
