"""Tables of measured tiles: which row serves which convolution, what a file may hold, and who is told of one that
cannot be used.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from cnnfast_kernels import choosing, devices, launch, tables
from cnnfast_kernels.conv import Geometry, conv_dgrad, conv_fprop, conv_stats, conv_wgrad
from cnnfast_kernels.dtypes import KERNEL_DTYPES
from cnnfast_kernels.epilogue import BatchNorm, Epilogue
from cnnfast_kernels.gather.depthwise.tiles import StripTile
from cnnfast_kernels.layout import dense
from cnnfast_kernels.problem import ConvProblem
from cnnfast_kernels.questions import dgrad_question, fprop_question, wgrad_question
from cnnfast_kernels.tables import AnyRow, BlockKey, BlockRow, Key, TableRow
from cnnfast_kernels.tiling import TileConfig, search_tiles, steps_of_loop
from cnnfast_kernels.tma.tiles import BoxTile
from tests.support.agreement import integers
from tests.support.child import IMPORTABLE, run_compiled

TILE = TileConfig(32, 32, 16, 4, 2)
PROBLEM = ConvProblem(8, 16, 14, 14, 32, 3, 3, 14, 14, pad_h=1, pad_w=1)
LAST = "NHWC NHWC NHWC"
ABOUT = {"torch": "2.13.0"}


def row(gpu, problem=PROBLEM, tile=TILE, winner="kernels", **changes) -> TableRow:
    key = Key(*gpu, "fprop", "", "float16", LAST, problem)._replace(**changes)
    return TableRow(key, tile, winner, {"kernels": 9.0, "default": 12.0, "library": 10.0})


# Of a residual block: a branch of a 3x3 convolution and a 1x1 to more channels, with a convolution as its shortcut.
BRANCH = replace(PROBLEM, K=16), replace(PROBLEM, R=1, S=1, pad_h=0, pad_w=0)
SHORTCUT = BRANCH[1]


def block_row(gpu, *problems: ConvProblem, projection=True, winner="kernels") -> BlockRow:
    key = BlockKey(*gpu, "float16", f"{LAST} NHWC", projection, problems or (*BRANCH, SHORTCUT))
    return BlockRow(key, winner, {"kernels": 90.0, "library": 120.0})


def write(gpu, *rows: AnyRow):
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


def test_rows_of_blocks_lie_beside_those_of_layers(gpu):
    rows = row(gpu), block_row(gpu), block_row(gpu, *BRANCH, replace(SHORTCUT, groups=2), winner="library")
    write(gpu, *rows)
    again = block_row(gpu, winner="library")
    file = write(gpu, again)
    assert tables.read(file) == [rows[0], again, rows[2]]
    assert tables.find(rows[0].key) == rows[0]
    assert [tables.find_block(r.key) for r in rows[1:]] == [again, rows[2]]
    assert not tables.was_measured(*gpu, SHORTCUT)  # which is of convolutions by themselves


@pytest.mark.parametrize("batch", [0, 3, 4, 16, 17])
def test_a_blocks_row_serves_batches_up_to_twice_and_half(gpu, batch):
    write(gpu, block_row(gpu))
    found = tables.find_block(block_row(gpu, *(replace(g, N=batch) for g in (*BRANCH, SHORTCUT))).key)
    assert (found is not None) == (4 <= batch <= 16)


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
    serves = {
        N: tables.find(row(gpu, replace(PROBLEM, N=N)).key) for N in (0, 3, 4, 8, 11, 12, 16, 30, 32, 33, 120, 121)
    }
    expected = {0: None, 3: None, 4: 8, 8: 8, 11: 8, 12: 16, 16: 16, 30: 16, 32: 60, 33: 60, 120: 60, 121: None}
    assert {N: None if r is None else r.key.problem.N for N, r in serves.items()} == expected


def test_of_two_as_near_the_smaller_serves(gpu):
    write(gpu, *(row(gpu, replace(PROBLEM, N=N)) for N in (16, 4)))
    found = tables.find(row(gpu).key)
    assert found is not None
    assert found.key.problem.N == 4


def test_the_users_rows_go_before_those_that_come_with_cnnfast(gpu):
    others = row(gpu, tile=replace(TILE, num_stages=3)), row(gpu, replace(PROBLEM, C=32))
    folder = tables.SHIPPED / tables.slug(*gpu)
    folder.mkdir(parents=True)
    for name, other in zip(("resnet50.json", "stem.json"), others, strict=True):
        tables.write(*gpu, [other], ABOUT, folder / name)
    (tables.SHIPPED / "another-gpu-sm_80").mkdir()
    tables.write(
        "Another GPU", 80, [row(("Another GPU", 80))], ABOUT, tables.SHIPPED / "another-gpu-sm_80" / "resnet50.json"
    )
    assert [tables.find(r.key) for r in others] == [*others]
    assert tables.find(row(("Another GPU", 80)).key) is not None
    assert not tables.user_folder().exists()
    mine = row(gpu, replace(PROBLEM, N=5))
    write(gpu, mine)
    assert tables.find(others[0].key) == mine  # its batch is not as near, but it is the user's
    assert tables.find(others[1].key) == others[1]


def test_measuring_again_replaces_and_keeps_the_rest(gpu):
    first, other, again = row(gpu), row(gpu, replace(PROBLEM, C=32)), row(gpu, winner="library")
    write(gpu, first, other)
    assert tables.find(first.key) == first
    assert write(gpu, again) == tables.user_file(*gpu)
    assert tables.find(first.key) == again
    assert tables.find(other.key) == other
    # no half-written ones
    assert [file.name for file in tables.user_folder().iterdir()] == [tables.user_file(*gpu).name]


def test_files_are_named_after_gpus():
    assert tables.slug("NVIDIA H100 80GB HBM3", 90) == "nvidia-h100-80gb-hbm3-sm_90"
    assert tables.user_file("NVIDIA H100 80GB HBM3", 90).name == "nvidia-h100-80gb-hbm3-sm_90.json"


def misplaced(folder) -> list[str]:
    """What is wrong with the tables of a folder that is to be shipped."""
    wrong = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = tables.read(file) if file.suffix == ".json" else []
        homes = {tables.slug(r.key.gpu, r.key.arch) for r in rows}
        head = json.loads(file.read_text()) if rows else {}
        missing = {"driver", "torch", "triton", "cudnn", "commit", "date"} - set(filter(head.get, head))
        if caught or homes != {file.parent.name} or missing:
            wrong.append(f"{file.name}: {[str(w.message) for w in caught]}, of {homes}, without {missing}")
    return wrong


def test_what_comes_with_cnnfast_is_whole_and_in_its_place(gpu, tmp_path):
    """Whatever stands in tables/ is a table of this version, of the GPU that its folder names, and says what it was
    measured with.
    """
    assert misplaced(Path(tables.__file__).parent / "tables") == []
    about = dict.fromkeys(("driver", "torch", "triton", "cudnn", "commit", "date"), "known")
    right, wrong = tmp_path / tables.slug(*gpu), tmp_path / "h200"
    for folder in (right, wrong):
        folder.mkdir()
    tables.write(*gpu, [row(gpu)], about, right / "resnet50.json")
    assert misplaced(tmp_path) == []
    tables.write(*gpu, [row(gpu)], {**about, "driver": ""}, right / "stem.json")
    tables.write(*gpu, [row(gpu)], about, wrong / "resnet50.json")
    (right / "notes.txt").write_text("left behind")
    (right / "old.json").write_text("{}")
    assert {line.partition(":")[0] for line in misplaced(right)} == {"stem.json", "notes.txt", "old.json"}
    assert [line.partition(":")[0] for line in misplaced(wrong)] == ["resnet50.json"]


# ----------------------------------------------------------------------------------------------------------------------
# Written while others write, read, and are killed

WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from cnnfast_kernels import tables
from cnnfast_kernels.problem import ConvProblem
from cnnfast_kernels.tiling import TileConfig

folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tables.user_folder = lambda: folder
print("begins", flush=True)
for C in range(first, first + count):
    key = tables.Key("A GPU", 90, "fprop", "", "float16", "NHWC NHWC NHWC", ConvProblem(8, C, 14, 14, 32, 3, 3, 12, 12))
    tables.write("A GPU", 90, [tables.TableRow(key, TileConfig(32, 32, 16), "kernels", {"kernels": 1.0})], {})
    print(C, flush=True)
"""


def writer(folder, first: int, count: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, IMPORTABLE))}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(first), str(count)], text=True, stdout=PIPE, env=environment
    )


def channels(folder) -> set[int]:
    """Of all rows in a folder's only table. Nothing is wrong with any."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {r.key.problem.C for r in tables.read(folder / "a-gpu-sm_90.json")}


def test_of_two_processes_that_write_at_once_none_loses_the_others_rows(tmp_path):
    writers = [writer(tmp_path, first, 40) for first in (1, 101)]
    assert [process.communicate(timeout=60)[0].split()[-1] for process in writers] == ["40", "140"]
    assert channels(tmp_path) == {*range(1, 41), *range(101, 141)}
    assert [file.name for file in tmp_path.iterdir()] == ["a-gpu-sm_90.json"]


def test_a_writer_waits_for_the_one_that_has_the_lock(gpu):
    file = write(gpu, row(gpu))
    with file.with_name(f"{file.name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=write, args=(gpu, row(gpu, replace(PROBLEM, C=32))))
        thread.start()
        time.sleep(0.3)
        assert tables.read(file) == [row(gpu)]
    thread.join(60)
    assert len(tables.read(file)) == 2


def test_threads_that_write_at_once_lose_nothing(gpu):
    rows = [row(gpu, replace(PROBLEM, C=C)) for C in range(1, 9)]
    threads = [threading.Thread(target=write, args=(gpu, r)) for r in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {r.key for r in tables.read(tables.user_file(*gpu))} == {r.key for r in rows}


def test_a_writer_that_is_killed_leaves_a_whole_table(tmp_path):
    """At any moment: the rows that it had reported are there, and the next writer clears away what it left behind."""
    for attempt in range(8):
        process = writer(tmp_path, 1000 * attempt, 900)
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        time.sleep(0.02 + 0.013 * attempt)
        process.kill()
        said = {int(line) for line in process.communicate(timeout=60)[0].split()}
        assert len(said) < 900
        assert said <= (channels(tmp_path) if said else said)
    writer(tmp_path, 9999, 1).wait(timeout=60)
    assert 9999 in channels(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a-gpu-sm_90.json"]


def test_what_a_killed_writer_was_about_to_do_is_undone(gpu):
    """It had the lock, and half of a new table."""
    file = write(gpu, row(gpu))
    whole = file.read_text()
    file.with_name(f"{file.name}.fresh").write_text(whole[: len(whole) // 2])
    file.with_name(f"{file.name}.lock").touch()
    tables.forget()
    assert tables.find(row(gpu).key) == row(gpu)
    write(gpu, row(gpu, replace(PROBLEM, C=32)))
    assert len(tables.read(file)) == 2
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_an_interrupt_while_a_row_is_written_leaves_the_old_table(gpu, monkeypatch):
    file = write(gpu, row(gpu))

    def interrupted(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(gpu, row(gpu, replace(PROBLEM, C=32)))
    assert tables.read(file) == [row(gpu)]
    write(gpu, row(gpu, replace(PROBLEM, C=64)))  # waits for nobody
    assert len(tables.read(file)) == 2


def test_rows_go_to_another_file_if_it_is_a_table_of_that_gpu(gpu, tmp_path):
    file = tmp_path / "rows.json"
    tables.refuse_foreign(file, *gpu)
    assert tables.write(*gpu, [row(gpu)], {"date": "today"}, file) == file
    tables.refuse_foreign(file, *gpu)
    tables.write(*gpu, [row(gpu, replace(PROBLEM, C=32))], {"date": "tomorrow"}, file)
    assert len(tables.read(file)) == 2
    assert json.loads(file.read_text())["date"] == "tomorrow"
    assert not tables.user_folder().exists()
    with pytest.raises(
        ValueError, match=r"rows\.json holds rows of A GPU, 80 GB by cnnfast .*, and these would be of A GPU by"
    ):
        tables.refuse_foreign(file, "A GPU", 90)
    with pytest.raises(OSError, match=r"cannot be written to .*: No such file or directory"):
        tables.refuse_foreign(tmp_path / "nowhere" / "rows.json", *gpu)
    for text in ("", "# README", "[]", "{}", '{"format": 1}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"rows\.json is there, and is no table of cnnfast"):
            tables.refuse_foreign(file, *gpu)
        assert file.read_text() == text


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit("rows", 0, "kind", "network"), "not of a 'network'"),
        (edit("rows", 0, "kind", "convolution"), "KeyError: 'problem'"),
        (edit("rows", 0, "winner", "nobody"), "nobody"),
        (edit("rows", 0, "projection", 1), "true or false, not 1"),
        (edit("rows", 0, "projection", False), "ValueError: these 3 convolutions make no residual block"),
        (edit("rows", 0, "problems", 1, "C", 8), "make no residual block"),
        (edit("rows", 0, "problems", 2, "N", 4), "make no residual block"),
        (edit("rows", 0, "problems", []), "ValueError"),
        (edit("rows", 0, "problems", 2, "K", -1), "not negative"),
        (edit("rows", 0, "problems", None), "TypeError"),
        (edit("rows", 0, "microseconds", "kernels", "fast"), "fast"),
    ],
)
def test_so_it_is_with_the_row_of_a_block(gpu, change, says):
    file = write(gpu, block_row(gpu), row(gpu))
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    tables.forget()
    with pytest.warns(RuntimeWarning, match=f"1 of 2 rows.*{says}"):
        assert tables.find_block(block_row(gpu).key) is None
    assert tables.find(row(gpu).key) is not None


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
    write(gpu, *(TableRow(key, split[key], "kernels", {}) for key in keys))
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


def questions(gpu, C, K, taps, groups=1, dtype=torch.float16, fmt=torch.channels_last, batch=32, size=28, stride=1):
    """Of the three operations of a convolution."""
    geometry = Geometry((stride, stride), (taps // 2,) * 4, (1, 1), groups)
    out = (size + 2 * (taps // 2) - taps) // stride + 1
    x, y = dense((batch, C, size, size), dtype, fmt), dense((batch, K, out, out), dtype, fmt)
    w_shape = (K, C // groups, taps, taps)
    w = dense(w_shape, dtype, fmt)
    return (
        fprop_question(x, w, geometry, gpu),
        dgrad_question(y, w, x.shape, fmt, geometry, gpu),
        wgrad_question(x, y, w_shape, fmt, geometry, gpu),
    )


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
def test_candidates_are_few_distinct_and_begin_with_the_default(arch):
    gpu = devices.Gpu("A GPU, 80 GB", arch)
    for C, K, taps, groups in ((64, 64, 3, 1), (3, 64, 7, 1), (64, 64, 3, 64), (512, 2048, 1, 1), (64, 128, 3, 2)):
        for dtype in KERNEL_DTYPES:
            for fmt in (torch.channels_last, torch.contiguous_format):
                for q in questions(gpu, C, K, taps, groups, dtype, fmt):
                    found = choosing.candidates(q)
                    assert found[0] == choosing.default_tile(q)
                    assert len(set(found)) == len(found) <= choosing.MOST_CANDIDATES
                    assert all(isinstance(tile, StripTile) == q.problem.is_depthwise for tile in found)
                    assert {tile.SPLIT_K for tile in found} == {1} or q.operation == "wgrad"
                    assert all(
                        TableRow.from_dict(*gpu, TableRow(q.key, tile, "kernels", {}).to_dict()).tile == tile
                        for tile in found
                    )


def test_both_families_and_all_their_shapes_are_among_the_candidates():
    """Half of them are of each family, and none is another stage or split of one while a tile of another shape is left
    out.
    """
    for q in questions(devices.Gpu("A GPU, 80 GB", 90), 256, 256, 3):
        found = choosing.candidates(q)
        assert len(found) == choosing.MOST_CANDIDATES
        assert [sum(isinstance(tile, kind) for tile in found) for kind in (BoxTile, TileConfig)] == [6, 6]
        shapes = {choosing._shape(tile) for tile in found if isinstance(tile, TileConfig)}
        assert shapes == {choosing._shape(tile) for tile in search_tiles(q.problem, q.operation, q.precision)}


def test_what_does_not_matter_for_a_problem_is_no_candidate():
    h200, l40s = devices.Gpu("A GPU, 80 GB", 90), devices.Gpu("Another", 89)

    def gather(gpu, *sizes, operation=0, **how):
        q = questions(gpu, *sizes, **how)[operation]
        return list(search_tiles(q.problem, q.operation, q.precision, arch=gpu.arch))

    # of 64 filters a block of 128 would be half empty, of 96 it would not
    assert {tile.BLOCK_N for tile in gather(h200, 64, 64, 1)} == {32, 64}
    assert {tile.BLOCK_N for tile in gather(h200, 64, 96, 1)} == {32, 64, 128}
    assert {tile.BLOCK_M for tile in gather(h200, 64, 64, 1, batch=1, size=8)} == {64}
    assert {tile.BLOCK_M for tile in gather(h200, 64, 64, 1, operation=2)} == {64}  # wgrad's rows are filters
    # the smallest is there for the smallest problem
    assert gather(h200, 8, 8, 1, batch=1, size=1)
    # two k-steps of 32 channels fill two stages, and 18 of a 3x3 filter fill all
    stages = {taps: {t.num_stages for t in gather(h200, 64, 64, taps) if t.BLOCK_K == 32} for taps in (1, 3)}
    assert stages == {1: {4}, 3: {3, 4}}
    # what sm_90 has room for and sm_89 has not
    large = TileConfig(256, 64, 64, 8, 4)
    assert large in gather(h200, 256, 256, 3)
    assert large not in gather(l40s, 256, 256, 3)
    assert replace(large, num_stages=3) in gather(l40s, 256, 256, 3)
    # boxes of 128 filters, likewise
    for K, widest in ((64, 64), (128, 128)):
        found = choosing.candidates(questions(h200, 64, K, 3)[0])
        assert max(tile.TILE_K for tile in found if isinstance(tile, BoxTile)) == widest


def test_steps_of_a_loop_are_those_of_the_most_taps():
    problem = ConvProblem(1, 64, 28, 28, 128, 3, 3, 14, 14, 2, 2, 1, 1)
    tile = TileConfig(64, 64, 32)
    assert steps_of_loop(problem, "fprop", tile) == 9 * 2
    assert steps_of_loop(problem, "dgrad", tile) == 4 * 4  # pixels that 2x2 of the taps reach at a stride of 2
    assert steps_of_loop(problem, "wgrad", replace(tile, SPLIT_K=2)) == 4  # 196 pixels, 7 steps, in two parts
    assert steps_of_loop(replace(problem, C=3), "fprop", tile) == 1  # 27 taps and channels in a row


def test_the_layout_tells_where_channels_are_adjacent(gpu):
    x = dense((2, 3, 4, 4), torch.float16)
    w = dense((8, 3, 1, 1), torch.float16, torch.channels_last)
    question = fprop_question(x, w, ONE._replace(padding=(0, 0, 0, 0)), gpu)
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
