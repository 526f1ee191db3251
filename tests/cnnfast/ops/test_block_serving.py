"""Who serves a residual block in training: a row of the block as a whole, and what goes before it."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import cnnfast
import cnnfast.nn as cnn
from cnnfast.ops import block_serving
from cnnfast.ops.block_serving import asked_first, kernels_serve_block
from cnnfast_kernels import launch, tables
from cnnfast_kernels.problem import ConvProblem
from cnnfast_kernels.questions import BlockQuestion
from cnnfast_kernels.tiling import TileConfig
from tests.support.agreement import normal

LAST = torch.channels_last
HALF = torch.float16


def build(bottleneck=False, projection=True, dtype=HALF, device="cpu", width=8) -> nn.Module:
    """A block of x [N, 8, H, W]."""
    cls = cnn.Bottleneck if bottleneck else cnn.BasicBlock
    planes, stride = (width // cls.expansion, 1) if not projection else (8, 2)
    down = None
    if projection:
        out = planes * cls.expansion
        down = nn.Sequential(cnn.Conv2d(width, out, 1, stride, bias=False), cnn.BatchNorm2d(out))
    return cls(width, planes, stride, down).to(device, dtype).to(memory_format=LAST)


def image(n=2, dtype=HALF, device="cpu", size=5) -> torch.Tensor:
    return normal(n, 8, size, size, seed=1).to(device, dtype).contiguous(memory_format=LAST)


def served(block, x) -> set[str]:
    """Who serves its convolutions in a forward pass of training."""
    with cnnfast.trace() as trace:
        block(x.detach().requires_grad_())
    return {call.served_by for call in trace if call.operation in ("conv_stats", "gram_statistics")}


def masks_as_it_computes(block, x) -> bool:
    """Whether gradients come from a block's operator by kernels of ours."""
    with cnnfast.trace() as trace:
        y = block(x.detach().requires_grad_())
        y.backward(torch.ones_like(y))
    return "conv_dgrad_below" in {call.operation for call in trace}


def question(block, x) -> BlockQuestion:
    asked = []
    with asked_first(lambda question, less_memory: asked.append(question)):
        block(x.detach().requires_grad_())
    (found,) = asked
    return found


def planted(winner, *keys: tables.BlockKey) -> None:
    rows = [tables.BlockRow(key, winner, {"kernels": 90.0, "library": 120.0}) for key in keys]
    for row in rows:
        tables.write(row.key.gpu, row.key.arch, [row], {})
    launch.forget_plans()


@pytest.mark.parametrize("winner", ["kernels", "library"])
@pytest.mark.parametrize(("bottleneck", "projection"), [(False, False), (False, True), (True, True)])
def test_a_row_decides(gpu, library_first, device, bottleneck, projection, winner):
    """Forward and backward; without it the library serves."""
    block, x = build(bottleneck, projection, device=device), image(device=device)
    asked = question(block, x)
    assert served(block, x) == {"library"}
    planted(winner, asked.key)
    assert served(block, x) == {winner}
    assert masks_as_it_computes(block, x) == (winner == "kernels")


def test_where_ours_come_first_a_row_of_the_library_does(gpu, device, monkeypatch):
    monkeypatch.setattr(block_serving, "library_comes_first", lambda device: False)
    block, x = build(device=device), image(device=device)
    assert masks_as_it_computes(block, x)
    planted("library", question(block, x).key)
    assert not masks_as_it_computes(block, x)


def test_rows_of_layers_do_not(gpu, library_first, device):
    """Whoever won them."""
    block, x = build(device=device), image(device=device)
    keys = [tables.Key(*gpu, "fprop", "stats", "float16", "NHWC NHWC NHWC", g) for g in question(block, x).key.problems]
    tables.write(*gpu, [tables.TableRow(k, TileConfig(32, 32, 16), "kernels", {"kernels": 1.0}) for k in keys], {})
    launch.forget_plans()
    assert served(block, x) == {"kernels"}
    assert not masks_as_it_computes(block, x)


def test_who_asks_goes_before_rows(gpu, library_first, device):
    block, x = build(device=device), image(device=device)
    planted("library", question(block, x).key)
    assert not masks_as_it_computes(block, x)
    with cnnfast.backend("kernels"):
        assert masks_as_it_computes(block, x)
    assert masks_as_it_computes(cnnfast.convert(block, memory="less"), x)


def test_what_a_row_is_of(gpu, library_first, device):
    block, x = build(device=device), image(device=device)
    key = question(block, x).key
    first = ConvProblem(2, 8, 5, 5, 8, 3, 3, 3, 3, 2, 2, 1, 1)
    second = ConvProblem(2, 8, 3, 3, 8, 3, 3, 3, 3, 1, 1, 1, 1)
    shortcut = ConvProblem(2, 8, 5, 5, 8, 1, 1, 3, 3, 2, 2)
    assert key == tables.BlockKey(*gpu, "float16", "NHWC NHWC NHWC NHWC", True, (first, second, shortcut))
    others = [
        key._replace(gpu="Another GPU"),
        key._replace(arch=80),
        key._replace(dtype="bfloat16"),
        key._replace(layout="NCHW NHWC NHWC NHWC"),
        key._replace(projection=False, problems=(replace(second, H=3), second)),
        key._replace(problems=tuple(replace(g, N=5) for g in key.problems)),
        question(block, image(device=device, size=6)).key,
        question(build(device=device, projection=False), x).key,
    ]
    planted("kernels", *others)
    assert served(block, x) == {"library"}
    planted("kernels", key._replace(problems=tuple(replace(g, N=4) for g in key.problems)))
    assert served(block, x) == {"kernels"}  # a batch twice as large serves


@pytest.mark.parametrize("change", ["dtype", "layout", "tf32"])
def test_questions_tell_apart(gpu, device, change):
    block, x = build(dtype=torch.float32, device=device), image(dtype=torch.float32, device=device)
    plain = question(block, x).key
    if change == "tf32":
        with cnnfast.precision.float32_products("tf32"):
            assert question(block, x).key == plain._replace(dtype="tf32")
    elif change == "dtype":
        assert question(block.half(), x.half()).key == plain._replace(dtype="float16")
    else:
        block.conv2.weight.data = block.conv2.weight.data.contiguous()
        assert question(block, x.contiguous()).key == plain._replace(layout="NCHW NHWC NCHW NHWC")


def test_tables_are_asked_once(gpu, library_first, device, monkeypatch):
    asked, find = [], tables.find_block
    monkeypatch.setattr(tables, "find_block", lambda key: asked.append(key) or find(key))
    block, x = build(device=device), image(device=device)
    for _ in range(3):
        served(block, x)
    assert len(asked) == 1


def no_row(key):
    raise AssertionError("a row was asked")


@pytest.mark.parametrize("first", [False, True], ids=["ours first", "library first"])
def test_where_no_row_is_asked(gpu, device, monkeypatch, first):
    """While torch.compile traces, and for tensors that are none of PyTorch's own classes."""
    monkeypatch.setattr(block_serving, "library_comes_first", lambda device: first)
    monkeypatch.setattr(tables, "find_block", no_row)
    x, w = image(device=device), torch.zeros(8, 8, 3, 3, dtype=HALF, device=device)
    geometry = (1, 1), (1, 1, 1, 1), (1, 1), 1

    class Other(torch.Tensor):
        pass

    for given in ((x.as_subclass(Other), w), (x, w.as_subclass(Other))):
        layers = [(given[0], given[1], geometry)] * 2
        assert kernels_serve_block(given[0], layers, 2, False) is not first
        assert kernels_serve_block(given[0], layers, 2, True)
    monkeypatch.setattr(block_serving, "is_compiling", lambda: True)
    assert kernels_serve_block(x, [(x, w, geometry)] * 2, 2, False) is not first


def test_who_is_asked_first_is_asked_of_this_thread_alone(gpu, library_first, device):
    block, x = build(device=device), image(device=device)
    told, found = [], []
    with asked_first(lambda question, less_memory: told.append(less_memory) or True):
        thread = threading.Thread(target=lambda: found.append(served(block, x)))
        thread.start()
        thread.join()
        assert (told, found) == ([], [{"library"}])
        assert served(block, x) == {"kernels"}
        with asked_first(lambda question, less_memory: False):
            assert served(block, x) == {"library"}
        served(cnnfast.convert(block, memory="less"), x)
    assert told == [False, True]
    assert served(block, x) == {"library"}
