"""Prompts for a teacher that reads the demonstration: a template writes it into the last turn of the conversation."""

from array import array
from collections.abc import Iterable
from typing import Any

from irlfast.config import Config
from irlfast.data.counts import SetCounts
from irlfast.data.encoding import Encoder, encode_texts, render_or_leave_out, safe_tokenizer
from irlfast.data.rows import Demonstration
from irlfast.data.store import TokenIds


def teacher_prompts(rows: Iterable[dict[str, Any]], encoder: Encoder, config: Config) -> list[TokenIds | None]:
    """Encode each row's conversation with ``teacher_prompt_template`` around the text of its last turn.

    ``rows`` are lines of data/rows.jsonl. The ids come by the path of all prompts: the chat template, the BOS, escaped
    special tokens. A row gets None where its last turn is not the user's, or where the prompt has more than
    ``max_length`` tokens.
    """
    tokenizer, counts = safe_tokenizer(encoder, config), SetCounts()
    prompts: list[TokenIds | None] = []
    for row in rows:
        shown = with_demonstration(row, config.teacher_prompt_template)
        rendered = shown and render_or_leave_out(shown, encoder, tokenizer, config, counts)
        ids = encode_texts([rendered], encoder, tokenizer, counts)[0].prompt if rendered else []
        prompts.append(array("i", ids) if 0 < len(ids) <= config.max_length else None)
    return prompts


def with_demonstration(row: dict[str, Any], template: str) -> Demonstration | None:
    """Return the row's conversation with its answer in the last turn, or None where that turn is not the user's."""
    messages, answer = row["messages"], row["answer"]
    if not messages or messages[-1]["role"] != "user" or not answer:
        return None
    turn = template.format(prompt=messages[-1]["content"], privileged_context=answer.get("content") or "")
    return Demonstration([*messages[:-1], messages[-1] | {"content": turn}], answer, tools=row["tools"])
