"""``--dry_run``: what it shows, what it measures, and what it says where it can do neither."""

import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from irlfast.config import make_config
from irlfast.data.store import Example
from irlfast.runs.hub import TIMEOUT, set_offline_if_unreachable
from irlfast.startup.dry_run import Size, rate_of
from tests.helpers.runs import ROOT, printed, settings


def dry(*given: str, code: int = 0) -> tuple[str, str]:
    return printed(["-m", "irlfast.train", *given, "--dry_run"], code=code)


def test_the_default_shows_examples_with_the_mask_steps_memory_and_time(tmp_path):
    out, _ = dry("configs/irft.yaml", f"output_dir={tmp_path / 'run'}")
    assert out.count("⟦") == 4  # the legend and three examples
    assert out.count("<|endoftext|>⟧") == 3  # the end token is learnt
    assert "prompt tokens + " in out
    for phase in ("sft", "stage-00", "stage-01", "stage-02"):
        assert f"{phase}: " in out
    assert "optimiser steps" in out
    assert "GiB per device" in out
    assert "measured on a step of SFT of this model" in out
    assert not (tmp_path / "run").exists()


PUBLISHED = sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if "irlfast/demo" not in path.read_text())


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_is_valid_and_names_what_needs_a_download(recipe):
    out, err = dry(f"configs/{recipe}")
    assert "not checked: " in out
    assert "stage-00: " in out
    assert "40% of a matrix product's" in out
    assert "Traceback" not in err


def test_bad_data_ends_a_dry_run(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"head": 1}\n')
    _, err = dry(*settings(tmp_path / "run", dataset_name=rows), code=2)
    assert "rows.jsonl, line 1: found columns head" in err


def test_a_dry_run_does_not_wait_for_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes calls, and says nothing
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        set_offline_if_unreachable()
        assert time.monotonic() - begun < 2 * TIMEOUT
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_hub_that_answers_is_used(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as hub:  # 501, which is an answer
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        threading.Thread(target=hub.handle_request, daemon=True).start()
        set_offline_if_unreachable()
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize(
    ("keys", "parameters", "why"),
    [
        ({"model_name_or_path": "nobody/nothing"}, 10, "the model's weights are not here"),
        ({"model_name_or_path": "."}, 10**15, "the model does not fit into"),
    ],
)
def test_the_reason_is_shown_where_no_step_can_be_measured(keys, parameters, why):
    config = make_config({"dataset_name": __file__, **keys})
    rows = [Example(memoryview(b"abc"), memoryview(b"de"))]
    rate, how = rate_of(config, None, rows, Size(parameters, 1, 1))
    assert rate > 0 and why in how and how.startswith("40% of a matrix product's")
