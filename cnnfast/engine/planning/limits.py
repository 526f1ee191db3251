"""Sizes of inputs that a graph takes, and sizes of values that a plan may have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..graph import Graph, Input
from ..plan import Step
from .conditions import violated

# How many bytes a value may have, or all that are in use at a time: what inputs and constants justify. A network has
# some 10 bytes in use for each byte of an image, and a language model some 3,000 for each byte of its words' numbers.
FREE_BYTES, FOR_A_BYTE_OF_INPUT, FOR_A_BYTE_OF_CONSTANT = 2**30, 2**12, 2**6


def check(graph: Graph, shapes: Sequence[Sequence[int]]) -> None:
    """Raises ValueError where the graph does not take inputs of these shapes."""
    if len(shapes) != len(graph.inputs):
        names = ", ".join(i.name for i in graph.inputs)
        raise ValueError(f"the network takes {len(graph.inputs)} tensors ({names}), got {len(shapes)}")
    for taken, shape in zip(graph.inputs, shapes, strict=True):
        fits = len(shape) == len(taken.shape) and all(
            size >= 0 and wanted in (None, size) for size, wanted in zip(shape, taken.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{taken.name}: this network takes {written(taken)}, got {tuple(shape)}")
    if sentence := violated(graph.conditions, shapes):
        raise ValueError(f"this network does not take such sizes: {sentence}")


def written(taken: Input) -> str:
    """ "[any, 3, 224, 224]": the shape that an input may have."""
    return f"[{', '.join('any' if size is None else str(size) for size in taken.shape)}]"


def most_bytes(inputs: Iterable[Tensor], constants: Iterable[Tensor]) -> int:
    """The limit for a value, and for what is in use at a time. It is far from what networks need, and keeps a file that
    was altered from asking for all memory.
    """
    given, held = (sum(tensor.numel() * tensor.itemsize for tensor in tensors) for tensors in (inputs, constants))
    return FREE_BYTES + FOR_A_BYTE_OF_INPUT * given + FOR_A_BYTE_OF_CONSTANT * held


def refusal(graph: Graph, shapes: Sequence[Sequence[int]], step: Step, error: Exception) -> str:
    """Why these sizes cannot be had, though check() found nothing: a step that fails with what follows from them."""
    given = ", ".join(f"{i.name} of shape {tuple(shape)}" for i, shape in zip(graph.inputs, shapes, strict=True))
    taken = ", ".join(f"{i.name} {written(i)}" for i in graph.inputs)
    reason = str(error).partition("\n")[0].rstrip(".")
    return (
        f"the network cannot take {given}: {step.name} ({step.operator}) fails with such sizes: {reason}. It takes "
        f"{taken}, with sizes for which every step has a result; too small an image leaves one without"
    )
