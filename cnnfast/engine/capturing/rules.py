"""What a rule of the cleaning sees: one call, its arguments by name, and how to write others in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

Rule = Callable[["SpelledCall"], Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers a rule for calls of these: it returns what stands in their place (a node), or None to leave a call as
    it is.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, target
            RULES[target] = function
        return function

    return register


class SpelledCall:
    """A call of an operator of PyTorch's. call["padding"] is an argument by its name in the operator's schema, or its
    default.
    """

    def __init__(self, node: fx.Node, constants: dict[str, Tensor]) -> None:
        self.node, self.target, self.constants = node, node.target, constants
        self.arguments: dict[str, Any] = {}
        self.keywords: set[str] = set()
        self.written: list[fx.Node] = []
        for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if index < len(node.args):
                value = node.args[index]
            else:
                value = node.kwargs.get(argument.name, argument.default_value)
            self.arguments[argument.name] = value
            if argument.kwarg_only and value != argument.default_value:
                self.keywords.add(argument.name)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def first(self) -> fx.Node:
        """The first argument: the tensor that most operators are about."""
        return self.node.args[0]  # type: ignore[return-value]

    def value(self, node: Any = None) -> Tensor:
        """What torch.export traced in place of a node's tensor (of the call's own, without an argument): its shape, in
        which a size may be an expression, and its dtype.
        """
        return (self.node if node is None else node).meta["val"]

    def number(self, argument: Any) -> Any:
        """A Python number in place of a constant that is one number, and anything else as it is."""
        is_constant = isinstance(argument, fx.Node) and argument.op == "get_attr"
        constant = self.constants[str(argument.target)] if is_constant else None
        return constant.item() if constant is not None and constant.dim() == 0 else argument

    def shape_is(self, node: fx.Node) -> bool:
        """Whether the call's result has the shape of a node."""
        return str(tuple(self.value().shape)) == str(tuple(self.value(node).shape))

    def write(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call in front of this one."""
        with self.node.graph.inserting_before(self.node):
            written = self.node.graph.call_function(target, args, kwargs)
        self.written.append(written)
        return written

    def sizes(self, node: fx.Node) -> list[Any]:
        """The sizes of a node: numbers, and where they are not known yet, calls that find them out."""
        return [
            size if isinstance(size, int) else self.write(aten.sym_size.int, node, dim)
            for dim, size in enumerate(self.value(node).shape)
        ]

    def normalise(self) -> None:
        """All positional arguments are present, and of the keywords those that are not the default."""
        schema = self.target._schema.arguments  # type: ignore[union-attr]
        self.node.args = tuple(self.arguments[one.name] for one in schema if not one.kwarg_only)
        self.node.kwargs = {name: self.arguments[name] for name in self.arguments if name in self.keywords}


def repeated(numbers: int | Sequence[int], dimensions: int) -> list[int]:
    """One number a dimension, from one for all or one for each."""
    listed = [numbers] if isinstance(numbers, int) else list(numbers)
    return listed * dimensions if len(listed) == 1 else listed
