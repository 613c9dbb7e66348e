"""Write the tables of docs/data.md by the code that they describe: ``python -m tests.helpers.data_page``."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

from irlfast.config import make_config
from irlfast.data.counts import SetCounts
from irlfast.data.demonstrations import to_demonstration
from irlfast.data.encoding import encode, make_encoder
from irlfast.data.rows import Demonstration
from irlfast.data.templates import prepare_template
from tests.helpers.templates import KINDS, tokenizer_of

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
Q, A = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}
ROWS: list[dict[str, Any]] = [
    {"prompt": "2+2?", "completion": "4"},
    {"prompt": [Q], "completion": [A]},
    {"prompt": "2+2?", "response": "4"},
    {"messages": [Q, A]},
    {"messages": [Q, A, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]},
    {"messages": [Q, {**A, "weight": 1}, {"role": "user", "content": "ok"}, {**A, "content": "!", "weight": 0}]},
    {"messages": [Q, {"role": "assistant", "content": "4", "reasoning_content": "twice two"}], "tools": []},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "Be brief."},
    {"conversation": [Q, A]},
    {"instruction": "Add.", "input": "2+2", "output": "4"},
    {"instruction": "2+2?", "response": "4"},
    {"question": "2+2?", "answer": "4"},
    {"question": "2+2?", "response": "4"},
    {"query": "2+2?", "response": "4"},
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"chosen": [Q, A], "rejected": [Q, WRONG]},
    {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    {"prompt": "2+2?", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, WRONG], "score_chosen": 9.0},
    {"prompt": "2+2?", "chosen": "4"},
    {"real": [Q, A], "generated": [Q, WRONG]},
    {"prompt": "2+2?", "completion": "4", "label": True},
    {"text": "2+2=4"},
]
QUESTIONS: list[dict[str, Any]] = [{"prompt": "2+2?"}, {"instruction": "2+2?"}, {"question": "2+2?"}, {"query": "2+2?"}]
BEGUN = datetime.datetime(2026, 1, 2)
TALK = Demonstration([{"role": "user", "content": "yes or no?"}], {"role": "assistant", "content": "yes"})


def literal(value: Any) -> str:
    return "`" + json.dumps(value, ensure_ascii=False).replace("|", "\\|") + "`"


def convention_table() -> str:
    lines = ["| read as | a row | prompt | answer | rejected |", "| --- | --- | --- | --- | --- |"]
    for row in [*ROWS, *QUESTIONS]:
        parsed = to_demonstration(row, "row", prompts_only=row in QUESTIONS)
        prompt, answer, rejected = parsed.demonstration[:3]
        answers = [literal(turn) if turn else "" for turn in (answer, rejected)]
        lines.append(f"| {parsed.convention} | {literal(row)} | {literal(prompt)} | {' | '.join(answers)} |")
    return "\n".join(lines)


def read_conventions() -> set[str]:
    return {to_demonstration(row, "row", prompts_only=row in QUESTIONS).convention for row in [*ROWS, *QUESTIONS]}


def template_table() -> str:
    config = make_config({"dataset_name": __file__, "config_name": __file__, "train_tokenizer": 300})
    lines = [
        "| template | what is written: prompt ⟦answer⟧ | ids | `apply_chat_template` |",
        "| --- | --- | --- | --- |",
    ]
    for name, kind in KINDS.items():
        tokenizer, counts = tokenizer_of(kind), SetCounts()
        encoder = make_encoder(tokenizer, config, BEGUN)
        [(_, ids)] = encode([TALK], encoder, config, counts)
        still = (
            prepare_template(kind.template, BEGUN) if "strftime" in str(kind.template) else None
        )  # with the run's clock
        own = tokenizer.apply_chat_template([*TALK.prompt, TALK.answer], chat_template=still, return_dict=False)
        text = f"{tokenizer.decode(ids.prompt)}⟦{tokenizer.decode(ids.answer)}⟧"
        shown = text.replace("\n", "↵").replace("|", "\\|")
        same = relation([*ids.prompt, *ids.answer], own, tokenizer)
        lines.append(f"| {name} | `{shown}` | {len(ids.prompt)} + {len(ids.answer)} | {same} |")
    return "\n".join(lines)


def relation(ours: list[int], own: list[int], tokenizer: Any) -> str:
    """Compare our ids of a conversation with the ids that ``apply_chat_template`` gives."""
    bos = tokenizer.bos_token_id
    before = "" if bos is None or own[:1] == [bos] else "a BOS more, "
    ours = ours[1:] if before else ours
    if own == ours:
        return before + "the same"
    if own[: len(ours)] == ours:
        rest = tokenizer.decode(own[len(ours) :]).replace("\n", "↵")
        return before + f"the same, without the `{rest}` behind the end token"
    if own[: len(ours) - 1] == ours[:-1]:
        return before + "the same, with the EOS that the template does not write"
    same_text = tokenizer.decode(own).startswith(tokenizer.decode(ours).removesuffix(tokenizer.eos_token))
    return before + ("the same text, its answer tokenised apart" if same_text else "another")


TABLES = {"conventions": convention_table, "templates": template_table}


def page_with_tables(text: str) -> str:
    """Return the page with every table made anew between its marks."""
    for name, table in TABLES.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        text = mark.sub(lambda match, table=table: f"{match[1]}{table()}\n{match[2]}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
