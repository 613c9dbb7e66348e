"""Tiny models of all causal families of Transformers: an SFT step at learning rate 0 must keep every bit of a model.

python -m tests.helpers.families [FAMILY ...]     # default: all; prints a table of right, refused, wrong and not built
"""

import dataclasses
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from irlfast.common.files import InputError
from irlfast.config import make_config
from irlfast.data.batching import plan_steps
from irlfast.data.packing import PromptGroup
from irlfast.engine.fit import fit
from irlfast.engine.plan import Plan
from irlfast.engine.process_group import destroy_process_group, init_process_group
from irlfast.losses.sft import sft_loss
from irlfast.models.load import load_model, save_pretrained
from irlfast.models.lora import merge
from irlfast.runs.metrics_log import MetricsLog
from irlfast.runs.run import Run
from irlfast.startup.prepare import quiet

ALL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MAX_PARAMETERS = 4_000_000  # of a tiny model

SIZES = {
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length",
    96: "vocab_size vocab_size_per_layer_input",
    48: "intermediate_size n_inner encoder_ffn_dim decoder_ffn_dim ffn_dim d_inner ffn_hidden_size d_ff dff dim_ff "
    "feed_forward_size intermediate_size_mlp ffn_intermediate_size",
    32: "hidden_size d_model n_embd dim model_dim embedding_size emb_dim attention_hidden_size lru_width width "
    "hidden_size_per_layer_input embed_dim ffn_embed_dim word_embed_proj_dim projection_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size q_lora_rank kv_lora_rank moe_latent_size "
    "kv_channels linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim state_size mamba_d_state "
    "ssm_state_size image_size router_hidden_size laurel_rank hc_lowrank",
    8: "head_dim swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_head mamba_head_dim chunk_size "
    "linear_conv_kernel_dim mamba_chunk_size patch_size sliding_window sliding_window_size rel_extent d_rel",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads rotary_dim "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts num_moe_experts linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads "
    "zero_expert_num swa_num_attention_heads",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads num_experts_per_tok moe_topk moe_k top_k_experts num_kv_heads "
    "swa_num_key_value_heads eos_token_id",
    1: "n_group topk_group bos_token_id first_k_dense_replace num_dense_layers",
    0: "pad_token_id",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()} | {"is_decoder": True}
LAYERS = ["sliding_attention", "full_attention"]
HYBRID = {"num_hidden_layers": 4}  # one of them has full attention
OWN = {  # sizes of families that the sizes above do not fit, by the config's model_type
    "bailing_hybrid": {"num_hidden_layers": 6},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "deepseek_v2": {
        "n_group": None,
        "topk_group": None,
        "topk_method": "greedy",
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "dots3_note": {"num_hidden_layers": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": LAYERS * 2, "num_kv_shared_layers": 2},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": HYBRID,
    "mamba2": {"num_heads": 8},
    "mimi": {"hidden_size": 32, "codebook_size": 8, "num_filters": 4},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": HYBRID | {"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(name: str) -> Any:
    return shrunk(CONFIG_MAPPING[name])


def shrunk(kind: type) -> Any:
    """Return a config of this class with small sizes, in its sub-configs, too."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given = {name: size for name, size in SMALL.items() if defaults.get(name) not in (None, dataclasses.MISSING)}
    if "kv_lora_rank" in given:  # multi-head latent attention
        given["num_key_value_heads"] = given["num_attention_heads"]
    for name in set(kind.sub_configs) & set(defaults):
        part = getattr(kind(), name)
        if part is not None:
            given[name] = shrunk(type(part))
    return kind(**given | OWN.get(kind.model_type, {}))


def build(name: str, folder: Path, dtype: str) -> None:
    """Write a tiny model of a family whose parameters and buffers all differ from their initial values.

    Transformers loads and saves the model once more, so that later differences are not of Transformers' making.
    """
    config = small_config(name)
    with torch.device("meta"):
        size = sum(
            parameter.numel() for parameter in transformers.AutoModelForCausalLM.from_config(config).parameters()
        )
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters are not tiny")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor))
        model(input_ids=torch.arange(3, 12)[None])
    model.save_pretrained(folder / "first")
    transformers.AutoModelForCausalLM.from_pretrained(folder / "first", dtype=dtype).save_pretrained(folder / "given")


def outcome(name: str, folder: Path, **keys: Any) -> tuple[str, str]:
    """Return whether a family came out right, refused, wrong or not built, and why."""
    given = folder / "given"
    try:
        build(name, folder, keys.get("dtype", "float32"))
    except Exception as error:
        return "not built", brief(error)
    try:
        trained = train(given, folder / "run", **keys)
    except InputError as error:
        return "refused", str(error).replace(str(given), "…")
    except Exception as error:
        return "wrong", brief(error)
    differences = compare(given, trained)
    return ("wrong", differences[0]) if differences else ("right", "")


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


class Silent:
    """Stands in for the tokenizer, which a training step does not need."""

    chat_template = None

    def save_pretrained(self, folder: Path) -> None: ...


def train(given: Path, output: Path, zero_stage: int | None = None, **keys: Any) -> Path:
    """Return the folder of the model after one SFT step at learning rate 0.

    ``zero_stage`` applies even to one process in float32, which would train without ZeRO.
    """
    output.mkdir()
    if zero_stage is not None:
        keys |= {"deepspeed": str(output / "deepspeed.json"), "zero_stage": zero_stage}
        Path(keys["deepspeed"]).write_text(json.dumps({"zero_optimization": {"stage": zero_stage}}))
    config = make_config({"dataset_name": __file__, "model_name_or_path": str(given), "method": "sft"} | keys)
    groups = [PromptGroup(list(range(3, 9)), (list(range(20 + i, 30 + i)),)) for i in range(4)]
    encoder: Any = SimpleNamespace(tokenizer=Silent())  # a step reads no other attribute
    run = Run(config, output, given, encoder, [], [], MetricsLog(output, config), None)
    plan = Plan(None, plan_steps(len(groups), 4, epochs=None, steps=1, seed=[0]), 0.0, config.optim)
    policy = fit(run, output / "sft", given, groups, sft_loss, plan)
    if not config.use_peft:
        return policy
    save_pretrained(output / "merged", merge(load_model(policy, config), "the adapter"), encoder.tokenizer)
    return output / "merged"


def compare(given: Path, trained: Path) -> list[str]:
    """Return how two saved models differ: in names, dtypes and bits of tensors, in configs, or in logits."""
    before, after = tensors(given), tensors(trained)
    differences = [
        f"{name} is only in {place}"
        for place, a, b in (("given", before, after), ("trained", after, before))
        for name in sorted(a.keys() - b.keys())
    ]
    for name in sorted(before.keys() & after.keys()):
        a, b = before[name], after[name]
        if (
            a.dtype != b.dtype
            or a.shape != b.shape
            or not torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))
        ):
            differences.append(f"{name} changed: {a.dtype} {tuple(a.shape)}, then {b.dtype} {tuple(b.shape)}")
    configs = [transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (given, trained)]
    names = (configs[0] | configs[1]).keys() - {"_name_or_path"}
    changed = [key for key in sorted(names) if configs[0].get(key) != configs[1].get(key)]
    differences += [f"config.{key} changed" for key in changed]
    if not differences:
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            logits = [
                transformers.AutoModelForCausalLM.from_pretrained(x).eval()(input_ids=ids).logits
                for x in (given, trained)
            ]
        if not torch.equal(*logits):
            differences.append("logits changed")
    return differences


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()
    init_process_group()
    names = [argument for argument in sys.argv[1:] if "=" not in argument]
    keys = {name: yaml.safe_load(value) for name, _, value in (x.partition("=") for x in sys.argv[1:]) if value}
    counts: Counter[str] = Counter()
    for name in names or ALL:
        with tempfile.TemporaryDirectory() as folder:
            result, why = outcome(name, Path(folder), **keys)
        counts[result] += 1
        print(f"{name:28}{result:12}{why}", flush=True)
    print(f"{counts.total()} families: " + ", ".join(f"{count} {result}" for result, count in counts.most_common()))
    destroy_process_group()


if __name__ == "__main__":
    main()
