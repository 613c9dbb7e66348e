"""Files of DeepSpeed settings: JSON with hostile values, changed settings that work, damaged texts."""

import json
from typing import Any

from hypothesis import strategies as st

from irlfast.config import make_config
from irlfast.config.deepspeed import DECIDED_BY, SIZES
from irlfast.engine.deepspeed_engine import check_deepspeed
from tests.fuzz.configuration import ACCEPTED
from tests.fuzz.guards import fresh_folder, refusal
from tests.fuzz.inputs import changed, damaged, texts, values

WORKING = {
    "zero_optimization": {
        "stage": 1,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "sub_group_size": 10**9,
    },
    "bf16": {"enabled": False},
    "gradient_clipping": 1.0,
    "optimizer": "auto",
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "activation_checkpointing": {"number_checkpoints": None},
    "comms_logger": {"enabled": False},
    "tensorboard": {"enabled": False},
    "monitor_config": {},
    "wall_clock_breakdown": False,
    "aio": {"block_size": 1048576},
    "checkpoint": {"tag_validation": "Warn"},
    "data_efficiency": {"enabled": False},
    "elasticity": {"enabled": False},
    "compression_training": {},
    "sparse_attention": None,
    "nebula": {"enabled": False},
    "hybrid_engine": {"enabled": False},
    "curriculum_learning": {"enabled": False},
    "compile": {"disable": True},
}
names = st.sampled_from([*WORKING, *DECIDED_BY, *SIZES]) | texts
settings = st.dictionaries(names, values | st.dictionaries(texts, values, max_size=3), max_size=3) | changed(WORKING)
INPUTS = st.one_of(
    settings.map(lambda value: json.dumps(value).encode()),
    damaged(json.dumps(WORKING).encode()),
    st.text("[]{}:,\"0a-'", max_size=30).map(str.encode),
    st.binary(max_size=20),
)
EXAMPLES: list[Any] = []


def check(drawn: bytes) -> None:
    path = fresh_folder() / "deepspeed.json"
    path.write_bytes(drawn)
    message = refusal(lambda: check_deepspeed(make_config(ACCEPTED | {"deepspeed": str(path)})))
    assert not message or message.startswith("deepspeed: ")
