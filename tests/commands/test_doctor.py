"""The doctor's findings on this machine, and on a machine without some parts."""

import importlib.metadata
import subprocess
import sys

from irlfast import doctor, native


def test_the_doctor_finds_every_required_part_here():
    done = subprocess.run([sys.executable, "-m", "irlfast.doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("Python", "torch", "deepspeed", "backend cpu", "native CPU code", "cmake", "nvcc", "native CUDA code"):
        assert part in done.stdout


def test_the_doctor_names_a_missing_part_and_the_command_that_installs_it(monkeypatch, capsys):
    def version(name: str) -> str:
        if name in ("peft", "triton"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.57.1" if name == "transformers" else "99.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(native, "cpu", None)
    monkeypatch.setattr(native, "cuda", None)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["irlfast doctor"])
    findings = {finding.part: finding for finding in doctor.examine()}
    assert findings["peft"].fatal and "pip install 'peft>=0.18'" in findings["peft"].detail
    assert (
        findings["transformers"].fatal
        and "found 4.57.1, expected >=5: pip install 'transformers>=5'" in findings["transformers"].detail
    )
    assert not findings["triton"].fatal and "pip install 'triton>=3.5'" in findings["triton"].detail
    assert "compiler" in findings["native CPU code"].detail and "nvcc" in findings["native CUDA code"].detail
    for tool in ("C++ compiler", "cmake", "nvcc"):
        assert "absent" in findings[tool].state and "at installation" in findings[tool].detail
    assert doctor.main() == 1
    assert "cannot train: transformers, peft" in capsys.readouterr().out
