"""Which module each operator of a step belongs to, forward and backward, and in which order they are called.

It is the module that runs, or made the node of autograd's graph that does (placing.py), and in a fused step the one of
its modules that the operator is of.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from ..calls import CallRecorder, OperatorCall
from ..conversion.leaves import is_norm
from ..functional.entrance import capture
from ..moved_bytes import by_operator
from ..nn.fused import observed
from .placing import Places

# Our operators that are of a norm, where a step has a convolution too.
OF_A_NORM = ("batch_moments", "update_running", "normalize", "normalize_backward", "combine_ranks", "gradient_sums")


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
        self.places = Places(model)
        self.step: tuple[nn.Module, ...] = ()  # those of a fused step that is about to be computed
        self.stack = ExitStack()

    def __enter__(self) -> Follower:
        self.stack.enter_context(self.places)
        self.stack.enter_context(observed(self.begins))
        self.stack.enter_context(capture(self.function))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
        super().__exit__(*error)

    def begins(self, modules: tuple[nn.Module, ...], residual: bool, activation: str | None) -> None:
        """Is told by nn/fused.py of a step, before it is computed."""
        self.step = tuple(module for module in modules if id(module) in self.places.names)

    def function(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Is around every call of a function of cnnfast.functional."""
        step, self.step = self.step, ()
        return self.places.within(step)

    def record(self, call: OperatorCall) -> None:
        modules, backward = self.places.now()
        ofs = [module for module in modules if is_norm(module)] if call.operator in OF_A_NORM else modules
        self.followed.append(Followed(self.places.names[id((ofs or modules)[0])], backward, call))

    def others(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (module, *_), backward = self.places.now()
        result = func(*args, **kwargs)
        if not self.places.in_model and not backward:  # the gradient of what the model returned is made
            return result
        moved = by_operator(func, args, kwargs, result)
        if moved is None:
            return result
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        name, dtype = func._overloadpacket.__name__, moved.written[0].dtype
        self.foreign.append(Foreign(self.places.names[id(module)], backward, name, dtype, flops, moved.bytes))
        return result
