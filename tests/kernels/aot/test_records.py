"""What is compiled for resources.py, and how it is compared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cnnfast_kernels import resources
from cnnfast_kernels.aot import KernelRow, records
from cnnfast_kernels.aot.cases import cases
from cnnfast_kernels.aot.searched import searched
from cnnfast_kernels.resources import ResourceKey, Resources, read, rows_of

GATHERED = KernelRow(
    "conv_fprop_kernel", "infer bfloat16 3x3", "128x64x32 w4 s4", "sm_90",
    registers=168, spill_bytes=0, shared_bytes=49152, loop_instructions=240, step_instructions=120.0,
    other_instructions=1000,
)  # fmt: skip
BOXED = replace(
    GATHERED, kernel="tma_wgrad_kernel", variant="wgrad bfloat16 3x3 in boxes",
    tile="4x1x16 pixels k64 c64 w4 s4 split 8", step_instructions=100.04,
)  # fmt: skip


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where rows are read from meanwhile."""
    monkeypatch.setattr(resources, "FOLDER", tmp_path)
    resources.rows_of.cache_clear()
    yield tmp_path
    resources.rows_of.cache_clear()


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_what_is_due_is_little_and_named_apart(arch):
    due = searched(arch)
    assert 300 < len(due) <= 600
    assert len(set(map(records.name_of, due.values()))) == len(due)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_rows_are_of_all_that_is_searched(arch):
    """Written again after each change of what is searched: cnnfast aot --record."""
    assert set(rows_of(arch)) == set(searched(arch))


def test_what_ci_compiles_is_compared():
    """On each architecture, of each kernel for convolution."""
    for arch in (80, 90):
        compared = {records.name_of(case) for case in cases(arch)} & set(records.keys(arch))
        kernels = {records.keys(arch)[name].kernel for name in compared}
        assert kernels == {key.kernel for key in records.keys(arch).values()}
        assert 40 < len(compared) < 300


def test_what_a_model_reads_may_not_move_either_way(monkeypatch):
    """On the Triton whose rows it reads; on another nothing but a loop that rises is told."""
    before = Resources(160, 40000, 100, 1000)
    moved = Resources(135, 50000, 84, 1160)
    monkeypatch.setattr(records, "version", lambda: resources.TRITON)
    assert records.differences(before, before) == []
    assert records.differences(Resources(137, 45000, 86, 1140), before) == []
    assert records.differences(moved, before) == [
        "registers 135, 160 on record",
        "shared_bytes 50000, 40000 on record",
        "loop_instructions 84, 100 on record",
        "other_instructions 1160, 1000 on record",
    ]
    risen = before._replace(loop_instructions=116)
    assert records.differences(risen, before) == ["116 instructions in a step of the main loop, 100 on record"]
    monkeypatch.setattr(records, "version", lambda: "3.9")
    assert records.differences(moved, before) == []
    assert len(records.differences(risen, before)) == 1


def test_a_loop_may_rise_by_15_percent_over_its_row(folder):
    (file,) = records.write([GATHERED, BOXED, replace(BOXED, variant="wgrad bfloat16 of no case")])
    assert file == folder / f"triton-{records.version()}" / "sm_90.csv"
    key = ResourceKey("conv_fprop_kernel", "taps", "128x64x32 w4 s4", "norm", "half", 90)
    rows = read(file, 90)
    assert rows[key] == Resources(168, 49152, 120.0, 1000.0)
    assert [(k.tile, row.loop_instructions) for k, row in rows.items() if k != key] == [
        ("4x1x16 pixels k64 c64 w4 s4", 100.0)
    ]
    assert records.departures([replace(GATHERED, step_instructions=138.0), BOXED]) == []
    (line,) = records.departures([replace(GATHERED, step_instructions=138.1)])
    assert line == (
        "sm_90 conv_fprop_kernel; infer bfloat16 3x3; 128x64x32 w4 s4: 138.1 instructions in a step of the main loop, "
        "120 on record"
    )
    (line,) = records.departures([replace(GATHERED, tile="64x64x32 w4 s4")])
    assert "is not on record: run cnnfast aot --arch sm_90 --record" in line
    other = replace(GATHERED, arch="sm_100", tile="64x64x32 w4 s4", step_instructions=999.0)
    assert records.departures([other]) == [], "nothing is on record for that architecture"
    records.write([BOXED])
    assert len(read(file, 90)) == 1, "what no case makes any more is forgotten"
