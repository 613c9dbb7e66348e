"""How many tokens a micro-batch may have: ``max_tokens_per_batch``, or as many as the GPU's memory holds."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from irlfast.common import dist
from irlfast.common.artefacts import intact, keep_json
from irlfast.common.files import InputError, read_json
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.batching import longest_of, token_limit
from irlfast.data.packing import Layout, PromptGroup

GPU_TOKENS = 32768  # at most: more is no faster on a GPU, and an attention mask grows with their square
FIRST_GROUPS = 8  # of the longest prompts, in a micro-batch before memory was measured: TRL's default
SAFE = 0.9  # share of a GPU's memory that is used: gaps between blocks take some of the rest


class OutOfMemory(Exception):
    """Raised when the GPU runs out of memory: ``fit`` restarts the phase from its checkpoint with half the tokens."""


@dataclasses.dataclass
class TokenLimit:
    """The most tokens that a micro-batch may have. The training loop raises it once, after it measured a step."""

    tokens: int
    auto: bool  # max_tokens_per_batch: auto; a given number never changes
    least: int = 1  # tokens of the longest prompt group: no batch can be smaller
    most: int = sys.maxsize  # half of the tokens with which memory ran out before

    def fit_to_memory(self, step: int, largest: int) -> None:
        """Raise the limit to what memory holds, after the second ``step`` since the phase was started or resumed.

        The second step is the first with all of the optimiser's state. The memory that its micro-batch of ``largest``
        tokens took tells how many tokens fit. The process with the least room decides.
        """
        if not self.auto or step > 2:
            return
        measured = gpu_memory()
        if measured is None or step < 2:  # the first call starts the measurement of the second step's peak
            return
        fitting = min(dist.all_gather_object(fitting_tokens(largest, *measured)))
        tokens = max(self.tokens, min(fitting, GPU_TOKENS, self.most))
        log(f"max_tokens_per_batch: {self.tokens:,} tokens to start with, {tokens:,} after measuring a step")
        self.tokens = tokens


def phase_limit(
    config: Config, groups: Sequence[PromptGroup], layout: Layout, batch: int, checkpoint: Path
) -> TokenLimit:
    """Return the limit that a phase starts or resumes with, for steps of ``batch`` groups."""
    count = first_groups(batch)
    longest, most = longest_of(groups, layout), allowed_tokens(checkpoint)
    auto = config.max_tokens_per_batch == "auto"
    return TokenLimit(token_limit(config, longest, count, most), auto, longest, most)


def first_groups(batch: int) -> int:
    """Return how many of the longest groups a micro-batch has, before a step of ``batch`` groups was measured."""
    return min(FIRST_GROUPS, -(-batch // dist.world_size()))


def out_of_memory(limit: TokenLimit, checkpoint: Path) -> Exception:
    """Note in ``checkpoint`` with how many tokens memory ran out; return the error to raise.

    The error is ``OutOfMemory`` if this process can restart the phase by itself. It is an ``InputError`` if the user
    must start the command again, because other processes wait for this one. It is an ``InputError`` without a note if
    smaller batches are impossible: the limit was given, or a batch was a single prompt group.
    """
    ran_out = f"{checkpoint.parent.name}: out of memory with {limit.tokens:,} tokens per batch"
    if not limit.auto:
        return InputError(f"{ran_out}; expected a lower max_tokens_per_batch, or auto")
    if limit.tokens <= limit.least:
        return InputError(f"{ran_out}, one prompt and its answers; expected a lower max_length")
    keep_json(checkpoint / f"out-of-memory-{dist.rank()}.json", {"tokens": limit.tokens})
    if dist.world_size() > 1:
        return InputError(f"{ran_out}; the same command continues from the last checkpoint with half the tokens")
    log(f"{ran_out}; continues from the last checkpoint with half the tokens")
    return OutOfMemory()


def allowed_tokens(checkpoint: Path) -> int:
    """Return half of the fewest tokens with which a process ran out of memory, as noted in ``checkpoint``."""
    notes = checkpoint.glob("out-of-memory-*.json")
    return dist.on_main(lambda: min((read_json(x)["tokens"] // 2 for x in notes if intact(x)), default=sys.maxsize))


def fitting_tokens(count: int, base: int, peak: int, total: int) -> int:
    """Return how many tokens fit into ``total`` bytes, if ``count`` tokens took memory from ``base`` up to ``peak``.

    All memory above ``base`` is taken to grow with the tokens, though a part of it, such as the loss's buffer, does
    not: the result is on the safe side.
    """
    return int((SAFE * total - base) * count / max(peak - base, 1))


def gpu_memory() -> tuple[int, int, int] | None:
    """Return the bytes in use, the peak since the last call, and the most this process can have; None on a CPU."""
    if dist.device().type != "cuda":
        return None
    used, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return used, peak, torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
