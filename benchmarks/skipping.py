"""Measure the share of tiles that ``pair_loss(skip_mass=…)`` keeps: ``python -m benchmarks.skipping``.

Hidden states and head are those of the trained cases (:func:`benchmarks.measure.trained`). The script applies the rule
of ``irlfast.ops.pair_loss`` by plain PyTorch in fp32, on any device, and writes a result.
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.conftest import write_result
from benchmarks.measure import Case, make_inputs
from benchmarks.peers import BETA, Inputs, irlfast

TOKENS, COLUMNS = 64, 128  # of a tile
SKIP_MASSES = (2**-20, 2**-16, 2**-12, 2**-8)


@torch.no_grad()
def weights_of_tiles(inputs: Inputs) -> Tensor:
    """Return the weight of each tile, divided by max |g|: ``[blocks of tokens, V / COLUMNS]``."""
    expert, synthetic = irlfast(inputs).log_ratio.chunk(2)
    g = torch.sigmoid(-BETA * (expert - synthetic))  # the derivatives' common factors cancel
    parts = []
    for states, targets, share in zip(inputs.hidden, inputs.targets, (g / g.max()).repeat(2), strict=True):
        for hidden, y in zip(states.split(TOKENS), targets.split(TOKENS), strict=True):
            derivatives = (hidden.float() @ inputs.weight.float().T).softmax(1)
            derivatives.scatter_(1, y[:, None], 1 - derivatives.gather(1, y[:, None]))
            mass = F.pad(derivatives, (0, -len(inputs.weight) % COLUMNS)).unflatten(1, (-1, COLUMNS)).sum(2)
            parts.append((share * mass).amax(0))
    return torch.stack(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="a small shape, to check that the script runs")
    arguments = parser.parse_args()
    vocabulary, hidden = (1000, 64) if arguments.quick else (arguments.vocabulary, arguments.hidden)
    case = Case("skipping", (), 4, 64 if arguments.quick else 256, hidden, vocabulary, "bfloat16", trained=True)
    weights = weights_of_tiles(make_inputs(case))
    kept = {skip_mass: (weights > skip_mass).float().mean().item() for skip_mass in SKIP_MASSES}
    for skip_mass, share in kept.items():
        print(f"skip_mass {skip_mass:.1e}: {share:.1%} of the tiles are kept")
    print(f"written to {write_result('skipping', case._asdict() | {'kept': kept})}")


if __name__ == "__main__":
    main()
