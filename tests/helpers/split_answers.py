"""Started by test_split_answers.py in several processes: sample by a policy that ZeRO-3 has split, and by a whole one.

The argument is a folder. Prints JSON: for each case, whether the answers of both are the same, the number of answers,
their shortest and longest, the numbers of shards of each process, and the most parameters that each held at a time, as
a share of all.
"""

import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from irlfast.common import dist, ranks
from irlfast.common.files import read_jsonl
from irlfast.config import make_config
from irlfast.engine.process_group import init_process_group
from irlfast.models.prepare import forget, frozen_model
from irlfast.sampling import generation, shards, transformers_sampler
from irlfast.sampling.generation import sample_groups
from irlfast.sampling.shards import DRAWN, GREEDY, Sampling
from irlfast.startup.prepare import quiet
from tests.helpers.results import print_results
from tests.helpers.split_scores import held

END, WORDS, LONGEST = 2, 40, 8
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
CASES = {  # prompts, answers to each, settings
    "greedy": (5, 1, GREEDY),
    "drawn": (9, 3, DRAWN._replace(logps=True)),
    "fewer than processes": (1, 1, DRAWN),
    "a nucleus": (3, 2, Sampling(0.7, 0.9, 20, (1,))),
}


class Ids(list):
    """A prompt's token ids, with the method of arrays that the sampler calls."""

    def tolist(self) -> list[int]:
        return [*self]


class Watched:
    """The shards that this process has answered, and the most parameters that it held at a time."""

    def __init__(self) -> None:
        self.shards, self.most = 0, 0.0

    def load(self, *given: Any, **options: Any) -> Any:
        model = frozen_model(*given, **options)
        parameters = list(model.parameters())
        whole = sum(getattr(x, "ds_numel", x.numel()) for x in parameters)

        def look(*_: Any) -> None:
            self.most = max(self.most, sum(map(held, parameters)) / whole)

        for module in model.modules():
            module.register_forward_hook(look)
        return model

    def keep(self, *given: Any) -> None:
        self.shards += 1
        KEEP(*given)


KEEP = generation.keep_answers


def run_of(folder: Path, gather: bool) -> Any:
    keys = {"dataset_name": ".", "model_name_or_path": str(folder), "zero_stage": 3, "max_new_tokens": LONGEST}
    config = make_config(keys | {"ds3_gather_for_generation": gather, "per_device_eval_batch_size": 4})
    tokenizer = types.SimpleNamespace(
        decode=str,
        batch_decode=lambda answers, **_: [str(answer) for answer in answers],
        get_vocab=lambda: {str(token): token for token in range(WORDS)},
    )
    encoder = types.SimpleNamespace(tokenizer=tokenizer, ends=(END,))
    return types.SimpleNamespace(config=config, encoder=encoder, output=folder)


def sampled(folder: Path, name: str, gather: bool) -> tuple[list[Any], Watched]:
    count, n, how = CASES[name]
    examples = [types.SimpleNamespace(prompt_ids=Ids(range(3, 4 + i % 7)), row=None) for i in range(count)]
    own, watched = folder / f"{name}-{gather}", Watched()
    with (
        mock.patch.object(transformers_sampler, "frozen_model", watched.load),
        mock.patch.object(generation, "keep_answers", watched.keep),
        mock.patch.object(shards, "SHARD_SIZE", 6),
    ):
        sample_groups(run_of(folder, gather), folder / "policy", examples, n, own, how)
    forget()
    return [row for path in sorted(own.glob("*.jsonl")) for _, row in read_jsonl(path)], watched


def main() -> None:
    quiet()
    ranks.join()
    init_process_group()
    folder, results = Path(sys.argv[1]), {}
    if dist.is_main():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, initializer_range=0.5, **SHAPE))
        model.save_pretrained(folder / "policy")
    dist.barrier()
    for name in CASES:
        (own, split), (whole, _) = sampled(folder, name, gather=False), sampled(folder, name, gather=True)
        lengths = [len(row["answer_ids"]) for row in own]
        found = zip(*dist.all_gather_object((split.shards, split.most)), strict=True)
        results[name] = [own == whole, len(own), min(lengths), max(lengths), *map(list, found)]
    print_results(results)


if __name__ == "__main__":
    main()
