"""The upload of ``final/`` to the hub: tried before training starts, and described by a card that the hub accepts."""

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from irlfast.common.files import InputError, find_path
from irlfast.config import Config

PATIENCE = 3.0  # seconds


def stay_offline_where_cut_off() -> None:
    """Set HF_HUB_OFFLINE where the hub does not answer, so that what it has fails at once, not after many retries.

    Hugging Face's libraries look at the variable when they are imported: this must come before.
    """
    answered = threading.Event()

    def ask() -> None:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PATIENCE).close()
        except urllib.error.HTTPError:  # an answer, too
            answered.set()
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a name server's silence has no timeout of its own
    asking.start()
    asking.join(PATIENCE)
    if not answered.is_set():
        os.environ["HF_HUB_OFFLINE"] = "1"


def try_upload(config: Config) -> None:
    """Make the repository, if it is not there, so that a run does not train for an upload that cannot be.

    Raises:
        InputError: the hub is out of reach, refuses, or has a public repository where a private one is asked for.
    """
    import huggingface_hub

    assert config.hub_model_id
    try:
        name = huggingface_hub.create_repo(config.hub_model_id, private=config.hub_private, exist_ok=True).repo_id
        private = huggingface_hub.repo_info(name).private
    except Exception as error:  # the hub has its own kinds, its HTTP library others, which differ by version
        raise InputError(f"push_to_hub: {config.hub_model_id} cannot be written ({sentence(error)})") from error
    if config.hub_private and not private:
        raise InputError(
            f"hub_model_id {name}: found a public repository, expected a private one, or hub_private: false"
        )


def upload(config: Config, folder: Path) -> None:
    """Upload the files of ``folder``.

    Raises:
        InputError: it failed; the folder is there, and the same command tries again.
    """
    import huggingface_hub

    assert config.hub_model_id
    try:
        huggingface_hub.upload_folder(repo_id=config.hub_model_id, folder_path=folder)
    except Exception as error:  # as above
        raise InputError(
            f"push_to_hub: {folder} is there, but its upload failed ({sentence(error)}); the same command tries again"
        ) from error


def sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def card_head(config: Config, pipeline_tag: str, *tags: str) -> str:
    """The metadata of a model card; the base model and the datasets where the hub can know them."""
    import huggingface_hub

    sources = config.dataset_name if isinstance(config.dataset_name, list) else [config.dataset_name]
    data = huggingface_hub.ModelCardData(
        base_model=next(iter(hub_names([config.model_name_or_path])), None),
        datasets=hub_names([getattr(source, "name", source) for source in sources]) or None,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["irlfast", *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def hub_names(names: list[Any]) -> list[str]:
    """The names that are valid on the hub and are no files or folders here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    found = []
    for name in names:
        if name is None or find_path(name) or Path(name).suffix in (".json", ".jsonl", ".parquet", ".csv"):
            continue
        try:
            validate_repo_id(name)
        except HFValidationError:
            continue
        found.append(name)
    return found
