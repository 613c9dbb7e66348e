"""Templates that are proven not to look into contents write what Jinja makes of them; any other is left to Jinja."""

import datetime
import functools
from types import SimpleNamespace

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.data.fixed_texts import LEFT, RIGHT, FixedTexts, has_fixed_texts, write_contents
from irlfast.data.templates import make_template, render, render_by_jinja
from tests.helpers import templates
from tests.helpers.tokenizers_like import QWEN, ZEPHYR, qwen

TURNS = "{% for m in messages %}"
FIXED = {
    "ChatML": QWEN,
    "Zephyr": ZEPHYR,
    **{
        name: getattr(templates, name)
        for name in ("QWEN25", "LLAMA3", "DATED", "GEMMA", "MISTRAL_SPACE", "PHI3", "CHANNELS", "COMMAND_R", "OPENED")
    },
    "trimmed and not": TURNS
    + "{{ m.content.strip() }}|{{ m.content }}|{{ m['content'] | trim }}{{ m.content }}\n{% endfor %}",
    "by place": "{{ messages[0].content }}{{ messages[-1]['role'] ~ messages | length }}"
    "{% for m in messages[1:] %}{{ loop.index }}{{ m.content ~ '\n' if loop.last else 'a' + m.content }}{% endfor %}",
    "a type": TURNS
    + "{% if m.content is string and m.name is not defined %}{{ m.role + m.content }}{% endif %}{% endfor %}",
    "a namespace": "{% set n = namespace(i=0) %}"
    + TURNS
    + "{% set n.i = n.i + 1 %}{{ n.i }}{{ m.content }}{% endfor %}",
}
LOOKS = [
    TURNS + "{% if m.content %}a{% endif %}{% endfor %}",
    TURNS + "{{ 'a' if m.content == 'b' else 'c' }}{% endfor %}",
    TURNS + "{% if 'a' in m.content %}a{% endif %}{% endfor %}",
    TURNS + "{{ m.content | upper }}{% endfor %}",
    TURNS + "{{ ('a' + m.content) | trim }}{% endfor %}",
    TURNS + "{% set c = m.content | trim %}{{ c | trim }}{% endfor %}",
    TURNS + "{{ m.content | trim('a') }}{% endfor %}",
    TURNS + "{{ m.content.strip('a') }}{% endfor %}",
    TURNS + "{{ m.content.split('a')[0] }}{% endfor %}",
    TURNS + "{{ m.content[:3] }}{% endfor %}",
    TURNS + "{{ m.content * 2 }}{% endfor %}",
    TURNS + "{{ m.content or 'a' }}{% endfor %}",
    TURNS + "{{ m }}{% endfor %}",
    TURNS + "{{ m | tojson }}{% endfor %}",
    TURNS + "{{ m.get('content') }}{% endfor %}",
    TURNS + "{% for k, v in m.items() %}{{ v }}{% endfor %}{% endfor %}",
    TURNS + "{% for k in m %}{{ m[k] }}{% endfor %}{% endfor %}",
    TURNS + "{% for c in m.content %}{{ c }}-{% endfor %}{% endfor %}",
    TURNS + "{% set k = 'content' %}{{ m[k] | length }}{% endfor %}",
    TURNS + "{{ m.content | length }}{% endfor %}",
    TURNS + "{{ [m.content] | join }}{% endfor %}",
    TURNS + "{{ '%s' % m.content }}{% endfor %}",
    TURNS + "{{ '%s' | format(m.content) }}{% endfor %}",
    TURNS + "{{ raise_exception(m.content) }}{% endfor %}",
    TURNS + "{% set x = m %}{{ x.content | upper }}{% endfor %}",
    TURNS + "{% set c = m.content %}{% if c == 'a' %}b{% endif %}{% endfor %}",
    TURNS + "{% if c == 'a' %}b{% endif %}{% set c = m.content %}{% endfor %}",
    TURNS + "{{ loop.previtem.content | upper }}{% endfor %}",
    TURNS + "{% set k = 'previtem' %}{% if loop[k].content == 'a' %}b{% endif %}{% endfor %}",
    TURNS + "{% set l = loop %}{{ l.nextitem.content | upper }}{% endfor %}",
    TURNS + "{% if loop.changed(m.content) %}a{% endif %}{% endfor %}",
    TURNS + "{% set n = namespace(c=m.content) %}{% if n.c == 'a' %}b{% endif %}{% endfor %}",
    "{% set n = namespace() %}" + TURNS + "{% set n.c = m.content %}{% if n.c == 'a' %}b{% endif %}{% endfor %}",
    "{% set d = dict(a=messages) %}{{ d.a[0].content | upper }}",
    "{% set l = [messages] %}{{ l[0][0].content | upper }}",
    "{% macro f(x) %}{{ x | upper }}{% endmacro %}" + TURNS + "{{ f(m.content) }}{% endfor %}",
    "{% macro f() %}{{ messages[0].content | upper }}{% endmacro %}{{ f() }}",
    "{% filter upper %}" + TURNS + "{{ m.content }}{% endfor %}{% endfilter %}",
    "{% set x %}{{ messages[0].content }}{% endset %}{{ x | upper }}",
    "{% for m in messages if m.content %}{{ m.content }}{% endfor %}",
    "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "{% for c in messages | map(attribute='content') %}{{ c | upper }}{% endfor %}",
    "{{ messages[0].content is eq('a') }}",
    "{{ messages[0].content < messages[1].content }}",
    "{{ messages == messages[:] }}",
    "{{ (messages + [])[0].content | upper }}",
    "{{ (messages if true else 1)[0].content | upper }}",
    "{% with x = messages[0].content %}{{ x | upper }}{% endwith %}",
    "{{ [1, 2, 3] | random }}{{ messages[0].content }}",
    "{{ self }}{{ messages[0].content }}",
    "{% include 'a' %}",
    "{% if %}",
    "".join(f"{{% set a{i} = a{i + 1} %}}" for i in range(100)) + "{% set a100 = messages[0].content %}{{ a0 }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
]
contents = st.text(max_size=8) | st.sampled_from(
    [
        "",
        " a ",
        "\n\n",
        LEFT,
        RIGHT + "a",
        "{{ m }}",
        "<|im_end|>",
        "\ufdd1a\ufdd2",
        "\ufdd60\ufdd7",
        "<think>a</think>",
        "é🙂\u00a0",
    ]
)
drawn_turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), contents), min_size=1, max_size=4)


@functools.cache
def template_of(name):
    tokenizer = qwen()
    tokenizer.chat_template = FIXED[name]
    config = SimpleNamespace(chat_template_kwargs={}, system_prompt=None, prompt_template="{}")
    return make_template(tokenizer, config, datetime.datetime(2026, 1, 2))


def result_of(function, *given, **more):
    try:
        return function(*given, **more)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", FIXED)
@settings(max_examples=60, deadline=None)
@given(conversations=st.lists(drawn_turns, min_size=1, max_size=4), generation=st.booleans())
def test_a_text_is_what_jinja_makes_of_it(name, conversations, generation):
    template = template_of(name)
    assert template.fixed is not None
    for turns in conversations:
        messages = [{"role": role, "content": content} for role, content in turns]
        wanted = result_of(render_by_jinja, template, messages, None, generation)
        assert result_of(render, template, messages, generation=generation, marks=True) == wanted


@pytest.mark.parametrize("text", LOOKS)
def test_a_template_that_may_look_into_a_content_is_left_to_jinja(text):
    assert not has_fixed_texts(text)


def test_deep_expressions_take_no_longer_than_their_length():
    for deep in (".a" * 60, "|trim" * 60, ".a|trim" * 60, ".strip()" * 60, "()" * 60, "[0]" * 60):
        assert has_fixed_texts("{{ x" + deep + " }}")


@pytest.mark.parametrize("name", ["QWEN3", "R1", "MARKED"])
def test_templates_that_look_for_thoughts_or_mark_answers_are_left_to_jinja(name):
    assert not has_fixed_texts(getattr(templates, name))


def test_messages_with_more_than_a_text_are_left_to_jinja():
    fixed = FixedTexts({})
    for message in ({"content": None}, {"content": ["a"]}, {"content": "a", "tool_calls": []}, {}):
        assert write_contents(fixed, [{"role": "user"} | message], False, lambda messages: "a") is None


def test_a_template_that_writes_the_white_space_of_the_marks_is_left_to_jinja():
    template = jinja2.Template(LEFT + "{{ messages[0].content | trim }}" + RIGHT)
    assert (
        write_contents(FixedTexts({}), [{"role": "user", "content": "a"}], False, lambda m: template.render(messages=m))
        is None
    )


def test_a_refused_sequence_of_roles_is_rendered_by_jinja_each_time():
    def refuse(messages):
        raise ValueError("roles")

    fixed, messages = FixedTexts({}), [{"role": "user", "content": "a"}]
    assert write_contents(fixed, messages, False, refuse) is None
    assert write_contents(fixed, messages, False, lambda messages: messages[0]["content"]) is None
    assert write_contents(fixed, messages, True, lambda messages: messages[0]["content"]) == "a"
