"""The start of the programs of tests that train a small Llama in one or several processes."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from irlfast.common import dist, ranks
from irlfast.engine.process_group import init_process_group
from irlfast.startup.prepare import quiet


def start_with_llama(folder: Path, dtype: torch.dtype = torch.float32, **shape: int) -> None:
    """Join the other processes. Afterwards ``model`` in the folder is a Llama of the shape, which the first makes."""
    quiet()
    ranks.join()
    init_process_group()
    if dist.is_main() and not (folder / "model").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**shape)).to(dtype).save_pretrained(folder / "model")
    dist.barrier()
