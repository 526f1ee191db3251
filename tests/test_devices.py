"""Tests work where the `device` fixture is a GPU: no tensor of the CPU is made before it is known, and a GPU can be
pretended.

What a test makes inside of functions is held by `pytest --pretend-gpu` (tests/support/pretending.py), which runs the
suite so that tensors of `device` and of the CPU cannot be mixed.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
# Functions that make tensors: torch's, and the helpers' of these names.
OF_TORCH = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "from_numpy", "full", "linspace", "logspace",
    "normal", "ones", "rand", "randint", "randn", "randperm", "tensor", "tril_indices", "zeros",
}  # fmt: skip
OF_HELPERS = {"image", "integers", "multiples", "normal", "signed"}
# Files that make tensors as they are imported, and why they work on a GPU all the same. Each is run with --pretend-gpu.
MAY = {
    "cnnfast/commands/test_predict.py": "weights of a frozen network, which runs on the CPU",
    "cnnfast/functional/test_arguments.py": "values of arguments, and results: a test makes the tensors of a call",
    "cnnfast/functional/test_augmentation_errors.py": "images, which a test sends to the device; numbers stay here",
    "cnnfast/functional/test_conv1d_and_transposed.py": "templates: a test sends them to the device",
    "cnnfast/functional/test_conv_act_and_bn_act.py": "templates: a test sends them to the device",
    "cnnfast/functional/test_conv_bn_act.py": "statistics, which a test sends to where the input is",
    "cnnfast/test_dispatch.py": "templates: the fixture `operands` sends them to the device",
    "cnnfast/functional/test_entrance.py": "templates: the fixture `operands` sends them to the device",
    "cnnfast/ops/test_operators.py": "templates: a test sends them to the device",
    "cnnfast/test_precision.py": "templates: a test sends them to the device",
    "cnnfast/functional/test_errors.py": "numbers that stand for arguments; what should be a tensor is a size on meta",
    "support/planned.py": "constants of frozen graphs, which run on the CPU",
    "kernels/tma/test_tma_tiles.py": "a layout, of which only the strides are read",
}
ENGINE = "cnnfast/engine/"  # a frozen network runs on the CPU, wherever the tests run


def made_at_import(source: str) -> list[str]:
    """The calls that make tensors of the CPU while a file is imported: bodies of functions and of lambdas run later."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef):
            early = [*node.args.defaults, *node.args.kw_defaults, *getattr(node, "decorator_list", [])]
            for part in early:
                if part is not None:
                    visit(part)
            return
        if isinstance(node, ast.Call) and makes_a_tensor(node):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def makes_a_tensor(call: ast.Call) -> bool:
    f = call.func
    if isinstance(f, ast.Attribute):
        named = isinstance(f.value, ast.Name) and f.value.id == "torch" and f.attr in OF_TORCH
    else:
        named = isinstance(f, ast.Name) and f.id in OF_HELPERS
    where = [k.value for k in call.keywords if k.arg == "device"]
    return named and not (where and isinstance(where[0], ast.Constant) and where[0].value == "meta")


def files() -> Iterator[tuple[str, str]]:
    for file in sorted(TESTS.rglob("*.py")):
        yield file.relative_to(TESTS).as_posix(), file.read_text()


def test_no_file_makes_tensors_of_the_cpu_before_the_device_is_known():
    found = {name: calls for name, source in files() if (calls := made_at_import(source))}
    wrong = {name: calls for name, calls in found.items() if name not in MAY and not name.startswith(ENGINE)}
    assert not wrong, "make them in a fixture or a test, on `device`"
    assert MAY.keys() <= found.keys(), "these make none any more: take them out of MAY"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("X = torch.zeros(2)", 1),
        ("class A:\n    x = torch.ones(2)", 1),
        ("@pytest.mark.parametrize('x', [torch.rand(2), integers(2)])\ndef test(x): pass", 2),
        ("def f(x=torch.eye(2)): pass", 1),
        ("f = lambda x=torch.tensor(1): x", 1),
        ("TABLE = {'a': (normal(2, seed=1), 3)}", 1),
        ("def test(): torch.zeros(2)", 0),
        ("f = lambda: torch.zeros(2)", 0),
        ("X = torch.empty(2, device='meta')", 0),
        ("X = np.zeros(2)", 0),
    ],
)
def test_what_the_rule_sees(source, count):
    assert len(made_at_import(source)) == count


# ----------------------------------------------------------------------------------------------------------------------
# Names of the GPU ring: nothing here runs it, so that a name that does not exist would show only there


def dotted(node: ast.AST) -> str:
    """torch.cuda.Stream of its syntax tree; the empty string of anything else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("file", sorted((TESTS / "gpu").glob("*.py")), ids=lambda file: file.name)
def test_names_of_pytorch_exist(file):
    """Also of the objects that torch.cuda makes, whose methods are called by their names."""
    names = {dotted(node) for node in ast.walk(ast.parse(file.read_text()))}
    for name in sorted(names):
        root, *rest = name.split(".")
        if root == "torch" and rest:
            value = torch
            for attribute in rest:
                assert hasattr(value, attribute), name
                value = getattr(value, attribute)
    methods = {
        "wait_stream": torch.cuda.Stream,
        "wait_event": torch.cuda.Stream,
        "query": torch.cuda.Event,
        "replay": torch.cuda.CUDAGraph,
    }
    assert all(hasattr(owner, method) for method, owner in methods.items())


# ----------------------------------------------------------------------------------------------------------------------
# The GPU that is pretended

SUITE = """
import copy
import numpy as np
import pytest
import torch
import cnnfast
import cnnfast.functional as F


def tensors(device):
    return torch.ones(1, 2, 4, 4, device=device), torch.ones(2, 2, 3, 3).to(device)


def test_right(device, launches):
    x, w = tensors(device)
    with cnnfast.backend("kernels"):
        y = F.max_pool2d(F.conv2d(x, w.requires_grad_(), padding=1).relu(), 2)
        y.sum().backward()
    assert {launch.kernel for launch in launches} >= {"conv_fprop_kernel", "max_pool_kernel", "conv_wgrad_kernel"}
    assert x.device == y.device == w.grad.device == copy.deepcopy(w).device == device != torch.device("cpu")
    assert y.cpu().device == torch.device("cpu")
    assert y.detach().cpu().numpy().shape == (1, 2, 2, 2)
    module = torch.nn.BatchNorm2d(2).to(device)
    assert copy.deepcopy(module)(x).device == module.running_mean.device == device
    assert (x[:, torch.tensor([0])] * torch.tensor(2.0)).device == device


def test_mixed(device):
    x, w = tensors(device)
    x + torch.ones(4)


def test_mixed_in_a_call(device):
    x, w = tensors(device)
    with cnnfast.backend("kernels"):
        F.conv2d(x, torch.ones(2, 2, 3, 3))


def test_numpy(device):
    np.asarray(tensors(device)[0])


def test_compared(device):
    torch.testing.assert_close(tensors(device)[0], torch.ones(1, 2, 4, 4))


def test_launched_on_the_cpu():
    from cnnfast_kernels.conv import Geometry, conv_fprop
    conv_fprop(*tensors("cpu"), Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1))


def test_served_by_torch():
    F.conv2d(*tensors("cpu"))


@pytest.mark.cpu_tensors("says so")
def test_on_purpose():
    F.conv2d(*tensors("cpu"))
"""


def test_a_pretended_gpu_refuses_what_a_gpu_would(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("interpreter ring: here is a GPU, and none has to be pretended")
    pytest.importorskip("triton")
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "conftest.py").write_text(
        (TESTS / "conftest.py").read_text().replace("Path(__file__)", f"Path({str(TESTS / 'x')!r})")
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = (TESTS.parent, TESTS.parent / "kernels")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    options = [
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "--pretend-gpu",
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options], env=environment, capture_output=True, text=True, check=False
    )
    summary = [line.split() for line in child.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR"))]
    # a test that passed may have an error
    found = {words[1].partition("::")[2]: words[0] for words in sorted(summary, reverse=True)}
    wrong = ("mixed", "mixed_in_a_call", "numpy", "compared", "launched_on_the_cpu")
    right = {"test_right": "PASSED", "test_on_purpose": "PASSED", "test_served_by_torch": "ERROR"}
    assert found == right | {f"test_{name}": "FAILED" for name in wrong}, child.stdout
