"""Let a stronger model write demonstrations, by any OpenAI-compatible endpoint (Inverse-RLignment, arXiv 2405.15624).

    irlfast generate prompts.jsonl demonstrations.jsonl --base_url http://localhost:8000/v1 --model NAME

The command reads the rows as training does; they need no answers. Each prompt gets an answer, which training reads as a
demonstration. ``--system`` is a file with instructions, which stand first in every conversation.

``--critic`` is a file with a second request: it asks the model to criticise its first answer and to write a better one.
The second answer is the demonstration. The first one is kept as ``rejected``, which ``method: dpo`` learns from. With
``--edit`` the first answer is the row's own.

Answers are kept in ``OUTPUT.answers`` as they come, so that the same command resumes. OpenAI's client tries a failed
request again. Prompts that have no answer in the end are counted by reason and left out. The same command asks for them
again.
"""

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from irlfast.common.command import run_command, writing_to
from irlfast.common.endpoint import Endpoint, NoAnswer, connect, run_all
from irlfast.common.files import InputError, write_jsonl
from irlfast.common.logs import append_row, mend
from irlfast.common.messages import Progress
from irlfast.common.printable import printable
from irlfast.common.secrets import redacted, restored
from irlfast.config import Config
from irlfast.data.read import read_demonstrations
from irlfast.data.rows import Demonstration, Message
from irlfast.data.sources import sources_of

Ask = Callable[[list[Message], int], str]  # messages and a seed -> the model's answer
SAME_ANSWERS = ("dataset", "split", "model", "system", "critic", "edit", "temperature", "max_new_tokens", "seed")


def generate(options: argparse.Namespace) -> None:
    """Ask for the answers that are missing, then write the rows of all prompts that have one."""
    config = Config(dataset_name=options.dataset, dataset_train_split=options.split)
    prompts = [*read_demonstrations(config, sources_of(config), [], limit=options.limit, prompts_only=True)]
    if options.edit:
        check_answers(prompts)
    kept = options.output.with_name(options.output.name + ".answers")
    rows = read_answers(kept, {name: getattr(options, name) for name in SAME_ANSWERS})
    failures = Counter[str]()
    ask = ask_with(options)
    jobs = {
        number: functools.partial(demonstrate, prompts[number], ask, options, options.seed + number)
        for number in range(len(prompts))
        if number not in rows
    }
    with Progress("generate", len(prompts), "prompt", len(rows)) as progress:
        for number, row in run_all(jobs, options.concurrency):
            if isinstance(row, NoAnswer):
                failures[str(row)] += 1
            else:
                rows[number] = row
                append_row(kept, {"number": number, "row": row})
            progress.advance()
            progress.show(f"{failures.total():,} without an answer")
    if not rows:
        raise InputError(f"{options.base_url}: no answer to any of {len(prompts):,} prompts: {reasons(failures)}")
    write_jsonl(options.output, (rows[number] for number in sorted(rows) if number < len(prompts)))
    print(f"{len(rows):,} of {len(prompts):,} prompts have an answer: {printable(options.output)}")
    if failures:
        print(f"left out: {reasons(failures)}; the same command asks for them again")


def check_answers(prompts: list[Demonstration]) -> None:
    without = next((prompt.where for prompt in prompts if not (prompt.answer or {}).get("content")), None)
    if without:
        raise InputError(f"{without}: found no answer to edit, expected one in every row with --edit")


def reasons(failures: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in failures.most_common())


def read_answers(path: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the rows that are kept in ``path``, by the prompts' numbers. The file begins with the settings.

    Damaged lines are left out; their answers are asked for again.

    Raises:
        InputError: the file is of other settings, or its first line is damaged.
    """
    rows = mend(path, is_kept)
    if not rows:
        write_jsonl(path, [redacted(settings)])
        return {}
    earlier, *lines = rows
    if "number" in earlier:
        raise InputError(f"{path}: its first line, the settings of its answers, is damaged; expected another output")
    earlier = restored(earlier, settings)
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise InputError(
                f"--{name}: found {value!r}, but the answers in {path} are of {earlier.get(name)!r}; "
                "expected the same, or another output"
            )
    return {line["number"]: line["row"] for line in lines if "number" in line}


def is_kept(line: dict[str, Any]) -> bool:
    """Return whether a line has an answer, or the settings of all."""
    return "model" in line or (isinstance(line.get("number"), int) and isinstance(line.get("row"), dict))


def demonstrate(prompt: Demonstration, ask: Ask, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return a row in the data format: the prompt, with the model's answer as ``completion`` or ``chosen``."""
    before = [{"role": "system", "content": options.system}] if options.system else []
    messages = before + prompt.prompt
    draft = prompt.answer["content"] if options.edit and prompt.answer else ask(messages, seed)
    if not options.critic:
        return {"prompt": prompt.prompt, "completion": [assistant(draft)]}
    better = ask([*messages, assistant(draft), {"role": "user", "content": options.critic}], seed)
    return {"prompt": prompt.prompt, "chosen": [assistant(better)], "rejected": [assistant(draft)]}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def ask_with(options: argparse.Namespace) -> Ask:
    """Return a function that asks the endpoint for a whole answer."""
    request = connect(Endpoint(**{name: getattr(options, name) for name in Endpoint._fields}))

    def ask_for_answer(messages: list[Message], seed: int) -> str:
        reply = request(messages, seed)
        if reply.finish == "length":
            raise NoAnswer("cut at max_new_tokens")
        if reply.finish == "refusal":
            raise NoAnswer("refused by the model")
        if not reply.text:
            raise NoAnswer("empty")
        return reply.text

    return ask_for_answer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="irlfast generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="prompts: a file of rows, saved dataset, or hub name")
    parser.add_argument("output", type=Path, help="jsonl file to write")
    parser.add_argument("--base_url", required=True, help="the endpoint, such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="the model's name at the endpoint")
    parser.add_argument("--system", type=read_text, metavar="FILE", help="file with instructions for the model")
    parser.add_argument("--critic", type=read_text, metavar="FILE", help="file with a request for a better answer")
    parser.add_argument("--edit", action="store_true", help="with --critic: the row's own answer is the first one")
    parser.add_argument("--split", default="train", help="the dataset's split [train]")
    parser.add_argument("--limit", type=int, help="read the first rows only, this many")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature [1.0]")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="most tokens per answer [512]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt; each other adds its number [0]")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time [16]")
    parser.add_argument("--max_retries", type=int, default=5, help="times that a failed request is tried again [5]")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that an answer may take [600]")
    options = parser.parse_args()
    if options.edit and not options.critic:
        parser.error("--edit: expected --critic, the request for a better answer")
    return options


def read_text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{name}: cannot be read ({error})") from error


def command() -> None:
    options = parse_arguments()
    with writing_to(str(options.output)):
        generate(options)


def main() -> int:
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
