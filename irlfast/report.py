"""Write the report of a run: ``irlfast report OUTPUT_DIR``."""

import argparse
import sys
from pathlib import Path

from irlfast.common.command import run_command, writing_to
from irlfast.reports.page import write_report


def command() -> None:
    parser = argparse.ArgumentParser(prog="irlfast report", description="Write report.html from the files of a run.")
    parser.add_argument("output_dir", type=Path, help="the folder of a run, finished or stopped")
    output = parser.parse_args().output_dir
    with writing_to(str(output)):
        print(write_report(output))


def main() -> int:
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
