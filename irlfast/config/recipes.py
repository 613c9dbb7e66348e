"""The recipes that come with irlfast, by name."""

import difflib
from pathlib import Path

import irlfast
from irlfast.common.files import InputError

FOLDER = Path(irlfast.__file__).with_name("configs")


def recipes() -> dict[str, Path]:
    """Return the file of every recipe, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def recipe(name: str) -> Path:
    """Return the file of the recipe ``name``.

    Raises:
        InputError: there is no such recipe; the message names the nearest one.
    """
    known = recipes()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "`irlfast recipes` lists them"
    raise InputError(f"{name}: found neither a file nor a recipe of this name; {hint}")
