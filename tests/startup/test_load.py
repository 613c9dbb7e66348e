"""A short version of ``python -m benchmarks.load``: rows per CPU second, and memory that stays flat over steps."""

import json
import time

from irlfast.config import make_config
from irlfast.startup.prepare import write_data
from tests.helpers.runs import run

FLOOR = 1500  # rows per CPU second: 7,000 to 8,500 were measured on a 2-core AMD EPYC whose cores 20 processes shared


def test_rows_are_prepared_faster_than_the_floor(tmp_path):
    keys = {
        "config_name": "irlfast/demo/config.json",
        "train_tokenizer": 384,
        "dataset_name": "irlfast/demo/test.jsonl",
    }
    write_data(make_config(keys | {"output_dir": str(tmp_path / "imports")}), tmp_path / "imports", prompts_only=False)
    config = make_config(keys | {"dataset_name": "irlfast/demo/train.jsonl", "output_dir": str(tmp_path / "run")})
    begun = time.process_time()
    write_data(config, tmp_path / "run", prompts_only=False)
    seconds = time.process_time() - begun
    rows = json.loads((tmp_path / "run" / "data.json").read_text())["train"]["rows"]
    assert rows / seconds > FLOOR


def test_memory_stays_flat_over_steps(tmp_path):
    tiny = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 2, "max_position_embeddings": 256, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    keys = {"sft_steps": 300, "logging_steps": 10, "save_steps": 100, "max_eval_samples": 4}
    run(tmp_path / "run", config_name=tmp_path / "config.json", stages=1, **keys)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    memory = [1024 * row["memory_gib"] for row in rows if row["phase"] == "sft" and row["step"] >= 100]  # MiB
    assert max(memory[-5:]) - max(memory[:5]) < 4  # 20 KiB per step would show
