"""The process that samples by vLLM. It reads a JSON job from stdin and writes a JSON line per finished shard.

    /path/to/env-with-vllm/bin/python irlfast/sampling/vllm_worker.py < job.json > answers.jsonl

It is run by path, in any interpreter that has vLLM, and imports nothing of irlfast, which may not be installed there.
The job: ``{"model": folder, "adapter": its LoRA's folder or null, "engine": {LLM's arguments},
"sampling": {SamplingParams' arguments}, "shards": [{"number": n, "prompts": [[ids], …], "seed": s}, …]}``.
A line of the output: ``{"shard": n, "answers": [[ids], …]}``.
"""

import ctypes
import hashlib
import json
import os
import signal
import sys


def main() -> None:
    end_with_parent()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its children log to stdout
    job = json.load(sys.stdin)
    # Python puts this file's folder first into sys.path, where our modules could hide installed packages.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != here]
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        job["engine"].setdefault("enforce_eager", True)  # else vLLM compiles for 20 s, and needs a C++ compiler
        # To read a prompt in two parts, vLLM 0.32 rewinds the random generator. On a CPU it dies of that.
        job["engine"].setdefault("enable_chunked_prefill", False)
    lora = None
    if job["adapter"]:
        from vllm.lora.request import LoRARequest

        if job["engine"]["dtype"] == "float32" and not current_platform.is_cpu():
            raise ValueError("vLLM's kernels for GPUs: float32 does not support LoRA")
        lora = LoRARequest("policy", 1, job["adapter"])
    if "logit_bias" in job["sampling"]:  # JSON's keys are texts, and these are token ids
        job["sampling"]["logit_bias"] = {int(token): value for token, value in job["sampling"]["logit_bias"].items()}
    engine = LLM(model=job["model"], **job["engine"])
    for shard in job["shards"]:
        # Each shard starts with an empty cache, so that its answers do not depend on earlier shards.
        engine.reset_prefix_cache()
        options = [
            SamplingParams(**job["sampling"], seed=seed_of(shard["seed"], i)) for i in range(len(shard["prompts"]))
        ]
        prompts = [{"prompt_token_ids": ids} for ids in shard["prompts"]]
        outputs = engine.generate(prompts, options, use_tqdm=False, lora_request=lora)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"shard": shard["number"], "answers": answers}), file=results, flush=True)


def end_with_parent() -> None:
    """Have Linux kill this process when its parent process is gone, however it ended."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def seed_of(seed: int, position: int) -> int:
    """Return the seed of one answer in a shard.

    With ``seed + position`` the answers of neighbouring shards would share their random draws.
    """
    digest = hashlib.sha256(f"{seed} {position}".encode()).digest()
    return int.from_bytes(digest[:7], "big")  # 56 bits: positive in any 64-bit integer


if __name__ == "__main__":
    main()
