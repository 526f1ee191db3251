"""The model of costs: by hand where numbers are round, by properties where they are not."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnfast_kernels.costs import (
    LATENCY,
    LAUNCH,
    PARTS,
    TileWork,
    cost,
    path,
    residents,
    roofline,
    shared_bytes_of_step,
    warp_grid,
)
from cnnfast_kernels.gpus import KNOWN, SHARED_LIMITS, named
from cnnfast_kernels.resources import Resources
from cnnfast_kernels.tiling import cdiv

H200, A100, RTX_4090, RTX_3090 = map(named, ("h200", "a100", "rtx-4090", "rtx-3090"))
# 1320 programs of 10 steps of 128 x 128 x 64 of half precision.
WORK = TileWork(
    programs=1320,
    warps=4,
    steps=13200,
    product=(128, 128, 64),
    precision="half",
    loaded=13200 * 32768,
    outside=1320 * 32768,
    moved=100 * 2**20,
    memory=90 * 2**20,
    flops=2 * 128 * 128 * 64 * 13200,
    stages=3,
    through_registers=False,
)
RESOURCES = Resources(128, 64 * 1024, 100, 400)
ALONE = RESOURCES._replace(shared_bytes=120 * 1024)  # one program on a multiprocessor
STILL = {"loaded": 1, "outside": 1, "moved": 1}  # nothing is loaded to speak of


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "warps", "expected"),
    [
        (H200, 154, 96 * 1024, 4, 2),  # shared memory: 228 of 97 KB each
        (H200, 154, 160 * 1024, 4, 1),
        (H200, 154, 16 * 1024, 4, 3),  # registers: 12 warps of 160 x 32
        (H200, 160, 16 * 1024, 4, 3),
        (H200, 161, 16 * 1024, 4, 3),  # 168
        (H200, 168, 0, 4, 3),
        (H200, 169, 0, 4, 2),  # 176: 11 warps, of which a scheduler takes 2
        (H200, 255, 0, 4, 2),
        (H200, 255, 0, 8, 1),
        (H200, 128, 0, 8, 2),
        (H200, 32, 0, 4, 16),  # 64 warps
        (H200, 32, 0, 1, 16),  # warps are given registers by fours
        (H200, 32, SHARED_LIMITS[90], 4, 1),
        (H200, 32, SHARED_LIMITS[90] + 1, 4, 0),
        (H200, 128, 0, 20, 0),  # 2560 times 32 registers
        (A100, 168, 36 * 1024, 4, 3),
        (A100, 128, 48 * 1024, 4, 3),  # 164 of 49 KB each
        (A100, 32, SHARED_LIMITS[80], 4, 1),
        (RTX_4090, 32, 0, 4, 12),  # 48 warps
        (RTX_4090, 168, 36 * 1024, 4, 2),  # 100 of 37 KB each
        (RTX_4090, 32, SHARED_LIMITS[89], 4, 1),
        (RTX_3090, 32, 0, 8, 6),
        (RTX_3090, 32, SHARED_LIMITS[86] + 1, 4, 0),
    ],
)  # fmt: skip
def test_programs_that_live_on_a_multiprocessor(gpu, registers, shared, warps, expected):
    resources = Resources(registers, shared, 100, 400)
    assert residents(WORK._replace(warps=warps), resources, gpu) == expected


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.name)
def test_every_gpu_has_the_limits_of_its_architecture(gpu):
    small, full = Resources(16, 0, 1, 1), Resources(16, SHARED_LIMITS[gpu.arch], 1, 1)
    m = gpu.multiprocessor
    assert residents(WORK._replace(warps=4), small, gpu) == min(m.warps // 4, m.programs)
    assert residents(WORK, full, gpu) == 1
    assert residents(WORK, Resources(255, 0, 1, 1), gpu) == m.registers // (256 * 32) // 4


def test_a_program_that_fits_nowhere_takes_for_ever():
    found = cost(WORK, Resources(128, SHARED_LIMITS[90] + 1, 100, 400), H200)
    assert (found.seconds, found.residents) == (inf, 0)


def test_a_launch_of_no_program_takes_no_time():
    nothing = WORK._replace(programs=0, steps=0, loaded=0, outside=0, moved=0, memory=0, flops=0)
    assert (cost(nothing, RESOURCES, H200).seconds, roofline(nothing, H200)) == (0.0, 0.0)


def test_warps_lie_along_the_longer_side():
    # as the loads from shared memory of kernels compiled for sm_80 have it: 12 LDSM of 128x64x32, 16 of 128x128x32
    assert warp_grid(128, 128, 4) == (2, 2)
    for rows, columns, loads in ((128, 64, 12), (128, 128, 16)):
        work = WORK._replace(product=(rows, columns, 32))
        written = (rows + columns) * 32 * 2
        assert shared_bytes_of_step(work, 80) == written + 4 * loads * 512
    assert warp_grid(64, 32, 4) == (4, 1)
    assert warp_grid(16, 128, 4) == (1, 4)
    assert warp_grid(128, 128, 8) == (4, 2)
    assert warp_grid(16, 16, 4) == (1, 4)  # the same columns twice


def test_wgmma_reads_the_second_operand_for_every_64_rows_and_tcgen05_for_every_128():
    work = WORK._replace(product=(128, 256, 64))
    assert shared_bytes_of_step(work, 90) == (128 + 256 + 128 + 2 * 256) * 64 * 2
    assert shared_bytes_of_step(work, 103) == shared_bytes_of_step(work, 100) == (128 + 256 + 128 + 256) * 64 * 2
    through = work._replace(through_registers=True)
    assert shared_bytes_of_step(through, 90) == shared_bytes_of_step(work, 80) == (128 + 256 + 2 * 128 + 2 * 256) * 128
    assert shared_bytes_of_step(work._replace(stages=0), 90) == 0


def test_parts_by_hand():
    found = cost(WORK, RESOURCES, H200)
    most = 10  # programs of each multiprocessor
    assert found.residents == 3
    assert found.waves == 4
    assert found.tail == pytest.approx(1 - 1320 / (4 * 132 * 3))
    product = 2 * 128 * 128 * 64 / 4096 / 0.833
    assert found.parts == pytest.approx({
        "tensor": most * 10 * product / 1.755e9,
        "issue": most * (10 * 100 + 400) / 1.755e9,
        "l2": (13200 + 1320) * 32768 / 5.5e12,
        "shared": most * (10 * (256 + 128 + 2 * 128) * 128 + 2 * 32768) / 128 / 1.755e9,
        "memory": 100 * 2**20 / 4.3e12,
        # 4 waves: each waits once for a load, has its share of the cache, and issues its epilogue in twice the clocks
        "latency": 4 * (LATENCY + 11 * 32768 / (5.5e12 / 132) + 400 * 2 / 1.755e9),
    })  # fmt: skip
    assert found.limiter == "l2"
    assert found.seconds == found.parts["l2"]
    assert found.intensity == pytest.approx(64)
    assert roofline(WORK, H200) == max(WORK.flops / H200.flops("half"), 90 * 2**20 / 4.3e12)


def test_a_launch_is_as_long_as_its_busiest_multiprocessor():
    """What one multiprocessor does alone takes twice as long for one program more than there are multiprocessors, and
    no less for one program in all.
    """
    once, again, single = (
        cost(WORK._replace(programs=n, steps=10 * n, loaded=32768 * n, outside=n), RESOURCES, H200).parts
        for n in (132, 133, 1)
    )
    for part in ("tensor", "issue", "shared"):
        assert again[part] == pytest.approx(2 * once[part])
        assert single[part] == pytest.approx(once[part])
    # one program loads no faster than its multiprocessor takes
    assert once["l2"] == pytest.approx(132 * 32769 / 5.5e12)
    assert single["l2"] == pytest.approx(32769 / 64 / 1.755e9)


def test_a_loop_waits_for_the_loads_that_its_stages_do_not_begin_soon_enough():
    """One program alone, of steps that take no time beside a load."""
    work = WORK._replace(programs=1, steps=10, product=(16, 16, 16), loaded=10, outside=0, moved=0)
    paths = [path(work._replace(stages=stages), Resources(32, 1024, 0, 0), H200) for stages in (1, 2, 3, 5)]
    assert paths == pytest.approx([10 * LATENCY, 10 * LATENCY, 5.5 * LATENCY, 3.25 * LATENCY], rel=0.02)
    assert path(work._replace(stages=0, cached=7), Resources(32, 0, 0, 0), H200) == pytest.approx(3 * LATENCY, rel=0.02)
    assert path(work._replace(stages=0, cached=10), Resources(32, 0, 0, 0), H200) == pytest.approx(LATENCY, rel=0.02)


def test_further_launches_take_their_time_and_their_bytes():
    more = WORK._replace(launches=2, further=43 * 10**6)
    assert cost(more, RESOURCES, H200).seconds == pytest.approx(cost(WORK, RESOURCES, H200).seconds + 2 * LAUNCH + 1e-5)


@pytest.mark.parametrize(
    ("limiter", "changes", "resources"),
    [
        ("tensor", {**STILL, "product": (128, 256, 64)}, RESOURCES),
        ("issue", STILL, RESOURCES._replace(loop_instructions=1500)),
        ("issue", {**STILL, "steps": 0}, RESOURCES._replace(other_instructions=4000)),
        ("l2", {}, RESOURCES),
        ("shared", STILL, RESOURCES),
        ("shared", {**STILL, "product": (64, 64, 64), "through_registers": True}, RESOURCES),
        ("memory", {"moved": 2**30}, RESOURCES),
        ("latency", {}, ALONE),
        ("latency", {**STILL, "stages": 1, "steps": 1320 * 40, "product": (16, 16, 16)}, ALONE),
    ],
)  # fmt: skip
def test_what_limits(limiter, changes, resources):
    found = cost(WORK._replace(**changes), resources, H200)
    assert found.limiter == limiter
    assert found.parts[limiter] == max(found.parts.values()) == found.seconds
    assert tuple(found.parts) == PARTS


@pytest.mark.parametrize(("steps", "limiter"), [(1, "latency"), (5, "latency"), (30, "tensor"), (1000, "tensor")])
def test_latency_limits_where_it_takes_a_tenth_more_than_all_else(steps, limiter):
    """One program on each multiprocessor, which waits once, and then multiplies for 0.7 us a step."""
    work = WORK._replace(**STILL, programs=132, steps=132 * steps, product=(256, 256, 32))
    found = cost(work, Resources(255, 120 * 1024, 0, 0), H200)
    assert found.seconds == found.parts["latency"] > found.parts["tensor"]
    assert found.limiter == limiter


@st.composite
def works(draw):
    programs = draw(st.integers(1, 5000))
    steps = programs * draw(st.integers(0, 100))
    rows, columns, depth = (draw(st.sampled_from([16, 32, 64, 128, 256])) for _ in range(3))
    fetched = (rows + columns) * depth * 2
    return TileWork(
        programs, draw(st.sampled_from([1, 2, 4, 8])), steps, (rows, columns, depth), "half", steps * fetched,
        programs * rows * columns * 2, draw(st.integers(0, 2**32)), draw(st.integers(0, 2**32)),
        2 * rows * columns * depth * steps, draw(st.integers(0, 6)), draw(st.booleans()),
    )  # fmt: skip


def resource_values():
    return st.builds(
        Resources, st.integers(16, 255), st.integers(0, 99 * 1024), st.integers(0, 2000), st.integers(0, 9000)
    )


@given(works(), resource_values(), st.sampled_from(KNOWN))
def test_nothing_is_faster_than_the_roofline_of_its_own_work(work, resources, gpu):
    """What a launch multiplies and moves is a bound of its time, and its parts are."""
    found = cost(work, resources, gpu)
    least = work._replace(memory=work.moved)
    assert found.seconds >= roofline(least, gpu) * (1 - 1e-12) or found.residents == 0
    assert found.seconds == max(found.parts.values())
    assert 0 <= found.tail < 1


@given(
    works(),
    resource_values(),
    st.sampled_from(KNOWN),
    st.sampled_from(["registers", "shared_bytes", "loop_instructions", "other_instructions"]),
    st.integers(1, 2000),
)
def test_more_resources_never_pay(work, resources, gpu, name, more):
    larger = resources._replace(**{name: getattr(resources, name) + more})
    assert cost(work, larger, gpu).seconds >= cost(work, resources, gpu).seconds


@given(works(), resource_values(), st.sampled_from(KNOWN))
def test_more_work_never_pays(work, resources, gpu):
    """What is loaded more is taken to come from memory as the rest does."""
    before = cost(work, resources, gpu).seconds
    for names in (("steps",), ("loaded", "moved"), ("outside", "moved"), ("moved",)):
        more = work._replace(**{name: 2 * getattr(work, name) + 1 for name in names})
        assert cost(more, resources, gpu).seconds >= before * (1 - 1e-12)
    if work.stages:
        deeper = cost(work._replace(stages=work.stages + 1), resources, gpu)
        assert deeper.seconds <= before * (1 + 1e-12)


@given(
    works(), resource_values(), st.sampled_from(KNOWN), st.sampled_from(["clock", "memory", "cache", "multiprocessors"])
)
def test_a_faster_gpu_is_never_slower(work, resources, gpu, name):
    faster = gpu._replace(**{name: 2 * getattr(gpu, name)})
    if name == "multiprocessors":  # with all that they share
        faster = faster._replace(memory=2 * gpu.memory, cache=2 * gpu.cache)
    assert cost(work, resources, faster).seconds <= cost(work, resources, gpu).seconds * (1 + 1e-12)


@given(works(), resource_values(), st.sampled_from(KNOWN))
def test_waves_and_places(work, resources, gpu):
    found = cost(work, resources, gpu)
    if found.residents:
        places = gpu.multiprocessors * found.residents
        assert found.waves == cdiv(work.programs, places)
        assert found.waves * places * (1 - found.tail) == pytest.approx(work.programs)
