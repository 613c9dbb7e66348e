"""Train a policy from demonstrations: ``irlfast train CONFIG.yaml [key=value]... [--dry_run]``.

The outer loop of IRFT: fit the demonstrations if asked (SFT), then T times let the policy answer its prompts and train
it to prefer the demonstrations. Every step leaves its result in ``output_dir`` and is passed over when that is there,
so the same command goes on where it was stopped.
"""

import os
import sys
from pathlib import Path

from irlfast.common.command import exit_code, writing_to
from irlfast.config import Config, load_config


def train(config: Config) -> None:
    """Everything that a configuration asks for; called in every process of the run."""
    from irlfast.evaluation.heldout import evaluate
    from irlfast.methods.irft import irft_stage, stage_name
    from irlfast.methods.reward import learn_reward
    from irlfast.methods.rft import rft_stage
    from irlfast.methods.sft import sft, wants_sft
    from irlfast.reports.final import finish, finish_reward
    from irlfast.startup.prepare import prepare

    run = prepare(config)
    policy = run.initial
    policies: dict[str, Path | str] = {}
    metrics = []

    def hold_out(phase: str) -> None:
        """Hold the policy against the held-out demonstrations, and against the first policy that was."""
        policies[phase] = policy
        first = next(iter(policies))
        metrics.append(evaluate(run, run.output / phase, policy, run.output / first, policies[first]))

    if not wants_sft(config) or (config.method == "sft" and config.model_name_or_path):
        hold_out("initial")
    if wants_sft(config):
        policy = sft(run, policy)
        hold_out("sft")
    first = policy
    if config.method == "reward":
        reward = learn_reward(run, 0, policy)
        finish_reward(run, reward)
        return
    stage_of = rft_stage if config.method in ("rft", "afd") else irft_stage
    for stage in range(0 if config.method == "sft" else config.stages):
        policy = stage_of(run, stage, policy, policy if config.reference == "stage" else first)
        hold_out(stage_name(stage))
    finish(run, policies, metrics)


def command() -> None:
    config, dry_run = load_config(sys.argv[1:])
    with writing_to(f"output_dir {config.output_dir}"):
        if dry_run:
            from irlfast.runs.hub import stay_offline_where_cut_off

            stay_offline_where_cut_off()
            from irlfast.startup.dry_run import show

            show(config)
        else:
            train(config)


def main() -> int:
    """Exit codes as :func:`irlfast.common.command.exit_code` says."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for torch's tensors, where Linux has them to give
    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
