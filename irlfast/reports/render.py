"""Fill a page's template. The page is one file: styles, scripts and data are inside, and it may load nothing else."""

import base64
import hashlib
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from irlfast import __version__
from irlfast.reports.charts import vega
from irlfast.reports.files import number

HERE = Path(__file__).parent
STYLES = ("style.css", "samples.css")
SCRIPTS = ("charts.js", "samples.js")  # run in this order, after Vega


def page_text(template: str, values: dict[str, Any]) -> str:
    """Fill a template of this folder, and return the page. All ``values`` stay text: the template escapes them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    scripts = [vega(), *map(read, SCRIPTS)]
    page = environment.get_template(template).render(
        **values,
        style=Markup("".join(map(read, STYLES))),
        scripts=[Markup(script) for script in scripts],
        allowed_scripts=" ".join(map(fingerprint, scripts)),
        version=__version__,
        show=show,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a model may write half a surrogate pair


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def fingerprint(script: str) -> str:
    """Return the name by which a content security policy allows this inline script, and no other."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    return f"'sha256-{digest}'"


def with_ends(interval: dict[str, Any], form: str, scale: float = 1) -> str:
    """Write a mean, and its 95% interval in brackets if there is one."""
    values = (interval.get(key) for key in ("mean", "low", "high"))
    numbers = [value if isinstance(value, int) else number(value) for value in values]
    mean, low, high = (show(scale * value, form) for value in numbers)
    return mean if interval.get("low") is None else f"{mean} [{low}, {high}]"


def show(value: Any, form: str = ",.2f") -> str:
    """Write a number for a reader: a count in full, any other number as ``form`` says, a dash for a missing one."""
    if not math.isfinite(number(value)):
        return "not finite" if math.isinf(number(value)) else "–"
    return f"{value:{',' if isinstance(value, int) and form.endswith('f') else form}}"
