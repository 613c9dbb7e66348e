"""Scores of answers by a frozen model, computed once and kept in a file.

Mostly these are the reference's log-probabilities of answer tokens. They are kept per token, because a sequence's
log-ratio stays exact only if the differences are taken per token and then summed (docs/design.md §4).
"""

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from irlfast import ops
from irlfast.common import dist
from irlfast.common.artefacts import intact, keep
from irlfast.common.files import InputError
from irlfast.common.messages import Progress
from irlfast.common.movement import in_small_units
from irlfast.common.tensors import save_tensors
from irlfast.config import Config
from irlfast.data.batching import longest_of, micro_batches, token_limit
from irlfast.data.packing import Batch, PromptGroup, pack
from irlfast.data.store import Mapped, cut
from irlfast.losses.inputs import arguments
from irlfast.models.forward import hidden_states, states_at
from irlfast.models.prepare import PreparedModel, prepare_to_score
from irlfast.models.split import gathered, is_split, runnable
from irlfast.ops import Head
from irlfast.runs.run import Run

MAX_ANSWERS = 8  # of a prompt that are scored together: more save little, and a row's mask grows with all of them

Scores = Sequence[tuple[Tensor, ...]]  # for each prompt group, the values of each of its answers
Measure = Callable[[Tensor, Head, Batch], Sequence[Tensor]]  # (hidden [R, H], head, batch) -> values of each answer


class Share(NamedTuple):
    """The scores of S answers that one process has scored, in the order in which it did."""

    groups: np.ndarray  # [S] int32, the number of each answer's prompt group
    lengths: np.ndarray  # [S] int32, of each answer's values
    values: np.ndarray  # [N, …] the values of all answers, one after the other


def token_logps(hidden: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """Return the log-probabilities of each answer's tokens, fp32."""
    logps = ops.log_ratio(hidden, **arguments(head, batch)).token_logps
    return logps.cpu().split(batch.cu_seqlens.diff().tolist())


def score(run: Run, model: Path | str, groups: Sequence[PromptGroup], path: Path, **how: Any) -> Scores:
    """Return the scores of :func:`score_each_answer`, with its other arguments, by prompt group."""
    return by_group(score_each_answer(run, model, groups, path, **how), groups)


def score_each_answer(
    run: Run,
    model: Path | str,
    groups: Sequence[PromptGroup],
    path: Path,
    measure: Measure = token_logps,
    heads: int = 0,
    in_4bit: bool = False,
    depths: Sequence[float] = (),
) -> Sequence[Tensor]:
    """Return what ``measure`` computes of every answer under ``model``; with ``heads``, the model is a reward model.

    With ``depths``, ``measure`` gets the hidden states ``[R, k, H]`` at these k depths of the model.

    The scores are kept in the file ``path``: ``values`` of all answers, one after the other, and the ``lengths`` of the
    answers' values. Each process scores its share.
    """
    if not dist.on_main(intact, path):
        pieces = pieces_of(groups)
        own = score_share(run.config, model, pieces, path, measure, heads, in_4bit, depths)
        shares = dist.all_gather_object(own)
        if dist.is_main():
            keep(path, lambda temporary: save_scores(temporary, shares))
        dist.barrier()
    flat = load_file(path)
    return cut(flat["values"], flat["lengths"].numpy())


def by_group(values: Sequence[Tensor], groups: Sequence[PromptGroup]) -> Scores:
    """Return the values of each answer of all groups by prompt group."""
    return Mapped(tuple, cut(values, answer_counts(groups)))


def answer_counts(groups: Sequence[PromptGroup]) -> np.ndarray:
    return np.fromiter((len(group.answers) for group in groups), np.int64, len(groups))


def pieces_of(groups: Sequence[PromptGroup]) -> Sequence[PromptGroup]:
    """Return the prompt groups in pieces of at most ``MAX_ANSWERS`` answers."""
    pieces = -(-answer_counts(groups) // MAX_ANSWERS)  # of each group
    group = np.repeat(np.arange(len(groups)), pieces)
    first = MAX_ANSWERS * (np.arange(len(group)) - np.repeat(pieces.cumsum() - pieces, pieces))

    def piece(number: int, start: int) -> PromptGroup:
        whole = groups[number]
        return PromptGroup(whole.prompt, whole.answers[start : start + MAX_ANSWERS])

    return Mapped(piece, group, first)


def log_ratios(new: Sequence[Tensor], old: Sequence[Tensor]) -> Tensor:
    """Return the log-ratio ``[S]`` fp64 of each answer: the sum of its tokens' differences of log-probabilities."""
    return torch.stack([(a.double() - b.double()).sum() for a, b in zip(new, old, strict=True)])


@torch.no_grad()
def score_share(
    config: Config,
    name: Path | str,
    groups: Sequence[PromptGroup],
    path: Path,
    measure: Measure,
    heads: int,
    in_4bit: bool,
    depths: Sequence[float] = (),
) -> Share:
    """Return the scores of this process's share of the prompt groups.

    Where ZeRO-3 has split the model, the processes take their forward passes together: each as many, and one without
    prompts runs the first of all for the others.

    Raises:
        InputError: out of memory with one prompt, or with a split model.
    """
    prepared = prepare_to_score(name, config, groups, heads, in_4bit)
    layout = prepared.layout
    limit = token_limit(config, longest_of(groups, layout), config.per_device_eval_batch_size)
    batches = micro_batches(range(len(groups)), groups, layout, limit, dist.rank(), dist.world_size())
    numbers, lengths, values = array("i"), array("i"), []
    label = f"{path.parent.name}/{path.stem}"
    split = is_split(prepared.model)
    todo = [chosen for chosen in reversed(batches) if chosen or split]
    with (
        in_small_units(label),
        Progress(label, sum(map(len, batches)), "prompt", seconds=10.0) as progress,
        runnable(prepared.model, config),
    ):
        while todo:
            chosen = todo.pop()
            packed = [groups[i] for i in chosen or [0]]
            batch = pack(packed, layout).to(dist.device())
            try:
                answers = measured(prepared, batch, measure, depths)
            except torch.OutOfMemoryError as error:
                half = len(chosen) // 2
                if split or not half:
                    raise InputError(f"{label}: out of memory with {advice(split)}") from error
                todo += [chosen[half:], chosen[:half]]
                continue
            if chosen:
                numbers.extend(i for i, group in zip(chosen, packed, strict=True) for _ in group.answers)
                lengths.extend(map(len, answers))
                values.append(torch.cat([*answers]).numpy())
            progress.advance(len(chosen))
            progress.show()
    return Share(np.array(numbers), np.array(lengths), np.concatenate(values) if values else np.zeros(0, np.float32))


def measured(prepared: PreparedModel, batch: Batch, measure: Measure, depths: Sequence[float]) -> Sequence[Tensor]:
    """Return what ``measure`` computes of the answers of a batch."""
    hidden = states_at(prepared.model, batch, depths) if depths else hidden_states(prepared.model, batch)
    with gathered(prepared.head_module.weight, prepared.head_module.bias):
        return measure(hidden, prepared.head(), batch)


def advice(split: bool) -> str:
    if split:
        return "a model that zero_stage 3 splits; expected a lower max_tokens_per_batch or per_device_eval_batch_size"
    return "one prompt; expected a lower max_length"


def save_scores(path: Path, shares: Sequence[Share]) -> None:
    """Write the scores of all processes in the order of the prompt groups."""
    groups, lengths, values = map(np.concatenate, zip(*[share for share in shares if len(share.groups)], strict=True))
    order, ordered = groups.argsort(kind="stable"), np.empty_like(values)
    each, end = cut(values, lengths), 0
    for number in order:
        start, end = end, end + lengths[number]
        ordered[start:end] = each[number]
    save_tensors({"values": ordered, "lengths": lengths[order]}, path)
