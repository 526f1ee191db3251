"""A folded model (folding.py) in jax.numpy: images are NHWC, filters HWIO."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.utils import _pair

from ..patterns import SUMS, callee
from .folding import RELUS, FusedConv
from .job import Job

SAME = (nn.Identity, nn.Dropout)  # in eval mode they return their input
FLATTEN = (torch.flatten, "flatten", nn.Flatten)
LAYERS = (FusedConv, nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveAvgPool2d, *SAME, *FLATTEN, *RELUS, *SUMS)


def unavailable(model: fx.GraphModule, device: torch.device) -> str:
    """Why this model cannot run, or the empty string."""
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = [kind for node in model.graph.nodes if (kind := callee(node, modules)) is not None]
    if unknown := [kind for kind in kinds if kind not in LAYERS]:
        return f"its model has no {getattr(unknown[0], '__name__', unknown[0])}"
    try:
        _device(device)
    except RuntimeError:
        return "jax has no GPU here"
    return ""


def step(model: fx.GraphModule, job: Job) -> Callable[[], Any]:
    """A step that computes the model by jax.jit, waits for the results, and returns them as a list of jax arrays.

    float32 is multiplied as PyTorch's settings say: by default jax would round to TF32 on a GPU.
    """
    jax = _jax()

    place, parameters = _device(job.device), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            parameters[name] = _array(module.weight.permute(2, 3, 1, 0), job, place), _bias(module, job, place)
        elif isinstance(module, nn.Linear):
            parameters[name] = _array(module.weight.t(), job, place), _bias(module, job, place)
    images = [_array(t.permute(0, 2, 3, 1), job, place) for t in job.inputs(channels_last=False)]
    products = {"float32": "float32", "tf32": "tensorfloat32"}.get(job.precision, "default")

    def network(parameters: dict[str, Any], images: list[Any]) -> list[Any]:
        with jax.default_matmul_precision(products):
            return _run(model, parameters, images)

    run = jax.jit(network)
    return lambda: jax.block_until_ready(run(parameters, images))


def tensor(array: Any, device: torch.device) -> Tensor:
    """A result in float32, NCHW."""
    y = torch.from_numpy(numpy.array(array, dtype=numpy.float32)).to(device)
    return y.permute(0, 3, 1, 2) if y.dim() == 4 else y


def _jax() -> Any:
    """The module jax.

    When it first uses a GPU it takes three quarters of its memory, which the other providers need here. Only this
    variable, which it reads then, can prevent that; jax has no other setting for it. It stays as it is if the user has
    set it, or has imported jax before.
    """
    if "jax" not in sys.modules:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return importlib.import_module("jax")


def _device(device: torch.device) -> Any:
    return _jax().devices("gpu" if device.type == "cuda" else "cpu")[0]


def _array(t: Tensor, job: Job, place: Any) -> Any:
    jax = _jax()

    return jax.device_put(
        jax.numpy.asarray(t.detach().float().cpu().numpy(), dtype=str(job.dtype).removeprefix("torch.")), place
    )


def _bias(layer: nn.Conv2d | nn.Linear, job: Job, place: Any) -> Any:
    return 0 if layer.bias is None else _array(layer.bias, job, place)


def _run(model: fx.GraphModule, parameters: dict[str, Any], images: list[Any]) -> list[Any]:
    modules = dict(model.named_modules(remove_duplicate=False))
    values: dict[fx.Node, Any] = {}
    given = iter(images)
    for node in model.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "output":
            return [values[n] for n in node.all_input_nodes]
        else:
            # Not all_input_nodes, in which x stands once for x + x.
            operands = [values[n] for n in node.args if isinstance(n, fx.Node)]
            values[node] = _call(modules, node, parameters, *operands)
    raise AssertionError("a graph ends with its output")


def _call(modules: Mapping[str, nn.Module], node: fx.Node, parameters: dict[str, Any], x: Any, z: Any = None) -> Any:
    jax = _jax()

    kind, name = callee(node, modules), str(node.target)
    layer: Any = modules.get(name)
    if kind is FusedConv:
        y = _conv(layer.layer, parameters[f"{name}.layer"], x)
        return jax.nn.relu(y if z is None else y + z)
    if kind is nn.Conv2d:
        return _conv(layer, parameters[name], x)
    if kind is nn.Linear:
        return x @ parameters[name][0] + parameters[name][1]
    if kind is nn.MaxPool2d:
        (R, S), strides, pads = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding)
        padding = ((0, 0), *((pad, pad) for pad in pads), (0, 0))
        return jax.lax.reduce_window(x, -jax.numpy.inf, jax.lax.max, (1, R, S, 1), (1, *strides, 1), padding)
    if kind is nn.AdaptiveAvgPool2d:
        return jax.numpy.mean(x, (1, 2), keepdims=True)
    if kind in FLATTEN:
        return jax.numpy.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
    if kind in RELUS:
        return jax.nn.relu(x)
    return x + z if kind in SUMS else x


def _conv(layer: nn.Conv2d, parameters: tuple[Any, Any], x: Any) -> Any:
    jax = _jax()

    weight, bias = parameters
    padding = [(pad, pad) for pad in _pair(layer.padding)]
    y = jax.lax.conv_general_dilated(
        x, weight, layer.stride, padding, rhs_dilation=layer.dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=layer.groups,
    )  # fmt: skip
    return y + bias
