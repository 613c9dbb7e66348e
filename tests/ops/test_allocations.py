"""Every tensor that the operations make names its dtype and device.

The process may have another default dtype than fp32, and another default device than the CPU: native code would write
beyond the end of memory, and sums would be rounded to bf16.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    *sorted((ROOT / "irlfast/ops").rglob("*.py")),
    *sorted((ROOT / "irlfast/losses").rglob("*.py")),
    *sorted((ROOT / "kernels").rglob("*.py")),
    ROOT / "irlfast/native.py",
    ROOT / "irlfast/optim.py",
]
CONSTRUCTORS = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "from_numpy", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


def unnamed(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and name of every constructor of torch that is called without ``dtype`` or ``device``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        given = {keyword.arg for keyword in node.keywords}
        if of_torch and node.func.attr in CONSTRUCTORS and not {"dtype", "device"} <= given:
            yield node.lineno, node.func.attr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_new_tensor_names_its_dtype_and_device(path):
    assert list(unnamed(ast.parse(path.read_text()))) == []


def test_a_constructor_without_dtype_or_device_is_reported():
    source = "torch.empty(3)\ntorch.zeros(3, dtype=d)\ntorch.ones(3, dtype=d, device=e)\nx.new_zeros(3)"
    assert list(unnamed(ast.parse(source))) == [(1, "empty"), (2, "zeros")]
