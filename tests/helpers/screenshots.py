"""The pictures of README and docs: ``python -m tests.helpers.screenshots RUN EVALUATION [FOLDER]``.

RUN is the default run (``irlfast train configs/irft.yaml``), and EVALUATION is a folder of ``irlfast evaluate``. The
pages are written anew, and the pictures go to FOLDER: docs/images where none is named.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page

from irlfast.common.files import write_text
from irlfast.report import page_of
from tests.helpers.pages import DESKTOP, PHONE, chromium, open_page

IMAGES = Path(__file__).parents[2] / "docs" / "images"
NARROW = {"width": 1100, "height": 984}


def top(page: Page) -> None:
    """Leave the page as it opens."""


def samples(page: Page) -> None:
    page.get_by_label("Show", exact=True).select_option(index=2)  # gained
    page.get_by_label("colour the expert's tokens").check()
    page.locator("#samples").evaluate("(section) => section.scrollIntoView()")


def take(run: Path, evaluation: Path, folder: Path) -> None:
    shots: dict[str, tuple[Path, Callable[[Page], None], dict[str, Any]]] = {
        "report": (run, top, {"viewport": NARROW}),
        "report-dark": (run, top, {"viewport": NARROW, "color_scheme": "dark"}),
        "report-phone": (run, top, {"viewport": PHONE}),
        "samples": (run, samples, {"viewport": DESKTOP}),
        "evaluation": (evaluation, top, {"viewport": NARROW}),
    }
    for source in (run, evaluation):
        write_text(source / "report.html", page_of([source]))
    with chromium() as browser:
        for name, (source, prepare, options) in shots.items():
            page, _ = open_page(browser, (source / "report.html").absolute(), **options)
            prepare(page)
            page.screenshot(path=folder / f"{name}.png")
            page.close()


if __name__ == "__main__":
    run, evaluation, folder = [*map(Path, sys.argv[1:]), IMAGES][:3]
    take(run, evaluation, folder)
