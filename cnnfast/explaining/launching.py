"""The kernels that a call of an operator launches: found without launching any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cnnfast_kernels import devices, launch

from .. import calls, moved_bytes
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
        return _Told(moved_bytes.by_launch(arguments))

    def hear(event: launch.Launched) -> None:
        if isinstance(event.compiled, _Told):  # another thread's launches are heard too
            found.append(KernelLaunch(event.kernel, event.tile, event.compiled.bytes))

    with calls.standing_for(gpu, device_type), launch.observe(hear), launch.substituted(note, told=True):
        operands, results = calls.replay(call)
    tensors = moved_bytes.tensors_of((results, operands))
    memory = {moved_bytes.memory_of(t): size_of(t) for t in tensors}
    return Replayed(found, sum(memory.values()))
