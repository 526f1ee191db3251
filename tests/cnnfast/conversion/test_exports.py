"""A converted model is handed to what writes models down: TorchScript, ONNX, torch.package, another process."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import torch.multiprocessing  # its reductions of tensors, for ForkingPickler
from torch import Tensor, nn
from torch.package import PackageExporter, PackageImporter
from torch.package.package_exporter import PackagingError

import cnnfast
import cnnfast.nn as cnn
from tests.support.blocks import CHANNELS, CONVOLUTIONS, Block, Net, build, image
from tests.support.steps import fusions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")

# ----------------------------------------------------------------------------------------------------------------------
# torch.jit.script


class OwnConv2d(nn.Conv2d):
    pass


class Passing(nn.Module):
    """Not fused, and none of ours but for what is in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def emptied() -> nn.Module:
    """A container that was fused, in which nothing of ours is left."""
    model = cnnfast.convert(
        build(lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    )
    model._modules["0"], model._modules["1"] = (
        nn.Conv2d(CHANNELS, CHANNELS, 1).double(),
        nn.BatchNorm2d(CHANNELS).double(),
    )
    return model.eval()


REVERTED: dict[str, Callable[[], nn.Module]] = {
    "Conv2d": lambda: cnnfast.convert(nn.Conv2d(CHANNELS, CHANNELS, 3)),
    "ConvTranspose2d": lambda: cnnfast.convert(nn.ConvTranspose2d(CHANNELS, CHANNELS, 3)),
    "BatchNorm2d": lambda: cnnfast.convert(nn.BatchNorm2d(CHANNELS)),
    "MaxPool2d": lambda: cnnfast.convert(nn.MaxPool2d(2)),
    "AvgPool2d": lambda: cnnfast.convert(nn.AvgPool2d(2)),
    "AdaptiveAvgPool2d": lambda: cnnfast.convert(nn.AdaptiveAvgPool2d(2)),
    "a layer of cnnfast.nn": lambda: cnn.Conv2d(CHANNELS, CHANNELS, 3),
    "a subclass": lambda: cnnfast.convert(OwnConv2d(CHANNELS, CHANNELS, 3)),
    "a fused container": lambda: cnnfast.convert(Block()),
    "a child": lambda: Passing(nn.Sequential(nn.ReLU(), cnnfast.convert(nn.Conv2d(CHANNELS, CHANNELS, 3)))),
    "a fused child": lambda: Passing(
        Passing(cnnfast.convert(nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS))))
    ),
    "nothing left": emptied,
}
KEPT: dict[str, Callable[[], nn.Module]] = {
    "GlobalAvgPool2d": cnn.GlobalAvgPool2d,
    "ConvBNAct": lambda: cnn.ConvBNAct(CHANNELS, CHANNELS, 3, activation="silu"),
    "BasicBlock": lambda: cnn.BasicBlock(CHANNELS, CHANNELS),
    "Bottleneck": lambda: cnn.Bottleneck(CHANNELS, 1),
    "a child": lambda: Passing(nn.Sequential(nn.ReLU(), cnn.BasicBlock(CHANNELS, CHANNELS))),
    "a model": lambda: cnnfast.models.ResNet(cnn.BasicBlock, (1, 1, 1, 1), num_classes=2, in_channels=CHANNELS),
}


@pytest.mark.parametrize("kind", REVERTED)
def test_scripting_says_to_revert(kind, quick):
    """And reverted it is scripted, to the same numbers; what failed is as it was."""
    model, x = build(REVERTED[kind], quick), image().to(quick)
    kinds, y = [type(m) for m in model.modules()], model(x)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script\(cnnfast\.revert\(model\)\)"):
        torch.jit.script(model)
    assert [type(m) for m in model.modules()] == kinds
    scripted = torch.jit.script(cnnfast.revert(model))
    torch.testing.assert_close(scripted(x), y)


@pytest.mark.parametrize("kind", KEPT)
def test_scripting_says_to_trace(kind, quick):
    """What revert does not change; traced as it says, it is PyTorch's operators."""
    model, x = build(KEPT[kind], quick), image().to(quick)
    for tree in (model, cnnfast.revert(model)):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace\(model, inputs\)"):
            torch.jit.script(tree)
    traced = torch.jit.trace(model, (x,))
    assert "cnnfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))


# ----------------------------------------------------------------------------------------------------------------------
# torch.jit.trace: on the operators themselves, which it could record

TRACED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (1, 2, 6), (2, 2, 9)),
    "same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (1, 2, 5, 5), (2, 2, 6, 4)),
    "reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 5, 5), (2, 2, 6, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), (1, 2, 3, 3), (2, 2, 2, 4)),
    "norm": (lambda: nn.BatchNorm2d(2), (2, 2, 5, 5), (2, 2, 6, 4)),
    "max_pool": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (1, 2, 5, 5), (2, 2, 8, 6)),
    "avg_pool": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (1, 2, 5, 5), (2, 2, 8, 6)),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (1, 2, 5, 5), (2, 2, 8, 6)),
    "global": (cnn.GlobalAvgPool2d, (1, 2, 5, 5), (2, 2, 8, 6)),
    "residual": (Block, (1, CHANNELS, 4, 4), (2, CHANNELS, 5, 3)),
    "ours": (lambda: cnn.BasicBlock(CHANNELS, CHANNELS), (1, CHANNELS, 4, 4), (2, CHANNELS, 5, 3)),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("kind", TRACED)
def test_a_trace_is_pytorchs_and_for_every_size(kind, training, device):
    """Results, gradients and statistics at other sizes than the example's; the file can be read without cnnfast."""
    make, size, other = TRACED[kind]
    model = build(make, device).train(training)
    example, x = (torch.randn(s, dtype=torch.float64).to(device) for s in (size, other))
    state = copy.deepcopy(model.state_dict())
    ours = cnnfast.convert(copy.deepcopy(model))
    with cnnfast.trace() as trace:
        traced = torch.jit.trace(ours, (example,), check_trace=False)
    assert {(call.served_by, call.reason) for call in trace} == {("torch", "torch.jit.trace is recording")}
    assert "cnnfast::" not in str(traced.inlined_graph)
    ours.load_state_dict(state)
    left = []
    for tree in (traced, model):
        leaf = x.clone().requires_grad_()
        y = tree(leaf)
        y.square().sum().backward()
        left.append([y, leaf.grad, *(p.grad for p in tree.parameters()), *tree.buffers()])
    torch.testing.assert_close(*left, rtol=1e-9, atol=1e-9)


def test_a_trace_is_frozen_saved_and_loaded(net, x):
    net.requires_grad_(False)
    traced = torch.jit.trace(cnnfast.convert(net), (x,)).eval()
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for other in (torch.jit.freeze(traced), torch.jit.optimize_for_inference(traced), torch.jit.load(file)):
        torch.testing.assert_close(other(x), net(x), rtol=1e-10, atol=1e-10)


def test_a_trace_is_refused_where_kernels_have_to_serve(net, x):
    with cnnfast.backend("kernels"), pytest.raises(RuntimeError, match=r"torch\.jit\.trace is recording"):
        torch.jit.trace(cnnfast.convert(net), (x,))


# ----------------------------------------------------------------------------------------------------------------------
# ONNX


@pytest.fixture
def not_pretended(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("pretend_gpu"):
        pytest.skip("pretended GPU: tensors are made below where it sees them")


@pytest.mark.cpu_tensors
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("make", [Net, KEPT["ConvBNAct"], KEPT["BasicBlock"]], ids=["Net", "ConvBNAct", "BasicBlock"])
def test_onnx(make, dynamo, tmp_path: Path, not_pretended):
    """Both exporters translate PyTorch's operators only: it serves while they run, and a converted model is exported as
    it is.
    """
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = build(make).float()
    ours, x = cnnfast.convert(model), image(3 if make is Net else CHANNELS, 9).float()
    file = tmp_path / "model.onnx"
    with torch.no_grad(), cnnfast.trace() as before:
        right = ours(x)
    with warnings.catch_warnings(), cnnfast.trace() as trace:
        warnings.simplefilter("ignore")
        torch.onnx.export(ours, (x,), file, dynamo=dynamo, verbose=False)
    reason = "the model is being exported to ONNX" if dynamo else "torch.jit.trace is recording"
    assert {call.served_by for call in trace} == {"torch"}
    assert {call.reason for call in trace} <= {reason, *(call.reason for call in before if call.served_by == "torch")}
    session = runtime.InferenceSession(file)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), right, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), cnnfast.trace() as after:
        torch.testing.assert_close(ours(x), right, rtol=0, atol=0)
    assert list(map(str, after)) == list(map(str, before))


# ----------------------------------------------------------------------------------------------------------------------
# torch.package, processes


def test_package(net, x, tmp_path: Path, not_pretended):
    """Without a rule for cnnfast PyTorch says what is missing; with it the model is read back, as fused."""
    ours = cnnfast.convert(net)
    for packages in (("torch.**",), ("torch.**", "cnnfast.**", "cnnfast")):
        file = tmp_path / "model.pt"
        exporter = PackageExporter(file)
        exporter.extern([*packages, "tests.**"])
        exporter.save_pickle("model", "model.pkl", ours)
        if len(packages) == 1:
            with pytest.raises(PackagingError, match=r"cnnfast\.conversion"):
                exporter.close()
            continue
        exporter.close()
        loaded = PackageImporter(file).load_pickle("model", "model.pkl").to(x.device)
        with torch.no_grad(), cnnfast.trace() as trace:
            torch.testing.assert_close(loaded(x), net(x))
        assert fusions(trace) == CONVOLUTIONS


def test_sent_to_a_process(net, x):
    """As torch.multiprocessing sends it: tensors in shared memory, and the receiver's model is as fused."""
    ours = cnnfast.convert(net).requires_grad_(False)
    ours.share_memory()
    received = pickle.loads(ForkingPickler.dumps(ours))
    assert all(t.is_shared() for t in received.parameters())
    with torch.no_grad(), cnnfast.trace() as trace:
        torch.testing.assert_close(received(x), net(x))
    assert fusions(trace) == CONVOLUTIONS
