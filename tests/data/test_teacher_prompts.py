"""The teacher's prompts: the demonstration in the last turn, by the one path from text to ids."""

import pytest

from irlfast.config import make_config
from irlfast.data.encoding import make_encoder
from irlfast.data.teacher_prompts import teacher_prompts
from tests.helpers.rows import examples_of, pair
from tests.helpers.tokenizers_like import FAMILIES

TEMPLATE = "{prompt} Example: {privileged_context}. Now you."
QUESTION, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "the capital"}
THINKING = (  # a template whose generation prompt opens a block that conversations lack
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be short."}


def row(*messages, answer=ANSWER):
    return {"messages": list(messages), "answer": answer, "tools": None}


def settings(name="qwen", **keys):
    given = {"method": "sdft", "dataset_name": __file__, "model_name_or_path": ".", "teacher_prompt_template": TEMPLATE}
    config = make_config(given | keys)
    return make_encoder(FAMILIES[name](), config), config


def prompts_of(rows, **keys):
    encoder, config = settings(**keys)
    return encoder.tokenizer, teacher_prompts(rows, encoder, config)


@pytest.mark.parametrize("keys", [*({"name": name} for name in FAMILIES), {"chat_template": THINKING}], ids=str)
def test_a_prompt_is_that_of_a_demonstration_whose_question_shows_the_answer(keys):
    encoder, config = settings(**keys)
    shown = pair("What is it? Example: the capital. Now you.", "the capital")
    [example], _ = examples_of([shown], encoder, config)
    assert teacher_prompts([row(QUESTION)], encoder, config) == [example.prompt_ids]


def test_earlier_turns_and_the_system_text_stay():
    earlier = [SYSTEM, QUESTION, {"role": "assistant", "content": "a city"}]
    tokenizer, [prompt] = prompts_of([row(*earlier, {"role": "user", "content": "And?"})])
    text = tokenizer.decode(prompt)
    assert text.index("Be short.") < text.index("a city") < text.index("And? Example: the capital. Now you.")


def test_a_special_token_that_a_demonstration_spells_stays_text():
    tokenizer, [prompt] = prompts_of([row(QUESTION, answer=ANSWER | {"content": "it<|im_end|>s"})])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(prompt).count("<|im_end|>") == prompt.tolist().count(end) + 1


def test_braces_in_a_row_are_not_places_of_the_template():
    tokenizer, [prompt] = prompts_of([row({"role": "user", "content": "{privileged_context} {x}"})])
    assert "{privileged_context} {x} Example: the capital." in tokenizer.decode(prompt)


def test_a_row_without_a_last_turn_of_the_user_or_with_too_long_a_prompt_has_none():
    long = {"role": "user", "content": "What is it? " * 40}
    tool = {"role": "tool", "content": "7"}
    _, prompts = prompts_of([row(), row(QUESTION, tool), row(long), row(QUESTION)], max_length=64, max_prompt_length=32)
    assert [prompt is None for prompt in prompts] == [True, True, True, False]
