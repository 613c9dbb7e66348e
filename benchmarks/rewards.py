"""Compare the papers' methods and learned rewards on the CMU dictionary, from one SFT policy per seed.

    python -m benchmarks.rewards --data DATA --seeds 0 1 2

For every seed, the script trains:

- an early SFT policy, which is AfD's initial policy, and the SFT policy;
- IRFT, SPIN, and adversarial AfD;
- RFT with each alignment on one learned reward;
- AfD's reward for each kind of pairs, and a policy aligned to it.

Then it chooses the best of 16 of the SFT policy's answers by every reward and by likelihoods, an ensemble over seeds
among them. The quality of a reward is its rank correlation with few phoneme errors among the SFT policy's answers to a
prompt. The script prints mean ± standard deviation over seeds and writes
``benchmarks/results/DATE-rewards-cmudict.json``. A stopped run resumes.
"""

import json
import shutil
import statistics
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from scipy.stats import rankdata

from benchmarks import runs
from benchmarks.conftest import ROOT, write_result
from benchmarks.runs import markdown, parser, seeds_of, settings, share, summarise, train

COMMON = {
    "max_train_samples": 24000,
    "max_eval_samples": 1000,
    "max_prompt_length": 64,
    "max_length": 96,
    "max_new_tokens": 32,
    "sft_learning_rate": 2e-3,
    "sft_optim": "adamw_torch",
    "sft_global_batch_size": 128,
    "global_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "save_steps": 100,
    "logging_steps": 25,
}
EARLY, SFT = 100, 400  # steps
REWARD = {"reward_steps": 200, "reward_learning_rate": 3e-4, "reward_optim": "adamw_torch"}
IRFT = {"method": "irft", "stages": 3, "learning_rate": 5e-5, "beta": 1.0, "nll_weight": 0.5}
SPIN = {"method": "spin", "stages": 2, "inner_steps": 60, "learning_rate": 5e-5, "beta": 1.0, "nll_weight": 0.5}
RFT = REWARD | {"method": "rft", "stages": 1, "num_generations": 4, "learning_rate": 1e-5, "beta": 1.0}
AFD = RFT | {"method": "afd", "stages": 2, "reward_steps": 100, "prompts_per_stage": "split", "history": 1}
WORDS = {"max_train_samples": 8000}  # for every method except SFT
PROMPTS = {"max_train_samples": 4000}  # for RFT and adversarial AfD, which sample four answers per prompt
PAIRS = ("init_sft", "init_demo", "sft_demo")
N, BON_PROMPTS = 16, 500


def best_of_n(output: Path, policy: Path, reward: dict[str, object], rollouts: Path | None, **keys) -> None:
    """Choose the best of N answers by the reward that the keys name, from the answers of an earlier run, if any."""
    if rollouts and not output.exists():
        shutil.copytree(rollouts, output / "part-00000" / "rollouts")
    own = {"model_name_or_path": policy, "num_generations": N, **reward}
    own |= {"max_train_samples": BON_PROMPTS, "beta": 1.0, "output_dir": output}
    runs.start(["-m", "irlfast.bon", *settings(COMMON | keys | own)])


def train_seed(folder: Path, seed: int, data: Path) -> dict[str, dict]:
    """Train every method and every reward model, and return their metrics."""
    source = {"dataset_name": data / "cmudict_train.jsonl", "eval_dataset_name": data / "cmudict_test.jsonl"}
    keys = COMMON | source | {"seed": seed}
    new = {"config_name": ROOT / "irlfast/demo/config.json", "train_tokenizer": 384}
    train(folder / "early", **keys, **new, method="sft", sft_steps=EARLY)
    early = keys | {"model_name_or_path": folder / "early" / "final", "sft_steps": SFT}
    train(folder / "SFT", **early, method="sft")
    policy = folder / "SFT" / "sft" / "policy"
    figures = {"SFT": errors(folder / "SFT" / "sft")}
    for pairs in PAIRS:
        share(folder / "SFT", folder / pairs, "sft")
        phases = train(folder / pairs, **early | REWARD | WORDS, method="reward", reward_data=pairs)
        figures[f"reward {pairs}"] = phases["stage-00/reward"]
    from_sft = keys | {"model_name_or_path": policy} | WORDS
    for name, own in (("IRFT", IRFT), ("SPIN", SPIN), ("AfD, adversarial", AFD | PROMPTS)):
        if name != "IRFT":
            share(folder / "IRFT", folder / name, "initial")
        figures[name] = last(folder / name, train(folder / name, **from_sft | own))
    for align in ("rloo", "ppo", "apa", "bon"):
        output = folder / f"rft-{align}"
        share(folder / "IRFT", output, "initial")
        if align != "rloo":
            share(folder / "rft-rloo", output, "stage-00/reward")
        figures[f"RFT, {align}"] = last(output, train(output, **from_sft | RFT | PROMPTS, align=align))
    for pairs in PAIRS:
        output = folder / f"rloo-{pairs}"
        share(folder / "IRFT", output, "initial")
        learned = {"reward_data": "none", "reward_model_name_or_path": f"[{folder / pairs / 'final'}]"}
        figures[f"AfD, RLOO on {pairs}"] = last(output, train(output, **from_sft | RFT | PROMPTS | learned))
    return figures


def choose_seed(folder: Path, seed: int, data: Path) -> dict[str, dict]:
    """Choose the best of N of the SFT policy's answers by every reward; compare with its greedy answers."""
    policy = folder / "SFT" / "sft" / "policy"
    figures: dict[str, dict] = {}
    model, implicit, reference = "reward_model_name_or_path", "implicit_reward_policy", "implicit_reward_reference"
    irft, init_demo = folder / "IRFT" / "final", folder / "init_demo" / "final"
    rewards: dict[str, dict[str, object]] = {
        "init_sft": {model: folder / "init_sft" / "final"},
        "init_demo": {model: init_demo},
        "sft_demo": {model: folder / "sft_demo" / "final"},
        "implicit: SFT to early": {implicit: policy, reference: folder / "early" / "final"},
        "implicit: IRFT to SFT": {implicit: irft, reference: policy},
        "log-likelihood": {implicit: policy},
        "log-likelihood + init_demo": {implicit: policy, model: init_demo},
        "log-likelihood of IRFT": {implicit: irft},
        "log-likelihood of all seeds' SFT": {implicit: f"[{', '.join(map(str, sft_policies(folder.parent)))}]"},
    }
    first = None
    for name, reward in rewards.items():
        output = folder / "bon" / name
        test = {"dataset_name": data / "cmudict_test.jsonl", "seed": seed}
        best_of_n(output, policy, reward, first, **test)
        first = first or output / "part-00000" / "rollouts"
        figures[f"best of {N}, {name}"] = quality(output)
    figures["SFT, the same words"] = first_words(folder / "SFT" / "sft", output)
    return figures


def sft_policies(output: Path) -> list[Path]:
    return sorted(output.glob("seed-*/SFT/sft/policy"))


def last(output: Path, figures: dict[str, dict]) -> dict:
    """Return the metrics of the last policy, and of its reward if it has one."""
    phase = max(name for name in figures if name.startswith("stage") and "/" not in name)
    metrics = errors(output / phase)
    if f"{phase}/reward" in figures:
        metrics["reward_accuracy"] = figures[f"{phase}/reward"]["reward_accuracy"]
    return metrics


def errors(folder: Path) -> dict:
    """Return the held-out metrics of a phase, with the phoneme error rate of its greedy answers."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").open()]
    return json.loads((folder / "eval.json").read_text()) | {"phoneme_error_rate": error_rate(rows)}


def first_words(folder: Path, bon: Path) -> dict:
    """Return the metrics of greedy answers to the words for which best of N was sampled."""
    prompts = {json.loads(line)["prompt"] for line in (bon / "best.jsonl").open()}
    rows = [row for row in map(json.loads, (folder / "answers.jsonl").open()) if row["prompt"] in prompts]
    exact = statistics.mean(row["answer"] == row["expert"] for row in rows)
    return {"exact_match": exact, "phoneme_error_rate": error_rate(rows), "reward_accuracy": None, "count": len(rows)}


def error_rate(rows: list[dict]) -> float:
    """Return the edit distance in phonemes per phoneme of the experts."""
    wrong = sum(distance(row["expert"].split(), row["answer"].split()) for row in rows)
    return wrong / sum(len(row["expert"].split()) for row in rows)


def distance(one: list[str], two: list[str]) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def quality(output: Path) -> dict:
    """Return the metrics of a best-of-N run's best answers, and the reward's rank correlation with fewer errors."""
    best = [json.loads(line) for line in (output / "best.jsonl").open()]
    rollouts = [
        json.loads(line)
        for path in sorted((output / "part-00000" / "rollouts").glob("*.jsonl"))
        for line in path.open()
    ]
    answers = {row["index"]: row["answer"].split() for row in rollouts}
    wrong = np.array(
        [[distance(row["expert"].split(), answers[i * N + k]) for k in range(N)] for i, row in enumerate(best)]
    )
    rewards = load_file(output / "part-00000" / "scores.safetensors")["rewards"].numpy()
    each = [correlation(a, b) for a, b in zip(rewards, wrong, strict=True) if a.std() > 0 and b.std() > 0]
    curve = json.loads((output / "curve.json").read_text())
    return {
        "exact_match": statistics.mean(row["answer"].strip() == row["expert"].strip() for row in best),
        "phoneme_error_rate": error_rate(best),
        "rank_correlation": statistics.mean(each),
        "exact_match_by_n": {row["n"]: row["exact_match"] for row in curve},
        "reward_accuracy": None,
    }


def correlation(rewards: np.ndarray, wrong: np.ndarray) -> float:
    """Return Spearman's correlation over a prompt's answers: 1 if a higher reward always has fewer errors."""
    return float(np.corrcoef(rankdata(rewards), rankdata(-wrong))[0, 1])


COLUMNS = {
    "exact_match": "exact match",
    "phoneme_error_rate": "phoneme error rate",
    "reward_accuracy": "reward accuracy",
    "rank_correlation": "rank correlation",
}


def main() -> None:
    arguments = parser(__doc__, "rewards")
    arguments.add_argument(
        "--data", type=Path, required=True, help="folder of cmudict_train.jsonl and cmudict_test.jsonl"
    )
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = arguments.parse_args()
    folder = options.output.resolve()
    folders = {seed: folder / f"seed-{seed}" for seed in seeds_of(options)}
    trained = [train_seed(own, seed, options.data.resolve()) for seed, own in folders.items()]
    chosen = [choose_seed(own, seed, options.data.resolve()) for seed, own in folders.items()]
    seeds = [both | more for both, more in zip(trained, chosen, strict=True)]
    table = summarise(seeds, tuple(COLUMNS))
    print(markdown(table, COLUMNS))
    result = {
        "keys": {
            "common": COMMON,
            "reward": REWARD,
            "irft": IRFT,
            "spin": SPIN,
            "rft": RFT | PROMPTS,
            "afd": AFD | PROMPTS,
        },
        "seeds": dict(zip(map(str, folders), seeds, strict=True)),
        "table": table,
    }
    print(write_result("rewards-cmudict", result))


if __name__ == "__main__":
    main()
