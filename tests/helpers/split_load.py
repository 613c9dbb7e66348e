"""Started by test_split.py in two processes: load policies that ZeRO-3 splits while they are loaded.

The argument is a folder. Prints JSON: the bytes of a model's weights, and for each process the peak of its resident
memory less what it had before; for each small model, the largest difference of its hidden states from those of the
whole model; and for each spoilt model the sentence that refuses it.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from irlfast.common import dist
from irlfast.common.files import InputError
from irlfast.config import Config, make_config
from irlfast.data.packing import PromptGroup
from irlfast.engine.process_group import init_process_group
from irlfast.models.checks import SEPARATE, probe_states
from irlfast.models.load import load_model
from irlfast.models.prepare import prepare_to_train
from irlfast.models.split import is_split, runnable
from irlfast.startup.prepare import quiet
from tests.helpers.results import print_results

LARGE = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 20, "num_attention_heads": 12}
SMALL = {"hidden_size": 20, "intermediate_size": 33, "num_hidden_layers": 2, "num_attention_heads": 2}
KEYS = {"plain": {}, "tied": {}, "bfloat16": {"dtype": "bfloat16"}, "LoRA": {"use_peft": True, "lora_r": 3}}
GROUPS = [PromptGroup([1, 3], ([4, 2],))]


def write_models(folder: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=101, **LARGE)).save_pretrained(folder / "large")
    for name in (*KEYS, "nan", "missing"):
        small = LlamaConfig(vocab_size=101, tie_word_embeddings=name == "tied", **SMALL)
        LlamaForCausalLM(small).save_pretrained(folder / name, max_shard_size="20KB")
    for name, path in ((name, next((folder / name).glob("model-00002*"))) for name in ("nan", "missing")):
        tensors = load_file(path)
        last = max(tensors)
        tensors = {**tensors, last: tensors[last] * torch.nan} if name == "nan" else {**tensors, "other": tensors[last]}
        save_file({key: x for key, x in tensors.items() if name == "nan" or key != last}, path, {"format": "pt"})


def resident(kind: str) -> int:
    """Bytes of this process: ``VmRSS`` are resident now, ``VmHWM`` were so at most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1]) << 10


def peak_of_large(config: Config, folder: Path) -> dict[str, object]:
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = prepare_to_train(folder / "large", config, GROUPS).model
    peaks = dist.all_gather_object(resident("VmHWM") - before)
    return {"whole": sum(each.ds_numel * each.element_size() for each in model.parameters()), "peaks": peaks}


def difference(config: Config, model: Path) -> float:
    split = prepare_to_train(model, config, GROUPS)
    assert is_split(split.model)
    with runnable(split.model, config):
        states = probe_states(split.base, SEPARATE)
    expected = probe_states(load_model(model, config), SEPARATE)
    return (states - expected).abs().max().item()


def refusal(config: Config, model: Path) -> str:
    try:
        prepare_to_train(model, config, GROUPS)
    except InputError as error:
        return str(error)
    return ""


def main() -> None:
    quiet()
    init_process_group()
    folder = Path(sys.argv[1])
    if dist.is_main():
        write_models(folder)
    dist.barrier()
    common = {"dataset_name": ".", "model_name_or_path": str(folder), "zero_stage": 3}
    configs = {name: make_config(common | keys) for name, keys in KEYS.items()}
    differences = {name: difference(config, folder / name) for name, config in configs.items()}
    refusals = {name: dist.all_gather_object(refusal(configs["plain"], folder / name)) for name in ("nan", "missing")}
    print_results({"differences": differences, "refusals": refusals, **peak_of_large(configs["plain"], folder)})


if __name__ == "__main__":
    main()
