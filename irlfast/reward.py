"""Rewards of answers, by whatever gives them (DESIGN §3, RFT and AfD); every one is scored once and cached.

A reward is named by the folder or hub name of a model:

- a reward model of this project (``method: reward``, ``rft`` or ``afd`` learned it): heads on a backbone, read at the
  answer's last token or at every one, as they were trained; its config.json carries how, under ``irlfast_reward``;
- ``POLICY,REFERENCE``, two policies: the implicit reward β·Σ_t log π(y_t)/π_ref(y_t) that IRFT, SPIN and SFT learn
  (arXiv 2405.17888, section 4), with no training of its own; ``POLICY`` alone: β·log π(y), where the reference of
  maximum-entropy IRL is uniform;
- any other ``AutoModelForSequenceClassification`` with its tokenizer: its single logit of the text.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from irlfast import dist, ops
from irlfast.config import Config
from irlfast.data.rows import Message
from irlfast.data.templates import plain_text
from irlfast.files import InputError, find, write
from irlfast.lora import base_and_adapter
from irlfast.metrics import Progress
from irlfast.model import first_sentence
from irlfast.ops import Head
from irlfast.pack import Batch, Segment
from irlfast.reference import log_ratios, score
from irlfast.run import Run

Text = tuple[str | list[Message], str]  # prompt and answer
KINDS = {"reverse_kl": "airl", "js": "gail", "forward_kl": "fairl", "alpha": "alpha"}  # in irlfast.ops


def recipe(config: Config) -> dict[str, Any]:
    """How a reward model of this run is scored: kept in its config.json."""
    return {"level": config.reward_level, "divergence": config.divergence, "alpha": config.divergence_alpha}


def rewards_of(run: Run, rewards: Sequence[Path | str], segments: Sequence[Segment], folder: Path) -> Tensor:
    """Reward ``[S]`` of every answer of every segment, fp64: ``rewards``, weighted and combined, cached in ``folder``.

    Raises:
        InputError: where ``reward_combine`` asks for an ensemble, and there is one reward of one head.
    """
    weights = run.config.reward_weights or [1.0] * len(rewards)
    paths = [folder / f"reward-{number}.safetensors" for number in range(len(rewards))]
    each = [reward_of(run, str(reward), segments, path) for reward, path in zip(rewards, paths, strict=True)]
    if run.config.reward_combine != "mean" and sum(values.shape[1] for values in each) < 2:
        raise InputError(f"reward_combine: found {run.config.reward_combine!r}, but one reward of one head")
    return combine([weight * values for weight, values in zip(weights, each, strict=True)], run.config)


def reward_of(run: Run, reward: str, segments: Sequence[Segment], path: Path) -> Tensor:
    """One reward of every answer by each of its heads, ``[S, M]`` fp64, cached in ``path``; others have M = 1.

    Raises:
        InputError: where there is no such model, it is of another kind, or it has another tokenizer.
    """
    if "," in reward and not find(reward):  # a folder may have a comma in its name
        return implicit(run, reward.split(",", 1), segments, path)
    config = reward_config(reward, run.config)
    if not config.architectures[0].endswith("ForSequenceClassification"):
        return implicit(run, [reward], segments, path)
    how = getattr(config, "irlfast_reward", None)
    if how is None:
        return external(run, reward, segments, path)
    check_tokenizer(run, reward)
    measure = functools.partial(head_rewards, **how)
    scores = score(run, reward, segments, path, measure, heads=config.num_labels)
    return torch.stack([answer[0] for answers in scores for answer in answers]).double()


def reward_config(reward: str, config: Config) -> Any:
    import transformers

    name, _ = base_and_adapter(reward)
    try:
        found = transformers.AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"reward model {reward}: cannot be loaded ({first_sentence(error)})") from error
    kind = (found.architectures or ["no architecture"])[0]
    if not kind.endswith(("ForSequenceClassification", "ForCausalLM", "LMHeadModel")):
        raise InputError(f"reward model {reward}: found {kind}, expected one ForSequenceClassification or ForCausalLM")
    return found


def head_rewards(
    hidden: Tensor, head: Head, batch: Batch, *, level: str, divergence: str, alpha: float
) -> Sequence[Tensor]:
    """``[1, M]`` of each answer: the divergence's reward of the heads' logits, summed over tokens if that is the level.

    Source: DESIGN §3; f-MAX (arXiv 1911.02256), see :mod:`irlfast.ops.divergences`.
    """
    pooling = "token" if level == "token" else "last"
    logits = ops.reward_head(hidden, head.weight, batch.cu_seqlens, rows=batch.rows, bias=head.bias, pooling=pooling)
    rewards = ops.discriminator_reward(logits, kind=KINDS[divergence], alpha=alpha).cpu()
    lengths = batch.cu_seqlens.diff().tolist() if level == "token" else [1] * (len(batch.cu_seqlens) - 1)
    return [part.sum(0, keepdim=True) for part in rewards.split(lengths)]


def combine(rewards: Sequence[Tensor], config: Config) -> Tensor:
    """One reward ``[S]`` of several ``[S, M]``: the sum of their heads' means; or an ensemble of all heads of all.

    Of an ensemble it is the least reward, or the mean less k standard deviations (none where there is one head).
    """
    if config.reward_combine == "mean":
        return torch.stack([values.mean(1) for values in rewards]).sum(0)
    every = torch.cat(list(rewards), 1)
    if config.reward_combine == "min":
        return every.amin(1)
    return every.mean(1) - config.reward_std_weight * every.std(1, correction=min(1, every.shape[1] - 1))


def implicit(run: Run, policies: Sequence[str], segments: Sequence[Segment], path: Path) -> Tensor:
    """β·ρ of each answer ``[S, 1]``, of a policy to its reference if there is one: the per-token differences, summed.

    Raises:
        InputError: where a policy reads other token ids than the run's.
    """
    for policy in policies:
        check_tokenizer(run, policy)
    paths = [path, path.with_name(f"{path.stem}-reference.safetensors")]
    new, *references = (score(run, policy, segments, each) for policy, each in zip(policies, paths, strict=False))
    old = references[0] if references else [[torch.zeros_like(logps) for logps in found] for found in new]
    return run.config.at("beta", 0) * torch.cat([log_ratios(*both) for both in zip(new, old, strict=True)])[:, None]


def check_tokenizer(run: Run, policy: str) -> None:
    import transformers

    name = str(find(policy) or policy)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=run.config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"reward model {policy}: its tokenizer cannot be loaded ({first_sentence(error)})") from error
    padding = {(each.pad_token, each.pad_token_id) for each in (tokenizer, run.form.tokenizer)}
    if (tokenizer.get_vocab().items() ^ run.form.tokenizer.get_vocab().items()) - padding:
        raise InputError(f"reward model {policy}: found another tokenizer than the policy's; expected the same")


def external(run: Run, reward: str, segments: Sequence[Segment], path: Path) -> Tensor:
    """The logit ``[S, 1]`` of any other reward model, of prompt and answer as texts that the policy reads and writes.

    Each process scores its share.
    """
    if not path.exists():
        decode = functools.partial(run.form.tokenizer.decode, skip_special_tokens=True)
        texts = [(decode(list(x.prompt)), decode(list(answer))) for x in segments for answer in x.answers]
        score_texts = load_external(reward, run.config.per_device_eval_batch_size, run.config.trust_remote_code)
        found = torch.empty(len(texts))
        for rank, part in enumerate(dist.all_gather(score_texts(texts[dist.rank() :: dist.world_size()]))):
            found[rank :: dist.world_size()] = part
        if dist.is_main():
            write(path, lambda temporary: save_file({"values": found}, temporary))
        dist.barrier()
    return load_file(path)["values"].double()[:, None]


def load_external(reward: str, batch_size: int, trust_remote_code: bool = False) -> Callable[[Sequence[Text]], Tensor]:
    """A function from (prompt, answer) pairs to the logits ``[S]`` fp32 of a Transformers reward model.

    A prompt may be a conversation. The chat template of the model's tokenizer writes both; without one they are joined.

    Raises:
        InputError: where it cannot be loaded, or has more than one label.
    """
    import transformers

    name = str(find(reward) or reward)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"reward model {reward}: cannot be loaded ({first_sentence(error)})") from error
    if model.config.num_labels != 1:
        raise InputError(f"reward model {reward}: found {model.config.num_labels} labels, expected 1")
    model = model.to(dist.device()).eval()
    if tokenizer.pad_token_id is None or model.config.pad_token_id is None:
        batch_size = 1

    @torch.no_grad()
    def score_texts(texts: Sequence[Text]) -> Tensor:
        whole = [as_text(tokenizer, *text) for text in texts]
        order = sorted(range(len(whole)), key=lambda i: (-len(whole[i]), i))
        found = torch.empty(len(whole))
        progress = Progress(Path(reward).name, len(order), "answer", seconds=10.0)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = tokenizer([whole[i] for i in chosen], return_tensors="pt", padding=batch_size > 1, truncation=True)
            found[chosen] = model(**inputs.to(model.device)).logits[:, 0].float().cpu()
            progress.advance(len(chosen))
            progress.tell()
        return found

    return score_texts


def as_text(tokenizer: Any, prompt: str | list[Message], answer: str) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not tokenizer.chat_template:
        return plain_text(messages) + answer
    return tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
