"""A call that compiled code makes between two graphs.

Import this module in the branch that needs it: it imports torch._dynamo, which takes a second and imports Triton.
"""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="loss_type of pair_loss is a function: it is called between two graphs. Only a named loss can be in a graph"
)
def untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
