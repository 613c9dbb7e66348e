"""The process that samples by vLLM. It reads a job and then shards from stdin, and writes a line per answered prompt.

    /path/to/env-with-vllm/bin/python irlfast/sampling/vllm_worker.py < shards.jsonl > answers.jsonl

It is run by path, in any interpreter that has vLLM, and imports nothing of irlfast, which may not be installed there.
Each line is JSON. The first line is the job: ``{"model": folder, "adapter": its LoRA's folder or null,
"engine": {LLM's arguments}, "never": [ids that are not drawn]}``. Each other line is a shard:
``{"number": s, "prompts": [[ids], …], "seeds": [one per prompt, …], "sampling": {SamplingParams' arguments}}``.
A line of the output: ``{"shard": s, "place": of the prompt in the shard, "answers": [[ids], …], "logps": [[…], …]}``,
n answers. ``logps`` has the log-probability of each token where ``sampling`` asks for ``logprobs``, else nothing.
Shards are answered side by side: one that comes while others are in work joins their batches.
"""

import ctypes
import json
import math
import os
import queue
import signal
import sys
import threading


def main() -> None:
    end_with_parent()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its children log to stdout
    lines = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a child of vLLM closes its stdin, which this process's thread reads
    job = json.loads(lines.readline())
    shards: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=read, args=(lines, shards), daemon=True).start()
    # Python puts this file's folder first into sys.path, where our modules could hide installed packages.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != here]
    from vllm import LLM
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
    engine = LLM(model=job["model"], **job["engine"]).llm_engine
    answer(engine, shards, results, job["never"], lora)


def read(lines, shards) -> None:
    """Put the shards into the queue as they come, so that the parent never waits while vLLM is at work; then None."""
    for line in lines:
        shards.put(json.loads(line))
    shards.put(None)


def answer(engine, shards, results, never, lora) -> None:
    """Answer the shards until there are no more."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    fixed = {"output_kind": RequestOutputKind.FINAL_ONLY}
    if never:
        fixed["logit_bias"] = dict.fromkeys(never, -math.inf)
    while True:
        while not shards.empty() or not engine.has_unfinished_requests():
            shard = shards.get()
            if shard is None:
                return
            for place, (ids, seed) in enumerate(zip(shard["prompts"], shard["seeds"], strict=True)):
                options = SamplingParams(**shard["sampling"], **fixed, seed=seed)
                name = f"{shard['number']} {place}"
                engine.add_request(name, {"prompt_token_ids": ids}, options, lora_request=lora)
        for output in engine.step():
            number, place = map(int, output.request_id.split())
            result = {
                "shard": number,
                "place": place,
                "answers": [list(each.token_ids) for each in output.outputs],
                "logps": [logps_of(each) for each in output.outputs],
            }
            print(json.dumps(result), file=results, flush=True)


def logps_of(answer) -> list:
    """Return the log-probability of each token of an answer; nothing where they were not asked for."""
    steps = zip(answer.token_ids, answer.logprobs, strict=True) if answer.logprobs else ()
    return [step[token].logprob for token, step in steps]


def end_with_parent() -> None:
    """Have Linux kill this process when its parent process is gone, however it ended."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    main()
