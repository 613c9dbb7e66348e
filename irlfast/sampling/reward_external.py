"""Rewards by anyone's ``AutoModelForSequenceClassification``, which reads a conversation by its own chat template.

Its tokenizer's template writes the messages of the row, with system text, earlier turns and tools, and the answer as
the assistant's turn. Without a template, prompt and answer are joined. A special token that a text spells stays text.
"""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError, LocalError, find_path
from irlfast.common.messages import Progress, log
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.rows import Demonstration
from irlfast.data.special_tokens import SafeTokenizer, control_tokens, escape_special_tokens, make_safe_tokenizer
from irlfast.data.templates import Template, TemplateRefusal, join_turns, mend_conversation, render, without_first_turns
from irlfast.models.load import first_sentence
from irlfast.runs.run import Run
from irlfast.sampling.reward_texts import cached, row_of, text_of

NO_LIMIT = 10**9  # tokens; Transformers gives a tokenizer without a limit 10**30
QUESTION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Reader(NamedTuple):
    """How a reward model reads conversations."""

    name: str
    template: Template
    speller: SafeTokenizer
    before: list[int]  # special tokens that its tokenizer puts around a text
    behind: list[int]
    limit: int  # tokens


class Read(NamedTuple):
    ids: list[int]
    cut: bool  # its beginning is not there, as it was longer than the limit
    mended: bool  # the template refused the conversation as it was


# ---------------------------------------------------------------- the rewards of a run


def external(run: Run, reward: str, groups: Sequence[PromptGroup], path: Path) -> Tensor:
    """The logit ``[S, 1]`` of every answer. Each process scores its share.

    NaN where the text was cut and ``reward_overlong`` is drop.
    """

    def share() -> dict[int, float]:
        answers = [(group.row, answer) for group in groups for answer in group.answers]
        numbers = range(len(answers))[dist.rank() :: dist.world_size()]
        rows = [answered(run, *answers[number]) for number in numbers]
        score = load_external(reward, run.config, run.encoder.template.begun)
        return dict(zip(numbers, score(rows).tolist(), strict=True))

    return cached(path, share)


def answered(run: Run, number: int, answer: Any) -> Demonstration:
    """The conversation of a row, with another answer."""
    row = row_of(run, number)
    said = {"role": "assistant", "content": text_of(run, answer)}
    where = f"{run.output}/data/rows.jsonl, line {number + 1}"
    return Demonstration(row["messages"], said, tools=row.get("tools"), where=where)


# ---------------------------------------------------------------- a reward model


def load_external(reward: str, config: Config, begun: datetime.datetime) -> Callable[[Sequence[Demonstration]], Tensor]:
    """A function from conversations to the logits ``[S]`` fp32 of a Transformers reward model.

    It says how many conversations were cut or mended. ``begun`` is the time that the chat template is told.

    Raises:
        InputError: where it cannot be loaded, or has more than one label.
    """
    import transformers

    name = str(find_path(reward) or reward)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"reward model {reward}: cannot be loaded ({first_sentence(error)})") from error
    if model.config.num_labels != 1:
        raise InputError(f"reward model {reward}: found {model.config.num_labels} labels, expected 1")
    model = model.to(dist.device()).eval()
    reader = make_reader(reward, tokenizer, model.config.get_text_config(), begun)

    def score(rows: Sequence[Demonstration]) -> Tensor:
        texts = [read(reader, row) for row in rows]
        tell(reader, texts, config)
        logits = logits_of(model, reader, [text.ids for text in texts], config.per_device_eval_batch_size)
        cut = torch.tensor([text.cut for text in texts], dtype=torch.bool)
        return logits.masked_fill(cut, torch.nan) if config.reward_overlong == "drop" else logits

    return score


def make_reader(name: str, tokenizer: Any, model_config: Any, begun: datetime.datetime) -> Reader:
    template = Template(tokenizer, {}, None, begun)
    written = render(template, QUESTION) if tokenizer.chat_template else ""
    alone, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    start = next(at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
    limits = (tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None))
    limit = min((number for number in limits if number and 0 < number < NO_LIMIT), default=NO_LIMIT)
    speller = make_safe_tokenizer(tokenizer, control_tokens(tokenizer, written))
    return Reader(name, template, speller, whole[:start], whole[start + len(alone) :], limit)


@torch.no_grad()
def logits_of(model: Any, reader: Reader, texts: Sequence[list[int]], batch_size: int) -> Tensor:
    """The model's logit of each text, in batches of texts of like length, padded on the right."""
    padding = model.config.get_text_config().pad_token_id
    size = batch_size if padding is not None else 1
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    found = torch.empty(len(texts))
    progress = Progress(Path(reader.name).name, len(texts), "text", seconds=10.0)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        longest = len(texts[chosen[0]])
        ids = torch.tensor([texts[i] + [padding or 0] * (longest - len(texts[i])) for i in chosen])
        mask = torch.tensor([[1] * len(texts[i]) + [0] * (longest - len(texts[i])) for i in chosen])
        found[chosen] = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, 0].float().cpu()
        progress.advance(len(chosen))
        progress.show()
    return found


def tell(reader: Reader, texts: Sequence[Read], config: Config) -> None:
    """Say how many of all processes' texts were cut, and how many conversations were mended."""
    own = (len(texts), sum(text.cut for text in texts), sum(text.mended for text in texts))
    count, cut, mended = (sum(column) for column in zip(*dist.all_gather(own), strict=True))
    if cut:
        result = "their prompts are left out" if config.reward_overlong == "drop" else "their beginnings were cut"
        log(f"reward {reader.name}: {cut:,} of {count:,} texts were longer than its {reader.limit:,} tokens; {result}")
    if mended:
        log(
            f"reward {reader.name}: {mended:,} of {count:,} conversations were mended, as its chat template refuses "
            "them: system text is in the user's turn, and turns of one role are joined"
        )


# ---------------------------------------------------------------- how it reads a conversation


def read(reader: Reader, row: Demonstration) -> Read:
    """Token ids of a conversation. A long one loses its first turns, but for system text, then its beginning.

    Raises:
        LocalError: naming the row that the chat template refuses.
    """
    safe, refused = escape_special_tokens(row, reader.speller), False
    try:
        ids = ids_of(reader, safe)
    except TemplateRefusal as refusal:
        safe, refused = safe._replace(prompt=mend_conversation(safe.prompt)), True
        try:
            ids = ids_of(reader, safe)
        except TemplateRefusal:
            raise LocalError(
                f"{row.where}: the chat template of reward model {reader.name} refuses the conversation ({refusal}); "
                "expected one that it writes"
            ) from refusal
    if len(ids) <= reader.limit:
        return Read(ids, cut=False, mended=refused)
    for prompt in without_first_turns(safe.prompt):
        try:
            ids = ids_of(reader, safe._replace(prompt=prompt))
        except TemplateRefusal:
            continue
        if len(ids) <= reader.limit:
            return Read(ids, cut=True, mended=refused)
    kept = len(reader.before)
    return Read(ids[:kept] + ids[len(ids) - reader.limit + kept :], cut=True, mended=refused)


def ids_of(reader: Reader, row: Demonstration) -> list[int]:
    """The ids of what the template writes, with one BOS; without a template, of prompt and answer joined."""
    assert row.answer is not None
    before, behind = reader.before, reader.behind
    if reader.template.tokenizer.chat_template:
        ids, behind = reader.speller.encode([render(reader.template, [*row.prompt, row.answer], row.tools)])[0].ids, []
    else:
        ids = reader.speller.encode([join_turns(row.prompt) + str(row.answer.get("content") or "")])[0].ids
    return [*(before if ids[: len(before)] != before else []), *ids, *behind]
