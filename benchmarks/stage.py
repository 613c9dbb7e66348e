"""Run an IRFT stage of a model of 1.4 billion parameters on a GPU, and put what ``irlfast plan`` says beside its time.

    python -m benchmarks.stage [FOLDER]     # 2 to 3 minutes on an H200

The model has the shape of Pythia-1.4B and random weights, so that every answer has ``max_new_tokens`` tokens.
Transformers samples. The run is planned by the GPU's data sheet, and with the rates of its first steps, as ``irlfast
plan --calibrate`` takes them; the rate of sampling stays that of the data sheet. FOLDER keeps the run, and a run in it
is not run again. The script writes ``benchmarks/results/DATE-stage.json``.
"""

import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import runs
from benchmarks.conftest import write_result
from benchmarks.plans import first_steps

GPU = "1xH200-141G"
VOCABULARY, WORDS, ROWS = 50304, 60_000, 640
SHAPE = {
    "model_type": "gpt_neox",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SMALL = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
KEYS = {
    "method": "irft",
    "dtype": "bfloat16",
    "zero_stage": 1,
    "max_prompt_length": 256,
    "max_length": 512,
    "max_new_tokens": 128,
    "per_device_eval_batch_size": 64,
    "stages": 1,
    "inner_epochs": 1,
    "optim": "rmsprop",
    "learning_rate": 5e-7,
    "global_batch_size": 16,
    "logging_steps": 1,
    "save_steps": 0,
    "report_to": "none",
    "train_tokenizer": VOCABULARY,
}
QUICK = {"dtype": "float32", "global_batch_size": 4, "train_tokenizer": 1024}
PARTS = ("sampling", "scoring", "training")
STEPS = 4  # by whose rates the plan is calibrated; the first two of them are not counted


def main() -> None:
    quick = "--quick" in sys.argv
    given = [argument for argument in sys.argv[1:] if argument != "--quick"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given[0] if given else temporary).absolute()
        output = folder / "run"
        if not (output / "metrics.jsonl").exists():
            write_rows(folder, 128 if quick else ROWS)
            (folder / "config.json").write_text(json.dumps(SMALL if quick else SHAPE))
            paths = {"config_name": folder / "config.json", "dataset_name": folder / "rows.jsonl"}
            runs.train(output, **KEYS | paths | (QUICK if quick else {}))
        rows = {"measured": measured(output), **plans(output)}
        device = json.loads((output / "starts.jsonl").read_text().splitlines()[-1])["device"]
    print(table(rows))
    print(write_result("stage", {"ran_on": device, "shape": SHAPE, "keys": KEYS, **rows}))


def write_rows(folder: Path, count: int) -> None:
    """Write rows of 80 and 110 random words: enough of them for a tokenizer of Pythia's size."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    syllables = [a + b for a in "bdgklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(WORDS)]
    rows = [
        {"prompt": " ".join(draw.choices(words, k=80)), "completion": " " + " ".join(draw.choices(words, k=110))}
        for _ in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured(output: Path) -> dict[str, float]:
    """Return the seconds of the parts of the stage, and of its median step, and the GiB of its fullest moment."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    pairs = json.loads((output / "stage-00" / "pairs.json").read_text())
    return {
        "sampling": pairs["sample_seconds"],
        "scoring": pairs["score_seconds"],
        "training": sum(row["seconds"] for row in rows),
        "step": statistics.median(row["seconds"] for row in rows[1:]),
        "memory_gib": max(row["memory_gib"] for row in rows),
    }


def plans(output: Path) -> dict[str, dict[str, float]]:
    """Plan the run by a data sheet, or by short tests of this machine without a GPU, and by its own first steps."""
    from irlfast.engine.hardware import read_cluster
    from irlfast.startup.calibration import rates_here, rates_of_run, read_run, room_here
    from irlfast.startup.plan_memory import TRAINING_MOMENTS, Room, most
    from irlfast.startup.plan_run import plan_run, work_on
    from irlfast.startup.plan_seconds import assumed_rates

    done = read_run(output)
    if done.on_gpu:
        cluster = read_cluster(GPU, 1)
        assumed = assumed_rates(cluster, done.config)
        room = Room(cluster.gpu.memory, 1, on_gpu=True, runtime=assumed.runtime)
    else:
        assumed, room = rates_here(done.config, 1), room_here(1)
    with tempfile.TemporaryDirectory() as temporary:
        first = first_steps(output, Path(temporary, "run"), STEPS)
        calibrated = rates_of_run(first, assumed, 1, room.on_gpu)
    found = {}
    for source, rates in (("data sheet", assumed), ("first steps", calibrated)):
        plan = plan_run(done.config, done.size, room, rates, work_on(done.config, done.train, 0, 0))
        phase = plan.phases[-1]
        found[source] = {part: phase.seconds[part] for part in PARTS}
        memory = most({moment: plan.memory[moment] for moment in TRAINING_MOMENTS})
        found[source] |= {"step": sum(phase.step.values()), "memory_gib": memory / 2**30}
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    columns = (*PARTS, "step", "memory_gib")
    lines = [("", *columns), ("---",) * (len(columns) + 1)]
    lines += [(name, *(f"{row[column]:.3g}" for column in columns)) for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
