"""A GPU pretended: tensors of the `device` fixture and tensors of the CPU cannot be mixed, though all of them lie in
the CPU's memory.

With `pytest --pretend-gpu` the fixture `device` is torch.device("cpu", 0), which PyTorch takes for the CPU and which is
yet another device than torch.device("cpu"). Tensors made there, or sent there, are remembered by their storages, and so
is what is computed of them. What a CUDA GPU would refuse is then refused here, in the interpreter:

- operations on tensors of both kinds, except for a number on the CPU, an index on the CPU, and a copy,
- numpy arrays of the GPU's tensors,
- launches of kernels on tensors of the CPU.

As on a machine with a GPU, PyTorch serves the calls of cnnfast.functional whose tensors are on the CPU. A test in which
that happens tests nothing of ours there: `Pretended.served_by_torch` counts such calls, and tests/conftest.py fails
tests that did not say so by the mark `cpu_tensors`. What only looks at the CPU, torch.compile and the like, cannot see
which kind a tensor is: see `BLIND`.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

CPU, PRETENDED = torch.device("cpu"), torch.device("cpu", 0)
PLAIN = (Tensor, torch.nn.Parameter)
LAZY = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)
CPU_REASON = "the tensors are on the CPU, and the GPU is pretended"
# These stand for the whole tensor that they are asked about; on a GPU too an index, or the numbers that an augmentation
# is told, may lie on the CPU.
MAY_MIX = (
    "copy_",
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "set_",
    "_unsafe_index",
    "is_same_size",
    "_has_same_storage_numel",
    # cnnfast's, which copy numbers on the CPU to the images' device
    "augment",
    "augment_plain",
)
# What makes tensors of its own, or chooses the device: it says nothing about where a test's tensors are, and such a
# test is skipped.
BLIND = {
    "torch.compile": torch,
    "torch.export.export": torch.export,
    "torch.library.opcheck": torch.library,
    "torch.jit.trace": torch.jit,
    "typer.testing.CliRunner.invoke": CliRunner,  # the command chooses the device
    "pickle.loads": pickle,
    "torch.autograd.gradcheck": torch.autograd,
    "torch.autograd.gradgradcheck": torch.autograd,
    "torch.nn.parameter.UninitializedTensorMixin.materialize": torch.nn.parameter.UninitializedTensorMixin,
}
# functorch's rules make tensors of their own, below where this module sees which kind they are.
BLIND_TESTS = ("functional/test_transforms.py::", "conversion/test_tools.py::test_functional_call_and_transforms")


def _plain(t: Any) -> bool:
    return type(t) in PLAIN and not t.is_meta and t.layout is torch.strided and torch._C._has_storage(t)


# Those on the GPU, by address. For the whole process: a test may keep a tensor for the next one.
_storages: dict[int, StorageWeakRef] = {}


# Of which PyTorch's derivatives make numbers for tensors on either kind.
SCALARS = (torch.ops.aten.scalar_tensor.default,)


class Pretended(TorchDispatchMode):
    """Knows which tensors are on the GPU that is pretended."""

    def __init__(self) -> None:
        super().__init__()
        self.served_by_torch: list[str] = []

    def key(self, t: Tensor) -> int:
        return t.untyped_storage()._cdata

    def holds(self, t: Tensor) -> bool:
        """Whether `t` is on the GPU."""
        if type(t) is Tensor and t.layout is torch.sparse_coo:
            t = t._values()
        if not _plain(t):
            return False
        found = _storages.get(self.key(t))
        return found is not None and not found.expired()

    def put(self, t: Tensor, there: bool) -> Tensor:
        """Remembers the memory of `t` as the GPU's or the CPU's."""
        if t.layout is torch.sparse_coo and type(t) is Tensor:
            t = t._values()
        if _plain(t):
            if there:
                _storages[self.key(t)] = StorageWeakRef(t.untyped_storage())
            else:
                _storages.pop(self.key(t), None)
        return t

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and _plain(t)]
        there = [t for t in given if self.holds(t)]
        name = func._schema.name.partition("::")[2]
        if there and name not in MAY_MIX and any(t.dim() for t in given if not self.holds(t)):
            sizes = ", ".join(f"{'GPU' if self.holds(t) else 'CPU'} {list(t.shape)}" for t in given)
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got {sizes} (the GPU is pretended)"
            )
        asked = kwargs.get("device")
        if not given and asked == CPU and func not in SCALARS and torch._C._current_autograd_node() is not None:
            asked = PRETENDED  # made by a derivative of PyTorch's own, which names the device of an operand
        if func.namespace == "cnnfast" and all(_plain(t) for t in tree_leaves(args) if isinstance(t, Tensor)):
            with self:  # what the operator allocates is put where its operands are
                results = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        else:
            results = func(*args, **kwargs)
        # Of operations that take both kinds the first operand decides; set_ hands out a storage that is known already.
        if asked == PRETENDED or (there and (name not in MAY_MIX or self.holds(given[0])) and name != "set_"):
            for t in tree_leaves(results):
                if isinstance(t, Tensor):
                    self.put(t, True)
        return results


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, pretended: Pretended, there: bool) -> Tensor:
        ctx.pretended, ctx.there = pretended, pretended.holds(t)
        return pretended.put(t.clone(), there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pretended.put(grad.clone(), ctx.there), None, None


def _refuses_numpy(original: Callable[..., Any], pretended: Pretended) -> Callable[..., Any]:
    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if pretended.holds(self):
            raise TypeError("can't convert a tensor on the GPU that is pretended to numpy. Use Tensor.cpu() first")
        return original(self, *args, **kwargs)

    return call


def _skips(what: str) -> Callable[..., NoReturn]:
    def call(*args: Any, **kwargs: Any) -> NoReturn:
        pytest.skip(f"pretended GPU: {what} does not see where a tensor is")

    return call


@contextmanager
def pretended_gpu(launch_anywhere: bool = False) -> Iterator[Pretended]:
    """torch.device("cpu", 0) is a GPU meanwhile, in this thread's operations. launch_anywhere: kernels run on the CPU's
    tensors too.
    """
    from triton.runtime.interpreter import GridExecutor

    from cnnfast import dispatch

    pretended = Pretended()
    to, clone, deepcopy, launch = Tensor.to, Tensor.clone, Tensor.__deepcopy__, GridExecutor.__call__
    parse_to = torch._C._nn._parse_to
    made = {name: getattr(torch, name) for name in ("tensor", "as_tensor", "asarray")}

    def moved(t: Tensor, device: torch.device | None) -> Tensor:
        if device is None or device.type != "cpu" or not _plain(t) or pretended.holds(t) == (device == PRETENDED):
            return t
        if t.requires_grad and torch.is_grad_enabled():
            return _Moved.apply(t, pretended, device == PRETENDED)
        return pretended.put(clone(t), device == PRETENDED)

    def to_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _plain(self):
            with torch._C.DisableTorchFunctionSubclass() if isinstance(self, LAZY) else nullcontext():
                return to(self, *args, **kwargs)
        other = kwargs.get("other", args[0] if args else None)
        if isinstance(other, Tensor):
            return moved(to(self, *args, **kwargs), PRETENDED if pretended.holds(other) else other.device)
        copies = kwargs.pop("copy", False)
        device, dtype, _, fmt = parse_to(*args, **kwargs)
        if device is not None and device.type != "cpu":
            return to(self, *args, **kwargs)
        result = (
            self
            if dtype is None and fmt is None and not copies
            else to(self, dtype=dtype or self.dtype, memory_format=fmt, copy=copies)
        )
        return moved(result, device)

    def parsed(*args: Any, **kwargs: Any) -> Any:
        """For Module.to, of a tensor among others."""
        device, *others = parse_to(*args, **kwargs)
        return PRETENDED if args and isinstance(args[0], Tensor) and pretended.holds(args[0]) else device, *others

    def where(self: Tensor) -> torch.device:
        return PRETENDED if pretended.holds(self) else torch._C.TensorBase.device.__get__(self)

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            asked = kwargs.get("device")
            return moved(made, torch.device(asked)) if asked is not None else made

        return call

    def copied(self: Tensor, memo: Any) -> Tensor:
        return pretended.put(deepcopy(self, memo), pretended.holds(self))

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in () if launch_anywhere else tree_leaves((args, kwargs), is_leaf=lambda a: hasattr(a, "base")):
            t = getattr(argument, "base", argument)
            if isinstance(t, Tensor) and _plain(t) and t.numel() and not pretended.holds(t):
                raise ValueError(
                    "Pointer argument cannot be accessed from Triton (cpu tensor?): "
                    f"{list(t.shape)} of {self.fn.__name__}"
                )
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    def judged(why_torch: Callable[..., str]) -> Callable[..., str]:
        def why(x: Tensor, *others: Tensor | None, **how: Any) -> str:
            reason = why_torch(x, *others, **how)
            if not reason and _plain(x) and not pretended.holds(x):
                reason = dispatch._torch(CPU_REASON)
                pretended.served_by_torch.append(f"{sys._getframe(1).f_code.co_name}({list(x.shape)})")
            return reason

        return why

    with ExitStack() as stack:
        replace: Callable[[Any, str, Any], None] = lambda owner, name, new: stack.enter_context(  # noqa: E731
            mock.patch.object(owner, name, new)
        )
        replace(Tensor, "to", to_)
        replace(torch._C._nn, "_parse_to", parsed)
        replace(Tensor, "cpu", lambda self, *_, **__: moved(self, CPU))
        replace(Tensor, "device", property(where))
        replace(Tensor, "__deepcopy__", copied)
        for name in ("numpy", "__array__"):
            replace(Tensor, name, _refuses_numpy(getattr(Tensor, name), pretended))
        for name, original in made.items():
            replace(torch, name, factory(original))
        for name, module in BLIND.items():
            replace(module, name.rpartition(".")[2], _skips(name))
        replace(GridExecutor, "__call__", launched)
        # it asks with tensors of the CPU; tests/support/interpreter.py mends it
        replace(dispatch, "_interpreter_rounds_bf16", lambda: True)
        for name, module in [*sys.modules.items()]:
            if name.startswith(("cnnfast.functional", "cnnfast.nn")) and "why_torch" in vars(module):
                replace(module, "why_torch", judged(module.why_torch))
        stack.enter_context(pretended)
        yield pretended
