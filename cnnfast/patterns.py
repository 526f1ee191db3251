"""How PyTorch writes convolution > norm > sum > activation: with modules, functions, methods and operators.

These are tables, and what reads a module, or a node of a torch.fx graph, by them. A node's callee is the class of the
module, the function, the name of the method, or the operator of torch.ops.aten that it calls; the latter is what
torch.export writes. Which of these steps become one kernel is not decided here: conversion and the engine fuse all that
stands here, and bench's cuDNN a sum of two and ReLU.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .activations import LEAKY_SLOPE, ActivationName

aten = torch.ops.aten

# Its name, and the slope of leaky_relu or the slopes of prelu, as functional.conv_bn_act takes them.
Activation = tuple[ActivationName, float | Tensor | None]

# Batch norms whose statistics and weights are constants: buffers running_mean, running_var, weight and bias, and eps.
# They are known by name, so that none of these libraries has to be there.
FROZEN_NORMS = {
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
}

NEW_SUMS: tuple[Any, ...] = (operator.add, torch.add, "add", aten.add.Tensor)
IN_PLACE_SUMS: tuple[Any, ...] = (operator.iadd, "add_")  # they write the sum into what stands on the left
SUMS = NEW_SUMS + IN_PLACE_SUMS

# The activations that kernels compute, by the names that functional.conv_bn_act has for them.
ACTIVATIONS: dict[ActivationName, tuple[Any, ...]] = {
    "relu": (nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", aten.relu.default),
    "leaky_relu": (nn.LeakyReLU, F.leaky_relu, aten.leaky_relu.default),
    "relu6": (nn.ReLU6, F.relu6),
    "gelu": (nn.GELU, F.gelu, aten.gelu.default),
    "silu": (nn.SiLU, F.silu, aten.silu.default),
    "hardswish": (nn.Hardswish, F.hardswish, aten.hardswish.default),
    "mish": (nn.Mish, F.mish, aten.mish.default),
    "hardsigmoid": (nn.Hardsigmoid, F.hardsigmoid, aten.hardsigmoid.default),
    "prelu": (nn.PReLU,),
}
# Modules of timm's that compute one of these, known by name as the norms are. Some of them work in place.
TIMMS_NAMES: dict[ActivationName, tuple[str, ...]] = {
    "silu": ("activations.Swish", "activations_me.SwishMe"),
    "gelu": ("activations.GELU",),
    "gelu_tanh": ("activations.GELUTanh",),
    "hardswish": ("activations.HardSwish", "activations_me.HardSwishMe"),
    "mish": ("activations.Mish", "activations_me.MishMe"),
    "hardsigmoid": ("activations.HardSigmoid", "activations_me.HardSigmoidMe"),
    "prelu": ("activations.PReLU",),
}
TIMMS_ACTIVATIONS: dict[str, ActivationName] = {
    f"timm.layers.{name}": activation for activation, names in TIMMS_NAMES.items() for name in names
}
# Functions and methods that activate, and that no kernel computes.
OTHER_ACTIVATIONS: tuple[Any, ...] = (
    *(F.prelu, torch.prelu, F.sigmoid, F.elu, F.softmax, torch.sigmoid, torch.tanh, torch.softmax),
    *("sigmoid", "sigmoid_", "tanh", "softmax"),
)
GELUS: dict[Any, Activation] = {"none": ("gelu", None), "tanh": ("gelu_tanh", None)}  # by `approximate`

# Where the classes of activations are defined. PyTorch's module defines MultiheadAttention too.
HOMES = (nn.ReLU.__module__, "timm.layers.activations")

NAMES: dict[Any, ActivationName] = {callee: name for name, callees in ACTIVATIONS.items() for callee in callees}


def callee(node: Any, modules: Mapping[str, nn.Module]) -> Any:
    """What a node calls; None if it calls nothing, as arguments and results do. modules: by the names in its graph."""
    if not isinstance(node, fx.Node) or not node.op.startswith("call"):
        return None
    return type(modules[str(node.target)]) if node.op == "call_module" else node.target


# ----------------------------------------------------------------------------------------------------------------------
# Sums


class Addition(NamedTuple):
    """left + right, both of which may be numbers. in_place: the sum is written into `left`. options: the names of other
    arguments, which make it another sum.
    """

    left: Any
    right: Any
    in_place: bool
    options: tuple[str, ...]

    @property
    def is_of_two_tensors(self) -> bool:
        """Whether two different nodes are added, and nothing else happens."""
        nodes = isinstance(self.left, fx.Node) and isinstance(self.right, fx.Node)
        return nodes and self.left is not self.right and not self.options


def addition(node: Any) -> Addition | None:
    """The sum that a node computes, by a function, an operator or a method; None if it computes anything else."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method") or node.target not in SUMS:
        return None
    given = _by_name(node, ("input", "other"))
    left, right = given.pop("input", None), given.pop("other", None)
    options = [name for name, value in given.items() if not (value is None or (name == "alpha" and value == 1))]
    return Addition(left, right, node.target in IN_PLACE_SUMS, tuple(options))


# ----------------------------------------------------------------------------------------------------------------------
# Activations


def activation_of(module: Any) -> Activation | None:
    """What a module of exactly one of PyTorch's classes, or of timm's, computes; None if kernels do not compute it.
    Each call of a fused container asks this.
    """
    kind = type(module)
    name = NAMES.get(kind)
    if name is None:
        name = TIMMS_ACTIVATIONS.get(f"{kind.__module__}.{kind.__qualname__}")
        if name == "gelu":  # it has no `approximate`
            return name, None
    if name == "prelu":
        return name, module.weight
    if name == "leaky_relu":
        return name, module.negative_slope
    if name == "gelu":
        return GELUS.get(module.approximate)
    return None if name is None else (name, None)


def called_activation(node: fx.Node) -> Activation | None:
    """What a function or a method computes; None if kernels do not compute it, or not with these arguments."""
    name = NAMES.get(node.target)
    if name is None:
        return None
    given = _by_name(node, ("input", "negative_slope") if name == "leaky_relu" else ("input",))
    given.pop("input", None)
    given.pop("inplace", None)
    found: Activation | None = (name, None)
    if name == "leaky_relu":
        slope = given.pop("negative_slope", LEAKY_SLOPE)
        found = (name, float(slope)) if isinstance(slope, int | float) else None
    if name == "gelu":
        found = GELUS.get(given.pop("approximate", "none"))
    return None if given else found


def is_activation(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node computes an activation, which kernels may know or not. module: what it calls, if it calls one."""
    if module is not None:
        bases = type(module).__mro__
        return nn.MultiheadAttention not in bases and any(c.__module__.startswith(HOMES) for c in bases)
    return node.op in ("call_function", "call_method") and (node.target in NAMES or node.target in OTHER_ACTIVATIONS)


def _by_name(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a node by name; "input" is what a method is called on. Positions beyond `names` have numbers."""
    positions = {names[i] if i < len(names) else f"argument {i + 1}": value for i, value in enumerate(node.args)}
    return positions | dict(node.kwargs)
