"""Show the recipes that come with irlfast: ``irlfast recipes`` lists them, ``irlfast recipes NAME`` prints one."""

import argparse
import sys

from irlfast.common.command import run_command
from irlfast.config.recipes import recipe, recipes


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
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
