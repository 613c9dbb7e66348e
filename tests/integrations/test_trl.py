"""TRL's DPOTrainer and ours, side by side: the same losses, gradients, figures and weights, from real batches."""

import copy
import functools
import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3MoeConfig

from irlfast import ops
from irlfast.integrations.trl import DPOTrainer
from tests.helpers.tiers import covering_cases, full
from tests.helpers.tokenizers_like import pythia
from tests.methods.test_trl_equivalence import ROWS, perturbed, tiny

DATA = [{"prompt": prompt, "chosen": expert, "rejected": synthetic} for prompt, expert, synthetic in ROWS]
FIGURES = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
HEAD_TOO = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
BOTH = (DPOTrainer, trl.DPOTrainer)
PROMPT = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")


def trainer_of(trainer_class, folder, model=None, reference=None, adapter=None, **options):
    """A trainer of TRL's defaults in fp32, with a batch of all rows, unless ``options`` say otherwise."""
    tokenizer = pythia()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny(LlamaConfig, len(tokenizer)) if model is None else model
    torch.manual_seed(1)
    usual = {"beta": 0.3, "seed": 0, "bf16": False, "optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
    usual |= {"per_device_train_batch_size": len(DATA), "per_device_eval_batch_size": len(DATA), "logging_steps": 1}
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return trainer_class(
        model,
        reference if reference or adapter or hasattr(model, "peft_config") else copy.deepcopy(model),
        args=trl.DPOConfig(str(folder), **usual | quiet | options),
        train_dataset=Dataset.from_list(DATA),
        eval_dataset=Dataset.from_list(DATA),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def perturbed_reference(**options):
    return options | {"reference": perturbed(tiny(LlamaConfig, len(pythia())))}


def trained(trainer):
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return steps, [parameter.detach() for parameter in trainer.model.parameters() if parameter.requires_grad]


FORMS = {
    "a mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "lora and a head that is trained": {"adapter": HEAD_TOO},
    "accumulated gradients": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
MORE_FORMS = {
    "one loss": {},
    "gpt-neox": {"config_class": GPTNeoXConfig},
    "a reference computed in advance": {"precompute_ref_log_probs": True},
    "lora": {"adapter": LORA},
    "prompt tuning": {"adapter": PROMPT, "gradient_checkpointing": False},
}


@pytest.mark.parametrize(
    "form",
    [*FORMS.values(), *(pytest.param(form, marks=full) for form in MORE_FORMS.values())],
    ids=[*FORMS, *MORE_FORMS],
)
def test_the_same_losses_rewards_and_weights_over_steps(tmp_path, form):
    form = dict(form)
    config_class = form.pop("config_class", LlamaConfig)
    results = []
    for trainer_class in (DPOTrainer, trl.DPOTrainer):
        policy = tiny(config_class, len(pythia()))
        torch.manual_seed(1)
        reference = None if "adapter" in form else perturbed(policy)
        results.append(trained(trainer_of(trainer_class, tmp_path, policy, reference, **form)))
    (ours, weights), (theirs, expected) = results
    assert len(ours) == len(theirs) == 3
    assert len({round(row["loss"], 4) for row in theirs}) > 1
    for mine, other in zip(ours, theirs, strict=True):
        for name in FIGURES:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=2e-5), name
        if abs(other["rewards/margins"]) > 1e-3:  # LoRA's first margin is 0 but for rounding
            assert mine["rewards/accuracies"] == other["rewards/accuracies"]
    for mine, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------- every loss of TRL's


LOSSES = [
    *(["sigmoid"], ["hinge"], ["ipo"], ["exo_pair"], ["nca_pair"], ["robust"], ["bco_pair"], ["sppo_hard"], ["aot"]),
    *(["aot_unpaired"], ["apo_zero"], ["apo_down"], ["discopop"], ["sft"], ["sigmoid_norm"]),
    *(["sigmoid", "bco_pair", "sft"], ["robust", "aot"]),
]
OPTIONS = {
    "loss_type": LOSSES,
    "label_smoothing": [0.1, 1e-3],
    "f_divergence_type": ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
    "ld_alpha": [None, 0.4],
    "use_weighting": [False, True],
    "precompute_ref_log_probs": [False, True],
    "beta": [0.3, 0.05],
}
OF_MARGIN = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}


def allowed(options: dict) -> dict:
    """``options`` without what TRL refuses to combine."""
    losses, options = set(options["loss_type"]), dict(options)
    if not losses <= OF_MARGIN:
        del options["f_divergence_type"]
    if losses & {"aot", "aot_unpaired", "sft", "hinge"}:  # with the last two, TRL overwrites what autograd needs
        del options["use_weighting"]
    if len(losses) > 1:
        options["loss_weights"] = [0.5 + index for index in range(len(losses))]
    return options


def loss_and_gradients(trainer):
    """Loss, gradients and figures of the first batch; ``compute_loss`` is what TRL's own trainer calls."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    loss.backward()
    figures = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), [p.grad for p in trainer.model.parameters() if p.requires_grad], figures


@pytest.mark.parametrize("options", covering_cases(OPTIONS, beyond=full, drawn=40))
def test_the_same_loss_gradients_and_figures_for_every_loss_and_option(tmp_path, options):
    compare(
        *(loss_and_gradients(trainer_of(each, tmp_path, **perturbed_reference(**allowed(options)))) for each in BOTH)
    )


def compare(ours, theirs):
    """TRL subtracts sums of ~100 nats that fp32 has rounded: an error of 1e-5, which 1 / ``discopop_tau`` magnifies."""
    (loss, gradients, figures), (expected, other_gradients, other_figures) = ours, theirs
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6)
    mine, other = (torch.cat([gradient.flatten() for gradient in each]) for each in (gradients, other_gradients))
    assert other.norm() > 0
    assert (mine - other).norm() < 2e-4 * other.norm()
    for name, value in figures.items():
        assert value == pytest.approx(other_figures[name], rel=1e-4, abs=2e-5), name


def test_experts_are_balanced_by_the_auxiliary_loss(tmp_path):
    def moe():
        torch.manual_seed(0)
        options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
        config = functools.partial(Qwen3MoeConfig, num_key_value_heads=2, **options)
        return tiny(config, len(pythia()))

    results = [loss_and_gradients(trainer_of(each, tmp_path, moe(), router_aux_loss_coef=0.5)) for each in BOTH]
    compare(*results)
    assert results[0][2]["aux_loss"] > 0


def test_evaluation_logs_all_that_trl_logs(tmp_path):
    ours, theirs = (trainer_of(each, tmp_path, **perturbed_reference()).evaluate() for each in BOTH)
    for name in ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "rewards/margins", "loss"):
        assert ours[f"eval_{name}"] == pytest.approx(theirs[f"eval_{name}"], rel=1e-4, abs=2e-5), name


# ---------------------------------------------------------------- TRL's defaults: fp32 weights under bf16 autocast


def pretrained_adapter():
    torch.manual_seed(0)
    model = get_peft_model(tiny(LlamaConfig, len(pythia())), LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


EQUALS = {
    "a copy of the policy": {},
    "computed in advance": {"precompute_ref_log_probs": True},
    "without the adapter": {"adapter": LORA},
    "without the adapter, in advance": {"adapter": LORA, "precompute_ref_log_probs": True},
    "without the adapter, with the first head": {"adapter": HEAD_TOO},
    "a copy of an adapter": {"model": pretrained_adapter},
    "by tokens that weigh less": {"ld_alpha": 0.5},
    "by TRL's own code": {"loss_type": ["aot"]},
}


@pytest.mark.parametrize("bf16", [True, pytest.param(False, marks=full)], ids=["bf16", "fp32"])
@pytest.mark.parametrize("options", EQUALS.values(), ids=EQUALS.keys())
def test_a_policy_that_equals_its_reference_has_log_ratios_of_exactly_zero(tmp_path, options, bf16):
    make = options.get("model")
    trainer = trainer_of(DPOTrainer, tmp_path, **options | {"model": make() if make else None}, bf16=bf16, max_steps=1)
    [step], _ = trained(trainer)
    assert [step[f"rewards/{name}"] for name in ("chosen", "rejected", "margins")] == [0, 0, 0]
    assert step["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert step["grad_norm"] > 0


def test_under_autocast_the_head_multiplies_in_bf16_and_keeps_its_statistics_in_fp32(tmp_path):
    trainer = trainer_of(DPOTrainer, tmp_path, bf16=True)
    assert trainer.model.dtype == torch.float32
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    bodies = []
    trainer.model.model.register_forward_hook(lambda module, given, output: bodies.append(output.last_hidden_state))
    with torch.no_grad(), trainer.accelerator.autocast():
        logps = trainer.model(
            batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
        ).log_probs
    [hidden] = bodies
    head, targets = trainer.model.lm_head.weight, ops.flatten_labels(labels, shifted=False)
    expected = ops.log_ratio(hidden.flatten(0, 1).bfloat16(), head.bfloat16(), *targets)
    assert hidden.dtype == head.dtype == logps.dtype == torch.float32
    assert torch.equal(logps, expected.token_logps.view(labels.shape)[:, :-1])


def test_trl_s_defaults_train_the_same(tmp_path):
    (ours, _), (theirs, _) = (trained(trainer_of(each, tmp_path, bf16=True, **perturbed_reference())) for each in BOTH)
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "logps/rejected"):
            assert mine[name] == pytest.approx(other[name], rel=0.05), name
