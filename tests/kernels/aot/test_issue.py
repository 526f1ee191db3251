"""Instructions that a warp issues, read from shortened machine code."""

from __future__ import annotations

import pytest

from cnnfast_kernels.aot import sass
from cnnfast_kernels.aot.issue import Issued, Product, issued, multiply_adds, steps_in

# A guard skips a slow division and a way round the loop; the main loop of two k-steps; what follows a NaN, out of line
# behind the end, with a loop of its own.
KERNEL = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA 0x40 ;
        /*0020*/                   MOV R2, 0x30 ;
        /*0030*/                   CALL.REL.NOINC 0x150 ;
        /*0040*/              @!P1 BRA 0x100 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R181+0x18000], desc[UR16][R160.64], P0 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0080*/                   LDGSTS.E.BYPASS.128 [R181], desc[UR16][R160.64], P0 ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*00b0*/                   BRA.U UP0, 0x50 ;
        /*00c0*/               @P2 BRA 0x110 ;
        /*00d0*/                   F2FP.BF16 R4, R5, R4 ;
        /*00e0*/              @!P3 EXIT ;
        /*00f0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0100*/                   EXIT ;
        /*0110*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0120*/               @P0 BRA 0x110 ;
        /*0130*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0140*/                   EXIT ;
        /*0150*/                   MUFU.RCP R3, R2 ;
        /*0160*/                   RET.REL.NODEC R2 0x0 ;
        /*0170*/                   BRA 0x170;
"""
# 32 x 16 by 16 deep, four times what one instruction of a warp multiplies, by two warps
TILE = Product(32, 16, 16, 2, 2)


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("DMMA.884", 8 * 8 * 4),
        ("DMMA.16x8x16", 16 * 8 * 16),
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 4),
        ("FFMA", 32),
        ("FFMA2", 64),
        ("UTCHMMA", 0),
        ("HFMA2.MMA", 0),
        ("LDG.E", 0),
    ],
)
def test_what_an_instruction_multiplies(opcode, expected):
    assert multiply_adds(sass.Instruction(0, opcode, "")) == expected


def test_a_loop_of_two_steps_is_divided_by_two():
    """7 instructions a turn. Outside: 2 before (the load, the branch over the division), the branch into the loop,
    and 5 behind it, of which one guarded exit is passed.
    """
    assert issued(sass.read(KERNEL), TILE) == Issued(7 / 2, 3 + 5)
    assert issued(sass.read(KERNEL), None) == Issued(7, 3 + 5), "a turn is a step where there is no product"


def test_a_loop_that_is_unrolled_whole_is_divided_by_its_steps():
    """What lies between the first and the last product, both among it."""
    code = sass.read(KERNEL.replace("BRA.U UP0, 0x50", "NOP").replace("@P0 BRA 0x110", "NOP"))
    assert sass.main_loop(code) is None
    straight = sass.read("\n".join(KERNEL.replace("BRA.U UP0, 0x50", "NOP").splitlines()[:18]))
    assert [i.family for i in straight][-1] == "EXIT"
    assert issued(straight, TILE) == Issued(5 / 2, 4 + 6)


@pytest.mark.parametrize(
    ("product", "instructions", "steps"),
    [
        (Product(128, 128, 64, 4, 2), 4, 1),
        (Product(256, 64, 64, 4, 2), 8, 1),
        (Product(64, 32, 16, 4, 4), 4, 2),  # tf32 is twice as wide
    ],
)
def test_steps_of_tcgen05(product, instructions, steps):
    """Of which an instruction takes 128 rows, 256 columns and 32 bytes of each."""
    code = sass.read("\n".join(f"/*{n:04x}*/ UTCHMMA gdesc[UR8] ;" for n in range(0, 16 * instructions, 16)))
    assert steps_in(code, product) == steps
