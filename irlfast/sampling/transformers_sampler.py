"""Sample answers by Transformers' ``generate``, with random numbers of their own for each answer.

Where ZeRO-3 has split the policy, each layer's weights are gathered for every token. So the processes answer their
batches in step: none ends its loop of tokens, or leaves, before all are done.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.common.movement import in_small_units
from irlfast.config import Config
from irlfast.models.load import is_run_split
from irlfast.models.prepare import forget, frozen_model
from irlfast.models.split import is_split, runnable
from irlfast.models.tokenizers import unused_ids
from irlfast.runs.run import Run
from irlfast.sampling.shards import GREEDY, Drawn, Sampling, Shard

Processors = list[Callable[[Tensor, Tensor], Tensor]]  # (ids so far [B, L], logits [B, V]) -> logits


class Batch(NamedTuple):
    """Answers of a shard that are generated together."""

    shard: Shard
    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    is_last: bool


@torch.no_grad()
def transformers_answers(
    run: Run, policy: Path | str, claim: Callable[[], Shard | None]
) -> Iterator[tuple[int, list[Drawn]]]:
    """Yield (shard number, its answers, those to one prompt together) by Transformers' ``generate``.

    ``claim`` returns the next shard, or None if there is none now. Without a first one, the model is not loaded. With
    :func:`samples_split`, all processes call this function; one without a shard generates a token for the others.
    """
    config, ends, split = run.config, run.encoder.ends, samples_split(run.config)
    batches = batches_of(claim, config.per_device_eval_batch_size)
    batch = next(batches, None)
    if not any_has(batch, split):
        return
    forget()  # the attention of a model that has scored may be one that cannot generate
    model = frozen_model(policy, config, split=split)
    own_defaults = model.generation_config
    head = model.get_output_embeddings().weight
    never = unused_ids(run.encoder.tokenizer, getattr(head, "ds_shape", head.shape)[0])
    idle = Batch(Shard(-1, [], [], 1, GREEDY, 1, ends), [ends[:1]], [0], is_last=False)
    answers: list[Drawn] = []
    with runnable(model, config):
        check_logits(model, policy, (batch or idle).prompts[0])
        while any_has(batch, split):
            shard, prompts, seeds, is_last = batch or idle
            with in_small_units(f"sampling by {policy}"):
                drawn = generate_batch(model, prompts, seeds, shard.ends, shard.sampling, shard.max_new_tokens, never)
            answers += drawn if batch else []
            if is_last:
                yield shard.number, answers
                answers = []
            batch = next(batches, None)
    model.generation_config = own_defaults  # which training saves with the model


def samples_split(config: Config) -> bool:
    """Return whether the processes answer together by a policy that ZeRO-3 splits among them."""
    return is_run_split(config, in_4bit=False) and not (config.use_vllm or config.ds3_gather_for_generation)


def any_has(batch: Batch | None, split: bool) -> bool:
    """Return whether this process has a batch or, by a split model, any process."""
    return any(dist.all_gather_object(batch is not None)) if split else batch is not None


def batches_of(claim: Callable[[], Shard | None], size: int) -> Iterator[Batch]:
    """Yield the batches of the shards that this process claims, of ``size`` answers at most."""
    while shard := claim():
        each = zip(shard.prompts, shard.seeds, strict=True)
        rows = [(prompt, seed + k) for prompt, seed in each for k in range(shard.n)]
        for start in range(0, len(rows), size):
            prompts, seeds = zip(*rows[start : start + size], strict=True)
            yield Batch(shard, prompts, seeds, is_last=start + size >= len(rows))


@torch.no_grad()
def check_logits(model: Any, policy: Path | str, prompt: Sequence[int]) -> None:
    """Check that a policy gives the first token of an answer probabilities: a broken one fails on a GPU without a word.

    Raises:
        InputError: it does not.
    """
    if model(torch.tensor([[*prompt]], device=model.device)).logits.isnan().any():
        raise InputError(f"{policy}: its logits are NaN, so that it cannot answer; expected a model that trains")


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    ends: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    never: Sequence[int] = (),
) -> list[Drawn]:
    """Generate an answer to each prompt, up to its first token in ``ends``; ids in ``never`` are not drawn.

    An answer depends on its prompt and its seed. The other prompts of the batch matter only as far as they change the
    rounding of the logits.
    """
    from transformers import GenerationConfig, SuppressTokensLogitsProcessor

    longest = max(map(len, prompts))
    ids = torch.tensor([[*[ends[0]] * (longest - len(prompt)), *prompt] for prompt in prompts])  # left-padded
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    processors = drawn_token(sampling, seeds, longest, max_new_tokens, model.device)
    if never:
        processors = [SuppressTokensLogitsProcessor(list(never), model.device), *processors]
    logps: list[Tensor] = []  # of each position: [B] fp32
    model.generation_config = GenerationConfig()  # the checkpoint's defaults (top_k 50, penalties) would bias samples
    generated = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False,  # the most likely token, of those that the processors leave
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        ),
        logits_processor=with_logps(processors, logps) if sampling.logps else processors,
        synced_gpus=is_split(model),
    )
    answers = [cut_at(answer, ends) for answer in generated[:, longest:].tolist()]
    of_answers = torch.stack(logps, 1).tolist() if logps else [[]] * len(answers)
    return [Drawn(ids, own[: len(ids)]) for ids, own in zip(answers, of_answers, strict=True)]


def with_logps(processors: Processors, logps: list[Tensor]) -> Processors:
    """Return processors of logits that also append the log-probabilities ``[B]`` of each position's tokens to a list.

    They are those of the logits as the model gave them.
    """
    given: list[Tensor] = []

    def keep(ids: Tensor, logits: Tensor) -> Tensor:
        given[:] = [logits]
        return logits

    def note(ids: Tensor, logits: Tensor) -> Tensor:
        token = logits.argmax(-1, keepdim=True)
        logps.append(given[0].float().log_softmax(-1).gather(1, token)[:, 0])
        return logits

    return [keep, *processors, note]


def drawn_token(
    sampling: Sampling, seeds: Sequence[int], prompt_length: int, max_new_tokens: int, device: torch.device
) -> Processors:
    """Return processors of logits that leave one token per row: the one drawn by the row's own random numbers.

    The draw inverts the distribution's cumulative sum. Greedy sampling needs no processor.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return []
    numbers = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
    uniform = torch.from_numpy(numbers).to(device)  # [B, max_new_tokens]

    def draw(ids: Tensor, logits: Tensor) -> Tensor:
        total = logits.double().softmax(-1).cumsum(-1)
        total /= total[:, -1:].clone()  # exactly 1 from the last possible token on
        drawn = torch.searchsorted(total, uniform[:, ids.shape[1] - prompt_length, None].contiguous(), right=True)
        return torch.full_like(logits, -torch.inf).scatter(1, drawn, 0.0)

    warpers: Processors = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return [*warpers, draw]


def cut_at(answer: list[int], ends: Sequence[int]) -> list[int]:
    """Return the answer up to and with its first end token. Only padding follows that token."""
    first = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: first + 1]
