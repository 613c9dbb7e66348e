"""Demonstrations to token ids: the one path from text that sampling, scoring and training all share (DESIGN §3).

An example is ``(prompt_ids, answer_ids)``: exactly one BOS at the start of the prompt if the model uses one, exactly
one end token at the end of the answer unless the answer had to be cut.

Token ids are int32, 4 bytes each, where a list of ints takes 36: an ``array("i")``, or a ``memoryview`` of one or of a
mapped file. Both are sequences of ints that compare by value with each other, but never with a list.
"""

import hashlib
import itertools
import random
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from irlfast.config import Config
from irlfast.files import InputError, find, read_jsonl, write

LOADERS = {".json": "json", ".parquet": "parquet", ".csv": "csv"}
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}
CONVENTIONS = "prompt+completion, messages, prompt+chosen, chosen (a dialogue) or real"
ENCODE_BATCH = 1000

Message = dict[str, str]
Ids = array | memoryview  # token ids, int32


class Demonstration(NamedTuple):
    """A prompt, as text or as a conversation, the expert's answer to it, and perhaps one that people liked less."""

    prompt: str | list[Message]
    answer: str
    rejected: str | None = None


class Example(NamedTuple):
    """A demonstration as the model sees it."""

    prompt_ids: Ids
    answer_ids: Ids
    rejected_ids: Ids | None = None


class Format(NamedTuple):
    """How one tokenizer writes a prompt and ends an answer. See ``make_format``."""

    tokenizer: Any
    template: str
    bos: list[int]  # prepended to a prompt that has none
    end_id: int


# ---------------------------------------------------------------- rows to demonstrations


def read_demonstrations(config: Config, name: str, split: str, limit: int | None) -> list[Demonstration]:
    """The first ``limit`` demonstrations of a file, saved dataset or hub dataset.

    Raises:
        InputError: naming the file and line of a bad row, the columns of an unknown convention, or an empty dataset.
    """
    demonstrations: list[Demonstration] = []
    for where, row in read_rows(config, name, split):
        if len(demonstrations) == limit:
            break
        demonstrations.append(to_preference(row, where))
    if not demonstrations:
        raise InputError(f"dataset {name}, split {split!r}: found no rows, expected demonstrations")
    return demonstrations


def read_rows(config: Config, name: str, split: str) -> Iterator[tuple[str, dict]]:
    """Rows with the place each came from, for error messages."""
    path = find(name)
    if path and path.suffix == ".jsonl":
        yield from ((f"{path}, line {number}", row) for number, row in read_jsonl(path))
    else:
        dataset = load_dataset(config, name, path, split)
        yield from ((f"{path or name}, row {number}", row) for number, row in enumerate(dataset, 1))


def load_dataset(config: Config, name: str, path: Path | None, split: str) -> Any:
    import datasets

    try:
        if path and path.suffix in LOADERS:
            return datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
        if path and path.is_dir() and any(path.glob("**/dataset_info.json")):
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(str(path or name), config.dataset_config, split=split)
    except Exception as error:  # datasets raises its own kinds for each format, pyarrow's, and the network's
        reason = " ".join(str(error).split())
        raise InputError(f"dataset {path or name}, split {split!r}: cannot be read ({reason})") from error


def to_preference(row: dict, where: str) -> Demonstration:
    """A row with its ``rejected`` answer, where it has one to the same prompt."""
    demonstration = to_demonstration(row, where)
    if "chosen" not in row or row.get("rejected") is None:
        return demonstration
    try:
        other = to_demonstration(row | {"chosen": row["rejected"]}, where)
    except InputError:  # only methods that need it mind, and they say so
        return demonstration
    same = other.prompt == demonstration.prompt
    return demonstration._replace(rejected=other.answer) if same else demonstration


def to_demonstration(row: dict, where: str) -> Demonstration:
    """A row of any convention of DESIGN §6; SPIN's ``generated`` answers are not used."""
    if "messages" in row:
        return from_messages(row["messages"], where, "messages")
    if "real" in row:
        return from_messages(row["real"], where, "real")
    answer = row.get("completion", row.get("chosen"))
    if answer is None or ("prompt" not in row and "chosen" not in row):
        raise InputError(f"{where}: found columns {', '.join(row) or 'none'}; expected {CONVENTIONS}")
    if "prompt" not in row:
        messages = split_dialogue(answer) if isinstance(answer, str) else answer
        return from_messages(messages, where, "chosen")
    prompt = row["prompt"]
    if isinstance(answer, list):  # TRL's conversational format: the answer is the assistant's last message
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return from_messages([*before, *answer[-1:]], where, "prompt and answer")
    if not isinstance(answer, str) or not isinstance(prompt, str | list):
        raise InputError(f"{where}: found {type(prompt).__name__} and {type(answer).__name__}, expected texts")
    return Demonstration(prompt, answer)


def from_messages(messages: Any, where: str, column: str) -> Demonstration:
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and {"role", "content"} <= {*m} for m in messages
    )
    if not well_formed or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: column {column}: expected messages with role and content, the assistant's last")
    return Demonstration(messages[:-1], messages[-1]["content"])


def split_dialogue(text: str) -> list[Message]:
    r"""Messages of Anthropic-HH's ``\n\nHuman: …\n\nAssistant: …``; a text without these marks has none."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[name], "content": content.strip()} for name, content in turns]


# ---------------------------------------------------------------- demonstrations to token ids


def make_format(tokenizer: Any, config: Config) -> Format:
    """Find out the tokenizer's BOS and end token.

    The end token is the first special token after an answer in the chat template (``<|im_end|>``, ``<end_of_turn>``),
    else the tokenizer's EOS.

    Raises:
        InputError: where there is no end token.
    """
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    end_id = template_end(tokenizer) if tokenizer.chat_template else tokenizer.eos_token_id
    if end_id is None:
        raise InputError("the tokenizer has no end token; expected an eos_token, so that answers can end")
    return Format(tokenizer, config.prompt_template, [tokenizer.bos_token_id] if adds_bos else [], end_id)


def template_end(tokenizer: Any) -> int | None:
    mark = "the answer"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(mark)[2]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(after, add_special_tokens=False).input_ids
    return next((token for token in ids if token in special), tokenizer.eos_token_id)


def render_prompt(prompt: str | list[Message], form: Format) -> str:
    """The text of a prompt, up to where the answer starts."""
    if form.tokenizer and form.tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return form.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return form.template.replace("{}", prompt_text(prompt))


def prompt_text(prompt: str | list[Message]) -> str:
    """A prompt where there is no chat template: a conversation of one message is that, of more a line each."""
    if isinstance(prompt, str):
        return prompt
    turns = [f"{ROLES.get(message['role'], message['role'])}: {message['content']}" for message in prompt]
    return prompt[0]["content"] if len(prompt) == 1 else "\n\n".join(turns)


def render_texts(demonstrations: list[Demonstration], template: str) -> list[str]:
    """Whole texts to train a tokenizer on, one without a chat template."""
    form = Format(None, template, [], -1)
    return [render_prompt(demonstration.prompt, form) + demonstration.answer for demonstration in demonstrations]


def encode(demonstrations: list[Demonstration], form: Format, config: Config) -> tuple[list[Example], dict[str, int]]:
    """Token ids of demonstrations, and counts of what was dropped and cut."""
    counts = dict.fromkeys(
        ("rows", "kept", "empty_answers", "duplicates", "cut_prompts", "cut_answers", "cut_at_end_token"), 0
    )
    tokens, lengths = array("i"), array("i")
    seen = set()
    for start in range(0, len(demonstrations), ENCODE_BATCH):
        batch = demonstrations[start : start + ENCODE_BATCH]
        prompts = [render_prompt(demonstration.prompt, form) for demonstration in batch]
        answers = [demonstration.answer for demonstration in batch]
        worse = encode_rejected(prompts, batch, form)
        texts = zip(prompts, answers, encode_texts(prompts, answers, form), worse, strict=True)
        for prompt, answer, ids, rejected_ids in texts:
            counts["rows"] += 1
            if not answer.strip() or ids[1][:1] == [form.end_id]:
                counts["empty_answers"] += 1
            elif (prompt, answer) in seen:
                counts["duplicates"] += 1
            else:
                seen.add((prompt, answer))
                ids = fit_lengths(*ids, form, config, counts)
                rejected = [] if rejected_ids is None else fit_answer(rejected_ids, ids[0], form, config)[0]
                for piece in (*ids, rejected):
                    tokens.extend(piece)
                    lengths.append(len(piece))
    examples = examples_of(memoryview(tokens), lengths)
    counts["kept"] = len(examples)
    counts["prompt_tokens"] = sum(len(example.prompt_ids) for example in examples)
    counts["answer_tokens"] = sum(len(example.answer_ids) for example in examples)
    return examples, counts


def encode_texts(prompts: list[str], answers: list[str], form: Format) -> list[tuple[list[int], list[int]]]:
    """Ids of prompts and of their answers, without BOS and end token.

    Prompt and answer are tokenised together, so that an answer starts as it would in running text (SentencePiece
    writes a word at the start of a text otherwise). A prompt must read the same with and without its answer, or
    sampling would not start where training does: where a token straddles the two, the answer is tokenised alone.
    """

    def ids(texts: list[str]) -> list[list[int]]:
        return form.tokenizer(texts, add_special_tokens=False).input_ids

    together = ids([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    pairs = []
    for prompt_ids, whole, alone in zip(ids(prompts), together, ids(answers), strict=True):
        joined = whole[: len(prompt_ids)] == prompt_ids
        pairs.append((prompt_ids, whole[len(prompt_ids) :] if joined else alone))
    return pairs


def encode_rejected(prompts: list[str], batch: list[Demonstration], form: Format) -> list[list[int] | None]:
    """Ids of the rejected answers, without end token; None where there is none."""
    pairs = [(prompt, row.rejected) for prompt, row in zip(prompts, batch, strict=True) if row.rejected is not None]
    encoded = iter(encode_texts([prompt for prompt, _ in pairs], [text for _, text in pairs], form) if pairs else [])
    return [None if row.rejected is None else next(encoded)[1] for row in batch]


def fit_lengths(
    prompt_ids: list[int], answer_ids: list[int], form: Format, config: Config, counts: dict[str, int]
) -> tuple[list[int], list[int]]:
    """One BOS in front, one end token behind, and both within the limits."""
    if form.end_id in answer_ids:
        counts["cut_at_end_token"] += answer_ids.index(form.end_id) < len(answer_ids) - 1
    if form.bos and prompt_ids[:1] != form.bos:
        prompt_ids = form.bos + prompt_ids
    if not prompt_ids:
        raise InputError("a prompt has no token, and the tokenizer no BOS; expected a prompt or a prompt_template")
    if len(prompt_ids) > config.max_prompt_length:
        counts["cut_prompts"] += 1
        head = prompt_ids[:1] if prompt_ids[:1] == [form.tokenizer.bos_token_id] else []
        prompt_ids = head + prompt_ids[len(prompt_ids) - config.max_prompt_length + len(head) :]
    answer_ids, cut = fit_answer(answer_ids, prompt_ids, form, config)
    counts["cut_answers"] += cut
    return prompt_ids, answer_ids


def fit_answer(answer_ids: list[int], prompt_ids: list[int], form: Format, config: Config) -> tuple[list[int], bool]:
    """One end token behind, within ``max_length``; and whether the answer had to be cut for that."""
    if form.end_id in answer_ids:  # an end token in the text: the sampler would stop there too
        answer_ids = answer_ids[: answer_ids.index(form.end_id)]
    room = config.max_length - len(prompt_ids)
    return [*answer_ids, form.end_id][:room], len(answer_ids) >= room


# ---------------------------------------------------------------- the two sets of a run


def read_splits(config: Config) -> tuple[list[Demonstration], list[Demonstration]]:
    """Demonstrations to learn from and held-out ones: another source, another split, or a share of the rows."""
    assert config.dataset_name
    train = read_demonstrations(config, config.dataset_name, config.dataset_train_split, config.max_train_samples)
    if config.eval_dataset_name or config.dataset_test_split:
        name = config.eval_dataset_name or config.dataset_name
        split = config.dataset_test_split or "test"
        return train, read_demonstrations(config, name, split, config.max_eval_samples)
    if len(train) < 2:
        raise InputError(f"dataset {config.dataset_name}: found 1 row, expected at least 2, one of them held out")
    random.Random(config.seed).shuffle(train)
    held_out = max(1, min(round(config.eval_fraction * len(train)), config.max_eval_samples or len(train)))
    return train[held_out:], train[:held_out]


# ---------------------------------------------------------------- examples in a file


def examples_of(tokens: memoryview, lengths: Sequence[int]) -> list[Example]:
    """Views of ``tokens``: prompt, answer and rejected answer of every example in turn, as long as ``lengths`` says.

    A rejected answer of no token is none.
    """
    pieces = (tokens[end - n : end] for n, end in zip(lengths, itertools.accumulate(lengths), strict=True))
    return [Example(prompt, answer, rejected or None) for prompt, answer, rejected in zip(*[pieces] * 3, strict=True)]


def pieces_of(examples: Sequence[Example]) -> list[Ids]:
    """What :func:`examples_of` takes apart."""
    return [ids for x in examples for ids in (x.prompt_ids, x.answer_ids, x.rejected_ids or array("i"))]


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write ``tokens`` and ``lengths``, int32, as safetensors."""
    from safetensors.numpy import save_file

    pieces = pieces_of(examples)
    flat = {"tokens": np.concatenate(pieces), "lengths": np.array([len(piece) for piece in pieces], dtype=np.int32)}
    write(path, lambda temporary: save_file(flat, temporary))


def load_examples(path: Path) -> list[Example]:
    """Examples whose token ids stay in the file: mapped into memory, in pages that all processes share."""
    from safetensors.torch import load_file

    flat = load_file(path)
    return examples_of(flat["tokens"].numpy().data, flat["lengths"].tolist())


def fingerprint(*sets: Sequence[Example]) -> str:
    """A hash of token ids: a run resumes only on the data that it began with."""
    digest = hashlib.sha256()
    for piece in itertools.chain(*map(pieces_of, sets)):
        digest.update(len(piece).to_bytes(4, "little"))
        digest.update(piece)
    return digest.hexdigest()[:16]
