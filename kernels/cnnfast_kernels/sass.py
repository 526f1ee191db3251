"""What a kernel's machine code (SASS) says: registers, spills, tensor-core instructions, waits, the length of its main loop.

`disassemble` calls the two tools that come with Triton; everything else is a function of the text they print.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

import triton

# wgmma of sm_90; tcgen05 of sm_100; mma of every architecture. The letter is the operand: H half and tf32, Q fp8, I int8, D fp64.
TENSOR_CORE = re.compile(r"[HQIB]GMMA|UTC\w*MMA|[HQIDO]MMA")
ASYNC_COPIES = {"LDGSTS", "UTMALDG"}
LOADS = ASYNC_COPIES | {"LDG", "LD"}
MULTIPLY_ADD = {"FFMA", "FFMA2", "DFMA"}

LABEL = re.compile(r"^\s*(\.L_\w+):")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"`\((\.L_\w+)\)")


class Instruction(NamedTuple):
    """One machine instruction; `target` is the address a branch goes to."""

    address: int
    opcode: str
    operands: str
    target: int | None = None

    @property
    def family(self) -> str:
        return self.opcode.partition(".")[0]


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(machine code as nvdisasm prints it, resource usage as cuobjdump prints it)."""
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # without data-flow analysis (-ndf) it takes two thirds of the time
        commands = [tools.nvdisasm.path, "-ndf", "-c", file.name], [tools.cuobjdump.path, "-res-usage", file.name]
        code, usage = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return code, usage


def read(code: str) -> list[Instruction]:
    """The instructions of nvdisasm's text, in order of address."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    found: list[tuple[int, str, str]] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            waiting.append(label[1])
        elif match := INSTRUCTION.search(line):
            address = int(match[1], 16)
            labels.update((label, address) for label in waiting)
            waiting.clear()
            found.append((address, match[2], match[3].strip()))
    instructions = []
    for address, opcode, operands in found:
        target = TARGET.search(operands) if opcode.startswith("BRA") else None
        instructions.append(Instruction(address, opcode, operands, labels.get(target[1]) if target else None))
    return instructions


def registers(usage: str) -> int:
    """Registers of a thread."""
    return int(re.findall(r"\bREG:(\d+)", usage)[-1])


def spill_bytes(instructions: list[Instruction], usage: str) -> int:
    """Bytes of a thread's stack, if registers are spilled to it."""
    if not any(i.family in ("LDL", "STL") for i in instructions):
        return 0
    return max(1, *map(int, re.findall(r"\bSTACK:(\d+)", usage)))


def tensor_core(instructions: list[Instruction]) -> str | None:
    """The most frequent family of tensor-core instructions: "HGMMA", "UTCHMMA", "HMMA", "DMMA", ... or None."""
    families = Counter(i.family for i in instructions if TENSOR_CORE.fullmatch(i.family))
    return families.most_common(1)[0][0] if families else None


def async_copies(instructions: list[Instruction]) -> int:
    """Instructions that copy global to shared memory without passing through registers."""
    return sum(i.family in ASYNC_COPIES for i in instructions)


def serialised(instructions: list[Instruction]) -> bool:
    """Whether every one of several wgmma instructions is waited for before the next is issued (ptxas warns of it as C7515)."""
    outstanding = False
    count = 0
    for i in instructions:
        if i.family.endswith("GMMA"):
            if outstanding:
                return False
            outstanding = True
            count += 1
        elif i.opcode.startswith("WARPGROUP.DEPBAR") and i.operands.endswith("0x0"):
            outstanding = False
    return count > 1 and not outstanding


def loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops, shortest first. The endless branch to itself that pads a kernel is none."""
    edges = [(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address]
    bodies = [[i for i in instructions if start <= i.address <= end] for start, end in edges]
    return sorted(bodies, key=len)


def loop_instructions(instructions: list[Instruction]) -> int | None:
    """Length of the innermost loop that does the work; None if there is none, for example because it is unrolled.

    The work is tensor-core instructions, or where the kernel has none multiply-adds, or else loads.
    """
    bodies = loops(instructions)
    if tensor_core(instructions):
        works = [lambda i: TENSOR_CORE.fullmatch(i.family)]
    else:
        works = [lambda i: i.family in MULTIPLY_ADD, lambda i: i.family in LOADS]
    for work in works:
        for body in bodies:
            if any(work(i) for i in body):
                return len(body)
    return None
