"""A run's folder, as its processes see it: shared or not, and by file systems that are late."""

import os
import socket
from pathlib import Path

import pytest
import torch

from irlfast.common import dist, ranks
from irlfast.common.files import InputError
from irlfast.common.tensors import save_tensors
from irlfast.config import Config
from irlfast.engine.checkpoint import sums_file, unlogged
from irlfast.methods.sdft import latest_teacher
from irlfast.methods.stages import check_policy_left
from irlfast.runs import shared
from irlfast.runs.metrics_log import MetricsLog
from irlfast.runs.run import Run
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import SERVER, as_torchrun


def check(place: dict[str, str], folder: Path, within: float, said: Path) -> None:
    """In a process of its own: check a folder that is relative to another one, and write what the check says."""
    os.environ |= place
    os.chdir(folder)
    ranks.join()
    shared.SEEN_WITHIN, ranks.ANSWERED_WITHIN = within, 300.0
    try:
        shared.check_shared(Path("runs/run"))
        said.write_text("shared")
    except InputError as error:
        said.write_text(str(error))
    ranks.leave()


def checked(folders: list[Path], tmp_path: Path, within: float) -> list[str]:
    """Return the message of the check in each of the processes that work in these folders."""
    said = [tmp_path / f"said-{number}" for number in range(len(folders))]
    given = zip(as_torchrun(len(folders)), folders, said, strict=True)
    processes = [SERVER.Process(target=check, args=(place, folder, within, path)) for place, folder, path in given]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [path.read_text() for path in said]


@pytest.mark.parametrize("there", ["", "runs", "runs/run"])
def test_a_folder_that_all_processes_share_is_taken_and_left_as_it_was(tmp_path, there):
    folder = tmp_path / "work"
    (folder / there).mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    assert checked([folder] * 3, tmp_path, within=300.0) == ["shared"] * 3
    assert sorted(folder.rglob("*")) == before


def test_a_folder_that_a_process_does_not_share_is_refused_by_all_in_one_sentence(tmp_path):
    folders = [tmp_path / "one", tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    assert {*checked(folders, tmp_path, within=1.0)} == {
        f"output_dir runs/run: process 2, on {host} as {tmp_path / 'other/runs/run'}, does not see what process 0 "
        f"writes on {host}; expected a folder that all machines share"
    }
    assert not [*tmp_path.rglob(".irlfast-*")]


def test_processes_decide_alike_where_the_file_system_shows_new_files_to_the_main_one_alone(tmp_path):
    for name in ("sft/policy", "sft/teacher"):
        (tmp_path / name).mkdir(parents=True)
    checkpoint = tmp_path / "step-2"
    checkpoint.mkdir()
    for rank in (0, 1):
        save_tensors({"loss": torch.tensor([rank + 1.0])}, sums_file(checkpoint, rank))

    def decide(rank: int) -> list:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        if rank:
            Path.exists, Path.glob = (lambda _: False), (lambda *_: iter(()))
        run = Run(Config(), tmp_path, tmp_path, None, (), (), MetricsLog(tmp_path, Config()), None)
        check_policy_left(run, 0, tmp_path / "sft" / "policy")
        return [latest_teacher(tmp_path / "sft", "its first teacher"), sorted(unlogged(tmp_path, 2)), dist.rank()]

    (teacher, sums, _), of_other = on_ranks(2, decide)
    assert (teacher, sums) == (tmp_path / "sft" / "teacher", ["loss"])
    assert of_other == [teacher, sums, 1]
