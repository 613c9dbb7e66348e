"""A conversation as the chat template writes it: which text is the prompt, and which text is the answer.

Templates do not only wrap an answer. They trim it, add a space, open or fill a thinking block, write channels or a
date, or refuse a conversation. So nothing is glued here: the template writes the whole conversation, answer included,
and the answer is a part of that text. Sampling starts where this part starts.
"""

import datetime
import functools
import itertools
import json
import re
from collections import Counter
from typing import Any, NamedTuple

import jinja2

from irlfast.common.files import InputError, find
from irlfast.data.rows import Demonstration, Message

# Unicode's noncharacters, which no text for interchange has.
BROKEN = "\ufdd0"  # stands within the spelling of a special token that is to stay text
BEGIN, END = "\ufdd1", "\ufdd2"  # stand around the text that a template marks by {% generation %}
STAND_IN = "\ufdd3"  # an answer that begins like no other text

CLOCK = "abBcdfHIjmMpSUwWxXyYZzAe"  # the directives of strftime that a template may use
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}
SHOWN = 300  # characters of a text in a message


class Refused(ValueError):
    """The template refuses a conversation, or writes it so that the answer's place is not known."""


class Template(NamedTuple):
    """A tokenizer's chat template with what a run sets for it."""

    tokenizer: Any
    settings: dict[str, Any]  # ``chat_template_kwargs``
    system_prompt: str | None  # for conversations without a system turn
    begun: datetime.datetime  # the time that the template is told, so that a resumed run reads the same texts
    own: bool = True  # the tokenizer's or the user's; else made from prompt_template
    header: str = ""  # what it writes before the answer to a short question
    after: str = ""  # what it writes after a last answer


class Written(NamedTuple):
    """A demonstration as text. ``prompt + answer`` is what the template writes."""

    prompt: str
    answer: str  # up to the end of the text: the end token and what follows it, too
    rejected: str | None
    turns: list[tuple[int, int]]  # characters of ``prompt`` that are earlier answers


# ---------------------------------------------------------------- which template


def choose_template(tokenizer: Any, config: Any) -> None:
    """Give ``tokenizer`` the run's chat template: ``chat_template``, its own, or else ``prompt_template`` as one.

    Raises:
        InputError: ``chat_template`` is neither a file nor a name nor a template.
    """
    given, own = config.chat_template, tokenizer.chat_template
    if given is None:
        tokenizer.chat_template = own or plain_template(config.prompt_template, writes_bos=adds_bos(tokenizer))
    elif "{%" in given or "{{" in given:
        tokenizer.chat_template = given
    elif path := find(given):
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif isinstance(own, dict) and given in own:
        tokenizer.chat_template = own[given]
    else:
        names = ", ".join(own) if isinstance(own, dict) else "none by name"
        raise InputError(
            f"chat_template: found {given!r}, expected a file, a template's text, or one of the tokenizer's ({names})"
        )


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a BOS in front of a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def plain_template(around: str, writes_bos: bool) -> str:
    """``prompt_template`` as a chat template: text around a prompt, then the answer and the EOS.

    A conversation of one turn is its text; of several, a line for each turn with the name of its role.
    """
    before, _, behind = around.partition("{}")
    bos = "{{- bos_token -}}" if writes_bos else ""
    return (
        "{%- set answered = messages[-1].role == 'assistant' and not add_generation_prompt -%}"
        "{%- set turns = messages[:-1] if answered else messages -%}"
        f"{bos}{{{{- {quoted(before)} -}}}}"
        "{%- for turn in turns -%}"
        "{%- if turns | length > 1 -%}"
        f"{{{{- '\\n\\n' if not loop.first else '' -}}}}{{{{- {ROLES}.get(turn.role, turn.role) ~ ': ' -}}}}"
        "{%- endif -%}"
        "{{- turn.content -}}"
        "{%- endfor -%}"
        f"{{{{- {quoted(behind)} -}}}}"
        "{%- if answered -%}{{- messages[-1].content ~ eos_token -}}{%- endif -%}"
    )


def plain_text(messages: list[Message]) -> str:
    """A conversation as the template of :func:`plain_template` writes a prompt, without the text around it."""
    turns = [(ROLES.get(message["role"], message["role"]), str(message.get("content") or "")) for message in messages]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{name}: {text}" for name, text in turns)


def quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r") + "'"


def make_template(tokenizer: Any, config: Any, begun: datetime.datetime) -> Template:
    """The run's template of a tokenizer that :func:`choose_template` has seen.

    Raises:
        InputError: the template cannot write a question with its answer.
    """
    own = tokenizer.chat_template != plain_template(config.prompt_template, adds_bos(tokenizer))
    template = Template(tokenizer, config.chat_template_kwargs, config.system_prompt, begun, own)
    question = [{"role": "user", "content": "a"}]
    try:
        opening = render(template, question, generation=True)
        whole = render(template, [*question, {"role": "assistant", "content": STAND_IN}])
    except Refused as error:
        wrong = isinstance(error.__cause__, jinja2.TemplateSyntaxError)
        what = "is no Jinja template" if wrong else "refuses a question with its answer"
        raise InputError(f"chat_template: it {what} ({error})") from error
    if STAND_IN not in whole:
        raise InputError(f"chat_template: it writes no answer: found {shown(whole)} for a question with its answer")
    return template._replace(header=common_beginning(opening, whole), after=whole.rpartition(STAND_IN)[2])


# ---------------------------------------------------------------- rendering


def render(
    template: Template,
    messages: list[Message],
    tools: list[dict] | None = None,
    generation: bool = False,
    marks: bool = False,
) -> str:
    """A conversation in the template's words; ``generation``: with the beginning of an answer to be generated.

    With ``marks``, BEGIN and END stand around what the template marks by {% generation %}.

    Raises:
        Refused: with the template's own message.
    """
    tokenizer = template.tokenizer
    try:
        text = tokenizer.apply_chat_template(
            [{key: value for key, value in message.items() if key != "weight"} for message in messages],
            tools=tools,
            tokenize=False,
            add_generation_prompt=generation,
            chat_template=prepared(tokenizer.get_chat_template(tools=tools), template.begun),
            **template.settings,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise Refused(" ".join(str(error).split()) or type(error).__name__) from error
    return text if marks else unmarked(text)


@functools.cache
def prepared(text: str, begun: datetime.datetime) -> str:
    """The template with a clock that stands still, and with marks around what {% generation %} holds."""
    parts = []
    if "strftime_now" in text:
        codes = [code for code in CLOCK if f"%{code}" in text] or CLOCK  # a format may be one of the run's values
        values = json.dumps({f"%{code}": begun.strftime(f"%{code}") for code in codes})
        parts.append(
            "{% macro strftime_now(format) %}{% set now = namespace(text=format) %}"
            f"{{% for code, value in {values}.items() %}}"
            "{% set now.text = now.text.replace(code, value) %}{% endfor %}{{ now.text }}{% endmacro %}"
        )
    text, count = re.subn(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 call generated() \2%}", text)
    if count:
        text = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endcall \2%}", text)
        parts.append(f"{{% macro generated() %}}{BEGIN}{{{{ caller() }}}}{END}{{% endmacro %}}")
    return "".join(f"{part}\n" for part in parts) + text  # the newline after a block is none of the template's text


def unmarked(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")


def shown(text: str) -> str:
    text = unmarked(text).replace(BROKEN, "")
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}")


# ---------------------------------------------------------------- where the answer is


def write(template: Template, row: Demonstration, remarks: Counter[str], learn_all: bool = False) -> Written:
    """A demonstration as the template writes it; ``remarks`` counts what the template leaves out or changes.

    Raises:
        Refused: by the template, or where no reading of its texts is safe.
    """
    prompt = with_system(template, row.prompt)
    if row.answer is None:
        return Written(render(template, prompt, row.tools, generation=True), "", None, [])
    before, answer = read_answer(template, prompt, row.answer, row.tools, remarks)
    note_unwritten(row.answer, answer, remarks)
    rejected = None
    if row.rejected is not None:
        same, rejected = read_answer(template, prompt, row.rejected, row.tools, Counter())
        if same != before:
            remarks["rejected answers are left out, as the template writes another prompt before them"] += 1
            rejected = None
    turns = earlier_answers(template, prompt, row.tools, remarks) if learn_all else []
    return Written(before, answer, rejected, [(start, end) for start, end in turns if end <= len(before)])


def with_system(template: Template, messages: list[Message]) -> list[Message]:
    if template.system_prompt is None or any(message["role"] in ("system", "developer") for message in messages):
        return messages
    return [{"role": "system", "content": template.system_prompt}, *messages]


def read_answer(
    template: Template, prompt: list[Message], answer: Message, tools: list[dict] | None, remarks: Counter[str]
) -> tuple[str, str]:
    """The text before the answer, and the text from the answer's beginning on.

    - The whole conversation begins with the generation prompt, mostly: the answer is what follows.
    - The template marks answers by {% generation %}: the last mark is the answer.
    - The generation prompt ends with a text that whole conversations do not have, such as an opened thinking block.
      An answer that closes this block itself goes on from it. Other answers follow the header that both texts have.

    Raises:
        Refused: showing both texts, where their common beginning lacks the last turn of the prompt.
    """
    opening = render(template, prompt, tools, generation=True)
    marked = render(template, [*prompt, answer], tools, marks=True)
    whole = unmarked(marked)
    if whole.startswith(opening):
        return opening, whole[len(opening) :]
    if BEGIN in marked:
        start = len(unmarked(marked[: marked.rindex(BEGIN)]))
        return whole[:start], whole[start:]
    other = render(template, [*prompt, {"role": answer["role"], "content": STAND_IN}], tools)
    header = common_beginning(opening, other)
    extra = opening[len(header) :]
    closing = closes(extra, str(answer.get("content") or ""))
    if closing is not None:
        remarks[f"answers go on from the {extra!r} that ends the template's generation prompt, as they close it"] += 1
        return opening, closing + template.after
    last = str(prompt[-1].get("content") or "").strip() if prompt else ""
    if not header or last not in header or not whole.startswith(header):
        raise Refused(
            "the answer's place is not known, for the conversation does not begin with its prompt: found "
            f"{shown(whole)} for the conversation and {shown(opening)} for the prompt"
        )
    remarks[
        f"answers begin before the {extra!r} that ends the template's generation prompt, as conversations lack it"
    ] += 1
    return header, whole[len(header) :]


def common_beginning(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    return one[: next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]


def closes(opened: str, answer: str) -> str | None:
    """The answer from within the block that ``opened`` opens (``<think>``), where the answer closes this block."""
    tag = re.fullmatch(r"\s*<(\w+)>(\s*)", opened)
    if not tag or f"</{tag[1]}>" not in answer:
        return None
    body = answer.lstrip()
    return body.removeprefix(f"<{tag[1]}>").removeprefix(tag[2]) if body.startswith(f"<{tag[1]}>") else answer


def note_unwritten(answer: Message, written: str, remarks: Counter[str]) -> None:
    """Count an answer of which the template leaves a text out: its content, its reasoning, a tool call."""
    for key, value in answer.items():
        texts = [text.strip() for text in texts_of(value)] if key not in ("role", "weight") else []
        if not all(text in written or json.dumps(text)[1:-1] in written for text in texts):
            remarks[f"answers have a {key} that the template does not write whole"] += 1


def texts_of(value: Any) -> list[str]:
    """Every text within a value of a message. A tool call's kind and number are none."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, each in value.items() if key not in ("type", "id") for text in texts_of(each)]
    return [text for each in value for text in texts_of(each)] if isinstance(value, list) else []


def earlier_answers(
    template: Template, prompt: list[Message], tools: list[dict] | None, remarks: Counter[str]
) -> list[tuple[int, int]]:
    """Where the assistant's turns to learn stand in the rendered ``prompt``: characters, without their end tokens."""
    found = []
    for i, message in enumerate(prompt):
        if message["role"] == "assistant" and message.get("weight") != 0:
            try:
                found.append(earlier_answer(template, prompt, i, tools))
            except Refused:
                remarks["earlier answers are not learned, as their place in what the template writes is not known"] += 1
    return found


def earlier_answer(template: Template, prompt: list[Message], i: int, tools: list[dict] | None) -> tuple[int, int]:
    """Where turn ``i`` stands in the rendered ``prompt``, told by rendering another content in its place.

    Raises:
        Refused: where this does not tell it.
    """
    text = render(template, prompt, tools, generation=True)
    changed = [*prompt[:i], prompt[i] | {"content": STAND_IN}, *prompt[i + 1 :]]
    before, found, behind = render(template, changed, tools, generation=True).partition(STAND_IN)
    if not (found and text.startswith(before) and text.endswith(behind) and len(before) + len(behind) < len(text)):
        raise Refused("the template writes the turn not once, or not at all")
    header = read_answer(template, prompt[:i], prompt[i], tools, Counter())[0]
    start = len(header) if before.startswith(header) else len(before)
    return start, len(text) - len(behind)


# ---------------------------------------------------------------- conversations that a template refuses


def mended(messages: list[Message]) -> list[Message]:
    """A conversation for strict templates: the first user turn takes the system text, turns of one role are joined."""
    turns: list[Message] = []
    system = [str(message["content"]) for message in messages if message["role"] == "system"]
    for message in messages:
        if message["role"] == "system":
            continue
        if message["role"] == "user" and system:
            message = message | {"content": "\n\n".join([*system, str(message["content"])])}
            system = []
        if turns and turns[-1]["role"] == message["role"] and {*turns[-1], *message} <= {"role", "content", "weight"}:
            turns[-1] = turns[-1] | {"content": f"{turns[-1]['content']}\n\n{message['content']}"}
        else:
            turns.append(message)
    return turns


# ---------------------------------------------------------------- conversations that are too long


def shorter(prompt: list[Message]) -> list[list[Message]]:
    """A conversation that begins with each later turn of the user, after its system text."""
    system = list(itertools.takewhile(lambda message: message["role"] in ("system", "developer"), prompt))
    starts = [at for at in range(len(system) + 1, len(prompt)) if prompt[at]["role"] == "user"]
    return [[*system, *prompt[at:]] for at in starts]
