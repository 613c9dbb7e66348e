"""DPO (arXiv 2305.18290): the loss of IRFT, on chosen and rejected answers in place of demonstrations and samples."""

import time
from pathlib import Path

from irlfast.engine.fit import finished
from irlfast.methods.irft import fit_pairs
from irlfast.methods.stages import stage_examples, stage_name, with_rejected
from irlfast.runs.run import Run


def dpo_stage(run: Run, stage: int, policy: Path | str, reference: Path | str) -> Path:
    """Train on the pairs (chosen, rejected) of the rows. Return the new policy."""
    folder = run.output / stage_name(stage)
    if finished(folder):
        return folder / "policy"
    begun = time.perf_counter()
    examples, answers = with_rejected(stage_examples(run.train, run.config, stage))
    return fit_pairs(run, stage, policy, reference, examples, answers, begun)
