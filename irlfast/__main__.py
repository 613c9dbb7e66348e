"""The command ``irlfast``: ``irlfast train …`` is ``python -m irlfast.train …``, and so for every subcommand."""

import difflib
import importlib
import sys

import irlfast

COMMANDS = {
    "train": ("irlfast.train", "train a policy or a reward from demonstrations"),
    "bon": ("irlfast.bon", "let a policy answer every prompt n times, and keep the answer of the highest reward"),
    "select": ("irlfast.data.select", "keep the demonstrations of the highest reward"),
    "report": ("irlfast.report", "write the page of a run's figures and samples"),
    "chat": ("irlfast.chat", "talk with a model, or with the policy that a run made"),
    "recipes": ("irlfast.recipes", "list the recipes that train takes by name, or print one"),
    "doctor": ("irlfast.doctor", "say what this machine can do, and how to get what is missing"),
}


def main() -> int:
    """Exit codes are those of the subcommand; 2 where there is no such."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        lines = [f"  {name:10}{purpose}" for name, (_, purpose) in COMMANDS.items()]
        print("usage: irlfast COMMAND ...\n", *lines, "\n`irlfast COMMAND --help` lists what it takes.", sep="\n")
        return 0
    if name == "--version":
        print(f"irlfast {irlfast.__version__}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(COMMANDS)}"
        print(f"irlfast: found no command {name!r}; {hint}", file=sys.stderr)
        return 2
    sys.argv = [f"irlfast {name}", *rest]
    return importlib.import_module(COMMANDS[name][0]).main()


if __name__ == "__main__":
    sys.exit(main())
