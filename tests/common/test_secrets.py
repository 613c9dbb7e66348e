"""No secret is in a message, a record, a page or a tracker of a run, and a run with secrets works as any other."""

import html
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.common.command import run_command
from irlfast.common.files import InputError
from irlfast.common.messages import log
from irlfast.common.printable import printable
from irlfast.common.secrets import MARK, hides, redacted, restored
from irlfast.config import Config, load_config, make_config
from irlfast.runs.output import check_config
from tests.helpers import runs
from tests.helpers.tiers import full

QUOTED = {
    "as it is": str,
    "Python": repr,
    "JSON": json.dumps,
    "JSON in Unicode": lambda text: json.dumps(text, ensure_ascii=False),
    "YAML": lambda text: yaml.safe_dump({"key": [text]}, allow_unicode=True, width=10**6),
    "HTML": html.escape,
    "URL": lambda text: quote(text, safe=""),
    "an error": lambda text: str(InputError(f"key: found {text!r}, expected another")),
    "a terminal": printable,
}
PLAIN = (str, lambda text: repr(text)[1:-1], lambda text: json.dumps(text)[1:-1], html.escape, quote)
VARIABLES = ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "PGPASSWORD", "My_Secrets")
printable_texts = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, categories="LNPS"), min_size=8)
letters = st.text("ABCDEFGHJKMNPQRSTUVWXYZabcdefghjkmnpqrstuvwxyz23456789", min_size=36, max_size=48)
tokens = st.builds("".join, st.tuples(st.sampled_from(["hf_", "sk-", "sk-proj-", "ghp_", "github_pat_"]), letters))


def with_variable(name: str, value: str):
    patch = pytest.MonkeyPatch()
    patch.setenv(name, value)
    return patch


@settings(max_examples=25, deadline=None)
@given(secret=printable_texts, name=st.sampled_from(VARIABLES), quoted=st.sampled_from([*QUOTED]), around=st.text())
def test_a_variables_value_is_in_no_text_whoever_quotes_it(secret, name, quoted, around):
    patch = with_variable(name, secret)
    try:
        shown = redacted(QUOTED[quoted](f"{around}{secret}"))
        assert MARK.search(shown)
        assert not [form for form in PLAIN if form(secret) in shown]
        assert redacted(shown) == shown
    finally:
        patch.undo()


@settings(max_examples=8, deadline=None)
@given(secret=letters, token=tokens)
def test_passwords_and_signatures_of_urls_and_well_known_tokens_are_hidden(secret, token):
    for text in (
        f"http://user:{secret}@host:80/v1 is down",
        f"git+https://{secret}@host/x.git",
        f"https://host/file?a=1&X-Amz-Signature={secret}&b=2",
        f"https://host/?access_token={secret}#part",
        f"Authorization: Bearer {secret}",
        f"key={token}",
        f"/models/{token}/policy",
        f"-----BEGIN RSA PRIVATE KEY-----\n{secret}\n-----END RSA PRIVATE KEY-----",
    ):
        shown = redacted({"key": [text, {"inner": text}]})
        assert secret not in str(shown) and token not in str(shown)
        assert hides(shown["key"][0], text)
        assert restored(shown, {"key": [text, {"inner": text}]}) == {"key": [text, {"inner": text}]}
        assert restored(shown, {"key": [text.swapcase(), {"inner": ""}]}) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8000/v1?a=1&b=2#c",
        "me@host, or user@example.com",
        "runs/sk-learn-experiments-on-tokens",
        "the token of a key is its secret: key=value, token = 3",
        "tokenizer_name_or_path: hf_internal/tiny, learning_rate: 1.0e-07",
        "a Basic Law, a Bearer of news",
        "0123456789abcdef0123456789abcdef01234567",
        "SECRET-1a2b3c4d",
    ],
)
def test_ordinary_text_stays_as_it_is(text):
    assert redacted(text) == text


def test_other_variables_and_short_values_are_no_secrets(monkeypatch):
    for name in ("TOKENIZERS_PARALLELISM", "PWD", "OLDPWD", "SSH_AUTH_SOCK", "KEYBOARD", "PASSENGERS"):
        monkeypatch.setenv(name, "an ordinary value")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert redacted("none of an ordinary value") == "none of an ordinary value"


@pytest.mark.parametrize(
    "part", ["a", "a:", "://a", "&key", "&key=a;", "eyJa.", "eyJaaaaaaaaaaaa.", "sk-", "hf_a", "Bearer "]
)
def test_no_text_takes_long(part):
    begun = time.monotonic()
    redacted(part * 50_000)
    redacted("-----BEGIN PRIVATE KEY-----" * 300)
    assert time.monotonic() - begun < 2


def test_a_message_an_error_and_a_traceback_show_no_secret(monkeypatch, capsys):
    secret = "a'quoted\\secret"
    monkeypatch.setenv("SERVICE_PASSWORD", secret)

    def refuse():
        raise InputError(f"key: found {secret!r}")

    def fail():
        raise RuntimeError(f"http://user:{secret}@host refused {secret!r}")

    assert (run_command(refuse), run_command(fail)) == (2, 1)
    log(f"the key {secret}")
    shown = capsys.readouterr().err
    assert "quoted" not in shown
    assert shown.count("SECRET-") >= 4 and "Traceback" in shown and "in fail\n" in shown


def test_a_cut_message_has_no_part_of_a_secret(monkeypatch):
    secret = "0123456789" * 4
    monkeypatch.setenv("SERVICE_TOKEN", secret)
    for start in range(980, 1010, 3):
        assert "34567" not in str(InputError("x" * start + secret + "y" * 2000))


@pytest.mark.parametrize("key", ["system_prompt", "prompt_template", "thought_mark", "chat_template_kwargs"])
def test_a_text_that_the_model_learns_is_refused_with_a_secret_in_it(monkeypatch, key):
    monkeypatch.setenv("SERVICE_TOKEN", "open-sesame")
    value = {"inner": "open-sesame"} if key == "chat_template_kwargs" else "{} open-sesame"
    with pytest.raises(InputError, match=f"^{key}: found a secret in a text that the model learns") as raised:
        make_config({"dataset_name": __file__, "model_name_or_path": ".", key: value})
    assert "sesame" not in str(raised.value)


# ---------------------------------------------------------------- a real run


def files_with(folder: Path, secrets: dict[str, str]) -> list[tuple[str, str]]:
    contents = [(path, path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
    return [
        (name, str(path)) for path, content in contents for name, text in secrets.items() if text.encode() in content
    ]


def drawn_secrets(seed: int) -> dict[str, str]:
    draw = random.Random(seed)
    letters = "abcdefghjkmnpqrstuvwxyzABCDEFGHJKMNPQRSTUVWXYZ23456789"

    def text(length: int, among: str = letters) -> str:
        return "".join(draw.choices(among, k=length))

    return {
        "HF_TOKEN": f"hf_{text(34)}",
        "OPENAI_API_KEY": f"sk-proj-{text(40)}",
        "SERVICE_PASSWORD": text(16, letters + "'\"\\&<>%$: ") + text(1),
        "url": f"{text(10)}",
        "signature": text(24),
        "project": f"ghp_{text(36)}",
        "file": f"glpat-{text(20)}",
    }


@full
@pytest.mark.parametrize("seed", [0])
def test_a_run_with_secrets_in_its_keys_and_its_environment_shows_and_keeps_none(tmp_path, monkeypatch, capsys, seed):
    secrets = drawn_secrets(seed)
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "SERVICE_PASSWORD"):
        monkeypatch.setenv(name, secrets[name])
    rows = tmp_path / f"rows-{secrets['file']}.jsonl"
    rows.symlink_to(runs.ROOT / "irlfast/demo/train.jsonl")
    keys = {
        "dataset_name": str(rows),
        "run_name": f"https://me:{secrets['url']}@host/?sig={secrets['signature']} {secrets['SERVICE_PASSWORD']}",
        "project": f"{secrets['project']} {secrets['OPENAI_API_KEY']}",
        "hub_model_id": f"me/{secrets['HF_TOKEN']}",
        "report_to": "tensorboard",
        "sft_steps": 2,
        "stages": 1,
        "inner_steps": 1,
        "max_train_samples": 16,
        "max_eval_samples": 8,
    }
    with files_in(tmp_path / "temporary", monkeypatch) as seen:
        out, err = runs.run(tmp_path / "run", runs.PYTHON, **keys)
    assert not [(path, oct(mode)) for path, mode in seen.items() if mode & 0o077]
    assert not [*(tmp_path / "temporary").iterdir()]
    kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in kept if path.stat().st_mode & 0o044 != 0o044]
    assert not [name for name, text in secrets.items() if text in out + err]
    assert not files_with(tmp_path / "run", secrets)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    mark = r"SECRET-[0-9a-f]{8}"
    assert re.fullmatch(rf"https://{mark}@host/\?sig={mark} {mark}", config["run_name"])
    for name in ("report.html", "final/README.md", "starts.jsonl"):
        assert MARK.search((tmp_path / "run" / name).read_text())

    monkeypatch.delenv("SERVICE_PASSWORD")  # marks compare, whatever the environment has
    capsys.readouterr()
    check_config(tmp_path / "run", config_of(tmp_path / "run", keys))
    assert not capsys.readouterr().err
    other = rows.with_name(f"rows-{secrets['file'][::-1]}.jsonl")
    other.symlink_to(rows)
    with pytest.raises(InputError, match="its run has another configuration") as raised:
        check_config(tmp_path / "run", config_of(tmp_path / "run", keys | {"dataset_name": str(other)}))
    assert secrets["file"] not in str(raised.value)


@contextmanager
def files_in(folder: Path, monkeypatch) -> Iterator[dict[str, int]]:
    """The modes of all that comes into a new folder for temporary files in this block, whose umask hides nothing."""
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    seen: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            with suppress(OSError):  # it is gone already
                seen.update((entry.path, entry.stat().st_mode) for entry in os.scandir(folder))

    watching, before = threading.Thread(target=watch), os.umask(0)
    watching.start()
    try:
        yield seen
    finally:
        done.set()
        watching.join()
        os.umask(before)


def config_of(output: Path, keys: dict) -> Config:
    return load_config(runs.settings(output, **keys))[0]
