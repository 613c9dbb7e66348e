"""PTX text of one kernel: its parameters, registers, shared memory and instructions, each with its source line."""

import functools
import re
from typing import NamedTuple

import numpy as np

Array = np.ndarray
SHARED_BASE = 1024  # the address of a block's shared memory: swizzles go by address, and drivers align this far
SIZES = {"pred": 1} | {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}
SIZES |= {"f16": 2, "bf16": 2, "f32": 4, "tf32": 4, "f16x2": 4, "bf16x2": 4, "f64": 8}
SPECIAL = re.compile(r"%(?:n?tid|n?ctaid)\.[xyz]|%laneid|%warpid")
NUMBER = re.compile(r"(-?)(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+|\d+)U?")


class RefusedPTX(Exception):
    """PTX that this interpreter does not know. Guessing would make its results worthless."""


class Register(NamedTuple):
    slot: int
    type: str  # as declared, such as "b32"
    name: str
    negated: bool = False


class Immediate(NamedTuple):
    bits: int


class Address(NamedTuple):
    base: Register | Immediate
    offset: int


class Vector(NamedTuple):
    parts: tuple["Operand", ...]


Operand = Register | Immediate | Address | Vector | None  # None is `_`, a result that is dropped


class Instruction(NamedTuple):
    index: int
    opcode: str  # the first part of `ld.global.b32`
    modifiers: tuple[str, ...]  # the other parts
    operands: tuple[Operand, ...]
    guard: Register | None
    target: str | None  # the label of a branch
    line: str  # of the source: "slab.py:71"
    text: str

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


class Parameter(NamedTuple):
    name: str
    offset: int  # in the memory of parameters
    size: int


class Kernel(NamedTuple):
    name: str
    parameters: list[Parameter]
    registers: list[Register]
    special: dict[str, int]  # the slots of %tid.x and the like, by name
    static_shared: int  # bytes
    instructions: list[Instruction]
    labels: dict[str, int]  # the index of the instruction that follows each label


@functools.lru_cache(maxsize=64)
def without_comments(ptx: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)


def entries(ptx: str) -> list[str]:
    """The names of the kernels in a module."""
    return re.findall(r"\.entry\s+([\w$]+)", without_comments(ptx))


def parse(ptx: str, entry: str) -> Kernel:
    text = without_comments(ptx)
    head = re.search(rf"\.entry\s+{re.escape(entry)}\s*\(([^)]*)\)[^{{]*\{{", text)
    if head is None:
        raise ValueError(f"entry: found no kernel {entry!r}; the module has {entries(ptx)}")
    body = text[head.end() : end_of_scope(text, head.end())]
    files = {number: path.rsplit("/", 1)[-1] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    shared, static = shared_memory(text[: head.start()], body)
    parameters = parameters_of(head[1])
    symbols = shared | {parameter.name: parameter.offset for parameter in parameters}
    reader = BodyReader(files, symbols)
    reader.read(body)
    return Kernel(entry, parameters, reader.registers, reader.special, static, reader.instructions, reader.labels)


def end_of_scope(text: str, start: int) -> int:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise RefusedPTX("a kernel without an end")


def aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def parameters_of(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    pointer = r"(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?"
    form = rf"\.param(?:\s+\.align\s+(\d+))?\s+\.(\w+){pointer}\s+([\w$]+)(?:\[(\d+)\])?"
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(form, declaration)
        if match is None:
            raise RefusedPTX(f"parameter {declaration!r}")
        alignment, kind, name, count = match.groups()
        offset = aligned(offset, int(alignment or SIZES[kind]))
        parameters.append(Parameter(name, offset, SIZES[kind] * int(count or 1)))
        offset += parameters[-1].size
    return parameters


def shared_memory(module: str, body: str) -> tuple[dict[str, int], int]:
    """The addresses of the shared variables that a kernel uses, and the bytes that they take in all."""
    form = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;")
    addresses, dynamic, size = {}, [], 0
    for alignment, kind, name, count in form.findall(module) + form.findall(body):
        if not re.search(rf"{re.escape(name)}(?![\w$])", body):
            continue
        if count == "" and f"{name}[]" in module:
            dynamic.append(name)  # follows all others; launches say how large it is
            continue
        size = aligned(size, int(alignment))
        addresses[name] = SHARED_BASE + size
        size += SIZES[kind] * int(count or 1)
    return addresses | dict.fromkeys(dynamic, SHARED_BASE + aligned(size, 16)), size


class BodyReader:
    """Reads the statements of a kernel in order. Braces open scopes, in which registers may be declared anew."""

    LOC = re.compile(
        r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:\s*,\s*function_name\s+[^,]+,\s*inlined_at\s+(\d+)\s+(\d+)\s+\d+)?[^\n]*"
    )
    LABEL = re.compile(r"([\w$]+):(?!:)")
    STATEMENT = re.compile(r"([^;]*);")

    def __init__(self, files: dict[str, str], symbols: dict[str, int]) -> None:
        self.files, self.symbols = files, symbols
        self.registers: list[Register] = []
        self.special: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.scopes: list[dict[str, Register]] = [{}]
        self.line = "unknown line"

    def read(self, body: str) -> None:
        at = 0
        while True:
            while at < len(body) and body[at].isspace():
                at += 1
            if at == len(body):
                return
            if body[at] in "{}":
                self.scopes.append({}) if body[at] == "{" else self.scopes.pop()
                at += 1
            elif match := self.LOC.match(body, at):
                self.line = self.source_line(*match.groups())
                at = match.end()
            elif match := self.LABEL.match(body, at):
                self.labels[match[1]] = len(self.instructions)
                at = match.end()
            elif match := self.STATEMENT.match(body, at):
                self.statement(" ".join(match[1].split()))
                at = match.end()
            else:
                raise RefusedPTX(f"statement {body[at : at + 80]!r}")

    def source_line(self, file: str, line: str, caller_file: str | None, caller: str | None) -> str:
        own = f"{self.files.get(file, file)}:{line}"
        return f"{own} inlined at {self.files.get(caller_file, caller_file)}:{caller}" if caller_file else own

    def statement(self, text: str) -> None:
        if not text or text.startswith((".pragma", ".shared", ".local")):
            return
        if text.startswith(".reg"):
            self.declare(text)
        elif text.startswith("."):
            raise RefusedPTX(f"declaration {text!r}")
        else:
            self.instruction(text)

    def declare(self, text: str) -> None:
        _, kind, names = text.split(maxsplit=2)
        for name in names.split(","):
            prefix, _, count = name.strip().partition("<")
            many = [f"{prefix}{k}" for k in range(int(count.rstrip(">")))] if count else [prefix]
            for one in many:
                self.scopes[-1][one] = self.new_register(kind[1:], one)

    def new_register(self, kind: str, name: str) -> Register:
        self.registers.append(Register(len(self.registers), kind, name))
        return self.registers[-1]

    def instruction(self, text: str) -> None:
        match = re.fullmatch(r"(?:@(!?)\s*([%\w$]+)\s+)?([\w.:]+)\s*(.*)", text)
        if match is None:
            raise RefusedPTX(f"statement {text!r}")
        negated, guard, name, rest = match.groups()
        opcode, *modifiers = name.split(".")
        register = self.register(guard)._replace(negated=bool(negated)) if guard else None
        target, operands = (rest.strip(), ()) if opcode == "bra" else (None, self.operands(rest))
        self.instructions.append(
            Instruction(len(self.instructions), opcode, tuple(modifiers), operands, register, target, self.line, text)
        )

    def register(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise RefusedPTX(f"register {name}, which is declared nowhere")

    def operands(self, text: str) -> tuple[Operand, ...]:
        parts, depth, start = [], 0, 0
        for at, letter in enumerate(text):
            depth += (letter in "{[") - (letter in "}]")
            if letter == "," and depth == 0:
                parts.append(text[start:at])
                start = at + 1
        parts.append(text[start:])
        return tuple(self.operand(part.strip()) for part in parts if part.strip())

    def operand(self, text: str) -> Operand:
        if text == "_":
            return None
        if text.startswith("{"):
            return Vector(self.operands(text[1:-1]))
        if text.startswith("["):
            match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
            if match is None:
                raise RefusedPTX(f"address {text!r}")
            return Address(self.operand(match[1]), int(match[2] or "0", 0))
        if "|" in text:
            return Vector(tuple(self.operand(part.strip()) for part in text.split("|")))
        if text.startswith("!"):
            return self.register(text[1:].strip())._replace(negated=True)
        if match := NUMBER.fullmatch(text):
            digits = match[2]
            bits = int(digits[2:], 16) if digits[1:2] in tuple("fFdD") else int(digits, 0)
            return Immediate(-bits if match[1] else bits)
        if text in self.symbols:
            return Immediate(self.symbols[text])
        if SPECIAL.fullmatch(text):
            if text not in self.special:
                self.special[text] = self.new_register("u32", text).slot
            return self.registers[self.special[text]]
        return self.register(text)


def sizes_of_types() -> dict[str, np.dtype]:
    """NumPy's types of PTX's. Numbers that NumPy lacks, such as bf16, are the unsigned integers of their bits."""
    kinds = {"b": "uint", "u": "uint", "s": "int"}
    types = {f"{kind}{bits}": np.dtype(f"{kinds[kind]}{bits}") for kind in "bus" for bits in (8, 16, 32, 64)}
    packed = {"bf16": np.dtype("uint16")} | dict.fromkeys(("tf32", "f16x2", "bf16x2"), np.dtype("uint32"))
    floats = {"f16": np.dtype("float16"), "f32": np.dtype("float32"), "f64": np.dtype("float64")}
    return types | packed | floats | {"pred": np.dtype(bool)}


TYPES = sizes_of_types()
