"""Run one contender of test_throughput.py in its own process: ``python -m benchmarks.throughput FOLDER CONTENDER``.

FOLDER holds ``policy/``, ``reference/``, ``pairs.json`` (token ids of prompt, chosen, rejected) and ``workload.json``.
The script prints JSON: the loss of the first step, the seconds of scoring and of every step, and the peak of memory:
resident above the size after the imports, or what torch allocates on a GPU. All contenders train on the same pairs in
the same order, by RMSprop, with the gradient clipped to 1. On a GPU they compute in bf16 and update fp32 weights, and
scoring is timed when everything is compiled. Under torchrun, each process is pinned to one core (test_scaling.py).
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import memory_of_process

RATE, BETA = 1e-5, 0.1
GPU = torch.cuda.is_available()

Moment = tuple[float, float]  # seconds of wall time, and CPU seconds of this process


def memory(field: str) -> int:
    """Return bytes of this process, on a GPU of torch there: ``VmRSS`` is the current size, ``VmHWM`` the peak."""
    if GPU:
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    return memory_of_process(field)


def trl(folder: Path, pairs: list[list[list[int]]], workload: dict[str, Any], best: bool) -> dict[str, Any]:
    """Run TRL's ``DPOTrainer`` with its defaults, or (``best``) with precomputed reference and ``padding_free``.

    On a GPU, ``padding_free`` runs without flash-attn, which TRL advises: Transformers masks the sequences of a row.
    """
    import datasets
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401, part of the base memory
    from trl import DPOTrainer

    base = memory("VmRSS")
    losses: list[float] = []
    score: list[Moment] = []
    moments: list[Moment] = []

    class Measured(DPOTrainer):
        """A ``DPOTrainer`` that takes token ids, and records times and losses."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *given: Any) -> Any:
            score.append(now())
            dataset = super()._precompute_ref_logps(*given)
            score.append(now())
            return dataset

        def compute_loss(self, *given: Any, **options: Any) -> Any:
            loss = super().compute_loss(*given, **options)
            losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            moments.append(now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(now())

    def load(name: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
    trainer = Measured(
        load("policy"),
        load("reference"),
        args=dpo_config(folder, len(pairs), workload, best),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=empty_tokenizer(),
        callbacks=[Clock()],
    )
    trainer.train()
    return report(losses[0], score or [now()] * 2, moments, memory("VmHWM") - base)


def dpo_config(folder: Path, pairs: int, workload: dict[str, Any], best: bool) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(folder / "trl"),
        beta=BETA,
        per_device_train_batch_size=workload["batch"],
        max_steps=pairs // workload["batch"],
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="rmsprop",
        max_length=None,
        gradient_checkpointing=False,
        bf16=GPU,
        use_cpu=not GPU,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        padding_free=best,
        precompute_ref_log_probs=best,
        precompute_ref_batch_size=workload["batch"],
    )


def irlfast(folder: Path, pairs: list[list[list[int]]], workload: dict[str, Any]) -> dict[str, Any]:
    """Score by the reference and fit, as ``irlfast.methods.irft`` does once the answers are sampled."""
    import functools

    import numpy as np

    if not GPU:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.models.llama import modeling_llama  # noqa: F401, part of the base memory

    from irlfast.data.packing import PromptGroup
    from irlfast.engine.fit import fit
    from irlfast.engine.plan import Plan
    from irlfast.engine.process_group import destroy_process_group, init_process_group
    from irlfast.losses.pairs import irft_loss
    from irlfast.sampling.scoring import score

    init_process_group()
    run = make_run(folder, workload)
    base, log = memory("VmRSS"), run.metrics_log
    groups = [PromptGroup(prompt, (chosen, rejected)) for prompt, chosen, rejected in pairs]
    if GPU:
        score(run, folder / "reference", groups, run.output / "warm-up.safetensors")
    start = now()
    ref_logps = score(run, folder / "reference", groups, run.output / "reference.safetensors")
    scoring = [start, now()]
    groups = [group._replace(ref_logps=own) for group, own in zip(groups, ref_logps, strict=True)]
    loss = functools.partial(irft_loss, beta=BETA, loss_type="sigmoid", nll_weight=0.0)
    steps = list(np.arange(len(pairs)).reshape(-1, workload["batch"]))
    plan = Plan(0, steps, RATE, "rmsprop")
    fit(run, run.output / "stage-00", folder / "policy", groups, loss, plan)
    destroy_process_group()
    return report(log.losses[0], scoring, log.moments, log.peak - base)


def make_run(folder: Path, workload: dict[str, Any]) -> Any:
    """Make a run without data, whose log records the loss, the time and the memory of every step."""
    from irlfast.common import dist
    from irlfast.common.files import remove
    from irlfast.config import make_config
    from irlfast.data.encoding import Encoder
    from irlfast.runs.metrics_log import MetricsLog
    from irlfast.runs.run import Run

    class Clock(MetricsLog):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.losses: list[float] = []
            self.moments: list[Moment] = []

        def start_phase(self, *given: Any) -> list[dict[str, Any]]:  # of the main process alone
            rows = super().start_phase(*given)
            self.moments.append(now())
            return rows

        def write(self, row: dict[str, Any]) -> None:
            super().write(row)
            self.losses.append(row["loss"])
            self.moments.append(now())
            self.peak = memory("VmHWM")

    keys = {"dataset_name": "none", "model_name_or_path": str(folder / "policy"), "learning_rate": RATE, "beta": BETA}
    keys |= {"lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 0}
    keys |= {"dtype": "bfloat16"} if GPU else {}
    config = make_config(keys | workload.get("keys", {}))
    output = folder / "irlfast"
    if dist.is_main():
        remove(output)
        output.mkdir()
    dist.barrier()
    encoder = Encoder(empty_tokenizer(), None, [], 0, (0,), True)
    return Run(config, output, folder / "policy", encoder, [], [], Clock(output, config), None)


def empty_tokenizer() -> Any:
    """Return an empty tokenizer, for trainers that are given token ids."""
    import tokenizers
    import transformers

    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=empty, eos_token="<end>", pad_token="<end>")


def now() -> Moment:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def spans(moments: list[Moment], clock: int) -> list[float]:
    return [later[clock] - sooner[clock] for sooner, later in itertools.pairwise(moments)]


def report(loss: float, score: list[Moment], moments: list[Moment], peak: int) -> dict[str, Any]:
    seconds, cpu = ({"score": spans(score, clock)[0], "steps": spans(moments, clock)} for clock in (0, 1))
    return {"loss": loss, "seconds": seconds, "cpu_seconds": cpu, "mib": peak / 2**20}


CONTENDERS = {
    "irlfast": irlfast,
    "TRL, defaults": lambda *given: trl(*given, best=False),
    "TRL, best": lambda *given: trl(*given, best=True),
}


def main() -> None:
    folder = Path(sys.argv[1])
    if "LOCAL_RANK" in os.environ:
        os.sched_setaffinity(0, {int(os.environ["LOCAL_RANK"])})
    pairs, workload = (json.loads((folder / name).read_text()) for name in ("pairs.json", "workload.json"))
    measured = CONTENDERS[sys.argv[2]](folder, pairs, workload)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(measured))


if __name__ == "__main__":
    main()
