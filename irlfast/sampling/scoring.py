"""Scores of answers by a frozen model, computed once and kept in a file.

Mostly these are the reference's log-probabilities of answer tokens. They are kept per token, because a sequence's
log-ratio stays exact only if the differences are taken per token and then summed (docs/design.md §4).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

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
from irlfast.losses.inputs import arguments
from irlfast.models.forward import hidden_states, states_at
from irlfast.models.prepare import PreparedModel, prepare_to_score
from irlfast.models.split import gathered, is_split, runnable
from irlfast.ops import Head
from irlfast.runs.run import Run

MAX_ANSWERS = 8  # of a prompt that are scored together: more save little, and a row's mask grows with all of them

Scores = list[tuple[Tensor, ...]]  # for each prompt group, the values of each of its answers
Measure = Callable[[Tensor, Head, Batch], Sequence[Tensor]]  # (hidden [R, H], head, batch) -> values of each answer


def token_logps(hidden: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """Return the log-probabilities of each answer's tokens, fp32."""
    logps = ops.log_ratio(hidden, **arguments(head, batch)).token_logps
    return logps.cpu().split(batch.cu_seqlens.diff().tolist())


def score(
    run: Run,
    model: Path | str,
    groups: Sequence[PromptGroup],
    path: Path,
    measure: Measure = token_logps,
    heads: int = 0,
    in_4bit: bool = False,
    depths: Sequence[float] = (),
) -> Scores:
    """Return what ``measure`` computes of every answer under ``model``; with ``heads``, the model is a reward model.

    With ``depths``, ``measure`` gets the hidden states ``[R, k, H]`` at these k depths of the model.

    The scores are kept in the file ``path``: ``values`` of all answers, one after the other, and the ``lengths`` of the
    answers' values. Each process scores its share.
    """
    if not dist.on_main(intact, path):
        starts = ((group, first) for group in groups for first in range(0, len(group.answers), MAX_ANSWERS))
        pieces = [PromptGroup(group.prompt, group.answers[first : first + MAX_ANSWERS]) for group, first in starts]
        scores: dict[int, list[np.ndarray]] = {}
        own = score_share(run.config, model, pieces, path, measure, heads, in_4bit, depths)
        for share in dist.all_gather_object(own):
            scores |= share
        if dist.is_main():
            keep(path, lambda temporary: save_scores(temporary, [scores[i] for i in range(len(pieces))]))
        dist.barrier()
    flat = load_file(path)
    answers = iter(flat["values"].split(flat["lengths"].tolist()))
    return [tuple(next(answers) for _ in group.answers) for group in groups]


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
) -> dict[int, list[np.ndarray]]:
    """Return the scores of this process's share of the prompt groups, by the groups' numbers.

    The scores are arrays: sending 100,000 small tensors to other processes would take a minute, and would send each
    with the memory of its whole batch. Where ZeRO-3 has split the model, the processes take their forward passes
    together: each as many, and one without prompts runs the first of all for the others.

    Raises:
        InputError: out of memory with one prompt, or with a split model.
    """
    prepared = prepare_to_score(name, config, groups, heads, in_4bit)
    layout = prepared.layout
    limit = token_limit(config, longest_of(groups, layout), config.per_device_eval_batch_size)
    batches = micro_batches(range(len(groups)), groups, layout, limit, dist.rank(), dist.world_size())
    scores: dict[int, list[np.ndarray]] = {}
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
            batch = pack([groups[i] for i in chosen or [0]], layout).to(dist.device())
            try:
                answers = iter(measured(prepared, batch, measure, depths))
            except torch.OutOfMemoryError as error:
                half = len(chosen) // 2
                if split or not half:
                    raise InputError(f"{label}: out of memory with {advice(split)}") from error
                todo += [chosen[half:], chosen[:half]]
                continue
            for i in chosen:
                scores[i] = [next(answers).numpy() for _ in groups[i].answers]
            progress.advance(len(chosen))
            progress.show()
    return scores


def measured(prepared: PreparedModel, batch: Batch, measure: Measure, depths: Sequence[float]) -> Sequence[Tensor]:
    """Return what ``measure`` computes of the answers of a batch."""
    hidden = states_at(prepared.model, batch, depths) if depths else hidden_states(prepared.model, batch)
    with gathered(prepared.head_module.weight, prepared.head_module.bias):
        return measure(hidden, prepared.head(), batch)


def advice(split: bool) -> str:
    if split:
        return "a model that zero_stage 3 splits; expected a lower max_tokens_per_batch or per_device_eval_batch_size"
    return "one prompt; expected a lower max_length"


def save_scores(path: Path, scores: Sequence[Sequence[np.ndarray]]) -> None:
    flat = [values for answers in scores for values in answers]
    lengths = np.array([len(values) for values in flat], dtype=np.int32)
    save_tensors({"values": np.concatenate(flat), "lengths": lengths}, path)
