"""Which module what runs belongs to, forward and backward.

In a forward pass it is the module that runs, in a backward pass the one that made the node of autograd's graph which
runs: PyTorch numbers nodes as they are made, right before the operators that they differentiate are called.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..conversion.observing import silence

Modules = tuple[nn.Module, ...]
# Nodes of autograd's graph that this thread has made: the number of the next one.
_nodes_made = torch.autograd._get_sequence_nr  # pyright: ignore[reportPrivateImportUsage]


class Places:
    """As long as it is entered, it follows the modules of a copied model that run.

    names: of the modules, by id. running: the modules that run, each within the one before it, or several that are
    computed in one step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.running: list[Modules] = [(model,)]
        self.forward_of: dict[int, Modules] = {}  # what ran when a node of autograd's graph was made

    def __enter__(self) -> Places:
        for module in self.model.modules():
            silence(module)
            if not isinstance(module, torch.jit.ScriptModule):
                module.__dict__["_compiled_call_impl"] = functools.partial(self.called, module)
        return self

    def __exit__(self, *error: Any) -> None:
        for module in self.model.modules():
            module.__dict__.pop("_compiled_call_impl", None)

    def called(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of the call of a module: one with hooks would not be fused."""
        with self.within((module,)):
            return module._call_impl(*args, **kwargs)

    @contextmanager
    def within(self, modules: Modules) -> Iterator[None]:
        """What runs meanwhile belongs to these modules, unless there are none."""
        self.running += [modules] * bool(modules)
        try:
            yield
        finally:
            del self.running[len(self.running) - bool(modules) :]

    @property
    def in_model(self) -> bool:
        """Whether the model runs, or a module of it again in a backward pass that it is checkpointed for."""
        return len(self.running) > 1

    @property
    def node(self) -> int:
        """The number of the node of autograd's graph that was made last."""
        return _nodes_made() - 1

    def now(self) -> tuple[Modules, bool]:
        """(the modules that what runs now belongs to, whether this is a backward pass)."""
        node: Any = torch._C._current_autograd_node()
        if node is None or self.in_model:  # a backward pass runs modules again that are checkpointed
            self.forward_of.setdefault(self.node, self.running[-1])
            return self.running[-1], node is not None
        # The node that adds a gradient to a parameter has no number of its own.
        return self.forward_of.get(node._sequence_nr(), self.running[0]), True
