"""Talk with a model: ``irlfast chat MODEL_OR_RUN``. Each line is a turn; the end of the input (Ctrl-D) ends the talk.

    irlfast chat runs/irft                                         # the folder of a run means the run's final/
    irlfast chat runs/irft --against runs/irft/sft/policy          # both answer each line

With ``--against``, each of the two models goes on with its own answers. A policy in a run's folder reads and ends texts
as it was trained. If it was trained to think, its thought is shown apart from the answer. The input may be a terminal
or a file.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers

from irlfast.common import dist
from irlfast.common.command import run_command
from irlfast.common.files import InputError, find_path
from irlfast.common.messages import explain_errors
from irlfast.common.printable import printable
from irlfast.config import Config
from irlfast.data.counts import SetCounts
from irlfast.data.encoding import Encoder, encode_texts, make_encoder, safe_tokenizer
from irlfast.data.rows import Demonstration, Message
from irlfast.data.special_tokens import SafeTokenizer, escape_special_tokens
from irlfast.data.templates import TemplateRefusal, render_row
from irlfast.evaluation.models import keys_of_runs, models_at
from irlfast.models.configs import stop_tokens
from irlfast.sampling.thoughts import mark_of, missing


class Speaker(NamedTuple):
    """A model in a talk, with its side of the conversation."""

    name: str
    model: Any
    encoder: Encoder
    tokenizer: SafeTokenizer  # keeps special tokens that the user spells as text
    config: Config
    mark: int | None  # the token that ends a thought; None for a model that does not think
    messages: list[Message]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="irlfast chat", description="Talk with a model, one line per turn.", epilog="Ctrl-D ends the talk."
    )
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="a model's folder or hub name, or a run's output_dir")
    parser.add_argument("--against", metavar="MODEL_OR_RUN", help="a second model, which answers each line, too")
    parser.add_argument("--system", help="a system message to begin with")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature; 0 is greedy [1.0]")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="the most tokens per answer [512]")
    parser.add_argument("--thought_mark", help="the text that ends a thought [that of the run, if its policy thinks]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling [0]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the model")
    settings = parser.parse_args()
    if settings.temperature < 0:
        raise InputError(f"--temperature: found {settings.temperature}, expected 0 or more")
    if settings.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens: found {settings.max_new_tokens}, expected 1 or more")
    return settings


def find_model(name: str) -> str:
    """Return the model that ``name`` means; the folder of a run means its ``final/``.

    Raises:
        InputError: the run has no ``final/`` yet, or ``name`` can only be a folder and the folder is missing.
    """
    folder = find_path(name)
    if folder and (folder / "final").is_dir():
        return str(folder / "final")
    if folder and (folder / "metrics.jsonl").exists():
        raise InputError(f"run {folder}: found no final/, expected a finished run, or a policy's folder in it")
    return str(folder or name)


def load(name: str, settings: argparse.Namespace) -> Speaker:
    """Load a model and its tokenizer, onto a GPU if there is one.

    Raises:
        InputError: they cannot be loaded, or the tokenizer has no chat template.
    """
    [found] = models_at(find_model(name))
    config = Config(**(keys_of_runs([found]) | {"model_name_or_path": str(found.path)}))
    config = dataclasses.replace(config, trust_remote_code=settings.trust_remote_code)
    if settings.thought_mark:
        config = dataclasses.replace(config, method="reasoning", thought_mark=settings.thought_mark)
    with explain_errors(f"model {name}: cannot be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(found.path, trust_remote_code=settings.trust_remote_code)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            found.path, dtype="auto", trust_remote_code=settings.trust_remote_code
        )
    if not tokenizer.chat_template:
        raise InputError(f"model {name}: its tokenizer has no chat template; expected one, as a run's final/ has")
    encoder = make_encoder(tokenizer, config, stops=stop_tokens(config))
    mark = mark_of(config, encoder) if config.facts.thinks else None
    messages = [{"role": "system", "content": settings.system}] if settings.system else []
    model = model.to(dist.device()).eval()
    return Speaker(name, model, encoder, safe_tokenizer(encoder, config), config, mark, messages)


def read_lines() -> Iterator[str]:
    """Read the user's lines, without empty ones."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() editing and history)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def talk(speakers: Sequence[Speaker], settings: argparse.Namespace) -> None:
    """Let every speaker answer every line. A second speaker does not change the answers of the first."""
    for turn, line in enumerate(read_lines()):
        for speaker in speakers:
            if len(speakers) > 1:
                print(f"[{printable(speaker.name)}]")
            transformers.set_seed(settings.seed + turn)
            speaker.messages.append({"role": "user", "content": line})
            speaker.messages.append({"role": "assistant", "content": answer(speaker, settings)})


def answer(speaker: Speaker, settings: argparse.Namespace) -> str:
    """Print and return the speaker's answer to the conversation. A thought is printed, but is no part of the answer."""
    ids = prompt_ids(speaker)
    if speaker.mark is not None:
        print("thought: ", end="")
        thought = generate(speaker, ids, [speaker.mark], speaker.config.max_thought_tokens, settings.temperature)
        ids += [*thought, *missing(thought, speaker.mark)]
    answer_ids = generate(speaker, ids, [], settings.max_new_tokens, settings.temperature)
    return speaker.encoder.tokenizer.decode(answer_ids, skip_special_tokens=True)


def prompt_ids(speaker: Speaker) -> list[int]:
    """Return the token ids of the conversation, as training writes a prompt.

    Raises:
        InputError: the chat template refuses the conversation.
    """
    row = escape_special_tokens(Demonstration(speaker.messages, None), speaker.tokenizer)
    try:
        text = render_row(speaker.encoder.template, row, Counter())
    except TemplateRefusal as error:
        raise InputError(f"the chat template refuses the conversation: {error}") from error
    return encode_texts([(row, text)], speaker.encoder, speaker.tokenizer, SetCounts())[0].prompt


class Printer(transformers.TextStreamer):
    """Prints a text as it is generated, with its control characters as escapes."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text, keep="\n\t"), stream_end)


def generate(speaker: Speaker, ids: list[int], marks: list[int], max_new_tokens: int, temperature: float) -> list[int]:
    """Print and return the tokens that follow ``ids``, up to an end token or one of the ``marks``.

    Raises:
        InputError: the conversation leaves no room for an answer.
    """
    model, ends = speaker.model, [*speaker.encoder.ends, *marks]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if len(ids) >= positions:
        raise InputError(f"the conversation has {len(ids):,} tokens, and the model takes {positions:,}")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    if temperature == 0:
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    prompt = torch.tensor([ids], device=model.device)
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=Printer(speaker.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True),
        max_new_tokens=min(max_new_tokens, positions - len(ids)),
        eos_token_id=ends,
        pad_token_id=ends[0],
        **sampling,
    )
    return generated[0, len(ids) :].tolist()


def command() -> None:
    settings = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    names = [settings.model, *([settings.against] if settings.against else [])]
    try:
        talk([load(name, settings) for name in names], settings)
    except KeyboardInterrupt:
        print()


def main() -> int:
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
