"""The recipes that come with irlfast, by name."""

import difflib
from pathlib import Path

import irlfast
from irlfast.common.files import InputError

FOLDER = Path(irlfast.__file__).with_name("configs")


def recipes() -> dict[str, Path]:
    """The file of every recipe by its name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def recipe(name: str) -> Path:
    """The file of the recipe ``name``.

    Raises:
        InputError: naming the nearest recipe, where there is no such.
    """
    known = recipes()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "`irlfast recipes` lists them"
    raise InputError(f"{name}: found neither a file nor a recipe of this name; {hint}")
