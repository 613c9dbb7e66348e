"""The DeepSpeed engine of a phase, and DeepSpeed's settings."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.config.deepspeed import gains_from_zero, merged_settings
from irlfast.data.packing import PromptGroup
from irlfast.engine.deepspeed_patches import (
    check_version,
    float32_parameters,
    gather_unseen,
    keep_float32,
    skip_reduction_of_one_process,
)
from irlfast.engine.layers import arrange_layers
from irlfast.engine.module import Policy
from irlfast.engine.optim import make_optimizer, make_scheduler
from irlfast.engine.plan import Plan
from irlfast.engine.teacher import prepare_teacher
from irlfast.losses.inputs import Loss
from irlfast.models.moe import check_router
from irlfast.models.prepare import prepare_to_train
from irlfast.models.split import runnable


def make_engine(
    policy: Path | str,
    loss: Loss,
    plan: Plan,
    config: Config,
    groups: Sequence[PromptGroup],
    teacher: Path | str | None = None,
) -> Any:
    """Return an engine around the policy (an :class:`irlfast.engine.module.Policy`), with a new optimiser."""
    import deepspeed

    prepared = prepare_to_train(policy, config, groups, plan.reward)
    router_aux_loss_coef = 0.0 if plan.reward else config.router_aux_loss_coef
    with runnable(prepared.model, config):
        arrange_layers(prepared, config, groups)
        if router_aux_loss_coef:
            check_router(prepared.base, router_aux_loss_coef)
    offload = config.activation_offloading and dist.device().type != "cpu"
    if config.activation_offloading and not offload:
        log("activation_offloading: activations are in host memory already, on a CPU")
    taught_by = prepare_teacher(teacher, prepared, config, groups) if teacher else None
    kept = float32_parameters(prepared, config)
    optimizer = make_optimizer(prepared.model, plan, config)
    with contextlib.redirect_stdout(io.StringIO()):  # its optimiser for ZeRO-1 in bfloat16 prints the memory in use
        engine = deepspeed.initialize(
            model=Policy(prepared, loss, offload, router_aux_loss_coef, taught_by),
            optimizer=optimizer,
            lr_scheduler=make_scheduler(optimizer, plan, config),
            config=deepspeed_settings(config, hidden_size(prepared.base)),
            dist_init_required=False,
        )[0]
    keep_float32(kept)
    skip_reduction_of_one_process(engine)
    if config.gradient_checkpointing == "selective":
        gather_unseen(engine)
    return engine


def hidden_size(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "hidden_size", None)


def deepspeed_settings(config: Config, hidden_size: int | None = None) -> dict[str, Any]:
    """Return :func:`irlfast.config.deepspeed.merged_settings`, completed for this machine and these processes."""
    settings = merged_settings(config, hidden_size)
    zero, several = settings["zero_optimization"], dist.world_size() > 1
    if not gains_from_zero(config, dist.world_size()):
        zero["stage"] = 0
    if not zero["stage"]:
        settings["gradient_clipping"] = 0.0  # train_step clips
    on_gpu = torch.cuda.is_available()
    zero.setdefault("reduce_scatter", on_gpu)  # on a CPU it reduces everything anyway, with one more copy
    if zero["stage"] in (1, 2):  # DeepSpeed's default is false there, and true for ZeRO-3
        zero.setdefault("overlap_comm", on_gpu and several)
    return settings


def check_deepspeed(config: Config) -> None:
    """Check DeepSpeed's version, and let it read the settings of its file, before data are read.

    Raises:
        InputError: it is too old, or refuses them.
    """
    check_version()
    if not config.deepspeed:
        return
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(deepspeed_settings(config))
    except Exception as error:  # it raises Pydantic's errors, assertions, and what its own code happens to raise
        reason = " ".join(str(error).split("[type=")[0].split())
        raise InputError(f"deepspeed: {config.deepspeed} is refused by DeepSpeed ({reason})") from error
