"""Parts of a captured network that torch.export keeps apart, put back in their places."""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx, nn

from ..operators import CannotCapture


def inline(calls: fx.Graph, module: nn.Module) -> None:
    """Regions under torch.no_grad() and the like, and under torch.autocast(enabled=False), which mean nothing here."""
    for node in list(calls.nodes):
        name = str(node.target)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        part = next((one for one in node.args if isinstance(one, fx.Node) and one.op == "get_attr"), None)
        if name == "wrap_with_autocast" and node.args[2]:
            raise CannotCapture("a part of the network runs under torch.autocast, which chooses dtypes on its own")
        if name not in ("wrap_with_autocast", "wrap_with_set_grad_enabled") or part is None:
            raise CannotCapture(f"the path through the network depends on the values in a tensor ({name})")
        inner = getattr(module, str(part.target))
        inline(inner.graph, inner)
        given = node.args[node.args.index(part) + 1 :]
        placeholders = [one for one in inner.graph.nodes if one.op == "placeholder"]
        values = dict(zip(placeholders, given, strict=True))
        with calls.inserting_before(node):
            results = calls.graph_copy(inner.graph, values)
        if isinstance(results, fx.Node):
            node.replace_all_uses_with(results)
        for user in list(node.users):
            assert user.target is getitem, user
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            calls.erase_node(user)
        calls.erase_node(node)
        if not part.users:
            calls.erase_node(part)
