"""Pages of runs and evaluations in a headless Chromium."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
DESKTOP = {"width": 1200, "height": 900}
PHONE = {"width": 400, "height": 860}

# The visible texts with a contrast below 4.5 to what is behind them, as WCAG 2.2 defines it. The backgrounds of all
# elements around a text are painted on one pixel, then the colour of the text.
LOW_CONTRAST = """() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const luminance = (colours) => {
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    const [red, green, blue] = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((x) => x / 255).map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("").trim();
    if (!text || !element.checkVisibility({visibilityProperty: true})) continue;
    const behind = [];
    for (let each = element; each; each = each.parentElement) behind.unshift(getComputedStyle(each).backgroundColor);
    const style = getComputedStyle(element);
    const colour = element.closest("svg") ? style.fill : style.color;
    const [one, two] = [luminance(["white", ...behind]), luminance([...behind, colour])];
    const contrast = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (contrast < 4.5) low.push(`${contrast.toFixed(2)}: ${element.outerHTML.slice(0, 200)}`);
  }
  return low;
}"""

# The rows of the sample browser. An answer's text is without the words that only the expert has.
ROWS = """() => [...document.querySelectorAll("#samples-rows > li")].map((row) => {
  const [prompt, ...cells] = row.querySelectorAll(".cell");
  const name = (cell) => cell.querySelector(".name").textContent;
  const text = (cell) => {
    const copy = cell.querySelector(".text")?.cloneNode(true);
    copy?.querySelectorAll("del").forEach((missing) => missing.remove());
    return copy?.textContent;
  };
  return {
    number: Number(prompt.querySelector("h3").textContent.match(/^prompt (\\d+)/)[1]),
    prompt: text(prompt),
    answers: Object.fromEntries(cells.map((cell) => [name(cell), text(cell)])),
    figures: Object.fromEntries(cells.map((cell) => [name(cell), [...cell.querySelectorAll("dl > *")].map(
      (each) => each.textContent)])),
    tokens: [...row.querySelectorAll(".token")].map((token) => [token.textContent, token.title, token.className]),
  };
})"""
ALL_ROWS = f"""() => {{
  const rows = [({ROWS})()], next = document.getElementById("samples-next");
  while (next.checkVisibility() && !next.disabled) {{ next.click(); rows.push(({ROWS})()); }}
  return rows.flat();
}}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Browser, path: Path, **options: Any) -> tuple[Page, list[str]]:
    """Open a file. Return its page, and a list that collects what it prints, its errors and what it loads."""
    page = browser.new_page(**{"viewport": DESKTOP} | options)
    events: list[str] = []
    page.on("console", lambda message: events.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: events.append(f"error: {error}"))
    page.on("request", lambda request: events.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    assert events.pop(0) == f"request: {path.as_uri()}"
    return page, events


def rows_shown(page: Page) -> list[dict[str, Any]]:
    """Return the rows of the sample browser that are on the page."""
    return page.evaluate(ROWS)


def all_rows(page: Page) -> list[dict[str, Any]]:
    """Turn the pages of the sample browser from the one that is shown to the last, and return their rows."""
    return page.evaluate(ALL_ROWS)
