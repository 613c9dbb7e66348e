"""A run whose disk is full, fails, or loses bytes says so in a sentence, and no damaged file gets its name."""

import errno
import os
import re

import pytest
import torch

from irlfast.common import files
from irlfast.common.command import run_command, writing_to
from irlfast.common.files import check_end, remove_temporary, write_text
from irlfast.common.tensors import check_tensors, save_tensors


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"is full; [\d.]+ GB are free there, and [\d.]+ GB for temp",
        ),
        (OSError(errno.EIO, "Input/output error"), r"has failed \(input/output error\); the same command resumes"),
        (OSError(errno.EIO, files.LOST), "has lost a part of what was written; the same command resumes"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "is full or has failed; "),
    ],
)
def test_an_error_of_the_disk_is_one_sentence_that_says_which(tmp_path, capsys, error, said):
    def job():
        with writing_to(str(tmp_path / "run"), "output_dir"):
            raise error

    assert run_command(job) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"irlfast: output_dir {tmp_path}/run: its disk ") and re.search(said, line)


def test_another_error_keeps_its_traceback(tmp_path):
    with pytest.raises(KeyError), writing_to(str(tmp_path)):
        raise KeyError("a mistake of the program")


def test_the_umask_is_read_without_a_change_that_other_threads_would_see(monkeypatch):
    before = os.umask(0o027)
    try:
        if files.Path("/proc/self/status").exists():
            monkeypatch.setattr(os, "umask", None)
        assert files.read_umask() == 0o027
    finally:
        monkeypatch.undo()
        os.umask(before)


def test_a_text_that_loses_bytes_gets_no_name(tmp_path, monkeypatch):
    path, write_bytes = tmp_path / "a.json", files.Path.write_bytes
    monkeypatch.setattr(
        files.Path, "write_bytes", lambda self, content: write_bytes(self, content[: len(content) // 2])
    )
    with pytest.raises(OSError, match=files.LOST):
        write_text(path, "a text")
    assert not path.exists()


def test_an_open_file_that_loses_bytes_is_noticed_at_its_end(tmp_path):
    with (tmp_path / "rows").open("wb+") as rows:
        check_end(rows, rows.write(b"whole\n"))
        rows.write(b"half")
        rows.flush()
        os.lseek(rows.fileno(), -2, os.SEEK_CUR)  # as after a write of half of the bytes
        with pytest.raises(OSError, match=files.LOST):
            check_end(rows, 10)


def test_tensors_are_compared_with_what_was_written_bit_by_bit(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"a": torch.tensor([0.0, float("nan")]), "b": torch.ones(2, 3).bool()}
    save_tensors(tensors, path)
    check_tensors(path, {"a": tensors["a"]})
    whole = path.read_bytes()
    for content in (whole[:-3] + b"xxx", whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(OSError, match=files.LOST):
            check_tensors(path, tensors)


def test_nothing_that_a_kill_leaves_under_a_temporary_name_stays(tmp_path):
    for name in ("a.tmp", "stage-00/.tmpx1Y2z3", "stage-00/policy.tmp/.tmpAbc", "stage-00/checkpoint/step-2.tmp/p.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "stage-00/DONE").write_text("[]")
    remove_temporary(tmp_path)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["stage-00", "DONE", "checkpoint"]
