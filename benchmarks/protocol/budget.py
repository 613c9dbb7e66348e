"""Count the tokens that an arm puts through models, and price each kind of token."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

# Forward passes per token. A backward pass costs two. Sampling is a forward pass per token, as scoring is; on a real
# machine it is slower per token, so the table shows seconds beside the budget.
PRICES = {"trained": 3, "sampled": 1, "scored": 1}
PADDING = 0  # the id of the end token, which tokenizers of train_tokenizer also pad with


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the tokens that enter any model's embedding within the context, without padding.

    - ``trained``: with a gradient, so forward and backward;
    - ``sampled``: one token per row at a time, from the cache of the others;
    - ``scored``: all others, such as a reference's or a teacher's, and the prompts of samples.

    An end token is never the input of a policy. A reward model reads each answer's end token, which is not counted.
    """
    counts: Counter[str] = Counter()

    def count(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            (ids,) = inputs
            kind = "trained" if torch.is_grad_enabled() else "sampled" if ids.shape[-1] == 1 else "scored"
            counts[kind] += int((ids != PADDING).sum())

    hook = register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


def price(counts: dict[str, int]) -> int:
    """Return the forward passes of one token each that the counted tokens cost."""
    return sum(PRICES[kind] * count for kind, count in counts.items())
