"""Tokens of a forward pass: as ``max_tokens_per_batch`` says, or as many as memory holds, measured and backed off."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from irlfast.common import dist
from irlfast.common.files import LocalError, read_json, write_json
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.packing import Layout, PromptGroup, longest_of, token_limit

GPU_TOKENS = 32768  # at the most: more is no faster there, and a mask grows with their square
SAFE = 0.9  # of a GPU's memory; what lies between its blocks is lost


class OutOfMemory(Exception):
    """Memory did, in a phase that is to go on from its last checkpoint with smaller batches."""


class Limit:
    """Tokens of the micro-batches: ``tokens`` at first; where they are ``auto``, as memory tells, up to ``most``.

    A segment has up to ``least``: no batch can be made smaller.
    """

    def __init__(self, config: Config, tokens: int, least: int = 1, most: int = sys.maxsize) -> None:
        self.auto = config.max_tokens_per_batch == "auto"
        self.tokens, self.least, self.most = tokens, least, most

    def refit(self, step: int, largest: int) -> None:
        """After ``step`` of this start, whose largest micro-batch had ``largest`` tokens, raise the limit.

        The second step is the first with all of the optimiser's state; what it took at its peak, for its tokens, says
        how many fit on the fullest GPU of all processes.
        """
        memory = gpu_memory() if self.auto and step <= 2 else None
        if memory is None or step < 2:  # the first call makes the second tell of the second step
            return
        found = min(dist.all_gather(fitting(largest, *memory)))
        fits = max(self.tokens, min(found, GPU_TOKENS, self.most))
        log(f"max_tokens_per_batch: {self.tokens:,} tokens to start with, {fits:,} after measuring a step")
        self.tokens = fits

    @contextlib.contextmanager
    def backing_off(self, checkpoint: Path) -> Iterator[None]:
        """Note in ``checkpoint`` with how many tokens memory ran out, for ``allowed`` to halve.

        Raises:
            RanOut: the phase can start again.
            LocalError: not at once, as other processes wait for this one; or never, as the limit was given, or the
                batch was one segment.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            ran_out = f"{checkpoint.parent.name}: out of memory with {self.tokens:,} tokens a batch"
            if not self.auto:
                raise LocalError(f"{ran_out}; expected a lower max_tokens_per_batch, or auto") from error
            if self.tokens <= self.least:
                raise LocalError(f"{ran_out}, one prompt and its answers; expected a lower max_length") from error
            write_json(checkpoint / f"out-of-memory-{dist.rank()}.json", {"tokens": self.tokens})
            if dist.world_size() > 1:
                raise LocalError(
                    f"{ran_out}; the same command goes on from the last checkpoint with half of them"
                ) from error
            log(f"{ran_out}; goes on from the last checkpoint with half of them")
            raise OutOfMemory from error


def allowed(checkpoint: Path) -> int:
    """Half of the tokens with which any process ran out of memory in the phase whose checkpoints are in this folder."""
    found = [read_json(path)["tokens"] // 2 for path in checkpoint.glob("out-of-memory-*.json")]
    return min(dist.all_gather(min(found, default=sys.maxsize)))


def phase_limit(config: Config, groups: Sequence[PromptGroup], layout: Layout, count: int, checkpoint: Path) -> Limit:
    """Of the phase whose checkpoints are in this folder."""
    longest, most = longest_of(groups, layout), allowed(checkpoint)
    return Limit(config, token_limit(config, longest, count, most), longest, most)


def fitting(count: int, base: int, peak: int, total: int) -> int:
    """Tokens that fit into ``total`` bytes, of which ``base`` are always taken, and ``peak`` were with ``count``.

    All above ``base`` is taken to grow with them, though a part, as the loss's buffer, does not.
    """
    return int((SAFE * total - base) * count / max(peak - base, 1))


def gpu_memory() -> tuple[int, int, int] | None:
    """Bytes taken now, at the most since the last call, and that this process can have; None on a CPU."""
    if dist.device().type != "cuda":
        return None
    taken, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return taken, peak, torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
