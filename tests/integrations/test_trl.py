"""TRL's DPOTrainer and ours over a few real steps: the same losses, rewards and weights."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import GPTNeoXConfig, LlamaConfig

from irlfast.integrations.trl import DPOTrainer
from tests.helpers.tokenizers_like import pythia
from tests.methods.test_trl_equivalence import ROWS, perturbed, tiny


def train(trainer_class, folder, config_class=LlamaConfig, lora=False, **options):
    tokenizer = pythia()
    tokenizer.pad_token = tokenizer.eos_token
    policy = tiny(config_class, len(tokenizer))
    torch.manual_seed(1)
    reference = None if lora else perturbed(policy)
    rows = [{"prompt": prompt, "chosen": expert, "rejected": synthetic} for prompt, expert, synthetic in ROWS]
    usual = {
        "loss_type": ["sigmoid"],
        "optim": "sgd",
        "learning_rate": 0.1,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
    }
    quiet = {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = trainer_class(
        policy,
        reference,
        args=trl.DPOConfig(str(folder), beta=0.3, bf16=False, seed=0, **usual | quiet | options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return steps, [parameter.detach() for parameter in trainer.model.parameters() if parameter.requires_grad]


FORMS = {
    "llama": {},
    "gpt-neox": {"config_class": GPTNeoXConfig},
    "hinge": {"loss_type": ["hinge"]},
    "cached reference": {"precompute_ref_log_probs": True},
    "lora": {"lora": True},
    "checkpointed layers": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_same_losses_rewards_and_weights(tmp_path, form):
    (ours, weights), (theirs, expected) = (train(each, tmp_path, **form) for each in (DPOTrainer, trl.DPOTrainer))
    assert len(ours) == len(theirs) == 3
    assert len({round(row["loss"], 4) for row in theirs}) > 1
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=2e-5), name
        if abs(other["rewards/margins"]) > 1e-3:  # LoRA's first margin is 0 but for rounding
            assert mine["rewards/accuracies"] == other["rewards/accuracies"]
    for mine, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("option", [{"loss_type": ["ipo"]}, {"use_weighting": True}])
def test_what_is_missing_is_named(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        train(DPOTrainer, tmp_path, **option)
