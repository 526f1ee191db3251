"""In-place operators of a captured network become functional ones, where that can be proven right.

torch.export records each write into a tensor as a node, and what reads the very same tensor afterwards reads that node.
What it does not follow are other tensors in the same memory: a view of what was written, or what the written one is a
view of. So a write is replaced where every later read of that memory goes through the node of the write, or reads a
tensor with the same elements in the same places, which becomes that node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..operators import CannotCapture

aten = torch.ops.aten

# In eval mode PyTorch returns the argument itself. torch.export does not know that, and traces another tensor.
DROPOUTS = {
    getattr(aten, name + underscore).default: aten.alias.default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for underscore in ("", "_")
}


def drop_dropout(calls: fx.Graph) -> None:
    """Dropout in eval mode becomes what it is: another name of its argument. So does detach_, which writes nothing."""
    for node in calls.nodes:
        if node.target is aten.detach_.default:
            node.target = aten.detach.default
        if node.target in DROPOUTS:
            source, probability, training = node.args
            if training and probability:
                raise CannotCapture(f"{node.target} draws random numbers, for it is called with training=True")
            node.target, node.args = DROPOUTS[node.target], (source,)


def make_functional(calls: fx.Graph) -> bool:
    """Replaces every in-place operator by its functional form. Returns False, and leaves a graph of no use, where that
    is not proven right: something reads, after a write, a tensor that shares only a part of the memory written, or has
    other strides.
    """
    order = {node: index for index, node in enumerate(calls.nodes)}
    memory = _Memory(calls)
    for node in list(calls.nodes):
        written = _written(node)
        if written is None:
            continue
        if not isinstance(written, fx.Node) or not _has_functional_form(node, written):
            return False
        if not memory.same_elements(node, written):  # unsqueeze_ and its like change the tensor, not its elements
            return False
        for other in memory.sharing(written):
            if other.op == "get_attr" and not _is_copied(other):
                raise CannotCapture(f"{other.target} is changed by the network itself while it runs")
            later = [user for user in other.users if order[user] > order[node]]
            if other is node or order[other] > order[node] or not later:
                continue
            if not memory.same_elements(other, written):
                return False
            for user in later:
                user.replace_input_with(other, node)
        name = node.target._schema.name.removeprefix("aten::").rstrip("_")
        node.target = getattr(getattr(aten, name), node.target._overloadname)
    return True


def drop_writes_to_inputs(calls: fx.Graph) -> None:
    """torch.export's functional form ends with copies into those inputs that the module wrote into. A frozen network
    leaves its inputs alone.
    """
    for node in reversed(list(calls.nodes)):
        if node.target is aten.copy_.default:
            written = node.args[0]
            if written.op == "get_attr":
                raise CannotCapture(f"{written.target} is changed by the network itself while it runs")
            node.replace_all_uses_with(node.args[1])
            calls.erase_node(node)


def _is_copied(constant: fx.Node) -> bool:
    """Whether a constant is a tensor that the module makes anew in each call, such as torch.tensor(3.0)."""
    return all(user.target is aten.lift_fresh_copy.default for user in constant.users)


def _written(node: fx.Node) -> Any:
    """The argument that a call writes into: a node, or something else than None where it is not a plain tensor."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    return node.args[0] if node.target._schema.name.endswith("_") and node.args else False


def _has_functional_form(node: fx.Node, written: fx.Node) -> bool:
    """Whether there is one, and it gives what the in-place operator writes: the dtype of the written tensor decides
    about an in-place operator, that of all arguments about a functional one.
    """
    name = node.target._schema.name.removeprefix("aten::").rstrip("_")  # type: ignore[union-attr]
    packet = getattr(aten, name, None)
    if packet is None or node.target._overloadname not in packet.overloads():  # type: ignore[union-attr]
        return False
    tensors = [value for argument in node.all_input_nodes for value in _tensors(argument)]
    return all(value.dtype == written.meta["val"].dtype or value.dtype == torch.bool for value in tensors)


def _tensors(node: fx.Node) -> Iterator[Tensor]:
    value = node.meta.get("val")
    for part in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(part, Tensor):
            yield part


class _Memory:
    """Which nodes lie in the same memory: torch.export traces with tensors that have no data, but storages."""

    def __init__(self, calls: fx.Graph) -> None:
        self.nodes: dict[int, list[fx.Node]] = {}
        self.storages: dict[fx.Node, set[int]] = {}
        joined: dict[int, int] = {}

        def root(storage: int) -> int:
            while joined.get(storage, storage) != storage:
                storage = joined[storage]
            return storage

        for node in calls.nodes:
            self.storages[node] = {value.untyped_storage()._cdata for value in _tensors(node)}
            if node.target is aten.alias.default:  # dropout, whose storage is another
                for one, other in zip(self.storages[node], self.storages[node.args[0]], strict=True):
                    joined[root(one)] = root(other)
        self.storages = {node: set(map(root, storages)) for node, storages in self.storages.items()}
        for node, storages in self.storages.items():
            for storage in storages:
                self.nodes.setdefault(storage, []).append(node)

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        return [other for storage in self.storages[node] for other in self.nodes[storage]]

    def same_elements(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two nodes that share memory are the same tensor."""
        return _geometry(one) == _geometry(other) is not None


def _geometry(node: fx.Node) -> tuple[str, ...] | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return str(value.dtype), str(tuple(value.shape)), str(value.stride()), str(value.storage_offset())
