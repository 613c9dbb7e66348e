"""Losses that TRL has, too: SFT and DFT, and a stage of IRFT, which is DPO against a synthetic answer."""

import copy
import functools

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from irlfast import ops
from irlfast.config import make_config
from irlfast.data.encoding import make_encoder
from irlfast.data.packing import PromptGroup, pack
from irlfast.data.store import Example
from irlfast.engine.module import Policy
from irlfast.losses.inputs import Normalisers, arguments
from irlfast.losses.pairs import irft_loss
from irlfast.losses.sft import sft_loss
from irlfast.models.forward import hidden_states
from irlfast.ops import lm_head
from tests.helpers.prepared import prepared
from tests.helpers.rows import examples_of, pair
from tests.helpers.tiers import full, slow
from tests.helpers.tokenizers_like import pythia
from tests.ops.test_losses_of_trl import OF_TRL

BETA = 0.3
ROWS = [
    ("What is the capital of France?", " The capital of France is Paris.", " It is Rome, the capital"),
    ("a b c", " d", " e f g h i j k l m n o p"),
    ("user assistant, and a rather longer prompt than the others", " yes", " no"),
    ("What", " The capital", " The"),
]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(config_class: type, vocab_size: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = config_class(vocab_size=vocab_size, initializer_range=0.2, max_position_embeddings=128, **SHAPE)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return other


def examples(tokenizer, file, answer: int) -> list[Example]:
    """The prompts of ROWS with the expert's answers (1) or the synthetic ones (2)."""
    config = make_config({"dataset_name": str(file), "model_name_or_path": str(file.parent), "prompt_template": "{}"})
    return examples_of([pair(row[0], row[answer]) for row in ROWS], make_encoder(tokenizer, config), config)[0]


def irlfast_loss(policy, reference, tokenizer, file, **options) -> torch.Tensor:
    both = zip(examples(tokenizer, file, 1), examples(tokenizer, file, 2), strict=True)
    pairs = [PromptGroup(y.prompt_ids, (y.answer_ids, z.answer_ids)) for y, z in both]
    batch = pack(pairs)
    with torch.no_grad():
        hidden = hidden_states(reference, batch)
        ref_logps = ops.log_ratio(hidden, **arguments(lm_head(reference), batch)).token_logps
    loss = functools.partial(irft_loss, beta=BETA, **options)
    return Policy(prepared(policy), loss)(batch._replace(ref_logps=ref_logps), Normalisers(len(pairs), 1.0))[0]


def trl_loss(policy, reference, tokenizer, folder, loss_type, **options) -> torch.Tensor:
    rows = [{"prompt": prompt, "chosen": expert, "rejected": synthetic} for prompt, expert, synthetic in ROWS]
    arguments_ = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        loss_type=[loss_type],
        **options,
        per_device_train_batch_size=len(ROWS),
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        use_cpu=True,
    )
    trainer = DPOTrainer(
        policy, reference, args=arguments_, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    [batch] = trainer.get_train_dataloader()
    return trainer.compute_loss(trainer.model, batch)


CASES = [(LlamaConfig, "sigmoid"), (GPTNeoXConfig, "sigmoid")]
OTHERS = [name for name in OF_TRL if name != "sigmoid"]
CASES += [pytest.param(LlamaConfig, name, marks=full if place < 3 else slow) for place, name in enumerate(OTHERS)]


@pytest.mark.parametrize(("config_class", "loss_type"), CASES)
def test_a_stage_has_the_loss_and_the_gradients_of_trls_dpo(tmp_path, config_class, loss_type):
    """``sigmoid`` is SPIN's. In fp32, from texts to gradients; tests/ops/test_losses_of_trl.py has fp64."""
    tokenizer = pythia()
    tokenizer.pad_token = tokenizer.eos_token
    (tmp_path / "config.json").write_text("{}")
    ours = tiny(config_class, len(tokenizer))
    theirs, reference = copy.deepcopy(ours), perturbed(ours)
    options = {"loss_type": loss_type} | OF_TRL[loss_type]
    loss = irlfast_loss(ours, reference, tokenizer, tmp_path / "config.json", **options)
    loss.backward()
    expected = trl_loss(theirs, reference, tokenizer, tmp_path, **options)
    expected.backward()
    at_no_margin = irlfast_loss(ours, ours, tokenizer, tmp_path / "config.json", **options)
    assert abs(loss.item() - at_no_margin.item()) > 0.001, "the reference must differ, or the test sees nothing"
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    same_gradients(ours, theirs)


def same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """In fp32, TRL's own gradients differ from fp64's by up to 6e-5 of the largest (``sppo_hard``), ours by 2e-5."""
    for (name, ours_), theirs_ in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        largest = theirs_.grad.abs().max().item()
        torch.testing.assert_close(ours_.grad, theirs_.grad, rtol=0, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft_has_trls_loss_and_gradients(tmp_path, loss_type):
    tokenizer = pythia()
    tokenizer.pad_token = tokenizer.eos_token
    (tmp_path / "config.json").write_text("{}")
    ours = tiny(LlamaConfig, len(tokenizer))
    theirs = copy.deepcopy(ours)
    groups = [PromptGroup(x.prompt_ids, (x.answer_ids,)) for x in examples(tokenizer, tmp_path / "config.json", 1)]
    policy = Policy(prepared(ours), functools.partial(sft_loss, loss_type=loss_type))
    loss, _ = policy(pack(groups), Normalisers(len(groups), sum(len(group.answers[0]) for group in groups)))
    loss.backward()
    rows = [{"prompt": prompt, "completion": expert} for prompt, expert, _ in ROWS]
    arguments_ = SFTConfig(
        output_dir=str(tmp_path),
        loss_type=loss_type,
        per_device_train_batch_size=len(ROWS),
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        use_cpu=True,
    )
    trainer = SFTTrainer(theirs, args=arguments_, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    [batch] = trainer.get_train_dataloader()
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    same_gradients(ours, theirs)
