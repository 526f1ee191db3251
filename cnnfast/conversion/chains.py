"""Finding what follows a convolution in a trace and can be computed with it, and saying why it is not more.

A chain is: convolution, norm, sum with another tensor, activation. The norm must follow, the rest may; identities may
stand between.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..activations import activation_of
from .effects import Effects, Obstacle
from .grafts import base_of
from .leaves import is_convolution, is_norm, normalizes_and_activates, replacement, why_left

Activation = str | tuple[str, float | None]

SUMS = {operator.add: ("input", "other"), torch.add: ("input", "other"), "add": ("self", "other")}
IN_PLACE_SUMS = {operator.iadd: ("input", "other"), "add_": ("self", "other")}
# Functions and methods that activate: the name of the activation, and of their arguments those that may be given by
# position.
ACTIVATIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", ("input",)),
    torch.relu: ("relu", ("input",)),
    "relu": ("relu", ("input",)),
    "relu_": ("relu", ("input",)),
    F.relu6: ("relu6", ("input",)),
    F.silu: ("silu", ("input",)),
    F.hardswish: ("hardswish", ("input",)),
    F.gelu: ("gelu", ("input",)),
    F.leaky_relu: ("leaky_relu", ("input", "negative_slope")),
}
UNKNOWN_ACTIVATIONS = (F.hardsigmoid, F.sigmoid, F.elu, F.softmax, torch.sigmoid, torch.tanh, torch.softmax)
UNKNOWN_ACTIVATION_METHODS = ("sigmoid", "sigmoid_", "tanh", "softmax")
SYMBOLS = {operator.add: "+", operator.iadd: "+=", operator.isub: "-=", operator.imul: "*=", operator.itruediv: "/="}


@dataclass
class Chain:
    """The nodes in order; `activation`: a module's path, or (name, slope) of a function. `stopped`: why it does not go
    on as its forward does; the empty string if it does. Without a norm it is no group.
    """

    nodes: list[fx.Node]
    norm: fx.Node | None = None
    residual: fx.Node | None = None
    in_place: bool = False
    activation: Activation | None = None
    stopped: str = ""

    @property
    def said(self) -> str:
        """What is not fused and why, for a report; the empty string if all is."""
        if not self.stopped:
            return ""
        fused = f" only up to {named(self.nodes[-1])}" if self.norm is not None else ""
        return f"{named(self.nodes[0])}{fused}, because {self.stopped}"


class Chains:
    def __init__(self, effects: Effects, modules: dict[str, nn.Module]) -> None:
        self.effects, self.modules = effects, modules

    def module(self, node: Any) -> nn.Module | None:
        return self.modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None

    def starts(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), nn.Conv2d)

    def find(self, conv: fx.Node) -> Chain:
        """What begins with a convolution's node."""
        chain, module = Chain([conv]), self.modules[str(conv.target)]
        if not is_convolution(module):
            chain.stopped = why_left(module) or (
                "it was not converted" if replacement(module) else "it has a forward of its own"
            )
        elif self._argument(conv) is None:
            chain.stopped = "it is called with something else than one tensor"
        else:
            chain.stopped = self._add_norm(chain)
            if chain.norm is not None and chain.activation is None:
                chain.stopped = self._add_sum(chain) or self._add_activation(chain)
        return chain

    # The steps: each adds to a chain what it can, and returns why it stops there, or the empty string.

    def _add_norm(self, chain: Chain) -> str:
        identities, last, users = self._ahead(chain)
        if len(users) != 1:
            return f"its result {used_by(users)}"
        (user,) = users
        module = self.module(user)
        if module is None or not is_norm(module):
            if module is not None and any("Norm" in c.__name__ for c in type(module).__mro__):
                return f"its norm {named(user)} ({_class(module)}) is not one that kernels know"
            return (
                "its result is returned"
                if user.op == "output"
                else f"its result goes to {named(user)}, which is no batch norm"
            )
        if self._argument(user) is not last:
            return f"its norm {named(user)} is called with something else than one tensor"
        activation = None
        if normalizes_and_activates(module):
            drop, act = module._modules["drop"], module._modules["act"]
            if type(drop) is not nn.Identity:
                return f"{named(user)}.drop ({_class(drop)}) stands between norm and activation"
            if type(act) is not nn.Identity:
                if act is None or not activation_of(act):
                    return f"{named(user)}.act ({_class(act)}) is not an activation that kernels know"
                activation = f"{user.target}.act"
        return self._take(chain, [*identities, user], norm=user, activation=activation)

    def _add_sum(self, chain: Chain) -> str:
        identities, last, users = self._ahead(chain)
        if len(users) != 1:
            wanted = any(_is_sum(user) or self._activates(user) for user in users)
            return f"the result of {named(last)} {used_by(users)}" if wanted else ""
        (user,) = users
        if not _is_sum(user):
            return ""
        in_place = user.target in IN_PLACE_SUMS
        given = _bound(user, (IN_PLACE_SUMS if in_place else SUMS)[user.target])  # pyright: ignore[reportArgumentType]
        left, right = given.pop("input", None), given.pop("other", None)
        if left is right:
            return f"the result of {named(last)} is added to itself"
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return f"what is added to the result of {named(last)} is not a tensor"
        options = [name for name, value in given.items() if not (value is None or (name == "alpha" and value == 1))]
        if options:
            return f"{named(user)} is called with {' and '.join(options)}"
        if in_place and left is not last:
            return f"{named(user)} writes the sum into {named(left)}"
        return self._take(chain, [*identities, user], residual=right if left is last else left, in_place=in_place)

    def _add_activation(self, chain: Chain) -> str:
        identities, last, users = self._ahead(chain)
        if not any(self._activates(user) for user in users):
            return ""
        if len(users) != 1:
            return f"the result of {named(last)} {used_by(users)}"
        (user,) = users
        module = self.module(user)
        if module is not None:
            activation: Activation | None = str(user.target) if activation_of(module) else None
            if activation and self._argument(user) is not last:
                return f"{named(user)} is called with something else than one tensor"
        else:
            activation = _function(user)
        if activation is None:
            kind = f" ({_class(module)})" if module is not None else ", as it is called," * (user.target in ACTIVATIONS)
            return f"{named(user)}{kind} is not an activation that kernels know"
        return self._take(chain, [*identities, user], activation=activation)

    def _ahead(self, chain: Chain) -> tuple[list[fx.Node], fx.Node, list[fx.Node]]:
        """(identities that follow, the last node before what matters, what uses its result)."""
        identities: list[fx.Node] = []
        last = chain.nodes[-1]
        users = list(last.users)
        while len(users) == 1 and type(self.module(users[0])) is nn.Identity and self._argument(users[0]) is last:
            last = users[0]
            identities.append(last)
            users = list(last.users)
        return identities, last, users

    def _take(self, chain: Chain, nodes: list[fx.Node], **found: Any) -> str:
        """Adds nodes, if all of the chain may be computed in the place of the last of them."""
        obstacle = self.effects.in_the_way([*chain.nodes, *nodes[:-1]], nodes[-1])
        if obstacle is not None:
            return self._disturbed(obstacle, nodes[-1])
        chain.nodes += nodes
        for name, value in found.items():
            setattr(chain, name, value)
        return ""

    # Reading nodes

    def _argument(self, node: fx.Node) -> fx.Node | None:
        """The only argument that a module is called with, by position or by the name that its forward has for it."""
        if len(node.args) + len(node.kwargs) != 1:
            return None
        (value,) = (*node.args, *node.kwargs.values())
        expected = [_parameter(type(self.modules[str(node.target)]))] if node.kwargs else []
        return value if list(node.kwargs) == expected and isinstance(value, fx.Node) else None

    def _activates(self, node: fx.Node) -> bool:
        """Whether a node is an activation, known to kernels or not."""
        module = self.module(node)
        if module is not None:
            bases = type(module).__mro__
            return nn.MultiheadAttention not in bases and any(c.__module__ == nn.ReLU.__module__ for c in bases)
        if node.op == "call_method":
            return node.target in ACTIVATIONS or node.target in UNKNOWN_ACTIVATION_METHODS
        return node.op == "call_function" and (node.target in ACTIVATIONS or node.target in UNKNOWN_ACTIVATIONS)

    def _disturbed(self, obstacle: Obstacle, last: fx.Node) -> str:
        mine, between = named(obstacle.mine), f"{named(obstacle.node)}, called before {named(last)},"
        if obstacle.why == "watched":
            return f"{between} has hooks or a forward of its own on the instance"
        if obstacle.why == "strange":
            stranger = (
                between if self.effects.is_stranger(obstacle.node) else f"{mine}, called before {named(obstacle.node)},"
            )
            return f"{stranger} runs code that conversion does not know"
        if obstacle.why == "memory":
            return f"{between} may write into what {mine} reads"
        module = self.module(obstacle.mine)
        what = "statistics" if module is not None and is_norm(module) else "parameters"
        if module is self.module(obstacle.node):
            return f"{mine} is called again before {named(last)}, and its {what} change with each call"
        return f"{between} may use or change the {what} of {mine}"


def named(node: fx.Node) -> str:
    """What a node calls, as its forward writes it; the name of an argument."""
    if node.op == "call_module":
        return f"self.{node.target}"
    if node.op == "call_method":
        return f".{node.target}()"
    if node.op == "placeholder":
        return str(node.target)
    if node.target is getattr:
        return f".{node.args[1]}"
    if "named" in node.meta:  # a group
        return str(node.meta["named"])
    return SYMBOLS.get(node.target) or str(getattr(node.target, "__name__", node.target))  # pyright: ignore[reportArgumentType]


def used_by(users: list[fx.Node]) -> str:
    """What becomes of a result."""
    if not users:
        return "is not used"
    callers = " and ".join(named(user) for user in users if user.op != "output")
    return " and ".join(
        filter(None, [f"is used by {callers}" * bool(callers), "is returned" * (users[-1].op == "output")])
    )


def _bound(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a node by name; "input" is what a method is called on. Positions beyond `names` have numbers."""
    names = tuple("input" if name == "self" else name for name in names)
    positions = {names[i] if i < len(names) else f"argument {i + 1}": value for i, value in enumerate(node.args)}
    return positions | dict(node.kwargs)


def _is_sum(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and (node.target in SUMS or node.target in IN_PLACE_SUMS)


def _function(node: fx.Node) -> tuple[str, float | None] | None:
    """(name, slope or None) of the activation that a function or method computes; None if kernels do not know it as it
    is called.
    """
    if node.target not in ACTIVATIONS:
        return None
    name, names = ACTIVATIONS[node.target]
    options = _bound(node, names)
    options.pop("input", None)
    options.pop("inplace", None)
    slope = None
    if name == "leaky_relu":
        slope = options.pop("negative_slope", 0.01)
        if not isinstance(slope, int | float):
            return None
        slope = float(slope)
    if name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(options.pop("approximate", "none"), "")
    return (name, slope) if name and not options else None


def _class(module: Any) -> str:
    return base_of(type(module)).__name__


def _parameter(cls: Any) -> str:
    """The name of the first argument of a module's forward."""
    return list(inspect.signature(cls.forward).parameters)[1]
