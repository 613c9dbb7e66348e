"""Demonstrations are selected by a small external reward model, with a tokenizer trained on the rows."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from irlfast.data.diversity import describe_answers, distinct
from irlfast.models.tokenizers import train_tokenizer
from tests.helpers.runs import PYTHON, printed

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i * 7 % 31}", "id": i} for i in range(2500)]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """Save a random reward model with one label, in Transformers' format, whose padding is not its end token."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in ROWS], 300)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **size)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer, model.eval()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def select(*given, how=1, code: int = 0) -> tuple[str, str]:
    return printed(["-m", "irlfast.data.select", *map(str, given)], how, code)


def test_the_best_rows_are_kept_unchanged_and_a_killed_run_keeps_its_scores(dataset, reward, tmp_path):
    folder, tokenizer, model = reward
    output = tmp_path / "best.jsonl"
    said, _ = select(dataset, folder, output, "--keep", 100, how=PYTHON)
    assert "100 of 2,500 rows" in said
    [selected, at_random] = re.findall(r"^(?:selected|at random): reward (\S+), 2.0 words per answer", said, re.M)
    assert float(selected) > float(at_random)
    kept = [json.loads(line) for line in output.open()]
    with torch.no_grad():
        texts = [row["prompt"] + row["completion"] for row in ROWS]
        exact = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[:, 0] for text in texts])
    threshold = exact.sort(descending=True).values[99].item()
    assert len(kept) == 100
    assert [row["id"] for row in kept] == sorted(row["id"] for row in kept)
    for row in kept:
        assert row["reward"] == pytest.approx(exact[row["id"]].item(), abs=1e-4)
        assert row["reward"] > threshold - 1e-4
        assert {name: row[name] for name in ROWS[0]} == ROWS[row["id"]]
    before, shards = output.read_bytes(), sorted((tmp_path / "best.jsonl.scores").glob("*.jsonl"))
    assert len(shards) == 3
    output.unlink()
    shards[1].unlink()
    kept_shard = shards[0].stat().st_mtime_ns
    select(dataset, folder, output, "--keep", 100)
    assert output.read_bytes() == before
    assert shards[0].stat().st_mtime_ns == kept_shard


def test_scores_of_other_rows_are_not_reused_even_where_they_are_as_many(dataset, reward, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    select(dataset, reward[0], tmp_path / "best.jsonl", "--keep", 100)
    select(other, reward[0], tmp_path / "best.jsonl", "--keep", 100)
    select(other, reward[0], tmp_path / "anew.jsonl", "--keep", 100)
    assert (tmp_path / "best.jsonl").read_bytes() == (tmp_path / "anew.jsonl").read_bytes()


def test_a_reward_model_of_another_kind_is_refused(dataset, tmp_path):
    shown = select(dataset, tmp_path / "nothing", tmp_path / "other.jsonl", code=2)[1]
    assert "cannot be loaded" in shown
    assert "Traceback" not in shown


def test_an_external_reward_without_a_template_scores_prompt_and_answer_joined(reward, finished, tmp_path):
    from safetensors.torch import load_file

    from tests.methods.test_rft import bon

    keys = {"model_name_or_path": finished[0] / "final", "reward_model_name_or_path": reward[0]}
    keys |= {"dataset_name": "irlfast/demo/test.jsonl", "num_generations": 2, "max_train_samples": 6}
    bon(tmp_path / "bon", **keys)
    _, tokenizer, model = reward
    best = [json.loads(line) for line in (tmp_path / "bon" / "best.jsonl").open()]
    assert load_file(tmp_path / "bon" / "part-00000" / "scores.safetensors")["rewards"].shape == (6, 2)
    for row in best:
        with torch.no_grad():
            text = "".join(message["content"] for message in row["messages"])
            logit = model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
        assert row["reward"] == pytest.approx(logit, abs=1e-4)
    bon(tmp_path / "two", 2, **keys)
    scores = [load_file(tmp_path / name / "part-00000" / "scores.safetensors")["rewards"] for name in ("bon", "two")]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)


def test_diversity_is_the_share_of_ngrams_that_differ():
    answers = ["a b c", "a b d", "a b"]
    words = [answer.split() for answer in answers]
    assert [distinct(words, n) for n in (1, 2, 3, 4)] == [4 / 8, 3 / 5, 2 / 2, 0]
    assert describe_answers(answers) == "2.7 words per answer, distinct words 0.500, 2-grams 0.600, 3-grams 1.000"
