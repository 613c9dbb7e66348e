"""A model behind an OpenAI-compatible endpoint. OpenAI's client asks it, and tries a failed request again."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

from irlfast.common.addresses import check_address, warn_of_open_key
from irlfast.common.files import InputError
from irlfast.common.messages import first_sentence, log

K = TypeVar("K")
T = TypeVar("T")


class Endpoint(NamedTuple):
    """An address such as http://localhost:8000/v1, the model's name there, and how to ask."""

    base_url: str
    model: str
    temperature: float
    max_new_tokens: int
    max_retries: int = 5  # times that a failed request is tried again
    timeout: float = 600.0  # seconds that an answer may take


class Reply(NamedTuple):
    """A model's answer. ``finish`` is ``stop``, ``length`` where the answer was cut, ``refusal`` or another reason."""

    text: str
    finish: str
    prompt_tokens: int | None  # None where the endpoint does not count them
    completion_tokens: int | None


Ask = Callable[[list[dict[str, Any]], int], Reply]  # messages and a seed -> the model's answer


class NoAnswer(Exception):
    """Raised for a request that gets no usable answer; the message is the reason."""


def connect(endpoint: Endpoint) -> Ask:
    """Return a function that asks the endpoint, from any thread.

    The key is ``OPENAI_API_KEY`` from the environment; local servers take any. A user and password in the address go in
    its place, and the address's query goes with every request. No message shows them. The client waits as long as a
    ``Retry-After`` header says, else longer after each try.

    Raises:
        InputError: OpenAI's client is not installed, or the address or the key cannot be used. The returned function
            raises it where the endpoint cannot be reached or refuses every request.
        NoAnswer: by the returned function, where this request alone failed.
    """
    try:
        import openai
    except ImportError as error:
        raise InputError("found no package openai; expected pip install 'irlfast[generate]'") from error
    check(endpoint)
    url = endpoint.base_url
    options = client_options("the endpoint's address", url)
    client = openai.OpenAI(**options, max_retries=endpoint.max_retries, timeout=endpoint.timeout)
    refused = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
    explained = set[int]()  # statuses whose first message was printed

    def ask(messages: list[dict[str, Any]], seed: int) -> Reply:
        try:
            response = client.chat.completions.create(
                model=endpoint.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=endpoint.temperature,
                max_completion_tokens=endpoint.max_new_tokens,
                seed=seed,
            )
        except openai.APITimeoutError as error:
            raise NoAnswer("timed out") from error
        except openai.APIConnectionError as error:
            raise InputError(f"{url}: cannot be reached; the same command resumes") from error
        except refused as error:
            raise InputError(f"{url}: {first_sentence(error)}") from error
        except openai.APIStatusError as error:
            if error.status_code not in explained:
                explained.add(error.status_code)
                log(f"{url}: {first_sentence(error)}")
            raise NoAnswer(f"refused with status {error.status_code}") from error
        except (openai.APIResponseValidationError, ValueError) as error:
            raise NoAnswer("not in OpenAI's format") from error
        return reply_of(response)

    return ask


def client_options(name: str, url: str) -> dict[str, Any]:
    """Return the address, query and key that OpenAI's client takes. ``name`` says where the address comes from.

    Raises:
        InputError: the address or the key cannot be used.
    """
    key, address = api_key(), check_address(name, url)
    if key or address.username or address.password or address.query:
        warn_of_open_key(name, address)
    query = dict(parse_qsl(address.query, keep_blank_values=True))
    plain = address._replace(query="", fragment="").geturl()
    return {"base_url": plain, "default_query": query, "api_key": key or "none"}


def api_key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError("OPENAI_API_KEY: found a character that no key has; expected printable ASCII")
    return key


def check(endpoint: Endpoint) -> None:
    for name, least in (("temperature", 0.0), ("max_new_tokens", 1), ("max_retries", 0), ("timeout", 0.001)):
        if not getattr(endpoint, name) >= least:  # NaN is less than nothing
            raise InputError(f"{name}: found {getattr(endpoint, name)}, expected {least:g} or more")


def reply_of(response: Any) -> Reply:
    try:
        choice, usage = response.choices[0], response.usage
        message, finish = choice.message, choice.finish_reason
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        text = (message.content or "").encode(errors="replace").decode().strip()  # half a surrogate pair is no text
    except (AttributeError, IndexError, TypeError) as error:
        raise NoAnswer("not in OpenAI's format") from error
    refused = message.refusal or finish == "content_filter"
    return Reply(text, "refusal" if refused else str(finish), *counts)


def run_all(jobs: Mapping[K, Callable[[], T]], concurrency: int) -> Iterator[tuple[K, T | NoAnswer]]:
    """Run the jobs, ``concurrency`` at a time, and yield the name of each with its result as it comes.

    The NoAnswer that a job raises is its result. After an InputError no other job begins. The results of those that
    already run are yielded, then the error is raised.
    """
    if concurrency < 1:
        raise InputError(f"concurrency: found {concurrency}, expected 1 or more")
    failure: InputError | None = None
    pool = ThreadPoolExecutor(concurrency)
    names = {pool.submit(job): name for name, job in jobs.items()}
    try:
        for future in as_completed(names):
            if future.cancelled():
                continue
            error = future.exception()
            if error is None:
                yield names[future], future.result()
            elif isinstance(error, NoAnswer):
                yield names[future], error
            elif isinstance(error, InputError):
                failure = failure or error
                for other in names:
                    other.cancel()
            else:
                raise error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failure:
        raise failure
