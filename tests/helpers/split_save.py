"""Started by test_split_save.py in two processes: save policies that ZeRO-3 has split.

The argument is a folder. Prints JSON: the peak of the main process's resident memory while it saves a model, less what
it had before, as a share of the model's weights, by shards and by gathering the whole; for each small model, what
differs from the model it is; and the sentence that refuses a weight that is not finite, with what is left on disk then.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.engine.checkpoint import gather_state, save_model
from irlfast.engine.process_group import init_process_group
from irlfast.models.prepare import prepare_to_train
from irlfast.models.split_save import save_shards
from irlfast.startup.prepare import quiet
from tests.helpers.results import print_results
from tests.helpers.split_load import GROUPS, KEYS, LARGE, SMALL, resident
from tests.helpers.tokenizers_like import pythia

NAMES = ("plain", "tied", "bfloat16")
LARGE_SHARD, SMALL_SHARD = 24 << 20, 10_000  # bytes


def split(folder: Path, name: str) -> Any:
    keys = {"dataset_name": ".", "model_name_or_path": str(folder / name), "zero_stage": 3, **KEYS.get(name, {})}
    return prepare_to_train(folder / name, make_config(keys), GROUPS).model


def save(folder: Path, name: str, model: Any) -> str:
    """Save a model to ``folder/saved/name``, and return the sentence that refuses it, or an empty text."""
    engine, encoder = SimpleNamespace(module=SimpleNamespace(model=model)), SimpleNamespace(tokenizer=pythia())
    config = make_config({"dataset_name": ".", "model_name_or_path": str(folder / name)})
    with mock.patch("irlfast.models.split_save.SHARD_BYTES", SMALL_SHARD):
        try:
            save_model(engine, folder / name, folder / "saved" / name, encoder, None, config)
        except InputError as error:
            return str(error)
    dist.barrier()
    return ""


def differences(given: Path, saved: Path) -> dict[str, Any]:
    """Compare a saved model with the one that was given, and return what the test looks at."""
    models = [AutoModelForCausalLM.from_pretrained(each, dtype="auto").eval() for each in (given, saved)]
    with torch.no_grad():
        one, other = (model(torch.arange(3, 12)[None]).logits for model in models)
    files = [load_file(path) for path in sorted(saved.glob("*.safetensors"))]
    sizes = [sum(tensor.nbytes for tensor in file.values()) for file in files if len(file) > 1]
    stored = {name for path in given.glob("*.safetensors") for name in load_file(path)}
    same_names = sorted(stored) == sorted(name for file in files for name in file)
    dtypes = sorted({str(tensor.dtype) for file in files for tensor in file.values()})
    logits = (one - other).abs().max().item()
    return {"logits": logits, "files": len(files), "largest": max(sizes), "names": same_names, "dtypes": dtypes}


def peak(work: Callable[[], Any]) -> int:
    dist.barrier()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    kept = work()
    del kept
    return resident("VmHWM") - before


def main() -> None:
    quiet()
    init_process_group()
    folder = Path(sys.argv[1])
    if dist.is_main():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=101, **LARGE)).save_pretrained(folder / "large")
        for name in (*NAMES, "nan"):
            dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
            shape = LlamaConfig(vocab_size=101, tie_word_embeddings=name == "tied", **SMALL)
            LlamaForCausalLM(shape).to(dtype).save_pretrained(folder / name)
        (folder / "large-saved").mkdir()
    dist.barrier()
    refused = {name: save(folder, name, split(folder, name)) for name in NAMES}
    bad = split(folder, "nan")
    list(bad.parameters())[-1].ds_tensor.fill_(torch.nan)
    refused["nan"] = save(folder, "nan", bad)
    large = split(folder, "large")
    whole = sum(each.ds_numel * each.element_size() for each in large.parameters())
    engine = SimpleNamespace(module=SimpleNamespace(model=large), zero_optimization_stage=lambda: 3)
    with mock.patch("irlfast.models.split_save.SHARD_BYTES", LARGE_SHARD):
        peaks = {"shards": peak(lambda: save_shards(folder / "large-saved", large)) / whole}
    peaks["whole"] = peak(lambda: gather_state(engine, trained_only=False)) / whole
    found = {name: differences(folder / name, folder / "saved" / name) for name in NAMES if dist.is_main()}
    left = sorted(path.name for path in (folder / "saved").iterdir())
    print_results({"peaks": peaks, "shard": LARGE_SHARD / whole, "found": found, "refused": refused, "left": left})


if __name__ == "__main__":
    main()
