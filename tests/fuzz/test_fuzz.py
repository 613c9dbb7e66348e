"""The fuzz in small: reduced inputs of the faults that it found, its corpus, and a few new inputs per target."""

import pytest

from irlfast.common.files import InputError
from tests.fuzz.guards import CANARY, CodeRan, guarded, refusal
from tests.fuzz.targets import CORPUS, TARGETS, drawn_inputs, module_of, one_input
from tests.helpers.tiers import full

SLOW = {"model_folders", "pages", "deepspeed_file"}  # each input takes a tenth of a second or more
EACH = [pytest.param(target, marks=[full] if target in SLOW else []) for target in TARGETS]


@pytest.mark.parametrize("target", EACH)
def test_inputs_that_once_ended_in_a_fault_are_taken_or_refused_in_a_sentence(target):
    for example in module_of(target).EXAMPLES:
        guarded(module_of(target).check)(example)


@pytest.mark.parametrize("target", EACH)
def test_the_corpus_is_taken_or_refused_in_a_sentence(target):
    read = one_input(target)
    paths = sorted((CORPUS / target).glob("*"))
    assert [path.name for path in paths if read(path.read_bytes()) is None] == []  # too few bytes for the strategy


@pytest.mark.parametrize("target", EACH)
def test_new_inputs_are_taken_or_refused_in_a_sentence(target):
    drawn_inputs(guarded(module_of(target).check), module_of(target).INPUTS, 10 if target in SLOW else 60)


def test_an_input_whose_code_runs_is_a_fault():
    with pytest.raises(CodeRan, match="canary"):
        guarded(lambda text: exec(text))(f"open({str(CANARY)!r}, 'w').close()")
    with pytest.raises(CodeRan, match="subprocess"):
        guarded(lambda text: __import__("subprocess").run(["true"]))("")


def raises(error: Exception):
    def call() -> None:
        raise error

    return call


def test_a_refusal_is_one_line_that_names_what_is_wrong():
    assert refusal(raises(InputError("some.jsonl, line 3: \x1b[2J\n")), names=["some.jsonl"]).isprintable()
    with pytest.raises(AssertionError, match="without a name"):
        refusal(raises(InputError("no")), names=["some.jsonl"])
    with pytest.raises(KeyError):
        refusal(raises(KeyError("no")))


def test_the_corpus_is_small():
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 10**6
