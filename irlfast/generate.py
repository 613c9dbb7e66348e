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
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from irlfast.common.command import run_command, writing_to
from irlfast.common.files import InputError, read_jsonl, write, write_jsonl
from irlfast.common.messages import Progress, first_sentence
from irlfast.config import Config
from irlfast.data.read import read_demonstrations
from irlfast.data.rows import Demonstration, Message
from irlfast.data.sources import sources_of

Ask = Callable[[list[Message], int], str]  # messages and a seed -> the model's answer
SAME_ANSWERS = ("dataset", "split", "model", "system", "critic", "edit", "temperature", "max_new_tokens", "seed")


class NoAnswer(Exception):
    """Raised for a prompt that gets no usable answer; the message is the reason."""


def generate(options: argparse.Namespace) -> None:
    """Ask for the answers that are missing, then write the rows of all prompts that have one."""
    config = Config(dataset_name=options.dataset, dataset_train_split=options.split)
    prompts = [*read_demonstrations(config, sources_of(config), [], limit=options.limit, prompts_only=True)]
    if options.edit:
        check_answers(prompts)
    kept = options.output.with_name(options.output.name + ".answers")
    rows = read_answers(kept, {name: getattr(options, name) for name in SAME_ANSWERS})
    missing = [number for number in range(len(prompts)) if number not in rows]
    failures = Counter[str]()
    with kept.open("a", encoding="utf-8") as lines, Progress("generate", len(prompts), "prompt", len(rows)) as progress:
        for number, row in answers_to(prompts, missing, ask_with(options), options):
            if isinstance(row, str):
                failures[row] += 1
            else:
                rows[number] = row
                lines.write(json.dumps({"number": number, "row": row}, ensure_ascii=False) + "\n")
                lines.flush()
            progress.advance()
            progress.show(f"{failures.total():,} without an answer")
    if not rows:
        raise InputError(f"{options.base_url}: no answer to any of {len(prompts):,} prompts: {reasons(failures)}")
    write_jsonl(options.output, (rows[number] for number in sorted(rows) if number < len(prompts)))
    print(f"{len(rows):,} of {len(prompts):,} prompts have an answer: {options.output}")
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

    A last line that was cut by a kill is dropped.

    Raises:
        InputError: the file is of other settings.
    """
    if not path.exists():
        write_jsonl(path, [settings])
        return {}
    whole = path.read_bytes().rpartition(b"\n")[0]
    write(path, lambda temporary: temporary.write_bytes(whole + b"\n"))
    (_, earlier), *lines = read_jsonl(path)
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise InputError(
                f"--{name}: found {value!r}, but the answers in {path} are of {earlier.get(name)!r}; "
                "expected the same, or another output"
            )
    return {line["number"]: line["row"] for _, line in lines}


def answers_to(
    prompts: list[Demonstration], numbers: list[int], ask: Ask, options: argparse.Namespace
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (number, row) of each prompt as its answer comes; the reason in place of a row where none comes."""
    with ThreadPoolExecutor(options.concurrency) as pool:
        futures = {
            pool.submit(demonstrate, prompts[number], ask, options, options.seed + number): number for number in numbers
        }
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except NoAnswer as reason:
                    yield futures[future], str(reason)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
    """Return a function that asks the endpoint.

    Raises:
        InputError: OpenAI's client is not installed; later, the endpoint cannot be reached or refuses every request.
    """
    try:
        import openai
    except ImportError as error:
        raise InputError("found no package openai; expected pip install 'irlfast[generate]'") from error
    client = openai.OpenAI(
        base_url=options.base_url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        max_retries=options.max_retries,
        timeout=options.timeout,
    )
    refused = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)

    def ask(messages: list[Message], seed: int) -> str:
        try:
            response = client.chat.completions.create(
                model=options.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=options.temperature,
                max_completion_tokens=options.max_new_tokens,
                seed=seed,
            )
        except openai.APITimeoutError as error:
            raise NoAnswer("timed out") from error
        except openai.APIConnectionError as error:
            raise InputError(f"{options.base_url}: cannot be reached; the same command resumes") from error
        except refused as error:
            raise InputError(f"{options.base_url}: {first_sentence(error)}") from error
        except openai.APIStatusError as error:
            raise NoAnswer(f"refused with status {error.status_code}") from error
        choice = response.choices[0]
        if choice.finish_reason == "length":
            raise NoAnswer("cut at max_new_tokens")
        answer = (choice.message.content or "").strip()
        if not answer:
            raise NoAnswer("empty")
        return answer

    return ask


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
