"""How torch multiplies fp32 operands is a setting of the process: operations compute whatever it is, and leave it."""

import itertools
import threading
from typing import Any

import pytest
import torch
from torch._C import _get_fp32_precision_getter as get_precision
from torch._C import _set_fp32_precision_setter as set_precision
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from irlfast import ops
from irlfast.ops.common.precision import fp32_precision, own_setting, users
from tests.helpers.ops_cases import make

LEVELS = [("generic", "all"), ("mkldnn", "all"), ("mkldnn", "matmul")]
VALUES = ["none", "ieee", "tf32", "bf16"]
SETTINGS = list(itertools.product(VALUES, repeat=len(LEVELS)))


@pytest.fixture(autouse=True)
def unchanged():
    yield
    for level in LEVELS:
        set_precision(*level, "none")


def set_levels(values: tuple[str, ...]) -> None:
    for level, value in zip(LEVELS, values, strict=True):
        set_precision(*level, value)


def answers() -> list[list[str]]:
    """Return the setting that each level tells, at first and after each change of a level above.

    A level whose answer changes with a level above inherits its setting.
    """
    told = [[get_precision(*level) for level in LEVELS]]
    for level, value in itertools.product(LEVELS[:2], VALUES):
        set_precision(*level, value)
        told.append([get_precision(*other) for other in LEVELS])
    return told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_leaves_every_setting_as_it_was_and_inherited_ones_inherited(dtype):
    case = make([3, 2], dtype=dtype)
    for values in SETTINGS:
        set_levels(values)
        expected = answers()
        set_levels(values)
        ops.pair_loss(**case, beta=0.1).loss.backward()
        assert answers() == expected, values


def test_an_exception_leaves_every_setting_as_it_was():
    for values in SETTINGS:
        set_levels(values)
        expected = answers()
        set_levels(values)
        with pytest.raises(ZeroDivisionError), fp32_precision("mkldnn", "bf16"):
            raise ZeroDivisionError
        assert answers() == expected, values


def test_the_own_setting_of_a_level_is_what_was_set():
    for values in SETTINGS:
        set_levels(values)
        assert own_setting(*LEVELS) == values[-1]


class Products(TorchDispatchMode):
    """Record the setting in force at every product. (Not every CPU multiplies bf16 where the setting says so.)"""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "irlfast":
            with self:
                return OPDEFS[function.name().removesuffix(".default")]._init_fn(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.precisions.add(get_precision("mkldnn", "matmul"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("values", SETTINGS[:: len(VALUES) + 1], ids="-".join)
def test_fp32_is_multiplied_as_such_whatever_the_users_setting(values):
    case = make([4, 3], dtype=torch.float32)
    set_levels(values)
    with Products() as products:
        ops.pair_loss(**case, beta=0.1, backend="cpu").loss.backward()
        ops.log_ratio(**case, backend="cpu").log_ratio.sum().backward()
    assert products.precisions <= {"ieee"}  # no product at all where native code multiplies


def test_threads_that_want_another_precision_wait_and_the_last_one_restores():
    log = []

    def wants(precision: str) -> None:
        with fp32_precision("mkldnn", precision):
            log.append((precision, get_precision("mkldnn", "matmul")))

    with fp32_precision("mkldnn", "ieee"), fp32_precision("mkldnn", "ieee"):
        threads = [threading.Thread(target=wants, args=(precision,)) for precision in ("bf16", "ieee")]
        for thread in threads:
            thread.start()
        threads[1].join(60)
        assert log == [("ieee", "ieee")]
    threads[0].join(60)
    assert log == [("ieee", "ieee"), ("bf16", "bf16")]
    assert get_precision("mkldnn", "matmul") == "none" and not users["mkldnn"]
