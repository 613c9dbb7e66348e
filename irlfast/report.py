"""Write the page of a run, of several runs, or of an evaluation: ``irlfast report FOLDER [FOLDER ...]``."""

import argparse
import sys
from pathlib import Path

from irlfast.common.command import run_command, writing_to
from irlfast.common.files import InputError, write_text
from irlfast.common.printable import printable
from irlfast.reports.evaluation import evaluation_text
from irlfast.reports.page import report_text
from irlfast.reports.runs import runs_text


def command() -> None:
    parser = argparse.ArgumentParser(
        prog="irlfast report", description="Write the page of a run, of several runs side by side, or of an evaluation."
    )
    parser.add_argument("folders", type=Path, nargs="+", help="runs, finished or stopped, or one evaluation")
    parser.add_argument(
        "--output", type=Path, help="the page (default: report.html in the folder; runs.html here for several runs)"
    )
    given = parser.parse_args()
    [first, *others] = given.folders
    path = given.output or (Path("runs.html") if others else first / "report.html")
    text = page_of(given.folders)
    with writing_to(str(path)):
        write_text(path, text)
        print(printable(path))


def page_of(folders: list[Path]) -> str:
    """Return the page of a run, of several runs, or of an evaluation.

    Raises:
        InputError: a folder is no run, or there is an evaluation among several folders.
    """
    evaluations = [folder for folder in folders if (folder / "evaluation.yaml").is_file()]
    if len(folders) == 1:
        return evaluation_text(folders[0]) if evaluations else report_text(folders[0])
    if evaluations:
        raise InputError(f"{evaluations[0]}: found an evaluation among several folders, expected runs alone")
    return runs_text(folders)


def main() -> int:
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
