import pytest

from tests.helpers.poison import poison_new_memory
from tests.helpers.runs import run

poison_new_memory()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of an unbroken run, and what it printed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    return output, *run(output)
