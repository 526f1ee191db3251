"""Which module each operator of a step belongs to, forward and backward, and in which order they are called.

In a forward pass it is the module that runs, and in a fused step the one of its modules that the operator is of.
In a backward pass it is the module that made the node of autograd's graph which runs: PyTorch numbers nodes as they are
made, right before the operators that they differentiate are called.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..calls import CallRecorder, OperatorCall
from ..conversion.costs import size_of
from ..conversion.leaves import is_norm
from ..conversion.observing import silence
from ..functional.entrance import capture
from ..nn.fused import observed

# Our operators that are of a norm, where a step has a convolution too.
OF_A_NORM = ("batch_moments", "update_running", "normalize", "normalize_backward", "combine_ranks", "gradient_sums")
# Nodes of autograd's graph that this thread has made: the number of the next one.
_nodes_made = torch.autograd._get_sequence_nr  # pyright: ignore[reportPrivateImportUsage]
WRITE_ONLY = ("copy_", "fill_", "zero_")  # PyTorch's operators that do not read what they write into


class Followed(NamedTuple):
    """A call of an operator of ours. layer: the module's name, "" for the model itself."""

    layer: str
    backward: bool
    call: OperatorCall


class Foreign(NamedTuple):
    """A call of an operator of PyTorch's that moves memory. flops: 0 unless it multiplies matrices or convolves."""

    layer: str
    backward: bool
    operator: str
    dtype: torch.dtype
    flops: int
    bytes: int


class Follower(CallRecorder):
    """followed, foreign: the calls of a step, in their order."""

    def __init__(self, model: nn.Module, with_numbers: bool) -> None:
        super().__init__(model, with_numbers)
        self.followed: list[Followed] = []
        self.foreign: list[Foreign] = []
        self.names = {id(module): name for name, module in model.named_modules()}
        self.running: list[tuple[nn.Module, ...]] = [(model,)]  # the modules that run, or those of a fused step
        self.step: tuple[nn.Module, ...] = ()  # those of a fused step that is about to be computed
        self.forward_of: dict[int, tuple[nn.Module, ...]] = {}  # what ran when a node of autograd's graph was made
        self.stack = ExitStack()

    def __enter__(self) -> Follower:
        for module in self.model.modules():
            silence(module)
            if not isinstance(module, torch.jit.ScriptModule):
                module.__dict__["_compiled_call_impl"] = functools.partial(self.called, module)
        self.stack.enter_context(observed(self.begins))
        self.stack.enter_context(capture(self.function))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
        super().__exit__(*error)
        for module in self.model.modules():
            module.__dict__.pop("_compiled_call_impl", None)

    def called(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of the call of a module: one with hooks would not be fused."""
        self.running.append((module,))
        try:
            return module._call_impl(*args, **kwargs)
        finally:
            self.running.pop()

    def begins(self, modules: tuple[nn.Module, ...], residual: bool, activation: str | None) -> None:
        """Is told by nn/fused.py of a step, before it is computed."""
        self.step = tuple(module for module in modules if id(module) in self.names)

    @contextmanager
    def function(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Is around every call of a function of cnnfast.functional."""
        step, self.step = self.step, ()
        if not step:
            yield
            return
        self.running.append(step)
        try:
            yield
        finally:
            self.running.pop()

    def place(self) -> tuple[tuple[nn.Module, ...], bool]:
        """(the modules that what runs now belongs to, whether this is a backward pass)."""
        node: Any = torch._C._current_autograd_node()
        if node is None or len(self.running) > 1:  # a backward pass runs modules again that are checkpointed
            self.forward_of.setdefault(_nodes_made() - 1, self.running[-1])
            return self.running[-1], node is not None
        # The node that adds a gradient to a parameter has no number of its own.
        return self.forward_of.get(node._sequence_nr(), self.running[0]), True

    def record(self, call: OperatorCall) -> None:
        modules, backward = self.place()
        ofs = [module for module in modules if is_norm(module)] if call.operator in OF_A_NORM else modules
        self.followed.append(Followed(self.names[id((ofs or modules)[0])], backward, call))

    def others(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (module, *_), backward = self.place()
        result = func(*args, **kwargs)
        if len(self.running) == 1 and not backward:  # not the model's: the gradient of what it returned is made
            return result
        read, written = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), result))
        name = func._overloadpacket.__name__
        inside = {t.untyped_storage()._cdata for t in read}
        is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in inside for t in written)
        if is_view or "empty" in name:
            return result
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        moved = sum(map(size_of, (*(read[1:] if name in WRITE_ONLY else read), *written)))
        self.foreign.append(Foreign(self.names[id(module)], backward, name, written[0].dtype, flops, moved))
        return result
