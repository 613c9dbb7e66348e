"""The command ``irlfast``: ``irlfast train …`` is the same as ``python -m irlfast.train …``, for every subcommand."""

import difflib
import importlib
import signal
import sys

import irlfast
from irlfast.common.launch import LOCAL_RANK
from irlfast.common.stop import SIGNALS, leave_before_listening

COMMANDS = {
    "train": ("irlfast.train", "train a policy or a reward from demonstrations"),
    "plan": ("irlfast.plan", "estimate the memory, time, cost and disk of a run on GPUs, before paying for it"),
    "bon": ("irlfast.bon", "sample n answers per prompt, and keep the answer with the highest reward"),
    "select": ("irlfast.data.select", "keep the demonstrations with the highest reward"),
    "generate": ("irlfast.generate", "let a stronger model write demonstrations, by an OpenAI-compatible endpoint"),
    "evaluate": ("irlfast.evaluate", "compare models on prompts, or the policies of a run"),
    "report": ("irlfast.report", "write the page of a run, of several runs, or of an evaluation"),
    "watch": ("irlfast.watch", "show a run in the browser while it goes on"),
    "chat": ("irlfast.chat", "talk with a model, or with the policy of a run"),
    "recipes": ("irlfast.recipes", "list the recipes, or print one"),
    "doctor": ("irlfast.doctor", "show what this machine can run, and how to install missing parts"),
}


def main() -> int:
    """Run the subcommand and return its exit code; 2 for an unknown subcommand."""
    # `deepspeed --no_python irlfast train` puts --local_rank=N before the subcommand.
    name, *rest = sorted(sys.argv[1:], key=lambda each: bool(LOCAL_RANK.fullmatch(each))) or ["--help"]
    if name in ("-h", "--help", "help"):
        lines = [f"  {name:10}{purpose}" for name, (_, purpose) in COMMANDS.items()]
        print("usage: irlfast COMMAND ...\n", *lines, "\n`irlfast COMMAND --help` lists its arguments.", sep="\n")
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
    for number in SIGNALS:
        signal.signal(number, leave_before_listening)  # until the command has imported its libraries
    return importlib.import_module(COMMANDS[name][0]).main()


if __name__ == "__main__":
    sys.exit(main())
