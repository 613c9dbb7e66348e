"""The DeepSpeed engine of a phase, and DeepSpeed's settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from irlfast.common import dist
from irlfast.common.files import find_path, read_json
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.engine.deepspeed_patches import float32_parameters, keep_float32, skip_reduction_of_one_process
from irlfast.engine.layers import arrange_layers
from irlfast.engine.module import Policy
from irlfast.engine.optim import make_optimizer, make_scheduler
from irlfast.engine.plan import Plan
from irlfast.engine.teacher import prepare_teacher
from irlfast.losses.inputs import Loss
from irlfast.models.moe import check_router
from irlfast.models.prepare import prepare_to_train


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
    arrange_layers(prepared, config, groups)
    router_aux_loss_coef = 0.0 if plan.reward else config.router_aux_loss_coef
    if router_aux_loss_coef:
        check_router(prepared.base, router_aux_loss_coef)
    offload = config.activation_offloading and dist.device().type != "cpu"
    if config.activation_offloading and not offload:
        log("activation_offloading: activations are in host memory already, on a CPU")
    taught_by = prepare_teacher(teacher, prepared, config, groups) if teacher else None
    kept = float32_parameters(prepared, config)
    optimizer = make_optimizer(prepared.model, plan, config)
    engine = deepspeed.initialize(
        model=Policy(prepared, loss, offload, router_aux_loss_coef, taught_by),
        optimizer=optimizer,
        lr_scheduler=make_scheduler(optimizer, plan, config),
        config=deepspeed_settings(config),
        dist_init_required=False,
    )[0]
    keep_float32(kept)
    skip_reduction_of_one_process(engine)
    return engine


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """Return DeepSpeed's JSON for this run, with the file that ``deepspeed`` names merged over it."""
    # One process in float32 gains nothing from ZeRO, which would only copy.
    alone = dist.world_size() == 1 and config.dtype == "float32" and not config.deepspeed
    stage = 0 if alone else config.zero_stage
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # train_step divides by the sizes itself
        "gradient_clipping": config.max_grad_norm if stage else 0.0,
        # fit reports an infinite gradient. DeepSpeed's own check would skip the step silently, and wait for the GPU.
        "bf16": {"enabled": config.dtype == "bfloat16", "check_grad_overflow": False},
        "zero_optimization": {
            "stage": stage,
            "reduce_scatter": torch.cuda.is_available(),  # on a CPU it reduces everything anyway, with one more copy
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    own = read_json(find_path(config.deepspeed)) if config.deepspeed else {}  # type: ignore[arg-type]
    for name, value in own.items():
        both = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = settings[name] | value if both else value
    return settings
