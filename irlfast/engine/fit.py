"""The inner loop: optimiser steps of a DeepSpeed engine over planned batches, checkpointed and resumed exactly."""

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError, find, read_json, remove, write, write_json, write_text
from irlfast.common.messages import Progress, log
from irlfast.config import Config
from irlfast.data.encoding import Encoder
from irlfast.data.packing import Layout, PromptGroup, pack, plan_steps
from irlfast.engine.memory import OutOfMemory, phase_limit
from irlfast.engine.module import Policy
from irlfast.engine.step import Stopwatch, add, meters, prepare, profiled, train_step
from irlfast.losses.inputs import Loss, Metrics
from irlfast.models.attention import arrange
from irlfast.models.load import freeze, load_model, save_pretrained
from irlfast.models.lora import add_lora, base_and_adapter, is_adapted, merge, revision, save_lora
from irlfast.models.moe import check_router
from irlfast.models.padding import padded_apart
from irlfast.models.steady import check_steady, recompute_layers
from irlfast.ops.common.heads import unwrapped
from irlfast.optim import FusedRMSprop
from irlfast.runs.run import Run

NOTABLE_DROP = 0.5  # nats a demonstration; the warning comes before the collapse
FALLEN = (
    "the demonstrations' log-likelihood is {:.2f} nats below the reference's; "
    "lower learning_rate, raise beta, or set nll_weight (0.2, say)"
)


class Plan(NamedTuple):
    """How a phase trains: the segments that each optimiser step takes, and the optimiser's settings."""

    stage: int  # -1 for SFT
    steps: list[np.ndarray]
    micro_batch: int  # segments a device and micro-step
    learning_rate: float
    optim: str
    reward: dict[str, Any] | None = None  # how the reward model is scored that is trained; None for a policy


def plan_phase(
    config: Config,
    count: int,
    *,
    stage: int,
    epochs: float | None,
    steps: int | None,
    learning_rate: float,
    optim: str,
    seed: list[int],
    micro_batch: int | None = None,
    reward: dict[str, Any] | None = None,
) -> Plan:
    """A phase over ``count`` segments: steps of the run's global batch, for ``epochs`` or as many as ``steps``."""
    micro_batch = micro_batch or config.per_device_train_batch_size
    batch = micro_batch * config.gradient_accumulation_steps * dist.world_size()
    chosen = plan_steps(count, batch, epochs=epochs, steps=steps, seed=[config.seed, *seed])
    return Plan(stage, chosen, micro_batch, learning_rate, optim, reward)


def fit(run: Run, folder: Path, policy: Path | str, groups: Sequence[PromptGroup], loss: Loss, plan: Plan) -> Path:
    """Train ``policy`` as planned; the result is ``folder/policy``, or a reward model in ``folder/model``.

    A kill loses at most ``save_steps`` steps: the same call goes on from the last checkpoint in ``folder``. So does one
    process that ran out of memory, by itself, with half the tokens a batch, where ``max_tokens_per_batch`` is ``auto``.

    Raises:
        InputError: where the loss or its gradient is no number any more; no policy is written then.
    """
    while not (folder / "DONE").exists():
        with contextlib.suppress(OutOfMemory):
            train_phase(run, folder, policy, groups, loss, plan)
        forget_engines()
        dist.free_memory()
    return folder / result_name(plan)


def forget_engines() -> None:
    """ZeRO-3 has a list and a cache of the modules of all engines, and so their weights and optimisers, for ever."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    for method in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # the cache is within a decorator's function
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def result_name(plan: Plan) -> str:
    return "model" if plan.reward else "policy"


def train_phase(
    run: Run,
    folder: Path,
    policy: Path | str,
    groups: Sequence[PromptGroup],
    loss: Loss,
    plan: Plan,
) -> None:
    config = run.config
    engine, layout = make_engine(policy, loss, plan, config, groups)
    limit = phase_limit(config, groups, layout, plan.micro_batch, folder / "checkpoint")
    first = resume(engine, folder / "checkpoint", config)
    phase = folder.relative_to(run.output).as_posix()
    run.metrics_log.begin(phase, first)
    window: Metrics = {}
    done: Counter[str] = Counter()
    steps = len(plan.steps)
    warned = False
    watch = Stopwatch()
    batches = prepare(plan.steps[first:], groups, layout, limit)
    with (
        Progress(phase, steps, "step", first) as progress,
        profiled(config.profile and dist.is_main(), folder / "trace.json") as profile_step,
        watch.telling_communication(),
        limit.backing_off(folder / "checkpoint"),
    ):
        for step, prepared in enumerate(batches, first + 1):
            metrics, grad_norm = train_step(engine, prepared, config.max_grad_norm, watch)
            window, done = add(window, metrics), done + prepared.work
            profile_step()
            progress.advance()
            # On a CPU every norm is looked at; a GPU would be waited for, so there it is those of logged steps.
            sound = dist.device().type != "cpu" or math.isfinite(grad_norm or 0.0)
            if sound and step % config.logging_steps and step < steps:
                continue
            row: dict[str, Any] = {"phase": phase, "stage": plan.stage, "step": step}
            row["epoch"] = step * plan.steps[0].size / len(groups)
            row |= summarise(window) | {"grad_norm": float(grad_norm or 0.0), "learning_rate": engine.get_lr()[0]}
            row |= meters(engine.module.model, done, watch.read())
            window, done = {}, Counter()
            run.metrics_log.write(row)
            progress.tell(postfix(row))
            for name in ("loss", "grad_norm"):  # clipping would turn an infinite gradient into none
                if not math.isfinite(row[name]):
                    raise InputError(f"{phase}, step {step}: {name} is {row[name]}; try a lower learning_rate")
            drop = row["logps/reference"] - row["logps/chosen"] if "logps/reference" in row else 0.0
            if drop > NOTABLE_DROP and not warned:
                warned = True
                log(f"warning: {phase}, step {step}: {FALLEN.format(drop)}")
            if config.max_expert_drop and drop > config.max_expert_drop:
                log(f"{phase} ends at step {step}: {drop:.2f} nats are more than max_expert_drop")
                break
            if config.save_steps and step % config.save_steps == 0 and step < steps:
                save_checkpoint(engine, folder / "checkpoint", step, config)
    save_model(engine, policy, folder / result_name(plan), run.encoder, plan, config)
    engine.destroy()
    if dist.is_main():
        write_text(folder / "DONE", "")
        remove(folder / "checkpoint")
    dist.barrier()


def summarise(window: Metrics) -> dict[str, float]:
    """Means over the segments of all processes. Only here do figures leave the device."""
    names = sorted(window)
    values = dist.sum_over_ranks(torch.stack([window[name].double() for name in names])).tolist()
    sums = dict(zip(names, values, strict=True))
    count = sums.pop("count")
    return {name: value / count for name, value in sums.items()}


def postfix(row: dict[str, Any]) -> str:
    """The figures that matter, for the progress bar."""
    shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies", "logp": "logps/chosen"}
    metrics = [f"{label} {row[name]:.3g}" for label, name in shown.items() if name in row]
    utilisation = [f"MFU {row['mfu']:.0%}"] if "mfu" in row else []
    return "  ".join([*metrics, f"{row['answer_tokens_per_second']:,.0f} answer tokens/s", *utilisation])


# ---------------------------------------------------------------- DeepSpeed


def make_engine(
    policy: Path | str, loss: Loss, plan: Plan, config: Config, groups: Sequence[PromptGroup]
) -> tuple[Any, Layout]:
    """A DeepSpeed engine around the policy, its optimiser in its first state; and how segments are packed for it."""
    import deepspeed
    import transformers

    model = new_model(policy, plan, config, in_4bit=config.load_in_4bit).to(dist.device()).eval()
    layout = arrange(model, config, groups)
    balance = 0.0 if plan.reward else config.router_aux_loss_coef
    if balance:
        check_router(unwrapped(model), balance)
    if config.gradient_checkpointing:
        recompute_layers(model, selective=config.gradient_checkpointing == "selective")
    check_steady(model, pack(groups[:1], layout).to(dist.device()))
    if config.torch_compile:
        compile_layers(model)
    offload = config.activation_offloading and dist.device().type != "cpu"
    if config.activation_offloading and not offload:
        log("activation_offloading: activations are in host memory already, on a CPU")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kinds = {"rmsprop": FusedRMSprop, "adamw_torch": torch.optim.AdamW}
    optimizer = kinds[plan.optim](parameters, lr=plan.learning_rate, weight_decay=config.weight_decay)
    precise = kept_in_float32(model, config)
    steps = len(plan.steps)
    scheduler = transformers.get_scheduler(
        config.lr_scheduler_type, optimizer, round(config.warmup_ratio * steps), num_training_steps=steps
    )
    engine = deepspeed.initialize(
        model=Policy(model, loss, offload, balance),
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_settings(config),
        dist_init_required=False,
    )[0]
    for parameter, values in precise:
        parameter.data = values
    if dist.world_size() == 1 and isinstance(engine.optimizer, torch.optim.Optimizer):
        engine.enable_backward_allreduce = False  # nothing to reduce, but DeepSpeed would copy the gradients to do it
    return engine, layout


def kept_in_float32(model: Any, config: Config) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """Frozen parameters that a 16-bit model keeps in 32, and their values, which DeepSpeed rounds to 16 bits.

    Raises:
        InputError: one is in training, or ZeRO-3 would split it.
    """
    if config.dtype == "float32":
        return []
    kept = {name: parameter for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    if kept and (config.zero_stage == 3 or any(parameter.requires_grad for parameter in kept.values())):
        raise InputError(
            f"dtype: {type(unwrapped(model)).__name__} keeps {next(iter(kept))} in float32 beside bfloat16, which "
            "DeepSpeed would round; expected dtype float32, or use_peft with a zero_stage below 3"
        )
    return [(parameter, parameter.data) for parameter in kept.values()]


def new_model(name: Path | str, plan: Plan, config: Config, in_4bit: bool = False) -> Any:
    """The model as a phase starts to train it: with LoRA or without, and of a reward model, lower layers frozen."""
    model = load_model(name, config, config.reward_heads if plan.reward else 0, in_4bit)
    if config.use_peft and not is_adapted(model):
        model = add_lora(model, config, reward=bool(plan.reward))
    if plan.reward:
        model.config.irlfast_reward = plan.reward
        freeze(model, config.reward_frozen_layers)
    return model


def compile_layers(model: Any) -> None:
    """Compile every layer in place, once for all of them and for batches of any shape."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON for this run; the user's own is merged over it."""
    alone = dist.world_size() == 1 and config.dtype == "float32" and not config.deepspeed  # ZeRO would only copy
    stage = 0 if alone else config.zero_stage
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # train_step divides by the sizes itself
        "gradient_clipping": config.max_grad_norm if stage else 0.0,
        # An infinite gradient is to be told, not skipped in silence, and looking for it waits for a GPU.
        "bf16": {"enabled": config.dtype == "bfloat16", "check_grad_overflow": False},
        "zero_optimization": {
            "stage": stage,
            "reduce_scatter": torch.cuda.is_available(),  # on a CPU it reduces all the same, with a copy more
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    own = read_json(find(config.deepspeed)) if config.deepspeed else {}  # type: ignore[arg-type]
    for name, value in own.items():
        both = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = settings[name] | value if both else value
    return settings


def adapters_alone(engine: Any, config: Config) -> bool:
    """Whether checkpoints leave out the frozen base, which is loaded anyway; ZeRO-3 has it in parts."""
    return config.use_peft and engine.zero_optimization_stage() < 3


def save_checkpoint(engine: Any, folder: Path, step: int, config: Config) -> None:
    """Everything that the next step needs. ``progress.json`` names the newest whole checkpoint; others then go."""
    tag, light = f"step-{step}", adapters_alone(engine, config)
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=light)
    dist.barrier()
    if dist.is_main():
        write_json(folder / "progress.json", {"step": step, "tag": tag, "processes": dist.world_size()})
        for old in folder.glob("step-*"):
            if old.name != tag:
                remove(old)


def resume(engine: Any, folder: Path, config: Config) -> int:
    """Load the newest checkpoint, if any; returns the steps already made."""
    path = folder / "progress.json"
    if not path.exists():
        return 0
    progress = read_json(path)
    if progress["processes"] != dist.world_size():
        log(
            f"{folder.parent.name} starts anew: its checkpoint was written by {progress['processes']} processes, "
            f"and these are {dist.world_size()}"
        )
        return 0
    engine.load_checkpoint(str(folder), tag=progress["tag"], load_module_strict=not adapters_alone(engine, config))
    return progress["step"]


def save_model(engine: Any, start: Path | str, folder: Path, encoder: Encoder, plan: Plan, config: Config) -> None:
    """Write the trained weights in Hugging Face's format, gathered from all processes.

    Of LoRA it is the policy's adapter alone; a reward model's is merged into what it began as, ``start``.
    """
    model, state = engine.module.model, gathered(engine, trained_alone=config.use_peft)
    if not dist.is_main():
        return
    if config.use_peft and not plan.reward:
        base, _ = base_and_adapter(start)
        at = revision(start, config)
        write(folder, lambda temporary: save_lora(temporary, model, state, base, at, encoder.tokenizer))
        return
    if config.use_peft:
        adapted = new_model(start, plan, config)
        adapted.load_state_dict(state, strict=False)
        model = merge(adapted, str(folder))
        state = model.state_dict()
    tokenizer = padded_apart(model, encoder, state) if plan.reward else encoder.tokenizer
    write(folder, lambda temporary: save_pretrained(temporary, model, tokenizer, state))


def gathered(engine: Any, trained_alone: bool) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers, or the parameters in training; the main process alone has them.

    Tied weights are one tensor under all of their names, as Transformers' ``save_pretrained`` finds them by.
    """
    import deepspeed

    copies: dict[int, Tensor] = {}
    state = engine.module.model.state_dict(keep_vars=True)
    wanted = {name: tensor for name, tensor in state.items() if tensor.requires_grad or not trained_alone}
    for tensor in {id(tensor): tensor for tensor in wanted.values()}.values():
        split = engine.zero_optimization_stage() == 3 and isinstance(tensor, torch.nn.Parameter)
        with deepspeed.zero.GatheredParameters([tensor], enabled=split):
            if dist.is_main():
                copies[id(tensor)] = tensor.detach().cpu().clone()
    return {name: copies[id(tensor)] for name, tensor in wanted.items()} if dist.is_main() else {}
