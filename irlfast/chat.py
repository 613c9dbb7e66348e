"""Talk with a model: ``irlfast chat MODEL_OR_RUN``. Each line is a turn; the end of the input (Ctrl-D) ends the talk.

The folder of a run means the run's ``final/``. The input may be a terminal or a file.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from irlfast.common.command import run_command
from irlfast.common.files import InputError, find_path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="irlfast chat", description="Talk with a model, one line per turn.", epilog="Ctrl-D ends the talk."
    )
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="a model's folder or hub name, or a run's output_dir")
    parser.add_argument("--system", help="a system message to begin with")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature; 0 is greedy [1.0]")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="the most tokens per answer [512]")
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
    if not folder and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise InputError(f"model {name}: no such folder")
    return str(folder or name)


def load(name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load the tokenizer and the model, onto a GPU if there is one.

    Raises:
        InputError: they cannot be loaded, or the tokenizer has no chat template.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"model {name}: cannot be loaded ({' '.join(str(error).split())})") from error
    if not tokenizer.chat_template:
        raise InputError(f"model {name}: its tokenizer has no chat template; expected one, as a run's final/ has")
    return tokenizer, model.to(device).eval()


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


def talk(tokenizer: Any, model: Any, settings: argparse.Namespace) -> None:
    """Answer every line with the whole conversation as the prompt.

    Raises:
        InputError: the chat template refuses the conversation, or the conversation leaves no room for an answer.
    """
    import jinja2
    import transformers

    transformers.set_seed(settings.seed)
    is_greedy = settings.temperature == 0
    sampling: dict[str, Any] = {"do_sample": True, "temperature": settings.temperature}
    if is_greedy:
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    messages = [{"role": "system", "content": settings.system}] if settings.system else []
    for line in read_lines():
        messages.append({"role": "user", "content": line})
        try:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses the conversation: {error}") from error
        length = inputs["input_ids"].shape[1]
        if length >= positions:
            raise InputError(f"the conversation has {length:,} tokens, and the model takes {positions:,}")
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        generated = model.generate(
            **inputs.to(model.device),
            streamer=streamer,
            max_new_tokens=min(settings.max_new_tokens, positions - length),
            **sampling,
        )
        answer = tokenizer.decode(generated[0, length:], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


def command() -> None:
    settings = parse_arguments()
    tokenizer, model = load(find_model(settings.model), settings.trust_remote_code)
    try:
        talk(tokenizer, model, settings)
    except KeyboardInterrupt:
        print()


def main() -> int:
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
