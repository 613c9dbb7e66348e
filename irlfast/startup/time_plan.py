"""The parts of a whole run, by which the time left is estimated."""

from irlfast.common.time_left import CLOCK, Part
from irlfast.methods import phases_of
from irlfast.methods.sft import wants_sft
from irlfast.runs.metrics_log import kind_of
from irlfast.runs.run import Run


def plan_time(run: Run) -> None:
    """Tell the clock of this process which parts the run has, and at which part it goes on."""
    config = run.config
    phases = phases_of(config, len(run.train), len(run.prompts))
    evaluation = len(run.held_out)
    to_evaluate = 0 if wants_sft(config) else 2 * evaluation  # the first policy also draws the answers to compare with
    parts = []
    for phase in phases:
        trained = sum(step.size for step in phase.plan().steps) * phase.answers
        parts.append(Part(f"answers for {phase.name}", "answers", phase.sampled + to_evaluate))
        parts.append(Part(phase.name, kind_of(phase.name, config.method), trained))
        to_evaluate = evaluation if f"{phase.name}/eval.json" in phase.files else 0
    parts.append(Part("last evaluation", "answers", to_evaluate))
    done = [(run.output / phase.name / "DONE").exists() for phase in phases]
    CLOCK.plan(parts, 2 * [*done, False].index(False))
