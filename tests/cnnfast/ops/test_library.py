"""The library's convolution inside our operators: results, gradients, statistics; what traces, checks and reports say
of it.
"""

from __future__ import annotations

import pytest
import torch

import cnnfast
import cnnfast.functional as ours
from cnnfast import reference
from cnnfast.ops import library_convolution
from cnnfast_kernels import questions, tables
from cnnfast_kernels.activations import ACTIVATIONS
from cnnfast_kernels.gather.depthwise.tiles import StripTile
from cnnfast_kernels.tiling import TileConfig
from tests.support.agreement import assert_bits, assert_close, assert_same_strides, exact, integers, normal, run

LAST, NCHW = torch.channels_last, torch.contiguous_format


@pytest.fixture
def library_wins(gpu, monkeypatch):
    """Every convolution has a row, and says that the library is faster."""
    times = {"kernels": 9.0, "library": 4.5}
    monkeypatch.setattr(tables, "find", lambda key: tables.TableRow(key, default(key), "library", times))

    def default(key):
        return StripTile(64, 2, 4) if key.problem.is_depthwise else TileConfig(32, 32, 16, 4, 2)


CONVOLUTIONS = {
    "conv2d": lambda x, w, b: ours.conv2d(x, w, b, 2, 1),
    "groups": lambda x, w, b: ours.conv2d(x, w[:, :2], b, 1, (0, 2), groups=2),
    "depthwise": lambda x, w, b: ours.conv2d(x, w[:4, :1], b[:4], groups=4),
    "transposed": lambda x, w, b: ours.conv_transpose2d(x, w[:4], b[:4], 1, 1),
    "conv1d": lambda x, w, b: ours.conv1d(x[:, :, 0], w[:, :, 0], b, padding=1),
    "rows that no window reaches": lambda x, w, b: ours.conv2d(x, w, b, 3, 1),
    "dilated": lambda x, w, b: ours.conv2d(x, w, b, 1, 2, 2),
    "same, even": lambda x, w, b: ours.conv2d(x, w[..., :2, :], b, padding="same"),
    "same, even, padded at both ends": lambda x, w, b: ours.conv2d(
        x, w[..., :2, :], b, padding="same", dilation=(3, 1)
    ),
    "same, even, depthwise": lambda x, w, b: ours.conv2d(x, w[:4, :1, :2, :2], b[:4], padding="same", groups=4),
    "transposed, output padding": lambda x, w, b: ours.conv_transpose2d(x, w[:4], b[:4], 2, 1, 1),
    "transposed, output padding beyond the stride": lambda x, w, b: ours.conv_transpose2d(
        x, w[:4], b[:4], 2, 0, (2, 0), 1, (3, 1)
    ),
    "transposed, depthwise": lambda x, w, b: ours.conv_transpose2d(x, w[:4, :1], b[:4], 2, 1, 1, 4),
    "transposed, groups": lambda x, w, b: ours.conv_transpose2d(x, w[:4], torch.cat([b, b])[:8], 1, 0, 0, 2),
}


@pytest.mark.parametrize("fmt", [LAST, NCHW], ids=["NHWC", "NCHW"])
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
    with cnnfast.backend("torch"):
        assert_bits(served, exact(CONVOLUTIONS[name], (x, w, b)))
    assert_same_strides(served, by_kernels)


def test_results_in_other_strides_are_laid_out_as_ours(library_first, device, monkeypatch):
    """cuDNN takes float64 in NCHW only, so its results are in NCHW whatever it was given."""
    x, w = (normal(4, 4, 5, 5, seed=seed).to(device, memory_format=LAST) for seed in (0, 1))
    mean, var = normal(4).to(device), torch.ones(4, dtype=torch.float64, device=device)
    calls = [
        lambda x, w: ours.conv2d(x, w, None, 1, 2),
        lambda x, w: ours.conv_transpose2d(x, w, None, 2),
        lambda x, w: ours.conv_bn_act(x, w, mean, var, padding=2),
    ]
    right = [run(call, (x, w)) for call in calls]
    convolution = torch.convolution
    monkeypatch.setattr(torch, "convolution", lambda *arguments: convolution(*arguments).contiguous())
    for call, wanted in zip(calls, right, strict=True):
        found = run(call, (x, w))
        assert "library" in {call.served_by for call in found.trace}
        assert_close(found, wanted)
        assert_same_strides(found, wanted)


@pytest.mark.parametrize("fmt", [LAST, NCHW], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_library_and_one_pass_of_ours(library_first, device, activation, training, residual, fmt):
    """In float64: results, all gradients and strides are those of the plain formulas."""
    x, z = (normal(2, 3, 5, 5, seed=seed).to(device).contiguous(memory_format=fmt) for seed in (0, 1))
    w, b = normal(3, 3, 3, 3, seed=2).to(device).contiguous(memory_format=fmt), normal(3, seed=3).to(device)
    gamma, beta = normal(3, seed=4).to(device), normal(3, seed=5).to(device)
    statistics = {"ours": (normal(3, seed=6).to(device), normal(3, seed=7).to(device).abs() + 0.5)}
    statistics["right"] = tuple(t.clone().cpu() for t in statistics["ours"])

    slopes = normal(3, seed=8) if activation == "prelu" else None

    def fused(functions, whose):
        def call(x, w, b, gamma, beta, z):
            norm, arg = (*statistics[whose], gamma, beta), None if slopes is None else slopes.to(x.device)
            how = {"activation": activation, "activation_arg": arg, "training": training, "padding": 1}
            return functions.conv_bn_act(x, w, *norm, bias=b, residual=z if residual else None, **how)

        return call

    inputs = x, w, b, gamma, beta, z
    frozen = () if residual else (5,)
    served = run(fused(ours, "ours"), inputs, frozen)
    right = run(fused(reference, "right"), [t.cpu() for t in inputs], frozen)
    convolutions = [call for call in served.trace if call.operation.startswith("conv")]
    assert {call.served_by for call in convolutions} == {"library"}
    assert {event.kernel for call in convolutions for event in call.launches} <= {
        "batch_moments_kernel",
        "combine_kernel",
    }
    assert_close(served, right, 1e-9)
    if activation == "relu":
        with cnnfast.backend("kernels"):
            assert_same_strides(served, run(fused(ours, "ours"), inputs, frozen))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("geometry", [{"padding": 1}, {"padding": "same", "groups": 3}], ids=["dense", "depthwise"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "prelu", None], ids=str)
def test_the_library_and_one_pass_without_a_norm(library_first, device, monkeypatch, activation, geometry):
    """The library adds no bias: ours is in the pass that adds and activates. Gradients too, in float64."""
    K, taps = (3, 2) if "groups" in geometry else (4, 3)
    x, w, b = normal(2, 3, 5, 5), normal(K, 3 // geometry.get("groups", 1), taps, taps, seed=1), normal(K, seed=2)
    inputs = [t.to(device) for t in (x, w, b, normal(2, K, 5, 5, seed=3))]
    slopes = normal(K, seed=4) if activation == "prelu" else None

    def fused(functions):
        def call(x, w, b, z):
            how = {"activation": activation, "activation_arg": None if slopes is None else slopes.to(x.device)}
            return functions.conv_act(x, w, b, residual=z, **geometry, **how)

        return call

    biases, convolution = [], torch.convolution
    monkeypatch.setattr(torch, "convolution", lambda *a: biases.append(a[2]) or convolution(*a))
    for frozen in ((), range(4)):
        served = run(fused(ours), inputs, frozen)
        assert_close(served, run(fused(reference), [t.cpu() for t in inputs], frozen), 1e-11)
        convolutions = [call for call in served.trace if call.operation.startswith("conv")]
        assert {call.served_by for call in convolutions} == {"library"}
    assert biases.count(None) == len(biases)
    assert served.trace.launches == ["normalize_kernel"]
    assert served.operations == ["conv_act"]


class Cudnn:
    """Stands in for cuDNN's fused operators, and records how they are called."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(library_convolution, "_has_cudnn", lambda x: True)
        monkeypatch.setattr(torch, "cudnn_convolution_relu", self.relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", self.add_relu)

    def relu(self, x, w, bias, stride, padding, dilation, groups):
        self.calls.append("relu")
        return torch.convolution(x, w, bias, stride, padding, dilation, False, [0, 0], groups).relu()

    def add_relu(self, x, w, z, alpha, bias, stride, padding, dilation, groups):
        self.calls.append("add_relu")
        y = torch.convolution(x, w, bias, stride, padding, dilation, False, [0, 0], groups)
        return (y + alpha * z).relu()


@pytest.mark.parametrize("fmt", [LAST, NCHW], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_cudnns_fused_kernel_serves_relu(library_first, device, monkeypatch, residual, fmt):
    """With and without gradients: one call, and nothing of ours in the forward pass."""
    cudnn = Cudnn(monkeypatch)
    x, w, z = (integers(*size, largest=2, seed=i).to(device).contiguous(memory_format=fmt)
               for i, size in enumerate(((2, 4, 5, 6), (5, 4, 3, 3), (2, 5, 3, 6))))  # fmt: skip
    inputs = [x, w, integers(5, seed=7).to(device), z if residual else None]
    how = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}

    def call(x, w, b, z):
        return ours.conv_act(x, w, b, residual=z, **how)

    served = run(call, inputs)
    assert cudnn.calls == ["add_relu" if residual else "relu"]
    assert_bits(served, exact(lambda x, w, b, z: reference.conv_act(x, w, b, residual=z, **how), inputs))
    (first, *_) = served.trace
    assert (first.operation, first.served_by, first.launches) == ("conv_act", "library", [])


NOT_CUDNNS = {
    "another activation": (lambda x, w, z: ours.conv_act(x, w, padding=1, activation="relu6"), {}),
    "float64": (lambda x, w, z: ours.conv_act(x.double(), w.double(), padding=1), {}),
    "groups": (lambda x, w, z: ours.conv_act(x, w[:, :2], padding=1, groups=2), {}),
    "more padding at one end": (lambda x, w, z: ours.conv_act(x, w[..., :2, :], padding="same"), {}),
    "a residual in another format": (
        lambda x, w, z: ours.conv_act(x, w, padding=1, residual=z.contiguous()), {}
    ),
    "an image in another format": (lambda x, w, z: ours.conv_act(x.contiguous(), w, padding=1), {}),
    "deterministic": (lambda x, w, z: ours.conv_act(x, w, padding=1), {"deterministic": True}),
    "no cuDNN": (lambda x, w, z: ours.conv_act(x, w, padding=1), {"has": False}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("name", NOT_CUDNNS)
def test_what_cudnns_fused_kernel_is_not_asked_for(library_first, device, monkeypatch, name):
    cudnn, (call, settings) = Cudnn(monkeypatch), NOT_CUDNNS[name]
    monkeypatch.setattr(library_convolution, "_has_cudnn", lambda x: settings.get("has", True))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", settings.get("deterministic", False))
    x, w, z = (integers(*size).to(device, memory_format=LAST) for size in ((2, 4, 5, 6), (6, 4, 3, 3), (2, 6, 5, 6)))
    with torch.no_grad(), cnnfast.trace() as trace:
        call(x, w, z)
    assert cudnn.calls == []
    # where all is channels_last, padding that the library does not take is ours
    assert trace.launches[-1] == ("conv_fprop_kernel" if "padding" in name else "normalize_kernel")


def test_running_statistics_where_the_library_serves(library_first, device):
    """They are updated once, with the unbiased variance."""
    x, w = normal(2, 3, 5, 5).to(device, memory_format=LAST), normal(3, 3, 3, 3, seed=1).to(device)
    mine = torch.zeros(3, dtype=torch.float64, device=device), torch.ones(3, dtype=torch.float64, device=device)
    right = tuple(t.clone().cpu() for t in mine)
    ours.conv_bn_act(x, w, *mine, training=True)
    reference.conv_bn_act(x.cpu(), w.cpu(), *right, training=True)
    for got, wanted in zip(mine, right, strict=True):
        torch.testing.assert_close(got.cpu(), wanted)


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


def test_check_judges_our_kernels_all_the_same(library_wins, device, monkeypatch):
    """Who was faster does not say whether ours are right. The library serves again afterwards; the whole model is ours,
    too.
    """

    def refuse(*arguments, **options):
        raise AssertionError("the library serves")

    model, x = (
        torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.MaxPool2d(2)).to(device),
        integers(1, 4, 5, 5).to(device),
    )
    with monkeypatch.context() as patch:
        for name in ("fprop", "dgrad", "wgrad"):
            patch.setattr(library_convolution, name, refuse)
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
    torch.library.opcheck(
        torch.ops.cnnfast.conv_stats.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


class OnGpu(torch.nn.Module):
    """Two convolutions, of which the report is told that they are on a GPU."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(4, 4, 3, padding="same"), torch.nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.second(self.first(x))


def test_a_report_counts_what_is_unmeasured(gpu):
    """In one line, with the call that measures it; a row counts at twice the batch, not at three times, nor of another
    image.
    """
    from cnnfast.conversion import reporting

    model = cnnfast.convert(OnGpu())

    def told(*shape):
        found, _, sizes = reporting._look(model, (torch.zeros(*shape, device="meta"),) if shape else ())
        return list(reporting._unmeasured(model, gpu, found, sizes))

    measures = "cnnfast tune MODEL, or cnnfast.tune(model, *inputs), measures them."
    of = f"convolutions are unmeasured on this GPU ({gpu.name}) for an input of"
    assert told() == [f"2 of 2 {of} 1x4x224x224. {measures}"]
    for taps, pad in ((3, 1), (1, 0)):
        problem = questions.Geometry((1, 1), (pad,) * 4, (1, 1), 1).problem((2, 4, 8, 8), (4, 4, taps, taps))
        key = tables.Key(*gpu, "fprop", "norm relu", "float16", "NHWC NHWC NHWC", problem)
        assert told(4, 4, 8, 8) == [f"{2 if pad else 1} of 2 {of} 4x4x8x8. {measures}"]
        tables.write(*gpu, [tables.TableRow(key, TileConfig(32, 32, 16), "kernels", {})], {})
    assert told(4, 4, 8, 8) == told(1, 4, 8, 8) == []
    assert [len(told(*shape)) for shape in ((6, 4, 8, 8), (2, 4, 9, 8))] == [1, 1]
    assert list(reporting._unmeasured(model, gpu, None, "the model does not take 1x4x224x224")) == [
        f"Which convolutions are unmeasured on this GPU ({gpu.name}) is not known, "
        f"for the model does not take 1x4x224x224. {measures}"
    ]
