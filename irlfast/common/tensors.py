"""Files of tensors, which are compared with what was written: a failing disk may lose bytes and report success."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irlfast.common.files import lost


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors, or NumPy's arrays, as safetensors, with ``metadata`` in the file's header.

    Raises:
        OSError: the file does not hold them afterwards.
    """
    import torch
    from safetensors.torch import save_file

    own = {name: torch.as_tensor(values) for name, values in tensors.items()}
    save_file(own, path, metadata)
    check_tensors(path, own)


def is_finite(tensor: Any) -> bool:
    """Return whether all values of a tensor are finite, without a mask as large as the tensor."""
    return not tensor.numel() or all(end.isfinite() for end in tensor.aminmax())


def check_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Raise an OSError if a tensor in a safetensors file has other bits than the one of its name in ``tensors``."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as saved:
            for name in saved.keys() & tensors.keys():
                both = saved.get_tensor(name), tensors[name].detach().cpu().contiguous()
                one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in both)
                if not torch.equal(one, other):
                    raise lost(path)
    except SafetensorError as error:
        raise lost(path) from error
