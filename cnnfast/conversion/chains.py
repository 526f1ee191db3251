"""Finds what follows a convolution or a norm in a trace and can be computed with it, and says why it is not more.

A chain is: convolution, norm, sum with another tensor, activation. Each of these may be absent, but for one of the
first two; identities may stand between any two of them.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .. import nn as cnn
from ..functional.pooled import ACTIVATIONS
from ..patterns import NAMES, Activation, activation_of, addition, called_activation, is_activation
from .effects import Effects, Obstacle
from .grafts import base_of
from .leaves import is_convolution, is_norm, may_follow, normalizes_and_activates, replacement, why_left

SYMBOLS = {operator.add: "+", operator.iadd: "+=", operator.isub: "-=", operator.imul: "*=", operator.itruediv: "/="}


@dataclass
class Chain:
    """A convolution, or a norm, and what is to be computed with it.

    nodes: in their order. activation: the path of a module, or what a function computes. stopped: why the chain ends
    before what follows in the forward, or the empty string.
    """

    nodes: list[fx.Node]
    conv: fx.Node | None = None
    norm: fx.Node | None = None
    residual: fx.Node | None = None
    in_place: bool = False
    activation: Activation | str | None = None
    stopped: str = ""

    @property
    def is_fused(self) -> bool:
        """Whether there are two things at least to compute in one step."""
        return sum(part is not None for part in (self.conv, self.norm, self.residual, self.activation)) > 1

    @property
    def said(self) -> str:
        """A report's sentence on what is not fused, and why; the empty string if all of it is."""
        if not self.stopped:
            return ""
        fused = f" only up to {named(self.nodes[-1])}" if self.is_fused else ""
        return f"{named(self.nodes[0])}{fused}, because {self.stopped}"


class Chains:
    """The chains of one graph. modules: by the names that its nodes call them."""

    def __init__(self, effects: Effects, modules: dict[str, nn.Module]) -> None:
        self.effects, self.modules = effects, modules

    def module(self, node: Any) -> nn.Module | None:
        return self.modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None

    def find(self, node: fx.Node) -> Chain | None:
        """The chain that begins with a node; None if it calls neither a convolution nor a norm."""
        chain, module = Chain([node]), self.module(node)
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            if not is_convolution(module):
                chain.stopped = why_left(module) or (
                    "it was not converted" if replacement(module) else "it has a forward of its own"
                )
            elif self._argument(node) is None:
                chain.stopped = "it is called with something else than one tensor"
            else:
                chain.conv = node
                chain.stopped = self._add_to_convolution(chain)
        elif module is not None and is_norm(module) and self._argument(node) is not None:
            chain.norm = node
            chain.activation, chain.stopped = self._own_activation(node, module)
            if chain.activation is None and not chain.stopped:
                chain.stopped = self._add_sum(chain) or self._add_activation(chain)
        else:
            return None
        return chain

    def pool(self, chain: Chain) -> fx.Node | None:
        """The call of a max pool of ours that follows a convolution and a norm at once, and alone reads their result;
        None if there is none, or if pooling cannot be one operator with them (functional/pooled.py).
        """
        last = chain.nodes[-1]
        user, module = last.next, self.module(last.next)
        activation = (
            activation_of(self.modules[chain.activation]) if isinstance(chain.activation, str) else chain.activation
        )
        if (
            None in (chain.conv, chain.norm)
            or chain.residual is not None
            or (activation is not None and activation[0] not in ACTIVATIONS)
            or list(last.users) != [user]
            or not isinstance(module, cnn.MaxPool2d)
            or type(module).forward is not cnn.MaxPool2d.forward
            or self._argument(user) is not last
        ):
            return None
        return user

    # Each of these steps adds to a chain what it can, and returns why the chain stops there, or the empty string.

    def _add_to_convolution(self, chain: Chain) -> str:
        """Whatever follows a convolution."""
        _, _, users = self._ahead(chain)
        if len(users) != 1:
            return f"its result {used_by(users)}"
        (user,) = users
        module = self.module(user)
        is_a_norm = module is not None and any("Norm" in c.__name__ for c in type(module).__mro__)
        if is_a_norm and (stopped := self._add_norm(chain)):
            return stopped
        stopped = "" if chain.activation is not None else self._add_sum(chain) or self._add_activation(chain)
        if stopped or chain.is_fused:
            return stopped
        if user.op == "output":
            return "its result is returned"
        return f"its result goes to {named(user)}, which is no batch norm, sum or activation"

    def _add_norm(self, chain: Chain) -> str:
        identities, last, (user,) = self._ahead(chain)
        module = self.modules[str(user.target)]
        if not is_norm(module) or not may_follow(module, self.modules[str(chain.nodes[0].target)]):
            return f"its norm {named(user)} ({_class(module)}) is not one that kernels know"
        if self._argument(user) is not last:
            return f"its norm {named(user)} is called with something else than one tensor"
        activation, stopped = self._own_activation(user, module)
        return stopped or self._take(chain, [*identities, user], norm=user, activation=activation)

    def _own_activation(self, norm: fx.Node, module: nn.Module) -> tuple[str | None, str]:
        """(the path of the activation that timm's layer of a norm and an activation ends with, if it has one; why it
        cannot be fused, or the empty string).
        """
        if not normalizes_and_activates(module):
            return None, ""
        drop, act = module._modules["drop"], module._modules["act"]
        if type(drop) is not nn.Identity:
            return None, f"{named(norm)}.drop ({_class(drop)}) stands between norm and activation"
        if type(act) is nn.Identity:
            return None, ""
        if act is None or not activation_of(act):
            return None, f"{named(norm)}.act ({_class(act)}) is not an activation that kernels know"
        return f"{norm.target}.act", ""

    def _add_sum(self, chain: Chain) -> str:
        identities, last, users = self._ahead(chain)
        if len(users) != 1:
            wanted = any(addition(user) or self._activates(user) for user in users)
            return f"the result of {named(last)} {used_by(users)}" if wanted else ""
        (user,) = users
        found = addition(user)
        if found is None:
            return ""
        left, right, in_place, options = found
        if left is right:
            return f"the result of {named(last)} is added to itself"
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return f"what is added to the result of {named(last)} is not a tensor"
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
            activation = str(user.target) if activation_of(module) else None
            if activation and self._argument(user) is not last:
                return f"{named(user)} is called with something else than one tensor"
        else:
            activation = called_activation(user)
        if activation is None:
            kind = f" ({_class(module)})" if module is not None else ", as it is called," * (user.target in NAMES)
            return f"{named(user)}{kind} is not an activation that kernels know"
        return self._take(chain, [*identities, user], activation=activation)

    def _ahead(self, chain: Chain) -> tuple[list[fx.Node], fx.Node, list[fx.Node]]:
        """What comes after the chain: (the identities that follow it, the last of these or of the chain, what uses the
        result of that one).
        """
        identities: list[fx.Node] = []
        last = chain.nodes[-1]
        users = list(last.users)
        while len(users) == 1 and type(self.module(users[0])) is nn.Identity and self._argument(users[0]) is last:
            last = users[0]
            identities.append(last)
            users = list(last.users)
        return identities, last, users

    def _take(self, chain: Chain, nodes: list[fx.Node], **found: Any) -> str:
        """Adds nodes to the chain, and what was found of them, if all of it may be computed in the last one's place."""
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
        return is_activation(node, self.module(node))

    def _disturbed(self, obstacle: Obstacle, last: fx.Node) -> str:
        """Why an obstacle keeps a node of the chain from being computed in the place of `last`."""
        mine, between = named(obstacle.mine), f"{named(obstacle.node)}, called before {named(last)},"
        if obstacle.why == "watched":
            return f"{between} has hooks or a forward of its own on the instance"
        if obstacle.why == "strange":
            if not self.effects.is_stranger(obstacle.node):
                between = f"{mine}, called before {named(obstacle.node)},"
            return f"{between} runs code that conversion does not know"
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


def _class(module: Any) -> str:
    return base_of(type(module)).__name__


def _parameter(cls: Any) -> str:
    """The name of the first argument of a module's forward."""
    return list(inspect.signature(cls.forward).parameters)[1]
