"""The table of pair losses in docs/kernels.md: ``python -m tests.helpers.losses_page`` writes it anew."""

import re
from pathlib import Path

from irlfast.ops.pair_loss.losses import PAIR_LOSSES

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
BETWEEN = re.compile(r"(?<=<!-- pair losses -->\n\n).*?(?=\n\n<!-- /pair losses -->)", re.S)


def table() -> str:
    rows = [f"| `{name}` | {kind.formula} | {linked(kind.source)} |" for name, kind in PAIR_LOSSES.items()]
    return "\n".join(["| `loss_type` | loss | source |", "| --- | --- | --- |", *rows])


def linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


if __name__ == "__main__":
    PAGE.write_text(BETWEEN.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
