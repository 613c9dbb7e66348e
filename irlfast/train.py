"""Train a policy from demonstrations: ``irlfast train CONFIG.yaml [key=value]... [--dry_run]``.

The outer loop of IRFT: fit the demonstrations (SFT) if asked for, then T times let the policy answer its prompts and
train it to prefer the demonstrations. Every step leaves its result in ``output_dir``. A step whose result is there is
skipped, so that the same command resumes a run that was stopped.
"""

import os
import sys
from pathlib import Path

from irlfast.common.command import run_command, writing_to
from irlfast.config import Config, load_config


def train(config: Config) -> None:
    """Do everything that a configuration asks for. Every process of the run calls this function."""
    from irlfast.evaluation.heldout import evaluate
    from irlfast.methods import METHODS
    from irlfast.methods.sft import sft, wants_sft
    from irlfast.methods.stages import stage_name
    from irlfast.reports.final import finish, finish_reward
    from irlfast.startup.prepare import prepare

    run = prepare(config)
    train_stage = METHODS[config.method].stage
    policies: dict[str, Path | str] = {}  # by phase
    metrics = []

    def hold_out(phase: str, policy: Path | str) -> None:
        """Evaluate the policy on the held-out demonstrations, beside the first policy that was evaluated."""
        policies[phase] = policy
        first = next(iter(policies))
        metrics.append(evaluate(run, run.output / phase, policy, run.output / first, policies[first]))

    policy = run.initial
    if not wants_sft(config) or (train_stage is None and config.model_name_or_path):
        hold_out("initial", policy)
    for phase, policy in sft(run, run.initial):
        hold_out(phase, policy)
    initial = policy
    if train_stage and not config.facts.leaves_policy:
        finish_reward(run, Path(train_stage(run, 0, policy, initial)))
        return
    if train_stage:
        for stage in range(config.stages):
            policy = train_stage(run, stage, policy, policy if config.reference == "stage" else initial)
            hold_out(stage_name(stage), policy)
    finish(run, policies, metrics)


def command() -> None:
    config, dry_run = load_config(sys.argv[1:])
    with writing_to(f"output_dir {config.output_dir}"):
        if dry_run:
            from irlfast.runs.hub import set_offline_if_unreachable

            set_offline_if_unreachable()
            from irlfast.startup.dry_run import show

            show(config)
        else:
            train(config)


def main() -> int:
    """Run the command and return the exit code of :func:`irlfast.common.command.run_command`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for torch's tensors, where Linux has them
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
