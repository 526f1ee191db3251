"""A captured graph without what does nothing in a network that only infers, and with one spelling of each operator."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..operators import MAKERS, multiplied
from . import arithmetic_rules, layer_rules, view_rules  # noqa: F401
from .rules import RULES, SpelledCall, aten

# They raise where a tensor is not what it was in the example: dtypes and devices are fixed here, and sizes are what the
# conditions are about.
ASSERTIONS = {
    *(aten._assert_tensor_metadata.default, aten._assert_async.default, aten._assert_async.msg),
    *(aten._assert_scalar.default, aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
}
# Bytes of what is computed once, and kept in the file, in place of calls; less for what is made of nothing at all.
LARGEST_EVALUATED = 2**26
LARGEST_MADE = 2**20


def clean(calls: fx.Graph, constants: dict[str, Tensor]) -> None:
    """Rewrites a functional graph. Every call has all its positional arguments afterwards, and of the keywords those
    that are not the default. What depends on constants alone becomes a constant.
    """
    for node in calls.nodes:  # torch.fx allows for nodes that come and go meanwhile
        if node.op == "call_module" or node.target in ASSERTIONS:  # torch.export's checks of arguments are modules
            calls.erase_node(node)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if not _evaluate(node, constants):
                _spell(node, constants)
        elif node.target is operator.mul:
            node.target = multiplied
    for node in reversed(list(calls.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            calls.erase_node(node)


def _spell(node: fx.Node, constants: dict[str, Tensor]) -> None:
    """Applies the rule for a call, if there is one."""
    call = SpelledCall(node, constants)
    written = RULES[node.target](call) if node.target in RULES else None
    if written is None:
        call.normalise()
        _evaluate(node, constants)
        return
    if written in call.written and "val" not in written.meta:
        written.meta = dict(node.meta)
    node.replace_all_uses_with(written)
    node.graph.erase_node(node)
    for one in call.written:
        SpelledCall(one, constants).normalise()
    if written in call.written:
        _evaluate(written, constants)


def _evaluate(node: fx.Node, constants: dict[str, Tensor]) -> bool:
    """Replaces a call that depends on constants alone by its result: by a constant, or, where the result is a tuple,
    each of its members that something reads.
    """
    inputs = node.all_input_nodes
    if any(one.op != "get_attr" for one in inputs) or not (inputs or node.target in MAKERS):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        return False
    limit = LARGEST_EVALUATED if inputs else LARGEST_MADE
    single = isinstance(node.meta.get("val"), Tensor)
    readers = [node] if single else list(node.users)
    if not all(_is_known(reader, limit) for reader in readers):
        return False
    args, kwargs = map_arg((node.args, node.kwargs), lambda one: constants[str(one.target)])
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    for reader in readers:
        name = f"computed.{reader.name}"
        constants[name] = (result if single else result[reader.args[1]]).contiguous()
        with node.graph.inserting_before(node):
            written = node.graph.get_attr(name)
        written.meta = dict(reader.meta)
        reader.replace_all_uses_with(written)
        if reader is not node:
            node.graph.erase_node(reader)
    node.graph.erase_node(node)
    return True


def _is_known(node: fx.Node, limit: int) -> bool:
    """Whether the value of a node is a tensor of a known shape and at most so many bytes."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return False
    return value.numel() * value.itemsize <= limit
