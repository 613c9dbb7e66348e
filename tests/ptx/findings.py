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
        repeats = {key: f" ({count} times)" if count > 1 else "" for key, count in self.times.items()}
        return [line + repeats[key] for key, line in self.first.items()]
