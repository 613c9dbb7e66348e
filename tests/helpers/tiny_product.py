"""Started by a test: print how many products of numbers near 1e-40 are not 0 in the process of a run."""

import torch

from irlfast.engine.process_group import init_process_group

if __name__ == "__main__":
    init_process_group()
    print((torch.full((1_000_000,), 1e-30) * 1e-10).count_nonzero().item())
