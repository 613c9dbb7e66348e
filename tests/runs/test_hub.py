"""The upload to the hub: tried before training, and private by default.

There is no hub here: the tests replace the three functions of huggingface_hub that reach it, or have a local server.
"""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.runs.hub import create_repository, upload
from irlfast.train import main
from tests.helpers.endpoint import failure, serving
from tests.helpers.runs import ROOT, command
from tests.helpers.tiers import full_then_slow

TOKEN = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"


def config_of(**keys):
    given = {"dataset_name": __file__, "model_name_or_path": ".", "push_to_hub": True, "hub_model_id": "me/policy"}
    return make_config(given | keys)


@pytest.fixture
def hub(monkeypatch):
    """A hub that records requests; its repositories are private or not, as ``private`` says."""
    requests = SimpleNamespace(created=[], uploaded=[], private=True)

    def create_repo(name, private, exist_ok):
        assert exist_ok
        requests.created.append((name, private))
        return SimpleNamespace(repo_id=name)

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "repo_info", lambda name: SimpleNamespace(private=requests.private))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **given: requests.uploaded.append(given))
    return requests


@pytest.mark.parametrize("private", [True, False])
def test_the_repository_is_private_by_default(hub, tmp_path, private):
    hub.private = private
    config = config_of(**({} if private else {"hub_private": False}))
    create_repository(config)
    assert hub.created == [("me/policy", private)]
    upload(config, tmp_path)
    assert hub.uploaded == [{"repo_id": "me/policy", "folder_path": tmp_path}]


def test_a_private_run_uploads_nothing_to_a_public_repository(hub):
    hub.private = False
    with pytest.raises(InputError, match="hub_model_id me/policy: found a public repository, expected a private one"):
        create_repository(config_of())


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (TOKEN, "irlfast: push_to_hub: me/policy cannot be written ("),
        ("", "irlfast: push_to_hub: found no token of the hub; expected HF_TOKEN, or `hf auth login` before\n"),
    ],
)
def test_an_unreachable_hub_or_a_missing_token_ends_the_run_before_it_starts(
    tmp_path, monkeypatch, capsys, token, said
):
    """HF_HUB_OFFLINE is set for all tests, so huggingface_hub refuses by itself."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    arguments = command(tmp_path / "run", push_to_hub="true", hub_model_id="me/policy")[1:]
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 2
    message = capsys.readouterr().err
    assert message.startswith(said) and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


CREATE = """
import sys
from irlfast.common.command import run_command
from irlfast.config import make_config
from irlfast.runs.hub import create_repository
keys = {"dataset_name": "README.md", "model_name_or_path": ".", "push_to_hub": True, "hub_model_id": "me/policy"}
sys.exit(run_command(lambda: create_repository(make_config(keys))))
"""


@pytest.mark.parametrize("status", full_then_slow([401, 403, 500]))
def test_a_hub_that_refuses_the_token_is_one_sentence_without_the_token(status):
    """huggingface_hub reads its address when it is imported, so that this is a process of its own."""
    with serving(lambda request: failure(status, f"Refused: {request['key']}")) as server:
        address = server.url.removesuffix("/v1")
        variables = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        ended = subprocess.run([sys.executable, "-c", CREATE], cwd=ROOT, env=variables, capture_output=True, text=True)
    asked = {request["path"]: request["key"] for request in server.requests}
    assert asked.pop("/api/repos/create") == f"Bearer {TOKEN}"
    assert asked.pop("/api/models/me/policy", f"Bearer {TOKEN}") == f"Bearer {TOKEN}"  # is it there already?
    assert not any(asked.values())  # where it is started by a program, huggingface_hub asks for a list of programs
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("irlfast: push_to_hub: me/policy cannot be written (")
    assert ended.stderr.count("\n") == 1
    assert TOKEN not in ended.stderr


@pytest.mark.parametrize(
    ("variable", "address"),
    [("HF_ENDPOINT", "huggingface.co"), ("WANDB_BASE_URL", "http://"), ("MLFLOW_TRACKING_URI", "https://a b")],
)
def test_a_servers_address_that_cannot_be_is_refused_at_the_start(monkeypatch, variable, address):
    monkeypatch.setenv(variable, address)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # of the trackers, which need not be installed
    with pytest.raises(InputError, match=f"^{variable}: found .*, expected an address such as"):
        config_of(report_to=["wandb", "mlflow"])


def test_mlflows_server_may_be_a_database(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    config_of(report_to=["mlflow"])


def test_a_failed_upload_says_where_the_policy_is(hub, tmp_path, monkeypatch):
    def fails(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "upload_folder", fails)
    with pytest.raises(InputError, match=r"its upload failed \(no route\); the same command tries again"):
        upload(config_of(), tmp_path)
