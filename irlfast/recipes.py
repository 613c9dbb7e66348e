"""The recipes that come with irlfast: ``irlfast recipes`` lists them, ``irlfast recipes NAME`` prints one."""

import argparse
import difflib
import sys
from pathlib import Path

import irlfast
from irlfast.command import exit_code
from irlfast.files import InputError

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


def command() -> None:
    parser = argparse.ArgumentParser(prog="irlfast recipes", description="List the recipes, or print one.")
    parser.add_argument("name", nargs="?", help="the recipe to print")
    name = parser.parse_args().name
    if name:
        print(recipe(name).read_text(encoding="utf-8"), end="")
        return
    for name, path in recipes().items():
        print(f"{name:22}{path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
    print("\n`irlfast train NAME [key=value]...` runs one; `irlfast recipes NAME` prints it.")


def main() -> int:
    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
