"""Which module each operator of a step belongs to, forward and backward, and in which order they are called; and which
module keeps what for backward.

It is the module whose parameters the operator is given, or that runs, or made the node of autograd's graph that does
(placing.py).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from ..calls import CallRecorder, OperatorCall
from ..conversion.costs import memory_of
from ..moved_bytes import by_operator, lays_out
from ..ops.registry import OPERATORS
from .placing import Modules, Places


class Followed(NamedTuple):
    """A call of an operator of ours. layer: the module's name, "" for the model itself. step: the number of the
    operator's call that it is a part of, None if it is of none.
    """

    layer: str
    backward: bool
    call: OperatorCall
    step: int | None


class FollowedStep(NamedTuple):
    """A call of an operator that is composed of others."""

    layer: str
    backward: bool
    operator: str


class Foreign(NamedTuple):
    """A call of an operator of PyTorch's that moves memory. flops: 0 unless it multiplies matrices or convolves. step:
    as Followed has it. lays_out: whether it only copies, which on a GPU's tensors it may not have to.
    """

    layer: str
    backward: bool
    operator: str
    dtype: torch.dtype
    flops: int
    bytes: int
    step: int | None
    lays_out: bool


class Follower(CallRecorder):
    """followed, foreign, steps: the calls of a step, in their order."""

    def __init__(self, model: nn.Module, with_numbers: bool) -> None:
        super().__init__(model, with_numbers)
        self.followed: list[Followed] = []
        self.foreign: list[Foreign] = []
        self.steps: list[FollowedStep] = []
        self.places = Places(model)
        self.step: int | None = None  # the call of a composed operator that runs
        self.moments: int | None = None  # the followed call of statistics of which the norm is not known yet
        # Convolutions by the memory of their images and the size of their weights; with the image, which keeps its
        # memory from another's use.
        self.inputs: dict[tuple[int, tuple[int, ...]], tuple[nn.Module, Tensor]] = {}
        self.casts: list[Tensor] = []  # of parameters, which keeps their memory from another's use
        self.stack = ExitStack()

    def __enter__(self) -> Follower:
        self.stack.enter_context(self.places)
        self.stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.places.keep, lambda t: t))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        _, ours, name = func._schema.name.partition("cnnfast::")
        if not ours:
            return super().__torch_dispatch__(func, types, args, kwargs)
        composed, outer = OPERATORS[name].composed, self.step
        own = self.places.owning(args, composed)
        if own and not composed:
            self.owned(own[0], name, args)
        with self.places.within(own or self.by_operands(name, args)):
            modules, backward = self.places.now()  # by which the node is known that was made for this operator
            if composed and outer is None:
                self.step = len(self.steps)
                self.steps.append(FollowedStep(self.places.names[id(modules[0])], backward, name))
            try:
                return super().__torch_dispatch__(func, types, args, kwargs)
            finally:
                self.step = outer

    def by_operands(self, name: str, args: tuple[Any, ...]) -> Modules:
        """Whose an operator is that is given no parameter of it: the gradient of a weight is that convolution's which
        had the same image; statistics are those of the norm that is called next.
        """
        if name == "batch_moments":
            self.moments = len(self.followed)
        if name != "conv_wgrad":
            return ()
        x, _, w_shape, *_ = args
        known = self.inputs.get((memory_of(x), tuple(w_shape)))
        return () if known is None else (known[0],)

    def owned(self, module: nn.Module, name: str, args: tuple[Any, ...]) -> None:
        """Is told of an operator that is given parameters of a module."""
        if self.moments is not None:
            layer = self.places.names[id(module)]
            self.followed[self.moments] = self.followed[self.moments]._replace(layer=layer)
            self.moments = None
        if name.startswith("conv_") and not name.startswith("conv_dgrad"):
            self.inputs[memory_of(args[0]), tuple(args[1].shape)] = module, args[0]

    def record(self, call: OperatorCall) -> None:
        (module, *_), backward = self.places.now()
        self.followed.append(Followed(self.places.names[id(module)], backward, call, self.step))

    def others(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (module, *_), backward = self.places.now()
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name == "_to_copy" and memory_of(args[0]) in self.places.own:  # as autocast does with weights
            self.places.own[memory_of(result)] = self.places.own[memory_of(args[0])]
            self.casts.append(result)
        if not self.places.in_model and not backward:  # the gradient of what the model returned is made
            return result
        moved = by_operator(func, args, kwargs, result)
        if moved is None:
            return result
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        dtype = moved.written[0].dtype
        layer = self.places.names[id(module)]
        self.foreign.append(Foreign(layer, backward, name, dtype, flops, moved.bytes, self.step, lays_out(name, moved)))
        return result
