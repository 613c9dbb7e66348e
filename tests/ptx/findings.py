"""Findings of a run: one line for each kind of mistake at each instruction, with source line, threads and a count."""

import re

from tests.ptx.parser import Instruction


def readable_name(kernel: str) -> str:
    """The name of a kernel without its C++ mangling: `softmax_slopes_kernel`."""
    names = re.findall(r"(?<=\d)([a-z]\w*?_kernel)(?![a-z])", kernel) if kernel.startswith("_Z") else []
    return names[-1] if names else kernel


class Findings:
    def __init__(self, kernel: str) -> None:
        self.kernel = readable_name(kernel)
        self.first: dict[tuple[str, int], str] = {}  # by kind of mistake and instruction
        self.times: dict[tuple[str, int], int] = {}

    def add(self, mistake: str, instruction: Instruction, details: str = "") -> None:
        key = mistake, instruction.index
        self.times[key] = self.times.get(key, 0) + 1
        if key not in self.first:
            text = instruction.text if len(instruction.text) <= 90 else instruction.text[:87] + "..."
            self.first[key] = f"{self.kernel}, {instruction.line}: {mistake}: {details} [{text}]"

    def lines(self) -> list[str]:
        return [
            line + (f" ({self.times[key]} times)" if self.times[key] > 1 else "") for key, line in self.first.items()
        ]


def threads_text(block: int, threads: list[int]) -> str:
    """Such as `block 3, warp 1, threads 32 to 63`."""
    warps = sorted({thread // 32 for thread in threads})
    many = f"threads {min(threads)} to {max(threads)}" if len(threads) > 1 else f"thread {threads[0]}"
    named = f"warps {warps[0]} to {warps[-1]}" if len(warps) > 1 else f"warp {warps[0]}"
    return f"block {block}, {named}, {many}"
