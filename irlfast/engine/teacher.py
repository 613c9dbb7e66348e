"""The teacher: a second model in training that gets no gradient. It stays as it begins, or follows the policy.

Keys are TRL's. ``sync_ref_model: false`` freezes the teacher. Otherwise, after every ``ref_model_sync_steps`` steps,

    teacher ← α · policy + (1 − α) · teacher,   α = ``ref_model_mixup_alpha``.

With α = 1 at every step the teacher is live: it is the policy itself, and there is no second model. With LoRA the
teacher has an adapter of its own on the policy's base, so that it takes no memory for a second base.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from irlfast.common import dist
from irlfast.config import Config
from irlfast.data.packing import Batch, PromptGroup
from irlfast.losses.inputs import Teacher
from irlfast.models.forward import hidden_states
from irlfast.models.load import load_to_train
from irlfast.models.prepare import PreparedModel, prepare_model


class Followed(NamedTuple):
    """A parameter of the policy in training, and the teacher's own."""

    policy: Tensor
    teacher: Tensor
    average: Tensor  # the teacher's in fp32, because bf16 would round small changes away


class TeacherModel(NamedTuple):
    prepared: PreparedModel  # the policy's own, where the teacher is live
    followed: dict[str, Followed]  # by the parameter's name; empty where the teacher is frozen or live


def prepare_teacher(
    name: Path | str, policy: PreparedModel, config: Config, groups: Sequence[PromptGroup]
) -> TeacherModel:
    """Load the teacher as it is when a phase begins; a live teacher is the policy, whatever ``name`` is."""
    if is_live(config):
        return TeacherModel(policy, {})
    model = load_to_train(name, config, in_4bit=config.load_in_4bit).requires_grad_(False)
    if config.use_peft:
        share_base(model, policy.model)
    prepared = prepare_model(model.to(dist.device()).eval(), config, groups)
    if not config.sync_ref_model:
        return TeacherModel(prepared, {})
    own = dict(model.named_parameters())
    followed = {
        name: Followed(parameter, own[name], own[name].to(torch.promote_types(own[name].dtype, torch.float32)))
        for name, parameter in policy.model.named_parameters()
        if parameter.requires_grad
    }
    return TeacherModel(prepared, followed)


def share_base(model: Any, policy: Any) -> None:
    """Replace the parameters of LoRA's base in ``model`` by the policy's own, which lie in memory once then."""
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, parameter)


def is_live(config: Config) -> bool:
    """Return whether the teacher has the policy's own weights at every step."""
    return config.sync_ref_model and config.ref_model_mixup_alpha == 1 and config.ref_model_sync_steps == 1


@torch.no_grad()
def teach(teacher: TeacherModel, batch: Batch) -> Teacher:
    """Run the teacher on the batch; where the teacher has prompts of its own, on the answers behind these."""
    read = batch if batch.teacher is None else batch.teacher
    hidden, head = hidden_states(teacher.prepared.model, read), teacher.prepared.head()
    bias = None if head.bias is None else head.bias.detach()
    return Teacher(hidden, head._replace(weight=head.weight.detach(), bias=bias), read.rows)


@torch.no_grad()
def follow(teacher: TeacherModel | None, step: int, config: Config) -> None:
    """Move the teacher, if there is one, towards the policy after ``step``, if it is a step of synchronisation."""
    if not teacher or step % config.ref_model_sync_steps:
        return
    for policy, own, average in teacher.followed.values():
        average.lerp_(policy.to(average.dtype), config.ref_model_mixup_alpha)
        own.copy_(average)


def averages(teacher: TeacherModel) -> dict[str, Tensor]:
    """Return the fp32 weights of a teacher that follows the policy, by the parameters' names."""
    return {name: followed.average for name, followed in teacher.followed.items()}


@torch.no_grad()
def load_averages(teacher: TeacherModel, path: Path) -> None:
    """Continue with the :func:`averages` that a checkpoint has."""
    saved = load_file(path)
    for name, followed in teacher.followed.items():
        followed.average.copy_(saved[name])
        followed.teacher.copy_(followed.average)
