"""A captured graph without what does nothing in a network that only infers, and with one spelling of each operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
IDENTITIES = {
    *(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default),
    *(aten.contiguous.default, aten.detach.default, aten.alias.default, aten.clone.default),
    *(aten.lift_fresh_copy.default, aten.lift_fresh.default),
}


def clean(calls: fx.Graph) -> None:
    for node in list(calls.nodes):
        if node.op == "call_module":
            calls.erase_node(node)
        elif node.op == "call_function" and node.target in IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            calls.erase_node(node)
        elif node.op == "call_function" and node.target is aten.view.default:
            node.target = aten.reshape.default
    calls.eliminate_dead_code()
