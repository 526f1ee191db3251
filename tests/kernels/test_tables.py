"""Tables of measured tiles: which row serves which convolution, what a file may hold, and who is told of one that cannot be used."""

from __future__ import annotations

import json
import threading
import warnings
from dataclasses import asdict, fields, replace

import pytest
import torch

from agreement import integers
from child import run_compiled
from cnnfast_kernels import choosing, launch, tables
from cnnfast_kernels.conv import Geometry, conv_dgrad, conv_fprop, conv_stats, conv_wgrad
from cnnfast_kernels.epilogue import BatchNorm, Epilogue
from cnnfast_kernels.problem import ConvProblem
from cnnfast_kernels.tables import Key, Row
from cnnfast_kernels.tiling import StripTile, TileConfig
from cnnfast_kernels.tma.tiles import BoxTile

TILE = TileConfig(32, 32, 16, 4, 2)
PROBLEM = ConvProblem(8, 16, 14, 14, 32, 3, 3, 14, 14, pad_h=1, pad_w=1)
LAST = "NHWC NHWC NHWC"
ABOUT = {"torch": "2.13.0"}


def row(gpu, problem=PROBLEM, tile=TILE, winner="kernels", **changes) -> Row:
    key = Key(*gpu, "fprop", "", "float16", LAST, problem)._replace(**changes)
    return Row(key, tile, winner, {"kernels": 9.0, "default": 12.0, "library": 10.0})


def write(gpu, *rows: Row):
    return tables.write(*gpu, rows, ABOUT)


# ----------------------------------------------------------------------------------------------------------------------
# Which row


def test_a_row_comes_back_as_it_was_written(gpu):
    strip = row(gpu, replace(PROBLEM, K=16, groups=16), StripTile(64, 16, 4, SPLIT_K=3), "library", operation="wgrad")
    rows = [row(gpu), strip]
    file = write(gpu, *rows)
    assert tables.read(file) == rows
    assert [tables.find(r.key) for r in rows] == rows
    assert json.loads(file.read_text())["torch"] == "2.13.0"
    assert tables.was_measured(*gpu, PROBLEM)
    assert not tables.was_measured("another", gpu.arch, PROBLEM)


@pytest.mark.parametrize("name", [field.name for field in fields(ConvProblem) if field.name not in ("N", "groups")])
def test_everything_but_the_batch_is_exact(gpu, name):
    write(gpu, row(gpu))
    other = replace(PROBLEM, **{name: getattr(PROBLEM, name) + 1})
    assert tables.find(row(gpu, other).key) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu": "another"},
        {"arch": 80},
        {"operation": "dgrad"},
        {"epilogue": "norm relu"},
        {"dtype": "bfloat16"},
        {"layout": "NCHW NHWC NHWC"},
        {"problem": replace(PROBLEM, groups=2)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_so_is_what_else_the_key_says(gpu, changes):
    write(gpu, row(gpu))
    assert tables.find(row(gpu).key) is not None
    assert tables.find(row(gpu).key._replace(**changes)) is None


def test_the_nearest_batch_serves_up_to_twice_and_half(gpu):
    rows = {N: row(gpu, replace(PROBLEM, N=N)) for N in (8, 16, 60)}
    write(gpu, *rows.values())
    serves = {N: tables.find(row(gpu, replace(PROBLEM, N=N)).key) for N in (0, 3, 4, 8, 11, 12, 16, 30, 32, 33, 120, 121)}
    expected = {0: None, 3: None, 4: 8, 8: 8, 11: 8, 12: 16, 16: 16, 30: 16, 32: 60, 33: 60, 120: 60, 121: None}
    assert {N: None if r is None else r.key.problem.N for N, r in serves.items()} == expected


def test_of_two_as_near_the_smaller_serves(gpu):
    write(gpu, *(row(gpu, replace(PROBLEM, N=N)) for N in (16, 4)))
    found = tables.find(row(gpu).key)
    assert found is not None
    assert found.key.problem.N == 4


def test_the_users_rows_go_before_those_that_come_with_cnnfast(gpu):
    others = row(gpu, tile=replace(TILE, num_stages=3)), row(gpu, replace(PROBLEM, C=32))
    file = write(gpu, *others)
    tables.SHIPPED.mkdir()
    file.rename(tables.SHIPPED / file.name)
    tables.forget()
    assert [tables.find(r.key) for r in others] == [*others]
    mine = row(gpu, replace(PROBLEM, N=5))
    write(gpu, mine)
    assert tables.find(others[0].key) == mine  # its batch is not as near, but it is the user's
    assert tables.find(others[1].key) == others[1]


def test_measuring_again_replaces_and_keeps_the_rest(gpu):
    first, other, again = row(gpu), row(gpu, replace(PROBLEM, C=32)), row(gpu, winner="library")
    write(gpu, first, other)
    assert tables.find(first.key) == first
    assert not tables.library  # nobody else is asked
    assert write(gpu, again) == tables.user_file(*gpu)
    assert tables.find(first.key) == again
    assert tables.find(other.key) == other
    assert tables.library
    assert [file.name for file in tables.user_folder().iterdir()] == [tables.user_file(*gpu).name]  # no half-written ones


def test_files_are_named_after_gpus():
    assert tables.user_file("NVIDIA H100 80GB HBM3", 90).name == "nvidia-h100-80gb-hbm3-sm_90.json"


# ----------------------------------------------------------------------------------------------------------------------
# Files that cannot be used


def spoilt(gpu, change) -> None:
    """The user's table after `change`, which is a text in its place or edits its data."""
    file = write(gpu, row(gpu), row(gpu, replace(PROBLEM, C=32)))
    if isinstance(change, str):
        file.write_text(change)
    else:
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))
    tables.forget()


def edit(*path):
    *way, last, value = path

    def change(data):
        for step in way:
            data = data[step]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("", "JSONDecodeError"),
        ('{"format": 1', "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
        (edit("rows", None), "TypeError"),
        (edit("format", 2), "run cnnfast tune again"),
        (edit("cnnfast", "0.0.1"), "cnnfast 0.0.1 wrote it"),
    ],
)
def test_a_table_that_cannot_be_used_is_told_of_once(gpu, change, says):
    spoilt(gpu, change)
    with pytest.warns(RuntimeWarning, match=says):
        assert tables.find(row(gpu).key) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.find(row(gpu).key) is None
    assert not tables.library


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit("rows", 0, "tile", "CLUSTER", 2), "other fields"),
        (edit("rows", 0, "tile", {"family": "gather"}), "other fields"),
        (edit("rows", 0, "tile", "family", "wavelet"), "wavelet"),
        (edit("rows", 0, "tile", "BLOCK_M", "64"), "integers"),
        (edit("rows", 0, "tile", None), "TypeError"),
        (edit("rows", 0, "problem", "N", 0), "batch 0"),
        (edit("rows", 0, "problem", "groups", 3), "groups=3"),
        (edit("rows", 0, "winner", "nobody"), "nobody"),
        (edit("rows", 0, "microseconds", []), "AttributeError"),
        (edit("rows", 0, 7), "TypeError"),
    ],
)
def test_of_a_row_that_cannot_be_understood_the_others_serve(gpu, change, says):
    spoilt(gpu, change)
    with pytest.warns(RuntimeWarning, match=f"1 of 2 rows.*{says}"):
        assert tables.find(row(gpu).key) is None
    assert tables.find(row(gpu, replace(PROBLEM, C=32)).key) is not None


def test_a_file_that_cannot_be_read_stops_nobody(gpu):
    tables.user_file(*gpu).mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert tables.find(row(gpu).key) is None


def test_measuring_replaces_a_table_that_cannot_be_used(gpu):
    spoilt(gpu, "nonsense")
    with pytest.warns(RuntimeWarning, match="is not used"):
        write(gpu, row(gpu))
    assert tables.read(tables.user_file(*gpu)) == [row(gpu)]


def test_a_folder_that_cannot_be_written_is_named(gpu):
    tables.user_folder().write_text("a file is in the way")
    for attempt in (tables.writable, lambda: write(gpu, row(gpu))):
        with pytest.raises(OSError, match=r"cannot be written to .*user: File exists"):
            attempt()


def test_a_read_only_folder_is_named(gpu, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tables.tempfile, "TemporaryFile", refuse)  # whoever tests as root may write anywhere
    with pytest.raises(OSError, match=r"cannot be written to .*user: Permission denied"):
        tables.writable()


def test_threads_read_tables_once(gpu, monkeypatch):
    write(gpu, row(gpu))
    read, begun, reads, found = tables.read, threading.Barrier(8), [], []

    def slowly(file):
        reads.append(file)
        threading.Event().wait(0.05)
        return read(file)

    def ask():
        begun.wait()
        found.append(tables.find(row(gpu).key))

    monkeypatch.setattr(tables, "read", slowly)
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert found == [row(gpu)] * 8


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions run by them

ONE = Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1)


def operands(device, C=8, K=8, groups=1, batch=2, dtype=torch.float32):
    x = integers(batch, C, 5, 6, dtype=dtype).to(device, memory_format=torch.channels_last)
    w = integers(K, C // groups, 3, 3, seed=1, dtype=dtype).to(device, memory_format=torch.channels_last)
    dy = integers(batch, K, 5, 6, seed=2, dtype=dtype).to(device, memory_format=torch.channels_last)
    return x, w, dy


def calls(x, w, dy, geometry=ONE):
    """By operation and epilogue, what runs it and gives its first result."""
    norm = Epilogue(None, BatchNorm(*(torch.ones(w.shape[0], device=x.device) for _ in range(4)), 0.0), dy, "relu")
    return {
        ("fprop", ""): lambda: conv_fprop(x, w, geometry),
        ("fprop", "stats"): lambda: conv_stats(x, w, geometry)[0],
        ("fprop", "norm residual relu"): lambda: conv_fprop(x, w, geometry, norm),
        ("dgrad", ""): lambda: conv_dgrad(dy, w, x.shape, geometry, fmt=torch.channels_last),
        ("wgrad", ""): lambda: conv_wgrad(x, dy, w.shape, geometry, fmt=torch.channels_last),
    }


def written(gpu, x, w, tile, geometry=ONE, batch=None):
    """A table that gives all five calls one tile."""
    problem = geometry.problem(x.shape, w.shape)
    problem = problem if batch is None else replace(problem, N=batch)
    dtype = str(x.dtype).removeprefix("torch.")
    keys = [Key(*gpu, operation, epilogue, dtype, LAST, problem) for operation, epilogue in calls(x, w, x)]
    split = {key: replace(tile, SPLIT_K=5) if key.operation == "wgrad" else tile for key in keys}
    write(gpu, *(Row(key, split[key], "kernels", {}) for key in keys))
    launch.forget_plans()


@pytest.mark.parametrize("call", list(calls(*operands("cpu"))), ids=" ".join)
@pytest.mark.parametrize("batch", [None, 4])
def test_a_row_gives_the_tile_and_the_same_numbers(gpu, device, launches, call, batch):
    """Also the row of twice the batch, whose split leaves parts of wgrad's sum without work."""
    x, w, dy = operands(device)
    right = calls(x, w, dy)[call]()
    assert launches[0].tile != TILE
    launches.clear()
    written(gpu, x, w, TILE, batch=batch)
    torch.testing.assert_close(calls(x, w, dy)[call](), right, rtol=0, atol=0)
    assert launches[0].tile == (replace(TILE, SPLIT_K=5) if call[0] == "wgrad" else TILE)


@pytest.mark.parametrize("call", list(calls(*operands("cpu"))), ids=" ".join)
def test_a_depthwise_row_gives_the_tile_and_the_same_numbers(gpu, device, launches, call):
    geometry, tile = ONE._replace(groups=8), StripTile(64, 2, 4)
    x, w, dy = operands(device, groups=8)
    right = calls(x, w, dy, geometry)[call]()
    launches.clear()
    written(gpu, x, w, tile, geometry)
    torch.testing.assert_close(calls(x, w, dy, geometry)[call](), right, rtol=0, atol=0)
    assert launches[0].tile == (replace(tile, SPLIT_K=5) if call[0] == "wgrad" else tile)


@pytest.mark.parametrize("call", list(calls(*operands("cpu"))), ids=" ".join)
@pytest.mark.parametrize("batch", [None, 4])
def test_a_row_of_tensor_maps_gives_the_tile_and_the_same_numbers(gpu, device, launches, call, batch):
    """Also the row of twice the batch, whose split leaves parts of wgrad's sum without boxes."""
    tile = BoxTile(1, 8, 8, 32, 32, 4, 3)
    x, w, dy = operands(device, dtype=torch.float16)
    if device.type == "cuda" and gpu.arch < 90:
        pytest.skip("GPU ring: this one has no tensor maps")
    right = calls(x, w, dy)[call]()
    launches.clear()
    written(gpu, x, w, tile, batch=batch)
    torch.testing.assert_close(calls(x, w, dy)[call](), right, rtol=0, atol=0)
    assert launches[0].tile == (replace(tile, SPLIT_K=5) if call[0] == "wgrad" else tile)


def test_a_row_of_tensor_maps_does_not_serve_what_they_cannot(gpu, device, launches):
    """A slice that starts between multiples of 16 bytes has the same key."""
    x, w, _ = operands(device, dtype=torch.float16)
    written(gpu, x, w, BoxTile(1, 8, 8, 32, 32, 4, 3))
    shifted = torch.cat([x.permute(0, 2, 3, 1).flatten()[:1], x.permute(0, 2, 3, 1).flatten()])[1:]
    conv_fprop(shifted.view(2, 5, 6, 8).permute(0, 3, 1, 2), w, ONE)
    assert isinstance(launches[0].tile, TileConfig)


def test_a_tile_that_is_given_goes_before_the_row(gpu, device, launches):
    x, w, _ = operands(device)
    written(gpu, x, w, TILE)
    given = replace(TILE, num_stages=3)
    conv_fprop(x, w, ONE, tile=given)
    assert [event.tile for event in launches] == [given]


def test_a_row_of_kernels_that_cannot_serve_is_not_used(gpu, device, launches):
    x, w, _ = operands(device)
    written(gpu, x, w, StripTile(64, 2, 4))
    conv_fprop(x, w, ONE)
    assert isinstance(launches[0].tile, TileConfig)


def test_a_repeated_call_asks_no_table(gpu, device, monkeypatch):
    x, w, dy = operands(device)
    for call in calls(x, w, dy).values():
        call()
    monkeypatch.setattr(tables, "find", lambda key: pytest.fail("a plan should hold the answer"))
    for call in calls(x, w, dy).values():
        call()


def test_candidates_are_few_distinct_and_begin_with_the_default(gpu, device):
    for groups, shape in ((1, (64, 64, 3)), (1, (3, 64, 7)), (64, (64, 64, 3))):
        C, K, taps = shape
        geometry = Geometry((1, 1), (taps // 2,) * 4, (1, 1), groups)
        for dtype in launch.KERNEL_DTYPES:
            for fmt in (torch.channels_last, torch.contiguous_format):
                x, y = (launch.dense((32, c, 28, 28), dtype, fmt) for c in (C, K))
                w_shape = (K, C // groups, taps, taps)
                w = launch.dense(w_shape, dtype, fmt)
                for q in (
                    choosing.ask_fprop(x, w, None, geometry, "", None, False, gpu, True),
                    choosing.ask_dgrad(y, w, x.shape, fmt, geometry, False, gpu, True),
                    choosing.ask_wgrad(x, y, w_shape, fmt, geometry, False, gpu, True),
                ):
                    found = choosing.candidates(q)
                    assert found[0] == choosing.default_tile(q)
                    assert len(set(found)) == len(found) <= 44
                    assert all(isinstance(tile, StripTile) == (groups > 1) for tile in found)
                    assert {tile.SPLIT_K for tile in found} == {1} or q.operation == "wgrad"
                    assert all(Row.from_dict(*gpu, Row(q.key, tile, "kernels", {}).to_dict()).tile == tile for tile in found)


def test_the_layout_tells_where_channels_are_adjacent(gpu):
    x = launch.dense((2, 3, 4, 4), torch.float16)
    w = launch.dense((8, 3, 1, 1), torch.float16, torch.channels_last)
    question = choosing.ask_fprop(x, w, None, ONE._replace(padding=(0, 0, 0, 0)), "", None, False, gpu, True)
    assert question.key.layout == "NCHW NHWC NHWC"
    assert asdict(question.key.problem)["C"] == 3


@pytest.mark.compiled
def test_where_the_users_tables_lie():
    """In the platform's cache folder; a checkout that was not installed may lack the package that knows it."""

    def folders():
        import sys

        from cnnfast_kernels import tables

        found = [str(tables.user_folder())]
        sys.modules["platformdirs"] = None  # pyright: ignore
        return [*found, str(tables.user_folder())]

    with_package, without = run_compiled(folders)
    assert "cnnfast" in with_package
    assert with_package.endswith("tables")
    assert without.endswith(".cache/cnnfast/tables")
