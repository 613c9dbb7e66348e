"""A policy that ZeRO-3 has split is saved shard by shard, and is the same policy."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from irlfast.models.split_save import shards_of, tensors_to_save
from tests.helpers.runs import TORCHRUN, printed
from tests.helpers.split_save import SMALL_SHARD
from tests.helpers.tiers import full


@full
def test_no_process_holds_more_than_a_shard_of_a_policy_that_is_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory goes back at once, and is resident no more
    out, _ = printed(["-m", "tests.helpers.split_save", str(tmp_path)], TORCHRUN)
    results = json.loads(out.splitlines()[-1])
    peaks, shard = results["peaks"], results["shard"]
    print(f"peak of the main process, of the whole model: {peaks['shards']:.3f}, a shard is {shard:.3f}")
    assert peaks["shards"] < 3 * shard < 0.2  # the shard, and the file that it is compared with
    assert peaks["whole"] > 0.9
    for name, found in results["found"].items():
        assert found["logits"] == 0.0 and found["names"] and found["files"] > 2, name
        assert found["largest"] <= SMALL_SHARD, name
        assert found["dtypes"] == ["torch.bfloat16" if name == "bfloat16" else "torch.float32"]
        assert not results["refused"][name]
    assert "model.norm.weight" in results["refused"]["nan"] or "lm_head.weight" in results["refused"]["nan"]
    assert "is not finite after the last step, so that no nan is written" in results["refused"]["nan"]
    assert results["left"] == ["MANIFEST", "bfloat16", "plain", "tied"]


def test_a_shard_is_full_before_it_is_too_large_and_a_large_tensor_has_its_own():
    tensors = {str(number): torch.zeros(size) for number, size in enumerate((1, 2, 9, 1, 1, 1))}
    assert shards_of(tensors, 12) == [["0", "1"], ["2"], ["3", "4", "5"]]


def test_a_tied_weight_is_saved_once_under_the_name_that_transformers_gives_it(tmp_path):
    shape = {"vocab_size": 11, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    tied = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1, tie_word_embeddings=True))
    names = tensors_to_save(tied)
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
