import pytest

from tests.helpers.runs import run


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):
        return  # pytest-xdist's own process hands out tests, and needs no torch
    from tests.helpers.poison import poison_new_memory

    poison_new_memory()


def pytest_addoption(parser):
    parser.addoption("--draws", type=int, default=1, help="draws of each fault of each file, in the nightly sweep")


def pytest_generate_tests(metafunc):
    if "draw_of_fault" in metafunc.fixturenames:
        metafunc.parametrize("draw_of_fault", range(metafunc.config.getoption("draws")))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of an unbroken run, and what it printed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    return output, *run(output)
