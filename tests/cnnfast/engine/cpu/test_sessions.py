"""A graph run by onnxruntime, against the same graph in plain PyTorch."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from cnnfast.engine import operators
from cnnfast.engine.capturing.capture import capture
from cnnfast.engine.cpu import sessions
from cnnfast.engine.folding.folding import fold
from cnnfast.engine.graph import Graph
from tests.support.agreement import integers
from tests.support.child import run_compiled
from tests.support.graphs import written

onnx = pytest.importorskip("onnx", reason="onnxruntime reads ONNX")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is what is tested")

aten = torch.ops.aten
SHAPE = (2, 3, 8, 9)


def block() -> Graph:
    """Two convolutions, a maximum and a global average, of small integers."""

    def function(c, x):
        y = aten.relu.default(aten.conv2d.default(x, c.w, c.b, [1, 1], [1, 1]))
        z = aten.add.Tensor(aten.conv2d.default(y, c.w2, None, [1, 1], [1, 1]), x)
        return aten.relu.default(z), aten.max_pool2d.default(y, [2, 2])

    weights = {"w": integers(16, 3, 3, 3), "w2": integers(3, 16, 3, 3, seed=1), "b": integers(16, seed=2)}
    return written(function, (None, 3, 8, 9), **weights)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return block()


@pytest.fixture(scope="module")
def session(graph: Graph) -> sessions.OnnxSession:
    return sessions.build(graph, [SHAPE])  # type: ignore[return-value]


def equal(ys: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return len(ys) == len(expected) and all(torch.equal(y, e) for y, e in zip(ys, expected, strict=True))


def test_a_whole_network(torchvision):
    model = torchvision.models.resnet18(weights=None).eval()
    graph = fold(capture(model, (torch.randn(2, 3, 64, 64),), sizes=False).graph, torch.float32)
    session = sessions.build(graph, [(2, 3, 64, 64)])
    for batch in (3, 1):
        x = torch.randn(batch, 3, 64, 64)
        (y,) = session([x])
        torch.testing.assert_close(y, graph.run([x])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
def test_any_batch(graph, session, batch):
    x = integers(batch, *SHAPE[1:])
    assert equal(session([x]), graph.run([x]))


INPUTS = {
    "channels_last": lambda: integers(*SHAPE).contiguous(memory_format=torch.channels_last),
    "a view with strides": lambda: integers(2, 3, 16, 18)[:, :, ::2, 1::2],
    "expanded": lambda: integers(1, 3, 8, 9).expand(SHAPE),
    "wants a gradient": lambda: integers(*SHAPE).requires_grad_(),
    "of another dtype": lambda: integers(*SHAPE, dtype=torch.float64),
    "negated lazily": lambda: torch._neg_view(integers(*SHAPE)),
    "made in inference_mode": lambda: _in_inference_mode(),
}


def _in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return integers(*SHAPE)


@pytest.mark.parametrize("kind", INPUTS)
def test_any_input(graph, session, kind):
    x = INPUTS[kind]()
    before = x.detach().clone()
    assert equal(session([x]), graph.run([x.detach().float().contiguous()]))
    assert torch.equal(x.detach(), before)


def test_results_belong_to_the_caller(session):
    """No later call writes into them, and they live on without the session."""
    own = sessions.build(block(), [SHAPE])
    ys = own([integers(*SHAPE)])
    before = [y.clone() for y in ys]
    own([integers(*SHAPE, seed=5)])
    del own
    gc.collect()
    session([integers(*SHAPE, seed=6)])
    assert equal(ys, tuple(before))
    ys[0].add_(1)  # and may be written into


def test_a_result_that_is_an_input_a_constant_or_a_result_twice():
    graph = written(lambda c, x: (x, c.k, x * 2, aten.reshape.default(x, [-1, 4])), (None, 4), k=integers(3))
    graph.calls.output_node().args = ((*graph.results, graph.results[2]),)
    for node in graph.calls.nodes:
        if node.op == "call_function" and node.target is not aten.reshape.default:
            node.target = aten.mul.Tensor
    x = integers(5, 4)
    ys = sessions.build(graph, [(2, 4)])([x])
    assert equal(ys, graph.run([x]))
    assert len({y.data_ptr() for y in ys} | {x.data_ptr(), graph.constants["k"].data_ptr()}) == len(ys) + 2


def test_the_session_keeps_what_it_reads():
    """Constants that were made for it, too: a weight that is turned, weights of the identity's."""

    def function(c, x):
        return aten.matmul.default(aten.linear.default(x, c.w), c.m), aten.adaptive_avg_pool2d.default(x, [5, 7])

    graph = written(function, (None, 3, 33, 65), w=integers(48, 65), m=integers(48, 64))
    x = integers(2, 3, 33, 65)
    expected = graph.run([x])
    session = sessions.build(graph, [x.shape])
    graph.constants.clear()
    gc.collect()
    poison = [torch.full((size,), float("nan")) for size in (48 * 65, 48 * 64, 33 * 5, 65 * 7) for _ in range(20)]
    ys = session([x])
    del poison
    assert torch.equal(ys[0], expected[0])
    torch.testing.assert_close(ys[1], expected[1])


def test_several_threads_at_once(graph, session):
    inputs = [integers(1 + i % 3, *SHAPE[1:], seed=i) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: session([x]), inputs))
    assert all(equal(ys, graph.run([x])) for ys, x in zip(found, inputs, strict=True))


def test_threads_are_torchs(graph):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        session = sessions.build(graph, [SHAPE])
    finally:
        torch.set_num_threads(before)
    options = session._session.get_session_options()  # type: ignore[attr-defined]
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_who_serves_each_step(graph, session):
    steps = [node.name for node in graph.calls.nodes if node.op == "call_function"]
    assert session.served_by() == dict.fromkeys(steps, "onnxruntime")


def test_a_profile_names_the_steps(monkeypatch, tmp_path):
    """A fused step under the first of its calls; what onnxruntime adds, under its own name. No file stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shape = (2, 16, 64, 64)

    def function(c, x):
        arguments = x, c.w, None, x, (1, 1), (1, 1), (1, 1), 1, "relu", ()
        y = x.tracer.create_proxy("call_function", operators.convolution, arguments, {}, "stem")
        gate = aten.sigmoid.default(aten.mean.dim(y, [2, 3], True))
        return aten.conv2d.default(aten.mul.Tensor(y, gate), c.w, None, [1, 1], [1, 1])

    graph = written(function, (None, *shape[1:]), w=integers(16, 16, 3, 3))
    session = sessions.build(graph, [shape])
    seconds = session.profile([integers(*shape)])
    assert seconds.keys() - {"(onnxruntime)"} == session.served_by().keys()
    timed = {step for step, s in seconds.items() if 0 < s < 1}
    assert {"stem", "conv2d_default", "mul_tensor", "(onnxruntime)"} <= timed, seconds
    assert list(tmp_path.rglob("*.json")) == []


def test_available(graph, monkeypatch):
    assert sessions.available(graph) == ""
    half = written(
        lambda c, x: aten.conv2d.default(x, c.w), (None, 3, 8, 8), dtype=torch.bfloat16, w=integers(1, 3, 1, 1)
    )
    assert "bfloat16" in sessions.available(half)
    other = written(lambda c, x: aten.erfc.default(x), (None, 3))
    assert sessions.available(other) == "no form in ONNX for aten.erfc.default"
    find = importlib.util.find_spec
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, p=package: None if name == p else find(name))
        assert sessions.available(graph) == f"{package} is not installed (pip install '.[cpu]')"


def test_nothing_of_onnx_is_imported_before_it_is_used():
    def imported() -> list[str]:
        import sys

        import cnnfast.engine  # noqa: F401

        return sorted({name.partition(".")[0] for name in sys.modules} & {"onnx", "onnxruntime"})

    assert run_compiled(imported) == []


def test_sizes_that_the_batch_changes_are_computed_in_the_model():
    """A batch that is folded into channels and out again, as video networks do."""

    def function(c, x):
        n = aten.sym_size.int(x, 0)
        y = aten.reshape.default(x, [n // 2, 2, 3, 8, 9])
        z = aten.cat.default([aten.slice.Tensor(y, 1, 1, 2), aten.slice.Tensor(y, 1, 0, 1)], 1)
        return aten.reshape.default(z, [n, 3, 8, 9])

    graph = written(function, (None, 3, 8, 9))
    session = sessions.build(graph, [(2, 3, 8, 9)])
    for batch in (2, 6):
        x = integers(batch, 3, 8, 9)
        assert equal(session([x]), graph.run([x]))
