"""A kernel's PTX as instructions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    text: str
    guard: str  # a predicate's name, or ""
    negated: bool
    parts: tuple[str, ...]  # of the opcode
    operands: tuple[str, ...]


@dataclass
class Program:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # the type of each prefix ("%r": "b32"), and of single names
    parameters: list[str] = field(default_factory=list)


def unknown(i: Instruction) -> NotImplementedError:
    return NotImplementedError(f"this machine has no {i.text}")


def names(operand: str) -> list[str]:
    """Of a vector "{%r1, %r2}"; of a single register itself."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.\w+(?:\s+\.ptr[\s.\w]*?)?\s+(\w+)(?:\[\d+\])?\s*[,)]")


def parse(ptx: str) -> Program:
    """The entry of a module, which has one."""
    text = re.sub(r"//[^\n]*", "", ptx)
    head, body = text[text.index(".entry") :].split("{", 1)
    program = Program(parameters=_PARAMETER.findall(head))
    scopes, numbers, word = [""], itertools.count(1), ""

    def local(name: str) -> str:
        """A name of inline assembly belongs to the braces that it is declared in."""
        if name[0] in "%$":
            return name
        known = (name + scope for scope in reversed(scopes) if name + scope in program.registers | program.labels)
        return next(known, name + scopes[-1])

    for i, character in enumerate(body):
        if character == "{" and not word.strip():
            scopes.append(f"@{next(numbers)}")
        elif character == "}" and not word.strip():
            scopes.pop()
            if not scopes:
                return program
        elif character == ":" and re.fullmatch(r"\s*[$\w]+", word) and body[i + 1] != ":":
            program.labels[local(word.strip())] = len(program.instructions)
            word = ""
        elif character == ";":
            if declaration := re.match(r"\s*\.reg\s+\.(\w+)\s+(.*)", word, re.S):
                for name in declaration[2].split(","):
                    program.registers[re.sub(r"<\d+>", "", local(name.strip()))] = declaration[1]
            elif not word.strip().startswith("."):
                program.instructions.append(_instruction(" ".join(word.split()), local))
            word = ""
        else:
            word += character
            if character == "\n" and re.match(r"\s*\.(loc|file|section|pragma)\b", word):
                word = ""
    raise ValueError("the kernel's body does not end")


_INSTRUCTION = re.compile(r"(?:@(!?)\s*([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)")
_OPERAND = re.compile(r"(?:\{[^}]*\}|\[(?:[^\]{]|\{[^}]*\})*\]|[^,{\[])+")
_NAME = re.compile(r"(?<![\w%$.])[A-Za-z_]\w*")


def _instruction(text: str, local: Callable[[str], str]) -> Instruction:
    match = _INSTRUCTION.fullmatch(text)
    assert match is not None, text
    operands = (_NAME.sub(lambda m: local(m[0]), word.strip()) for word in _OPERAND.findall(match[4]))
    parts = tuple(re.split(r"(?<!:)\.(?!:)", match[3]))
    return Instruction(text, local(match[2]) if match[2] else "", match[1] == "!", parts, tuple(o for o in operands if o))
