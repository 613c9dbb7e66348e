"""A log is never a reason to refuse: whatever damaged it, its whole rows are read, and it goes on."""

import errno
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.common.logs import append_row, mend, read_log, read_row, rewrite
from irlfast.config import make_config
from irlfast.reports.files import read_lines
from irlfast.runs.metrics_log import MetricsLog, is_logged
from tests.helpers.runs import run, run_killed_at
from tests.helpers.tiers import full


def row(step: int) -> dict:
    return {"phase": "sft", "stage": -1, "step": step, "loss": 3.0 / step, "note": "ä€\u2028\ud83d"}


ROWS = [row(step) for step in range(1, 6)]
NOT_ROWS = [
    b"\x00" * 40,
    b'{"phase": "sft", "st',
    b'{"phase": "sft", "step": "7"}',
    b'{"phase": null, "step": 7}',
    b'{"step": 7, "loss": 1.0}',
    b'{"phase": "sft", "loss": 1.0}',
    b'{"phase": "sft", "step": 7.5}',
    b'["phase", "step"]',
    b"null",
    b"NaN",
    b'{"phase": "\xff\xfe", "step": 7}',
    '{"phase": "sft", "step": 7}'.encode("utf-16"),
    b'{"phase": "sft", "step": 7}{"phase": "sft", "step": 8}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"phase": "sft", "step": ' + b"9" * 10_000 + b"}",
]


@given(st.lists(st.tuples(st.integers(0, len(ROWS)), st.sampled_from(NOT_ROWS) | st.binary(max_size=30))))
@settings(deadline=None, max_examples=60)
def test_damaged_lines_anywhere_are_left_out_and_counted(tmp_path_factory, damage):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    lines = [json.dumps(each).encode() for each in ROWS]
    for at, line in damage:
        lines.insert(at, line.replace(b"\n", b"?"))
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows, damaged = read_log(path, is_logged)
    assert [each for each in rows if "note" in each] == ROWS
    assert len(rows) + damaged == sum(bool(line.strip()) for line in lines)
    assert mend(path, is_logged) == rows
    assert read_log(path, is_logged) == (rows, 0)


@given(st.binary(max_size=400), st.integers(0, 1000), st.integers(0, 7), st.integers(0, 1000))
@settings(deadline=None, max_examples=100)
def test_a_log_that_was_cut_flipped_or_replaced_is_read_and_goes_on(tmp_path_factory, noise, at, bit, end):
    folder = tmp_path_factory.mktemp("log")
    whole = b"".join(json.dumps(each).encode() + b"\n" for each in ROWS)
    flipped = bytearray(whole)
    flipped[at % len(whole)] ^= 1 << bit
    for content in (noise, bytes(flipped), whole[: end % len(whole)], whole[: end % len(whole)] + noise):
        path = folder / "metrics.jsonl"
        path.write_bytes(content)
        before, damaged = read_log(path, is_logged)
        append_row(path, row(98))
        assert read_log(path, is_logged) == ([*before, row(98)], damaged)
        assert mend(path, is_logged) == [*before, row(98)]
        append_row(path, row(99))
        assert read_log(path, is_logged) == ([*before, row(98), row(99)], 0)


def test_one_flipped_byte_costs_at_most_the_lines_that_it_touches(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rewrite(path, ROWS)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
        rows, damaged = read_log(path, is_logged)
        assert len(rows) >= len(ROWS) - 2
        assert damaged == (1 if len(rows) < len(ROWS) else 0)


@pytest.mark.parametrize("content", [b"\x00" * 99, b"", b'{"phase": "sft"', None, "folder"])
def test_metrics_are_logged_over_whatever_is_in_their_place_and_one_line_says_so(tmp_path, content, capsys):
    path = tmp_path / "metrics.jsonl"
    if content == "folder":
        (path / "inside").mkdir(parents=True)
    elif content is not None:
        path.write_bytes(content)
    log = MetricsLog(tmp_path, make_config({"dataset_name": __file__, "model_name_or_path": "."}))
    log.start_phase("sft", 0)
    log.write(row(1))
    assert read_log(path, is_logged) == ([row(1)], 0)
    said = capsys.readouterr().err
    assert said.count("\n") == (1 if content else 0)
    if content == "folder":
        assert f"cannot be read (Is a directory); moved to {tmp_path}/quarantine/metrics.jsonl" in said
        assert (tmp_path / "quarantine" / "metrics.jsonl" / "inside").exists()
    elif content:
        assert "metrics.jsonl: 1 damaged line is left out" in said


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path, monkeypatch):
    """The disk takes half of the line, as a nearly full one does."""
    path = tmp_path / "metrics.jsonl"
    append_row(path, row(1))
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[: len(data) // 2]))
    with pytest.raises(OSError, match="No space left") as raised:
        append_row(path, row(2))
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    append_row(path, row(3))
    assert read_log(path, is_logged) == ([row(1), row(3)], 0)


def test_every_row_is_one_line_by_one_call(tmp_path, monkeypatch):
    calls = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: calls.append(data) or write(handle, data))
    for each in ROWS:
        append_row(tmp_path / "log", each)
    assert [read_row(line) for line in calls] == ROWS
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in calls)


def test_the_report_leaves_out_the_same_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*NOT_ROWS[:2], *NOT_ROWS[7:15], json.dumps(row(1)).encode()]))
    notes: list[str] = []
    assert [*read_lines(tmp_path, "metrics.jsonl", notes)] == [row(1)]
    assert notes == ["metrics.jsonl: 10 unreadable lines left out."]


@full
def test_a_run_whose_log_is_torn_and_damaged_resumes_with_the_same_policy(finished, tmp_path):
    output = tmp_path / "run"
    run_killed_at(output, ["stage-00/checkpoint/step-2"])
    path = output / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, b"\x00" * 64, *others[:-1], others[-1][: len(others[-1]) // 2]]))
    _, err = run(output)
    assert f"{path}: 2 damaged lines are left out" in err
    assert (output / "final/model.safetensors").read_bytes() == (finished[0] / "final/model.safetensors").read_bytes()
    steps = [(each["phase"], each["step"]) for each in read_log(path, is_logged)[0]]
    assert steps[0] == ("sft", 2)
    assert len(set(steps)) == len(steps)
