"""Model folders: a small one whose files are changed, damaged or hostile, read as the start of a run reads them."""

import datetime
import functools
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from irlfast.config import make_config
from irlfast.data.encoding import make_encoder
from irlfast.data.packing import PromptGroup
from irlfast.models.configs import stop_tokens
from irlfast.models.load import load_to_train
from irlfast.models.prepare import prepare_model
from irlfast.models.tokenizers import load_tokenizer
from irlfast.startup.prepare import check_model
from tests.fuzz.guards import CANARY, WORK, fresh_folder, refusal
from tests.fuzz.inputs import RUN, changed, damaged, values

CODE = f"open({str(CANARY)!r}, 'w').close()\n"  # what a module of the folder would run when it is imported
SIZES = {
    "vocab_size": 300,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
REMOTE = {
    "auto_map": {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    },
    "tokenizer_class": "Evil",
}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "BASE",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}


GROUPS = [PromptGroup([1, 2], ([3], [4, 5])), PromptGroup([6], ([7, 8], []))]


class Evil:
    """An object whose pickle runs a command when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.system, (RUN,)


@functools.cache
def original() -> Path:
    """Return the folder of a small Llama and its tokenizer."""
    import transformers

    from irlfast.models.tokenizers import train_tokenizer

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder = WORK / "model"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer = train_tokenizer(["a b c"] * 3, 258)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
NAMES = (*JSON_FILES, "model.safetensors", "chat_template.jinja")
EXTRA = ("pytorch_model.bin", "adapter_config.json", "model.safetensors.index.json", "special_tokens_map.json")


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


@st.composite
def folders(draw: Any) -> tuple:
    """Draw what happens to the files of the folder: name -> content, None for a file that is deleted."""
    edits: dict[str, bytes | None] = {}
    for _ in range(draw(st.integers(1, 2))):
        what = draw(st.sampled_from(["JSON", "JSON", "JSON", "damage", "delete", "pickle", "code", "adapter", "more"]))
        if what == "JSON":
            name = draw(st.sampled_from(JSON_FILES))
            edits[name] = json.dumps(draw(changed(json.loads(content_of(name))))).encode()
        elif what == "damage":
            name = draw(st.sampled_from(NAMES))
            edits[name] = draw(damaged(content_of(name)))
        elif what == "delete":
            edits[draw(st.sampled_from(NAMES))] = None
        elif what == "pickle":
            name = draw(
                st.sampled_from(["pytorch_model.bin", "model.safetensors", "training_args.bin", "tokenizer.model"])
            )
            edits[name] = draw(damaged(pickle.dumps(Evil()), 1))
            edits.setdefault("model.safetensors", None)
        elif what == "code":
            edits["evil.py"] = (CODE + "class Evil: pass\n").encode()
            name = draw(st.sampled_from(["config.json", "tokenizer_config.json"]))
            edits[name] = json.dumps(
                json.loads(content_of(name)) | draw(st.just(REMOTE) | changed(REMOTE).filter(is_object))
            ).encode()
        elif what == "adapter":
            edits["adapter_config.json"] = json.dumps(draw(st.just(ADAPTER) | changed(ADAPTER))).encode()
            edits["adapter_model.safetensors"] = draw(damaged(content_of("model.safetensors"), 1))
        else:
            edits[draw(st.sampled_from(EXTRA))] = json.dumps(draw(values)).encode()
    return edits, draw(st.booleans())


@functools.cache
def content_of(name: str) -> bytes:
    return (original() / name).read_bytes()


INPUTS = folders()
EXAMPLES: list[Any] = [
    ({"tokenizer_config.json": b'{"model_max_length": [null]}'}, True),
    ({"config.json": b'{"model_type": "llama", "num_hidden_layers": 1000000000}'}, False),
    ({"adapter_config.json": b"[]"}, True),
    ({"config.json": b'{"model_type": "llama", "dtype": {"a": 1}}'}, True),
    ({"config.json": b'{"model_type": "llama", "dtype": "words"}'}, True),
    ({"config.json": b'{"model_type": "llama", "hidden_act": {"a": 1}}'}, True),
    ({"generation_config.json": b'{"eos_token_id": {"a": 1}}'}, False),
    ({"generation_config.json": b'{"eos_token_id": [[1]]}'}, False),
]


def check(drawn: tuple) -> None:
    edits, use_peft = drawn
    folder = fresh_folder() / "model"
    shutil.copytree(original(), folder)
    for name, content in edits.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content.replace(b"BASE", str(original()).encode()))
    config = make_config(
        {"dataset_name": "irlfast/demo/train.jsonl", "model_name_or_path": str(folder), "use_peft": use_peft}
    )
    keys = ["model", "tokenizer", "adapter", "chat_template", "lora_", "max_", "reward_", "For", "Model", "config"]
    refusal(start, config, names=[str(folder), str(original()), *keys])


def start(config: Any) -> None:
    """Read the model's folder as the start of a run does, load the model and run it."""
    check_model(config)
    make_encoder(load_tokenizer(config, []), config, datetime.datetime(2026, 1, 2), stop_tokens(config))
    prepare_model(load_to_train(str(config.model_name_or_path), config).eval(), config, GROUPS)
