"""Print the figures of an evaluation: a table per model beside the baseline, and the verdict in words."""

from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from irlfast.common.printable import printable
from irlfast.evaluation.figures import SAMPLED, figure_of
from irlfast.evaluation.table import is_shown

WIDTH = 120
WORDS = {True: "better", False: "worse", None: "changed"}


def print_figures(figures: dict[str, Any]) -> None:
    """Print what ``figures.json`` says of each model beside the baseline."""
    console, baseline = Console(width=WIDTH), figures["baseline"]
    base = figures["models"][baseline]
    if not figures["differences"]:
        console.print(table_of(base, [baseline]))
    for name, differences in figures["differences"].items():
        console.print(table_of(base, [baseline, name], figures["models"][name], differences))
        for line in verdict_of(name, baseline, differences):
            console.print(printable(line), soft_wrap=True, markup=False, emoji=False)
    for name, group in figures["seeds"].items():
        for line in verdict_of(f"Over seeds, {name}", baseline, group["differences"]):
            console.print(printable(line), soft_wrap=True, markup=False, emoji=False)


def table_of(
    base: dict[str, Any],
    names: list[str],
    own: dict[str, Any] | None = None,
    differences: dict[str, Any] | None = None,
) -> Table:
    """Return a table of the baseline's figures with 95% intervals, and of another model's beside them."""
    heads = [Column(Text(printable(name))) for name in names]
    table = Table("", *heads, title="mean [95% interval]", title_justify="left", caption_justify="left")
    if own is None or differences is None:
        for key, value in base.items():
            table.add_row(figure_of(key).title, cell(value))
        return table
    table.add_column("difference")
    table.add_column("p", justify="right")
    table.add_column("")
    table.caption = "p: of a paired test, corrected for the number of figures (Holm)"
    for key in dict.fromkeys([*base, *own]):
        each = differences.get(key)
        compared = [cell(each, "+"), f"{each['p_holm']:.3f}", word_of(each)] if each else [""] * 3
        table.add_row(figure_of(key).title, cell(base.get(key)), cell(own.get(key)), *compared)
    return table


def cell(value: dict[str, Any] | None, sign: str = "") -> str:
    """Write a mean with its interval."""
    if value is None:
        return ""
    ends = [value["low"], value["high"]]
    shown = "" if None in ends else f" \\[{', '.join(f'{end:{sign}.3g}' for end in ends)}]"
    mean = value["mean"] if abs(value["mean"]) > 1e-12 else 0.0  # the rounding error of a mean of differences
    return f"{mean:{sign}.3g}{shown}"


def word_of(difference: dict[str, Any]) -> str:
    """Return better, worse or changed where a difference is shown, else a dash."""
    return WORDS[difference["better"]] if is_shown(difference) else "–"


def verdict_of(name: str, baseline: str, differences: dict[str, Any]) -> list[str]:
    """Return lines that the tests support: what is better, worse or changed, and what more prompts would show."""
    titles: dict[str, list[str]] = {word: [] for word in WORDS.values()}
    small = []
    for key, each in differences.items():
        title = figure_of(key).title
        if is_shown(each):
            titles[word_of(each)].append(title)
        elif figure_of(key).better and not key.startswith(SAMPLED) and (each["needed"] or 0) > each["count"]:
            small.append(f"  {title}: {each['needed']:,} prompts would show a difference of {each['point']}")
    count = max((each["count"] for each in differences.values()), default=0)
    verdicts = [f"  {word}: {'; '.join(figures)}" for word, figures in titles.items() if figures]
    first = f"{name} compared with {baseline} on {count:,} prompts:"
    return [first, *(verdicts or ["  no difference is shown"]), *small]
