"""The loss of ``align: grpo`` and its advantages are those of TRL's GRPOTrainer, on the same sampled answers."""

import functools

import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig
from trl import GRPOConfig, GRPOTrainer

from irlfast.config import make_config
from irlfast.data.packing import PromptGroup, pack
from irlfast.engine.module import Policy
from irlfast.losses.inputs import Normalisers
from irlfast.losses.policy import align_loss
from irlfast.methods.credit import advantages_of
from irlfast.models.forward import hidden_states
from irlfast.ops import lm_head
from irlfast.sampling.scoring import token_logps
from tests.helpers.prepared import prepared
from tests.helpers.tokenizers_like import pythia
from tests.methods.test_trl_equivalence import perturbed, tiny

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12]]  # of one length, so that neither side pads
ANSWERS = [[[3, 4, 5], [6, 2, 9, 8, 2]], [[7], [4, 4]]]
REWARDS = [[1.0, 0.2], [-3.0, 0.5]]


@pytest.fixture
def trainer(tmp_path):
    tokenizer = pythia()
    settings = {"loss_type": "grpo", "beta": 0.0, "num_generations": 2, "per_device_train_batch_size": 4}
    config = GRPOConfig(str(tmp_path), **settings, use_cpu=True, bf16=False, report_to="none")
    data = Dataset.from_dict({"prompt": ["a", "b"]})
    policy = tiny(LlamaConfig, len(tokenizer))
    return GRPOTrainer(policy, lambda **_: [0.0], args=config, train_dataset=data, processing_class=tokenizer)


def test_value_and_gradient_of_grpo_are_trls(trainer, tmp_path):
    policy = tiny(LlamaConfig, len(pythia())).eval()  # equal to the trainer's, whose forward Accelerate has wrapped
    old = perturbed(policy)
    groups = [PromptGroup(prompt, tuple(answers)) for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)]
    batch = pack(groups)
    with torch.no_grad():
        each = iter(token_logps(hidden_states(old, batch), lm_head(old), batch))
    old_logps = [tuple(next(each) for _ in group.answers) for group in groups]

    (tmp_path / "rows.jsonl").touch()
    given = {"dataset_name": str(tmp_path / "rows.jsonl"), "model_name_or_path": str(tmp_path), "method": "gad"}
    config = make_config(given | {"num_generations": 2})
    ends = [
        tuple(torch.tensor([0.0] * (len(answer) - 1) + [reward]) for answer, reward in zip(*both, strict=True))
        for both in zip(ANSWERS, REWARDS, strict=True)
    ]
    advantages = advantages_of(ends, config)
    expected = torch.tensor(REWARDS)
    expected = (expected - expected.mean(1, keepdim=True)) / (expected.std(1, keepdim=True) + 1e-4)  # TRL's own
    torch.testing.assert_close(torch.tensor([[a[0].item() for a in each] for each in advantages]), expected)

    answers = [torch.tensor(answer) for each in ANSWERS for answer in each]
    inputs = {
        "prompt_ids": torch.tensor(PROMPTS).repeat_interleave(2, 0),
        "prompt_mask": torch.ones(4, 4, dtype=torch.long),
        "completion_ids": pad_sequence(answers, batch_first=True),
        "completion_mask": pad_sequence([torch.ones_like(answer) for answer in answers], batch_first=True),
        "advantages": expected.flatten(),
        "old_per_token_logps": pad_sequence([logps for each in old_logps for logps in each], batch_first=True),
    }
    theirs = trainer._compute_loss(trainer.model.eval(), inputs)
    ready = [
        group._replace(old_logps=logps, advantages=values)
        for group, logps, values in zip(groups, old_logps, advantages, strict=True)
    ]
    options = {"align": "grpo", "answers": 2, "beta": 0.0, "kl_in_loss": False, "clip_range": trainer.epsilon_low}
    ours = Policy(prepared(policy), functools.partial(align_loss, **options))(pack(ready), Normalisers(2, 1.0))[0]
    assert abs(theirs.item()) > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = (
        torch.autograd.grad(loss, list(model.parameters())) for loss, model in ((ours, policy), (theirs, trainer.model))
    )
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)
