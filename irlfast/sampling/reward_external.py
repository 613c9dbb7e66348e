"""Rewards by anyone's ``AutoModelForSequenceClassification``, which reads a conversation in its own chat template.

The template of the reward model's tokenizer writes the row's messages, with system text, earlier turns and tools, and
the answer as the assistant's turn. Without a template, the texts of prompt and answer are joined. A special token that
is spelled in a text stays text.
"""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError, find_path
from irlfast.common.messages import Progress, explain_errors, log
from irlfast.common.movement import in_small_units
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.plain_template import join_turns
from irlfast.data.rows import Demonstration
from irlfast.data.special_tokens import SafeTokenizer, control_tokens, escape_special_tokens, make_safe_tokenizer
from irlfast.data.templates import Template, TemplateRefusal, mend_conversation, render, without_first_turns
from irlfast.models.load import check_missing, is_run_split
from irlfast.models.split import is_split, load_split, runnable
from irlfast.runs.run import Run
from irlfast.sampling.reward_texts import cached, row_of, text_of

NO_LIMIT = 10**9  # tokens; in Transformers a tokenizer without a limit has 10**30
QUESTION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Reader(NamedTuple):
    """All that turns a conversation into a reward model's token ids."""

    name: str  # the reward model's name, for messages
    template: Template
    safe_tokenizer: SafeTokenizer
    before: list[int]  # special tokens that the tokenizer puts before a text
    behind: list[int]  # special tokens that the tokenizer puts behind a text
    limit: int  # tokens at most


class Tokenized(NamedTuple):
    """A conversation as token ids."""

    ids: list[int]
    cut: bool  # the conversation was longer than the limit, and its beginning is left out
    mended: bool  # the template refused the conversation as it was


# ---------------------------------------------------------------- the rewards of a run


def external_rewards(run: Run, reward: str, groups: Sequence[PromptGroup], path: Path) -> Tensor:
    """Return the reward model's logit of every answer, ``[S, 1]`` fp64, kept in ``path``.

    The logit is NaN if the text was cut and ``reward_overlong`` is drop. Each process scores its share.
    """

    def share() -> dict[int, float]:
        answers = [(group.row, answer) for group in groups for answer in group.answers]
        numbers = range(len(answers))[dist.rank() :: dist.world_size()]
        rows = [with_answer(run, *answers[number]) for number in numbers]
        score = load_external(reward, run.config, run.encoder.template.begun)
        return dict(zip(numbers, score(rows).tolist(), strict=True))

    return cached(path, share)


def with_answer(run: Run, number: int, answer: Any) -> Demonstration:
    """Return the conversation of a row with this answer in place of its own."""
    row = row_of(run, number)
    turn = {"role": "assistant", "content": text_of(run, answer)}
    where = f"{run.output}/data/rows.jsonl, line {number + 1}"
    return Demonstration(row["messages"], turn, tools=row.get("tools"), where=where)


# ---------------------------------------------------------------- a reward model


def load_external(reward: str, config: Config, begun: datetime.datetime) -> Callable[[Sequence[Demonstration]], Tensor]:
    """Load a Transformers reward model; return a function from conversations to its logits ``[S]`` fp32.

    The function logs how many conversations were cut or mended. ``begun`` is the time that the chat template may write.
    ZeRO-3 splits the reward model, as it does the models of the run. All processes call the function then.

    Raises:
        InputError: the reward model cannot be loaded, lacks tensors, or has more than one label.
    """
    import transformers

    name = str(find_path(reward) or reward)
    with explain_errors(f"reward model {reward}: cannot be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        model = load_split(name, "main", config, foreign=True)[0] if is_run_split(config, in_4bit=False) else None
        if model is None:
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                name, output_loading_info=True, trust_remote_code=config.trust_remote_code
            )
            check_missing(name, model, report["missing_keys"])
    if model.config.num_labels != 1:
        raise InputError(f"reward model {reward}: found {model.config.num_labels} labels, expected 1")
    model.config.get_text_config().use_cache = False  # keys and values of all layers, which a score has no use for
    model = model.to(dist.device()).eval()
    reader = make_reader(reward, tokenizer, model.config.get_text_config(), begun)

    def score(rows: Sequence[Demonstration]) -> Tensor:
        texts = [tokenize(reader, row) for row in rows]
        log_changes(reader, texts, config)
        with runnable(model, config):
            logits = logits_of(model, reader, [text.ids for text in texts], config.per_device_eval_batch_size)
        cut = torch.tensor([text.cut for text in texts], dtype=torch.bool)
        return logits.masked_fill(cut, torch.nan) if config.reward_overlong == "drop" else logits

    return score


def make_reader(name: str, tokenizer: Any, model_config: Any, begun: datetime.datetime) -> Reader:
    """Find out how a tokenizer reads conversations, and how long a conversation may be."""
    template = Template(tokenizer, {}, None, begun)
    written = render(template, QUESTION) if tokenizer.chat_template else ""
    alone, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    start = next(at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
    limits = (tokenizer.model_max_length, getattr(model_config, "max_position_embeddings", None))
    limit = min((number for number in limits if number and 0 < number < NO_LIMIT), default=NO_LIMIT)
    safe_tokenizer = make_safe_tokenizer(tokenizer, control_tokens(tokenizer, written))
    return Reader(name, template, safe_tokenizer, whole[:start], whole[start + len(alone) :], limit)


@torch.no_grad()
def logits_of(model: Any, reader: Reader, texts: Sequence[list[int]], batch_size: int) -> Tensor:
    """Return the model's logit of each text. Batches have texts of similar lengths, padded on the right.

    The processes of a split model take as many forward passes; one without texts runs a batch that nobody reads.
    """
    padding = model.config.get_text_config().pad_token_id
    size = batch_size if padding is not None else 1
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if is_split(model):
        batches += [[]] * (max(dist.all_gather_object(len(batches))) - len(batches))
    logits = torch.empty(len(texts))
    name = Path(reader.name).name
    with in_small_units(name), Progress(name, len(texts), "text", seconds=10.0) as progress:
        for chosen in batches:
            rows = [texts[i] for i in chosen] or [[0]]
            longest = len(rows[0])
            ids = torch.tensor([row + [padding or 0] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            outputs = model(ids.to(model.device), attention_mask=mask.to(model.device))
            logits[chosen] = outputs.logits[: len(chosen), 0].float().cpu()
            progress.advance(len(chosen))
            progress.show()
    return logits


def log_changes(reader: Reader, texts: Sequence[Tokenized], config: Config) -> None:
    """Log how many texts of all processes were cut, and how many conversations were mended."""
    own = (len(texts), sum(text.cut for text in texts), sum(text.mended for text in texts))
    count, cut, mended = (sum(column) for column in zip(*dist.all_gather_object(own), strict=True))
    if cut:
        result = "their prompts are left out" if config.reward_overlong == "drop" else "their beginnings were cut"
        log(f"reward {reader.name}: {cut:,} of {count:,} texts were longer than its {reader.limit:,} tokens; {result}")
    if mended:
        log(
            f"reward {reader.name}: {mended:,} of {count:,} conversations were mended, as its chat template refuses "
            "them: system text is in the user's turn, and turns of one role are joined"
        )


# ---------------------------------------------------------------- from a conversation to token ids


def tokenize(reader: Reader, row: Demonstration) -> Tokenized:
    """Return the token ids of a conversation, at most ``reader.limit``.

    A conversation that is too long loses its first turns, except for system text. If its last turns are still too long,
    they lose their beginning.

    Raises:
        InputError: the chat template refuses the conversation; the error names the row.
    """
    safe, refused = escape_special_tokens(row, reader.safe_tokenizer), False
    try:
        ids = ids_of(reader, safe)
    except TemplateRefusal as refusal:
        safe, refused = safe._replace(prompt=mend_conversation(safe.prompt)), True
        try:
            ids = ids_of(reader, safe)
        except TemplateRefusal:
            raise InputError(
                f"{row.where}: the chat template of reward model {reader.name} refuses the conversation ({refusal}); "
                "expected one that it writes"
            ) from refusal
    if len(ids) <= reader.limit:
        return Tokenized(ids, cut=False, mended=refused)
    for prompt in without_first_turns(safe.prompt):
        try:
            ids = ids_of(reader, safe._replace(prompt=prompt))
        except TemplateRefusal:
            continue
        if len(ids) <= reader.limit:
            return Tokenized(ids, cut=True, mended=refused)
    kept = len(reader.before)
    return Tokenized(ids[:kept] + ids[len(ids) - reader.limit + kept :], cut=True, mended=refused)


def ids_of(reader: Reader, row: Demonstration) -> list[int]:
    """Return the ids of what the template writes, or of prompt and answer joined, with one BOS at the beginning."""
    assert row.answer is not None
    before, behind = reader.before, reader.behind
    if reader.template.tokenizer.chat_template:
        text, behind = render(reader.template, [*row.prompt, row.answer], row.tools), []
    else:
        text = join_turns(row.prompt) + str(row.answer.get("content") or "")
    ids = reader.safe_tokenizer.encode([text])[0].ids
    return [*(before if ids[: len(before)] != before else []), *ids, *behind]
