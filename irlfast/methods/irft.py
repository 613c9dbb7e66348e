"""One stage of IRFT (arXiv 2405.17888, algorithm 2); with its preset, one of SPIN (arXiv 2401.01335, algorithm 1)."""

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from irlfast.common import dist
from irlfast.common.files import InputError, write_json
from irlfast.common.messages import log
from irlfast.config import Config
from irlfast.data.packing import PromptGroup
from irlfast.data.store import Example, TokenIds
from irlfast.engine.fit import fit
from irlfast.engine.plan import Plan, plan_phase
from irlfast.losses.pairs import irft_loss
from irlfast.runs.run import Run
from irlfast.sampling.generation import Sampling, read_samples, sample
from irlfast.sampling.scoring import score


def stage_name(stage: int) -> str:
    return f"stage-{stage:02d}"


def irft_stage(run: Run, stage: int, policy: Path | str, reference: Path | str) -> Path:
    """Sample answers ỹ ~ π_θ to this stage's prompts, then train on the pairs (y, ỹ); returns the new policy."""
    config, folder = run.config, run.output / stage_name(stage)
    if (folder / "DONE").exists():
        return folder / "policy"
    begun = time.perf_counter()
    examples = stage_examples(run.train, config, stage)
    if config.method == "dpo":
        examples, answers = with_rejected(examples)
    else:
        answers = sample(run, policy, examples, folder / "samples", sampling(config, stage))
    sampled = time.perf_counter()
    pairs, counts = make_pairs(run, stage, examples, answers)
    # With 4 bits the reference is on the quantised base, as the policy in training: it starts at a log-ratio of 0.
    ref_logps = score(run, reference, pairs, folder / "reference.safetensors", in_4bit=config.load_in_4bit)
    pairs = [pair._replace(ref_logps=logps) for pair, logps in zip(pairs, ref_logps, strict=True)]
    if dist.is_main() and not (folder / "pairs.json").exists():
        seconds = {"sample_seconds": sampled - begun, "score_seconds": time.perf_counter() - sampled}
        write_json(folder / "pairs.json", counts | seconds)
    loss = functools.partial(
        irft_loss, beta=config.at("beta", stage), loss_type=config.loss_type, nll_weight=config.nll_weight
    )
    return fit(run, folder, policy, pairs, loss, irft_plan(config, stage, len(pairs)))


def stage_examples(examples: list[Example], config: Config, stage: int) -> list[Example]:
    """All examples, or the stage's share of them in the order of a seeded shuffle."""
    if config.prompts_per_stage == "all":
        return examples
    order = np.random.default_rng([config.seed, 1]).permutation(len(examples))
    return [examples[i] for i in np.array_split(order, config.stages)[stage]]


def with_rejected(examples: list[Example]) -> tuple[list[Example], list[TokenIds]]:
    """The examples that have a rejected answer to the same prompt, and those answers."""
    found = [(example, example.rejected_ids) for example in examples if example.rejected_ids is not None]
    if not found:
        raise InputError("no demonstration has a rejected answer to the prompt; expected rows of chosen and rejected")
    if len(found) < len(examples):
        log(f"{len(examples) - len(found):,} of {len(examples):,} rows have no rejected answer to the prompt: left out")
    kept, answers = zip(*found, strict=True)
    return list(kept), list(answers)


def sampling(config: Config, stage: int) -> Sampling:
    seed = (config.seed * 1000 + stage) * 100_000  # a shard adds its number
    return Sampling(config.at("temperature", stage), config.top_p, config.top_k, seed)


def make_pairs(
    run: Run, stage: int, examples: list[Example], answers: Sequence[TokenIds], keep_identical: bool = False
) -> tuple[list[PromptGroup], dict[str, int]]:
    """Segments (prompt, (expert, synthetic)) of this stage and of ``history`` earlier ones.

    An empty synthetic answer has no tokens, and one equal to the expert's teaches a loss of differences nothing: its
    pair's gradient is zero. A discriminator must see it (``keep_identical``), or it would learn another density.
    """
    pairs = [PromptGroup(x.prompt_ids, (x.answer_ids, answer)) for x, answer in zip(examples, answers, strict=True)]
    fresh = len(pairs)
    for earlier in range(max(0, stage - run.config.history), stage):
        old = read_samples(run.output / stage_name(earlier) / "samples")
        prompts = stage_examples(run.train, run.config, earlier)
        pairs += [PromptGroup(x.prompt_ids, (x.answer_ids, answer)) for x, answer in zip(prompts, old, strict=True)]
    counts = {
        "dropped_identical": 0 if keep_identical else sum(pair.answers[0] == pair.answers[1] for pair in pairs),
        "dropped_empty": sum(not pair.answers[1] for pair in pairs),
        "from_history": len(pairs) - fresh,
        "synthetic_tokens": sum(map(len, answers)),
    }
    kept = [pair for pair in pairs if pair.answers[1] and (keep_identical or pair.answers[0] != pair.answers[1])]
    if not kept:
        raise InputError(
            f"{stage_name(stage)}: all {len(pairs)} synthetic answers equal the expert's or are empty; "
            "expected some that differ (nothing is left to learn, or temperature is too low)"
        )
    return kept, {"pairs": len(kept)} | counts


def irft_plan(config: Config, stage: int, count: int) -> Plan:
    return plan_phase(
        config,
        count,
        stage=stage,
        epochs=config.at("inner_epochs", stage),
        steps=config.at("inner_steps", stage),
        learning_rate=config.at("learning_rate", stage),
        optim=config.optim,
        seed=[2, stage],
    )
