"""Configurations that no one should write: each is refused by its key (tests/fuzz has drawn ones)."""

import json
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.common.yaml_text import parse_yaml
from irlfast.config import load_config, make_config
from irlfast.config.schema import FIELDS
from irlfast.engine.deepspeed_engine import check_deepspeed
from tests.fuzz.guards import refusal
from tests.fuzz.inputs import values

LONG = "1" * 5000
BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return the keys that every configuration needs, and a folder."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "some.jsonl").write_text("{}\n")
    file = str(folder / "some.jsonl")
    return {"dataset_name": file, "config_name": file, "train_tokenizer": 300}, folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_number_is_finite(start, value):
    assert [name for name in FIELDS if not refusal(make_config, start[0] | {name: value})] == []


@pytest.mark.parametrize("name", ["seed", "inner_steps", "sft_epochs", "learning_rate", "length_penalty", "max_length"])
@pytest.mark.parametrize("value", [2**31, 10**12, 10**400], ids=["2^31", "10^12", "10^400"])
def test_numbers_beyond_all_use_are_refused_by_their_key(start, name, value):
    assert refusal(make_config, start[0] | {name: value}).startswith(f"{name}: found")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("beta: 1\nbeta: 2\n", "the key 'beta' comes twice at line 2"),
        ("columns: {prompt: a, prompt: b}\n", "the key 'prompt' comes twice"),
        (BOMB, "a reference to a list or a mapping"),
        ("[" * 20_000, "recursion"),
        ("seed: " + "1" * 6000, "digits"),
        ("seed: 2001-99-99", "month must be in 1..12"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("1: 2\n", "found the key 1, expected the name of a key"),
    ],
)
def test_yaml_that_is_ambiguous_or_grows_is_refused(tmp_path, text, reason):
    (tmp_path / "run.yaml").write_text(text)
    message = refusal(load_config, [str(tmp_path / "run.yaml")])
    assert message.startswith("config file") and reason in message


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=5), values, max_size=4))
def test_what_pyyaml_writes_is_read_back(value):
    try:
        text = yaml.safe_dump(value, allow_unicode=True)
        expected = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):  # a number of 5,000 digits, half a surrogate pair
        return
    assert repr(parse_yaml(text)) == repr(expected)


@pytest.mark.parametrize(("name", "value"), [("zero_optimization", LONG), ("gradient_clipping", LONG), (LONG, 1)])
def test_a_long_value_of_a_deepspeed_file_leaves_the_message_short(start, name, value):
    file = start[1] / "deepspeed.json"
    file.write_text(f'{{"{name}": {json.dumps(value)}, "{name}": 1}}' if name == LONG else json.dumps({name: value}))
    message = refusal(lambda: check_deepspeed(make_config(start[0] | {"deepspeed": str(file)})))
    assert message.startswith("deepspeed: ") and len(message) < 600


@pytest.mark.parametrize(
    ("settings_text", "reason"),
    [
        ('{"optimizer": {"type": "AdamW"}}', "has optimizer; expected the keys optim, learning_rate"),
        (
            '{"gradient_accumulation_steps": 4}',
            "has gradient_accumulation_steps: 4, and global_batch_size is 8",
        ),
        ('{"train_micro_batch_size_per_gpu": 4}', "per_gpu: 4, and global_batch_size is 8 in 1 process;"),
        (
            '{"train_batch_size": 64}',
            "has train_batch_size: 64, and global_batch_size is 8",
        ),
        ('{"zero_optimization": {"stage": true}}', "zero_optimization.stage: True, expected 0 to 3"),
        ('{"data_types": {"grad_accum_dtype": "bf16"}}', "grad_accum_dtype: 'bf16', expected fp32"),
        ('{"fp16": {"enabled": true}}', "has fp16; expected the keys dtype"),
        ('{"bf16": {"enabled": true}}', "bf16.enabled: True, and dtype: bfloat16 is False"),
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {}}', "'zero_optimization' comes 2 times"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "moon"}}}', "'none', 'cpu' or 'nvme'"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}', "where no checkpoint has the optimiser's"),
        ('{"zero_optimization": {"offload_optimizer": "nvme"}}', "DeepSpeed"),
        ('{"gradient_clipping": "much"}', "expected a number from 0 on"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "holds a list, expected a JSON object"),
    ],
)
def test_a_deepspeed_file_that_another_key_contradicts_is_refused(start, settings_text, reason):
    file = start[1] / "own.json"
    file.write_text(settings_text)
    message = refusal(lambda: check_deepspeed(make_config(start[0] | {"deepspeed": str(file)})))
    assert message.startswith("deepspeed: ") and reason in message


@pytest.mark.parametrize(
    ("stage", "keys", "reason"),
    [
        (3, {"method": "sdft"}, "zero_stage: found 3 with a teacher"),
        (3, {"activation_offloading": True}, "activation_offloading: found true with zero_stage 3"),
        (3, {"use_peft": True, "load_in_4bit": True}, "load_in_4bit: found true with zero_stage 3"),
        (0, {"dtype": "bfloat16"}, "zero_stage: found 0 with dtype bfloat16"),
        (2, {"zero_stage": 0}, "zero_optimization.stage: 2, and zero_stage is 0; expected the same, or no zero_stage"),
    ],
)
def test_every_check_reads_the_zero_stage_of_the_deepspeed_file(start, stage, keys, reason):
    file = start[1] / "stage.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    assert reason in refusal(lambda: make_config(start[0] | keys | {"deepspeed": str(file)}))


def test_a_run_clips_as_its_deepspeed_file_says_at_every_zero_stage(start):
    from irlfast.config.deepspeed import merged_settings
    from irlfast.engine.deepspeed_engine import deepspeed_settings

    file = start[1] / "clipping.json"
    for stage in range(4):
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": 2.5}))
        config = make_config(start[0] | {"deepspeed": str(file)})
        assert merged_settings(config)["gradient_clipping"] == 2.5
        assert deepspeed_settings(config)["gradient_clipping"] == (2.5 if stage else 0.0)  # train_step clips at stage 0


def test_sizes_of_a_deepspeed_file_that_are_those_of_the_run_are_accepted(start):
    file = start[1] / "sizes.json"
    sizes = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4}
    file.write_text(json.dumps(sizes))
    check_deepspeed(make_config(start[0] | {"deepspeed": str(file), "global_batch_size": 32}))


@pytest.mark.parametrize("launcher", [{}, {"RANK": "0", "WORLD_SIZE": "2"}], ids=["irlfast alone", "torchrun"])
def test_sizes_of_a_deepspeed_file_are_those_of_all_processes_even_where_the_command_starts_them_later(
    start, monkeypatch, launcher
):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    file = start[1] / "sizes.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}))
    keys = start[0] | {"deepspeed": str(file), "num_processes": 2}
    assert make_config(keys | {"global_batch_size": 8}).global_batch_size == 8
    said = refusal(lambda: make_config(keys | {"global_batch_size": 4}))
    assert "gradient_accumulation_steps: 2, and global_batch_size is 4 in 2 processes; expected both sizes" in said


def test_auto_in_a_deepspeed_file_is_filled_in_as_by_trainer(start):
    from irlfast.engine.deepspeed_engine import deepspeed_settings

    file = start[1] / "auto.json"
    names = "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer"
    by_size = "reduce_bucket_size stage3_prefetch_bucket_size stage3_param_persistence_threshold"
    auto = dict.fromkeys(names.split(), "auto") | {
        "zero_optimization": {"stage": 3, "overlap_comm": True} | dict.fromkeys(by_size.split(), "auto"),
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    }
    file.write_text(json.dumps(auto))
    config = make_config(start[0] | {"deepspeed": str(file), "max_grad_norm": 0.7})
    check_deepspeed(config)
    merged = deepspeed_settings(config, hidden_size=100)
    plain = deepspeed_settings(make_config(start[0] | {"max_grad_norm": 0.7}))
    assert merged["gradient_clipping"] == 0.7 and merged["bf16"] == plain["bf16"]
    assert not {"optimizer", "fp16", "train_batch_size"} & merged.keys()
    assert [merged["zero_optimization"][name] for name in by_size.split()] == [10_000, 9_000, 1_000]
    assert merged["zero_optimization"]["overlap_comm"] is True
    assert by_size.split()[0] not in deepspeed_settings(config)["zero_optimization"]  # DeepSpeed's own default
