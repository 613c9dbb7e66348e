"""The folder of a run: which changes of the configuration it takes, which it refuses, and one run at a time."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from irlfast.common.artefacts import MANIFEST, keep_text
from irlfast.common.files import InputError
from irlfast.config import dump, make_config
from irlfast.config.checks import PER_STAGE
from irlfast.config.schema import FIELDS
from irlfast.evaluation.models import policies_of
from irlfast.runs.lock import LOCKS, lock, release
from irlfast.runs.output import MAY_CHANGE, RATES, check_output, differences
from irlfast.startup.inputs import keep_inputs, read_inputs
from tests.helpers.runs import ROOT, contents, run
from tests.helpers.tiers import full

OTHER = {"logging_steps": 20, "save_steps": 300, "report_to": ["wandb"], "vllm_python": "python", "run_name": "a"}


def resolved(**keys) -> dict:
    given = {"dataset_name": __file__, "model_name_or_path": ".", "prompts_per_stage": "all"}
    return yaml.safe_load(dump(make_config(given | keys)))


@pytest.mark.parametrize("seed", range(20))
def test_a_run_continues_if_nothing_that_it_learned_changes_and_is_refused_otherwise(seed):
    """Random draws: a schedule, then keys that may change and more stages, then one key that may not."""
    draw = random.Random(seed)
    stages, more = draw.randint(1, 4), draw.randint(0, 3)
    old, new = resolved(stages=stages), resolved(stages=stages + more)
    for name in draw.sample(PER_STAGE, 3):
        values = [draw.choice([0.5, 1.0, 2.0]) for _ in range(stages)]
        old[name] = values if draw.random() < 0.7 else values[0]
        started = old[name] if isinstance(old[name], list) else [old[name]] * stages
        new[name] = started + [draw.choice([0.5, 3.0]) for _ in range(more)]
    for name in draw.sample([*OTHER], 3):
        new[name] = OTHER[name]
    harmful, harmless = differences(old, new)
    assert not harmful
    changed = {name for name in old if old[name] != new[name]}
    assert {text.partition(":")[0] for text in harmless} == changed
    for harm in ("seed", "max_length", "temperature", "stages", "method"):
        worse = copy.deepcopy(new)
        if harm == "temperature":
            worse[harm] = [9.0] * worse["stages"]
        else:
            worse[harm] = {"seed": 7, "max_length": 77, "stages": stages - 1, "method": "sft"}[harm]
        assert [text.partition(":")[0] for text in differences(old, worse)[0]][:1] != []
        assert any(text.startswith(f"{harm}: {old[harm]!r} -> ") for text in differences(old, worse)[0])


def test_a_run_of_earlier_spellings_is_another_configuration(tmp_path):
    config = make_config({"dataset_name": __file__, "model_name_or_path": ".", "output_dir": str(tmp_path)})
    earlier = yaml.safe_load(dump(config)) | {"divergence": "reverse_kl", "reward_loss": "sigmoid", "learn_turns": None}
    del earlier["use_vllm"], earlier["implicit_reward_policy"], earlier["implicit_reward_reference"]
    keep_text(tmp_path / "config.yaml", yaml.safe_dump(earlier | {"sampler": "transformers"}))
    with pytest.raises(InputError, match=r"its run has another configuration .*divergence: 'reverse_kl' -> 'airl'"):
        check_output(tmp_path, config)


@pytest.mark.parametrize("left", ["", '{"name": "config.ya', "\n"])
def test_a_folder_whose_first_line_a_full_disk_did_not_take_is_a_new_run(tmp_path, left):
    (tmp_path / MANIFEST).write_text(left)
    config = make_config({"dataset_name": __file__, "model_name_or_path": "."})
    assert check_output(tmp_path, config) == []
    release(tmp_path / ".lock")
    keep_text(tmp_path / "config.yaml", dump(config))
    assert check_output(tmp_path, config) == []
    release(tmp_path / ".lock")
    (tmp_path / MANIFEST).write_text(left)
    with pytest.raises(InputError, match=r"has no config\.yaml with a checksum in MANIFEST"):
        check_output(tmp_path, config)
    release(tmp_path / ".lock")


def test_a_lost_configuration_is_written_again_as_it_was_and_no_other_is_taken_for_it(tmp_path, capsys):
    keys = {"dataset_name": __file__, "model_name_or_path": ".", "output_dir": str(tmp_path)}
    config, path = make_config(keys), tmp_path / "config.yaml"
    keep_text(path, dump(config))
    for lose in (
        path.unlink,
        lambda: path.write_text(""),
        lambda: path.write_text(dump(make_config(keys | {"seed": 1}))),
    ):
        lose()
        with pytest.raises(InputError, match=r"config\.yaml: is missing or damaged, and held another"):
            check_output(tmp_path, make_config(keys | {"seed": 1}))
        check_output(tmp_path, config)
        assert path.read_text() == dump(config)
    tmp_path.chmod(0o777)
    check_output(tmp_path, config)
    assert "warning: output_dir" in capsys.readouterr().err
    (tmp_path / "MANIFEST").unlink()
    with pytest.raises(InputError, match=r"no config\.yaml with a checksum in MANIFEST"):
        check_output(tmp_path, config)
    release(tmp_path / ".lock")


@pytest.mark.parametrize("name", ["reward_function", "beta", "renyi_alpha", "learning_rate", "columns"])
def test_a_key_that_an_earlier_version_did_not_have_has_its_default_there(name):
    old, new = resolved(), resolved()
    del old[name]
    assert differences(old, new) == ([], [])
    refused, _ = differences(old, new | {name: [0.3, 0.3, 0.3]})
    assert refused and refused[0].startswith(f"{name}: ")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A working folder with data, a model and a reward function, and a link to it; the home is its parent."""
    home = tmp_path / "home"
    model = home / "place" / "model"
    model.mkdir(parents=True)
    for file in (model / "model.safetensors", model / "config.json", home / "place/ds.json", home / "place/rows.jsonl"):
        file.write_text("{}")
    (home / "place/reward.py").write_text("")
    (home / "link").symlink_to(home / "place")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "place")
    return home


SPELLINGS = ["{}", "./{}", "{home}/place/{}", "{home}/link/{}", "~/place/{}", "../link/../place/{}", "{home}/place//{}"]


@pytest.mark.parametrize("seed", range(10))
def test_a_run_is_the_same_however_its_files_and_folders_are_spelled(places, capsys, seed):
    draw = random.Random(seed)

    def spelled(name: str) -> str:
        return draw.choice(SPELLINGS).format(name, home=places)

    def drawn():
        return make_config(
            {
                "method": "rft",
                "output_dir": spelled("run") + draw.choice(["", "/"]),
                "model_name_or_path": spelled("model") + draw.choice(["", "/"]),
                "dataset_name": [spelled("rows.jsonl"), {"name": spelled("*.jsonl")}],
                "deepspeed": spelled("ds.json"),
                "reward_data": "none",
                "reward_function": [spelled("reward.py") + ":score"],
                "reward_model_name_or_path": [spelled("model")],
            }
        )

    first, output = drawn(), places / "place" / "run"
    keep_text(output / "config.yaml", dump(first))
    keep_inputs(read_inputs(first, output), output)
    for _ in range(3):
        again = drawn()
        check_output(Path(again.output_dir).expanduser(), again)
        keep_text(output / "config.yaml", dump(again))
        keep_inputs(read_inputs(again, output), output)
    assert not capsys.readouterr().err
    shutil.copytree(places / "place" / "model", places / "place" / "other")
    refused, _ = differences(yaml.safe_load(dump(first)), yaml.safe_load(dump(first)) | {"model_name_or_path": "other"})
    assert refused
    (places / "place" / "model" / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json is not as it was"):
        read_inputs(drawn(), output)
    for path in [path for path in LOCKS if path.parent.samefile(output)]:
        release(path)


def test_more_stages_of_split_prompts_are_refused_with_the_reason():
    [refused], _ = differences(
        resolved(stages=2, prompts_per_stage="split"), resolved(stages=3, prompts_per_stage="split")
    )
    assert refused == "stages: 2 -> 3, and with prompts_per_stage: split more stages change the prompts of each"


def test_another_logging_interval_is_refused_where_it_decides_when_a_stage_ends():
    old, new = (resolved(max_expert_drop=1.0, logging_steps=steps) for steps in (10, 20))
    assert differences(old, new)[0] == ["logging_steps: 10 -> 20, and max_expert_drop ends a stage at a logged step"]


# Each key is in one of the tables: here, if a run that has started refuses another value, else in MAY_CHANGE.
SHAPES = """
method seed model_name_or_path model_revision config_name tokenizer_name_or_path resize_embeddings allow_missing_weights
train_tokenizer dtype trust_remote_code use_peft lora_r lora_alpha load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant
lora_target_modules dataset_name dataset_config dataset_revision dataset_train_split dataset_test_split
eval_dataset_name prompt_dataset_name columns learn_turns bad_rows streaming eval_fraction max_train_samples
max_eval_samples eval_overlap chat_template chat_template_kwargs prompt_template system_prompt split_special_tokens
max_length max_prompt_length overlong
sft_epochs sft_steps sft_loss_type sft_kl_weight sft_nll_steps sft_optim sft_global_batch_size
stages inner_epochs inner_steps prompts_per_stage history reference loss_type loss_weights label_smoothing discopop_tau
reward_shift renyi_alpha historical_weight beta token_weighting nll_weight
reward_data reward_loss divergence divergence_alpha reward_level reward_regularization reward_heads reward_models
reward_combine reward_std_weight reward_every reward_backbone reward_frozen_layers reward_epochs reward_steps
reward_optim reward_model_name_or_path reward_overlong implicit_reward_policy implicit_reward_reference reward_function
reward_normalize reward_weights feature_reward feature_whitening feature_diversity
align num_generations align_rounds kl_in reward_credit gamma whiten_rewards cliprange missing_eos_penalty length_penalty
vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
sync_ref_model ref_model_mixup_alpha ref_model_sync_steps teacher_prompt_template distillation_mode distillation_alpha
distillation_topk distillation_add_tail distillation_is_clip num_loss_tokens_to_skip
thought_reward thought_mark max_thought_tokens
lr_scheduler_type warmup_ratio optim weight_decay router_aux_loss_coef max_grad_norm global_batch_size
per_device_train_batch_size gradient_accumulation_steps max_expert_drop keep metric_for_best_model
use_vllm async_sampling async_sampling_at temperature top_p top_k max_new_tokens
""".split()


def test_each_key_is_decided_to_shape_the_result_or_to_be_free_to_change():
    """A new key fails here, until its author has put it into SHAPES or into MAY_CHANGE."""
    decided = [*SHAPES, *MAY_CHANGE, *RATES]
    assert sorted(decided) == sorted(FIELDS), {*FIELDS} ^ {*decided}
    old = resolved()
    for name in MAY_CHANGE:
        assert differences(old, old | {name: "other"})[0] == []
    for name in SHAPES:
        assert differences(old, old | {name: 0 if name == "stages" else "other"})[0] != [], name


@pytest.mark.parametrize("seed", range(10))
def test_a_learning_rate_may_be_lowered_and_not_raised(seed):
    draw = random.Random(seed)
    name, stages = draw.choice(RATES), draw.randint(1, 3)
    rates = [draw.choice([1e-5, 2e-5]) for _ in range(stages)]
    lower = [rate * draw.choice([0.1, 1]) for rate in rates[:-1]] + [rates[-1] / 3]
    raised = [*lower[:-1], rates[-1] * 2]
    if name != "learning_rate":  # which are the policy's where they are not given
        rates, lower, raised = rates[-1], lower[-1], raised[-1]
        before = draw.choice([{name: rates}, {"learning_rate": rates}])
    else:
        before = {name: rates}
    old = resolved(stages=stages, **before)
    harmful, [told] = differences(old, old | {name: lower})
    assert harmful == [] and told.startswith(f"{name}: ") and "(lower, in the phases that are not finished)" in told
    [refused], _ = differences(old, old | {name: raised})
    assert refused.startswith(f"{name}: ")


def test_the_clipping_of_a_deepspeed_file_is_the_runs_own_and_shapes_it(tmp_path):
    for name, settings in {
        "plain": {},
        "offload": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "clips": {"gradient_clipping": 0.5},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    none, plain, offload, clips = (
        resolved(deepspeed=name and str(tmp_path / f"{name}.json")) for name in (None, "plain", "offload", "clips")
    )
    assert differences(none, offload)[0] == differences(plain, offload)[0] == differences(offload, none)[0] == []
    assert differences(plain, clips)[0] == ["max_grad_norm: 1.0 -> 0.5"]


@full
def test_a_finished_run_that_gets_more_stages_ends_as_one_that_had_them_from_the_start(tmp_path):
    keys = {"prompts_per_stage": "all", "max_train_samples": 48}
    run(tmp_path / "whole", **keys, stages=2, learning_rate=[1e-5, 2e-5])
    run(tmp_path / "grown", **keys, stages=1, learning_rate=1e-5)
    first = contents(tmp_path / "grown" / "final")
    more = {"stages": 2, "learning_rate": [1e-5, 2e-5], "logging_steps": 1, "per_device_eval_batch_size": 63}
    _, err = run(tmp_path / "grown", **keys, **more)
    assert "continues with stages: 1 -> 2 (more stages)" in err.splitlines()[0]
    grown, whole = contents(tmp_path / "grown" / "final"), contents(tmp_path / "whole" / "final")
    assert grown == whole != first
    assert "stage-01" in (tmp_path / "grown" / "report.html").read_text()


def test_policies_that_no_later_stage_needs_are_deleted_and_the_run_ends_as_with_all_of_them(
    finished, tmp_path, capsys
):
    output = tmp_path / "run"
    for _ in range(2):  # the second time nothing is trained
        run(output, save_total_limit=1)
        final, whole = contents(output / "final"), contents(finished[0] / "final")
        card = final.pop("README.md").decode()
        assert card.replace(" `save_total_limit` has deleted the policies of stage-00.", "") != card
        assert final | {"README.md": whole["README.md"]} == whole
        assert {path.parent.name for path in output.glob("*/policy")} == {"initial", "sft", "stage-01"}
    assert "save_total_limit has deleted the policies of stage-00." in (output / "report.html").read_text()
    assert [model.name for model in policies_of(output)] == ["run/sft", "run/stage-01"]
    assert "the policies of stage-00 were deleted (save_total_limit)" in capsys.readouterr().err
    (output / "stage-01/policy/model.safetensors").write_bytes(b"")
    _, err = run(output, code=2, save_total_limit=1)
    assert "stage-01: its policy is damaged or missing, and that of stage-00, from which" in err


def started(folder):
    """Start a process that holds the lock of the folder."""
    command = [sys.executable, "-m", "tests.helpers.hold_lock", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_folder_has_one_run_at_a_time_and_a_killed_run_leaves_no_lock(tmp_path):
    holder = started(tmp_path)
    owner, child = map(int, holder.stdout.readline().split())
    try:
        with pytest.raises(InputError, match=rf"output_dir \S+: process {owner} on \S+, started .* is running in it"):
            lock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # the child lives
        lock(tmp_path)
        lock(tmp_path)  # a process may lock twice
    finally:
        os.kill(child, signal.SIGKILL)
        if path := next((path for path in LOCKS if path.parent == tmp_path), None):
            release(path)


def test_a_second_run_in_the_folder_names_the_first_before_it_reads_data(finished):
    output = finished[0]
    holder = started(output)
    owner, child = map(int, holder.stdout.readline().split())
    try:
        _, err = run(output, code=2)
        assert f"process {owner} on " in err and "demonstrations:" not in err
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
