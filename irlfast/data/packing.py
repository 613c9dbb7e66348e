"""Prompt groups to batches: the tensors that a model and the operations take. Start with the drawing at ``Batch``.

A batch holds a prompt once for all of its answers. Each answer attends to the prompt and to itself, never to another
answer, and its positions continue from the prompt's end: its hidden states are those of a sequence of its own.
Which groups go into a batch together is decided in ``batching.py``.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PAD = -1
ROW_MULTIPLE = 128  # tokens; few different lengths of one row, so that a GPU's kernels are rarely compiled anew


class PromptGroup(NamedTuple):
    """One prompt and its answers: the expert's (SFT), the expert's and a synthetic one (IRFT), or synthetic ones (RFT).

    A reward model's group has the better answer first.
    """

    prompt: Sequence[int]
    answers: tuple[Sequence[int], ...]
    ref_logps: tuple[Tensor, ...] = ()  # per answer, the reference's log-probability of each token, fp32
    old_logps: tuple[Tensor, ...] = ()  # the same, of the policy that sampled the answer
    advantages: tuple[Tensor, ...] = ()  # per answer, the advantage of each token, fp32
    weights: tuple[Tensor, ...] = ()  # per answer, the importance weight of each token, fp32
    thoughts: tuple[int, ...] = ()  # per answer, how many of its first tokens are a thought
    learned: Sequence[int] | None = None  # tokens of a single answer that the loss is on; None: all of them
    teacher_prompt: Sequence[int] | None = None  # the prompt that the teacher reads; None: the same
    row: int = -1  # the example's line in data/rows.jsonl


class Layout(NamedTuple):
    """How prompt groups lie in a batch."""

    shared: bool = True  # the answers of a group share its prompt; otherwise each has a copy
    one_row: bool = False  # all groups in one row; otherwise a row per group, padded to the longest
    keep_last_token: bool = False  # for a reward model, which reads each token's own hidden state, the last one's too
    answer_cost: float = 0.0  # operations of an answer token at the head, relative to those of a token in the layers
    attended_cost: float = 0.0  # operations of attention per token that a token attends to, relative to the same


SHARED = Layout()


class Batch(NamedTuple):
    """B rows of L tokens, and N of their hidden states, which predict the N answer tokens of S answers.

    For example, the prompt ``5 6 7`` with the answers ``11 12 13 2`` and ``21 2``, where 2 is the end token::

        {
            # Per token: one row, B = 1, L = 7. The end tokens predict nothing, so they are targets only.
            "input_ids":    [5, 6, 7, 11, 12, 13, 21],
            "position_ids": [0, 1, 2,  3,  4,  5,  3],  # both answers continue from the prompt
            "group":        [0, 0, 0,  0,  0,  0,  0],
            "answer":       [0, 0, 0,  1,  1,  1,  2],  # the prompt is 0
            # Per answer token: N = 6, S = 2. The prompt's last hidden state predicts the first token of each answer.
            "rows":         [2, 3, 4, 5,     2, 6],  # of the hidden states, flattened to [B * L, H]
            "targets":      [11, 12, 13, 2,  21, 2],
            "cu_seqlens":   [0,              4, 6],  # where each answer begins and ends in the N
        }

    A reward model (``Layout.keep_last_token``) gets the end tokens as input too, and ``rows`` are the targets' own.
    """

    input_ids: Tensor  # [B, L] int64
    position_ids: Tensor  # [B, L] int64
    group: Tensor  # [B, L] int32, the group's number in its row; PAD at a row's end
    answer: Tensor  # [B, L] int32, 0 in a prompt, k in the group's k-th answer; PAD at a row's end
    causal: bool  # every row is one sequence, so a causal mask alone is right
    starts: Tensor  # [groups + 1] int32, where each group begins in the flattened [B * L]; pads belong to the last
    longest: int  # tokens from one start to the next, at most
    rows: Tensor  # [N] int64
    targets: Tensor  # [N] int64
    cu_seqlens: Tensor  # [S + 1] int32
    ref_logps: Tensor | None  # [N] fp32
    old_logps: Tensor | None  # [N] fp32
    advantages: Tensor | None  # [N] fp32
    weights: Tensor | None  # [N] fp32
    thoughts: Tensor | None  # [S] int64, how many of an answer's first tokens are a thought
    teacher: "Batch | None" = None  # the same answers behind the teacher's own prompts, in the same order

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to ``device``; a copy from pinned memory does not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Move the batch to memory that a GPU copies from by itself, where there is a GPU."""
        return self.map(Tensor.pin_memory) if torch.cuda.is_available() else self

    def unscored(self) -> "Batch":
        """Return the same tokens without targets: such a batch has neither a loss nor a gradient."""
        names = ("rows", "targets", "ref_logps", "old_logps", "advantages", "weights", "thoughts")
        none = {name: value[:0] for name, value in self._asdict().items() if name in names and value is not None}
        return self._replace(**none, cu_seqlens=self.cu_seqlens[:1], teacher=self.teacher and self.teacher.unscored())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(v) for name, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**changed, teacher=self.teacher and self.teacher.map(change))


def pack(groups: Sequence[PromptGroup], layout: Layout = SHARED) -> Batch:
    """Pack all answers of all groups, in order, as ``layout`` says."""
    pieces = [piece for group in groups for piece in pieces_of(group, layout)]
    shape, bounds = places(pieces, layout)
    size = shape[0] * shape[1]
    input_ids, position_ids = np.zeros((2, size), dtype=np.int64)
    group_numbers, answer_numbers = np.full((2, size), PAD, dtype=np.int32)
    rows: list[int] = []  # N
    targets: list[int] = []  # N
    lengths: list[int] = []  # S

    def write(begin: int, ids: Sequence[int], position: int, group: int, answer: int) -> None:
        span = slice(begin, begin + len(ids))
        input_ids[span], position_ids[span] = ids, np.arange(position, position + len(ids))
        group_numbers[span], answer_numbers[span] = group, answer

    for number, (piece, begin) in enumerate(zip(pieces, bounds[:-1].tolist(), strict=True)):
        number_in_row, prompt = number if layout.one_row else 0, len(piece.prompt)
        write(begin, piece.prompt, 0, number_in_row, 0)
        end = begin + prompt
        for k, answer in enumerate(piece.answers, 1):
            kept = answer[: kept_length(answer, layout)]
            write(end, kept, prompt, number_in_row, k)
            own = range(end, end + len(kept))
            # A policy predicts each token from the one before it. A reward model reads the token itself.
            rows += learned(own if layout.keep_last_token else [begin + prompt - 1, *own][: len(answer)], piece)
            targets += learned(answer, piece)
            lengths.append(len(learned(answer, piece)))
            end += len(kept)
    thoughts = [length for group in groups for length in group.thoughts]
    return Batch(
        input_ids=torch.from_numpy(input_ids.reshape(shape)),
        position_ids=torch.from_numpy(position_ids.reshape(shape)),
        group=torch.from_numpy(group_numbers.reshape(shape)),
        answer=torch.from_numpy(answer_numbers.reshape(shape)),
        causal=len(lengths) == shape[0],
        starts=torch.from_numpy(bounds.astype(np.int32)),
        longest=int(np.diff(bounds).max()),
        rows=torch.tensor(rows, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        ref_logps=joined([group.ref_logps for group in groups]),
        old_logps=joined([group.old_logps for group in groups]),
        advantages=joined([group.advantages for group in groups]),
        weights=joined([group.weights for group in groups]),
        thoughts=torch.tensor(thoughts, dtype=torch.int64) if thoughts else None,
        teacher=pack([*map(for_teacher, groups)], layout) if groups[0].teacher_prompt is not None else None,
    )


def for_teacher(group: PromptGroup) -> PromptGroup:
    """Return a group that has a ``teacher_prompt`` as the teacher reads it: the same answers behind this prompt."""
    return PromptGroup(group.teacher_prompt or (), group.answers, learned=group.learned)


def readings(group: PromptGroup) -> list[PromptGroup]:
    """Return the group, and the group as the teacher reads it where that is another text."""
    return [group] if group.teacher_prompt is None else [group, for_teacher(group)]


def pieces_of(group: PromptGroup, layout: Layout) -> list[PromptGroup]:
    """Return the group itself where its answers share the prompt, else a group per answer."""
    if layout.shared:
        return [group]
    return [PromptGroup(group.prompt, (answer,), learned=group.learned) for answer in group.answers]


def places(pieces: Sequence[PromptGroup], layout: Layout) -> tuple[tuple[int, int], np.ndarray]:
    """Return the batch's shape (B, L), and where each piece begins in the flattened ``[B * L]``, with their end."""
    sizes = [piece_length(piece, layout) for piece in pieces]
    if layout.one_row:
        width = -(-sum(sizes) // ROW_MULTIPLE) * ROW_MULTIPLE
        return (1, width), np.append(np.cumsum([0, *sizes[:-1]]), width)
    width = max(sizes)
    return (len(pieces), width), width * np.arange(len(pieces) + 1)


def learned(values: Sequence[int], group: PromptGroup) -> Sequence[int]:
    """Select from one value per token of an answer those of the tokens that the loss is on."""
    return values if group.learned is None else [values[token] for token in group.learned]


def joined(values: Sequence[tuple[Tensor, ...]]) -> Tensor | None:
    """Concatenate the values of all answers' tokens to ``[N]``; None where the groups have none."""
    answers = [answer for group in values for answer in group]
    return torch.cat(answers) if answers else None


def kept_length(answer: Sequence[int], layout: Layout) -> int:
    """Return how many tokens of an answer are input: all but the last, which predicts nothing, or all."""
    return len(answer) if layout.keep_last_token else max(len(answer) - 1, 0)


def piece_length(piece: PromptGroup, layout: Layout) -> int:
    return len(piece.prompt) + sum(kept_length(answer, layout) for answer in piece.answers)


def count_tokens(group: PromptGroup, layout: Layout = SHARED) -> int:
    """Return how many tokens of a forward pass the group takes, without padding: the policy's or the teacher's."""
    return max(sum(piece_length(piece, layout) for piece in pieces_of(read, layout)) for read in readings(group))


def token_counts(groups: Sequence[PromptGroup], layout: Layout) -> Counter[str]:
    """Return ``tokens``, ``answer_tokens`` with a loss, and ``attended``: how many tokens each attends to, summed."""
    counts: Counter[str] = Counter()
    for piece in (piece for group in groups for piece in pieces_of(group, layout)):
        prompt, lengths = len(piece.prompt), [kept_length(answer, layout) for answer in piece.answers]
        counts["tokens"] += piece_length(piece, layout)
        counts["answer_tokens"] += sum(len(learned(answer, piece)) for answer in piece.answers)
        counts["attended"] += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in lengths)
    return counts
