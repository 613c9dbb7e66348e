"""Real runs that a scheduler asks to stop: they leave a checkpoint, exit with 75, and resume to the same bytes."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from tests.helpers.endpoint import completion, serving
from tests.helpers.runs import PYTHON, ROOT, TORCHRUN, Forked, command, contents, run
from tests.helpers.tiers import full

LEARNED = ("phase", "step", "loss", "grad_norm", "learning_rate", "logps/chosen")  # of a row, apart from its speed


def wait_for(path: Path, is_alive) -> None:
    while not path.exists():
        assert is_alive(), f"the run ended before {path} was there"
        time.sleep(0.002)


def stopped(output: Path, moment: str, *numbers: int, processes: int = 1, only: int | None = None, **keys) -> str:
    """Start a run, and send signals when a file of its output is there. Return what the run printed as it left.

    ``only`` is the rank that gets the signals.
    """
    started = Forked(command(output, **keys), processes)
    wait_for(output / moment, started.processes[0].is_alive)
    for number in numbers:
        for process in started.processes if only is None else [started.processes[only]]:
            os.kill(process.pid, number)
    for process in started.processes:
        process.join(60)
    assert [process.exitcode for process in started.processes] == [75] * processes, started.wait(0)
    return started.wait(0)[2]


def learned(output: Path) -> list[dict]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: row.get(name) for name in LEARNED} for row in rows]


def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_and_resumes_to_the_same_bytes(finished, tmp_path):
    output = tmp_path / "run"
    said = stopped(output, "sft/checkpoint/step-2", signal.SIGTERM, async_save=False)  # it is there before step 3
    step = re.search(r"irlfast: preempted at step ([2-5]) of sft; the same command resumes\n$", said).group(1)
    assert (output / f"sft/checkpoint/step-{step}/progress.json").exists()
    run(output)
    assert contents(output / "final") == contents(finished[0] / "final")
    assert learned(output) == learned(finished[0])


@full
def test_wherever_a_run_is_asked_to_stop_it_resumes_to_the_same_bytes(finished, tmp_path):
    output = tmp_path / "run"
    reached = "irlfast: preempted(; all that was finished is kept| (at|after) .*); the same command resumes"
    for moment in ("data/train.safetensors", "sft/policy", "sft/eval.json", "stage-00/reference.safetensors"):
        said = stopped(output, moment, signal.SIGUSR1)
        assert re.fullmatch(reached, said.splitlines()[-1]), said
    said = stopped(output, "stage-00/checkpoint/step-2", signal.SIGTERM, preemption_grace=0)
    assert "what takes longer than preemption_grace (0 seconds) is not kept" in said
    run(output)
    assert contents(output / "final") == contents(finished[0] / "final")
    assert learned(output) == learned(finished[0])


@full
def test_two_processes_stop_after_the_same_step_whoever_is_asked_and_whoever_starts_them(tmp_path):
    """LoRA, in SFT and in the fit of a reward; torchrun hands on the signal, and always ends with 1."""
    keys = {"method": "rft", "use_peft": True, "stages": 1, "zero_stage": 2, "preemption_grace": 10}
    keys |= {"sft_steps": 40, "reward_steps": 40, "save_steps": 20, "logging_steps": 20, "num_generations": 2}
    keys |= {"max_train_samples": 32, "max_eval_samples": 8, "async_save": False}  # step-20 is there before step 21
    run(tmp_path / "whole", 2, **keys)
    output = tmp_path / "stopped"
    said = stopped(output, "sft/checkpoint/step-20", signal.SIGTERM, processes=2, only=1, **keys)
    assert re.search(r"irlfast(, process 1)?: preempted at step [23]\d of sft; the same command resumes\n$", said)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    agent = subprocess.Popen([*TORCHRUN, *command(output, **keys)], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    wait_for(output / "stage-00/reward/checkpoint/step-20", lambda: agent.poll() is None)
    agent.send_signal(signal.SIGTERM)
    _, said = agent.communicate(timeout=60)
    assert agent.returncode == 1
    assert re.search(
        r"irlfast(, process 1)?: preempted at step [23]\d of stage-00/reward; the same command resumes\n", said
    )
    run(output, 2, **keys)
    assert contents(output / "final") == contents(tmp_path / "whole" / "final")


def test_a_command_that_is_asked_to_stop_while_it_imports_its_libraries_says_so(tmp_path):
    (tmp_path / "slow.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command = "from irlfast import __main__ as irlfast; irlfast.COMMANDS['train'] = ('slow', ''); irlfast.main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen([*PYTHON, "-c", command, "train"], cwd=ROOT, env=environment, text=True, **pipes)
    assert started.stdout.readline() == "importing\n"
    started.send_signal(signal.SIGTERM)
    assert started.communicate(timeout=60)[1] == "irlfast: preempted while it started; the same command resumes\n"
    assert started.returncode == 75


def test_generate_says_that_it_is_asked_to_stop_and_keeps_the_answers_that_came(tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "demonstrations.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("quick", "slow")))

    def script(request: dict):
        time.sleep(60 * (request["messages"][-1]["content"] == "slow"))
        return completion("an answer")

    with serving(script) as server:
        given = [str(prompts), str(output), "--base_url", server.url, "--model", "strong"]
        started = subprocess.Popen(
            [*PYTHON, "-m", "irlfast.generate", *given], stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        kept = tmp_path / "demonstrations.jsonl.answers"
        while not kept.exists() or "number" not in kept.read_text():
            assert started.poll() is None
            time.sleep(0.01)
        started.send_signal(signal.SIGTERM)
        _, said = started.communicate(timeout=30)
    assert (started.returncode, said.splitlines()[-1]) == (
        75,
        "irlfast: preempted; all that was finished is kept; the same command resumes",
    )
