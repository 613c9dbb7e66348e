"""Sample answers by Transformers' ``generate``, with random numbers of their own for each answer."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irlfast.common.files import InputError
from irlfast.common.movement import in_small_units
from irlfast.models.prepare import forget, frozen_model
from irlfast.models.tokenizers import unused_ids
from irlfast.runs.run import Run
from irlfast.sampling.shards import Drawn, Sampling, Shard

Processors = list[Callable[[Tensor, Tensor], Tensor]]  # (ids so far [B, L], logits [B, V]) -> logits


@torch.no_grad()
def transformers_answers(
    run: Run, policy: Path | str, claim: Callable[[], Shard | None]
) -> Iterator[tuple[int, list[Drawn]]]:
    """Yield (shard number, its answers, those to one prompt together) by Transformers' ``generate``.

    ``claim`` returns the next shard, or None if there is none now. Without a first one, the model is not loaded.
    """
    shard = claim()
    if not shard:
        return
    config = run.config
    forget()  # the attention of a model that has scored may be one that cannot generate
    model = frozen_model(policy, config)
    own_defaults = model.generation_config
    never = unused_ids(run.encoder.tokenizer, model.get_output_embeddings().weight.shape[0])
    check_logits(model, policy, shard.prompts[0])
    while shard:
        each = zip(shard.prompts, shard.seeds, strict=True)
        rows = [(prompt, seed + k) for prompt, seed in each for k in range(shard.n)]
        answers: list[Drawn] = []
        for start in range(0, len(rows), config.per_device_eval_batch_size):
            prompts, seeds = zip(*rows[start : start + config.per_device_eval_batch_size], strict=True)
            with in_small_units(f"sampling by {policy}"):
                answers += generate_batch(
                    model, prompts, seeds, shard.ends, shard.sampling, shard.max_new_tokens, never
                )
        yield shard.number, answers
        shard = claim()
    model.generation_config = own_defaults  # which training saves with the model


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
