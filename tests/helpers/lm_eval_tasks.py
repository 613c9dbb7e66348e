"""Tasks in lm-eval's format on rows of the demo, and local copies of the six datasets with made-up rows."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from irlfast.common.files import read_jsonl, write_jsonl
from tests.helpers.runs import ROOT

LM_EVAL = next(iter((ROOT / ".venv").glob("lm_eval-*")), None)  # `make test-all` installs it apart from other packages
METRICS = {"local_choice": ("acc", "acc_norm"), "local_words": ("exact_match",)}


def environment() -> dict[str, str]:
    """The variables with which this interpreter has lm-eval."""
    paths = [str(LM_EVAL), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def write_tasks(folder: Path) -> None:
    """Write a task of multiple choice and one of generation, with rows for examples and rows for questions."""
    rows = [row for _, row in read_jsonl(ROOT / "irlfast/demo/test.jsonl")][:40]
    texts = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
    choices = [[row["answer"], other["answer"], "0"] for row, other in zip(texts, texts[1:] + texts[:1], strict=True)]
    rows = [row | {"choices": each, "label": 0} for row, each in zip(texts, choices, strict=True)]
    folder.mkdir()
    write_jsonl(folder / "examples.jsonl", rows[24:])
    write_jsonl(folder / "questions.jsonl", rows[:24])
    files = {"train": str(folder / "examples.jsonl"), "test": str(folder / "questions.jsonl")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "{{question}}\n",
        "metadata": {"version": 1.0},
    }
    kinds = {
        "local_choice": {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"},
        "local_words": {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        },
    }
    for name, kind in kinds.items():
        metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS[name]]
        task = {"task": name, **common, **kind, "metric_list": metrics}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def write_datasets(folder: Path) -> None:
    """Write made-up rows in the columns of the six datasets: ``folder/owner/name``."""
    numbers, letters = range(30), list("abcd")
    questions = [f"What is {i} plus {i}?" for i in numbers]
    arc = [
        {
            "question": questions[i],
            "choices": {"text": [str(2 * i), str(i), "none"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i in numbers
    ]
    truth = [
        {"question": questions[i], "mc2_targets": {"choices": [str(2 * i), "b", "c"], "labels": [1, 1, 0]}}
        for i in numbers
    ]
    names = [
        {
            "sentence": f"Ann told Sue {i} times that _ was late.",
            "option1": "Ann",
            "option2": "Sue",
            "answer": "12"[i % 2],
        }
        for i in numbers
    ]
    sums = [{"question": questions[i], "answer": f"It is {i}+{i}.\n#### {2 * i}"} for i in numbers]
    endings = [
        {"activity_label": "Adding", "ctx_a": questions[i], "ctx_b": "then", "endings": letters, "label": str(i % 4)}
        for i in numbers
    ]
    subject = [{"question": questions[i], "choices": letters, "answer": i % 4} for i in numbers]
    assert LM_EVAL
    tasks = (LM_EVAL / "lm_eval/tasks/mmlu/default").glob("mmlu_*.yaml")
    subjects = {path.stem.removeprefix("mmlu_"): {"dev": subject[:5], "test": subject[5:7]} for path in tasks}
    write_dataset(folder / "allenai/ai2_arc", {"ARC-Challenge": {"train": arc[:26], "test": arc[26:]}})
    write_dataset(folder / "truthfulqa/truthful_qa", {"multiple_choice": {"validation": truth[:4]}})
    write_dataset(folder / "allenai/winogrande", {"winogrande_xl": {"train": names[:6], "validation": names[6:10]}})
    write_dataset(folder / "openai/gsm8k", {"main": {"train": sums[:6], "test": sums[6:8]}})
    write_dataset(folder / "Rowan/hellaswag", {"default": {"train": endings[:12], "validation": endings[12:16]}})
    write_dataset(folder / "cais/mmlu", subjects)


def write_dataset(folder: Path, configurations: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]]) -> None:
    head = []
    for name, splits in configurations.items():
        for split, rows in splits.items():
            write_jsonl(folder / name / f"{split}.jsonl", rows)
        files = [{"split": split, "path": f"{name}/{split}.jsonl"} for split in splits]
        head.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': head})}---\n", encoding="utf-8")
