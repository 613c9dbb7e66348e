"""Figures 3 and 4 of Inverse-RLignment (arXiv 2405.15624) at a CPU's size, on the CMU dictionary.

    python -m benchmarks.afd --data DATA

The golden reward of an answer is 1 less its phoneme errors per phoneme of the expert's answer, so that the
demonstrations have the golden reward 1. From one early SFT policy, the initial one, the script trains:

- the five baselines of figure 3: SFT on demonstrations and on preferred answers; DPO on preferences, on edited answers
  and on demonstrations against the policy's own answers;
- the reward models of figure 4: AfD's three, and Bradley–Terry on preferences.

Two of the paper's sources have a program in their place here. People's preferences are those of the golden reward with
Bradley–Terry noise, between two answers of the initial policy. The edits of a stronger model are the initial policy's
answers with half of their errors corrected.

Then the script samples 1,000 answers of the SFT policy to each of some held-out words. It computes the golden reward of
the best of n by each reward, and how often that answer beats the greedy one, for n = 1, 2, 4, … 1,000. It writes
``benchmarks/results/DATE-afd-cmudict.json`` and a plot beside it. A stopped run resumes.
"""

import difflib
import itertools
import json
import math
import random
import shutil
import statistics
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from benchmarks import runs
from benchmarks.conftest import ROOT, write_result
from benchmarks.rewards import COMMON, REWARD, distance
from benchmarks.runs import parser, settings, share, train
from irlfast.common.files import write_jsonl
from irlfast.evaluation.curves import best_of_each

WORDS, HELD_OUT, BON_WORDS, N = 3840, 500, 24, 1000
STEPS = 60  # of every baseline, on 64 words each: one pass
NOISE = 0.1  # of a preference: its probability is σ(difference of golden rewards / NOISE)
OWN = {"max_train_samples": WORDS, "max_eval_samples": HELD_OUT, "seed": 0}
SFT = {"method": "sft", "sft_steps": STEPS, "sft_learning_rate": 1e-3, "sft_global_batch_size": 64}
DPO = {"inner_steps": STEPS, "learning_rate": 5e-5, "beta": 0.1, "stages": 1}
BASELINES: dict[str, tuple[str, dict[str, object]]] = {  # name -> its file of rows, its keys
    "SFT-AfD": ("demonstrations", SFT),
    "SFT-preferred": ("preferences", SFT),
    "DPO-preference": ("preferences", DPO | {"method": "dpo"}),
    "DPO-LLMEdit": ("edits", DPO | {"method": "dpo"}),
    "DPO-AfD": ("demonstrations", DPO | {"method": "irft"}),
}
LEARNED = REWARD | {"method": "reward", "reward_steps": 40, "max_train_samples": 2560}  # one pass
REWARDS = ("init_sft", "init_demo", "sft_demo", "preference")


def golden(completions, expert, **columns) -> list[float]:
    """Return each answer's golden reward, as a ``reward_function`` does. ``expert`` is a column of the rows."""
    return [golden_reward(*both) for both in zip(completions, expert, strict=True)]


def golden_reward(answer: str, expert: str) -> float:
    return 1 - distance(expert.split(), answer.split()) / len(expert.split())


def write_prompts(path: Path, demonstrations: Path, count: int) -> dict[str, object]:
    """Write the first demonstrations with a column ``expert``, which :func:`golden` gets; return the keys for them."""
    with demonstrations.open() as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, count)]
    write_jsonl(path, [row | {"expert": row["completion"]} for row in rows])
    return {"dataset_name": path, "max_train_samples": count}


def best_of_n(output: Path, rollouts: Path | None, **keys: object) -> tuple[list[dict], list[list[str]], np.ndarray]:
    """Run ``irlfast bon``; return its prompts' best rows, all answers ``[P][n]`` and their rewards ``[P, n]``.

    ``rollouts`` are answers of an earlier run, which are scored again.
    """
    part = output / "part-00000"
    if rollouts and not output.exists():
        shutil.copytree(rollouts, part / "rollouts")
    runs.start(["-m", "irlfast.bon", *settings(keys | {"output_dir": output})])
    rows = [json.loads(line) for path in sorted((part / "rollouts").glob("*.jsonl")) for line in path.open()]
    answers = [row["answer"].strip() for row in sorted(rows, key=lambda row: row["index"])]
    rewards = load_file(part / "scores.safetensors")["rewards"]
    n = rewards.shape[1]
    best = [json.loads(line) for line in (output / "best.jsonl").open()]
    return best, [answers[start : start + n] for start in range(0, len(answers), n)], rewards


def write_pairs(folder: Path, best: list[dict], answers: list[list[str]], scores: np.ndarray) -> None:
    """Write preferences between two answers of the initial policy, and edits of the first one."""
    source = random.Random(0)
    preferences, edits = [], []
    for row, (first, second), (one, two) in zip(best, answers, scores.tolist(), strict=True):
        word = row["messages"][0]["content"]
        if first != second:
            first_wins = source.random() < 1 / (1 + math.exp((two - one) / NOISE))
            chosen, rejected = (first, second) if first_wins else (second, first)
            preferences.append({"prompt": word, "chosen": chosen, "rejected": rejected})
        edited = edit(first, row["expert"], source)
        if edited != first:
            edits.append({"prompt": word, "chosen": edited, "rejected": first})
    write_jsonl(folder / "preferences.jsonl", preferences)
    write_jsonl(folder / "edits.jsonl", edits)


def edit(answer: str, expert: str, source: random.Random) -> str:
    """Correct each error of an answer with probability one half."""
    given, right = answer.split(), expert.split()
    edited = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, given, right, autojunk=False).get_opcodes():
        edited += right[c:d] if kind != "equal" and source.random() < 0.5 else given[a:b]
    return " ".join(edited)


def train_all(folder: Path, data: Path) -> dict[str, float]:
    """Train the initial policy, the baselines and the reward models; return the golden reward of each policy."""
    demonstrations = data / "cmudict_train.jsonl"
    keys = COMMON | OWN | {"dataset_name": demonstrations, "eval_dataset_name": data / "cmudict_test.jsonl"}
    new = {"config_name": ROOT / "irlfast/demo/config.json", "train_tokenizer": 384}
    train(folder / "initial", **keys | {"max_train_samples": 24000}, **new, method="sft", sft_steps=100)
    initial = folder / "initial" / "final"
    keys |= {"model_name_or_path": initial}
    prompts = write_prompts(folder / "prompts.jsonl", demonstrations, WORDS)
    two = {"model_name_or_path": initial, "num_generations": 2, "reward_function": "benchmarks/afd.py:golden"}
    write_pairs(folder, *best_of_n(folder / "pairs", None, **COMMON | OWN | prompts | two))
    files = {"demonstrations": demonstrations, **{name: folder / f"{name}.jsonl" for name in ("preferences", "edits")}}
    scores = {"initial": mean_golden(folder / "initial" / "sft")}
    for name, (rows, own) in BASELINES.items():
        train(folder / name, **keys | own | {"dataset_name": files[rows]})
        scores[name] = mean_golden(folder / name / ("sft" if own["method"] == "sft" else "stage-00"))
    for pairs_of in REWARDS:
        own = keys | SFT | LEARNED | {"reward_data": pairs_of}
        if pairs_of == "preference":
            own |= {"dataset_name": files["preferences"], "sft_steps": 0, "model_name_or_path": sft_policy(folder)}
        else:
            share(folder / "SFT-AfD", folder / pairs_of, "sft")
        train(folder / pairs_of, **own)
    return scores


def sft_policy(folder: Path) -> Path:
    return folder / "SFT-AfD" / "sft" / "policy"


def mean_golden(phase: Path) -> float:
    """Return the mean golden reward of a policy's greedy answers to the held-out words."""
    rows = [json.loads(line) for line in (phase / "answers.jsonl").open()]
    return statistics.mean(golden_reward(row["answer"], row["expert"]) for row in rows)


def choose_all(folder: Path, data: Path, words: int, n: int) -> dict[str, list[dict[str, float]]]:
    """Return, for each reward, the curve over n: golden reward of the best of n, and its win rate over greedy."""
    policy = sft_policy(folder)
    prompts = write_prompts(folder / "held-out.jsonl", data / "cmudict_test.jsonl", words)
    keys = COMMON | OWN | prompts | {"model_name_or_path": policy, "num_generations": n}
    greedy = {row["prompt"]: row["answer"] for row in map(json.loads, (policy.parent / "answers.jsonl").open())}
    rewards: dict[str, dict[str, object]] = {"golden": {"reward_function": "benchmarks/afd.py:golden"}}
    rewards |= {name: {"reward_model_name_or_path": folder / name / "final"} for name in REWARDS}
    rewards["log-likelihood"] = {"implicit_reward_policy": policy, "beta": 1.0}
    first, curves = None, {}
    for name, own in rewards.items():
        output = folder / "bon" / name
        best, answers, scores = best_of_n(output, first, **keys | own)
        first = first or output / "part-00000" / "rollouts"
        values = np.array(
            [[golden_reward(answer, row["expert"]) for answer in each] for row, each in zip(best, answers, strict=True)]
        )
        deterministic = np.array([[golden_reward(greedy[row["prompt"]], row["expert"])] for row in best])
        curves[name] = curve(scores, values, deterministic)
    return curves


def curve(rewards: np.ndarray, values: np.ndarray, deterministic: np.ndarray) -> list[dict[str, float]]:
    """Return golden reward and win rate of the best of n by ``rewards [P, N]``, exact over all choices of n.

    ``values [P, N]`` are golden rewards of the answers, ``deterministic [P, 1]`` of the greedy answers. A tie is half
    a win.
    """
    wins = (values > deterministic) + (values == deterministic) / 2
    both = zip(best_of_each(rewards, values), best_of_each(rewards, wins), strict=True)
    return [{"n": n, "golden": float(best.mean()), "win_rate": float(won.mean())} for (n, best), (_, won) in both]


def draw(scores: dict[str, float], curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw figure 3 as bars, and the two panels of figure 4."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    bars, *panels = figure.subplots(1, 3)
    bars.barh(list(scores)[::-1], list(scores.values())[::-1])
    bars.set_title("golden reward of greedy answers; demonstrations have 1", fontsize=9)
    titles = {"golden": "golden reward of the best of n", "win_rate": "share that beats the greedy answer"}
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        for name, rows in curves.items():
            axes.plot([row["n"] for row in rows], [row[metric] for row in rows], label=name)
        axes.set_xscale("log")
        axes.set_title(title, fontsize=9)
    panels[0].legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    arguments = parser(__doc__, "afd")
    arguments.add_argument("--data", type=Path, required=True, help="folder of cmudict_{train,test}.jsonl")
    options = arguments.parse_args()
    folder, data = options.output.resolve(), options.data.resolve()
    scores = train_all(folder, data)
    curves = choose_all(folder, data, *((4, 8) if options.quick else (BON_WORDS, N)))
    for name, score in scores.items():
        gained = (score - scores["initial"]) / (1 - scores["initial"])
        print(f"{name:16} golden reward {score:.3f}, {gained:.0%} of the way from the initial policy to the experts")
    for name, rows in curves.items():
        print(f"{name:16}" + "".join(f"  {row['n']}: {row['golden']:.3f} {row['win_rate']:.2f}" for row in rows))
    keys = {"common": COMMON | OWN, "reward": LEARNED} | {name: own for name, (_, own) in BASELINES.items()}
    path = write_result("afd-cmudict", {"keys": keys, "golden": scores, "best_of_n": curves})
    draw(scores, curves, path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
