"""What a step of a model computes, operator by operator: which values each reads and writes, and its FLOPs. The step
runs on meta tensors.

torch.fx's make_fx records the same operators. It was tried on fake tensors, and is slower and spares little: its graph
has views and operators in place, too, so that values have to be numbered by their memory, and norms and gradients have
to be taken apart, as here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .. import dispatch
from ..aside import leaving_no_trace
from .job import BACKWARD, STEP, float_tensors, wanted_by

Kind = Literal["matrix", "reduce", "map"]

ATEN = torch.ops.aten
# Of normalisations, "map" is what they do to each element once they know their statistics.
NORMS = (
    ATEN.native_batch_norm,
    ATEN.cudnn_batch_norm,
    ATEN._native_batch_norm_legit,
    ATEN._native_batch_norm_legit_no_training,
)
NORM_GRADIENTS = (ATEN.native_batch_norm_backward, ATEN.cudnn_batch_norm_backward)
# Gradients that need the shape of their second operand, and not its values.
SHAPE_ALONE = (ATEN.max_pool2d_with_indices_backward, ATEN.avg_pool2d_backward, ATEN._adaptive_avg_pool2d_backward)
# Words in the names of operators whose results depend on many positions.
WHOLE = ("mean", "sum", "adaptive", "softmax", "layer_norm", "group_norm", "amax", "var", "norm")


@dataclass(frozen=True)
class Node:
    """One operator, or a part of one that a kernel could do by itself.

    kind: "matrix" (convolutions and matrix products), "reduce" (its results depend on many positions), "map"
    (elementwise, and pooling over windows). reads, writes: values, by number. pointwise: the strides of a 1x1
    convolution, and nothing for any other operator.
    """

    name: str
    kind: Kind
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    flops: int = 0
    pointwise: tuple[int, ...] = ()

    def bytes_of(self, v: int, sizes: dict[int, int]) -> int:
        """How many bytes of value `v` it reads: a 1x1 convolution with a stride skips a part of its image."""
        return sizes[v] // (math.prod(self.pointwise) if v == self.reads[0] else 1)


@dataclass
class WorkGraph:
    """Nodes in an order in which they can run.

    sizes: bytes of each value. indices: the same, if the positions in pooling windows took a byte each, not eight.
    results: the values that the step is for. parameters: how many numbers an optimizer updates.
    """

    nodes: list[Node] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    indices: dict[int, int] = field(default_factory=dict)
    results: set[int] = field(default_factory=set)
    parameters: int = 0

    @property
    def flops(self) -> int:
        return sum(node.flops for node in self.nodes)


def graph_of(model: nn.Module, shapes: Sequence[Sequence[int]], dtype: torch.dtype, mode: str) -> WorkGraph:
    """The graph of a forward pass (modes "infer" and "forward", see job.py), of a forward pass with all gradients of
    parameters ("train") and of the input ("step"), or of gradients alone.

    Nothing is computed. Raises whatever the model raises on meta tensors of these shapes.
    """
    model = copy.deepcopy(model).to(device="meta", dtype=dtype).train(mode != "infer")
    inputs = [torch.empty(tuple(shape), dtype=dtype, device="meta") for shape in shapes]
    recorder = _Recorder()
    with leaving_no_trace(), dispatch.backend("torch"), torch.device("meta"), ExitStack() as stack:
        if mode in BACKWARD:
            wanted = wanted_by(mode, model, inputs)
            outputs = float_tensors(model(*inputs))
            stack.enter_context(recorder)
            recorder.results(torch.autograd.grad(outputs, wanted, [torch.empty_like(t) for t in outputs]))
        else:
            wanted = wanted_by(mode, model, inputs)
            stack.enter_context(torch.set_grad_enabled(mode in ("train", STEP)))
            stack.enter_context(recorder)
            outputs = float_tensors(model(*inputs))
            recorder.results(outputs)
            if mode == STEP:
                recorder.results(torch.autograd.grad(outputs, wanted, [torch.empty_like(t) for t in outputs]))
            if mode == "train":
                torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
                recorder.results([p.grad for p in model.parameters() if p.grad is not None])
                recorder.graph.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return recorder.graph


class _Recorder(TorchDispatchMode):
    """Records the operators, and numbers values. A value is what a tensor's memory holds until it is written again."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = WorkGraph()
        self.current: dict[int, int] = {}  # memory > its value
        self.alive: list[Any] = []  # keeps all memory alive, so that no address comes to mean another memory

    def value(self, t: Tensor, fresh: bool = False) -> int:
        """The number of what a tensor's memory holds; a new one if it was just written."""
        memory = t.untyped_storage()
        if fresh or memory._cdata not in self.current:
            self.alive.append(memory)
            self.current[memory._cdata] = number = len(self.graph.sizes)
            self.graph.sizes[number] = t.nbytes
            self.graph.indices[number] = t.nbytes if t.is_floating_point() else t.numel()
        return self.current[memory._cdata]

    def small(self, like: Tensor) -> int:
        """The number of a value for which there is no tensor: two statistics of each channel, in float32."""
        number = len(self.graph.sizes)
        self.graph.sizes[number] = self.graph.indices[number] = 2 * 4 * like.shape[1]
        return number

    def results(self, tensors: Sequence[Tensor]) -> None:
        self.graph.results |= {self.value(t) for t in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        reads = tuple(dict.fromkeys(self.value(t) for t in inputs if t.numel()))
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.numel()]
        memory = {t.untyped_storage()._cdata for t in inputs}
        written = func._schema.is_mutable
        made = [t for t in outputs if written or t.untyped_storage()._cdata not in memory]
        name = func._overloadpacket.__name__
        if not made or not reads or "empty" in name:  # a view, a constant, or memory without values
            return result
        if func._overloadpacket in SHAPE_ALONE:
            reads = tuple(v for v in reads if v != self.value(inputs[1]))
        writes = tuple(dict.fromkeys(self.value(t, fresh=True) for t in made))
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        self.graph.nodes += self.parts(func._overloadpacket, args, inputs, reads, writes, flops)
        return result

    def parts(self, packet: Any, args: Any, inputs: list[Tensor], reads: Any, writes: Any, flops: int) -> list[Node]:
        """The nodes of one call of an operator: norms and the gradients of convolutions have several."""
        name = packet.__name__
        if packet is ATEN.convolution_backward:
            return list(self.gradients(args))
        if packet in NORMS:
            if not _trains(packet, args):
                return [Node("batch_norm", "map", reads, writes[:1])]
            statistics = self.small(inputs[0])
            return [
                Node("statistics", "reduce", reads[:1], (statistics, *writes[1:])),
                Node("normalize", "map", (*reads, statistics), writes[:1]),
            ]
        if packet in NORM_GRADIENTS:
            sums = self.small(inputs[0])
            return [
                Node("norm_sums_backward", "reduce", reads, (sums, *writes[1:])),
                Node("norm_backward", "map", (*reads, sums), writes[:1]),
            ]
        if flops:
            taps = args[1].shape[2:] if packet is ATEN.convolution else ()
            pointwise = tuple(args[3]) if taps and set(taps) == {1} and set(args[5]) == {1} else ()
            return [Node(name, "matrix", reads, writes, flops, pointwise)]
        return [Node(name, "reduce" if any(word in name for word in WHOLE) else "map", reads, writes)]

    def gradients(self, args: Any) -> Iterator[Node]:
        """The gradients of a convolution that are asked for: of its input, of its weight, and of its bias."""
        dy, x, w = (self.value(t) for t in args[:3])
        wanted = args[-1]
        made = iter(range(len(self.graph.sizes) - sum(wanted), len(self.graph.sizes)))
        # Each pixel of the output, or of the input if the convolution is transposed, meets every tap of every filter.
        pixels = args[1] if args[7] else args[0]
        each = 2 * pixels[:, 0].numel() * args[2].numel()
        if wanted[0]:
            yield Node("conv_dgrad", "matrix", (dy, w), (next(made),), each)
        if wanted[1]:
            yield Node("conv_wgrad", "matrix", (dy, x), (next(made),), each)
        if wanted[2]:
            yield Node("bias_backward", "reduce", (dy,), (next(made),))


def _trains(packet: Any, args: Any) -> bool:
    """Whether a call of a batch norm is in training: its `training` argument."""
    names = [argument.name for argument in packet.default._schema.arguments]
    return "training" in names and bool(args[names.index("training")])
