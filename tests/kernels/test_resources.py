"""Rows of what kernels take, and estimates where there is none."""

from __future__ import annotations

import re
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnfast_kernels import resources
from cnnfast_kernels.gather.depthwise import tiles as strips
from cnnfast_kernels.gather.depthwise.tiles import StripTile
from cnnfast_kernels.problem import ConvProblem
from cnnfast_kernels.resources import ResourceKey, Resources, estimated, read, resources_of, rows_of, shape_of, write
from cnnfast_kernels.tiling import TileConfig, form_of
from cnnfast_kernels.tma import tiles as boxes
from cnnfast_kernels.tma.tiles import BoxTile

FILES = sorted(resources.FOLDER.rglob("*.csv"))
FORM = re.compile(r"1x1|taps|masked|flat|narrow|apart|phases|\dx\d/\d")
ONE = Resources(154, 163872, 92.0, 547.0)


def problem(C=64, K=64, size=56, window=3, stride=1, groups=1):
    pad = window // 2
    return ConvProblem.of(
        (32, C, size, size), (K, C // groups, window, window), (stride, stride), (pad,) * 4, (1, 1), groups
    )


def arch_of(file):
    return int(file.stem.removeprefix("sm_"))


def test_the_model_has_rows_of_every_architecture_that_it_asks_for():
    own = {arch_of(file) for file in FILES if file.parent.name == f"triton-{resources.TRITON}"}
    assert own == {80, 89, 90, 100}
    assert set(resources.STANDS_FOR.values()) <= own


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name} {file.stem}")
def test_a_file_holds_rows_of_kernels_that_there_are(file):
    rows = read(file, arch_of(file))
    assert 50 < len(rows) <= 600
    assert len(file.read_text().splitlines()) == len(rows) + 1, "no key twice"
    for key, row in rows.items():
        assert shape_of(key.kernel, key.tile), key
        assert re.fullmatch("(conv|tma|depthwise)_(fprop|dgrad|wgrad)_kernel", key.kernel)
        assert FORM.fullmatch(key.form), key
        assert (key.epilogue == "plain") or "fprop" in key.kernel, key
        assert 16 <= row.registers <= 255
        assert 0 <= row.shared_bytes <= 232448
        assert row.other_instructions > 50, key
        assert row.loop_instructions > 20 or "depthwise" in key.kernel, key
        assert row.exact


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = {
        ResourceKey("tma_fprop_kernel", "1x1", "1x1x256 pixels k64 c64 w4 s4", "plain", "half", 90): ONE,
        ResourceKey("conv_wgrad_kernel", "taps", "128x64x32 w4 s4", "plain", "half", 90): Resources(
            255, 36864, 64.3, 1234.0, spill_bytes=16
        ),
    }
    file = tmp_path / "new" / "sm_90.csv"
    write(file, rows)
    assert read(file, 90) == rows
    assert file.read_text().splitlines()[1].startswith("conv_wgrad_kernel,taps,"), "sorted"


def test_what_is_on_record_is_exact():
    for key, row in rows_of(90).items():
        assert resources_of(key) == row
        assert row.exact


@pytest.mark.parametrize(("arch", "like"), [(86, 80), (103, 100), (120, 89)])
def test_an_architecture_without_rows_is_estimated_from_another(arch, like):
    """From the very row of the other, if it is there."""
    for key, row in [*rows_of(like).items()][:20]:
        assert resources_of(key._replace(arch=arch)) == row._replace(exact=False)


def test_an_estimate_scales_with_the_tile():
    """A loop as what a warp loads, shared memory as what waits there, the rest beyond 300 as the sums."""
    key = ResourceKey("conv_fprop_kernel", "taps", "128x64x32 w4 s4", "plain", "half", 80)
    known = {key: Resources(160, 36864, 144, 640)}
    found = estimated(key._replace(tile="128x128x32 w4 s2"), known)
    assert found == Resources(224, 16384, 192, 980, exact=False), "64 sums more a thread, one stage waits"
    found = estimated(key._replace(tile="64x64x32 w4 s4"), known)
    assert found == Resources(128, 24576, 96, 470, exact=False)
    on_90 = {key._replace(arch=90): known[key]}
    found = estimated(key._replace(tile="128x64x32 w4 s2", arch=90), on_90)
    assert found.shared_bytes == 18432, "wgmma reads both stages in place"


def test_loop_and_epilogue_are_estimated_from_different_rows():
    """The loop of the same tile without an epilogue, and the epilogue of another tile's kernel."""
    plain = ResourceKey("tma_fprop_kernel", "phases", "2x8x8 pixels k128 c64 w4 s2", "plain", "half", 90)
    moments = ResourceKey("tma_fprop_kernel", "taps", "2x8x8 pixels k128 c64 w4 s3", "moments", "half", 90)
    known = {plain: Resources(154, 65536, 110, 500), moments: Resources(209, 98304, 99, 2500)}
    found = estimated(plain._replace(epilogue="moments"), known)
    assert found == Resources(209, 65536, 110, 2500, exact=False)


@pytest.mark.parametrize("arch", [80, 90])
def test_each_row_is_estimated_well_from_the_others(arch):
    """Half of them within a quarter in all three; registers of nine of ten within 40."""
    rows = rows_of(arch)
    found = []
    for key, row in rows.items():
        guess = estimated(key, {other: r for other, r in rows.items() if other != key})
        ratios = [
            abs(guess[i] / row[i] - 1)
            for i in (1, 2, 3)  # shared bytes, instructions of the loop, and others
            if row[i]
        ]
        found.append((max(ratios), abs(guess.registers - row.registers)))
    assert median(ratio for ratio, _ in found) < 0.25
    assert sorted(registers for _, registers in found)[len(found) * 9 // 10] <= 40


EXTENT = st.integers(0, 9).map(lambda n: 2**n)


@settings(max_examples=200, deadline=None)
@given(
    kernel=st.sampled_from(["conv_fprop_kernel", "tma_wgrad_kernel", "depthwise_dgrad_kernel", "no_such_kernel"]),
    form=st.sampled_from(["1x1", "taps", "9x9/3", "no such form"]),
    tile=st.one_of(
        st.just("no such tile"),
        st.builds(
            "{}x{}x{} w{} s{}".format,
            *[st.integers(1, 9).map(lambda n: 2**n)] * 3,
            st.integers(1, 16),
            st.integers(1, 7),
        ),
        st.builds("1x{}x{} pixels k{} c{} w4 s3".format, *[st.integers(1, 9).map(lambda n: 2**n)] * 4),
    ),
    epilogue=st.sampled_from(["plain", "moments", "norm"]),
    dtype=st.sampled_from(["half", "fp64", "no such dtype"]),
    arch=st.sampled_from([75, 80, 90, 120]),
)
def test_nothing_that_is_asked_raises(kernel, form, tile, epilogue, dtype, arch):
    row = resources_of(ResourceKey(kernel, form, tile, epilogue, dtype, arch))
    assert 16 <= row.registers <= 255
    assert min(row) >= 0


GATHER = TileConfig(128, 64, 32)


@pytest.mark.parametrize(
    ("operation", "changes", "expected"),
    [
        ("fprop", {"window": 1}, "1x1"),
        ("fprop", {"window": 1, "C": 24}, "1x1"),
        ("fprop", {}, "taps"),
        ("fprop", {"stride": 2}, "taps"),
        ("fprop", {"C": 48}, "masked"),
        ("fprop", {"window": 7}, "masked"),
        ("fprop", {"C": 16}, "flat"),
        ("fprop", {"groups": 16}, "flat"),
        ("fprop", {"C": 3, "window": 7}, "narrow"),
        ("dgrad", {"C": 3}, "taps"),
        ("dgrad", {"K": 16}, "flat"),
        ("dgrad", {"K": 16, "window": 1, "stride": 2}, "1x1"),
        ("dgrad", {"window": 7, "stride": 2}, "taps"),  # 16 taps reach the class of pixels that most reach
        ("dgrad", {"window": 2, "stride": 2, "K": 16}, "1x1"),
        ("wgrad", {}, "taps"),
        ("wgrad", {"C": 48}, "masked"),
        ("wgrad", {"C": 16}, "masked"),
        ("wgrad", {"C": 3}, "narrow"),
        ("wgrad", {"C": 48, "window": 1}, "1x1"),
        ("wgrad", {"window": 7}, "taps"),
    ],
)
def test_forms_of_gather_kernels(operation, changes, expected):
    assert form_of(problem(**changes), operation, GATHER) == expected
    assert form_of(problem(**changes), operation, GATHER, adjacent=False) == "apart"


@pytest.mark.parametrize(
    ("tile", "changes", "expected"),
    [
        (BoxTile(2, 8, 8, 128, 64), {}, "taps"),
        (BoxTile(1, 1, 128, 128, 64), {"window": 1}, "1x1"),
        (BoxTile(2, 8, 8, 128, 64), {"stride": 2}, "phases"),
        (BoxTile(128, 1, 1, 128, 64), {"stride": 2}, "taps"),  # a box of one pixel can begin anywhere
        (BoxTile(8, 1, 16, 128, 64), {"stride": 2}, "phases"),
        (BoxTile(2, 8, 8, 128, 64), {"window": 1, "stride": 2}, "phases"),
    ],
)
def test_forms_of_kernels_that_load_boxes(tile, changes, expected):
    for operation in ("fprop", "dgrad", "wgrad"):
        assert boxes.form_of(problem(**changes), operation, tile) == expected


def test_forms_of_depthwise_kernels():
    assert strips.form_of(problem(groups=64)) == "3x3/1"
    assert strips.form_of(problem(groups=64, window=7, stride=2)) == "7x7/2"


def test_shapes_are_read_from_what_tiles_are_called():
    box = BoxTile(2, 8, 16, 64, 32, 8, 3)
    assert shape_of("tma_fprop_kernel", str(box))[:6] == (256, 64, 32, 8, 3, (2, 8, 16))
    assert shape_of("tma_dgrad_kernel", str(box))[:5] == (256, 32, 64, 8, 3)
    assert shape_of("tma_wgrad_kernel", str(box))[:5] == (64, 32, 256, 8, 3)
    assert shape_of("conv_fprop_kernel", str(GATHER))[:5] == (128, 64, 32, 4, 3)
    assert shape_of("depthwise_fprop_kernel", str(StripTile(32, 16, 7)))[:4] == (224, 16, 1, 4)
    assert shape_of("conv_fprop_kernel", "large") is None
