"""Reference scores: log-probability of every answer token under a frozen policy, computed once and cached (DESIGN §4).

Per token, because a sequence's log-ratio must be summed over per-token differences to stay exact.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from irlfast import dist, ops
from irlfast.attention import arrange, hidden_states, token_limit
from irlfast.config import Config
from irlfast.files import write
from irlfast.losses import arguments
from irlfast.model import load_model
from irlfast.ops import lm_head
from irlfast.pack import Segment, micro_batches, pack
from irlfast.run import Run


def score(run: Run, policy: Path | str, segments: list[Segment], path: Path) -> list[tuple[Tensor, ...]]:
    """Log-probabilities under ``policy``: for every segment and answer an fp32 tensor with one value a token.

    ``path`` caches them: ``logps`` ``[N]`` with ``lengths`` of the answers in order. Each process scores its share.
    """
    if not path.exists():
        scores: dict[int, tuple[Tensor, ...]] = {}
        for part in dist.all_gather(score_share(run.config, policy, segments, path)):
            scores |= part
        if dist.is_main():
            write(path, lambda temporary: save_scores(temporary, [scores[i] for i in range(len(segments))]))
        dist.barrier()
    flat = load_file(path)
    answers = iter(flat["logps"].split(flat["lengths"].tolist()))
    return [tuple(next(answers) for _ in segment.answers) for segment in segments]


@torch.no_grad()
def score_share(
    config: Config, policy: Path | str, segments: list[Segment], path: Path
) -> dict[int, tuple[Tensor, ...]]:
    """This process's share of the scores, by the numbers of the segments."""
    model = load_model(policy, config).to(dist.device()).eval()
    layout, head = arrange(model, config), lm_head(model)
    limit = token_limit(config, segments, layout, config.per_device_eval_batch_size)
    batches = micro_batches(range(len(segments)), segments, layout, limit, dist.rank(), dist.world_size())
    scores: dict[int, tuple[Tensor, ...]] = {}
    label = f"{path.parent.name}/{path.stem}"
    with tqdm(total=sum(map(len, batches)), desc=label, unit="segment", disable=not dist.is_main()) as bar:
        for chosen in filter(None, batches):
            batch = pack([segments[i] for i in chosen], layout).to(dist.device())
            hidden = hidden_states(model, batch)
            logps = ops.log_ratio(hidden, **arguments(head, batch)).token_logps.cpu()
            answers = iter(logps.split(batch.cu_seqlens.diff().tolist()))
            for i in chosen:
                scores[i] = tuple(next(answers) for _ in segments[i].answers)
            bar.update(len(chosen))
    return scores


def save_scores(path: Path, scores: list[tuple[Tensor, ...]]) -> None:
    flat = [logps for answers in scores for logps in answers]
    lengths = torch.tensor([logps.numel() for logps in flat], dtype=torch.int32)
    save_file({"logps": torch.cat(flat), "lengths": lengths}, path)
