"""Secrets: texts that open something for whoever reads them. No message, page or record of a run shows one.

A secret is the value of an environment variable whose name says so, the user and password or a signing parameter of a
URL, a token with a well-known beginning, or a private key. A mark such as ``SECRET-1a2b3c4d`` stands in its place. The
mark follows from the secret, so that a text with marks can be compared with the text itself.

Rows and model files stay as they are: what a model learns is the user's choice.
"""

import functools
import hashlib
import html
import json
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

NAMES = re.compile(  # of environment variables that hold secrets
    r"(^|_)(TOKEN|API_?KEY|KEY|KEY_ID|PASS|PASSPHRASE|CREDENTIAL|COOKIE|DSN)S?$|_PWD$|SECRET|PASSWO?R?D|SSHPASS",
    re.IGNORECASE,
)
SHORTEST = 8  # characters of a variable's value that is hidden; a shorter value is often an ordinary word
PARAMETER = r"[\w.%-]{0,40}(?:token|key|secret|sig(?:nature)?|passw(?:or)?d|auth|credential)[\w.%-]{0,40}"
# The last group of each pattern is the secret. Repetitions are bounded, so that no text takes long.
PATTERNS = (
    re.compile(r"(?<![\w+.-])[\w+.-]{1,40}://([^\s/?#\"'<>`]{1,2000})@"),
    re.compile(rf"[?&;#]{PARAMETER}=([^\s&;#\"'<>`]+)", re.IGNORECASE),
    re.compile(r"\b(?:Bearer|Basic) +([\w.~+/=-]{8,}[\w~+/=-])", re.IGNORECASE),
    re.compile(r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.{0,20000}?-----END [A-Z ]{0,40}PRIVATE KEY-----)", re.DOTALL),
    re.compile(
        r"(?<![A-Za-z0-9])("
        r"hf_[A-Za-z0-9]{20,}|sk-(?=[\w-]{0,60}\d)[\w-]{20,}"  # Hugging Face; OpenAI, Anthropic and others
        r"|gh[opsur]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"  # GitHub, GitLab
        r"|xox[a-z]-[\w-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}"  # Slack, AWS, Google
        r"|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}"
        r"|eyJ[\w-]{10,2000}\.[\w-]{10,2000}\.[\w-]{1,2000})"  # JSON web tokens
    ),
)
MARK = re.compile(r"SECRET-([0-9a-f]{8})")


def redacted(value: Any) -> Any:
    """Return a text with marks in place of its secrets; of a list or a mapping, do so with all texts in it."""
    return redacted_value(value, secrets_of_environment())


def redacted_value(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return redacted_text(value, secrets)
    if isinstance(value, dict):
        return {redacted_value(name, secrets): redacted_value(each, secrets) for name, each in value.items()}
    return [redacted_value(each, secrets) for each in value] if isinstance(value, list | tuple) else value


def redacted_text(text: str, secrets: list[str]) -> str:
    for pattern in PATTERNS:
        text = pattern.sub(hidden, text)
    for secret in secrets:
        for form in {*forms(secret)}:
            text = text.replace(form, mark(secret)) if form in text else text
    return text


def secrets_of_environment() -> list[str]:
    """Return the secret values of environment variables, the longest first: one may be a part of another."""
    values = {value.strip() for name, value in os.environ.items() if NAMES.search(name)}
    return sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)


def forms(secret: str) -> Iterator[str]:
    """Yield a secret as texts quote it: as it is, in Python, JSON, YAML, HTML and URLs."""
    yield secret
    yield repr(secret)[1:-1]
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield secret.replace("'", "''")
    yield html.escape(secret)
    yield quote(secret, safe="")


def hidden(match: re.Match) -> str:
    """Return the match of a pattern with a mark in place of its secret."""
    text, start = match.string, match.start()
    secret = match[1] if MARK.fullmatch(match[1]) else mark(match[1])
    return text[start : match.start(1)] + secret + text[match.end(1) : match.end()]


@functools.cache
def mark(secret: str) -> str:
    """Return the mark of a secret. It is slow to make, so that a weak password is not easily guessed from it."""
    digest = hashlib.scrypt(secret.encode(errors="replace"), salt=b"irlfast", n=2**13, r=8, p=1, dklen=4)
    return f"SECRET-{digest.hex()}"


def restored(value: Any, original: Any) -> Any:
    """Return a redacted value with the secrets of ``original`` wherever they have the marks that it shows."""
    if isinstance(value, dict) and isinstance(original, dict):
        return {name: restored(each, original.get(name)) for name, each in value.items()}
    if isinstance(value, list) and isinstance(original, list) and len(value) == len(original):
        return [*map(restored, value, original)]
    both_texts = isinstance(value, str) and isinstance(original, str)
    return original if both_texts and hides(value, original) else value


def hides(text: str, original: str) -> bool:
    """Return whether a text is ``original`` with marks in place of secrets."""
    words, marks = MARK.split(text)[::2], MARK.findall(text)
    match = re.fullmatch("(.+?)".join(map(re.escape, words)), original, re.DOTALL)
    return match is not None and [mark(secret) for secret in match.groups()] == [f"SECRET-{each}" for each in marks]
