"""Compare the pair loss with its peers: ``pytest benchmarks/ [--quick]``. Every row is checked against fp64 first.

The ratio of two rows' times is the median of the ratios of all rounds, because the speed of a machine changes from
round to round. A test fails for a wrong value and for an irlfast row that cannot run, but not for a missed goal.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks import measure
from benchmarks.conftest import save
from benchmarks.measure import Case

GPU = measure.DEVICE.type == "cuda"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the peers' own

EAGER = ("irlfast", "materialised", "TRL", "Liger", "torch linear_cross_entropy", "bare products")
ALL = (*EAGER, "Liger compiled", "CCE exact", "CCE default", "torch.compile")
CURVES = ("irlfast", "materialised", "bare products")
# What a GPU decides between. `irlfast, skipping` leaves tiles out, so that only trained inputs say how fast it is.
VARIANTS = ("irlfast", "irlfast, epilogue", "irlfast, cuda", "irlfast, skipping", "bare products")


def cpu_cases() -> list[Case]:
    shape = {"pairs": 4, "tokens": 256, "hidden": 512, "vocabulary": 32000}
    variants = ("irlfast; cached", "materialised; cached", "irlfast; frozen", "bare products; frozen")
    cached = ("irlfast; cached", "materialised; cached", "bare products; cached", "Liger; cached", "irlfast")
    exact = ("irlfast", "irlfast; cached", "irlfast, recompute", *EAGER[1:-1])
    small = Case("", CURVES, 4, 128, 256, 8000, memory=("irlfast", "materialised"))
    return [
        Case("fp32", (*ALL, *variants), **shape, memory=ALL),
        Case("fp32-half", ("irlfast", "materialised", "Liger", "bare products"), **shape, half=True),
        Case("bf16", cached, **shape, dtype="bfloat16"),
        Case("bf16-1024-trained", exact, 1, 1024, 256, 8000, dtype="bfloat16", trained=True),
        small._replace(name="curve"),
        *(small._replace(name=f"curve-N-x{factor}", pairs=4 * factor) for factor in (2, 4)),
        *(small._replace(name=f"curve-V-x{factor}", vocabulary=8000 * factor) for factor in (2, 4)),
    ]


def gpu_cases() -> list[Case]:
    variants = tuple(f"{row}; frozen" for row in ("irlfast", "materialised", "TRL", "CCE exact", "bare products"))
    full = ("irlfast", "irlfast, recompute", "TRL, as DPOTrainer", *ALL[1:], "irlfast; cached", *variants)
    half = ("irlfast", "materialised", "TRL", "Liger", "CCE exact", "bare products")
    trained = (*half, "irlfast, recompute", "irlfast, skipping", "CCE default")
    cases = []
    for hidden, vocabulary in SHAPES:
        shape = {"pairs": 16, "tokens": 256, "hidden": hidden, "vocabulary": vocabulary, "dtype": "bfloat16"}
        both = (*VARIANTS, *(f"{row}; frozen" for row in VARIANTS))
        cases.append(Case(f"variants-{hidden}x{vocabulary}", both, **shape))
        cases.append(Case(f"variants-{hidden}x{vocabulary}-trained", both, **shape, trained=True))
    cases.append(Case("variants-micro-batch", VARIANTS, 2, 256, 4096, 128256, "bfloat16"))
    for hidden, vocabulary in SHAPES:
        name = f"{hidden}x{vocabulary}"
        shape = {"pairs": 16, "tokens": 256, "hidden": hidden, "vocabulary": vocabulary, "dtype": "bfloat16"}
        cases.append(Case(name, full, **shape))
        cases.append(Case(f"{name}-trained", trained, **shape, trained=True))
        cases.append(Case(f"{name}-half", half, **shape, half=True))
    exact = ("irlfast", "irlfast; cached", "irlfast, recompute", "materialised", "TRL", "Liger", "CCE exact")
    large = Case("curve", (*CURVES, "TRL", "Liger", "CCE exact"), 16, 256, 2048, 32000, "bfloat16")
    return [
        *cases,
        Case("bf16-1024-trained", exact, 4, 1024, 4096, 32000, "bfloat16", trained=True),
        large,
        *(large._replace(name=f"curve-N-x{factor}", pairs=16 * factor) for factor in (2, 4, 8)),
        *(large._replace(name=f"curve-V-x{factor}", vocabulary=32000 * factor) for factor in (2, 4, 8)),
    ]


SHAPES = (4096, 32000), (2048, 50304), (4096, 128256)


def quick(case: Case) -> Case:
    """Return the case with small shapes: it checks in a minute that all rows run and are right."""
    small = case._replace(tokens=case.tokens // 4, hidden=128, vocabulary=case.vocabulary // 8)
    return small._replace(memory=case.memory[:1])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = gpu_cases() if GPU or metafunc.config.getoption("gpu_cases") else cpu_cases()
        if metafunc.config.getoption("quick"):
            cases = [quick(case) for case in cases]
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def test_pair_loss(case: Case, results: dict[str, Any]) -> None:
    if case.name in results["cases"]:
        pytest.skip("measured before")
    rows = measure.measure(case)
    results["cases"][case.name] = rows
    save(results)  # so that a stopped run keeps its results
    refused = ("wrong", "failed", "cannot run") if GPU else ("wrong", "failed")  # without a GPU, some rows cannot run
    ours = {row: result for row, result in rows["rows"].items() if row.startswith("irlfast")}
    assert not {row: result for row, result in ours.items() if result["status"] in refused}
    assert not {row: result for row, result in rows["rows"].items() if result["status"] == "wrong"}


@pytest.fixture(scope="module", autouse=True)
def goals(results: dict[str, Any]) -> Iterator[None]:
    """Add the goals with their measured values, after the last case of a full run."""
    yield
    measured_all = len(results["cases"]) == len(gpu_cases() if GPU else cpu_cases())
    results["complete"] = measured_all and not results["quick"]
    if not results["complete"]:
        return

    def result(case: str, row: str, key: str) -> Any:
        return results["cases"].get(case, {}).get("rows", {}).get(row, {}).get(key)

    def figure(case: str, row: str, key: str = "seconds") -> float:
        value = result(case, row, key)
        return math.nan if value is None else value

    def times(case: str, row: str, peer: str) -> float:
        both = zip(result(case, row, "runs") or [], result(case, peer, "runs") or [], strict=False)
        ratios = [ours / theirs for ours, theirs in both]
        return statistics.median(ratios) if ratios else math.nan

    for what, measured, limit in gpu_goals(figure, times) if GPU else cpu_goals(figure, times):
        met = None if math.isnan(measured) else measured <= limit
        results["goals"].append(
            {"what": what, "limit": limit, "measured": None if met is None else measured, "met": met}
        )


Figure = Callable[..., float]
Goal = tuple[str, float, float]  # what, measured, limit


def cpu_goals(figure: Figure, times: Figure) -> list[Goal]:
    memory = figure("fp32", "irlfast", "extra_mib")
    return [
        ("fp32: time / materialised", times("fp32", "irlfast", "materialised"), 0.75),
        ("fp32: time / Liger eager", times("fp32", "irlfast", "Liger"), 0.70),
        ("fp32: time / TRL", times("fp32", "irlfast", "TRL"), 0.30),
        ("fp32: time / the bare four products", times("fp32", "irlfast", "bare products"), 1.1),
        ("fp32: extra memory / materialised", memory / figure("fp32", "materialised", "extra_mib"), 0.20),
        (
            "fp32, half of the targets masked: time / materialised",
            times("fp32-half", "irlfast", "materialised"),
            0.46,
        ),
        (
            "bf16, cached reference: time / materialised fp32, computed reference",
            figure("bf16", "irlfast; cached") / figure("fp32", "materialised"),
            0.40,
        ),
        (
            "the same / materialised fp32, cached reference",
            figure("bf16", "irlfast; cached") / figure("fp32", "materialised; cached"),
            0.5,
        ),
        *accuracy_goals(figure),
        *scaling_goals(figure, 4, growth_by_vocabulary=4),  # from a 16 MiB slab to the logits of one pair
    ]


def gpu_goals(figure: Figure, times: Figure) -> list[Goal]:
    def memory(case: str, row: str, peer: str) -> float:
        return figure(case, row, "extra_mib") / figure(case, peer, "extra_mib")

    goals = []
    for (hidden, vocabulary), full, frozen in zip(SHAPES, (12.5, 9.8, 50), (9.4, 7.4, 37.6), strict=True):
        name = f"{hidden}x{vocabulary}"

        goals += [
            (f"{name}: ms (for an H200)", 1000 * figure(name, "irlfast"), full),
            (f"{name}, frozen head: ms (for an H200)", 1000 * figure(name, "irlfast; frozen"), frozen),
            (f"{name}: time / TRL", times(name, "irlfast", "TRL"), 0.85),
            (f"{name}: time / CCE exact", times(name, "irlfast", "CCE exact"), 0.85),
            (f"{name}: time / Liger", times(name, "irlfast", "Liger"), 0.8),
            (f"{name}, half masked: time / Liger", times(f"{name}-half", "irlfast", "Liger"), 0.45),
            (
                f"{name}, trained: time with skipping / CCE default",
                times(f"{name}-trained", "irlfast, skipping", "CCE default"),
                0.85,
            ),
            (f"{name}, frozen head: time / TRL", times(name, "irlfast; frozen", "TRL; frozen"), 0.8),
            (f"{name}: extra memory / TRL", memory(name, "irlfast", "TRL"), 0.5),
            (f"{name}: extra memory / Liger", memory(name, "irlfast", "Liger"), 0.3),
            (f"{name}: recompute, extra memory / TRL", memory(name, "irlfast, recompute", "TRL"), 0.1),
        ]
    return goals + accuracy_goals(figure) + scaling_goals(figure, 8, growth_by_vocabulary=1.1)


def accuracy_goals(figure: Figure) -> list[Goal]:
    rows = ("irlfast", "irlfast; cached", "irlfast, recompute")
    what = "bf16, 1,024 tokens, {}: nats per sequence against fp64"
    return [(what.format(row), figure("bf16-1024-trained", row, "nats"), 1e-3) for row in rows]


def scaling_goals(figure: Figure, factor: int, growth_by_vocabulary: float) -> list[Goal]:
    goals = []
    for axis, growth in (("N", 1.1), ("V", growth_by_vocabulary)):
        base, grown = (figure(case, "irlfast") for case in ("curve", f"curve-{axis}-x{factor}"))
        goals.append((f"{axis} ×{factor}: time / ({factor} × time)", grown / (factor * base), 1.1))
        base, grown = (figure(case, "irlfast", "working_mib") for case in ("curve", f"curve-{axis}-x{factor}"))
        goals.append((f"{axis} ×{factor}: extra memory without gradients, growth", grown / base, growth))
    return goals
