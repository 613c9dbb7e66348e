"""The reward of energy-based fine-tuning (EBFT, arXiv 2603.12248): answers whose features match the demonstration's.

The feature-matching loss of a prompt is ‖E_π[φ(ỹ)] − φ(y)‖² (its eq. 2). φ are hidden states of a frozen copy of the
policy that the first stage starts from. The policy gradient of the loss has the reward of :func:`matching_reward`.
The equation numbers are those that axolotl's EBFT page cites; the formulas were checked against the authors' code
(github.com/sjelassi/ebft_openrlhf).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.data.packing import Batch, PromptGroup
from irlfast.ops import Head
from irlfast.runs.run import Run
from irlfast.sampling.scoring import score

TOLERANCE = 1e-5  # singular values below this share of the largest one are 0


def feature_rewards(run: Run, groups: Sequence[PromptGroup], path: Path) -> Sequence[Tensor]:
    """Return the feature-matching reward ``[1, 1]`` fp64 of every answer; ``path`` keeps the features.

    Raises:
        InputError: a prompt has no demonstration to match.
    """
    config = run.config
    experts = {example.row: example.answer_ids for example in run.train}
    if not all(len(experts[group.row]) for group in groups):
        raise InputError("feature_reward: found a prompt without an answer, expected a demonstration of each prompt")
    # A scorer reads all tokens of an answer but the last. One more token, and it reads the whole answer.
    whole = [
        PromptGroup(x.prompt, tuple([*answer, run.encoder.end_id] for answer in (*x.answers, experts[x.row])))
        for x in groups
    ]
    trained = run.output / "sft" / "policy"
    model = trained if dist.on_main(trained.exists) else run.initial
    scores = score(run, model, whole, path, measure=features, depths=config.feature_reward)
    rewards = []
    for each in scores:
        *samples, expert = torch.cat(each).double()
        rewards.append(
            matching_reward(torch.stack(samples), expert, config.feature_whitening, config.feature_diversity)
        )
    return torch.cat(rewards)[:, None].split(1)


def features(hidden: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """Return the features ``[1, k·H]`` fp32 of each answer, from hidden states ``[R, k, H]`` at k depths.

    They are the states above the answer's last token that is input. Each depth's state has the length 1 before they
    are joined, and so have the joined features.
    """
    last = batch.rows[batch.cu_seqlens[1:].long() - 1]
    states = torch.nn.functional.normalize(hidden[last].float(), dim=-1) / hidden.shape[1] ** 0.5
    return states.flatten(1).cpu().split(1)


def matching_reward(samples: Tensor, expert: Tensor, whiten: bool, diversity: float) -> Tensor:
    """Return the reward ``[n]`` of n samples of one prompt, from features ``[n, D]`` and the expert's ``[D]``.

    It is 2·cos(φ_j, φ(y)) − ``diversity``·2/(n − 2)·Σ_{k≠j} φ_j·φ_k. The paper (eq. 7, and eq. 49, variant i) divides
    by n − 1. The factor (n − 1)/(n − 2) is for the baseline of RLOO: an answer's baseline is the mean reward of the
    other answers, which pay for their similarity to it too, and would take 1/(n − 1) of the price off again. With the
    factor, reward and baseline give the advantages of the authors' code. Their expectation is the gradient of the
    feature-matching loss, for ``diversity`` 1 and without ``whiten``.
    """
    if whiten:
        samples, expert = whitened(samples, expert)
    similarity = samples @ samples.T
    others = similarity.sum(1) - similarity.diagonal()
    return 2 * torch.cosine_similarity(samples, expert, -1) - diversity * 2 / (len(samples) - 2) * others


def whitened(samples: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
    """Map features by the inverse square root of Σ_j φ_j·φ_jᵀ over the prompt's samples, a pseudo-inverse.

    Samples that differ become orthonormal, so that only repeated samples pay for their similarity. The authors' code
    maps the samples to the same vectors, but leaves the direction of the expert's features.
    """
    _, values, directions = torch.linalg.svd(samples, full_matrices=False)
    kept = values > TOLERANCE * values[0]
    root = directions[kept].T / values[kept] @ directions[kept]  # [D, D]
    return samples @ root, expert @ root
