"""Tokens of a forward pass: as ``max_tokens_per_batch`` says, or as many as memory holds, measured and backed off."""

from collections.abc import Sequence
from pathlib import Path

import torch

from irlfast import dist
from irlfast.config import Config
from irlfast.files import InputError, LocalError, read_json, write_json
from irlfast.metrics import say
from irlfast.pack import Layout, Segment, parts, tokens

CPU_TOKENS = 1024  # of a micro-batch: more is no faster there, and takes memory
GPU_TOKENS = 32768  # at the most: more is no faster there, and a mask grows with their square
SAFE = 0.9  # of a GPU's memory; what lies between its blocks is lost


def token_limit(config: Config, segments: Sequence[Segment], layout: Layout, count: int, halvings: int = 0) -> int:
    """Tokens of a micro-batch: as configured, else what ``count`` of the longest segments are, on a CPU few.

    ``halvings`` of the latter leave at least a segment.

    Raises:
        InputError: where a segment is longer than configured, or nothing is left to halve.
    """
    longest = max(sum(map(tokens, parts(segment, layout))) for segment in segments)
    if config.max_tokens_per_batch == "auto":
        few = CPU_TOKENS * min(dist.world_size(), 2)  # several processes reduce gradients after each, from ZeRO-2 on
        most = max(longest, few) if dist.device().type == "cpu" else longest * count
        if halvings and most >> (halvings - 1) <= longest:
            raise InputError(
                f"out of memory with one prompt and its answers, {longest} tokens; expected a lower max_length"
            )
        return max(longest, most >> halvings)
    if longest > config.max_tokens_per_batch:
        raise InputError(
            f"max_tokens_per_batch: found {config.max_tokens_per_batch}, but the longest prompt has {longest} tokens "
            "with its answers; expected more, or a lower max_length"
        )
    return config.max_tokens_per_batch


# ---------------------------------------------------------------- a GPU's memory, measured


def refit(config: Config, halvings: int, step: int, limit: int, largest: int) -> int:
    """``limit`` after ``step`` of this start, whose largest micro-batch had ``largest`` tokens, where that is ``auto``.

    The second step is the first with all of the optimiser's state; what it took at its peak, for its tokens, says how
    many fit on the fullest GPU of all processes. Batches are never made smaller here.
    """
    memory = gpu_memory() if config.max_tokens_per_batch == "auto" and step <= 2 else None
    if memory is None or step < 2:  # the first call makes the second tell of the second step
        return limit
    found = min(dist.all_gather(fitting(largest, *memory)))
    fits = max(limit, min(found, GPU_TOKENS) >> halvings)
    say(f"max_tokens_per_batch: {limit:,} tokens to start with, {fits:,} after measuring a step")
    return fits


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


# ---------------------------------------------------------------- out of memory


def halved(checkpoint: Path) -> int:
    """How often a phase, whose checkpoints are in this folder, has run out of memory, on any process."""
    found = [read_json(path)["halvings"] for path in checkpoint.glob("out-of-memory-*.json")]
    return max(dist.all_gather(max(found, default=0)))


def back_off(checkpoint: Path, halvings: int, config: Config, error: torch.OutOfMemoryError) -> None:
    """Let this phase go on with half the tokens a batch; where others wait for this process, once it is started again.

    Raises:
        LocalError: the latter, or ``max_tokens_per_batch`` is given.
    """
    phase = checkpoint.parent.name
    if config.max_tokens_per_batch != "auto":
        raise LocalError(
            f"{phase}: out of memory with {config.max_tokens_per_batch} tokens a batch; "
            "expected a lower max_tokens_per_batch, or auto"
        ) from error
    write_json(checkpoint / f"out-of-memory-{dist.rank()}.json", {"halvings": halvings + 1})
    if dist.world_size() > 1:
        raise LocalError(
            f"{phase}: out of memory; the same command goes on from its last checkpoint with half the tokens a batch"
        ) from error
    say(f"{phase}: out of memory; goes on from its last checkpoint with half the tokens a batch")
