"""Train a policy from demonstrations: ``irlfast train CONFIG.yaml [key=value]... [--dry_run]``.

The outer loop of IRFT: fit the demonstrations (SFT) if asked for, then T times let the policy answer its prompts and
train it to prefer the demonstrations. Every step leaves its result in ``output_dir``. A step whose result is there is
skipped, so that the same command resumes a run that was stopped.
"""

import functools
import os
import sys
from pathlib import Path

from irlfast.common import watchdog
from irlfast.common.command import run_command, writing_to
from irlfast.common.files import home_path
from irlfast.common.launch import start_processes
from irlfast.config import Config, load_config
from irlfast.config.checks import remarks


def train(config: Config) -> None:
    """Do everything that a configuration asks for. Every process of the run calls this function."""
    from irlfast.evaluation.heldout import evaluate, held_out_asks
    from irlfast.methods import METHODS, ask_early, asks_of
    from irlfast.methods.sft import sft
    from irlfast.methods.stages import check_policy_left, delete_policies, stage_name, wants_sft
    from irlfast.reports.final import choose, finish, finish_reward
    from irlfast.sampling.generation import sample_ahead
    from irlfast.startup.disk import check_room, plan_disk
    from irlfast.startup.prepare import prepare
    from irlfast.startup.time_plan import plan_time

    run = prepare(config)
    plan_time(run)
    needs = plan_disk(run)
    check_room(run.output, needs)
    check = functools.partial(check_room, run.output, needs)
    run = run._replace(check_room=check, ask_early=functools.partial(ask_early, run))
    train_stage = METHODS[config.method].stage
    policies: dict[str, Path | str] = {}  # by phase
    metrics = []

    def evaluate_policy(phase: str) -> None:
        """Evaluate a phase's policy on the held-out demonstrations, beside the first phase's policy."""
        first = next(iter(policies))
        metrics.append(evaluate(run, run.output / phase, policies[phase], run.output / first, policies[first]))

    def end_phase(phase: str, policy: Path | str, following: int = 0) -> None:
        """Evaluate a phase's policy, if asked to. The stage ``following`` starts from the policy, if there is one.

        One start of the sampler makes the held-out answers and those that the following stage asks for.
        """
        policies[phase] = policy
        if config.eval_every_stage or len(policies) == 1:
            asks = held_out_asks(run, run.output / phase, is_first=len(policies) == 1)
            sample_ahead(policy, [*asks, *(asks_of(run, following) if phase != "sft-nll" else ())])
            evaluate_policy(phase)

    policy = run.initial
    if not wants_sft(config) or (train_stage is None and config.model_name_or_path):
        end_phase("initial", policy)
    for phase, policy in sft(run, run.initial):
        end_phase(phase, policy)
    initial = policy
    if train_stage and not config.facts.leaves_policy:
        finish_reward(run, Path(train_stage(run, 0, policy, initial)))
        return
    if train_stage:
        for stage in range(config.stages):
            check_policy_left(run, stage, policy)
            check_room(run.output, needs)
            policy = train_stage(run, stage, policy, policy if config.reference == "stage" else initial)
            end_phase(stage_name(stage), policy, stage + 1)
            delete_policies(run, stage, best=choose(config, metrics)[0])
    if metrics[-1]["phase"] != [*policies][-1]:
        evaluate_policy([*policies][-1])
    finish(run, policies, metrics)


def command() -> None:
    config, dry_run = load_config(sys.argv[1:])
    if not dry_run:
        start_processes("irlfast.train", config.num_processes, config.preemption_grace)
    for remark in remarks(config):
        from irlfast.common.messages import log

        log(remark)
    with writing_to(config.output_dir, "output_dir"):
        if dry_run:
            from irlfast.runs.hub import set_offline_if_unreachable

            set_offline_if_unreachable()
            from irlfast.startup.dry_run import show

            show(config)
        else:
            watchdog.start(home_path(config.output_dir), config.stall_timeout)
            train(config)


def main() -> int:
    """Run the command and return the exit code of :func:`irlfast.common.command.run_command`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for torch's tensors, where Linux has them
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
