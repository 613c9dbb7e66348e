"""Started by test_split_scores.py in several processes: score by models that ZeRO-3 has split, and by whole ones.

The argument is a folder. Prints JSON: how far the states of a split model that scored, and is then to train, are from
those of the whole model; and for each model and number of prompts the largest difference of a score, the numbers of
prompts and of forward passes of the processes, and the most parameters that each held at a time, as a share of all.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from irlfast.common import dist
from irlfast.config import make_config
from irlfast.data.packing import PromptGroup
from irlfast.engine.process_group import init_process_group
from irlfast.models.checks import SEPARATE, probe_states
from irlfast.models.load import load_model, save_pretrained
from irlfast.models.lora import add_lora, save_lora
from irlfast.models.prepare import PreparedModel, forget, prepare_to_score, prepare_to_train
from irlfast.models.split import runnable
from irlfast.sampling import scoring
from irlfast.sampling.rewards import head_rewards
from irlfast.startup.prepare import quiet
from tests.helpers.results import print_results
from tests.helpers.scores import by_group
from tests.helpers.tokenizers_like import pythia

SHAPE = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12}
MODELS = ("plain", "tied", "LoRA", "reward", "bfloat16")
GROUPS = [PromptGroup([1, 2 + i], ([3 + i] * (1 + 3 * i), [4, 5])) for i in range(7)]
HOW = {"level": "sequence", "divergence": "airl", "alpha": 1.0}


def write_models(folder: Path) -> None:
    torch.manual_seed(0)
    for name in ("plain", "tied"):
        shape = LlamaConfig(**SHAPE, num_attention_heads=2, tie_word_embeddings=name == "tied")
        LlamaForCausalLM(shape).save_pretrained(folder / name)
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=2)).bfloat16().save_pretrained(folder / "bfloat16")
    reward = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_attention_heads=2, num_labels=2, pad_token_id=0))
    save_pretrained(folder / "reward", reward, pythia())
    keys = {"dataset_name": ".", "model_name_or_path": str(folder / "plain"), "use_peft": True, "lora_r": 3}
    config = make_config(keys)
    adapted = add_lora(load_model(folder / "plain", config), config, reward=False)
    state = {key: torch.randn_like(x) / 9 for key, x in adapted.state_dict().items() if "lora_" in key}
    (folder / "LoRA").mkdir()
    save_lora(folder / "LoRA", adapted, state, str(folder / "plain"), "main", pythia())


def held(parameter: Any) -> int:
    """Return the number of a parameter's values that this process has; ZeRO-3's part of it stays beside the whole."""
    if not hasattr(parameter, "ds_id"):
        return parameter.numel()
    return parameter.ds_tensor.numel() + (parameter.numel() if parameter.shape == parameter.ds_shape else 0)


class Watched:
    """The parameters that a model holds while it scores, in this process."""

    def __init__(self) -> None:
        self.passes, self.most = 0, 0.0

    def prepare(self, *given: Any) -> PreparedModel:
        prepared = prepare_to_score(*given)
        parameters = list(prepared.model.parameters())
        whole = sum(getattr(x, "ds_numel", x.numel()) for x in parameters)

        def look(*_: Any) -> None:
            self.most = max(self.most, sum(map(held, parameters)) / whole)

        for module in prepared.model.modules():
            module.register_forward_hook(look)
        body = prepared.base.get_input_embeddings()
        body.register_forward_hook(lambda *_: setattr(self, "passes", self.passes + 1))
        return prepared


def scored(folder: Path, name: str, count: int, stage: int) -> tuple[dict[int, list[torch.Tensor]], Watched]:
    keys = {"dataset_name": ".", "model_name_or_path": str(folder / name), "zero_stage": stage}
    keys |= {"max_tokens_per_batch": 40, "dtype": "bfloat16" if name == "bfloat16" else "float32"}
    heads = 2 if name == "reward" else 0
    watched = Watched()
    measure = (lambda *given: head_rewards(*given, **HOW)) if heads else scoring.token_logps
    with mock.patch.object(scoring, "prepare_to_score", watched.prepare):
        path = folder / "scores" / name
        own = scoring.score_share(make_config(keys), folder / name, GROUPS[:count], path, measure, heads, in_4bit=False)
    forget()
    return by_group(own), watched


def reused(folder: Path) -> float:
    """Train by LoRA the split model that has just scored; return how far its states are from the whole one's."""
    keys = {"dataset_name": ".", "model_name_or_path": str(folder / "plain"), "zero_stage": 3, "use_peft": True}
    config = make_config(keys)
    given_up = prepare_to_score(folder / "plain", config, GROUPS)
    if dist.is_main():
        forget()  # as before it samples alone
    scorer = prepare_to_score(folder / "plain", config, GROUPS)
    assert scorer.base is not given_up.base
    own = prepare_to_train(folder / "plain", config, GROUPS)
    assert own.base is scorer.base
    with runnable(own.model, config):
        states = probe_states(own.base, SEPARATE)
    return (states - probe_states(load_model(folder / "plain", config), SEPARATE)).abs().max().item()


def main() -> None:
    quiet()
    init_process_group()
    folder, results = Path(sys.argv[1]), {}
    if dist.is_main():
        write_models(folder)
    dist.barrier()
    again = max(dist.all_gather_object(reused(folder)))
    for name in MODELS:
        for count in (1, 7) if name == "plain" else (7,):
            (own, split), (whole, _) = scored(folder, name, count, 3), scored(folder, name, count, 2)
            assert own.keys() == whole.keys()
            gaps = [(a - b).abs().max().item() for i in own for a, b in zip(own[i], whole[i], strict=True) if len(a)]
            found = dist.all_gather_object((max(gaps, default=0.0), len(own), split.passes, split.most))
            results[f"{name}, {count}"] = [list(each) for each in zip(*found, strict=True)]
    print_results({"scores": results, "reused": again})


if __name__ == "__main__":
    main()
