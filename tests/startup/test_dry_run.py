"""``--dry_run``: what it shows, what it measures, and what it says where it can do neither."""

import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import yaml

from irlfast.config import make_config
from irlfast.config.read import read_config
from irlfast.data.store import make_examples
from irlfast.engine.deepspeed_engine import check_deepspeed
from irlfast.runs.hub import TIMEOUT, set_offline_if_unreachable
from irlfast.startup.dry_run import measured_rates
from irlfast.startup.plan_memory import Room, most, training_memory
from irlfast.startup.sizes import Kept, Size
from tests.helpers.runs import ROOT, printed, settings
from tests.helpers.tiers import full


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


MACHINES = {  # recipes for a machine: its GPUs and their bytes; the policy's sizes
    "irft-7b-8xa100-40g.yaml": (8, 40e9, Size(7_241_732_096, 7_241_732_096, 32, 4096)),
    "irft-7b-8xh100.yaml": (8, 80e9, Size(7_241_732_096, 7_241_732_096, 32, 4096)),
    "irft-7b-qlora-24g.yaml": (1, 24e9, Size(7_241_732_096, 167_772_160, 32, 4096)),
    "irft-70b-qlora-4x8.yaml": (32, 80e9, Size(70_553_706_496, 828_375_040, 80, 8192)),
}
PUBLISHED = sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if "irlfast/demo" not in path.read_text())


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=full) if name in MACHINES else name for name in PUBLISHED])
def test_a_recipe_is_valid_and_names_what_needs_a_download(recipe):
    if "load_in_4bit" in (ROOT / "configs" / recipe).read_text():
        pytest.importorskip("bitsandbytes")
    out, err = dry(f"configs/{recipe}")
    assert "not checked: " in out
    assert "stage-00: " in out
    assert "Traceback" not in err


@pytest.mark.parametrize("recipe", MACHINES)
def test_the_estimate_of_a_recipe_for_a_machine_fits_its_gpus(monkeypatch, recipe):
    processes, room, size = MACHINES[recipe]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = read_config(yaml.safe_load((ROOT / "configs" / recipe).read_text()))
    kept = Kept(4e4, 8e5, 4e4) if size.layers == 80 else Kept(8e3, 3e5, 2e4)  # of recomputed layers
    needed = most(training_memory(config, size._replace(kept=kept), Room(room, processes, True, 2e9), 2048))
    assert 0.2 * room < needed < 0.9 * room


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "deepspeed").glob("*.json")))
def test_a_file_of_deepspeed_settings_that_comes_with_irlfast_is_valid_and_leaves_states_on_the_host(tmp_path, file):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    keys = {"dataset_name": str(rows), "model_name_or_path": "owner/name", "dtype": "bfloat16"}
    own, plain = (make_config(keys | more) for more in ({"deepspeed": str(file)}, {}))
    check_deepspeed(own)
    size, room = Size(10**9, 10**9, 10, 1000), Room(80e9, 1, on_gpu=True, runtime=0.0)
    held, kept = (most(training_memory(config, size, room, 100)) for config in (plain, own))
    assert held - kept >= 12e9  # fp32 weights, gradients, states


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
    rows = make_examples(memoryview(bytes(20)).cast("i"), np.array([3, 2, 0, 0], np.int32), np.zeros(1, np.int32))
    rates = measured_rates(config, None, rows, Size(parameters, parameters, 1, 1))
    assert rates.training > 0 and why in rates.source and rates.source.startswith("40% of a matrix product's")
