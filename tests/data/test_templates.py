"""The token ids of drawn conversations are those of the text that the chat template writes."""

import datetime
import random

import pytest

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data import template_cost
from irlfast.data.counts import SetCounts
from irlfast.data.encoding import encode, make_encoder
from irlfast.data.rows import Demonstration
from tests.helpers.templates import KINDS, tokenizer_of

BEGUN = datetime.datetime(2026, 3, 4, 5, 6, 7)
WORDS = [
    "two",
    "it is",
    "",
    " ",
    "\n",
    "\n\n",
    "    return",
    "?",
    "!!!",
    "é",
    "日本",
    "🙂",
    "the cat",
    "'s",
    "1234",
    "\t",
    "<b>",
    "{{ x }}",
]
THOUGHTS = ["<think>", "</think>", "<think>\nhm\n</think>\n\n", "thus</think>"]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def config_of(**keys):
    given = {
        "dataset_name": "irlfast/demo/train.jsonl",
        "config_name": "irlfast/demo/config.json",
        "train_tokenizer": 300,
    }
    return make_config(given | {"max_prompt_length": 2000, "max_length": 4000, "bad_rows": "mend"} | keys)


def text_of(draw: random.Random, more: list[str]) -> str:
    return "".join(draw.choice(WORDS + more) for _ in range(draw.randrange(1, 7))) + draw.choice("ab")


def conversation(draw: random.Random, more: list[str] | None = None) -> Demonstration:
    """A drawn conversation: perhaps a system turn, one to three questions, and the answer to the last."""
    more = more or []
    prompt = [{"role": "system", "content": text_of(draw, more)}] if draw.random() < 0.3 else []
    for _ in range(draw.randrange(3)):
        prompt.append(user(text_of(draw, more)))
        prompt.append(reply(text_of(draw, more)))
    prompt.append(user(text_of(draw, more)))
    answer = {"role": "assistant", "content": text_of(draw, more + (THOUGHTS if draw.random() < 0.3 else []))}
    return Demonstration(prompt, answer, where="drawn, row 1")


def encoded(name: str, rows: list[Demonstration], stops: tuple[str, ...] = (), **keys):
    tokenizer, config, counts = tokenizer_of(KINDS[name]), config_of(**keys), SetCounts()
    encoder = make_encoder(tokenizer, config, BEGUN, tokenizer.convert_tokens_to_ids(stops))
    return encoder, list(encode(rows, encoder, config, counts)), counts


def template_ids(encoder, row: Demonstration) -> list[int]:
    """Return the ids that the template gives for a whole conversation: from the BOS to the end token of its answer."""
    from irlfast.data.templates import prepare_template, remove_marks

    tokenizer = encoder.tokenizer
    text = remove_marks(
        tokenizer.apply_chat_template(
            [*row.prompt, row.answer],
            tokenize=False,
            chat_template=prepare_template(tokenizer.get_chat_template(), BEGUN),
        )
    )
    if not encoder.ends_itself:
        text = text.removesuffix(encoder.template.after)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids = ids if ids[:1] == encoder.bos else [*encoder.bos, *ids]
    last = len(ids) - ids[::-1].index(encoder.end_id) if encoder.end_id in ids[::-1] and encoder.ends_itself else None
    return ids[:last] if last else [*ids, encoder.end_id]


def check_conversations(name: str, count: int, seed: int) -> tuple[int, int]:
    draw = random.Random(seed)
    rows = [conversation(draw) for _ in range(count)]
    same = 0
    encoder, kept, counts = encoded(name, rows)
    for row, ids in kept:
        whole = [*ids.prompt, *ids.answer]
        same += whole == template_ids(encoder, row)
        bos = encoder.tokenizer.bos_token_id
        assert whole.count(bos) == (bos is not None)
        assert bos is None or whole[0] == bos
        assert ids.answer[-1] == encoder.end_id
        assert ids.answer.count(encoder.end_id) == 1
    remarked = counts.counts["tokenised_apart"] + sum(n for remark, n in counts.remarks.items() if "close it" in remark)
    assert len(kept) == counts.counts["kept"] == count - counts.counts["duplicates"]
    assert same + remarked >= len(kept)
    return same, remarked


@pytest.mark.parametrize("name", KINDS)
def test_prompt_and_answer_are_the_ids_of_the_template_or_are_counted(name):
    same, _ = check_conversations(name, 400, seed=1)
    assert same > 0 or not KINDS[name].template


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_prompt_and_answer_of_ten_thousand_conversations_are_the_ids_of_the_template(name):
    check_conversations(name, 10_000, seed=2)


@pytest.mark.parametrize("name", KINDS)
def test_a_text_that_spells_special_tokens_adds_no_special_token(name):
    kind, draw = KINDS[name], random.Random(3)
    spelled = [*kind.special, *(token for token in kind.plain if "think" not in token)]
    rows = [conversation(draw, [f"x{token}y" for token in spelled]) for _ in range(200)]
    texts = [[{**m, "content": plain(m["content"], spelled)} for m in [*row.prompt, row.answer]] for row in rows]
    others = [row._replace(prompt=text[:-1], answer=text[-1]) for row, text in zip(rows, texts, strict=True)]
    encoder, kept, counts = encoded(name, rows)
    neutral = {row.where: ids for row, ids in encoded(name, numbered(others))[1]}
    control = {encoder.tokenizer.convert_tokens_to_ids(token) for token in spelled}
    checked = 0
    for row, ids in encoded(name, numbered(rows))[1]:
        other = neutral[row.where]
        for some, reference in ((ids.prompt, other.prompt), (ids.answer, other.answer)):
            assert [token for token in some if token in control] == [token for token in reference if token in control]
        checked += 1
    assert checked > 150
    assert counts.remarks["rows spell special tokens, which stay text (split_special_tokens)"] > 50
    assert kept


def numbered(rows: list[Demonstration]) -> list[Demonstration]:
    """Give each row its own question, so that none is a duplicate."""
    return [
        row._replace(
            where=str(i), prompt=[*row.prompt[:-1], row.prompt[-1] | {"content": row.prompt[-1]["content"] + f" {i}"}]
        )
        for i, row in enumerate(rows)
    ]


def plain(text: str, spelled: list[str]) -> str:
    for token in spelled:
        text = text.replace(token, "")
    return text


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_in_a_text_decode_to_the_same_spelling(name):
    token = KINDS[name].special[-1]
    row = Demonstration([user(f"what is {token}?")], reply(f"it ends {token}"))
    encoder, [(_, ids)], _ = encoded(name, [row])
    assert encoder.tokenizer.decode(ids.prompt).count(token) >= 1
    assert f"it ends {token}" in encoder.tokenizer.decode(ids.answer)
    encoder, [(_, ids)], _ = encoded(name, [row], split_special_tokens=False)
    assert encoder.tokenizer.convert_tokens_to_ids(token) in ids.prompt


@pytest.mark.parametrize("name", KINDS)
def test_sft_on_conversations_learns_exactly_the_answers_and_their_end_tokens(name):
    words = {
        "first answer": "answer",
        "second one": "answer",
        "what?": "question",
        "and?": "question",
        "more?": "question",
    }
    turns = [
        ("user", "what?"),
        ("assistant", "first answer"),
        ("user", "and?"),
        ("assistant", "second one"),
        ("user", "more?"),
    ]
    row = Demonstration([{"role": role, "content": text} for role, text in turns], reply("third"))
    encoder, [(_, ids)], counts = encoded(name, [row], method="sft")
    learned = encoder.tokenizer.decode([ids.prompt[at] for at in ids.earlier])
    for text, kind in words.items():
        assert (text in learned) == (kind == "answer"), learned
    assert not any("not learned" in remark for remark, n in counts.remarks.items() if n)
    if encoder.ends_itself and KINDS[name].template:
        special = {*encoder.tokenizer.all_special_ids}
        assert sum(ids.prompt[at] in special and ids.prompt[at + 1 : at + 2] != [] for at in ids.earlier) >= 2
    row.prompt[1]["weight"] = 0
    encoder, [(_, ids)], _ = encoded(name, [row], method="sft")
    learned = encoder.tokenizer.decode([ids.prompt[at] for at in ids.earlier])
    assert "first answer" not in learned
    assert "second one" in learned


@pytest.mark.parametrize("name", KINDS)
def test_a_long_prompt_loses_whole_turns_from_the_front_and_then_the_start_of_its_last_one(name):
    draw = random.Random(4)
    turns = []
    for i in range(12):
        turns += [user(f"question {i}? " + "so " * draw.randrange(8)), reply(f"reply {i}")]
    long = Demonstration([*turns, user("last?")], reply("yes"))
    endless = Demonstration([user("word " * 400 + "the end")], reply("yes"))
    encoder, kept, counts = encoded(name, [long, endless], max_prompt_length=120, max_length=200)
    (_, several), (_, one) = kept
    text = encoder.tokenizer.decode(several.prompt)
    assert counts.counts["cut_prompts"] == 2
    assert len(several.prompt) <= 120
    assert "last?" in text
    first = min(int(part.split("?")[0]) for part in text.split("question ")[1:])
    assert 0 < first <= 11
    assert all(f"question {i}?" in text and f"reply {i}" in text for i in range(first, 12))
    start = encoded(name, [Demonstration(turns[:1], reply("a"))])[1][0][1]
    assert several.prompt[:2] == start.prompt[:2]  # the header of a conversation
    assert "the end" in encoder.tokenizer.decode(one.prompt)
    assert 100 < len(one.prompt) <= 120
    assert one.prompt[:1] == start.prompt[:1]
    _, kept, counts = encoded(name, [long, endless], max_prompt_length=120, max_length=200, overlong="drop")
    assert not kept
    assert counts.counts["too_long"] == 2


def test_a_prompt_that_loses_turns_keeps_its_system_text():
    turns = [{"role": role, "content": f"{role} " * 10} for _ in range(10) for role in ("user", "assistant")]
    row = Demonstration([system("be brief"), *turns, user("last?")], reply("a"))
    encoder, [(_, ids)], _ = encoded("ChatML", [row], max_prompt_length=100, max_length=120)
    text = encoder.tokenizer.decode(ids.prompt)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("last?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].template])
def test_an_answer_ends_with_the_end_token_of_the_template(name):
    encoder, [(_, ids)], _ = encoded(name, [Demonstration([user("q")], reply("a"))])
    assert encoder.tokenizer.convert_ids_to_tokens(ids.answer[-1]) == KINDS[name].end
    assert {encoder.end_id, encoder.tokenizer.eos_token_id} <= {*encoder.ends}


def test_an_answer_keeps_the_end_token_that_the_template_writes_behind_it():
    """Tool calls end so in Llama 3.1 (``<|eom_id|>``) and gpt-oss (``<|call|>``)."""
    template = KINDS["gpt-oss, channels"].template.replace(
        "'<|return|>' if", "'<|endoftext|>' if m.tool_calls else '<|return|>' if"
    )
    question = [user("q")]
    call = {"role": "assistant", "content": "f()", "tool_calls": [{"function": {"name": "f"}}]}
    rows = [Demonstration(question, call), Demonstration(question, reply("plain"))]
    encoder, kept, _ = encoded("gpt-oss, channels", rows, ("<|endoftext|>",), chat_template=template)
    assert [encoder.tokenizer.decode(ids.answer[-1:]) for _, ids in kept] == ["<|endoftext|>", "<|return|>"]


def test_an_answer_that_the_template_does_not_write_is_left_out_with_a_remark():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    _, kept, counts = encoded("ChatML", [Demonstration([user("q")], call)])
    assert not kept
    assert counts.counts["empty_answers"] == 1
    assert any("tool_calls" in remark for remark in counts.remarks)


def test_an_answer_that_closes_an_opened_thinking_block_continues_it_with_a_remark():
    question = [user("q")]
    rows = [Demonstration(question, reply(text)) for text in ("plain", "hm</think>so", "<think>\noh</think>so")]
    encoder, kept, counts = encoded("QwQ, which opens a thinking block", rows)
    prompts = [encoder.tokenizer.decode(ids.prompt) for _, ids in kept]
    answers = [encoder.tokenizer.decode(ids.answer) for _, ids in kept]
    assert [prompt.endswith("<think>\n") for prompt in prompts] == [False, True, True]
    assert answers == ["plain<|im_end|>", "hm</think>so<|im_end|>", "oh</think>so<|im_end|>"]
    assert any("<think>" in remark and "template" in remark for remark in counts.remarks)


def test_a_remark_names_the_key_of_a_message_that_the_template_leaves_out():
    answer = {"role": "assistant", "content": "so", "reasoning_content": "a long thought"}
    rows = [Demonstration([user("q")], answer)]
    assert any("reasoning_content" in remark for remark in encoded("ChatML", rows)[2].remarks)
    encoder, [(_, ids)], counts = encoded("Qwen 3", rows)
    assert "a long thought" in encoder.tokenizer.decode(ids.answer)
    assert not any("reasoning" in remark for remark in counts.remarks)


def test_a_row_that_the_template_refuses_is_an_error_or_left_out_or_mended():
    rows = [
        Demonstration([system("be brief"), user("q")], reply("a"), where="x.jsonl, line 5"),
        Demonstration([user("one"), user("two")], reply("b")),
        Demonstration([reply("hello"), user("two")], reply("c")),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"x.jsonl, line 5: .*System role not supported"):
        encoded("Gemma", rows, bad_rows="refuse")
    _, kept, counts = encoded("Gemma", rows, bad_rows="skip")
    assert (len(kept), counts.counts["rows_that_the_chat_template_refuses"], len(counts.dropped)) == (0, 3, 3)
    encoder, kept, counts = encoded("Gemma", rows)
    assert [encoder.tokenizer.decode(ids.prompt, skip_special_tokens=True).strip() for _, ids in kept] == [
        "user\nbe brief\n\nq\nmodel",
        "user\none\n\ntwo\nmodel",
    ]
    assert counts.counts["rows_that_the_chat_template_refuses"] == 1


def test_a_row_for_which_a_template_takes_too_long_is_refused(monkeypatch):
    loops = "{% for a in messages[0].content %}{% for b in messages[0].content %}{% endfor %}{% endfor %}"
    tokenizer = tokenizer_of(KINDS["ChatML"])
    tokenizer.chat_template = loops + tokenizer.chat_template
    config = config_of(bad_rows="refuse")
    rows = [Demonstration([user(length * "q")], reply("a"), where="x.jsonl, line 5") for length in (9, 20_000)]
    encoder = make_encoder(tokenizer, config, BEGUN)
    monkeypatch.setattr(template_cost, "SECONDS", 0.2)
    assert len([*encode(rows[:1], encoder, config, SetCounts())]) == 1
    with pytest.raises(InputError, match=r"x.jsonl, line 5: .* takes more than 0.2 s of CPU time"):
        [*encode(rows[1:], encoder, config, SetCounts())]


def test_the_message_shows_both_texts_if_the_answers_place_is_unknown():
    """Mistral 0.3's template writes a system text in the last turn only if this is the user's."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
        "{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    row = Demonstration([system("be brief"), user("q")], reply("a"), where="m.jsonl, line 2")
    with pytest.raises(InputError, match=r"m.jsonl, line 2.*\[INST\]q\[/INST\]a.*\[INST\]be brief"):
        encoded("Mistral, without", [row], chat_template=template, bad_rows="refuse")
    encoder, [(_, ids)], _ = encoded("Mistral, without", [row], chat_template=template)
    assert encoder.tokenizer.decode(ids.prompt) == "<s>[INST]be brief\n\nq[/INST]"


def test_the_clock_of_a_template_shows_the_start_of_the_run():
    row = [Demonstration([user("q")], reply("a"))]
    encoder, [(_, ids)], _ = encoded("with a date", row)
    assert "Today is 04 Mar 2026, 05:06:07." in encoder.tokenizer.decode(ids.prompt)


@pytest.mark.parametrize("name", ["none", "none, no BOS"])
def test_a_prompt_template_is_saved_as_the_tokenizers_chat_template(name, tmp_path):
    from transformers import AutoTokenizer

    row = Demonstration([user('what is it\'s \\ "this"?\n')], reply("a"))
    encoder, [(_, ids)], _ = encoded(name, [row], prompt_template="Q: 'x' \\n {}\nA:\n")
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(row.prompt, add_generation_prompt=True, return_dict=False) == ids.prompt


def test_a_text_without_turns_is_learned_from_its_first_token_to_the_eos():
    row = Demonstration([], reply("<|im_start|>user\nq<|im_end|>\n"))
    encoder, [(_, ids)], _ = encoded("ChatML", [row])
    expected = encoder.tokenizer("<|im_start|>user\nq<|im_end|>\n").input_ids
    assert [*ids.prompt, *ids.answer] == [*expected, encoder.tokenizer.eos_token_id]
    encoder, [(_, ids)], _ = encoded("Mistral, without", [row])
    assert ids.prompt == encoder.bos


def test_the_template_gets_system_prompt_chat_template_and_chat_template_kwargs():
    row = [Demonstration([user("q")], reply("a"))]
    encoder, [(_, ids)], _ = encoded("ChatML", row, system_prompt="be kind")
    assert encoder.tokenizer.decode(ids.prompt).startswith("<|im_start|>system\nbe kind<|im_end|>\n")
    template = "{% for m in messages %}{{ name }}: {{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}{{ name }}: {% endif %}"
    encoder, [(_, ids)], _ = encoded("ChatML", row, chat_template=template, chat_template_kwargs={"name": "Ann"})
    assert encoder.tokenizer.decode([*ids.prompt, *ids.answer]) == "Ann: q<|im_end|>Ann: a<|im_end|>"
    with pytest.raises(InputError, match="chat_template: found 'no such'"):
        encoded("ChatML", row, chat_template="no such")
    with pytest.raises(InputError, match="chat_template: it is no Jinja template"):
        encoded("ChatML", row, chat_template="{{ messages[0].content")
