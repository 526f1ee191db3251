"""Runs a copy of a model to learn something of it, without a trace in the model or in its caller's state."""

from __future__ import annotations

import copy
import functools
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .located import located

T = TypeVar("T")

# What is put back afterwards is the process's: two threads would put back each other's.
_one_at_a_time = threading.RLock()

_aside: ContextVar[bool] = ContextVar("a copy is run to learn something of it", default=False)


def is_aside() -> bool:
    """Whether what runs is a copy of a model, for the sake of a look at it: it must not wait for other processes."""
    return _aside.get()


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """The random numbers of PyTorch, Python and numpy are afterwards as they were, and what torch.compile compiled runs
    uncompiled meanwhile. Both are the process's: what other threads draw meanwhile they may draw again, and they run
    uncompiled, too. One thread at a time does this; others wait. No batch norm of ours synchronises meanwhile.
    """
    with _one_at_a_time:
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        # Nothing is compiled before torch._dynamo is imported, and importing it takes seconds.
        uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        draws = random.getstate(), numpy.random.get_state()
        token = _aside.set(True)
        try:
            with torch.random.fork_rng(devices=cuda), uncompiled:
                yield
        finally:
            _aside.reset(token)
            random.setstate(draws[0])
            numpy.random.set_state(draws[1])


def meta(tree: Any) -> Any:
    """The same structure with meta tensors, of the same strides."""
    return tree_map_only(Tensor, lambda t: torch.empty_like(t.detach(), device="meta"), tree)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy with meta tensors in the place of all tensors that the model holds. Those that were shared still are, and
    those of lazy modules are still without a size.
    """
    memo = shared_groups(model)
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


def real_copy(model: nn.Module) -> nn.Module:
    held = (t for module in model.modules() for t in tree_leaves(dict(vars(module))))
    with _CopiesTensors(lambda t: t.detach().clone()):
        another = {id(t): _another(t, t.data.device) for t in held if is_lazy(t)}
        return copy.deepcopy(model, shared_groups(model) | another)


def shared_groups(model: nn.Module) -> dict[int, Any]:
    """For copy.deepcopy, as its memo: the process groups of synchronised norms, which it cannot copy, are shared."""
    norms = (module for module in model.modules() if isinstance(module, nn.SyncBatchNorm))
    return {id(norm.process_group): norm.process_group for norm in norms}


class _CopiesTensors(TorchFunctionMode):
    """Meanwhile copy.deepcopy copies tensors by `copied`, wherever they are held, such as in objects that are hooks. By
    itself it refuses tensors that are results of others.
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
    """A parameter or buffer of a lazy module, like `t`, which gets its size when the module is first called."""
    return type(t)(requires_grad=t.requires_grad, device=device, dtype=t.data.dtype)


def on_a_copy(
    run: Callable[[nn.Module, tuple[Any, ...]], T],
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    meta_only: bool = False,
) -> T:
    """run(a copy of the model, the inputs), on meta tensors. If that raises, it runs again on real ones, unless the
    inputs are meta tensors themselves, or meta_only.

    Random numbers are afterwards as they were, and what is compiled runs uncompiled. Raises what the last run raised.
    """
    try:
        return run_aside(run, meta_copy(model), meta(example_inputs))
    except Exception:
        if meta_only or any(t.is_meta for t in tree_leaves(example_inputs) if isinstance(t, Tensor)):
            raise
    return run_aside(run, real_copy(model), tree_map_only(Tensor, Tensor.clone, example_inputs))


def run_aside(run: Callable[[nn.Module, tuple[Any, ...]], T], model: nn.Module, inputs: tuple[Any, ...]) -> T:
    """run(model, inputs), leaving no trace. If inputs are meta tensors, those that are made meanwhile are, too."""
    made = (
        torch.device("meta") if any(t.is_meta for t in tree_leaves(inputs) if isinstance(t, Tensor)) else nullcontext()
    )
    with leaving_no_trace(), made:
        return run(model, inputs)


def does_not_run(model: nn.Module, inputs: tuple[Any, ...], error: Exception) -> RuntimeError:
    """The error to raise from `error`, which a run of the model on these inputs raised."""
    shapes = " ".join("x".join(map(str, t.shape)) for t in tree_leaves(inputs) if isinstance(t, Tensor))
    what = f"{type(model).__name__} does not run on {shapes or 'these inputs'}"
    return RuntimeError(f"{what}: {located(error)}")


def is_callers(hook: Any) -> bool:
    """Whether a hook of a copied model is still the caller's own, who shall not see calls of the copy. Functions are:
    copy.deepcopy shares them. Other objects were copied with the model, and may be a part of it, as torch's pruning is.
    """
    while isinstance(hook, functools.partial):
        hook = hook.func
    return isinstance(hook, types.FunctionType)
