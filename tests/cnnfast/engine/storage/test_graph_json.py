"""Graphs as plain data: what comes back, and what is refused on the way in."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from torch import fx

from cnnfast.engine.graph import Graph, Input
from cnnfast.engine.operators import OPERATORS
from cnnfast.engine.storage.graph_json import from_data, to_data

X = {"name": "x", "shape": [None, 4], "dtype": "float32"}
CONSTANTS = {"w": torch.ones(4, 4)}


def data(*calls: dict, results: tuple[str, ...] = ("x",)) -> dict:
    """Of a graph with an input x, a constant w, and these calls."""
    nodes = [{"name": "x", "input": 0}, {"name": "w", "constant": "w"}, *calls]
    return {"inputs": [copy.deepcopy(X)], "nodes": nodes, "results": list(results), "conditions": []}


def call(operator: str, *args, name: str = "y", **more) -> dict:
    return {"name": name, "call": operator, "args": list(args), **more}


def value(name: str) -> dict:
    return {"value": name}


def refused(graph: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_data(graph, CONSTANTS)


ARGUMENTS = [
    None,
    True,
    False,
    0,
    -(2**31) + 1,
    0.1,
    -1e-45,
    3e38,
    math.inf,
    -math.inf,
    "tanh",
    [],
    [1, 2],
    [[1], [2.0]],
]


@pytest.mark.parametrize("argument", [*ARGUMENTS, torch.bfloat16, torch.int64])
def test_every_argument_comes_back(argument, monkeypatch):
    """As JSON says it; the checking of arguments by operators is another test's."""
    monkeypatch.setattr("cnnfast.engine.storage.graph_json.check_arguments", lambda *given: None)
    calls = fx.Graph()
    x = calls.placeholder("x")
    y = calls.call_function(OPERATORS["aten.relu.default"], (x, argument), {"named": [argument, x]})
    calls.output((y,))
    graph = Graph(calls, {}, (Input("x", (None, 4), torch.float32),))
    text = json.dumps(to_data(graph), allow_nan=False)
    read = from_data(json.loads(text), {})
    back = next(node for node in read.calls.nodes if node.op == "call_function")
    assert back.args[1] == argument
    assert type(back.args[1]) is type(y.args[1])
    assert back.kwargs["named"][0] == argument
    assert back.args[0] is back.kwargs["named"][1] is next(iter(read.calls.nodes))


def test_nan_comes_back(monkeypatch):
    monkeypatch.setattr("cnnfast.engine.storage.graph_json.check_arguments", lambda *given: None)
    graph = from_data(data(call("aten.elu.default", value("x"), {"float": "nan"}), results=("y",)), CONSTANTS)
    assert math.isnan(graph.results[0].args[1])
    assert to_data(graph)["nodes"][2]["args"][1] == {"float": "nan"}


@pytest.mark.parametrize("argument", [1j, b"bytes", torch.device("cpu"), slice(1, 2), object()])
def test_what_files_do_not_have_is_not_written(argument):
    calls = fx.Graph()
    calls.output((calls.create_node("call_function", OPERATORS["aten.relu.default"], (argument,), name="called"),))
    with pytest.raises(ValueError, match=rf"called: files have no {type(argument).__name__} for an argument"):
        to_data(Graph(calls, {}, ()))


def test_a_dtype_that_files_do_not_have_is_not_written():
    calls = fx.Graph()
    calls.output(
        (calls.create_node("call_function", OPERATORS["aten.relu.default"], (torch.complex64,), name="called"),)
    )
    with pytest.raises(ValueError, match=r"called: torch.complex64 is no dtype that files have"):
        to_data(Graph(calls, {}, ()))
    with pytest.raises(ValueError, match=r"torch.complex64 is no dtype that files have"):
        to_data(Graph(fx.Graph(), {}, (Input("x", (1,), torch.complex64),)))


def test_names_that_fx_would_change_come_back():
    """torch.export calls an input `input`, which is a function of Python's, and so fx avoids the name."""
    graph = data(call("aten.relu.default", value("input"), name="sum"), results=("sum",))
    graph["nodes"][0]["name"] = "input"
    read = from_data(graph, CONSTANTS)
    assert [node.name for node in read.calls.nodes][:3] == ["input", "w", "sum"]
    assert to_data(read) == graph


def test_labels_come_back():
    meta = {"pattern": "convolution", "fused": ["conv2d", "relu"]}
    graph = data(call("aten.relu.default", value("x"), meta=meta), results=("y",))
    read = from_data(graph, CONSTANTS)
    assert read.results[0].meta == {"pattern": "convolution", "fused": ("conv2d", "relu")}
    assert to_data(read) == graph


def test_a_result_may_be_an_input_or_a_constant_and_occur_twice():
    read = from_data(data(results=("w", "x", "w")), CONSTANTS)
    assert [node.op for node in read.results] == ["get_attr", "placeholder", "get_attr"]


def test_constants_that_are_made_later_have_names_of_their_own():
    """A graph that was read does not know how many constants were made while it was folded."""
    read = from_data(
        {**data(), "nodes": [{"name": "x", "input": 0}]}, {"folded_1": torch.ones(1), "folded_2": torch.ones(2)}
    )
    with read.calls.inserting_before(read.calls.output_node()):
        node = read.new_constant(torch.zeros(3))
    assert torch.equal(read.constants[node.target], torch.zeros(3))
    assert len(read.constants) == 3


WRONG_NODES = [
    (call("os.system", "true"), "node y: it calls 'os.system', which this version of cnnfast does not know"),
    (call("aten.from_file.default", "relu"), "'aten.from_file.default', which this version"),
    (call("", value("x")), "it calls '', which"),
    (call("aten.relu.default", value("z")), "node y: no node before is called 'z'"),
    (call("aten.relu.default", value("y")), "node y: no node before is called 'y'"),
    (call("aten.relu.default", value("later")), "no node before is called 'later'"),
    (call("aten.relu.default", [[[[value("x")]]]]), "lists in lists"),
    (call("aten.reshape.default", value("x"), [1] * 5000), "a list of 5,000"),
    (call("aten.relu.default", {"value": "x", "more": 1}), "is no argument"),
    (call("aten.relu.default", {"value": 1}), "is no argument"),
    (call("aten.relu.default", {"dtype": "float31"}), "'float31' is no dtype"),
    (call("aten.relu.default", {"float": "1.0"}), "is no argument"),
    (call("aten.relu.default", {"__class__": "x"}), "is no argument"),
    (call("aten.elu.default", value("x"), float("inf")), "out of bounds"),
    (call("aten.relu.default", value("x"), kwargs=[]), r"'kwargs' is \[\], and no dict"),
    (call("aten.relu.default", value("x"), meta={"stack_trace": "x"}), "it has 'stack_trace', which is unknown"),
    (call("aten.relu.default", value("x"), meta={"pattern": 1}), "is no list of words"),
    (call("aten.relu.default", value("x"), more=1), "neither an input nor a constant nor a call"),
    (call("aten.relu.default", value("x"), name="x"), "two nodes are called 'x'"),
    (call("aten.relu.default", value("x"), name="a b"), "'a b' is no name of a node"),
    (call("aten.relu.default", value("x"), name=""), "'' is no name of a node"),
    (call("aten.relu.default", value("x"), name="a" * 2000), "is no name of a node"),
    (call("aten.relu.default", value("x"), name=1), "'name' is 1, and no str"),
    ({"name": "y", "call": "aten.relu.default"}, "'args' is missing"),
    ({"name": "y", "call": ["aten.relu.default"], "args": []}, "'call' is .*, and no str"),
    ({"name": "y", "constant": "v"}, "the file has no constant 'v'"),
    ({"name": "y", "constant": None}, "'constant' is None, and no str"),
    ({"name": "y", "input": 1}, "it is input 1 of 1, and 1 is next"),
    ({"name": "y", "input": True}, "'input' is True, and no int"),
    ({"name": "y", "op": "call_module", "target": "x"}, "neither an input nor a constant nor a call"),
    ({"name": "y"}, "neither an input nor a constant nor a call"),
    ({}, "'name' is missing"),
    ([], "stands where a mapping with 'name' belongs"),
    (None, "stands where a mapping with 'name' belongs"),
]


@pytest.mark.parametrize(("node", "message"), WRONG_NODES)
def test_nodes_that_are_none(node, message):
    refused(data(node), message)


WRONG_GRAPHS = [
    ({"nodes": []}, "no node before is called 'x'"),
    ({"nodes": [{"name": "x", "constant": "w"}]}, "0 nodes take an input, and there are 1 inputs"),
    ({"nodes": {}}, "'nodes' is {}, and no list"),
    ({"nodes": [{"name": "x", "input": 0}] * (2**16 + 1)}, "65,537 nodes, and the most that are read are 65,536"),
    ({"results": ["y"]}, "no node before is called 'y'"),
    ({"results": [1]}, "is no list of the names of results"),
    ({"results": "x"}, "'results' is 'x', and no list"),
    ({"inputs": [{**X, "shape": [-1]}]}, "-1 is no size"),
    ({"inputs": [{**X, "shape": [2**31]}]}, "2147483648 is no size"),
    ({"inputs": [{**X, "shape": [True]}]}, "True is no size"),
    ({"inputs": [{**X, "shape": [1.0]}]}, "1.0 is no size"),
    ({"inputs": [{**X, "shape": [1] * 65}]}, "65 dimensions"),
    ({"inputs": [{**X, "dtype": "quint8"}]}, "'quint8' is no dtype"),
    ({"inputs": [{**X, "name": None}]}, "'name' is None, and no str"),
    ({"conditions": [1]}, "is no list of conditions"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_GRAPHS)
def test_graphs_that_are_none(change, message):
    refused({**data(), **change}, message)


def test_what_gives_no_tensor_is_no_result():
    refused(data(call("aten.sym_size.int", value("x"), 0), results=("y",)), "y is no tensor, and cannot be a result")
    refused(data(call("aten.chunk.default", value("x"), 2), results=("y",)), "y is no tensor, and cannot be a result")


def test_messages_are_short():
    """Whatever a file holds."""
    with pytest.raises(ValueError, match=re.escape("...")) as raised:
        from_data(data(call("a" * 10**6)), CONSTANTS)
    assert len(str(raised.value)) < 300
