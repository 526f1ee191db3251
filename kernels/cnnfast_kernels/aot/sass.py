"""What a kernel's machine code (SASS) says: registers, spills, tensor-core instructions, waits, the length of its main
loop; and what the file that holds it, a cubin, says of its parameters.

`disassemble` and `resource_usage` call the tools that come with Triton; what follows `read` is a function of what they
print.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from triton import knobs

# wgmma of sm_90; tcgen05 of sm_100; mma of every architecture. The letter is the operand: H half and tf32, Q fp8, I
# int8, D fp64.
TENSOR_CORE = re.compile(r"[HQIB]GMMA|UTC\w*MMA|[HQIDO]MMA")
ASYNC_COPIES = {"LDGSTS", "UTMALDG"}
LOADS = ASYNC_COPIES | {"LDG", "LD"}
MULTIPLY_ADD = {"FFMA", "FFMA2", "DFMA"}

# Of a cubin's .nv.info sections, by the names that cuobjdump gives them: EIFMT_SVAL, EIATTR_KPARAM_INFO.
SIZED_VALUE, PARAMETER = 0x04, 0x17

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"\b0x([0-9a-f]+)$")


class Instruction(NamedTuple):
    """One machine instruction; `target` is the address that a branch or a call goes to. guarded: whether a predicate
    may skip it.
    """

    address: int
    opcode: str
    operands: str
    target: int | None = None
    guarded: bool = False

    @property
    def family(self) -> str:
        return self.opcode.partition(".")[0]


def sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """The name and the contents of every section of a cubin, which is a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, entries, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry_size) for i in range(entries)]
    for name, _, _, _, offset, size in headers:
        start = headers[names][4] + name
        yield cubin[start : cubin.index(b"\0", start)].decode(), cubin[offset : offset + size]


def machine_code(cubin: bytes) -> bytes:
    """The kernel's own section of a cubin."""
    for name, contents in sections(cubin):
        if name.startswith(".text."):
            return contents
    raise ValueError("this cubin has no section .text.*")


def parameter_bytes(cubin: bytes) -> list[int]:
    """The size of each of the kernel's parameters, as its machine code expects them.

    The section .nv.info.* is a list of attributes: one byte that says in which form the value follows, one that names
    the attribute. In form 4 the value's size in two bytes precedes it; any other value is two bytes itself.
    """
    sizes: dict[int, int] = {}
    for name, contents in sections(cubin):
        if not name.startswith(".nv.info."):
            continue
        at = 0
        while at < len(contents):
            form, attribute, value = struct.unpack_from("<BBH", contents, at)
            at += 4
            if form != SIZED_VALUE:
                continue
            # index, ordinal, offset, and bits of which those from the eighteenth on are the size
            if attribute == PARAMETER:
                _, ordinal, _, bits = struct.unpack_from("<IHHI", contents, at)
                sizes[ordinal] = bits >> 18
            at += value
    return [sizes[ordinal] for ordinal in sorted(sizes)]


def disassemble(cubins: Sequence[bytes], capability: int) -> list[list[Instruction]]:
    """The instructions of each of `cubins`, which are all for sm_`capability`.

    One call of nvdisasm for all of them: it spends two thirds of a second on its tables, and next to nothing on a
    kernel.
    """
    if not cubins:
        return []
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        # Triton compiles for the variant with wgmma and tcgen05
        arch = f"SM{capability}a" if capability >= 90 else f"SM{capability}"
        command = [knobs.nvidia.nvdisasm.path, "-ndf", "-b", arch, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ends = list(itertools.accumulate(map(len, codes)))
    kernels: list[list[Instruction]] = [[] for _ in codes]
    for i in read(text):
        kernel = bisect_right(ends, i.address)
        start = ends[kernel - 1] if kernel else 0
        kernels[kernel].append(
            i._replace(address=i.address - start, target=None if i.target is None else i.target - start)
        )
    return kernels


def resource_usage(cubin: bytes) -> str:
    """As cuobjdump prints it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(code: str) -> list[Instruction]:
    """The instructions of nvdisasm's text of raw machine code, where branches name addresses."""
    instructions = []
    for line in code.splitlines():
        if match := INSTRUCTION.search(line):
            guard, opcode, operands = match[2], match[3], match[4].strip()
            target = TARGET.search(operands) if opcode.startswith(("BRA", "CALL")) else None
            # a branch may have its condition among its operands
            guarded = guard is not None or (opcode.startswith("BRA") and "," in operands)
            instructions.append(
                Instruction(int(match[1], 16), opcode, operands, int(target[1], 16) if target else None, guarded)
            )
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


def tensor_loads(instructions: list[Instruction]) -> int:
    """Instructions that copy a box to shared memory by a tensor map."""
    return sum(i.family == "UTMALDG" for i in instructions)


def global_loads(instructions: list[Instruction]) -> int:
    """Instructions that load global memory to registers."""
    return sum(i.family == "LDG" for i in instructions)


def wide_loads(instructions: list[Instruction]) -> int:
    """Instructions that load 16 bytes a thread from global memory to registers."""
    return sum(i.family == "LDG" and "128" in i.opcode.split(".") for i in instructions)


def loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops, shortest first. The endless branch to itself that pads a kernel does not
    count as one.
    """
    branches = [i for i in instructions if i.family == "BRA"]
    edges = [(i.target, i.address) for i in branches if i.target is not None and i.target < i.address]
    bodies = [[i for i in instructions if start <= i.address <= end] for start, end in edges]
    return sorted(bodies, key=len)


def main_loop(instructions: list[Instruction]) -> list[Instruction] | None:
    """The body of the loop that does the work; None if there is none, for example because it is unrolled.

    The work is tensor-core instructions, or where the kernel has none multiply-adds, or else loads. Of the loops that
    do it and have no other such loop within, it is the first in the code: a gradient's kernel takes its sums again,
    behind it, where NaN came out.
    """
    bodies = loops(instructions)
    if tensor_core(instructions):
        works = [lambda i: TENSOR_CORE.fullmatch(i.family)]
    else:
        works = [lambda i: i.family in MULTIPLY_ADD, lambda i: i.family in LOADS]
    for work in works:
        working = [body for body in bodies if any(work(i) for i in body)]  # shortest first
        innermost = [body for n, body in enumerate(working) if not any(within(other, body) for other in working[:n])]
        if innermost:
            return min(innermost, key=lambda body: body[0].address)
    return None


def within(inner: list[Instruction], outer: list[Instruction]) -> bool:
    return outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address


def loop_instructions(instructions: list[Instruction]) -> int | None:
    """Length of the main loop, if there is one."""
    body = main_loop(instructions)
    return None if body is None else len(body)


def serialised(instructions: list[Instruction]) -> bool:
    """Whether every one of several wgmma instructions is waited for before the next is issued (ptxas warns of it as
    C7515).

    Those of the main loop, if there is one: a loop behind it may wait, and the main loop is not excused by one behind
    it that does not.
    """
    outstanding = False
    count = 0
    for i in main_loop(instructions) or instructions:
        if i.family.endswith("GMMA"):
            if outstanding:
                return False
            outstanding = True
            count += 1
        elif i.opcode.startswith("WARPGROUP.DEPBAR") and i.operands.endswith("0x0"):
            outstanding = False
    return count > 1 and not outstanding
