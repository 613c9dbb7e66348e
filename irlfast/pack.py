"""Segments to batches: which sequences go together, in what order, as tensors that the policy and the ops take."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segment(NamedTuple):
    """One prompt with its answers: the expert's alone (SFT), or the expert's and a synthetic one (IRFT)."""

    prompt: list[int]
    answers: tuple[list[int], ...]
    ref_logps: tuple[Tensor, ...] = ()  # per answer, reference log-probability of each token, fp32


class Batch(NamedTuple):
    """Right-padded sequences and the rows of their hidden states that predict an answer token."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64
    rows: Tensor  # [N] int64, into the flattened [B * L] hidden states
    targets: Tensor  # [N] int64
    cu_seqlens: Tensor  # [S + 1] int32
    ref_logps: Tensor | None  # [N] fp32

    def to(self, device: torch.device) -> "Batch":
        moved = {name: tensor.to(device) for name, tensor in self._asdict().items() if tensor is not None}
        return self._replace(**moved)


def pack(segments: Sequence[Segment]) -> Batch:
    """Sequences ``prompt + answer`` of every segment in turn; the end token's own hidden state is not needed."""
    sequences = [(segment.prompt, answer) for segment in segments for answer in segment.answers]
    length = max(len(prompt) + len(answer) for prompt, answer in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    rows = []
    for i, (prompt, answer) in enumerate(sequences):
        tokens = len(prompt) + len(answer)
        input_ids[i, :tokens] = torch.tensor(prompt + answer)
        attention_mask[i, :tokens] = 1
        first = i * length + len(prompt) - 1  # the last prompt token predicts the first answer token
        rows.append(torch.arange(first, first + len(answer)))
    lengths = [len(answer) for _, answer in sequences]
    ref_logps = [logps for segment in segments for logps in segment.ref_logps]
    return Batch(
        input_ids,
        attention_mask,
        torch.cat(rows),
        torch.tensor([token for _, answer in sequences for token in answer]),
        torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        torch.cat(ref_logps) if ref_logps else None,
    )


def tokens(segment: Segment) -> int:
    return sum(len(segment.prompt) + len(answer) for answer in segment.answers)


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


def micro_batches(step: np.ndarray, segments: Sequence[Segment], size: int, rank: int, ranks: int) -> list[np.ndarray]:
    """This rank's micro-batches of a step: sequences of like length together, so that little is padding."""
    by_length = sorted(step, key=lambda i: (tokens(segments[i]), i))
    chunks = np.array(by_length).reshape(-1, size)
    return list(chunks[rank::ranks])
