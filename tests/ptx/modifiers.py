"""The parts of an instruction's name after the first, such as `rn` and `f32` of `add.rn.f32`."""

from tests.ptx.parser import Instruction, RefusedPTX


class Modifiers:
    """The modifiers of an instruction. What nobody takes is refused."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        self.left = list(instruction.modifiers)

    def take(self, *names: str) -> str | None:
        """Take the first modifier that has one of these names."""
        for name in self.left:
            if name in names:
                self.left.remove(name)
                return name
        return None

    def need(self, *names: str) -> str:
        taken = self.take(*names)
        if taken is None:
            raise self.refused(f"found none of the modifiers {', '.join(names)}")
        return taken

    def type(self, *allowed: str) -> str:
        """Take the last modifier, the type."""
        kind = self.left.pop() if self.left else ""
        if kind not in allowed:
            raise self.refused(f"type {kind!r} is not interpreted")
        return kind

    def end(self) -> None:
        if self.left:
            raise self.refused(f"modifier {self.left[0]!r} is not interpreted")

    def refused(self, reason: str) -> RefusedPTX:
        return RefusedPTX(f"{self.instruction.name}: {reason} ({self.instruction.text}, {self.instruction.line})")
