"""Which module what runs belongs to, forward and backward.

In a forward pass it is the module that runs, in a backward pass the one that made the node of autograd's graph which
runs: PyTorch numbers nodes as they are made, right before the operators that they differentiate are called.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..conversion.costs import memory_of, tensors_of
from ..conversion.observing import silence
from ..nn.stages import may_link

Modules = tuple[nn.Module, ...]
FILTERS = 3  # axes that a convolution's weights have at least, and no other parameter of a layer
# Nodes of autograd's graph that this thread has made: the number of the next one.
_nodes_made = torch.autograd._get_sequence_nr  # pyright: ignore[reportPrivateImportUsage]


class _Kept(NamedTuple):
    """Memory that is kept for backward by a node of autograd's graph. running: the module that runs meanwhile."""

    tensor: Tensor
    node: int
    running: Modules


class Places:
    """As long as it is entered, it follows the modules of a copied model that run.

    names: of the modules, by id. running: the modules that run, each within the one before it. own: whose the memory of
    each parameter and buffer is, of those that share one the first's. links: whether residual blocks are linked
    meanwhile (nn/stages.py), as they are elsewhere: then nothing follows the calls of these, and of what calls them one
    after another, and their operators are told by their parameters.
    """

    def __init__(self, model: nn.Module, links: bool = True) -> None:
        self.model, self.links = model, links
        self.names = {id(module): name for name, module in model.named_modules()}
        self.running: list[Modules] = [(model,)]
        self.forward_of: dict[int, Modules] = {}  # what ran when a node of autograd's graph was made
        self.own = _owners(model)
        self.kept: dict[int, _Kept] = {}

    def __enter__(self) -> Places:
        for module in self.model.modules():
            silence(module)
            linked = self.links and (may_link(module) or type(module) is nn.Sequential)
            if not linked and not isinstance(module, torch.jit.ScriptModule):
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

    def owning(self, args: Sequence[Any], composed: bool) -> Modules:
        """The module whose parameters an operator of ours is given, which in a fused step is not the one that runs: of
        a convolution with its norm, the convolution; of several convolutions, the module that has them all, if that is
        within the one that runs. Nobody where there is none, or no convolution in an operator that is composed of
        others.
        """
        own = [t for t in tensors_of(args) if memory_of(t) in self.own]
        filters = [t for t in own if t.dim() >= FILTERS]
        tensors = filters if filters or composed else own
        modules = {id(module): module for module in (self.own[memory_of(t)] for t in tensors)}
        if len(modules) < 2:
            return tuple(modules.values())
        paths = [self.names[of].split(".")[:-1] for of in modules]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        name, running = ".".join(parts[0] for parts in shared), self.names[id(self.running[-1][0])]
        return (self.model.get_submodule(name),) if name and f"{name}.".startswith(running and f"{running}.") else ()

    def keep(self, t: Tensor) -> Tensor:
        """Is to be called with every tensor that is saved for backward; which keeps the memory's name from another's
        use.
        """
        self.kept.setdefault(memory_of(t), _Kept(t, self.node, self.running[-1]))
        return t

    def saved(self) -> dict[str, int]:
        """Bytes that each layer is the first to keep for backward, by its name; parameters and buffers aside."""
        own = _owners(self.model)  # lazy modules have got their parameters
        found: dict[str, int] = {}
        for memory, kept in self.kept.items():
            if memory not in own:
                name = self.names[id(self.forward_of.get(kept.node, kept.running)[0])]
                found[name] = found.get(name, 0) + kept.tensor.untyped_storage().nbytes()
        return found

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


def _owners(model: nn.Module) -> dict[int, nn.Module]:
    """Whose the memory of each parameter and buffer is: of those that share one, the first's."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and not is_lazy(t):
                found.setdefault(memory_of(t), module)
    return found
