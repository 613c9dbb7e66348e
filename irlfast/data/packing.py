"""Segments to batches: which go together, in what order, as tensors that the policy and the ops take.

A segment ``[prompt | expert | synthetic …]`` holds its prompt once. Its answers see the prompt and themselves, never
each other, and their positions go on from the prompt's end, so that each is what it would be in a sequence of its own.
An answer's last token predicts nothing and is left out, but for reward models, which read it.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.config import Config

PAD = -1
CPU_TOKENS = 1024  # of a micro-batch: more is no faster there, and takes memory
ROW_MULTIPLE = 128  # tokens; few different lengths of one row, so that a GPU's kernels are seldom made anew


class PromptGroup(NamedTuple):
    """One prompt with its answers: the expert's (SFT), the expert's and synthetic ones (IRFT), synthetic ones (RFT)."""

    prompt: Sequence[int]
    answers: tuple[Sequence[int], ...]
    ref_logps: tuple[Tensor, ...] = ()  # per answer, reference log-probability of each token, fp32
    old_logps: tuple[Tensor, ...] = ()  # the same under the policy that sampled it
    advantages: tuple[float, ...] = ()  # per answer
    learned: Sequence[int] | None = None  # positions in a single answer that a loss is on (None: all of them)
    row: int = -1  # the example's place in data/rows.jsonl


class Layout(NamedTuple):
    """How segments lie in a batch."""

    shared: bool = True  # answers share their prompt; else each is a segment of its own
    one_row: bool = False  # all in one row; else a row a segment, padded to the longest
    keep_last_token: bool = False  # with each answer's last token, and its tokens' own rows: what a reward model reads
    answer_cost: float = 0.0  # operations of an answer token at the head, relative to a token's in the layers
    attended_cost: float = 0.0  # of attention, for each token that a token sees


SHARED = Layout()


class Batch(NamedTuple):
    """Rows of segments, and which of their hidden states predict an answer token (``Layout.whole``: belong to it)."""

    input_ids: Tensor  # [B, L] int64
    position_ids: Tensor  # [B, L] int64
    group: Tensor  # [B, L] int32, number of the segment in its row, PAD at a row's end
    answer: Tensor  # [B, L] int32, 0 in a prompt, k in its k-th answer
    causal: bool  # every row is one sequence, so that a causal mask alone is right
    starts: Tensor  # [Q + 1] int32, where segments begin in the flattened [B * L], and their end; pads are the last's
    longest: int  # tokens of one of them
    rows: Tensor  # [N] int64, into the flattened [B * L] hidden states
    targets: Tensor  # [N] int64
    cu_seqlens: Tensor  # [S + 1] int32
    ref_logps: Tensor | None  # [N] fp32
    old_logps: Tensor | None  # [N] fp32
    advantages: Tensor | None  # [S] fp32

    def to(self, device: torch.device) -> "Batch":
        """On ``device``; a copy from pinned memory does not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In memory that a GPU copies from by itself, where there is one."""
        return self.map(Tensor.pin_memory) if torch.cuda.is_available() else self

    def unscored(self) -> "Batch":
        """The same tokens without answers to score: neither a loss nor a gradient."""
        names = ("rows", "targets", "ref_logps", "old_logps", "advantages")
        none = {name: value[:0] for name, value in self._asdict().items() if name in names and value is not None}
        return self._replace(**none, cu_seqlens=self.cu_seqlens[:1])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(v) for name, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**changed)


def pack(groups: Sequence[PromptGroup], layout: Layout = SHARED) -> Batch:
    """All answers of all segments in turn, in the rows that ``layout`` says."""
    pieces = [piece for group in groups for piece in packed_groups(group, layout)]
    lengths = np.array([count_tokens(piece) for piece in pieces])
    if layout.one_row:
        width = -(-int(lengths.sum()) // ROW_MULTIPLE) * ROW_MULTIPLE
        shape, starts = (1, width), lengths.cumsum() - lengths
    else:
        shape, starts = (len(pieces), int(lengths.max())), lengths.max() * np.arange(len(pieces))
    bounds = np.append(starts, math.prod(shape))
    input_ids, position_ids = np.zeros((2, *shape), dtype=np.int64)
    segment_ids, answer_ids = np.full((2, *shape), PAD, dtype=np.int32)
    flat = [array.reshape(-1) for array in (input_ids, position_ids, segment_ids, answer_ids)]
    rows = []
    for number, (piece, first) in enumerate(zip(pieces, starts, strict=True)):
        prompt = len(piece.prompt)
        put(flat, first, piece.prompt, 0, number if layout.one_row else 0, 0)
        at = first + prompt
        for k, answer in enumerate(piece.answers, 1):
            put(flat, at, answer[:-1], prompt, number if layout.one_row else 0, k)
            predicting = [first + prompt - 1, *range(at, at + len(answer) - 1)]
            rows.append(np.array(learned(predicting[layout.keep_last_token : len(answer)], piece), dtype=np.int64))
            at += max(len(answer) - 1, 0)
    answers = [
        learned(answer[: len(answer) - layout.keep_last_token], piece) for piece in pieces for answer in piece.answers
    ]
    advantages = [advantage for group in groups for advantage in group.advantages]
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(segment_ids),
        torch.from_numpy(answer_ids),
        causal=len(answers) == shape[0],
        starts=torch.from_numpy(bounds.astype(np.int32)),
        longest=int(np.diff(bounds).max()),
        rows=torch.from_numpy(np.concatenate(rows)),
        targets=torch.tensor([token for answer in answers for token in answer], dtype=torch.long),
        cu_seqlens=torch.tensor([0, *np.cumsum([len(answer) for answer in answers])], dtype=torch.int32),
        ref_logps=joined([group.ref_logps for group in groups]),
        old_logps=joined([group.old_logps for group in groups]),
        advantages=torch.tensor(advantages, dtype=torch.float32) if advantages else None,
    )


def learned(values: Sequence[int], group: PromptGroup) -> Sequence[int]:
    """Of an answer's values, one a token, those of the tokens that a loss is on."""
    return values if group.learned is None else [values[at] for at in group.learned]


def joined(logps: Sequence[tuple[Tensor, ...]]) -> Tensor | None:
    """Those of all segments' answers ``[N]``; None where segments have none."""
    flat = [answer for group in logps for answer in group]
    return torch.cat(flat) if flat else None


def put(flat: Sequence[np.ndarray], at: int, ids: Sequence[int], position: int, group: int, answer: int) -> None:
    """Write one prompt or answer into the flattened input, position, segment and answer ids."""
    for array, values in zip(flat, (ids, np.arange(position, position + len(ids)), group, answer), strict=True):
        array[at : at + len(ids)] = values


def packed_groups(group: PromptGroup, layout: Layout) -> list[PromptGroup]:
    """What is packed for a segment: itself, or a segment for each answer with a prompt of its own.

    Where answers are to be whole, a token more stands behind each, to be left out in the place of its last.
    """
    answers = tuple([*answer, 0] for answer in group.answers) if layout.keep_last_token else group.answers
    shared = PromptGroup(group.prompt, answers, learned=group.learned)
    return [shared] if layout.shared else [shared._replace(answers=(answer,)) for answer in answers]


def count_tokens(group: PromptGroup) -> int:
    """Tokens that a packed segment is."""
    return len(group.prompt) + sum(max(len(answer) - 1, 0) for answer in group.answers)


def token_counts(groups: Sequence[PromptGroup], layout: Layout) -> Counter[str]:
    """Tokens, answer tokens, and how many tokens each token sees, summed."""
    found: Counter[str] = Counter()
    for part in (part for group in groups for part in packed_groups(group, layout)):
        prompt, lengths = len(part.prompt), [max(len(answer) - 1, 0) for answer in part.answers]
        found["tokens"] += count_tokens(part)
        found["answer_tokens"] += sum(len(learned(answer, part)) - layout.keep_last_token for answer in part.answers)
        found["attended"] += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in lengths)
    return found


# ---------------------------------------------------------------- which segments go together


def plan_steps(count: int, batch: int, *, epochs: float | None, steps: int | None, seed: list[int]) -> list[np.ndarray]:
    """Which segments each optimiser step takes: passes over all, each shuffled anew, cut into steps of ``batch``.

    ``epochs`` may be a fraction. A last incomplete step is dropped, but there is at least one (taken from further
    passes where fewer than ``batch`` segments exist).
    """
    wanted = steps or max(1, int(count * (epochs or 1) // batch))
    passes = -(-wanted * batch // count)
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(count) for _ in range(passes)])
    return list(order[: wanted * batch].reshape(wanted, batch))


def micro_batches(
    step: Sequence[int], groups: Sequence[PromptGroup], layout: Layout, limit: int, rank: int = 0, ranks: int = 1
) -> list[list[int]]:
    """This rank's micro-batches of a step, at most ``limit`` tokens each, padding counted; a longer segment goes alone.

    All ranks' segments cost about the same together, and every rank has as many micro-batches, its k-th much like the
    others' k-th; some are empty where segments are few.
    """
    cost = {i: cost_of(groups[i], layout) for i in step}
    fill = first_fit if layout.one_row else similar_lengths
    bins: list[list[list[int]]] = [
        fill(share, groups, layout, limit) if share else [[]] for share in balanced_shares(step, cost, ranks)
    ]
    own, most = bins[rank], max(map(len, bins))
    while len(own) < most:
        own.sort(key=lambda chosen: (len(chosen) < 2, -sum(cost[i] for i in chosen)))
        own[:1] = balanced_shares(own[0], cost, 2)
    return sorted(own, key=lambda chosen: (-sum(cost[i] for i in chosen), chosen))


def cost_of(group: PromptGroup, layout: Layout) -> float:
    """Operations relative to a token's in the layers."""
    found = token_counts([group], layout)
    return found["tokens"] + layout.answer_cost * found["answer_tokens"] + layout.attended_cost * found["attended"]


def first_fit(step: Sequence[int], groups: Sequence[PromptGroup], layout: Layout, limit: int) -> list[list[int]]:
    """First-fit decreasing: each, from the largest, goes into the first bin that has room."""
    sizes = {i: sum(map(count_tokens, packed_groups(groups[i], layout))) for i in step}
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(step, key=lambda i: (-sizes[i], i)):
        place = next((place for place, free in enumerate(room) if free >= sizes[i]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(limit)
        bins[place].append(i)
        room[place] -= sizes[i]
    return bins


def similar_lengths(step: Sequence[int], groups: Sequence[PromptGroup], layout: Layout, limit: int) -> list[list[int]]:
    """From the longest on, as many as fit into ``limit`` when padded to the first's length."""
    longest = {i: max(map(count_tokens, packed_groups(groups[i], layout))) for i in step}
    rows = 1 if layout.shared else len(groups[step[0]].answers)
    bins: list[list[int]] = []
    width = 0
    for i in sorted(step, key=lambda i: (-longest[i], i)):
        if not bins or (len(bins[-1]) + 1) * rows * width > limit:
            bins.append([])
            width = longest[i]
        bins[-1].append(i)
    return bins


def balanced_shares(chosen: Sequence[int], cost: dict[int, float], parts: int) -> list[list[int]]:
    """Parts of about the same cost: each, from the costliest, goes to the part that has the least."""
    each: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for i in sorted(chosen, key=lambda i: (-cost[i], i)):
        least = loads.index(min(loads))
        each[least].append(i)
        loads[least] += cost[i]
    return each


def token_limit(config: Config, longest: int, count: int, most: int = sys.maxsize) -> int:
    """Tokens of a micro-batch: as configured, else what ``count`` segments of the ``longest`` are, on a CPU few.

    The latter are at most ``most``, but a segment at least.

    Raises:
        InputError: where a segment is longer than configured.
    """
    if config.max_tokens_per_batch == "auto":
        return max(longest, min(CPU_TOKENS if dist.device().type == "cpu" else longest * count, most))
    if longest > config.max_tokens_per_batch:
        raise InputError(
            f"max_tokens_per_batch: found {config.max_tokens_per_batch}, but the longest prompt has {longest} tokens "
            "with its answers; expected more, or a lower max_length"
        )
    return config.max_tokens_per_batch


def longest_of(groups: Sequence[PromptGroup], layout: Layout) -> int:
    """Tokens of the longest segment."""
    return max(sum(map(count_tokens, packed_groups(group, layout))) for group in groups)
