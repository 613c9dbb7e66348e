"""The distillation loss is that of TRL's SDFTTrainer: the same prompts of the teacher, the same value and gradient."""

import copy
import functools

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from irlfast.config import make_config
from irlfast.data.encoding import make_encoder
from irlfast.data.packing import PromptGroup, pack
from irlfast.data.teacher_prompts import teacher_prompts
from irlfast.engine.module import Policy
from irlfast.engine.teacher import TeacherModel
from irlfast.losses.distillation import distillation_loss
from irlfast.losses.inputs import Normalisers
from tests.helpers.prepared import prepared
from tests.helpers.rows import examples_of, pair
from tests.helpers.tokenizers_like import pythia
from tests.methods.test_trl_equivalence import ROWS, perturbed, tiny

TEMPLATE, TEMPERATURE, SKIPPED, CLIP = "{prompt} An example: {privileged_context}. Now you:", 1.3, 1, 1.02
WAYS = {
    "forward": ("full_logits", 0.0, False),
    "reverse": ("full_logits", 1.0, False),
    "Jensen-Shannon": ("full_logits", 0.3, False),
    "top k": ("topk_logits", 0.5, False),
    "top k and tail": ("topk_logits", 1.0, True),
    "sampled": ("sampled_token", 1.0, False),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """TRL's trainer with a teacher of other weights, a batch of its answers, and a policy that has moved since."""
    tokenizer = pythia()
    tokenizer.pad_token = tokenizer.eos_token
    policy = tiny(LlamaConfig, len(tokenizer))
    settings = SDFTConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        teacher_model_kind="live",
        teacher_prompt_template=TEMPLATE,
        temperature=TEMPERATURE,
        num_loss_tokens_to_skip=SKIPPED,
        distillation_is_clip=CLIP,
        distillation_topk=5,
        per_device_train_batch_size=len(ROWS),
        steps_per_generation=2,
        num_generations=1,
        max_completion_length=7,
        bf16=False,
        report_to=[],
        use_cpu=True,
    )
    rows = [{"prompt": prompt, "privileged_context": expert} for prompt, expert, _ in ROWS]
    trainer = SDFTTrainer(policy, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.model.eval()
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = list(range(0, len(tokenizer), 4))  # short answers
    torch.manual_seed(0)
    batch = trainer._prepare_training_batch(rows)
    trainer.teacher_model = perturbed(policy)
    trainer.model.load_state_dict(perturbed(policy).state_dict())
    return trainer, batch


def unpadded(values, mask) -> list[list]:
    return [row[kept.bool()].tolist() for row, kept in zip(values, mask, strict=True)]


def groups_of(batch, tokenizer, folder) -> list[PromptGroup]:
    """The prompts and the teacher's by irlfast's own path, with the answers that TRL sampled."""
    (folder / "config.json").write_text("{}")
    config = make_config(
        {
            "method": "sdft",
            "dataset_name": str(folder / "config.json"),
            "model_name_or_path": str(folder),
            "prompt_template": "{}",
            "teacher_prompt_template": TEMPLATE,
        }
    )
    encoder = make_encoder(tokenizer, config)
    examples, _ = examples_of([pair(prompt, expert) for prompt, expert, _ in ROWS], encoder, config)
    lines = [
        {
            "messages": [{"role": "user", "content": prompt}],
            "answer": {"role": "assistant", "content": expert},
            "tools": None,
        }
        for prompt, expert, _ in ROWS
    ]
    answers = unpadded(batch["completion_ids"], batch["completion_mask"])
    old = map(torch.tensor, unpadded(batch["old_per_token_logps"], batch["completion_mask"]))
    return [
        PromptGroup(
            example.prompt_ids,
            (answer,),
            old_logps=(logps[SKIPPED:],),
            learned=range(SKIPPED, len(answer)),
            teacher_prompt=prompt,
        )
        for example, prompt, answer, logps in zip(
            examples, teacher_prompts(lines, encoder, config), answers, old, strict=True
        )
    ]


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_and_its_gradient_are_trls(theirs, tmp_path, way):
    trainer, batch = theirs
    mode, alpha, tail = WAYS[way]
    trainer.args.distillation_mode, trainer.args.distillation_alpha = mode, alpha
    trainer.args.distillation_add_tail = tail
    policy = copy.deepcopy(trainer.model)
    expected = trainer.compute_loss(trainer.model, batch)
    trainer.model.zero_grad()
    expected.backward()
    loss = functools.partial(
        distillation_loss, mode=mode, alpha=alpha, top_k=5, add_tail=tail, is_clip=CLIP, temperature=TEMPERATURE
    )
    groups = groups_of(batch, trainer.processing_class, tmp_path)
    ours = Policy(prepared(policy), loss, teacher=TeacherModel(prepared(trainer.teacher_model), {}))
    value, _ = ours(pack(groups), Normalisers(len(groups), 1.0))
    value.backward()
    assert abs(expected.item()) > 1e-3
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    for (name, ours_), theirs_ in zip(policy.named_parameters(), trainer.model.parameters(), strict=True):
        scale = theirs_.grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(ours_.grad, theirs_.grad, rtol=1e-4, atol=1e-5 * max(scale, 1), msg=name)


def test_policy_and_teacher_read_trls_prompts(theirs, tmp_path):
    trainer, batch = theirs
    groups = groups_of(batch, trainer.processing_class, tmp_path)
    assert len({len(group.answers[0]) for group in groups}) > 1, "answers of one length, which take no padding"
    width = batch["completion_ids"].shape[1]
    teachers = batch["teacher_input_ids"][:, :-width], batch["teacher_attention_mask"][:, :-width]
    assert unpadded(batch["prompt_ids"], batch["prompt_mask"]) == [list(group.prompt) for group in groups]
    assert unpadded(*teachers) == [list(group.teacher_prompt) for group in groups]
