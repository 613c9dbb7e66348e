import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from irlfast.config import make_config
from irlfast.data import (
    Demonstration,
    Example,
    encode,
    fingerprint,
    load_examples,
    make_format,
    read_demonstrations,
    read_splits,
    save_examples,
    to_demonstration,
)
from irlfast.files import InputError
from tests.tokenizers_like import FAMILIES

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
ENDS = {
    "llama": "</s>",
    "pythia": "<|endoftext|>",
    "qwen": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "zephyr": "</s>",
}


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')

    def make(**keys):
        return make_config(
            {"dataset_name": str(file), "config_name": str(file), "train_tokenizer": 300, "max_prompt_length": 64}
            | keys
        )

    return make


def encode_one(family, config, prompt=QUESTION, answer=ANSWER):
    form = make_format(FAMILIES[family](), config)
    examples, counts = encode([Demonstration(prompt, answer)], form, config)
    return form, [Example(x.prompt_ids.tolist(), x.answer_ids.tolist()) for x in examples], counts


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_one_bos_and_one_end_token(family, config):
    form, [example], _ = encode_one(family, config())
    assert form.tokenizer.convert_ids_to_tokens(form.end_id) == ENDS[family]
    assert example.answer_ids[-1] == form.end_id
    assert example.answer_ids.count(form.end_id) == 1
    uses_bos = family in ("llama", "gemma", "zephyr")
    bos = form.tokenizer.bos_token_id
    assert (example.prompt_ids + example.answer_ids[:-1]).count(bos) == uses_bos
    assert (example.prompt_ids[0] == bos) == uses_bos


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_decode_to_the_rendered_text(family, config):
    form, [example], _ = encode_one(family, config())
    ids = example.prompt_ids + example.answer_ids
    text = form.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text.endswith(ANSWER)
    assert QUESTION in text
    answer = form.tokenizer.decode(example.answer_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert answer.strip() == ANSWER


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_the_same_without_its_answer(family, config):
    """Sampling sees the prompt alone; training must condition on the same ids."""
    form, [one], _ = encode_one(family, config())
    _, [other], _ = encode_one(family, config(), answer=" a quite different\n\nanswer")
    assert one.prompt_ids == other.prompt_ids
    assert form.tokenizer.decode(other.answer_ids, skip_special_tokens=True).strip() == "a quite different\n\nanswer"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_token_in_the_answer_is_not_doubled(family, config):
    """SPIN's published data holds answers that end in the end token's text already."""
    form, [example], counts = encode_one(family, config(), answer=ANSWER + ENDS[family])
    assert example.answer_ids.count(form.end_id) == 1
    assert counts["cut_at_end_token"] == 0
    form, [example], counts = encode_one(family, config(), answer=f"one{ENDS[family]}two")
    assert example.answer_ids.count(form.end_id) == 1
    assert example.answer_ids[-1] == form.end_id
    assert counts["cut_at_end_token"] == 1


def test_zephyr_answer_starts_as_in_running_text(config):
    """SentencePiece would write ▁The for a text that starts with The; after a newline it is The."""
    form, [example], _ = encode_one("zephyr", config())
    assert not form.tokenizer.convert_ids_to_tokens(example.answer_ids[0]).startswith("▁")


@pytest.mark.parametrize("family", FAMILIES)
def test_long_prompts_keep_their_end_and_bos(family, config):
    short = config(max_prompt_length=8, max_length=20)
    form, [whole], _ = encode_one(family, config())
    _, [cut], counts = encode_one(family, short)
    assert len(cut.prompt_ids) == 8
    assert counts["cut_prompts"] == 1
    assert cut.prompt_ids[-7:] == whole.prompt_ids[-7:]
    assert cut.prompt_ids[0] == (form.bos or cut.prompt_ids)[0]


def test_long_answers_are_cut_and_counted_and_do_not_end(config):
    form, [example], counts = encode_one("pythia", config(max_prompt_length=16, max_length=20))
    assert len(example.prompt_ids) + len(example.answer_ids) == 20
    assert form.end_id not in example.answer_ids
    assert counts["cut_answers"] == 1


def test_empty_answers_and_duplicates_are_dropped_and_counted(config):
    form = make_format(FAMILIES["pythia"](), config())
    rows = [Demonstration("a", "b"), Demonstration("a", "b"), Demonstration("a", "c"), Demonstration("d", " \n")]
    examples, counts = encode(rows, form, config())
    assert [form.tokenizer.decode(example.answer_ids[:-1].tolist()) for example in examples] == ["b", "c"]
    assert (counts["rows"], counts["kept"], counts["duplicates"], counts["empty_answers"]) == (4, 2, 1, 1)


def test_examples_come_back_from_their_file_as_they_were_and_so_does_their_fingerprint(tmp_path, config):
    form = make_format(FAMILIES["pythia"](), config())
    rows = [Demonstration("a", "b"), Demonstration("c", "d and e", "f"), Demonstration("g", "h", "")]
    examples, _ = encode(rows, form, config())
    save_examples(tmp_path / "train.safetensors", examples)
    loaded = load_examples(tmp_path / "train.safetensors")
    assert loaded == examples
    assert [x.rejected_ids is None for x in loaded] == [True, False, False]
    assert fingerprint(loaded) == fingerprint(examples) != fingerprint(examples[::-1])


def anonymous_memory() -> int:
    """Bytes of this process that are no file's."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_token_ids_stay_in_their_file(tmp_path):
    ids = memoryview(np.arange(2**23, dtype=np.int32))  # 32 MiB
    save_examples(tmp_path / "train.safetensors", [Example(ids[:n], ids[n:]) for n in (2**22,)])
    before = anonymous_memory()
    [loaded] = load_examples(tmp_path / "train.safetensors")
    assert np.asarray(loaded.prompt_ids).sum() == 2**21 * (2**22 - 1)
    assert loaded.answer_ids[-1] == 2**23 - 1
    assert anonymous_memory() - before < 2**22


def test_a_tokenizer_without_an_end_token_is_refused(config):
    tokenizer = FAMILIES["pythia"]()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        make_format(tokenizer, config())


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS = {
    "prompt+completion": ({"prompt": "q", "completion": "a"}, "q"),
    "conversational": ({"prompt": [USER], "completion": [ASSISTANT]}, [USER]),
    "prompt text, answer messages": ({"prompt": "q", "completion": [ASSISTANT]}, [USER]),
    "messages": ({"messages": [USER, ASSISTANT]}, [USER]),
    "prompt+chosen+rejected": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q"),
    "chosen messages": ({"chosen": [USER, ASSISTANT], "rejected": [USER, USER]}, [USER]),
    "prompt+chosen messages": ({"prompt": "q", "chosen": [USER, ASSISTANT]}, [USER]),
    "HH dialogue": ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"}, [USER]),
    "SPIN": ({"real": [USER, ASSISTANT], "generated": [USER, USER]}, [USER]),
}


@pytest.mark.parametrize("convention", ROWS)
def test_column_conventions(convention):
    row, prompt = ROWS[convention]
    assert to_demonstration(row, "here") == Demonstration(prompt, "a")


BAD_ROWS = [
    {"question": "q", "answer": "a"},
    {"prompt": "q"},
    {"messages": [USER]},
    {"messages": [ASSISTANT, USER]},
    {"messages": ["q", "a"]},
    {"chosen": "no dialogue"},
    {"prompt": "q", "completion": 3},
]


@pytest.mark.parametrize("row", BAD_ROWS)
def test_bad_rows_name_their_place(row):
    with pytest.raises(InputError, match="file, line 7: "):
        to_demonstration(row, "file, line 7")


def test_every_file_format_gives_the_same_rows(tmp_path, config):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_json(tmp_path / "d.jsonl")
    dataset.to_json(tmp_path / "d.json", lines=False)
    dataset.to_csv(tmp_path / "d.csv")
    dataset.to_parquet(tmp_path / "d.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved_dict")
    expected = [Demonstration(f"p{i}", f"c{i}") for i in range(3)]
    for name in ("d.jsonl", "d.json", "d.csv", "d.parquet", "saved", "saved_dict"):
        assert read_demonstrations(config(), str(tmp_path / name), "train", 3) == expected, name


def test_a_share_is_held_out_and_never_trained_on(tmp_path, config):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}", "completion": "c"}}\n' for i in range(40)))
    train, held_out = read_splits(config(dataset_name=str(file), eval_fraction=0.1))
    assert len(train) == 36
    assert len(held_out) == 4
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}


def test_a_line_that_is_not_json_is_named(tmp_path, config):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": \n')
    with pytest.raises(InputError, match=r"rows.jsonl, line 3: not JSON"):
        read_demonstrations(config(), str(file), "train", None)


def test_an_empty_dataset_is_refused(tmp_path, config):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(InputError, match="found no rows"):
        read_demonstrations(config(), str(tmp_path / "rows.jsonl"), "train", None)


def test_a_prompt_without_any_token_is_one_sentence(config):
    with pytest.raises(InputError, match="a prompt has no token, and the tokenizer no BOS"):
        encode_one("pythia", config(prompt_template="{}"), prompt="")
