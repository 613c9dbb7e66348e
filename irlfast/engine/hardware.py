"""The GPUs that a plan can be made for, with the figures of their makers' data sheets.

- Memory and its bytes per second. NVIDIA A100 Tensor Core GPU data sheet (2021), SXM: 40 GB at 1,555 GB/s, 80 GB at
  2,039 GB/s. NVIDIA H100 Tensor Core GPU data sheet (2024), SXM: 80 GB at 3.35 TB/s. NVIDIA H200 Tensor Core GPU data
  sheet (2024), SXM: 141 GB at 4.8 TB/s.
- Operations, of the same sheets. A100: bf16 312 TFLOPS without sparsity, fp32 19.5. H100 and H200: bf16 1,979 TFLOPS
  with sparsity, of which 989 is the dense half, and fp32 67. fp32 is that of the CUDA cores: torch computes no float32
  product in TF32 by default.
- NVLink, of the same sheets. A100 (third generation, 12 links): 600 GB/s. H100 and H200 (fourth, 18 links): 900 GB/s.
- Networks. NVIDIA DGX A100 data sheet: an InfiniBand adapter of 200 Gb/s (25 GB/s) for each of eight GPUs. NVIDIA DGX
  H100 and H200 data sheets: one of 400 Gb/s (50 GB/s).

A data sheet counts NVLink in both directions together. Here a link is one direction.
"""

import re
from typing import NamedTuple

from irlfast.common.files import InputError


class Gpu(NamedTuple):
    memory: float  # bytes
    operations: dict[str, float]  # per second, dense, by dtype
    bandwidth: float  # bytes per second of its memory
    nvlink: float  # bytes per second to the other GPUs of its machine
    network: float  # bytes per second to other machines


GPUS = {
    "A100-40G": Gpu(40e9, {"bfloat16": 312e12, "float32": 19.5e12}, 1555e9, 300e9, 25e9),
    "A100-80G": Gpu(80e9, {"bfloat16": 312e12, "float32": 19.5e12}, 2039e9, 300e9, 25e9),
    "H100-80G": Gpu(80e9, {"bfloat16": 989e12, "float32": 67e12}, 3350e9, 450e9, 50e9),
    "H200-141G": Gpu(141e9, {"bfloat16": 989e12, "float32": 67e12}, 4800e9, 450e9, 50e9),
}


class Cluster(NamedTuple):
    """Machines (nodes) of equally many GPUs of one kind, with a process per GPU."""

    name: str  # of the GPU
    per_node: int
    nodes: int

    @property
    def processes(self) -> int:
        return self.per_node * self.nodes

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.name]


def read_cluster(gpus: str, nodes: int) -> Cluster:
    """Read ``8xH100-80G``: so many GPUs of a kind per node.

    Raises:
        InputError: it is not a number and a known GPU, or ``nodes`` is below 1.
    """
    match = re.fullmatch(r"([1-9]\d{0,3})x(\S+)", gpus)
    if not match or match[2] not in GPUS:
        raise InputError(f"--gpus: found {gpus!r}, expected a number and a GPU, as 8xH100-80G, of {', '.join(GPUS)}")
    if nodes < 1:
        raise InputError(f"--nodes: found {nodes}, expected at least 1")
    return Cluster(match[2], int(match[1]), nodes)


def peak_operations(device_name: str) -> float | None:
    """Return the dense bf16 operations per second of a GPU that calls itself so; None for an unknown one."""
    kinds = {name.partition("-")[0]: gpu.operations["bfloat16"] for name, gpu in GPUS.items()}
    return next((peak for kind, peak in kinds.items() if kind in device_name), None)
