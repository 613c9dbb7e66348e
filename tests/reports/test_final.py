"""``final/`` shares its weights with the policy that it is, where the file system has hard links."""

import errno
import json
import os

import pytest

from irlfast.common.files import copy_folder


def test_final_has_the_weights_of_its_policy_as_a_hard_link_and_all_other_files_of_its_own(finished):
    final = finished[0] / "final"
    policy = finished[0] / json.loads((final / "policy.json").read_text())["kept"] / "policy"
    for path in policy.iterdir():
        assert (final / path.name).samefile(path) == (path.suffix == ".safetensors"), path.name


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_weights_are_copied_where_there_can_be_no_hard_link(tmp_path, monkeypatch, code):
    source = tmp_path / "policy"
    source.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
        (source / name).write_text(name)
    copy_folder(source, tmp_path / "linked", linked=".safetensors")

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    copy_folder(source, tmp_path / "copied", linked=".safetensors")
    for path in source.iterdir():
        assert (tmp_path / "linked" / path.name).samefile(path) == (path.suffix == ".safetensors")
        assert not (tmp_path / "copied" / path.name).samefile(path)
        assert (tmp_path / "copied" / path.name).read_text() == path.name
