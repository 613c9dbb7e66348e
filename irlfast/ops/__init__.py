"""The public operations, one folder each: log-ratios and pair losses, the same from logits, and reward heads.

Each folder has the public function (``public.py``), the oracle in plain PyTorch, and a module per
backend.
"""

from irlfast.ops.common.heads import Head, lm_head
from irlfast.ops.common.labels import FlatLabels, flatten_labels
from irlfast.ops.common.types import LogRatio, PairLoss, TokenStatistics
from irlfast.ops.divergence.public import token_divergence
from irlfast.ops.logits.public import logits_log_ratio, token_logps, token_statistics
from irlfast.ops.pair_loss.public import log_ratio, pair_loss
from irlfast.ops.rewards.public import DiscriminatorLoss, discriminator_loss, discriminator_reward, reward_head

__all__ = [
    "DiscriminatorLoss",
    "FlatLabels",
    "Head",
    "LogRatio",
    "PairLoss",
    "TokenStatistics",
    "discriminator_loss",
    "discriminator_reward",
    "flatten_labels",
    "lm_head",
    "log_ratio",
    "logits_log_ratio",
    "pair_loss",
    "reward_head",
    "token_divergence",
    "token_logps",
    "token_statistics",
]
