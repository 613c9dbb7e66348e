"""Measure a model on prompts: a row per prompt, with the model's answers and a number per figure.

Training measures its policies on the held-out demonstrations by :func:`measure`, and ``irlfast evaluate`` measures any
models on any prompts. The figures are those that ``docs/evaluation.md`` explains.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example, TokenIds
from irlfast.evaluation.scores import add_scores
from irlfast.evaluation.texts import diversity_figures, text_figures
from irlfast.runs.run import Run
from irlfast.sampling.generation import prompt_of, sample, sample_groups
from irlfast.sampling.scoring import log_ratios, score
from irlfast.sampling.shards import GREEDY, Sampling
from irlfast.sampling.thoughts import answering, think

Answers = Sequence[Sequence[int]]  # token ids


class Subject(NamedTuple):
    """A model to measure."""

    run: Run  # the prompts are ``run.held_out``
    policy: Path | str
    folder: Path  # keeps the model's answers and log-probabilities, so that a killed measurement resumes


class Logps(NamedTuple):
    """The log-probability of each token of a prompt's answers under one model, fp32."""

    expert: Tensor | None
    rejected: Tensor | None
    compared: Sequence[Tensor]  # of the reference's samples
    own: Sequence[Tensor]  # of the model's samples


def measure(subject: Subject, reference: Subject, how: Sampling, count: int, own: bool) -> list[dict[str, Any]]:
    """Return a row per prompt: the model's answers, its figures, and the tokens of the expert's answer.

    A figure that a prompt does not have is absent from its row: a prompt without an expert has no likelihood, and the
    reference itself has no margin.

    Args:
        reference: the model that implicit rewards are relative to. It reads the same token ids as the model. A model
            without a reference is its own.
        how: how samples are drawn.
        count: samples per prompt of the reference, which the expert's answer is compared with.
        own: draw as many samples of the model, too.
    """
    run, is_reference = subject.run, subject.folder == reference.folder
    asked = prompts_for(subject, GREEDY)
    greedy = sample(answering(run), subject.policy, asked, subject.folder / "greedy", GREEDY)
    compared = draw(reference, how, count)
    drawn = draw(subject, how, count) if own and not is_reference else [()] * len(compared)
    logps = score_answers(subject, how, compared, drawn)
    ref_logps: Sequence[Logps | None] = [None] * len(logps)
    if not is_reference:
        ref_logps = score_answers(reference, how, compared, [()] * len(compared))
    kl = kl_of(subject, reference, how, drawn, logps) if any(drawn) else [[]] * len(logps)
    rows = []
    for number, (example, told, answer) in enumerate(zip(run.held_out, asked, greedy, strict=True)):
        samples = drawn[number] or compared[number] if own else ()
        new, old = logps[number], ref_logps[number]
        expert = text(run, told.answer_ids) if told.answer_ids else None
        differ = [told.answer_ids != one for one in compared[number]]
        row: dict[str, Any] = {"prompt": prompt_of(run, example), "expert": expert, "answer": text(run, answer)}
        row |= {"samples": [text(run, one) for one in samples]} if own else {}
        row["figures"] = answer_figures(run, row["answer"], answer, expert) | likelihood_figures(new)
        rewards = log_ratios_of(new, old)
        row["figures"] |= reward_figures(rewards, differ)
        row |= {"log_ratios": rewards} if rewards else {}
        if own:
            each = [answer_figures(run, text(run, one), one, expert) for one in samples]
            row["figures"] |= diversity_figures(row["samples"])
            row["sample_figures"] = by_figure(each) | ({"kl": kl[number]} if kl[number] else {})
        row["expert_tokens"] = token_texts(run, told.answer_ids, new.expert)
        rows.append(row)
    if own:
        answers = [(told, *(one or other)) for told, one, other in zip(greedy, drawn, compared, strict=True)]
        add_scores(run, rows, answers, subject.folder)
    return rows


def prompts_for(subject: Subject, how: Sampling) -> Sequence[Example]:
    """Return the prompts as the model answers them: if the method thinks, with a thought of the model behind each."""
    run, kind = subject.run, "greedy" if how == GREEDY else "drawn"
    if not run.config.facts.thinks:
        return run.held_out
    return think(run, subject.policy, run.held_out, subject.folder / f"{kind}-thoughts", how)


def draw(subject: Subject, how: Sampling, count: int) -> list[tuple[Sequence[int], ...]]:
    """Sample ``count`` answers of the model to each prompt."""
    examples = prompts_for(subject, how)
    groups = sample_groups(answering(subject.run), subject.policy, examples, count, subject.folder / "drawn", how)
    return [group.answers for group in groups]


def score_answers(subject: Subject, how: Sampling, compared: Sequence[Answers], own: Sequence[Answers]) -> list[Logps]:
    """Score the expert's, the rejected, the reference's and the model's own answers to each prompt."""
    examples = prompts_for(subject, how)
    groups, sizes = [], []
    for example, first, second in zip(examples, compared, own, strict=True):
        given = [ids for ids in (example.answer_ids, example.rejected_ids) if ids]
        groups.append(PromptGroup(example.prompt_ids, (*given, *first, *second)))
        sizes.append(len(first))
    scores = score(subject.run, subject.policy, groups, subject.folder / "scores.safetensors")
    return [split(example, values, size) for example, values, size in zip(examples, scores, sizes, strict=True)]


def split(example: Example, values: Sequence[Tensor], compared: int) -> Logps:
    """Name the values of a prompt's answers; ``compared`` is the number of the reference's samples."""
    given = [bool(example.answer_ids), bool(example.rejected_ids)]
    samples = values[sum(given) :]
    expert = values[0] if given[0] else None
    rejected = values[given[0]] if given[1] else None
    return Logps(expert, rejected, samples[:compared], samples[compared:])


def kl_of(
    subject: Subject, reference: Subject, how: Sampling, drawn: Sequence[Answers], logps: Sequence[Logps]
) -> list[list[float]]:
    """Return log π(y|x)/π_ref(y|x) of each sample y of the model: their mean estimates KL(π‖π_ref) without bias.

    There is nothing to return if samples are not drawn from π itself, but with another temperature, top_p or top_k.
    """
    if (how.temperature, how.top_p, how.top_k) != (1.0, 1.0, 0):
        return [[]] * len(drawn)
    examples = prompts_for(reference, how)
    groups = [PromptGroup(x.prompt_ids, tuple(answers)) for x, answers in zip(examples, drawn, strict=True)]
    old = score(reference.run, reference.policy, groups, subject.folder / "by-reference.safetensors")
    return [log_ratios(new.own, each).tolist() for new, each in zip(logps, old, strict=True)]


# ---------------------------------------------------------------- figures of one prompt


def answer_figures(run: Run, answer: str, ids: Sequence[int], expert: str | None) -> dict[str, float]:
    """Return the figures of one answer: its tokens, whether it has an end token, and those of its text."""
    return {"length": float(len(ids)), "ended": float(ids[-1] in run.encoder.ends)} | text_figures(answer, expert)


def likelihood_figures(logps: Logps) -> dict[str, float]:
    """Return the figures of a prompt's given answers under one model, in nats."""
    if logps.expert is None:
        return {}
    expert = logps.expert.double()
    figures = {"nll": -expert.sum().item(), "nll_per_token": -expert.mean().item()}
    if logps.rejected is not None:
        gap = (expert.sum() - logps.rejected.double().sum()).item()
        figures |= {"preference_gap": gap, "preference_gap_accuracy": float(gap > 0)}
    return figures


def log_ratios_of(new: Logps, old: Logps | None) -> dict[str, Any]:
    """Return the implicit rewards ρ = log π/π_ref of a prompt's answers, in nats; nothing without a reference."""
    if old is None or new.expert is None or old.expert is None:
        return {}
    expert, *synthetic = log_ratios([new.expert, *new.compared], [old.expert, *old.compared]).tolist()
    rewards = {"expert": expert, "synthetic": synthetic}
    if new.rejected is not None and old.rejected is not None:
        rewards["rejected"] = log_ratios([new.rejected], [old.rejected]).item()
    return rewards


def reward_figures(rewards: dict[str, Any], differ: Sequence[bool]) -> dict[str, float]:
    """Return the figures of implicit rewards (:func:`log_ratios_of`).

    ``differ`` says which of the synthetic answers differ from the expert's answer. The others do not count.
    """
    figures: dict[str, float] = {}
    if not rewards:
        return figures
    margins = [rewards["expert"] - rho for rho, differs in zip(rewards["synthetic"], differ, strict=True) if differs]
    if margins:
        figures |= {"margin": mean(margins), "reward_accuracy": mean([value > 0 for value in margins])}
    if "rejected" in rewards:
        margin = rewards["expert"] - rewards["rejected"]
        figures |= {"preference_margin": margin, "preference_accuracy": float(margin > 0)}
    return figures


def by_figure(each: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Turn a dict of numbers per sample into a list of numbers per figure."""
    return {name: [figures[name] for figures in each] for name in each[0]} if each else {}


def token_texts(run: Run, ids: TokenIds, logps: Tensor | None) -> list[tuple[str, float]]:
    """Return the text and the log-probability of each token."""
    if logps is None:
        return []
    texts = [token_text(run.encoder.tokenizer, token) for token in ids.tolist()]
    return [(token, round(value, 6)) for token, value in zip(texts, logps.tolist(), strict=True)]


@functools.lru_cache(2**17)
def token_text(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token])


def text(run: Run, ids: Sequence[int]) -> str:
    return run.encoder.tokenizer.decode([*ids], skip_special_tokens=True).strip()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
