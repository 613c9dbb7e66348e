"""Chat templates: those of well-known models, changed, and templates of hostile parts, on several tokenizers."""

import datetime
import functools
from typing import Any

from hypothesis import strategies as st

from irlfast.config import make_config
from irlfast.data import template_cost
from irlfast.data.counts import SetCounts
from irlfast.data.encoding import encode, make_encoder
from irlfast.data.rows import Demonstration
from tests.fuzz.configuration import ACCEPTED
from tests.fuzz.guards import refusal
from tests.fuzz.inputs import RUN, texts, values
from tests.helpers import templates as known
from tests.helpers.tokenizers_like import FAMILIES

KNOWN = sorted(
    {text for name, text in vars(known).items() if name.isupper() and isinstance(text, str) and "{%" in text}
)
PARTS = (
    *("{{ ", " }}", "{% ", " %}", "{# ", " #}", "{%- ", " -%}", "{{- ", " -}}"),
    *("{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}", "{% endif %}", "{% else %}"),
    *(
        "{{ m.content }}",
        "{{ m['role'] }}",
        "{{ messages[0].content }}",
        "{{ messages[-1].content }}",
        "{{ messages }}",
    ),
    *(
        "{{ bos_token }}",
        "{{ eos_token }}",
        "{{ m.content | trim }}",
        "{{ tools | tojson }}",
        "{{ x.y.z }}",
        "{{ 1 / 0 }}",
    ),
    *("{{ raise_exception('no') }}", "{{ strftime_now('%Y %') }}", "{% generation %}", "{% endgeneration %}"),
    *("{% set ns = namespace(x=1) %}", "{% set ns.x = 2 %}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}", "{{ f(1) }}"),
    *("{% break %}", "{% continue %}", "{% include 'x' %}", "{% import '/etc/passwd' as x %}", "{% extends 'x' %}"),
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('" + RUN + "') }}",
    "{{ messages.append(1) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ ''.format(messages) }}{{ '{0.__class__}'.format(1) }}",
    "<|im_start|>",
    "<|im_end|>",
    "</s>",
    "\n",
)
BOMBS = (  # at the end of a template alone: a bomb that only a certain row sets off is not noticed beforehand
    "{{ 'a' * 9999999999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ range(10 ** 9) | list }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
)
parts = st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=12).map("".join)


@st.composite
def changed_template(draw: Any) -> str:
    """Draw a known template with a part cut out and a part put in."""
    text = draw(st.sampled_from(KNOWN))
    start = draw(st.integers(0, len(text)))
    end = min(len(text), start + draw(st.integers(0, 30)))
    return text[:start] + draw(st.just("") | st.sampled_from(PARTS)) + text[end:]


bombs = st.tuples(st.sampled_from(KNOWN), st.sampled_from(BOMBS)).map("".join)
roles = st.sampled_from(["user", "assistant", "system", "tool", "developer", "x"])
messages = st.fixed_dictionaries(
    {
        "role": roles,
        "content": st.text(max_size=20) | st.sampled_from(["</s>", "<|im_end|>", "a " * 200, "\ufdd0", "<think>"]),
    },
    optional={"reasoning_content": texts, "tool_calls": values, "weight": st.sampled_from([0, 1]), "name": values},
)
answers = messages.map(lambda message: message | {"role": "assistant"})
demonstrations = (
    st.tuples(
        st.lists(messages, max_size=4),
        answers | st.none(),
        st.none() | answers,
        st.none() | st.lists(st.dictionaries(texts, values, max_size=2), max_size=2),
    )
    .map(lambda parts: Demonstration(*parts, where="rows.jsonl, line 1"))
    .filter(lambda row: row.prompt or row.answer)
)
keys = st.fixed_dictionaries(
    {},
    optional={
        "chat_template_kwargs": st.dictionaries(
            st.sampled_from(["enable_thinking", "messages", "tools", "tokenize", "bos_token"]) | texts,
            values,
            max_size=2,
        ),
        "prompt_template": texts.map(lambda text: text + "{}"),
        "system_prompt": texts,
        "bad_rows": st.sampled_from(["skip", "mend"]),
        "overlong": st.just("drop"),
        "max_length": st.integers(1, 40),
        "max_prompt_length": st.integers(1, 40),
        "split_special_tokens": st.booleans(),
        "learn_turns": st.sampled_from(["first", "all"]),
        "method": st.just("sft"),
    },
)
INPUTS = st.tuples(
    st.sampled_from(sorted(FAMILIES)),
    st.none() | st.sampled_from(KNOWN) | parts | changed_template() | bombs,
    keys,
    st.lists(demonstrations, max_size=3),
)
EXAMPLES: list[Any] = [
    ("llama", "{{ 9 ** 9 ** 9 }}", {}, []),
    ("llama", "{{ 'a' * 9999999999 }}", {}, []),
    ("llama", "{{ '%99999999d' % 1 }}", {}, []),
    ("llama", "{{ range(10 ** 9) | list }}", {}, []),
    ("llama", "{{ 1 / 0 }}", {}, []),
]
template_cost.SECONDS = 1  # so that many of them can be tried


@functools.cache
def tokenizer_of(family: str) -> tuple[Any, Any]:
    """Return a family's tokenizer and its own template."""
    tokenizer = FAMILIES[family]()
    return tokenizer, tokenizer.chat_template


def check(drawn: tuple) -> None:
    family, template, settings, rows = drawn
    tokenizer, tokenizer.chat_template = tokenizer_of(family)
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        config = make_config(ACCEPTED | given | ({"chat_template": template} if template else {}))
    except ValueError:  # the target configuration is about it
        return
    names = ["chat_template", "rows.jsonl", "the tokenizer has no end token"]
    refusal(write_rows, tokenizer, config, rows, names=names)


def write_rows(tokenizer: Any, config: Any, rows: list[Demonstration]) -> None:
    """Encode rows as a run does."""
    encoder = make_encoder(tokenizer, config, datetime.datetime(2026, 1, 2))
    for row, ids in encode(rows, encoder, config, SetCounts()):
        assert ids.prompt and len(ids.prompt) + len(ids.answer) <= max(config.max_length, len(ids.prompt))
        assert len(ids.prompt) <= config.max_prompt_length or not row.prompt
        assert all(0 <= at < len(ids.prompt) for at in ids.earlier)
        assert (row.answer is None) <= (not ids.answer)
