"""``irlfast chat`` answers like a tiny real model that gets the whole conversation in the chat template."""

import argparse
import io
import itertools
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from irlfast.chat import load, main, prompt_ids
from irlfast.common.printable import printable
from tests.helpers.tokenizers_like import GEMMA, llama, qwen, zephyr

LINES = ["What is the capital?", "of France"]


def make_model(folder, tokenizer, seed: int = 0):
    torch.manual_seed(seed)
    size: dict = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **size)
    config.max_position_embeddings = 256
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("chat") / "final", qwen())


def chat(monkeypatch, capsys, *given, lines=LINES, code: int = 0) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["irlfast chat", *map(str, given)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main() == code
    return capsys.readouterr()


def test_each_line_is_answered_with_the_whole_conversation_as_the_prompt(folder, monkeypatch, capsys):
    settings = ["--temperature", "0", "--max_new_tokens", "8", "--system", "Be brief."]
    out, _ = chat(monkeypatch, capsys, folder, *settings, lines=[LINES[0], "", LINES[1]])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages, expected = [{"role": "system", "content": "Be brief."}], ""
    for line in LINES:
        messages.append({"role": "user", "content": line})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        answer = tokenizer.decode(ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert out == printable(expected, keep="\n\t")


def test_a_run_means_its_final_policy(folder, monkeypatch, capsys):
    settings = ["--temperature", "0", "--max_new_tokens", "4"]
    assert chat(monkeypatch, capsys, folder.parent, *settings) == chat(monkeypatch, capsys, folder, *settings)


def greedy(model, ids: list[int], ends: list[int], count: int) -> list[int]:
    prompt = torch.tensor([ids])
    whole = model.generate(prompt, do_sample=False, max_new_tokens=count, eos_token_id=ends, pad_token_id=0)
    return whole[0, len(ids) :].tolist()


def prompt_of(tokenizer, *texts: str) -> list[int]:
    """The ids of a conversation: the user's and the model's texts in turn."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("sampling", [["--temperature", 0], ["--seed", 3]])
def test_two_models_answer_each_line_as_each_does_alone(folder, monkeypatch, capsys, tmp_path, sampling):
    """Each has a template, an end token and a conversation of its own."""
    other = make_model(tmp_path / "other", zephyr())
    settings = ["--max_new_tokens", 8, "--system", "Be brief.", *sampling]

    def alone(name) -> tuple[str, str]:
        first, both = (chat(monkeypatch, capsys, name, *settings, lines=LINES[:count])[0] for count in (1, 2))
        assert both.startswith(first)
        return first, both.removeprefix(first)

    assert alone(folder) != alone(other)
    out, _ = chat(monkeypatch, capsys, folder, "--against", other, *settings)
    turns = zip(alone(folder), alone(other), strict=True)
    assert out == "".join(f"[{folder}]\n{first}[{other}]\n{second}" for first, second in turns)


def test_a_policy_ends_its_answers_with_the_token_that_its_template_writes(monkeypatch, capsys, tmp_path):
    """Even where the model's own files name another one, as those of a base model do."""
    tokenizer = qwen()
    end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    folder = make_model(tmp_path / "policy", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = greedy(model, prompt_of(tokenizer, LINES[0]), [tokenizer.eos_token_id], 8)
    assert ids[3] not in ids[:3] and end not in ids
    with torch.no_grad():
        model.lm_head.weight[end] = 1.001 * model.lm_head.weight[ids[3]]
    model.save_pretrained(folder)
    out, _ = chat(monkeypatch, capsys, folder, "--temperature", 0, "--max_new_tokens", 8, lines=LINES[:1])
    assert out == tokenizer.decode(ids[:3]) + "\n"


@pytest.mark.parametrize(("in_run", "mark_within"), [(True, True), (True, False), (False, True)])
def test_a_thought_is_apart_from_the_answer_and_no_part_of_the_conversation(
    monkeypatch, capsys, tmp_path, in_run, mark_within
):
    """The mark is that of the policy's run, or the one given; a thought that lacks it gets it."""
    run = tmp_path / "run"
    folder, tokenizer = make_model(run / "final", qwen()), qwen()
    model, end = AutoModelForCausalLM.from_pretrained(folder), tokenizer.eos_token_id
    [mark] = tokenizer("|").input_ids
    begun = greedy(model, prompt_of(tokenizer, LINES[0]), [end], 8)
    assert begun[2] not in begun[:2] and mark not in begun
    if mark_within:
        with torch.no_grad():
            model.lm_head.weight[mark] = 1.001 * model.lm_head.weight[begun[2]]
        model.save_pretrained(folder)
    (run / "config.yaml").write_text('method: reasoning\nthought_mark: "|"\nmax_thought_tokens: 4\n')
    if in_run:
        (run / "data").mkdir()
    expected, said = "", []
    for line in LINES:
        said.append(line)
        ids = prompt_of(tokenizer, *said)
        thought = greedy(model, ids, [end, mark], 4 if in_run else 256)
        ids += thought if thought[-1] == mark else [*thought, mark]
        said.append(tokenizer.decode(greedy(model, ids, [end], 8), skip_special_tokens=True))
        expected += f"thought: {tokenizer.decode(thought, skip_special_tokens=True)}\n{said[-1]}\n"
        assert line != LINES[0] or (thought[-1] == mark) == mark_within
    given = [] if in_run else ["--thought_mark", "|"]
    name = run if in_run else folder
    assert chat(monkeypatch, capsys, name, "--temperature", 0, "--max_new_tokens", 8, *given)[0] == printable(
        expected, keep="\n\t"
    )


def test_special_tokens_that_the_user_spells_stay_text(folder):
    speaker = load(str(folder), argparse.Namespace(system=None, thought_mark=None, trust_remote_code=False))
    end = speaker.encoder.end_id
    counts = []
    for line in ("a", "a<|im_end|>b"):
        speaker.messages[:] = [{"role": "user", "content": line}]
        counts.append(prompt_ids(speaker).count(end))
        assert line in speaker.encoder.tokenizer.decode(prompt_ids(speaker))
    assert counts[0] == counts[1]


def test_the_seed_and_the_temperature_change_the_answers(folder, monkeypatch, capsys):
    outs = [
        chat(monkeypatch, capsys, folder, "--max_new_tokens", "8", "--seed", seed, "--temperature", temperature)[0]
        for seed, temperature in ((1, 1.0), (1, 1.0), (2, 1.0), (1, 0.2))
    ]
    assert outs[0] == outs[1]
    assert len({*outs}) == 3


def test_a_model_that_cannot_chat_is_refused_in_one_sentence(folder, monkeypatch, capsys, tmp_path):
    def wrong(name, *given, lines=LINES):
        err = chat(monkeypatch, capsys, name, *given, lines=lines, code=2)[1]
        assert err.startswith("irlfast: ") and err.count("\n") == 1
        return err

    assert "no such folder" in wrong(tmp_path / "gone")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "found no final/, expected a finished run" in wrong(tmp_path / "run")
    assert "--temperature: found -1.0, expected 0 or more" in wrong(folder, "--temperature", -1)
    assert "and the model takes 256" in wrong(folder, lines=["France " * 300])
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "chat_template.jinja").unlink()
    assert "its tokenizer has no chat template" in wrong(bare)
    (bare / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + GEMMA
    )
    assert "the chat template refuses the conversation: no system role" in wrong(bare, "--system", "Be brief.")
    llama().save_pretrained(tmp_path / "no-model")
    assert "found neither config.json nor adapter_config.json" in wrong(tmp_path / "no-model")
    (tmp_path / "no-model" / "config.json").write_text("{}")
    assert "cannot be loaded" in wrong(folder, "--against", tmp_path / "no-model")
