"""Scores by a frozen model, made once and cached: the reference's log-probability of every answer token (DESIGN §4).

Per token, because a sequence's log-ratio must be summed over per-token differences to stay exact.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from irlfast import ops
from irlfast.common import dist
from irlfast.common.files import LocalError, write
from irlfast.common.messages import Progress
from irlfast.config import Config
from irlfast.data.batching import longest_of, micro_batches, token_limit
from irlfast.data.packing import Batch, PromptGroup, pack
from irlfast.losses.inputs import arguments
from irlfast.models.attention import arrange, hidden_states
from irlfast.models.load import head_of, load_model
from irlfast.ops import Head
from irlfast.runs.run import Run

ANSWERS = 8  # of a prompt that one segment scores: more gain little, and a row's mask grows with all of them

Scores = list[tuple[Tensor, ...]]  # for every segment, the values of each of its answers
Measure = Callable[[Tensor, Head, Batch], Sequence[Tensor]]  # (hidden [R, H], head, batch) -> values of each answer


def token_logps(hidden: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """Log-probability of every token of each answer, fp32."""
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
) -> Scores:
    """What ``measure`` finds of every answer under ``model`` (with ``heads``: a reward model; or quantised).

    ``path`` caches it: ``values``, one after the other, with ``lengths`` of the answers' in order. Each process scores
    its share.
    """
    if not path.exists():
        starts = ((x, first) for x in groups for first in range(0, len(x.answers), ANSWERS))
        pieces = [PromptGroup(x.prompt, x.answers[first : first + ANSWERS]) for x, first in starts]
        scores: dict[int, list[np.ndarray]] = {}
        for part in dist.all_gather(score_share(run.config, model, pieces, path, measure, heads, in_4bit)):
            scores |= part
        if dist.is_main():
            write(path, lambda temporary: save_scores(temporary, [scores[i] for i in range(len(pieces))]))
        dist.barrier()
    flat = load_file(path)
    answers = iter(flat["values"].split(flat["lengths"].tolist()))
    return [tuple(next(answers) for _ in group.answers) for group in groups]


def log_ratios(new: Sequence[Tensor], old: Sequence[Tensor]) -> Tensor:
    """Σ_t of the differences of two models' log-probabilities, of each answer, fp64."""
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
) -> dict[int, list[np.ndarray]]:
    """This process's share of the scores, by the numbers of the segments.

    Arrays, because 100,000 small tensors would take a minute to other processes, each with its whole batch's memory.
    """
    model = load_model(name, config, heads, in_4bit).to(dist.device()).eval()
    layout, head = arrange(model, config, groups), head_of(model)
    limit = token_limit(config, longest_of(groups, layout), config.per_device_eval_batch_size)
    batches = micro_batches(range(len(groups)), groups, layout, limit, dist.rank(), dist.world_size())
    scores: dict[int, list[np.ndarray]] = {}
    label = f"{path.parent.name}/{path.stem}"
    todo = [chosen for chosen in reversed(batches) if chosen]
    with Progress(label, sum(map(len, batches)), "segment", seconds=10.0) as progress:
        while todo:
            chosen = todo.pop()
            batch = pack([groups[i] for i in chosen], layout).to(dist.device())
            try:
                answers = iter(measure(hidden_states(model, batch), head, batch))
            except torch.OutOfMemoryError as error:
                half = len(chosen) // 2
                if not half:
                    raise LocalError(f"{label}: out of memory with one prompt; expected a lower max_length") from error
                todo += [chosen[half:], chosen[:half]]
                continue
            for i in chosen:
                scores[i] = [next(answers).numpy() for _ in groups[i].answers]
            progress.advance(len(chosen))
            progress.show()
    return scores


def save_scores(path: Path, scores: Sequence[Sequence[np.ndarray]]) -> None:
    flat = [values for answers in scores for values in answers]
    lengths = np.array([len(values) for values in flat], dtype=np.int32)
    save_file({"values": np.concatenate(flat), "lengths": lengths}, path)
