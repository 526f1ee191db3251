"""Where a measured row says that the library is faster: what serves, and what traces, checks and reports say of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import cnnfast
import cnnfast.functional as ours
from agreement import assert_bits, assert_same_strides, exact, integers, run
from cnnfast.ops import library
from cnnfast_kernels import choosing, launch, tables
from cnnfast_kernels.tiling import StripTile, TileConfig

LAST = torch.channels_last


@pytest.fixture
def library_wins(gpu, monkeypatch):
    """Every convolution has a row, and says that the library is faster."""
    times = {"kernels": 9.0, "library": 4.5}
    monkeypatch.setattr(tables, "find", lambda key: tables.Row(key, default(key), "library", times))
    monkeypatch.setattr(tables, "library", True)

    def default(key):
        return StripTile(64, 2, 4) if key.problem.is_depthwise else TileConfig(32, 32, 16, 4, 2)


CONVOLUTIONS = {
    "conv2d": lambda x, w, b: ours.conv2d(x, w, b, 2, 1),
    "groups": lambda x, w, b: ours.conv2d(x, w[:, :2], b, 1, (0, 2), groups=2),
    "depthwise": lambda x, w, b: ours.conv2d(x, w[:4, :1], b[:4], groups=4),
    "transposed": lambda x, w, b: ours.conv_transpose2d(x, w[:4], b[:4], 1, 1),
    "conv1d": lambda x, w, b: ours.conv1d(x[:, :, 0], w[:, :, 0], b, padding=1),
}


@pytest.mark.parametrize("fmt", [LAST, torch.contiguous_format], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_library_gives_the_same_bits_strides_and_gradients(library_wins, device, name, fmt):
    x = integers(2, 4, 6, 7).to(device).contiguous(memory_format=fmt)
    w, b = integers(8, 4, 3, 3, seed=1).to(device).contiguous(memory_format=fmt), integers(8, seed=2).to(device)
    served = run(CONVOLUTIONS[name], (x, w, b))
    with cnnfast.backend("kernels"):
        by_kernels = run(CONVOLUTIONS[name], (x, w, b))
    convolutions = [call for call in served.trace if call.operation.startswith("conv")]
    assert {call.served_by for call in convolutions} == {"library"}
    assert {call.served_by for call in by_kernels.trace} == {"kernels"}
    assert_bits(served, exact(CONVOLUTIONS[name], (x, w, b)))
    assert_same_strides(served, by_kernels)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_the_library_serves_the_fused_forms(library_wins, device, training):
    """Batch norm, residual and activation are then ours."""
    x, z = (integers(2, 4, 6, 6, seed=seed).to(device, memory_format=LAST) for seed in (0, 1))
    w, mean, var = integers(4, 4, 3, 3, seed=2).to(device), integers(4, seed=3).to(device), torch.ones(4, device=device)

    def fused():
        return ours.conv_bn_act(x, w, mean.clone(), var.clone(), residual=z, padding=1, training=training)

    with cnnfast.trace() as calls:
        y = fused()
    with cnnfast.backend("kernels"):
        right = fused()
    torch.testing.assert_close(y, right)
    assert y.stride() == right.stride()
    (call,) = [call for call in calls if call.operation in ("conv_bn_act", "conv_stats")]
    kernel = "batch_moments_kernel" if training else "normalize_kernel"
    assert call.served_by == "library"
    assert f"library + {kernel}" in str(call)
    assert "because it took 4.5 us, our best kernel 9.0 us at batch 2 when measured on this GPU" in str(call)


def test_the_library_serves_nothing_it_was_not_asked_for(library_wins, device):
    x, w = integers(2, 4, 6, 6).to(device), integers(4, 4, 2, 2).to(device)
    for algorithm in ("direct", "im2col"):
        with cnnfast.trace() as calls:
            ours.conv2d(x, w, algorithm=algorithm)
        assert [call.served_by for call in calls] == ["kernels"]
    with cnnfast.trace() as calls:
        ours.conv2d(x, w, padding="same")  # one more at the end than before: the library pads both alike
    assert [call.served_by for call in calls] == ["kernels"]


def test_check_judges_our_kernels_all_the_same(library_wins, device, monkeypatch):
    """Who was faster does not say whether ours are right. The library serves again afterwards; the whole model is ours, too."""

    def refuse(*arguments, **options):
        raise AssertionError("the library serves")

    model, x = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.MaxPool2d(2)).to(device), integers(1, 4, 5, 5).to(device)
    with monkeypatch.context() as patch:
        for name in ("fprop", "dgrad", "wgrad"):
            patch.setattr(library, name, refuse)
        report = cnnfast.check(model, x)
    assert report.ok, str(report)
    conv = report.rows[0]
    assert "conv_fprop_kernel" in conv.forward[0]
    assert {name.split()[0] for name in conv.backward} >= {"conv_dgrad_kernel", "conv_wgrad_kernel"}
    for row in report.whole[1:]:
        assert any("conv_fprop_kernel" in name for name in row.forward)
    with cnnfast.trace() as calls:
        ours.conv2d(x, integers(4, 4, 3, 3).to(device))
    assert [call.served_by for call in calls] == ["library"]


def test_operators_pass_opcheck_where_the_library_serves(library_wins, device):
    x = integers(2, 4, 6, 6).to(device, memory_format=LAST).requires_grad_()
    w = integers(8, 4, 3, 3).to(device).requires_grad_()
    arguments = (x, w, None, (1, 1), (1, 1, 1, 1), (1, 1), 1, "auto")
    torch.library.opcheck(torch.ops.cnnfast.conv_fprop.default, arguments)
    torch.library.opcheck(torch.ops.cnnfast.conv_stats.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_on_a_gpu_a_trace_tells_what_was_not_measured():
    geometry, on_gpu = choosing.Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1), SimpleNamespace(is_cuda=True)
    with cnnfast.trace() as calls:
        calls.enter(cnnfast.dispatch.Call("conv_fprop", ((1, 1, 1, 1),), "float16", "kernels"))
        assert not library.wins(None, geometry, on_gpu)
        calls.leave()
    assert str(calls).endswith("(unmeasured: run cnnfast tune)")


def test_a_report_tells_that_nothing_was_measured(gpu, monkeypatch):
    from cnnfast.conversion import reporting

    weight = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(launch, "gpu", lambda device: gpu)
    assert reporting._unmeasured(weight) == f"unmeasured: run cnnfast tune. No convolution was measured on this GPU ({gpu.name})."
    tables.write(*gpu, [tables.Row(tables.Key(*gpu, "fprop", "", "float16", "", PROBLEM), TileConfig(32, 32, 16), "kernels", {})], {})
    assert reporting._unmeasured(weight) == ""


PROBLEM = choosing.Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1).problem((1, 4, 4, 4), (4, 4, 1, 1))
