"""Started by test_plan_memory.py: the bytes of the tensors that a real DeepSpeed engine holds beside its activations.

The arguments are a folder, which gets a small model, and JSON objects of configuration keys. Prints JSON: for every
object, the most bytes that a process held at the ends of backward passes and of the optimiser's updates. Without ZeRO,
also when the gradients of several processes have been reduced in one flat copy.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from irlfast.common import dist
from irlfast.config import Config, make_config
from irlfast.data.packing import PromptGroup, pack
from irlfast.engine.deepspeed_engine import make_engine
from irlfast.engine.deepspeed_patches import keep_head_whole, release_zero3_engines
from irlfast.engine.plan import plan_phase
from irlfast.engine.process_group import init_process_group
from irlfast.engine.step import reduced_together
from irlfast.losses.inputs import Normalisers
from irlfast.losses.sft import sft_loss
from irlfast.startup.prepare import quiet
from tests.helpers.results import print_results

GROUPS = [PromptGroup([1, 2, 3], ([4, 5, 2],))] * 4
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}


def live_bytes() -> int:
    """Return the bytes of all tensors that this process has made since ``gc.freeze``; a storage counts once."""
    dist.barrier()  # gloo's threads have let go of what they sent before
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.device.type == "cpu"]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def most_bytes(config: Config, folder: Path) -> int:
    """Take two steps of two micro-batches, and return the most bytes that were held."""
    gc.collect()
    gc.freeze()  # what was there before is looked at no more
    held = [0]
    plan = plan_phase(
        config, len(GROUPS), stage=None, epochs=None, steps=2, learning_rate=1e-3, optim=config.optim, seed=[0]
    )
    engine = make_engine(folder, sft_loss, plan, config, GROUPS)
    updates: Any = engine.basic_optimizer
    hook = updates.register_step_post_hook(lambda *_: held.append(live_bytes()))
    unflatten = engine.unflatten
    engine.unflatten = lambda flat, like: held.append(live_bytes()) or unflatten(flat, like)
    batch = pack(GROUPS[:2], engine.module.prepared.layout)
    for _ in range(2):
        keep_head_whole(engine)
        with reduced_together(engine):
            for last in (False, True):
                engine.set_gradient_accumulation_boundary(last)
                engine.backward(engine(batch, Normalisers(2.0, 6.0))[0])
                held.append(live_bytes())
        engine.step()
    hook.remove()
    engine.destroy()
    release_zero3_engines()
    return max(held)


def main() -> None:
    folder = Path(sys.argv[1])
    quiet()
    init_process_group(600)
    if dist.is_main():
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **heads)).save_pretrained(folder)
    dist.barrier()
    results = {}
    for keys in sys.argv[2:]:
        given = {"dataset_name": __file__, "model_name_or_path": str(folder), "method": "sft"}
        config = make_config(given | json.loads(keys))
        results[keys] = max(dist.all_gather_object(most_bytes(config, folder)))
    print_results(results)


if __name__ == "__main__":
    main()
