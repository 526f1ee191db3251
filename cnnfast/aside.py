"""Running a model for what can be learnt from it, and not for its caller."""

from __future__ import annotations

import copy
import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

T = TypeVar("T")


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Random numbers, PyTorch's, Python's and numpy's, are afterwards as they were; what is compiled runs uncompiled."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    # Nothing is compiled before torch._dynamo is imported, and importing it takes seconds.
    uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    draws = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda), uncompiled:
            yield
    finally:
        random.setstate(draws[0])
        numpy.random.set_state(draws[1])


def meta(tree: Any) -> Any:
    """The same on meta tensors, strides included."""
    return tree_map_only(Tensor, lambda t: torch.empty_like(t.detach(), device="meta"), tree)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy with meta tensors in the place of all that the model holds, shared ones still shared, and those of lazy
    modules still lazy.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in tree_leaves(dict(vars(module))):
            if is_lazy(t):
                memo[id(t)] = _another(t, "meta")
            elif isinstance(t, nn.Parameter):
                memo[id(t)] = nn.Parameter(meta(t), t.requires_grad)
            elif isinstance(t, Tensor):
                memo[id(t)] = meta(t)
    with _CopiesTensors(meta):
        return copy.deepcopy(model, memo)


def _real_copy(model: nn.Module) -> nn.Module:
    held = (t for module in model.modules() for t in tree_leaves(dict(vars(module))))
    with _CopiesTensors(lambda t: t.detach().clone()):
        return copy.deepcopy(model, {id(t): _another(t, t.data.device) for t in held if is_lazy(t)})


class _CopiesTensors(TorchFunctionMode):
    """copy.deepcopy copies tensors by `copied`, wherever they are held, such as in objects that hook: results too,
    which it refuses.
    """

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.copied = copied

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not Tensor.__deepcopy__:
            return func(*args, **kwargs or {})
        t, memo = args
        if id(t) not in memo:
            memo[id(t)] = self.copied(t)
        return memo[id(t)]


def _another(t: Any, device: torch.device | str) -> Tensor:
    """A parameter or buffer that is to get its size at the first call, as `t` is."""
    return type(t)(requires_grad=t.requires_grad, device=device, dtype=t.data.dtype)


def on_a_copy(
    run: Callable[[nn.Module, tuple[Any, ...]], T],
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    meta_only: bool = False,
) -> T:
    """run(a copy of the model, the inputs) on meta tensors; on real ones if that raises, unless the inputs are meta, or
    meta_only.

    Random numbers are afterwards as they were, and what is compiled runs uncompiled. Raises what the last run raised.
    """
    try:
        return run_aside(run, meta_copy(model), meta(example_inputs))
    except Exception:
        if meta_only or any(t.is_meta for t in tree_leaves(example_inputs) if isinstance(t, Tensor)):
            raise
    return run_aside(run, _real_copy(model), tree_map_only(Tensor, Tensor.clone, example_inputs))


def run_aside(run: Callable[[nn.Module, tuple[Any, ...]], T], model: nn.Module, inputs: tuple[Any, ...]) -> T:
    """run(model, inputs), leaving no trace; where inputs are meta tensors, others that are made are too."""
    made = (
        torch.device("meta") if any(t.is_meta for t in tree_leaves(inputs) if isinstance(t, Tensor)) else nullcontext()
    )
    with leaving_no_trace(), made:
        return run(model, inputs)


def is_callers(hook: Any) -> bool:
    """Whether a hook of a copy is the caller's, who shall not hear of the copy: functions are. Objects that hook have
    been copied with the model, and may be part of it, as pruning is.
    """
    while isinstance(hook, functools.partial):
        hook = hook.func
    return isinstance(hook, types.FunctionType)
