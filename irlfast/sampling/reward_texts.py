"""Rewards of answers that are read as texts: computed once, by all processes together, and kept in a file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from irlfast.common import dist
from irlfast.common.artefacts import intact, keep
from irlfast.common.tensors import save_tensors
from irlfast.runs.run import Run


def cached(path: Path, share: Callable[[], dict[int, float]]) -> Tensor:
    """Return the rewards ``[S, 1]`` fp64 in the file ``path``, which is made first if it is not there and intact.

    ``share`` computes the rewards of this process's share of the answers, by the answers' numbers.
    """
    if not dist.on_main(intact, path):
        rewards: dict[int, float] = {}
        for part in dist.all_gather_object(share()):
            rewards |= part
        if dist.is_main():
            values = torch.tensor([rewards[number] for number in range(len(rewards))], dtype=torch.float32)
            keep(path, lambda temporary: save_tensors({"values": values}, temporary))
        dist.barrier()
    return load_file(path)["values"].double()[:, None]


def text_of(run: Run, answer: Sequence[int]) -> str:
    """Return an answer's text without its end token and other special tokens."""
    return run.encoder.tokenizer.decode([*answer], skip_special_tokens=True)


def row_of(run: Run, number: int) -> dict[str, Any]:
    """Return the row of data/rows.jsonl with this number: its messages, tools, and the row as it was read."""
    assert run.rows is not None
    return run.rows[number]
