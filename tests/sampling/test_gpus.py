"""Which process leads an engine of vLLM, and on which GPUs."""

import random

import pytest

from irlfast.sampling import gpus, vllm_sampler
from irlfast.sampling.gpus import led_gpus


def test_every_whole_group_of_gpus_has_one_leader_and_no_gpu_is_in_two_engines():
    """Numbers of processes and GPUs per engine, and names of GPUs, are drawn."""
    draw = random.Random(0)
    for _ in range(300):
        ranks, size = draw.randint(1, 16), draw.choice([1, 2, 3, 4, 8])
        names = draw.choice(
            [
                [str(gpu) for gpu in range(ranks)],
                [str(gpu) for gpu in draw.sample(range(32), ranks)],  # a masked list
                [f"GPU-{draw.getrandbits(64):x}" for _ in range(ranks)],
                [f"MIG-{draw.getrandbits(64):x}" for _ in range(ranks)],
            ]
        )
        engines = [led_gpus(rank, names, size) for rank in range(ranks)]
        leaders = [rank for rank, engine in enumerate(engines) if engine]
        assert leaders == [rank for rank in range(ranks) if rank % size == 0 and rank + size <= ranks]
        assert all(engines[rank][0] == names[rank] for rank in leaders)  # its own GPU is in its engine
        used = [gpu for engine in engines for gpu in engine]
        assert used == names[: ranks // size * size]  # so that every group is whole, and each GPU in one engine


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this process one of a machine with GPUs, as CUDA would show them."""

    def become(visible: str | None, gpus_there: int, rank: str | None, own: int = 0):
        for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("LOCAL_RANK", rank)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        monkeypatch.setattr(gpus.torch.cuda, "is_available", lambda: gpus_there > 0)
        monkeypatch.setattr(gpus.torch.cuda, "device_count", lambda: gpus_there)
        monkeypatch.setattr(gpus.dist, "device", lambda: gpus.torch.device("cuda", own))

    return become


@pytest.mark.parametrize(
    ("visible", "gpus_there", "rank", "own", "size", "expected"),
    [
        (None, 8, None, 0, 2, None),  # without a launcher the variable is unchanged
        ("4,5", 2, None, 0, 1, "4,5"),
        (None, 8, "5", 5, 1, "5"),
        (None, 8, "6", 6, 2, "6,7"),
        ("4, 5,6,7", 4, "2", 2, 2, "6,7"),
        ("GPU-a,GPU-b", 2, "1", 1, 1, "GPU-b"),
        ("MIG-a,MIG-b,MIG-c", 1, "0", 0, 1, "MIG-a"),  # CUDA shows one part of a GPU to a process
        ("3", 1, "3", 0, 1, "3"),  # a launcher that shows each process its own GPU alone
        ("", 0, "1", 0, 1, ""),  # all GPUs are hidden
    ],
)
def test_an_engine_sees_its_own_gpus_alone(machine, visible, gpus_there, rank, own, size, expected):
    machine(visible, gpus_there, rank, own)
    assert gpus.leads_engine(size)
    assert vllm_sampler.environment(size).get("CUDA_VISIBLE_DEVICES") == expected


def test_with_eight_processes_and_two_gpus_per_engine_every_second_process_leads(machine):
    leaders = []
    for rank in range(8):
        machine(None, 8, str(rank), rank)
        leaders += [rank] if gpus.leads_engine(2) else []
    assert leaders == [0, 2, 4, 6]


def test_a_process_that_sees_fewer_gpus_than_an_engine_needs_leads_none(machine):
    machine("4,5,6", 3, "0", 0)
    assert not gpus.leads_engine(4)
