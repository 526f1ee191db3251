"""The kernels that a call of an operator launches: found without launching any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from cnnfast_kernels import devices, launch

from .. import calls
from ..conversion.costs import size_of


class KernelLaunch(NamedTuple):
    """tile: as its launcher chose it, None where there is nothing to choose. bytes: of its tensors, each once."""

    kernel: str
    tile: Any
    bytes: int


class Replayed(NamedTuple):
    """launches: in their order. least_bytes: of the operator's tensors, each once."""

    launches: list[KernelLaunch]
    least_bytes: int


class _Told(NamedTuple):
    """What stands for Triton's handle of a kernel that was not launched."""

    bytes: int


def launched(call: calls.OperatorCall, gpu: devices.Gpu, device_type: str = "cuda") -> Replayed:
    """What the call would launch on `gpu`."""
    found: list[KernelLaunch] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: Mapping[str, Any]) -> _Told:
        tensors = (getattr(argument, "base", argument) for argument in arguments)  # of a tensor map: what it maps
        return _Told(sum(size_of(t) for t in tensors if isinstance(t, Tensor)))

    def hear(event: launch.Launched) -> None:
        if isinstance(event.compiled, _Told):  # another thread's launches are heard too
            found.append(KernelLaunch(event.kernel, event.tile, event.compiled.bytes))

    with calls.standing_for(gpu, device_type), launch.observe(hear), launch.substituted(note, told=True):
        operands, results = calls.replay(call)
    read, written = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in (operands, results))
    memory = {t.untyped_storage()._cdata: size_of(t) for t in (*written, *read)}
    return Replayed(found, sum(memory.values()))
