"""Simulate how often the 95% intervals of an evaluation contain the true value (docs/evaluation.md has the table).

    python -m benchmarks.coverage

Each case draws the values of many evaluations, whose true mean is known, and counts the intervals that contain it. The
cases are means of symmetric and skewed values, shares of one and of several samples per prompt, differences of shares,
and several seeds. The script writes ``benchmarks/results/DATE-coverage.json``.
"""

import argparse
import math
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.conftest import write_result
from irlfast.evaluation import statistics
from irlfast.evaluation.statistics import mean_interval, pooled, share_difference_interval, share_interval

PROMPTS = (20, 50, 200, 500)
Draw = Callable[[np.random.Generator, int], np.ndarray]  # the values of an evaluation with so many prompts


def means() -> Iterator[tuple[str, Draw, float]]:
    """Yield the name, the draw and the true mean of each shape."""
    yield "normal", lambda source, count: source.normal(size=count), 0.0
    yield "exponential", lambda source, count: source.exponential(size=count), 1.0
    yield "gamma, shape 1/2", lambda source, count: source.gamma(0.5, size=count), 0.5
    yield "lognormal, σ = 1", lambda source, count: source.lognormal(size=count), math.exp(0.5)
    yield (
        "90% zeros, else exponential",
        lambda source, count: (source.random(count) < 0.1) * source.exponential(size=count),
        0.1,
    )


def shares() -> Iterator[tuple[str, Draw, float]]:
    """Yield shares near 0 and in the middle: of one sample per prompt, and of four that are more or less alike."""
    for share in (0.01, 0.05, 0.3, 0.5):
        yield f"{share:.0%}, one sample", lambda source, count, p=share: source.binomial(1, p, count) / 1.0, share
        for alike in (0.1, 0.8):

            def draw(source: np.random.Generator, count: int, p: float = share, rho: float = alike) -> np.ndarray:
                return source.binomial(4, source.beta(p * (1 / rho - 1), (1 - p) * (1 / rho - 1), count)) / 4

            yield f"{share:.0%}, four samples, correlation {alike}", draw, share


def differences() -> Iterator[tuple[str, Draw, float]]:
    """Yield differences of two models' shares, by the prompts that one of them alone gets right."""
    for gained, lost in ((0.004, 0.001), (0.05, 0.05), (0.2, 0.05), (0.3, 0.3)):

        def draw(source: np.random.Generator, count: int, a: float = gained, b: float = lost) -> np.ndarray:
            return source.choice([1.0, -1.0, 0.0], p=[a, b, 1 - a - b], size=count)

        yield f"{gained:.1%} gained, {lost:.1%} lost", draw, gained - lost


def seeds() -> Iterator[tuple[str, Draw, float]]:
    """Yield values of five seeds, ``[5, prompts]``, by how much seeds and prompts differ beside the noise of 1."""
    for by_seed, by_prompt in ((0.0, 0.0), (0.0, 1.0), (0.3, 1.0), (1.0, 1.0)):

        def draw(source: np.random.Generator, count: int, s: float = by_seed, p: float = by_prompt) -> np.ndarray:
            effects = s * source.normal(size=(5, 1)) + p * source.normal(size=(1, count))
            return effects + source.normal(size=(5, count))

        yield f"seeds {by_seed}, prompts {by_prompt}", draw, 0.0


KINDS = {
    "mean": (means, mean_interval),
    "share": (shares, share_interval),
    "difference of shares": (differences, share_difference_interval),
    "five seeds": (seeds, pooled),
}


def coverage(draw: Draw, interval: Callable, truth: float, prompts: int, draws: int) -> float:
    source = np.random.default_rng(0)
    intervals = [interval(draw(source, prompts)) for _ in range(draws)]
    return sum(each.low <= truth <= each.high for each in intervals) / draws


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="few draws, to check that everything runs")
    quick = arguments.parse_args().quick
    draws, statistics.RESAMPLES = (5, 99) if quick else (1000, 999)
    table: dict[str, dict[str, dict[int, float]]] = {}
    for kind, (cases, interval) in KINDS.items():
        print(f"| {kind} | {' | '.join(f'{count} prompts' for count in PROMPTS)} |")
        print("| --- |" + " --- |" * len(PROMPTS))
        for name, draw, truth in cases():
            row = {count: coverage(draw, interval, truth, count, draws) for count in PROMPTS}
            table.setdefault(kind, {})[name] = row
            print(f"| {name} | {' | '.join(f'{share:.1%}' for share in row.values())} |", flush=True)
    print(write_result("coverage", {"draws": draws, "resamples": statistics.RESAMPLES, "coverage": table}))


if __name__ == "__main__":
    main()
