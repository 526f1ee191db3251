"""What a training step launches, and what it keeps for backward, counted on meta tensors that stand for a GPU's: exact
for our kernels. An operator of PyTorch's counts as one launch, and on a GPU is one or more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import calls, dispatch
from ..aside import leaving_no_trace, meta, meta_copy
from ..conversion import convert
from ..dispatch import Backend
from ..ops.registry import OPERATORS

# Memory without values; and what lays a convolution's result on meta tensors out as a GPU has it from the beginning.
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "to", "_to_copy", "copy_")


class StepCount(NamedTuple):
    """kernels: launches of ours, by the kernel's name. operators: calls of PyTorch's operators that compute, by name.
    saved_bytes: of the memory that forward keeps for backward, parameters and buffers aside.
    """

    kernels: Counter[str]
    operators: Counter[str]
    saved_bytes: int

    @property
    def launches(self) -> int:
        return self.kernels.total() + self.operators.total()


class _StepTally(TorchDispatchMode):
    """Counts PyTorch's operators, also those that ours call, which do on meta tensors what they would do on a GPU's."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _, ours, name = func._schema.name.partition("cnnfast::")
        if ours:
            with self:
                return OPERATORS[name].implementation(*(tuple(a) if isinstance(a, list) else a for a in args))
        result = func(*args, **(kwargs or {}))
        held = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        written = [t for t in _tensors(result) if t.numel() and t.untyped_storage()._cdata not in held]
        name = func._overloadpacket.__name__
        if (written or func._schema.is_mutable) and name not in NO_LAUNCH:
            self.operators[name] += 1
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def count_step(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = torch.sum, backend: Backend = "auto"
) -> StepCount:
    """Counts forward, loss(model(x)) and backward of a converted copy of a model, whose modules are in the modes that
    the model's are in. Raises RuntimeError without triton.
    """
    if dispatch.launch is None:
        raise RuntimeError("launches are counted by triton, which is not installed")
    from cnnfast_kernels import devices

    kernels: Counter[str] = Counter()
    kept: dict[int, Tensor] = {}

    def note(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        kernels[kernel.__name__] += 1

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t  # which keeps the memory's name from another's use
        return t

    with leaving_no_trace(), dispatch.backend(backend), calls.standing_for(devices.NO_GPU), ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(dispatch.launch.substituted(note))
        copied = convert(meta_copy(model), inplace=True)
        own = {t.untyped_storage()._cdata for t in (*copied.parameters(), *copied.buffers())}
        tally = stack.enter_context(_StepTally())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        loss(copied(meta(x))).backward()
    saved = sum(t.untyped_storage().nbytes() for memory, t in kept.items() if memory not in own)
    return StepCount(kernels, tally.operators, saved)
