"""The configuration: spellings, defaults, presets, and the sentence for each wrong value."""

import os
import subprocess
import sys

import pytest
import yaml

from irlfast.common import launch
from irlfast.common.files import InputError
from irlfast.config import Config, difference, dump, load_config, make_config
from irlfast.config.checks import remarks, unread_keys
from irlfast.config.read import RENAMED, read_config
from irlfast.config.recipes import recipes
from irlfast.config.schema import FIELDS


@pytest.fixture
def given(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text("{}\n")
    return {"dataset_name": str(file), "config_name": str(file), "train_tokenizer": 300}


def test_yaml_then_command_line_in_every_spelling(tmp_path, given):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(given | {"beta": 0.5, "stages": 2}) + "learning_rate: 5e-7\n")
    config, dry = load_config([str(file), "beta=0.25", "--seed", "3", "--top-p=0.9", "learning_rate=[1e-5, 1e-6]"])
    assert (config.beta, config.seed, config.top_p, config.stages, dry) == (0.25, 3, 0.9, 2, False)
    assert config.learning_rate == [1e-5, 1e-6]
    assert config.at("learning_rate", 1) == 1e-6
    assert config.at("beta", 1) == 0.25
    assert load_config([str(file), "--dry_run"])[1]
    assert load_config([str(file)])[0].learning_rate == 5e-7


def test_a_list_of_losses_is_a_mixture(given):
    assert make_config(given | {"loss_type": "ipo"}).loss_type == "ipo"
    words = ["loss_type=[sigmoid, bco_pair]", "loss_weights=[0.8, 0.2]", "method=spin"]
    config, _ = load_config([*(f"{name}={value}" for name, value in given.items()), *words])
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "bco_pair"], [0.8, 0.2])


def test_one_value_stands_for_a_list_of_one_and_none_for_an_empty_list(given):
    assert make_config(given | {"report_to": "none"}).report_to == []
    assert make_config(given | {"implicit_reward_policy": "gpt2"}).implicit_reward_policy == ["gpt2"]
    assert make_config(given | {"report_to": "tensorboard"}).report_to == ["tensorboard"]


def test_spin_is_irft_with_a_preset_that_keys_override(given):
    spin = make_config(given | {"method": "spin"})
    assert (spin.prompts_per_stage, spin.history, spin.loss_type, spin.reference) == ("all", 1, "sigmoid", "stage")
    assert make_config(given | {"method": "spin", "history": 0}).history == 0


def test_the_resolved_config_reads_back_as_itself(given):
    config = make_config(given | {"temperature": [1.0, 0.9, 0.8]})
    assert make_config(yaml.safe_load(dump(config))) == config


def test_defaults_that_follow_from_other_keys(given):
    assert make_config(given | {"method": "rft"}).divergence == "airl"
    assert make_config(given | {"method": "afd", "reward_loss": "fairl"}).divergence == "fairl"
    assert make_config(given | {"method": "afd", "divergence": "gail"}).reward_loss == "bce"
    assert make_config(given | {"method": "sft"}).sft_epochs == 1
    assert make_config(given | {"method": "sft", "sft_steps": 9}).sft_epochs is None
    psft = make_config(given | {"method": "sft", "sft_loss_type": "psft"})
    assert (psft.sync_ref_model, psft.ref_model_mixup_alpha, psft.ref_model_sync_steps) == (True, 1.0, 8)
    assert make_config(given | {"sft_steps": 9, "sft_loss_type": "psft", "ref_model_sync_steps": 4}).sync_ref_model


def test_save_steps_are_rounded_up_to_logged_steps_and_a_line_says_so(given, capsys):
    assert make_config(given | {"save_steps": 15, "logging_steps": 10}).save_steps == 20
    assert "save_steps: 15 is rounded up to 20, a multiple of logging_steps" in capsys.readouterr().err
    assert make_config(given | {"save_steps": 0, "logging_steps": 7}).save_steps == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_the_batch_of_a_step_is_the_same_number_in_either_spelling(given, processes, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": str(processes)}.items():
        monkeypatch.setenv(name, value)
    assert make_config(given | {"global_batch_size": 48}).global_batch_size == 48
    assert not capsys.readouterr().err
    spelling = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    config = make_config(given | spelling)
    assert config == make_config(given | {"global_batch_size": 6 * processes})
    said = "global_batch_size: per_device_train_batch_size 3 * gradient_accumulation_steps 2 * "
    assert f"{said}{processes} process{'es' * (processes > 1)} = {6 * processes}\n" in capsys.readouterr().err
    assert make_config(yaml.safe_load(dump(config))) == config  # config.yaml has one spelling
    assert make_config(given | {"per_device_train_batch_size": 3}).global_batch_size == 3 * processes
    alone = {"per_device_train_batch_size": 3, "num_processes": processes}  # without a launcher
    monkeypatch.delenv("RANK")
    assert make_config(given | alone).global_batch_size == 3 * processes


def test_what_becomes_of_a_key_is_said_by_the_command_and_not_again_by_the_processes_that_it_starts(
    given, monkeypatch, capsys
):
    keys = given | {"per_device_train_batch_size": 3, "num_processes": 2, "save_steps": 3, "logging_steps": 2}
    make_config(keys)
    said = capsys.readouterr().err
    assert said.startswith("global_batch_size: per_device_train_batch_size 3 * ") and "\nsave_steps: 3 is round" in said
    started = {}
    monkeypatch.setattr(launch.os, "execv", lambda *_: started.update(os.environ))
    monkeypatch.setattr(launch.os, "environ", os.environ.copy())
    launch.start_processes("irlfast.train", 2, 0.0)
    program = "from irlfast.common import launch; import os; print(launch.SAID, 'IRLFAST_SAID' in os.environ)"
    done = subprocess.run([sys.executable, "-c", program], env=started, capture_output=True, text=True, check=True)
    assert done.stdout == "yes False\n"
    monkeypatch.setattr(launch, "SAID", "yes")
    make_config(keys)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"global_batch_size": 64, "per_device_train_batch_size": 8},
            "global_batch_size and per_device_train_batch_size: found 64 and 8, expected one of the two spellings",
        ),
        (
            {"global_batch_size": 64, "gradient_accumulation_steps": 2},
            "global_batch_size and gradient_accumulation_steps: found 64 and 2, expected one of the two spellings",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps: found 2 without per_device_train_batch_size; expected both, or global_batch",
        ),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: found 0, expected greater than or equal to"),
    ],
)
def test_a_batch_of_two_spellings_or_of_half_a_one_is_refused(given, keys, sentence):
    with pytest.raises(InputError, match=f"^{sentence}"):
        make_config(given | keys)


def test_a_batch_smaller_than_the_number_of_processes_is_told(given, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert remarks(make_config(given | {"global_batch_size": 4})) == []
    [line] = remarks(make_config(given | {"global_batch_size": 3}))
    assert line == "global_batch_size: 3 in 4 processes, of which some have nothing to do in a step"


@pytest.mark.parametrize(
    ("keys", "unread"),
    [
        ({"distillation_alpha": 0.5, "thought_reward": "prob"}, ["distillation_alpha", "thought_reward"]),
        ({"method": "sdft", "distillation_alpha": 0.5, "loss_type": "hinge"}, ["loss_type"]),
        ({"method": "rft", "reward_heads": 2, "nll_weight": 0.1}, ["nll_weight"]),
        ({"method": "dpo", "loss_type": "hinge", "align": "ppo", "beta": 3}, ["align"]),
        ({"method": "sft", "history": 0}, []),
    ],
)
def test_keys_that_only_other_methods_read_are_named(given, keys, unread):
    assert unread_keys(make_config(given | keys)) == unread


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"method": "rft", "temperature": [1.0, 0.8, 1.0]}, ["temperature [1.0, 0.8, 1.0]: ", "align rloo is biased"]),
        (
            {"method": "afd", "align": "apa", "top_k": 5, "top_p": 0.9},
            ["top_p 0.9, top_k 5: ", "with top_p 1, top_k 0"],
        ),
        (
            {"method": "gad", "temperature": 0.8},
            ["temperature 0.8: ", "align grpo is biased; it is not with temperature 1"],
        ),
        ({"method": "reasoning", "temperature": 0.5}, ["temperature 0.5: ", "method reasoning is biased"]),
        ({"method": "rft", "align": "bon", "temperature": 0.8}, []),  # SFT on the best answers
        ({"method": "sdft", "temperature": 0.8}, []),  # its losses have the temperature
        ({"method": "irft", "temperature": 0.8}, []),
        ({"method": "rft", "temperature": 1}, []),
    ],
)
def test_a_gradient_that_is_biased_by_how_answers_are_drawn_is_told(given, keys, told):
    lines = remarks(make_config(given | keys))
    assert len(lines) == bool(told) and all(part in line for line in lines for part in told)


def test_every_key_of_every_recipe_is_read():
    for name, file in recipes().items():
        assert unread_keys(read_config(yaml.safe_load(file.read_text()))) == [], name


@pytest.mark.parametrize("spelling", RENAMED)
def test_an_earlier_spelling_is_refused_with_the_new_one(given, spelling):
    name, _, value = spelling.partition(": ")
    expected = f"^{name}: found (an|the) earlier spelling .*expected {RENAMED[spelling]}$"
    with pytest.raises(InputError, match=expected):
        make_config(given | {name: value or "true"})
    with pytest.raises(InputError, match=expected):
        load_config([f"{name}={value or 'true'}"])


def test_difference_names_keys_and_values():
    assert difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b: 2 -> 3"


WRONG = {
    "unknown key 'betta' .* did you mean beta": {"betta": 1},
    "method: found 'dpoo', expected": {"method": "dpoo"},
    "beta: found -1, expected greater than 0": {"beta": -1},
    "learning_rate: found 'fast', expected a valid number": {"learning_rate": "fast"},
    "stages: found 0": {"stages": 0},
    "inner_epochs and inner_steps": {"inner_epochs": 1, "inner_steps": 2},
    r"beta: found 2 values, expected one or one per stage \(3\)": {"beta": [1, 2]},
    "loss_type: found 'dpo', expected 'sigmoid', .* or": {"loss_type": "dpo"},
    "loss_type: found an empty list": {"loss_type": []},
    "loss_weights: found 1 numbers, expected one per loss of loss_type": {
        "loss_type": ["sigmoid", "ipo"],
        "loss_weights": [1.0],
    },
    "label_smoothing: found 0.1, which loss_type sigmoid does not use": {"label_smoothing": 0.1},
    "label_smoothing: found 0, expected more than 0 with loss_type exo_pair": {"loss_type": ["hinge", "exo_pair"]},
    "dataset_name: found nothing": {"dataset_name": None},
    "dataset_name: no such file or folder": {"dataset_name": "/no/such.jsonl"},
    "model_name_or_path: no such file or folder": {
        "model_name_or_path": "./gone",
        "config_name": None,
        "train_tokenizer": None,
    },
    "expected exactly one of them": {"model_name_or_path": "gpt2"},
    "prompt_template: expected": {"prompt_template": "no place"},
    "max_prompt_length: found 99": {"max_prompt_length": 99, "max_length": 99},
    "zero_stage: found 0 with dtype bfloat16": {"dtype": "bfloat16", "zero_stage": 0},
    "ds3_gather_for_generation: found false with zero_stage 1, which splits no": {"ds3_gather_for_generation": False},
    "ds3_gather_for_generation: found false with use_vllm, whose engines split": {
        "ds3_gather_for_generation": False,
        "zero_stage": 3,
        "use_vllm": True,
    },
    "divergence: found 'gail' with reward_loss bradley_terry": {"method": "rft", "divergence": "gail"},
    "prompt_dataset_name: found .* with method irft, which needs a demonstration for every prompt": {
        "prompt_dataset_name": __file__
    },
    "reward_backbone: found .* but the run learns no reward": {"reward_backbone": "gpt2"},
    "reward_models: found 2 with method reward, which leaves one model": {"method": "reward", "reward_models": 2},
    "reward_level: found 'token' with reward_loss gaussian": {
        "reward_loss": "gaussian",
        "reward_level": "token",
    },
    "reward_every: found 'round' with reward_data init_demo": {"reward_every": "round", "reward_data": "init_demo"},
    "history: found 1 with reward_every 'round', expected 0": {"reward_every": "round", "history": 1},
    "history: found 1 with method dpo, which samples none": {"method": "dpo", "history": 1},
    "history: found 1 with reward_data preference, whose": {"method": "rft", "reward_data": "preference", "history": 1},
    "history: found 2 with reward_data init_sft, whose": {
        "method": "rft",
        "reward_data": "init_sft",
        "sft_steps": 1,
        "history": 2,
    },
    "implicit_reward_reference: found 1, expected none or one per": {"implicit_reward_reference": "gpt2"},
    "found 'a,b', expected one model; for an implicit reward, implicit_reward_policy: a and": {
        "reward_model_name_or_path": "a,b"
    },
    "sft_steps: found 0 with method sft": {"method": "sft", "sft_steps": 0},
    "sft_loss_type: found dft without SFT; expected sft_epochs or sft_steps": {"sft_loss_type": "dft"},
    "sft_nll_steps: found 9 without SFT": {"sft_nll_steps": 9},
    "sft_kl_weight: found 0.5, which sft_loss_type dft does not use": {
        "sft_steps": 1,
        "sft_loss_type": "dft",
        "sft_kl_weight": 0.5,
    },
    "sft_loss_type: found 'psft' with method sdft": {"method": "sdft", "sft_steps": 1, "sft_loss_type": "psft"},
    "zero_stage: found 3 with a teacher, which is a whole": {"sft_steps": 1, "sft_loss_type": "asft", "zero_stage": 3},
    "method sft takes sft_steps": {"method": "sft", "inner_steps": 3},
    "gradient_checkpointing: found 'x', expected a valid boolean.* or 'selective'": {"gradient_checkpointing": "x"},
    "activation_offloading: found true with gradient_checkpointing 'selective'": {
        "activation_offloading": True,
        "gradient_checkpointing": "selective",
    },
    "activation_offloading: found true with torch_compile": {"activation_offloading": True, "torch_compile": True},
    "activation_offloading: found true with zero_stage 3": {"activation_offloading": True, "zero_stage": 3},
    "reward_combine: found 'min' with one head": {"method": "rft", "reward_combine": "min"},
    "implicit_reward_reference: found 'sft-nll', a policy of the run itself, without sft_nll_steps": {
        "method": "rft",
        "implicit_reward_policy": "initial",
        "implicit_reward_reference": "sft-nll",
    },
    "reward_credit: found 'token' with align apa": {"method": "rft", "align": "apa", "reward_credit": "token"},
    "reward_credit: found 'token' with reward_combine 'min'": {
        "method": "rft",
        "reward_heads": 2,
        "reward_combine": "min",
        "reward_credit": "token",
    },
    "gamma: found 0.9 with reward_credit 'sequence'": {"method": "rft", "gamma": 0.9},
    "kl_in: found 'reward' with align bon; expected it left out": {"method": "rft", "align": "bon", "kl_in": "reward"},
    "kl_in: found 'reward' with reference 'stage' and align_rounds 1": {"method": "rft", "kl_in": "reward"},
    "sync_ref_model: found true with method irft, which has no teacher": {"sync_ref_model": True},
    "zero_stage: found 3 with a teacher": {"method": "sdft", "zero_stage": 3},
    "distillation_alpha: found 0.5 with distillation_mode sampled_token": {
        "method": "sdft",
        "distillation_mode": "sampled_token",
        "distillation_alpha": 0.5,
    },
    "temperature: found 0, which leaves policy and teacher no": {"method": "sdft", "temperature": 0},
    "teacher_prompt_template: found '{prompt} {x}', expected": {
        "method": "sdft",
        "teacher_prompt_template": "{prompt} {x}",
    },
    "load_in_4bit: found true without use_peft": {"load_in_4bit": True},
    "load_in_4bit: found true with zero_stage 3": {"load_in_4bit": True, "use_peft": True, "zero_stage": 3},
    "bnb_4bit_quant_type: found 'int4', expected 'nf4' or 'fp4'": {"bnb_4bit_quant_type": "int4"},
    "a new model needs a tokenizer; expected tokenizer_name_or_path": {"train_tokenizer": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_values_are_named(given, message):
    with pytest.raises(InputError, match=message):
        make_config(given | WRONG[message])


def test_torch_compile_without_a_compiler_is_refused(given, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(InputError, match=r"torch_compile: found no compiler /nowhere/c\+\+, expected one"):
        make_config(given | {"torch_compile": True})


def test_4_bits_without_bitsandbytes_are_refused(given, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="bitsandbytes is not installed; pip install"):
        make_config(given | {"load_in_4bit": True, "use_peft": True})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\xff"])
def test_a_configuration_file_without_keys_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"bad.yaml"):
        load_config([str(tmp_path / "bad.yaml")])


def test_an_unknown_key_on_the_command_line_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="unknown key 'learning_rat' on the command line; did you mean learning_rate"):
        load_config(["--learning-rat", "3"])


def test_help_lists_every_key_quickly():
    """Nothing heavy is imported before the configuration is known to be good."""
    code = (
        "import sys; sys.argv = ['train', '--help']\n"
        "from irlfast.train import main\n"
        "try: main()\n"
        "finally: print('HEAVY', [m for m in ('torch', 'transformers', 'deepspeed', 'datasets') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in shown
    for name in FIELDS:
        assert f"--{name} " in shown


def test_every_key_is_described():
    assert all(field.description for field in Config.__pydantic_fields__.values())
