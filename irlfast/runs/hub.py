"""The Hugging Face hub: whether it can be reached, and the upload of ``final/``."""

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from irlfast.common.files import InputError
from irlfast.config import Config

TIMEOUT = 3.0  # seconds


def set_offline_if_unreachable() -> None:
    """Set HF_HUB_OFFLINE if the hub does not answer, so that downloads fail at once instead of after many retries.

    Call this before Hugging Face's libraries are imported: they read the variable then.
    """
    answered = threading.Event()

    def ask() -> None:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT).close()
        except urllib.error.HTTPError:  # an error of HTTP is an answer
            answered.set()
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a name server that does not answer has no timeout of its own
    asking.start()
    asking.join(TIMEOUT)
    if not answered.is_set():
        os.environ["HF_HUB_OFFLINE"] = "1"


def create_repository(config: Config) -> None:
    """Create the repository ``hub_model_id`` if it does not exist, before training starts for an impossible upload.

    Raises:
        InputError: there is no token, the hub is out of reach, or refuses, or has a public repository where
            ``hub_private`` is set.
    """
    import huggingface_hub

    assert config.hub_model_id
    if not huggingface_hub.get_token():
        raise InputError("push_to_hub: found no token of the hub; expected HF_TOKEN, or `hf auth login` before")
    try:
        name = huggingface_hub.create_repo(config.hub_model_id, private=config.hub_private, exist_ok=True).repo_id
        private = huggingface_hub.repo_info(name).private
    except Exception as error:  # the hub's library and its HTTP library raise several types, which differ by version
        raise InputError(f"push_to_hub: {config.hub_model_id} cannot be written ({one_line(error)})") from error
    if config.hub_private and not private:
        raise InputError(
            f"hub_model_id {name}: found a public repository, expected a private one, or hub_private: false"
        )


def upload(config: Config, folder: Path) -> None:
    """Upload the files of ``folder`` to the repository ``hub_model_id``.

    Raises:
        InputError: the upload failed. The folder stays, and the same command tries again.
    """
    import huggingface_hub

    assert config.hub_model_id
    try:
        huggingface_hub.upload_folder(repo_id=config.hub_model_id, folder_path=folder)
    except Exception as error:  # as in create_repository
        raise InputError(
            f"push_to_hub: {folder} is complete, but its upload failed ({one_line(error)}); "
            "the same command tries again"
        ) from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
