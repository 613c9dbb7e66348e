"""Compare a saved model with what was saved: a failing disk may lose bytes and report success."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from irlfast.common.files import lost
from irlfast.common.tensors import check_tensors


def check_saved(folder: Path, tokenizer: Any, state: Mapping[str, Tensor]) -> None:
    """Check the tensors of a model's folder that have names in ``state``, its JSON files and its chat template.

    Raises:
        OSError: a file is not as it was written.
    """
    for path in folder.glob("*.safetensors"):
        check_tensors(path, state)
    template, given = folder / "chat_template.jinja", tokenizer.chat_template
    if isinstance(given, str) and template.exists() and template.read_bytes() != given.encode():
        raise lost(template)
    for path in folder.glob("*.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise lost(path) from error


def is_converted(model: Any) -> bool:
    """Return whether Transformers saves a model's tensors otherwise than the model has them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if hasattr(model, "_weight_conversions"):  # those that its checkpoint needed when it was loaded
        return bool(model._weight_conversions)
    return bool(get_model_conversion_mapping(model, add_legacy=False))
