"""The chat template of a model that has none: ``prompt_template`` around the prompt, then the answer and its end."""

from typing import NamedTuple

from irlfast.data.rows import Message

ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}


class PlainTemplate(NamedTuple):
    """The texts that :func:`plain_template` writes around a prompt and behind an answer."""

    before: str  # the BOS, too
    behind: str
    end: str  # the end token


def plain_template(around: str, writes_bos: bool) -> str:
    """Return ``prompt_template`` as a chat template: its text around a prompt, then the answer and the EOS.

    A prompt of one turn is the text of the turn. A prompt of several turns has the name of the role before each turn.
    """
    before, _, behind = around.partition("{}")
    bos = "{{- bos_token -}}" if writes_bos else ""
    return (
        "{%- set answered = messages[-1].role == 'assistant' and not add_generation_prompt -%}"
        "{%- set turns = messages[:-1] if answered else messages -%}"
        f"{bos}{{{{- {jinja_string(before)} -}}}}"
        "{%- for turn in turns -%}"
        "{%- if turns | length > 1 -%}"
        f"{{{{- '\\n\\n' if not loop.first else '' -}}}}{{{{- {ROLES}.get(turn.role, turn.role) ~ ': ' -}}}}"
        "{%- endif -%}"
        "{{- turn.content -}}"
        "{%- endfor -%}"
        f"{{{{- {jinja_string(behind)} -}}}}"
        "{%- if answered -%}{{- messages[-1].content ~ eos_token -}}{%- endif -%}"
    )


def join_turns(messages: list[Message]) -> str:
    """Return a conversation as :func:`plain_template` writes a prompt, without the text around the prompt."""
    turns = [(ROLES.get(message["role"], message["role"]), str(message.get("content") or "")) for message in messages]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{name}: {text}" for name, text in turns)


def plain_text(plain: PlainTemplate, messages: list[Message], generation: bool) -> str:
    """Return what Jinja makes of :func:`plain_template`, in a tenth of the time."""
    answered = messages[-1]["role"] == "assistant" and not generation
    turns, answer = (messages[:-1], messages[-1]["content"] + plain.end) if answered else (messages, "")
    return plain.before + join_turns(turns) + plain.behind + answer


def jinja_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r") + "'"
