"""``irlfast chat`` answers like a tiny real model that gets the whole conversation in the chat template."""

import io
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from irlfast.chat import main
from tests.helpers.tokenizers_like import GEMMA, llama, qwen

LINES = ["What is the capital?", "of France"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "final"
    tokenizer = qwen()
    torch.manual_seed(0)
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
    assert out == expected


def test_a_run_means_its_final_policy(folder, monkeypatch, capsys):
    settings = ["--temperature", "0", "--max_new_tokens", "4"]
    assert chat(monkeypatch, capsys, folder.parent, *settings) == chat(monkeypatch, capsys, folder, *settings)


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
    assert "cannot be loaded" in wrong(tmp_path / "no-model")
