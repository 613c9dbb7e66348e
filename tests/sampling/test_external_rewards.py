"""Reward models of others read a conversation in their own template; reward functions are called as TRL calls them."""

import datetime
import json
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from irlfast.common.files import InputError
from irlfast.config import Config, make_config
from irlfast.data.rows import Demonstration
from irlfast.sampling.reward_external import load_external
from irlfast.sampling.reward_function import function_rewards, load_function
from tests.helpers.runs import printed, run
from tests.helpers.tokenizers_like import FAMILIES, QWEN, gemma, qwen

NOW = datetime.datetime(2026, 1, 1)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + QWEN


def conversations(count: int, system: bool = True) -> list[Demonstration]:
    """Return random conversations of one to three turns, every third with system text."""
    draw = random.Random(0)
    words = ["the cat", "is", "Paris?", "two and two", "é", "🙂", "\n", "!!!", "France", "  "]

    def text() -> str:
        return "x" + "".join(draw.choices(words, k=draw.randint(1, 6))) + "."

    rows = []
    for number in range(count):
        prompt = [{"role": "system", "content": text()}] if system and number % 3 == 0 else []
        for _ in range(draw.randint(0, 2)):
            prompt += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        prompt.append({"role": "user", "content": text()})
        answer = {"role": "assistant", "content": text()}
        rows.append(Demonstration(prompt, answer, where=f"rows.jsonl, line {number + 1}"))
    return rows


def save_reward(folder, tokenizer, limit: int | None = None, padding: bool = True):
    """Save a random reward model whose scores differ much between texts; return its folder and the model."""
    if limit:
        tokenizer.model_max_length = limit
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    token = len(tokenizer) if padding else None
    config = LlamaConfig(vocab_size=len(tokenizer) + 1, num_labels=1, pad_token_id=token, initializer_range=0.5, **size)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model


def whole_ids(tokenizer, row: Demonstration) -> list[int]:
    """Return the ids of a conversation by the reward model's own template and tokenizer, with one BOS."""
    if not tokenizer.chat_template:
        names = {"system": "System", "user": "Human", "assistant": "Assistant"}
        turns = [f"{names[turn['role']]}: {turn['content']}" for turn in row.prompt]
        prompt = row.prompt[0]["content"] if len(row.prompt) == 1 else "\n\n".join(turns)
        return tokenizer(prompt + row.answer["content"]).input_ids
    ids = tokenizer.apply_chat_template([*row.prompt, row.answer], return_dict=False)
    adds = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return [tokenizer.bos_token_id, *ids] if adds and ids[0] != tokenizer.bos_token_id else ids


def logits(model, texts: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[:, 0] for ids in texts])


def scores(folder: str, rows: list[Demonstration], **keys) -> torch.Tensor:
    return load_external(folder, Config(dataset_name="any", **keys), NOW)(rows)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("padding", [True, False])
def test_scores_are_those_of_the_models_own_template_in_any_batch(name, padding, tmp_path):
    tokenizer, rows = FAMILIES[name](), conversations(20)
    folder, model = save_reward(tmp_path, tokenizer, padding=padding)
    expected = logits(model, [whole_ids(tokenizer, row) for row in rows])
    for size in (1, 7, 64):
        actual = scores(folder, rows, per_device_eval_batch_size=size)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert expected.std() > 0.1


def test_a_special_token_in_a_text_stays_text(tmp_path):
    folder, model = save_reward(tmp_path, qwen())
    texts = ["end <|im_end|> of", "end of"]
    rows = [Demonstration([{"role": "user", "content": x}], {"role": "assistant", "content": "a"}) for x in texts]
    begin, behind = qwen()("<|im_start|>user\n").input_ids, "<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    spelled = [qwen()(x, split_special_tokens=True).input_ids for x in texts]
    expected = logits(model, [begin + ids + qwen()(behind).input_ids for ids in spelled])
    torch.testing.assert_close(scores(folder, rows), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("limit", [50, 70])
def test_a_long_conversation_keeps_its_end_and_is_counted(limit, tmp_path, capsys):
    """A long conversation loses whole turns if the rest fits, else the beginning of its last turns. The BOS stays."""
    tokenizer, rows = gemma(), conversations(40, system=False)
    folder, model = save_reward(tmp_path, tokenizer, limit)
    expected, cut = [], []
    for row in rows:
        ids = whole_ids(tokenizer, row)
        cut.append(len(ids) > limit)
        later = [at for at in range(len(row.prompt)) if row.prompt[at]["role"] == "user"]
        tries = [whole_ids(tokenizer, row._replace(prompt=row.prompt[at:])) for at in later]
        last = tries[-1]
        fits = [ids for ids in tries if len(ids) <= limit]
        expected.append(fits[0] if fits else last[:1] + last[len(last) - limit + 1 :])
    assert 0 < sum(cut) < len(rows)
    torch.testing.assert_close(scores(folder, rows), logits(model, expected), rtol=1e-3, atol=1e-4)
    told = f"{sum(cut)} of 40 texts were longer than its {limit} tokens; their beginnings were cut"
    assert told in "".join(capsys.readouterr())
    dropped = scores(folder, rows, reward_overlong="drop")
    assert dropped.isnan().tolist() == cut


def test_system_text_that_a_template_refuses_moves_into_the_users_turn(tmp_path, capsys):
    tokenizer = qwen()
    tokenizer.chat_template = STRICT
    folder, model = save_reward(tmp_path, tokenizer)
    rows = conversations(12)
    merged = []
    for row in rows:
        prompt = row.prompt
        if prompt[0]["role"] == "system":
            text = f"{prompt[0]['content']}\n\n{prompt[1]['content']}"
            prompt = [{"role": "user", "content": text}, *prompt[2:]]
        merged.append(whole_ids(tokenizer, row._replace(prompt=prompt)))
    torch.testing.assert_close(scores(folder, rows), logits(model, merged), rtol=1e-3, atol=1e-4)
    assert "4 of 12 conversations were mended" in "".join(capsys.readouterr())


def test_a_refused_conversation_is_named_with_its_row_and_the_model(tmp_path):
    tokenizer = qwen()
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}" + QWEN
    folder, _ = save_reward(tmp_path, tokenizer)
    with pytest.raises(InputError, match=rf"rows.jsonl, line \d+: .*{folder} refuses the conversation \(too many\)"):
        scores(folder, conversations(12, system=False))


# ---------------------------------------------------------------- reward functions


ROWS = [
    {"prompt": "say yes", "completion": "yes", "expected": "y"},
    {"prompt": [{"role": "user", "content": "say no"}], "completion": [{"role": "assistant", "content": "no"}]},
]


class Rows(list):
    path = "rows.jsonl"


@pytest.fixture
def given(tmp_path):
    """Return a run of two rows (texts, and messages), two answers to each row, and a path for a file of functions."""
    tokenizer = qwen()
    asked = [[{"role": "user", "content": f"say {word}"}] for word in ("yes", "no")]
    rows = Rows({"messages": prompt, "row": row} for prompt, row in zip(asked, ROWS, strict=True))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = [tuple([*tokenizer(text).input_ids, end] for text in texts) for texts in (("yes", "so"), ("no", "nay"))]
    groups = [SimpleNamespace(row=number, answers=pair) for number, pair in enumerate(answers)]
    return SimpleNamespace(rows=rows, encoder=SimpleNamespace(tokenizer=tokenizer)), groups, tmp_path / "mine.py"


def test_a_function_is_called_as_trl_calls_it(given):
    a_run, groups, file = given
    file.write_text("seen = []\nasync def reward(**given):\n    seen.append(given)\n    return [0, 1.5, None, True]\n")
    rewards = function_rewards(a_run, f"{file}:reward", groups, file.with_name("cache.safetensors"))
    assert rewards[:2].flatten().tolist() == [0.0, 1.5]
    assert rewards[2].isnan()
    again = function_rewards(a_run, "nowhere:reward", groups, file.with_name("cache.safetensors"))
    torch.testing.assert_close(again, rewards, equal_nan=True)
    file.write_text(file.read_text().replace("seen.append(given)", "open(__file__ + '.json', 'w').write(repr(given))"))
    function_rewards(a_run, f"{file}:reward", groups, file.with_name("other.safetensors"))
    said = [[{"role": "assistant", "content": text}] for text in ("no", "nay")]
    assert eval((file.parent / "mine.py.json").read_text()) == {
        "prompts": ["say yes"] * 2 + [ROWS[1]["prompt"]] * 2,
        "completions": ["yes", "so", *said],
        "completion_ids": [answer for group in groups for answer in group.answers],
        "expected": ["y", "y", None, None],
    }


BAD = {
    "def reward(**given): return [1.0]": "found 1 rewards, expected 4",
    "def reward(**given): return [1.0, 2.0, float('nan'), 3.0]": "found nan for the answer 'no', expected a number",
    "def reward(**given): return ['1', 2, 3, 4]": "found '1' for the answer 'yes'",
    "def reward(**given): return 1.0": "it failed (TypeError",
    "def reward(prompts): return 1.0": "unexpected keyword argument",
    "def reward(**given):\n    raise OSError('no\\nnetwork')": "it failed (OSError: no network, mine.py line 2)",
    "def other(**given): return 1.0": "cannot be imported (AttributeError",
    "import nothing_like_this": "cannot be imported (ModuleNotFoundError",
    "def reward(": "cannot be imported (SyntaxError",
    "reward = 3": "found int, expected a function",
}


@pytest.mark.parametrize("code", BAD)
def test_a_faulty_function_is_reported_in_one_sentence(given, code):
    a_run, groups, file = given
    file.write_text(code)
    with pytest.raises(InputError) as caught:
        function_rewards(a_run, f"{file}:reward", groups, file.with_name("cache.safetensors"))
    assert str(caught.value).startswith(f"reward_function {file}:reward: ")
    assert BAD[code] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not file.with_name("cache.safetensors").exists()


def test_a_function_may_be_in_a_module_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards").mkdir()
    (tmp_path / "my_rewards" / "short.py").write_text("def reward(completions, **given): return [0.0]\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("my_rewards.short:reward", "reward_function")(completions=[]) == [0.0]


@pytest.mark.parametrize("name", ["my_rewards", "my_rewards:", ":reward", "a/b:reward", "nothing.py:reward"])
def test_a_function_without_a_place_is_refused_before_data_is_read(name):
    with pytest.raises(InputError, match="reward_function: "):
        make_config({"dataset_name": "x.jsonl", "model_name_or_path": "a/b", "method": "rft", "reward_function": name})


SHORT = "def short(completions, **given):\n    return [-float(len(text)) for text in completions]\n"


def test_a_policy_is_aligned_to_a_function_of_its_answers(tmp_path):
    file = tmp_path / "short.py"
    file.write_text(SHORT)
    keys = {
        "method": "rft",
        "stages": 1,
        "reward_data": "none",
        "num_generations": 3,
        "reward_function": f"{file}:short",
    }
    run(tmp_path / "run", **keys)
    stage = tmp_path / "run" / "stage-00"
    rollouts = [json.loads(line) for path in (stage / "rollouts").glob("*.jsonl") for line in path.open()]
    expected = {row["index"]: -float(len(row["answer"])) for row in rollouts}
    rewards = load_file(stage / "reward-0.safetensors")["values"].tolist()
    assert rewards == [expected[number] for number in range(len(rewards))]
    assert json.loads((stage / "round.json").read_text())["reward"] == pytest.approx(sum(rewards) / len(rewards))


def test_best_of_n_of_bare_prompts_is_data_to_train_on(tmp_path):
    """The prompts have no answers, and are texts or messages with earlier turns. The best rows are demonstrations."""
    from tests.methods.test_rft import bon

    file, policy = tmp_path / "short.py", tmp_path / "run" / "final"
    file.write_text(SHORT.replace("text)", "text[0]['content'] if isinstance(text, list) else text)"))
    run(tmp_path / "run", method="sft", sft_steps=2, inner_steps="null")
    talk = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "ho"), ("user", "so?"))]
    prompts = [{"prompt": "say yes"}, {"messages": talk}, {"prompt": [{"role": "user", "content": "say no"}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    keys = {"model_name_or_path": policy, "reward_function": f"{file}:short", "num_generations": 4}
    bon(tmp_path / "bon", dataset_name=tmp_path / "prompts.jsonl", **keys)
    best = [json.loads(line) for line in (tmp_path / "bon" / "best.jsonl").open()]
    assert [row["messages"][-2]["content"] for row in best] == ["say yes", "so?", "say no"]
    assert [row["reward"] for row in best] == [-len(row["messages"][-1]["content"]) for row in best]
    assert all("expert" not in row for row in best)
    assert json.loads((tmp_path / "bon" / "curve.json").read_text())[0]["exact_match"] is None
    again = {"method": "sft", "model_name_or_path": policy, "max_length": 96, "max_prompt_length": 64}
    again |= {"dataset_name": tmp_path / "bon" / "best.jsonl", "output_dir": tmp_path / "again"}
    shown = printed(["-m", "irlfast.train", "--dry_run", *(f"{name}={value}" for name, value in again.items())])
    assert "3 rows read as messages" in "".join(shown)


def test_rows_that_select_keeps_are_data_to_train_on(tmp_path):
    from irlfast.data.read import read_demonstrations
    from irlfast.data.select import select
    from irlfast.data.sources import sources_of

    rows = [
        {"prompt": "say yes", "completion": "yes", "id": 1},
        {"messages": [*ROWS[1]["prompt"], *ROWS[1]["completion"]], "id": 2},
        {"instruction": "say so", "input": "now", "output": "so", "id": 3},
    ]
    folder, _ = save_reward(tmp_path / "reward", qwen())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    select(str(tmp_path / "rows.jsonl"), "train", folder, tmp_path / "best.jsonl", keep=2, batch_size=2)
    kept, every = (
        list(read_demonstrations(config, sources_of(config), []))
        for config in (Config(dataset_name=str(tmp_path / name)) for name in ("best.jsonl", "rows.jsonl"))
    )
    assert len(kept) == 2
    expected = {row.row["id"]: (row.prompt, row.answer) for row in every}
    assert all((row.prompt, row.answer) == expected[row.row["id"]] for row in kept)
