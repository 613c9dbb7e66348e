"""Encoding, storing and splitting of examples: end tokens, cuts, duplicates, and files that are mapped."""

import gc
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Regex, pre_tokenizers

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data.counts import SetCounts
from irlfast.data.encoding import encode_answers, make_encoder, safe_tokenizer
from irlfast.data.sets import read_sets
from irlfast.data.store import Example, Rows, load_examples, make_examples, save_examples
from tests.helpers.rows import examples_of, pair
from tests.helpers.templates import WORDS
from tests.helpers.tokenizers_like import FAMILIES

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
    encoder = make_encoder(FAMILIES[family](), config)
    examples, counts = examples_of([pair(prompt, answer)], encoder, config)
    return encoder, [Example(x.prompt_ids.tolist(), x.answer_ids.tolist()) for x in examples], counts


def test_encoded_rows_are_in_no_cycles(config):
    """The garbage collector runs rarely while rows are read, so that each row's cycle would stay for long."""
    encoder, few, many = (
        make_encoder(FAMILIES["qwen"](), config()),
        *([pair(f"{QUESTION} {count} {number}", ANSWER) for number in range(count)] for count in (10, 500)),
    )
    examples_of(few, encoder, config())
    gc.collect()
    gc.disable()
    try:
        examples_of(many, encoder, config())
        assert gc.collect() < 250
    finally:
        gc.enable()


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_one_bos_and_one_end_token(family, config):
    encoder, [example], _ = encode_one(family, config())
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.end_id) == ENDS[family]
    assert example.answer_ids[-1] == encoder.end_id
    assert example.answer_ids.count(encoder.end_id) == 1
    uses_bos = family in ("llama", "gemma", "zephyr")
    bos = encoder.tokenizer.bos_token_id
    assert (example.prompt_ids + example.answer_ids[:-1]).count(bos) == uses_bos
    assert (example.prompt_ids[0] == bos) == uses_bos


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_ids_decode_to_the_rendered_text(family, config):
    encoder, [example], _ = encode_one(family, config())
    ids = example.prompt_ids + example.answer_ids
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text.endswith(ANSWER)
    assert QUESTION in text
    answer = encoder.tokenizer.decode(example.answer_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert answer.strip() == ANSWER


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompts_token_ids_do_not_depend_on_the_answer(family, config):
    """Sampling sees only the prompt; training must condition on the same ids."""
    encoder, [one], _ = encode_one(family, config())
    _, [other], _ = encode_one(family, config(), answer=" a quite different\n\nanswer")
    assert one.prompt_ids == other.prompt_ids
    assert encoder.tokenizer.decode(other.answer_ids, skip_special_tokens=True).strip() == "a quite different\n\nanswer"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_token_in_the_answer_is_not_doubled(family, config):
    """SPIN's published data has answers that already end with the text of the end token."""
    tokens = config(split_special_tokens=False)
    encoder, [example], counts = encode_one(family, tokens, answer=ANSWER + ENDS[family])
    assert example.answer_ids.count(encoder.end_id) == 1
    assert counts["cut_at_end_token"] == 1
    encoder, [example], counts = encode_one(family, tokens, answer=f"one{ENDS[family]}two")
    assert example.answer_ids.count(encoder.end_id) == 1
    assert example.answer_ids[-1] == encoder.end_id
    assert counts["cut_at_end_token"] == 1


def test_an_answer_is_tokenised_as_in_running_text(config):
    """SentencePiece writes ▁The at the start of a text, and The after a newline."""
    encoder, [example], _ = encode_one("zephyr", config())
    assert not encoder.tokenizer.convert_ids_to_tokens(example.answer_ids[0]).startswith("▁")


PIECES = ["a", "the capital", "is", "Paris.", " ", "  ", "\n", "\n\n", "\t", "\r\n", ":", "###", "12", "'s", "é", "我"]
drawn_texts = st.lists(st.sampled_from([*PIECES, "<|im_end|>"]), max_size=8).map("".join)


def llama_3():
    tokenizer = FAMILIES["qwen"]()
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of])
    return tokenizer


@pytest.mark.parametrize("family", [*FAMILIES, "llama 3"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(drawn_texts, drawn_texts), min_size=1, max_size=4))
def test_an_answer_has_the_same_tokens_behind_its_prompts_last_line_as_behind_the_whole_prompt(family, config, pairs):
    encoder = make_encoder(llama_3() if family == "llama 3" else FAMILIES[family](), config())
    tokenizer = safe_tokenizer(encoder, config())
    assert tokenizer.by_words == (family in ("pythia", "qwen", "llama 3"))
    prompts = tokenizer.encode([prompt for prompt, _ in pairs])
    short, long = SetCounts(), SetCounts()
    answers = encode_answers(pairs, prompts, encoder, tokenizer, short)
    assert answers == encode_answers(pairs, prompts, encoder, tokenizer._replace(by_words=False), long)
    assert short == long


def test_a_long_answer_is_cut_and_counted_and_has_no_end_token(config):
    encoder, [whole], _ = encode_one("pythia", config())
    length = len(whole.prompt_ids)
    encoder, [example], counts = encode_one("pythia", config(max_prompt_length=length, max_length=length + 4))
    assert example.answer_ids == whole.answer_ids[:4]
    assert encoder.end_id not in example.answer_ids
    assert counts["cut_answers"] == 1


def test_empty_answers_and_duplicates_are_dropped_and_counted(config):
    encoder = make_encoder(FAMILIES["pythia"](), config())
    rows = [pair("a", "b"), pair("a", "b"), pair("a", "c"), pair("d", " \n")]
    examples, counts = examples_of(rows, encoder, config())
    assert [encoder.tokenizer.decode(example.answer_ids[:-1].tolist()) for example in examples] == ["b", "c"]
    assert (counts["rows"], counts["kept"], counts["duplicates"], counts["empty_answers"]) == (4, 2, 1, 1)


def test_saved_examples_load_unchanged(tmp_path, config):
    encoder = make_encoder(FAMILIES["pythia"](), config())
    rows = [pair("a", "b"), pair("c", "d and e", "f"), pair("g", "h", "")]
    examples, _ = examples_of(rows, encoder, config())
    save_examples(tmp_path / "train.safetensors", examples)
    loaded = load_examples(tmp_path / "train.safetensors")
    assert [*loaded] == [*examples] == [examples[number] for number in range(-3, 0)]
    assert [x.rejected_ids is None for x in loaded] == [True, False, False]


def test_a_file_of_examples_has_the_bytes_that_the_library_safetensors_writes(tmp_path, config):
    encoder = make_encoder(FAMILIES["pythia"](), config())
    whole, _ = examples_of([pair(f"{i}", f"{i} {i}", f"{i} or so") for i in range(2500)], encoder, config())
    for examples in (whole[::-1], whole[:1], whole[:0]):
        sequences = [ids for x in examples for ids in (x.prompt_ids, x.answer_ids, x.rejected_ids, x.earlier)]
        flat = {
            "tokens": np.concatenate([np.zeros(0, np.int32), *sequences]),
            "lengths": np.array([*map(len, sequences)], dtype=np.int32),
            "rows": np.array([x.row for x in examples], dtype=np.int32),
        }
        save_examples(tmp_path / "ours", examples)
        save_file(flat, tmp_path / "library")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
        assert [*load_examples(tmp_path / "ours")] == [*examples]


def anonymous_memory() -> int:
    """Return the bytes of this process that are not mapped from a file."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_examples_maps_their_file_and_copies_no_token_ids(tmp_path):
    ids = memoryview(np.arange(2**23, dtype=np.int32))  # 32 MiB
    examples = make_examples(ids, np.array([2**22, 2**22, 0, 0], dtype=np.int32), np.zeros(1, dtype=np.int32))
    save_examples(tmp_path / "train.safetensors", examples)
    before = anonymous_memory()
    [loaded] = load_examples(tmp_path / "train.safetensors")
    assert np.asarray(loaded.prompt_ids).sum() == 2**21 * (2**22 - 1)
    assert loaded.answer_ids[-1] == 2**23 - 1
    assert anonymous_memory() - before < 2**22


def test_a_tokenizer_without_an_end_token_is_refused(config):
    tokenizer = FAMILIES["pythia"]()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        make_encoder(tokenizer, config())


def test_held_out_examples_are_never_training_examples(tmp_path, config):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}", "completion": "c"}}\n' for i in range(40)))
    run = config(dataset_name=str(file), eval_fraction=0.1)
    rows = tmp_path / "kept.jsonl"
    with rows.open("wb") as lines:
        sets = read_sets(run, make_encoder(FAMILIES["pythia"](), run), lines)
    assert len(sets.train) == 36
    assert len(sets.held_out) == 4
    assert not {bytes(x.prompt_ids) for x in sets.train} & {bytes(x.prompt_ids) for x in sets.held_out}
    for example in [*sets.train, *sets.held_out]:
        prompt = Rows(rows)[example.row]["messages"][0]["content"]
        assert f": {prompt}\n" in FAMILIES["pythia"]().decode(example.prompt_ids.tolist())


@pytest.mark.parametrize("overlap", ["refuse", "drop", "allow"])
def test_held_out_rows_that_are_also_training_rows_are_refused_dropped_or_allowed(tmp_path, config, overlap):
    for name, numbers in (("train", range(6)), ("test", range(4, 8))):
        rows = [f'{{"prompt": "p{i}", "completion": "c"}}\n' for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    given = {"dataset_name": str(tmp_path / "train.jsonl"), "eval_dataset_name": str(tmp_path / "test.jsonl")}
    run = config(**given, eval_overlap=overlap)
    encoder = make_encoder(FAMILIES["pythia"](), run)
    if overlap == "refuse":
        with pytest.raises(InputError, match=r"test.jsonl: 2 of 4 held-out rows are also training rows"):
            read_sets(run, encoder)
    else:
        sets = read_sets(run, encoder)
        assert len(sets.held_out) == {"drop": 2, "allow": 4}[overlap]
        assert sets.set_counts["eval"].counts["also_in_train"] == (2 if overlap == "drop" else 0)


@pytest.mark.parametrize("overlap", ["refuse", "drop", "allow"])
def test_more_prompts_are_read_without_their_answers_and_held_out_ones_are_refused_dropped_or_allowed(
    tmp_path, config, overlap
):
    for name, numbers in (("train", range(6)), ("test", range(6, 8)), ("more", range(4, 12))):
        rows = [f'{{"prompt": "p{i}", "completion": "c"}}\n' for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    (tmp_path / "more.jsonl").open("a").write('{"prompt": "alone"}\n{"prompt": "p11", "completion": "d"}\n')
    names = {"dataset_name": "train", "eval_dataset_name": "test", "prompt_dataset_name": "more"}
    given = {key: str(tmp_path / f"{name}.jsonl") for key, name in names.items()}
    run = config(**given, eval_overlap=overlap, method="rft")
    encoder = make_encoder(FAMILIES["pythia"](), run)
    if overlap == "refuse":
        with pytest.raises(InputError, match=r"more.jsonl: 2 of 9 prompts are also held out; expected other prompts"):
            read_sets(run, encoder)
        return
    rows = tmp_path / "kept.jsonl"
    with rows.open("wb") as lines:
        sets = read_sets(run, encoder, lines)
    assert (len(sets.train), len(sets.held_out)) == (6, 2)
    asked = [Rows(rows)[example.row]["messages"][0]["content"] for example in sets.prompts]
    assert asked == ["p6", "p7"] * (overlap == "allow") + ["p8", "p9", "p10", "p11", "alone"]
    assert not any(example.answer_ids or example.rejected_ids for example in sets.prompts)
    counts = sets.set_counts["prompts"].counts
    assert (counts["duplicates"], counts["also_demonstrations"], counts["also_held_out"]) == (1, 2, 2)


def test_prompts_that_all_have_a_demonstration_are_refused(tmp_path, config):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "p{i}", "completion": "c"}}\n' for i in range(40)))
    (tmp_path / "more.jsonl").write_text('{"prompt": "p1"}\n')
    given = {"dataset_name": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.03}
    run = config(**given, prompt_dataset_name=str(tmp_path / "more.jsonl"), method="rft", seed=1)
    with pytest.raises(InputError, match=r"more.jsonl: no prompt is left; expected some without a demonstration"):
        read_sets(run, make_encoder(FAMILIES["pythia"](), run))


def test_a_prompt_without_any_token_is_refused_in_one_sentence(config):
    with pytest.raises(InputError, match="the prompt has no token, and the tokenizer no BOS"):
        encode_one("pythia", config(prompt_template="{}"), prompt="")
