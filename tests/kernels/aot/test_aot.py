"""Ahead-of-time compilation: what is read from machine code, what counts as a problem, and real compiles in a child
process.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from cnnfast_kernels import launch
from cnnfast_kernels.aot import (
    KernelRow,
    capability_of,
    compile_all,
    due_on,
    kernel_modules,
    problems,
    processes,
    sass,
    selected,
    target,
    uncovered,
)
from cnnfast_kernels.aot.cases import cases
from cnnfast_kernels.aot.compiling import dot_operands
from cnnfast_kernels.gpus import SHARED_LIMITS
from tests.support.child import run_compiled

# From nvdisasm, much shortened and numbered anew: a pipelined main loop within an outer one, a store, and the padding
# behind the end.
PIPELINED = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   HFMA2.MMA R79, -RZ, RZ, 0, 0 ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R181+0x18000], desc[UR16][R160.64], P0 ;
        /*0030*/              @!P0 BRA 0xc0 ;
        /*0040*/                   S2R R23, SR_CTAID.X ;
        /*0050*/                   WARPGROUP.ARRIVE ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R183], desc[UR16][R168.64], P0 ;
        /*00a0*/               @P0 BRA 0x50 ;
        /*00b0*/                   BRA.U UP0, 0x40 ;
        /*00c0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R24 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0;
"""

# What ptxas makes of it when it gives up (warning C7515).
SERIALISED = """
        /*1200*/                   WARPGROUP.ARRIVE ;
        /*12f0*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*1300*/                   UIADD3 UR10, UP1, UR10, 0x2, URZ ;
        /*13e0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*13f0*/                   WARPGROUP.ARRIVE ;
        /*1400*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*1430*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*1650*/               @P0 BRA 0x1200 ;
        /*1660*/                   EXIT ;
"""

# Registers saved to the stack, and a loop of multiply-adds on the ordinary units behind a loop that only loads.
SPILLED = """
        /*0170*/                   STL [R1+0x3c], R237 ;
        /*0180*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0190*/               @P0 BRA 0x180 ;
        /*01a0*/                   FFMA R4, R2, R3, R4 ;
        /*01b0*/                   LDL R237, [R1+0x3c] ;
        /*01c0*/                   FFMA R5, R2, R3, R5 ;
        /*01d0*/              @!P1 BRA 0x1a0 ;
        /*01e0*/                   EXIT ;
"""

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function gemm_kernel:
  REG:168 STACK:80 SHARED:1024 LOCAL:0 CONSTANT[0]:664 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_instructions_and_branch_targets():
    code = sass.read(PIPELINED)
    assert [i.address for i in code] == list(range(0, 0x100, 0x10))
    assert code[1].family == "HFMA2"
    assert [i.address for i in code if i.guarded] == [0x30, 0xA0, 0xB0]
    assert code[6] == sass.Instruction(0x60, "HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR8], R24")
    assert [(i.address, i.target) for i in code if i.target is not None] == [
        (0x30, 0xC0),
        (0xA0, 0x50),
        (0xB0, 0x40),
        (0xF0, 0xF0),
    ]


def test_registers_and_spills():
    assert sass.registers(USAGE) == 168
    assert sass.spill_bytes(sass.read(SPILLED), USAGE) == 80
    assert sass.spill_bytes(sass.read(PIPELINED), USAGE) == 0  # a stack that no instruction touches costs nothing


def test_tensor_cores_and_async_copies():
    assert sass.tensor_core(sass.read(PIPELINED)) == "HGMMA"
    # nor is HFMA2.MMA, which sets registers to zero, a tensor-core instruction
    assert sass.tensor_core(sass.read(SPILLED)) is None
    assert sass.async_copies(sass.read(PIPELINED)) == 2
    for opcode in ("UTCHMMA", "DMMA.8x8x4", "HMMA.16816.F32.BF16", "IMMA.16832.S8.S8", "QGMMA.64x64x32.F32.E4M3.E4M3"):
        assert sass.tensor_core(sass.read(f"/*0000*/ {opcode} R4, R8, R10, R4 ;")) == opcode.partition(".")[0]


def test_loads_by_tensor_maps():
    code = sass.read(
        "/*0000*/ @P1 UTMALDG.4D [UR8], [UR4], desc[UR16] ;\n"
        "/*0010*/ UTMASTG.4D [UR8], [UR4] ;\n/*0020*/ LDGSTS.E.128 [R2], [R4] ;"
    )
    assert (sass.tensor_loads(code), sass.async_copies(code)) == (1, 2)
    assert sass.tensor_loads(sass.read(PIPELINED)) == 0


def test_wide_loads():
    code = sass.read(
        """
        /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/ @!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0020*/ LDG.E.U16 R12, desc[UR4][R2.64] ;
        /*0030*/ STG.E.128 desc[UR4][R2.64], R24 ;
        """
    )
    assert (sass.global_loads(code), sass.wide_loads(code)) == (3, 2)
    assert sass.global_loads(sass.read(PIPELINED)) == 0  # those go to shared memory


def test_serialised_wgmma():
    assert sass.serialised(sass.read(SERIALISED))
    assert not sass.serialised(sass.read(PIPELINED))
    assert not sass.serialised(sass.read(SPILLED))
    # one instruction a loop and one wait is all there can be
    assert not sass.serialised(
        sass.read("/*0000*/ HGMMA.64x8x16.F32 R4, gdesc[UR8], R4, gsb0 ;\n/*0010*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;")
    )


def test_main_loop():
    assert [len(body) for body in sass.loops(sass.read(PIPELINED))] == [6, 8]
    assert sass.loop_instructions(sass.read(PIPELINED)) == 6
    assert sass.loop_instructions(sass.read(SPILLED)) == 4  # the multiply-adds, not the shorter loop of loads
    assert sass.loop_instructions(sass.read(SPILLED.replace("FFMA", "FADD"))) == 2
    unrolled = PIPELINED.replace("@P0 BRA 0x50", "NOP").replace("BRA.U UP0, 0x40", "NOP")
    assert sass.loop_instructions(sass.read(unrolled)) is None


# A loop that takes the sums again, one wait for each product, and one that would if it were not pipelined.
CAREFUL = """
        /*0200*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0210*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0220*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0230*/                   FSEL R24, R24, R32, P0 ;
        /*0240*/               @P1 BRA 0x200 ;
        /*0250*/               @P2 BRA 0x1f0 ;
"""


def test_main_loop_before_a_careful_one():
    """It is the first, though the other be shorter; waits are judged in it alone."""
    pipelined = sass.read(PIPELINED.replace("BRA 0xf0", "NOP") + CAREFUL)
    assert [len(body) for body in sass.loops(pipelined)] == [5, 6, 6, 8]
    assert sass.loop_instructions(pipelined) == 6
    assert not sass.serialised(pipelined)
    later = CAREFUL.replace("/*02", "/*17").replace("BRA 0x200", "BRA 0x1700").replace("BRA 0x1f0", "BRA 0x16f0")
    serial = sass.read(SERIALISED.replace("EXIT", "NOP") + later)
    assert len(sass.loops(serial)) == 3
    assert sass.loop_instructions(serial) == 8
    assert sass.serialised(serial), "what waits less often behind it is no excuse"


def test_dot_operands():
    line = "%acc = tt.dot %x, %w, %acc_0{} : tensor<64x32x{} * tensor<32x64x{} -> tensor<64x64xf32>"
    assert dot_operands(line.format(", inputPrecision = tf32", "f32>", "f32>")) == "tf32"
    assert dot_operands(line.format("", "f32>", "f32>")) == "f32"
    assert dot_operands(line.format(", inputPrecision = tf32", "bf16>", "bf16>")) == "bf16"
    assert dot_operands("%y = arith.addf %x, %w : tensor<64x32xf32>") is None


GOOD = KernelRow(
    "conv_fprop_kernel", "infer bfloat16 3x3", "128x64x32 w4 s4", "sm_90", seconds=1.0,
    registers=168, spill_bytes=0, shared_bytes=49152,
    shared_limit=232448, dot="bf16", tensor_core="HGMMA", async_copies=12, serialised=False, loop_instructions=120,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"dot": "f32", "tensor_core": None}, None),  # ieee float32: there is no tensor core for it
        ({"dot": None, "tensor_core": None}, None),
        ({"spill_bytes": 16, "registers": 255}, "spills 16 bytes a thread, 255 registers"),
        ({"shared_bytes": 232449}, "needs 232449 bytes of shared memory"),
        ({"tensor_core": None}, "multiplies bf16 without tensor cores"),
        ({"dot": "tf32", "tensor_core": None}, "multiplies tf32 without tensor cores"),
        ({"serialised": True}, "waits after every wgmma"),
        ({"tensor_loads": 0}, None),  # this kernel loads by pointers
    ],
)
def test_problems(change, expected):
    found = problems([replace(GOOD, **change)])
    assert found == [] if expected is None else len(found) == 1 and expected in found[0]
    assert all("sm_90 conv_fprop_kernel (infer bfloat16 3x3; 128x64x32 w4 s4)" in line for line in found)


BOXES = replace(GOOD, kernel="tma_fprop_kernel", tile="2x8x8 pixels k128 c64 w4 s3", tensor_loads=6)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"tensor_core": "UTCHMMA", "arch": "sm_100"}, None),
        ({"tensor_loads": 0}, "0 loads by tensor maps, and HGMMA"),
        ({"tensor_core": "HMMA"}, "6 loads by tensor maps, and HMMA in place of wgmma or tcgen05"),
    ],
)
def test_problems_of_kernels_that_load_by_tensor_maps(change, expected):
    found = problems([replace(BOXES, **change)])
    assert found == [] if expected is None else len(found) == 1 and expected in found[0]


def test_a_failure_is_a_problem_and_covers_no_kernel():
    row = KernelRow("", "infer bfloat16 3x3", "", "sm_90", error="CompilationError: no")
    assert problems([row]) == ["sm_90 infer bfloat16 3x3: does not compile: CompilationError: no"]
    assert [line.split()[:2] for line in uncovered([row])] == [
        ["sm_90", f"{kernel}:"] for kernel in sorted(kernel_modules())
    ]


BY_TENSOR_MAPS = {"tma_fprop_kernel", "tma_dgrad_kernel", "tma_wgrad_kernel"}
BY_POINTERS = {
    "conv_fprop_kernel",
    "depthwise_dgrad_kernel",
    "conv_wgrad_kernel",
    "max_pool_kernel",
    "normalize_kernel",
}


@pytest.mark.parametrize("capability", SHARED_LIMITS)
def test_a_kernel_is_due_where_it_can_be_chosen(capability):
    """Package tma is for tensor maps and the matrix units of sm_90, sm_100 and sm_103: sm_120 has the maps, but not the
    units.
    """
    mapped = capability in (90, 100, 103)
    due = due_on(f"sm_{capability}")
    assert due >= BY_POINTERS
    assert due & BY_TENSOR_MAPS == (BY_TENSOR_MAPS if mapped else set())
    assert (
        due == set(kernel_modules())
        if mapped
        else due == {k for k, module in kernel_modules().items() if ".tma." not in module}
    )


def rows_of(arch, *without):
    return [replace(GOOD, arch=arch, kernel=kernel) for kernel in due_on(arch) - set(without)]


@pytest.mark.parametrize(
    "archs",
    [*((f"sm_{c}",) for c in SHARED_LIMITS), ("sm_89", "sm_90"), ("sm_100", "sm_80", "sm_120")],
    ids=" ".join,
)
def test_what_is_due_is_asked_for_on_each_architecture(archs):
    first, *others = archs
    rest = [row for arch in others for row in rows_of(arch)]
    assert uncovered(rows_of(first) + rest) == []
    expected = [
        f"{first} {kernel}: no case compiles it (aot/cases.py)" for kernel in ("conv_fprop_kernel", "max_pool_kernel")
    ]
    assert uncovered(rows_of(first, "conv_fprop_kernel", "max_pool_kernel") + rest) == expected, (
        "though others may compile them"
    )


def test_a_kernel_by_tensor_maps_is_missed_on_the_architecture_that_runs_it():
    """Beside an architecture where it cannot be chosen, and beside one that compiles it."""
    (line,) = uncovered(rows_of("sm_89") + rows_of("sm_90", "pack_pixels_kernel"))
    assert line.startswith("sm_90 pack_pixels_kernel")
    (line,) = uncovered(rows_of("sm_90") + rows_of("sm_100", "tma_wgrad_kernel"))
    assert line.startswith("sm_100 tma_wgrad_kernel")


def test_architectures():
    assert [capability_of(a) for a in ("sm_80", "90", "sm_90a", "sm_120")] == [80, 90, 90, 120]
    with pytest.raises(ValueError, match=r"sm_75.*use one of sm_80"):
        capability_of("sm_75")


def test_cases_are_selected_by_architecture_and_name():
    """Each architecture once, however it is written, and its own cases: those by tensor maps are sm_90's here, and not
    sm_80's.
    """
    assert selected(["90", "sm_90a", "sm_90"]) == [("sm_90", i) for i in range(len(cases(90)))]
    boxes = selected(["sm_80", "sm_90"], "in boxes")
    assert {arch for arch, _ in boxes} == {"sm_90"}
    assert all("in boxes" in cases(90)[i].name for _, i in boxes)
    with pytest.raises(
        ValueError, match=r"only='nonsense' is in no case's name: names begin with .*dgrad.*infer.*wgrad"
    ):
        selected(["sm_90"], "nonsense")


@pytest.mark.parametrize(
    ("archs", "only", "reason"),
    [(["sm_75"], "", "sm_75"), (["sm_90", "sm_75"], "", "sm_75"), (["sm_80"], "in boxes", "in boxes")],
)
def test_nothing_starts_for_what_is_refused(monkeypatch, archs, only, reason):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(processes, "ProcessPoolExecutor", None)
    with pytest.raises(ValueError, match=reason):
        compile_all(archs, only, progress=lambda done, total: pytest.fail("work began"))


def test_interpreted_processes_are_refused():
    if not launch.INTERPRETED:
        pytest.skip("GPU ring: kernels are compiled here")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), target("sm_90"):
        pass
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_all(["sm_90"])


def test_case_names_are_distinct_but_for_the_tile():
    named = [(case.name, str(case.run.args)) for case in cases()]  # type: ignore[attr-defined]
    assert len(set(named)) == len(named)


def compile_some(names):
    """Rows of the first case of each name, on two architectures in one process, and the kernels that all cases
    launch.
    """
    from dataclasses import asdict

    from triton.runtime.driver import driver

    from cnnfast_kernels.aot import compiling
    from cnnfast_kernels.aot.cases import cases

    before = driver._active
    index = {case.name: i for i, case in reversed(list(enumerate(cases())))}
    rows = []
    for arch in ("sm_80", "sm_90"):
        rows += compiling.finished([row for name in names for row in compiling.compile_case(arch, index[name])])
    return {"rows": [asdict(row) for row in rows], "restored": driver._active is before}


def kernels_of_all_cases():
    """By architecture: what its cases launch, and what is due. Nothing is compiled."""
    from cnnfast_kernels import aot, launch
    from cnnfast_kernels.aot.cases import cases
    from cnnfast_kernels.gpus import SHARED_LIMITS

    found = {}
    for capability in SHARED_LIMITS:
        seen = set()
        launch.run = lambda kernel, grid, device, *args, seen=seen, **options: seen.add(kernel.__name__)
        with aot.target(f"sm_{capability}"):
            for case in cases(capability):
                case.run()
        found[capability] = [sorted(seen), sorted(aot.due_on(f"sm_{capability}"))]
    return found


@pytest.mark.compiled
def test_every_kernel_is_among_the_cases():
    """Of every architecture where it can be chosen, and of no other."""
    found = run_compiled(kernels_of_all_cases)
    assert set(found) == set(map(str, SHARED_LIMITS))
    for capability, (launched, due) in found.items():
        assert launched == due, capability


@pytest.mark.compiled
def test_real_compiles():
    found = run_compiled(compile_some, ["infer bfloat16 1x1 of 1024 channels", "train bfloat16 3x3"])
    assert found["restored"]
    rows = [row for row in found["rows"] if row["kernel"] == "conv_fprop_kernel"]
    assert [(row["arch"], row["tensor_core"]) for row in rows] == [("sm_80", "HMMA")] * 2 + [("sm_90", "HGMMA")] * 2
    for row in rows:
        assert row["dot"] == "bf16"
        assert 32 <= row["registers"] <= 255
        assert row["spill_bytes"] == 0
        assert 0 < row["shared_bytes"] <= row["shared_limit"]
        assert row["async_copies"] > 0
        assert row["serialised"] is False
    assert {row["kernel"] for row in found["rows"]} == {"conv_fprop_kernel", "combine_kernel"}


@pytest.mark.compiled
def test_depthwise_kernels_load_16_bytes_a_thread():
    """All that they load: images and weights in channels_last, the residual, and what batch norm applies to a
    channel.
    """
    layer = "3x3/1 depthwise of 96 channels"
    found = run_compiled(
        compile_some,
        [
            f"infer bfloat16 {layer}",
            f"dgrad float32 {layer}",
            f"wgrad bfloat16 {layer}",
            f"infer bfloat16 {layer} NCHW",
        ],
    )
    rows = [row for row in found["rows"] if row["kernel"].startswith("depthwise")]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    for row in rows:
        assert row["spill_bytes"] == 0
        assert row["wide_loads"] == (0 if "NCHW" in row["variant"] else row["global_loads"]), row
        assert row["global_loads"] > 0


@pytest.mark.compiled
def test_tensor_maps_feed_the_matrix_unit():
    found = run_compiled(compile_boxes)
    assert {row["kernel"] for row in found} >= {"tma_fprop_kernel", "tma_dgrad_kernel", "tma_wgrad_kernel"}
    for row in found:
        if row["kernel"].startswith("tma_"):
            assert row["tensor_core"] == {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}[row["arch"]]
            assert row["tensor_loads"] > 0
            assert row["spill_bytes"] == 0
            assert row["serialised"] is False


def compile_boxes():
    """Rows of one case of each tensor-map kernel, on both architectures."""
    from dataclasses import asdict

    from cnnfast_kernels import aot
    from cnnfast_kernels.aot import compiling
    from cnnfast_kernels.aot.cases import cases

    rows = []
    for arch in ("sm_90", "sm_100"):
        index = {case.name: i for i, case in enumerate(cases(aot.capability_of(arch)))}
        names = [f"{operation} bfloat16 3x3/2 in boxes" for operation in ("infer", "dgrad", "wgrad")]
        rows += compiling.finished([row for name in names for row in compiling.compile_case(arch, index[name])])
    return [asdict(row) for row in rows]
