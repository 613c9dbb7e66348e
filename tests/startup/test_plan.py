"""``irlfast plan``: its figures by hand, its table in the docs, and its answers to wrong input."""

import json
import re

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.engine.hardware import GPUS, Cluster, peak_operations, read_cluster
from irlfast.engine.plan import Plan
from irlfast.startup.plan_memory import Room
from irlfast.startup.plan_run import plan_run, work_of
from irlfast.startup.plan_seconds import (
    DECODING_LAYER,
    Lengths,
    Rates,
    assumed_rates,
    bytes_sent,
    group_operations,
    load_seconds,
    sampling_seconds,
    split_scoring_seconds,
    step_seconds,
)
from irlfast.startup.sizes import Size, model_size
from tests.helpers.runs import ROOT, printed

GIVEN = {"dataset_name": "organisation/demonstrations", "max_train_samples": 1000, "dtype": "bfloat16"}
SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def keys(tmp_path):
    """Keys of a run with a small new model."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE))
    return GIVEN | {"config_name": str(path), "train_tokenizer": 300, "output_dir": str(tmp_path / "run")}


def plan(*given, code=0):
    return printed(["-m", "irlfast.plan", *given], code=code)


def as_options(keys):
    return [f"{name}={value}" for name, value in keys.items()]


def test_the_table_of_the_docs_is_what_the_command_prints():
    out, _ = plan("--table")
    assert out.strip() in (ROOT / "docs/scaling.md").read_text()


def test_a_plan_has_memory_by_part_time_by_phase_cost_and_disk(keys):
    out, _ = plan(*as_options(keys), "--gpus", "8xA100-80G", "--nodes", "2")
    for word in (
        "stage-00: ",
        "backward: ",
        "update: ",
        "weights",
        "optimiser state",
        "host memory while a checkpoint is written (async_save): ",
        "head buffer",
        "communication",
        "GPU-hours",
    ):
        assert word in out, word
    assert "16 processes" in out
    assert "stage-02: " in out and " at most, of which " in out
    assert "Traceback" not in out


def test_a_run_that_does_not_fit_ends_with_one_sentence(tmp_path, keys):
    large = SHAPE | {"hidden_size": 8192, "num_hidden_layers": 8, "intermediate_size": 28672}
    (tmp_path / "config.json").write_text(json.dumps(large))
    _, err = plan(*as_options(keys), "--gpus", "8xA100-40G", code=2)
    assert "does not fit: " in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("expected zero_stage: 2, with which it fits")


@pytest.mark.parametrize("gpus", ["H100-80G", "0xH100-80G", "8xH100", "8 x H100-80G", "8xRTX"])
def test_unknown_gpus_are_refused_with_those_that_are_known(gpus):
    with pytest.raises(InputError, match="expected a number and a GPU, as 8xH100-80G, of A100-40G, A100-80G, H100"):
        read_cluster(gpus, 1)
    assert read_cluster("8xH100-80G", 4).processes == 32


def test_the_peak_of_a_gpu_is_found_by_the_name_that_it_has():
    assert peak_operations("NVIDIA H100 80GB HBM3") == GPUS["H100-80G"].operations["bfloat16"]
    assert peak_operations("NVIDIA A100-SXM4-40GB") == GPUS["A100-40G"].operations["bfloat16"]
    assert peak_operations("AMD Instinct MI300X") is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_a_group_are_those_that_torch_counts(keys, checkpointing):
    import transformers

    from irlfast.data.packing import SHARED, pack, token_counts
    from irlfast.models.forward import hidden_states
    from irlfast.models.steady import recompute_layers
    from irlfast.startup.plan_seconds import group_of

    config = make_config(keys | {"gradient_checkpointing": checkpointing})
    size, lengths = model_size(config), Lengths(21.0, 13.0, 17.0)
    shape = transformers.LlamaConfig(**{name: value for name, value in SHAPE.items() if name != "model_type"})
    shape._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(shape)
    if checkpointing:
        recompute_layers(model, selective=False)
    group = group_of(lengths, 2)
    batch = pack([group._replace(prompt=[1] * 21)])
    with FlopCounterMode(display=False) as counter:
        rows = hidden_states(model, batch)[batch.rows]
        (rows @ model.lm_head.weight.T).sum().backward()
    masked = batch.input_ids.numel() ** 2 - token_counts([group], SHARED)["attended"]  # eager computes whole squares
    whole = group_operations(config, size, lengths, 2) + (16 if checkpointing else 12) * 3 * 64 * masked
    if checkpointing:  # torch does not compute the last product of a layer again
        whole -= 3 * 2 * 64 * 160 * batch.input_ids.numel()
    assert whole == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_bytes_sent_are_those_of_rings():
    size = Size(parameters=50, trained=20, layers=1, hidden=3, vocabulary=4)
    sent = {stage: bytes_sent(stage, 4, 3, size, 2, on_gpu=True) for stage in range(4)}
    head = 2 * 3 * 4  # gathered once in a step of three micro-batches
    with_zero_3 = 0.75 * (3 * (40 + 2 * (100 - head)) + head)
    assert sent == {0: 0.75 * 80, 1: 0.75 * 140, 2: 0.75 * (3 * 40 + 100), 3: with_zero_3}
    assert bytes_sent(3, 1, 3, size, 2, on_gpu=True) == 0
    assert bytes_sent(2, 4, 3, size, 2, on_gpu=False) == 0.75 * (2 * 40 + 100)


def test_a_split_model_is_gathered_for_each_pass_that_scores_and_for_each_token(keys):
    """Four processes score 64 groups of 8 tokens, 32 tokens a pass, and answer 16 prompts each, 4 tokens each."""
    size, room = Size(1000, 1000, 5, 10, 20, key_values=1), Room(80e9, 4, on_gpu=False, runtime=0.0)
    rates, lengths = Rates(1e9, 1e9, link=100.0, hooks=0.5), Lengths(4.0, 4.0, 4.0)
    gathered = 2 * 1000 * 0.75 / 100 + 5 * 0.5
    keys |= {"per_device_eval_batch_size": 16}
    configs = [make_config(keys | {"zero_stage": stage}) for stage in (2, 3)]
    scored = [split_scoring_seconds(each, size, room, rates, lengths, 64, 1, 32) for each in configs]
    assert scored == [0, pytest.approx(4 * gathered)]
    parts = make_config(keys | {"zero_stage": 3, "ds3_gather_for_generation": False})
    whole, split = (sampling_seconds(each, size, room, rates, lengths, 64, 1e9) for each in (configs[1], parts))
    assert split - whole == pytest.approx(4 * gathered)
    work = work_of(configs[0], None)._replace(held_out=0)
    two, three = (plan_run(each, model_size(each), room, rates, work).phases[-1].seconds for each in configs)
    assert three["scoring"] > two["scoring"]


def test_a_step_takes_its_operations_and_bytes_over_the_rates(keys):
    config = make_config(keys | {"zero_stage": 2})
    size, room = model_size(config), Room(80e9, 8, on_gpu=True, runtime=2e9)
    cluster = Cluster("H100-80G", 8, 1)
    rates, lengths = assumed_rates(cluster, config), Lengths(100.0, 50.0, 50.0)
    step = Plan(0, [np.arange(64)], 1e-6, "rmsprop")
    seconds = step_seconds(config, size, room, rates, lengths, step, 2, 1)
    assert seconds["forward and backward"] == 8 * group_operations(config, size, lengths, 2) / (0.4 * 989e12)
    assert seconds["communication"] == pytest.approx(7 / 8 * 4 * size.parameters / (0.7 * 450e9))
    assert assumed_rates(Cluster("H100-80G", 8, 2), config).link == 0.7 * 50e9


def test_a_gpu_waits_for_the_host_where_transformers_samples(keys):
    config = make_config(keys)
    size, room, lengths = model_size(config), Room(80e9, 1, on_gpu=True, runtime=2e9), Lengths(10.0, 5.0, 100.0)
    rates = assumed_rates(Cluster("H100-80G", 1, 1), config)
    batches = 3 * config.per_device_eval_batch_size
    slow = sampling_seconds(config, size, room, rates, lengths, batches, 60e9)
    assert slow == pytest.approx(3 * 100 * size.layers * DECODING_LAYER, rel=0.01)
    by_vllm = make_config(keys | {"use_vllm": True})
    assert sampling_seconds(by_vllm, size, room, rates, lengths, batches, 60e9) < slow / 10


ASYNC = {"use_vllm": True, "async_sampling": True, "vllm_server": ["http://node2:8000"], "stages": 2, "sft_steps": 1}


def summed_and_beside(keys, sampling, **more):
    """The phases of two plans by name: without ``async_sampling``, and with it. The first sets the rate of sampling."""
    plans = []
    for given in (keys | ASYNC | {"async_sampling": False}, keys | ASYNC | {"async_sampling_at": 0.65}):
        config = make_config(given | more)
        room, rates = Room(80e9, 8, on_gpu=True, runtime=0.0), Rates(1e12, 1e10, 1e9, sampling=sampling)
        plan = plan_run(config, model_size(config), room, rates, work_of(config, None))
        plans.append({phase.name: phase for phase in plan.phases})
    return plans


@pytest.mark.parametrize(("sampling", "waits"), [(1e-3, False), (1e3, True)])
def test_the_steps_after_the_early_policy_hide_that_much_of_the_sampling_of_the_next_stage(keys, sampling, waits):
    """The early policy is that of step 6, so that 4 of 10 steps come after it."""
    summed, beside = summed_and_beside(keys, sampling, inner_steps=10)
    assert beside["stage-00"] == summed["stage-00"]  # no stage trains before it
    before, own = summed["stage-01"].seconds, beside["stage-01"].seconds
    hidden = 4 * sum(summed["stage-00"].step.values()) if waits else before["sampling"]
    assert beside["stage-01"].beside == pytest.approx(hidden)
    assert own == before | {"sampling": pytest.approx(before["sampling"] - hidden)}
    assert (own["sampling"] > 0) == waits


def test_the_last_round_of_a_stage_hides_the_samples_of_the_next_reward_and_first_round(keys):
    rft = {"method": "rft", "align_rounds": 2, "num_generations": 2, "vllm_importance_sampling_correction": True}
    summed, beside = summed_and_beside(keys, 1.5e-3, inner_steps=10, **rft)
    hidden = {name: phase.beside for name, phase in beside.items() if phase.beside}
    assert [*hidden] == ["stage-01/reward", "stage-01/round-00"]
    assert sum(hidden.values()) == pytest.approx(4 * sum(summed["stage-00"].step.values()))
    for name, phase in beside.items():
        assert phase.seconds["sampling"] + phase.beside == pytest.approx(summed[name].seconds["sampling"])


def test_a_plan_says_what_is_sampled_beside_training_and_refuses_it_on_gpus_without_servers(keys):
    given = as_options(keys | {name: json.dumps(value) for name, value in ASYNC.items()})
    out, _ = plan(*given, "--gpus", "8xH100-80G")
    assert re.search(r"stage-01: .*\n.*\n    [\w. ]+ more of sampling, beside the training of the stage before\n", out)
    assert out.count("more of sampling") == 1
    assert "sampling: " not in out.split("memory\n")[1]  # the servers have memory of their own
    _, err = plan(*given, "vllm_server=[]", "--gpus", "8xH100-80G", code=2)
    assert err.splitlines()[-1].endswith("expected vllm_server: servers on other GPUs")
    out, _ = plan(*given, "vllm_server=[]", "--processes", "2")  # vLLM shares the cores with the training
    assert "more of sampling" not in out and "sampling" in out


def test_a_server_samples_as_one_engine_and_takes_no_time_to_start(keys):
    config = make_config(keys | ASYNC)
    size, room, lengths = model_size(config), Room(80e9, 4, on_gpu=True, runtime=0.0), Lengths(10.0, 5.0, 100.0)
    rates = assumed_rates(Cluster("H100-80G", 4, 1), config)
    own = make_config(keys | {"use_vllm": True})
    by_four, by_one = (sampling_seconds(each, size, room, rates, lengths, 40_960, 1e9) for each in (own, config))
    assert by_one == pytest.approx(4 * by_four, rel=0.01)
    started = load_seconds(own, size, rates)["sampler"] - load_seconds(config, size, rates)["sampler"]
    assert started == pytest.approx(60.0)


@pytest.mark.parametrize("method", ["irft", "spin", "rft", "sdft", "sft", "reward", "reasoning"])
def test_every_method_has_a_plan_and_more_gpus_never_train_longer(keys, method):
    thinks = {"num_generations": 4} if method == "reasoning" else {}
    config = make_config(keys | {"method": method, "stages": 1, "global_batch_size": 64} | thinks)
    size, work = model_size(config), work_of(config, None)
    trained = []
    for count in (1, 2, 4, 8):
        rates = assumed_rates(Cluster("H100-80G", count, 1), config)._replace(link=1e15)
        planned = plan_run(config, size, Room(80e9, count, on_gpu=True, runtime=2e9), rates, work)
        assert planned.phases and all(value >= 0 for phase in planned.phases for value in phase.seconds.values())
        trained.append(sum(phase.seconds["training"] for phase in planned.phases))
    assert trained == sorted(trained, reverse=True)
