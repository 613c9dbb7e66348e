"""Render a conversation by the chat template, and find the prompt and the answer in the text.

Templates do not only wrap an answer. They trim it, add a space, open or fill a thinking block, write channels or a
date, or refuse a conversation. So no text is glued here: the template writes the whole conversation, answer included,
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

from irlfast.common.files import InputError, find_path
from irlfast.data.fixed_texts import FixedTexts, has_fixed_texts, write_contents
from irlfast.data.plain_template import PlainTemplate, plain_template, plain_text
from irlfast.data.rows import Demonstration, Message
from irlfast.data.template_cost import check_cost, within_seconds

# Noncharacters of Unicode, which no text for interchange has.
ESCAPE = "\ufdd0"  # inside the spelling of a special token that must stay text
BEGIN, END = "\ufdd1", "\ufdd2"  # around the text that a template marks by {% generation %}
STAND_IN = "\ufdd3"  # an answer that begins like no other text

CLOCK = "abBcdfHIjmMpSUwWxXyYZzAe"  # the directives of strftime that a template may use
QUOTED = 300  # characters of a text in an error message


class TemplateRefusal(ValueError):
    """Raised if the template refuses a conversation, or writes it so that the answer's place is unknown."""


class Template(NamedTuple):
    """A tokenizer's chat template with the run's settings for it."""

    tokenizer: Any
    settings: dict[str, Any]  # ``chat_template_kwargs``
    system_prompt: str | None  # for conversations without a system turn
    begun: datetime.datetime  # the template's clock stands at this time, so that a resumed run reads the same texts
    plain: PlainTemplate | None = None  # made from prompt_template; None: the tokenizer's or the user's own template
    header: str = ""  # the text before the answer to a short question
    after: str = ""  # the text after a last answer
    fixed: FixedTexts | None = None  # None: the template may look into contents


class RenderedRow(NamedTuple):
    """A demonstration as text. ``prompt + answer`` is what the template writes."""

    prompt: str
    answer: str  # up to the end of the text: the end token and the text behind it, too
    rejected: str | None
    earlier: list[tuple[int, int]]  # characters of ``prompt`` that are earlier answers


# ---------------------------------------------------------------- which template


def choose_template(tokenizer: Any, config: Any) -> None:
    """Give ``tokenizer`` the run's chat template: ``chat_template``, its own, or one made from ``prompt_template``.

    Raises:
        InputError: ``chat_template`` is neither a file nor a name nor a template.
    """
    given, own = config.chat_template, tokenizer.chat_template
    if given is None:
        tokenizer.chat_template = own or plain_template(config.prompt_template, writes_bos=adds_bos(tokenizer))
    elif "{%" in given or "{{" in given:
        tokenizer.chat_template = given
    elif path := find_path(given):
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif isinstance(own, dict) and given in own:
        tokenizer.chat_template = own[given]
    else:
        names = ", ".join(own) if isinstance(own, dict) else "none by name"
        raise InputError(
            f"chat_template: found {given!r}, expected a file, a template's text, or one of the tokenizer's ({names})"
        )


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself puts a BOS in front of a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def make_template(tokenizer: Any, config: Any, begun: datetime.datetime) -> Template:
    """Make the run's template of a tokenizer that :func:`choose_template` has given one.

    Raises:
        InputError: the template cannot write a question with its answer.
    """
    plain = None
    if tokenizer.chat_template == plain_template(config.prompt_template, adds_bos(tokenizer)):
        before, _, behind = config.prompt_template.partition("{}")
        bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
        plain = PlainTemplate(bos + before, behind, tokenizer.eos_token or "")
    template = Template(tokenizer, config.chat_template_kwargs, config.system_prompt, begun, plain)
    question = [{"role": "user", "content": "a"}]
    if not plain:
        check_cost("chat_template", tokenizer.chat_template, functools.partial(render, template))
    try:
        opening = render(template, question, generation=True)
        whole = render(template, [*question, {"role": "assistant", "content": STAND_IN}])
    except TemplateRefusal as error:
        is_syntax = isinstance(error.__cause__, jinja2.TemplateSyntaxError)
        fault = "is no Jinja template" if is_syntax else "refuses a question with its answer"
        raise InputError(f"chat_template: it {fault} ({error})") from error
    if STAND_IN not in whole:
        raise InputError(f"chat_template: it writes no answer: found {quote(whole)} for a question with its answer")
    fixed = FixedTexts({}) if not plain and has_fixed_texts(tokenizer.get_chat_template()) else None
    return template._replace(header=common_prefix(opening, whole), after=whole.rpartition(STAND_IN)[2], fixed=fixed)


# ---------------------------------------------------------------- rendering


def render(
    template: Template,
    messages: list[Message],
    tools: list[dict] | None = None,
    generation: bool = False,
    marks: bool = False,
) -> str:
    """Render a conversation; with ``generation``, the text ends with the header of an answer to be generated.

    With ``marks``, BEGIN and END stand around the text that the template marks by {% generation %}.

    Raises:
        TemplateRefusal: the template refuses the conversation; the message is the template's own.
    """
    if template.plain and messages and not template.settings:
        return plain_text(template.plain, messages, generation)
    text = None
    if template.fixed and tools is None:
        again = functools.partial(render_by_jinja, template, tools=None, generation=generation)
        text = write_contents(template.fixed, messages, generation, again)
    if text is None:
        text = render_by_jinja(template, messages, tools, generation)
    return text if marks else remove_marks(text)


def render_by_jinja(template: Template, messages: list[Message], tools: list[dict] | None, generation: bool) -> str:
    """Do the same by Jinja; the marks stay."""
    tokenizer = template.tokenizer
    try:
        with within_seconds():
            return tokenizer.apply_chat_template(
                [{key: value for key, value in message.items() if key != "weight"} for message in messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=generation,
                chat_template=prepare_template(tokenizer.get_chat_template(tools=tools), template.begun),
                **template.settings,
            )
    except Exception as error:  # a template is a program, which may raise anything
        raise TemplateRefusal(" ".join(str(error).split()) or type(error).__name__) from error


@functools.cache
def prepare_template(text: str, begun: datetime.datetime) -> str:
    """Return the template with a clock that stands still, and with marks around its {% generation %} blocks."""
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
    return "".join(f"{part}\n" for part in parts) + text  # Jinja drops the newline after a block


def remove_marks(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")


def quote(text: str) -> str:
    """Quote a text in an error message; a long text loses its middle."""
    text = remove_marks(text).replace(ESCAPE, "")
    return repr(text if len(text) <= QUOTED else f"{text[: QUOTED // 2]} … {text[-QUOTED // 2 :]}")


# ---------------------------------------------------------------- where the answer is


def render_row(template: Template, row: Demonstration, remarks: Counter[str], learn_all: bool = False) -> RenderedRow:
    """Render a demonstration; ``remarks`` counts what the template leaves out or changes.

    Raises:
        TemplateRefusal: the template refuses the demonstration, or the answer's place is unknown.
    """
    prompt = add_system_prompt(template, row.prompt)
    if row.answer is None:
        return RenderedRow(render(template, prompt, row.tools, generation=True), "", None, [])
    before, answer = locate_answer(template, prompt, row.answer, row.tools, remarks)
    note_omissions(row.answer, answer, remarks)
    rejected = None
    if row.rejected is not None:
        same, rejected = locate_answer(template, prompt, row.rejected, row.tools, Counter())
        if same != before:
            remarks["rejected answers are left out, because the template writes another prompt before them"] += 1
            rejected = None
    earlier = find_earlier_answers(template, prompt, row.tools, remarks) if learn_all else []
    return RenderedRow(before, answer, rejected, [(start, end) for start, end in earlier if end <= len(before)])


def add_system_prompt(template: Template, messages: list[Message]) -> list[Message]:
    if template.system_prompt is None or any(message["role"] in ("system", "developer") for message in messages):
        return messages
    return [{"role": "system", "content": template.system_prompt}, *messages]


def locate_answer(
    template: Template, prompt: list[Message], answer: Message, tools: list[dict] | None, remarks: Counter[str]
) -> tuple[str, str]:
    """Split the rendered conversation into the text before the answer and the text from the answer on.

    Three cases are tried in turn:

    1. Mostly, the whole conversation begins with the generation prompt, and the answer follows.
    2. The template marks answers by {% generation %}, and the last mark is the answer.
    3. The generation prompt ends with a text that whole conversations lack, such as an opened thinking block. An
       answer that closes this block continues it. Any other answer follows the header that both texts have.

    Raises:
        TemplateRefusal: the common beginning of both texts lacks the last turn of the prompt.
    """
    opening = render(template, prompt, tools, generation=True)
    if template.plain and not template.settings:
        return opening, answer["content"] + template.plain.end
    marked = render(template, [*prompt, answer], tools, marks=True)
    whole = remove_marks(marked)
    if whole.startswith(opening):
        return opening, whole[len(opening) :]
    if BEGIN in marked:
        start = len(remove_marks(marked[: marked.rindex(BEGIN)]))
        return whole[:start], whole[start:]
    other = render(template, [*prompt, {"role": answer["role"], "content": STAND_IN}], tools)
    header = common_prefix(opening, other)
    extra = opening[len(header) :]
    closing = close_block(extra, str(answer.get("content") or ""))
    if closing is not None:
        remarks[f"answers continue the {extra!r} at the end of the template's generation prompt, and close it"] += 1
        return opening, closing + template.after
    last = str(prompt[-1].get("content") or "").strip() if prompt else ""
    if not header or last not in header or not whole.startswith(header):
        raise TemplateRefusal(
            "the answer's place is unknown, because the conversation does not begin with its prompt: found "
            f"{quote(whole)} for the conversation and {quote(opening)} for the prompt"
        )
    remarks[
        f"answers begin before the {extra!r} at the end of the template's generation prompt, which conversations lack"
    ] += 1
    return header, whole[len(header) :]


def common_prefix(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def close_block(opened: str, answer: str) -> str | None:
    """Return the part of the answer inside the block that ``opened`` opens, such as ``<think>``.

    Return None if the answer does not close the block.
    """
    tag = re.fullmatch(r"\s*<(\w+)>(\s*)", opened)
    if not tag or f"</{tag[1]}>" not in answer:
        return None
    body = answer.lstrip()
    return body.removeprefix(f"<{tag[1]}>").removeprefix(tag[2]) if body.startswith(f"<{tag[1]}>") else answer


def note_omissions(answer: Message, written: str, remarks: Counter[str]) -> None:
    """Count the answers whose content, reasoning or tool calls the template does not write whole."""
    for key, value in answer.items():
        if key in ("role", "weight") or (isinstance(value, str) and value.strip() in written):
            continue
        texts = [text.strip() for text in texts_of(value)]
        if not all(text in written or json.dumps(text)[1:-1] in written for text in texts):
            remarks[f"answers have a {key} that the template leaves out, in part or whole"] += 1


def texts_of(value: Any) -> list[str]:
    """Return every text inside a value of a message, except the type and the id of a tool call."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, each in value.items() if key not in ("type", "id") for text in texts_of(each)]
    return [text for each in value for text in texts_of(each)] if isinstance(value, list) else []


def find_earlier_answers(
    template: Template, prompt: list[Message], tools: list[dict] | None, remarks: Counter[str]
) -> list[tuple[int, int]]:
    """Find the assistant's turns to learn in the rendered ``prompt``: ranges of characters, without end tokens."""
    ranges = []
    for i, message in enumerate(prompt):
        if message["role"] == "assistant" and message.get("weight") != 0:
            try:
                ranges.append(find_earlier_answer(template, prompt, i, tools))
            except TemplateRefusal:
                remarks["earlier answers are not learned, because their place in the rendered text is unknown"] += 1
    return ranges


def find_earlier_answer(template: Template, prompt: list[Message], i: int, tools: list[dict] | None) -> tuple[int, int]:
    """Find turn ``i`` in the rendered ``prompt`` by rendering another content in its place.

    Raises:
        TemplateRefusal: the two texts do not show the turn's place.
    """
    text = render(template, prompt, tools, generation=True)
    changed = [*prompt[:i], prompt[i] | {"content": STAND_IN}, *prompt[i + 1 :]]
    before, stand_in, behind = render(template, changed, tools, generation=True).partition(STAND_IN)
    is_between = text.startswith(before) and text.endswith(behind) and len(before) + len(behind) < len(text)
    if not stand_in or not is_between:
        raise TemplateRefusal("the template does not write the turn exactly once")
    header = locate_answer(template, prompt[:i], prompt[i], tools, Counter())[0]
    start = len(header) if before.startswith(header) else len(before)
    return start, len(text) - len(behind)


# ---------------------------------------------------------------- conversations that a template refuses


def mend_conversation(messages: list[Message]) -> list[Message]:
    """Change a conversation for strict templates: move system texts into a user turn, and join turns of one role."""
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


def without_first_turns(prompt: list[Message]) -> list[list[Message]]:
    """Return ever shorter conversations: the system text, then the turns from each later turn of the user on."""
    system = list(itertools.takewhile(lambda message: message["role"] in ("system", "developer"), prompt))
    starts = [at for at in range(len(system) + 1, len(prompt)) if prompt[at]["role"] == "user"]
    return [[*system, *prompt[at:]] for at in starts]
