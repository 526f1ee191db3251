"""What a graph looks like as an ONNX model, and what cannot be one. test_onnx_operators.py runs the operators."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
import torch

from cnnfast.engine import operators
from cnnfast.engine.cpu import onnx_graph
from cnnfast.engine.cpu.onnx_graph import NoOnnxForm, save, to_onnx
from cnnfast.engine.folding.folding import fold
from tests.support.agreement import integers, normal
from tests.support.graphs import in_float64, written

onnx = pytest.importorskip("onnx", reason="onnx holds the models that are tested")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime runs what is tested")

aten = torch.ops.aten


def convolution_and_sum():
    def function(c, x, y):
        z = aten.relu.default(aten.conv2d.default(x, c.w, c.b))
        return aten.add.Tensor(z, y), aten.mean.dim(z, [2, 3])

    return written(function, (None, 3, 8, 8), (None, 4, 6, 6), w=integers(4, 3, 3, 3), b=integers(4, seed=1))


def declared(values) -> dict[str, list]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def run(model, *inputs: torch.Tensor) -> list[torch.Tensor]:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    given = {one.name: x.numpy() for one, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, given)]


def test_versions_names_and_sizes():
    model = to_onnx(convolution_and_sum(), [(1, 3, 8, 8), (1, 4, 6, 6)])
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (9, [("", 20)])
    assert declared(model.graph.input) == {"input_0": ["N", 3, 8, 8], "input_1": ["N", 4, 6, 6]}
    assert declared(model.graph.output) == {"result_0": ["N", 4, 6, 6], "result_1": ["N", 4]}
    assert [i.name for i in model.graph.initializer][:2] == ["w", "b"]


def test_names_that_are_given():
    graph, shapes = convolution_and_sum(), [(2, 3, 8, 8), (2, 4, 6, 6)]
    model = to_onnx(graph, shapes, ["image", "beside"], ["sum", "w"])
    assert list(declared(model.graph.input)) == ["image", "beside"]
    assert list(declared(model.graph.output)) == ["sum", "w"]
    x, y = integers(*shapes[0]), integers(*shapes[1])
    assert torch.equal(run(model, x, y)[0], graph.run([x, y])[0])  # although a constant is named w, too
    with pytest.raises(ValueError, match="names for 1 inputs and 2 results; the graph has 2 and 2"):
        to_onnx(graph, shapes, ["image"])
    with pytest.raises(ValueError, match="two inputs or results are named 'image'"):
        to_onnx(graph, shapes, ["image", "image"])


def test_each_node_begins_with_the_name_of_its_call():
    graph = convolution_and_sum()
    calls = {node.name for node in graph.calls.nodes if node.op == "call_function"}
    nodes = to_onnx(graph, [(1, 3, 8, 8), (1, 4, 6, 6)]).graph.node
    assert {node.name.partition("/")[0] for node in nodes} == calls
    assert len({node.name for node in nodes}) == len(nodes)
    assert "conv2d_default/Conv" in {node.name for node in nodes}


def test_a_batch_that_is_fixed_stays_so():
    graph = written(lambda c, x: aten.relu.default(x), (2, 3))
    assert declared(to_onnx(graph, [(2, 3)]).graph.input) == {"input": [2, 3]}


def test_a_result_of_another_size_than_the_batch_is_not_called_so():
    graph = written(lambda c, x: aten.reshape.default(x, [-1, 2]), (None, 4))
    (result,) = to_onnx(graph, [(1, 4)]).graph.output
    assert result.type.tensor_type.shape.dim[0].dim_param == ""
    assert not result.type.tensor_type.shape.dim[0].HasField("dim_value")


def test_constants_stand_once():
    """Those in the same memory, and equal numbers; none that no node reads."""

    def function(c, x):
        y = aten.linear.default(aten.linear.default(x, c.w), c.tied)
        return aten.add.Tensor(aten.mul.Tensor(aten.conv1d.default(y, c.k, c.zero), 3.0), 3.0)

    w = integers(5, 5)
    graph = written(function, (None, 2, 5), w=w, tied=w, k=integers(2, 2, 1), zero=torch.zeros(2), unused=integers(9))
    model = to_onnx(graph, [(1, 2, 5)])
    sizes = Counter(tuple(i.dims) for i in model.graph.initializer)
    assert sizes == {(5, 5): 1, (2, 2, 1): 1, (): 1}, "the weight turned, once; no bias of zeros"


def test_batch_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one batch size between them"):
        to_onnx(convolution_and_sum(), [(1, 3, 8, 8), (2, 4, 6, 6)])


def test_all_that_has_no_form_is_named_at_once():
    def function(c, x):
        y = aten.erfc.default(aten.relu.default(x))
        z = aten.softplus.default(aten.chunk.default(y, 2, 0)[0], 1, 2)
        return aten.erfc.default(aten.cumprod.default(z, 1))

    graph = written(function, (None, 4))
    with pytest.raises(NoOnnxForm) as raised:
        to_onnx(graph, [(1, 4)])
    message = str(raised.value)
    assert message.startswith("no form in ONNX for ")
    for part in ("aten.erfc.default (erfc_default, erfc_default_1)", "aten.cumprod.default", "a split of the batch"):
        assert part in message
    assert "softplus with beta=1 and threshold=2" in message


def test_a_graph_that_cannot_have_a_free_batch():
    parts = written(lambda c, x: aten.split.Tensor(x, 1, 0)[0], (None, 4))
    with pytest.raises(NoOnnxForm, match="as many results as the batch is large"):
        to_onnx(parts, [(2, 4)])
    four = written(lambda c, x: aten.reshape.default(x, [4, 4]), (None, 4))
    with pytest.raises(NoOnnxForm, match="a batch that is free: with 96 images it fails"):
        to_onnx(four, [(4, 4)])


def test_a_model_is_saved(tmp_path):
    graph = convolution_and_sum()
    inputs = [integers(3, 3, 8, 8), integers(3, 4, 6, 6)]
    model = to_onnx(graph, [x.shape for x in inputs])
    save(model, tmp_path / "model.onnx")
    save(model, tmp_path / "apart.onnx", external_data=True)
    for file in ("model.onnx", "apart.onnx"):
        read = onnx.load(tmp_path / file)
        assert all(torch.equal(y, e) for y, e in zip(run(read, *inputs), graph.run(inputs), strict=True))


def test_external_data_lies_beside_the_model(tmp_path):
    graph = written(lambda c, x: aten.linear.default(x, c.w), (None, 64), w=normal(64, 64, dtype=torch.float32))
    model = to_onnx(graph, [(1, 64)])
    before = model.SerializeToString()
    save(model, tmp_path / "model.onnx", external_data=True)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert (tmp_path / "model.onnx").stat().st_size < 1000 < (tmp_path / "model.onnx.data").stat().st_size
    assert model.SerializeToString() == before, "the model that was handed over is as it was"


def test_more_than_one_file_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 100)
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"model\.onnx: .* pass external_data=True"):
        save(to_onnx(convolution_and_sum(), [(1, 3, 8, 8), (1, 4, 6, 6)]), path)
    assert not path.exists()


@pytest.mark.parametrize("signs", ["positive", "mixed", "grouped"])
def test_bounds_before_a_convolution_are_batch_norms(signs):
    """As folding makes them of batch norm, ReLU and convolution: no maximum is left for onnxruntime, and no rounding
    of small integers.
    """
    groups = 2 if signs == "grouped" else 1

    def function(c, x):
        y = aten.relu.default(aten.batch_norm.default(x, c.gamma, c.beta, c.mean, c.var, False, 0.1, 0.0, False))
        return aten.conv2d.default(y, c.w, c.b, [1, 2], [0, 0], [1, 1], groups)

    gamma = torch.tensor([1.0, 2.0, 1.0, 4.0]) if signs == "positive" else torch.tensor([1.0, -2.0, -1.0, 4.0])
    constants = {"gamma": gamma, "beta": integers(4, largest=3), "mean": integers(4, seed=1), "var": torch.ones(4)}
    w, b = integers(6, 4 // groups, 2, 1, seed=2), integers(6, seed=3)
    graph = written(function, (None, 4, 5, 7), w=w, b=b, **constants)
    folded = fold(graph, torch.float32)
    bounding = {aten.maximum.default, aten.clamp.Tensor} & {node.target for node in folded.calls.nodes}
    assert len(bounding) == 1, "folding bounds no more: then spell_bounds has nothing to do"
    before = str(folded.calls)

    model = to_onnx(folded, [(1, 4, 5, 7)])
    assert [node.op_type for node in model.graph.node] == ["BatchNormalization", "Relu", "Conv"]
    assert str(folded.calls) == before
    x = integers(3, 4, 5, 7, largest=4, seed=4)
    assert torch.equal(run(model, x)[0].double(), in_float64(graph, [x])[0])


def test_bounds_that_something_else_reads_stay():
    def function(c, x):
        y = aten.maximum.default(x, c.bound)
        arguments = y, c.w, None, None, (1, 1), (0, 0), (1, 1), 1, None, ()
        return x.tracer.create_proxy("call_function", operators.convolution, arguments, {}), y

    graph = written(function, (None, 4, 5, 7), bound=integers(1, 4, 1, 1), w=integers(2, 4, 1, 1))
    model = to_onnx(graph, [(1, 4, 5, 7)])
    assert Counter(node.op_type for node in model.graph.node) == {"Max": 1, "Conv": 1}
    x = integers(3, 4, 5, 7, largest=4)
    assert all(torch.equal(y, e) for y, e in zip(run(model, x), graph.run([x]), strict=True))


def test_openvino_reads_it():
    openvino = pytest.importorskip("openvino", reason="OpenVINO is a second reader of ONNX")
    graph, inputs = convolution_and_sum(), [integers(3, 3, 8, 8), integers(3, 4, 6, 6)]
    model = to_onnx(graph, [x.shape for x in inputs])
    compiled = openvino.compile_model(openvino.Core().read_model(io.BytesIO(model.SerializeToString())), "CPU")
    found = compiled([x.numpy() for x in inputs])
    for i, expected in enumerate(graph.run(inputs)):
        torch.testing.assert_close(torch.from_numpy(np.asarray(found[i])), expected)
