"""The upload to the hub: tried before training, private by default, with a card that the hub accepts.

There is no hub here: the tests replace the three functions of huggingface_hub that reach it.
"""

import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.reports.final import model_card, reward_card
from irlfast.runs.hub import create_repository, upload
from irlfast.train import main
from tests.helpers.runs import ROOT, command

METRICS = {"phase": "sft", "exact_match": 0.5, "reward_accuracy": None, "nll": 2.0, "answer_length": 3.0}


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


def test_an_unreachable_hub_ends_the_run_before_it_starts(tmp_path, monkeypatch, capsys):
    """HF_HUB_OFFLINE is set for all tests, so huggingface_hub refuses by itself."""
    monkeypatch.chdir(ROOT)
    arguments = command(tmp_path / "run", push_to_hub="true", hub_model_id="me/policy")[1:]
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 2
    message = capsys.readouterr().err
    assert message.startswith("irlfast: push_to_hub: me/policy cannot be written (") and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_failed_upload_says_where_the_policy_is(hub, tmp_path, monkeypatch):
    def fails(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "upload_folder", fails)
    with pytest.raises(InputError, match=r"its upload failed \(no route\); the same command tries again"):
        upload(config_of(), tmp_path)


@pytest.mark.parametrize(
    ("model", "base"),
    [(".", None), ("owner/model", "owner/model"), ("gpt2", "gpt2"), (str(ROOT), None), ("a: b", None)],
)
@pytest.mark.parametrize(("dataset", "listed"), [(__file__, None), ("owner/rows", ["owner/rows"]), ("x" * 99, None)])
def test_the_cards_metadata_names_only_what_can_be_on_the_hub(model, base, dataset, listed):
    config = config_of(model_name_or_path=model, dataset_name=dataset)
    policy = ModelCard(model_card(config, "sft", "the last", [METRICS])).data
    reward = ModelCard(reward_card(config, {"phase": "reward", "reward_accuracy": 0.5})).data
    for data, task in ((policy, "text-generation"), (reward, "text-classification")):
        assert (data.base_model, data.datasets, data.pipeline_tag) == (base, listed, task)
        assert data.library_name == "transformers" and "irlfast" in data.tags
        for name in filter(None, [data.base_model, *(data.datasets or [])]):
            validate_repo_id(name)
