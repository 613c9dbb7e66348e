"""The report of a finished or stopped run: one HTML page that opens offline (docs/design.md, section 5).

    python -m irlfast.report OUTPUT_DIR

``metrics.py`` lists the metrics that the page shows. The page names a file that is missing or broken. Only a folder
without a ``config.yaml`` is an error, because it is no run.
"""

from pathlib import Path

from irlfast.common.files import write_text
from irlfast.reports.browser import run_samples
from irlfast.reports.charts import POINTS, draw_curves, draw_held_out, draw_log_ratios, draw_timeline
from irlfast.reports.files import read_log_ratios, read_run, split_time
from irlfast.reports.render import page_text
from irlfast.reports.tables import (
    data_table,
    held_out_table,
    leaks_table,
    mismatch_table,
    pairs_table,
    speed_table,
    starts_table,
    times_table,
)
from irlfast.reports.verdict import compare_policies, headline, list_warnings

TITLE = ("method", "model_name_or_path", "dataset_name")  # keys


def write_report(output_dir: Path) -> Path:
    """Write ``output_dir/report.html`` from the files of the run and return its path; see :func:`report_text`."""
    path = Path(output_dir) / "report.html"
    write_text(path, report_text(Path(output_dir)))
    return path


def report_text(output_dir: Path) -> str:
    """Return the report of a run, made from the files that are there.

    Raises:
        InputError: (a ValueError) ``output_dir`` holds no ``config.yaml``.
    """
    run = read_run(output_dir)
    changes = compare_policies(run)
    times = split_time(run)
    sets = {name: counts for name, counts in run.data.items() if isinstance(counts, dict)}
    values = {
        "title": [str(run.config[key]) for key in TITLE if run.config.get(key)] or ["a run"],
        "headline": headline(changes, run.first, run.kept),
        "changes": changes,
        "warnings": list_warnings(changes, run.metrics),
        "run": run,
        "policies": held_out_table(run.evals, run.first, run.kept),
        "held_out": draw_held_out(run.evals, run.kept) if len(run.evals) > 1 else [],
        "log_ratios": draw_log_ratios(read_log_ratios(run)),
        "timeline": draw_timeline(times),
        "times": times_table(times),
        "curves": draw_curves(run.metrics) if run.metrics else [],
        "logged": sum(map(len, run.metrics.values())),
        "points": POINTS,
        "samples": run_samples(run) if run.evals else None,
        "sets": data_table(sets),
        "pairs": pairs_table(run.pairs),
        "mismatch": mismatch_table(run.pairs, run.rounds),
        "leaks": leaks_table(run.leaks),
        "speed": speed_table(run.metrics),
        "starts": starts_table(run.starts),
    }
    return page_text("report.html.j2", values)
