"""Compare ways to stabilise AfD: a replay of earlier answers, a KL to the reference, both, or neither.

    python -m benchmarks.stability --seeds 0 1 2

Every run has four adversarial stages on the shipped task, from one SFT policy per seed, at twice the recipe's learning
rate, so that the policy can exploit the discriminator's reward. The script prints mean ± standard deviation over seeds
of: exact match after the last stage, the lowest exact match of any stage, NLL, and the discriminator's held-out
accuracy. It writes ``benchmarks/results/DATE-stability.json``. A stopped run resumes.
"""

from pathlib import Path

from benchmarks.conftest import write_result
from benchmarks.runs import Figures, markdown, parser, seeds_of, share, summarise, train

KEYS = {"sft_steps": 200, "stages": 4, "kl_in": "none", "learning_rate": 2e-5, "history": 0, "max_eval_samples": 500}
KL = {"kl_in": "loss", "beta": 1.0}
SWITCHES = {"none": {}, "replay": {"history": 1}, "KL": KL, "replay and KL": KL | {"history": 1}}
COLUMNS = {
    "last": "exact match, last stage",
    "least": "least of any stage",
    "nll": "NLL, last stage",
    "accuracy": "reward accuracy, last stage",
}


def train_seed(folder: Path, seed: int) -> Figures:
    """Train with every switch, and return the metrics by switch."""
    rows: Figures = {}
    for name, own in SWITCHES.items():
        output = folder / name
        if name != "none":
            share(folder / "none", output, "sft")
        figures = train(output, "afd", **KEYS | own, seed=seed)
        phases = sorted(name for name in figures if name.startswith("stage") and "/" not in name)
        stages = [figures[phase] for phase in phases]
        rows.setdefault("SFT", {"last": figures["sft"]["exact_match"], "nll": figures["sft"]["nll"]})
        rows[name] = {
            "last": stages[-1]["exact_match"],
            "least": min(stage["exact_match"] for stage in stages),
            "nll": stages[-1]["nll"],
            "accuracy": figures[f"{phases[-1]}/reward"]["reward_accuracy"],
        }
    return rows


def main() -> None:
    arguments = parser(__doc__, "stability")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = arguments.parse_args()
    numbers = seeds_of(options)
    seeds = [train_seed(options.output.resolve() / f"seed-{seed}", seed) for seed in numbers]
    table = summarise(seeds, list(COLUMNS))
    print(markdown(table, COLUMNS))
    result = {"keys": {"all": KEYS, **SWITCHES}, "seeds": dict(zip(numbers, seeds, strict=True)), "table": table}
    print(write_result("stability", result))


if __name__ == "__main__":
    main()
