"""What a training step launches, how many bytes it moves, and what it keeps for backward, layer by layer: counted on
meta tensors that stand for a GPU's. Exact for our kernels. An operator of PyTorch's counts as one launch that moves
each of its tensors once, and on a GPU is one or more (moved_bytes.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnnfast_kernels import devices

from .. import calls, dispatch
from ..aside import leaving_no_trace, meta, meta_copy
from ..conversion import convert
from ..conversion.costs import tensors_of
from ..explaining.placing import Modules, Places
from ..moved_bytes import by_launch, by_operator, lays_out
from ..ops.registry import OPERATORS


class LayerCount(NamedTuple):
    """layer: the module's name, "" for the model itself and for what is no module's, such as the loss. launches: of our
    kernels and of PyTorch's operators. forward_bytes, backward_bytes: that they move. saved_bytes: of the memory that
    this layer is the first to keep for backward.
    """

    layer: str
    launches: int
    forward_bytes: int
    backward_bytes: int
    saved_bytes: int

    @property
    def moved_bytes(self) -> int:
        return self.forward_bytes + self.backward_bytes


class StepCount(NamedTuple):
    """kernels: launches of ours, by the kernel's name. operators: calls of PyTorch's operators that compute, by name.
    layers: those that launch or keep something, in the order in which they first do.

    saved_bytes: of the memory that forward keeps for backward, parameters and buffers aside, the images too if they are
    kept. forward_bytes, backward_bytes, moved_bytes: that launches read and write.
    """

    kernels: Counter[str]
    operators: Counter[str]
    layers: tuple[LayerCount, ...]

    @property
    def launches(self) -> int:
        return self.kernels.total() + self.operators.total()

    @property
    def saved_bytes(self) -> int:
        return sum(layer.saved_bytes for layer in self.layers)

    @property
    def forward_bytes(self) -> int:
        return sum(layer.forward_bytes for layer in self.layers)

    @property
    def backward_bytes(self) -> int:
        return sum(layer.backward_bytes for layer in self.layers)

    @property
    def moved_bytes(self) -> int:
        return self.forward_bytes + self.backward_bytes


class _StepTally(TorchDispatchMode):
    """Counts our kernels and PyTorch's operators, also those that ours call, which do on meta tensors what they would
    do on a GPU's.
    """

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places
        self.kernels: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.moved: list[tuple[Modules, bool, int]] = []  # by each launch: whose it is, whether in backward, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _, ours, name = func._schema.name.partition("cnnfast::")
        if ours:
            operator = OPERATORS[name]
            with self.places.within(self.places.owning(args, operator.composed)):
                self.places.now()  # so that the node which was just made is this operator's, and not its first part's
                with self:
                    return operator.implementation(*(tuple(a) if isinstance(a, list) else a for a in args))
        result = func(*args, **(kwargs or {}))
        moved, name = by_operator(func, args, kwargs or {}, result), func._overloadpacket.__name__
        if moved is not None and not lays_out(name, moved):
            self.operators[name] += 1
            self.moved.append((*self.places.now(), moved.bytes))
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Is called in the place of a launch."""
        self.kernels[kernel.__name__] += 1
        self.moved.append((*self.places.now(), by_launch(arguments)))

    def counted(self) -> StepCount:
        rows: dict[str, list[int]] = {}
        for modules, backward, count in self.moved:
            row = rows.setdefault(self.places.names[id(modules[0])], [0] * 4)
            row[0] += 1
            row[1 + backward] += count
        for name, count in self.places.saved().items():
            rows.setdefault(name, [0] * 4)[3] += count
        return StepCount(self.kernels, self.operators, tuple(LayerCount(name, *row) for name, row in rows.items()))


def count_step(
    model: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    loss: Callable[[Any], Tensor] | None = torch.sum,
    backend: dispatch.Choice = "auto",
    *,
    converted: bool = True,
    gpu: devices.Gpu = devices.NO_GPU,
) -> StepCount:
    """Counts forward, loss(model(x)) and backward of a copy of a model, whose modules are in the modes that the model's
    are in.

    x: the input, or several of them. loss: None counts none, and the gradients of all that the model returns are given.
    converted: whether the copy is converted. gpu: that meta tensors stand for. Raises RuntimeError without triton, and
    if nothing that the model returns wants a gradient.
    """
    if dispatch.launch is None:
        raise RuntimeError("launches are counted by triton, which is not installed")
    with leaving_no_trace(), calls.standing_for(gpu), ExitStack() as stack:
        stack.enter_context(dispatch.prefer_kernels() if backend == "prefer kernels" else dispatch.backend(backend))
        stack.enter_context(torch.device("meta"))
        stack.enter_context(torch.enable_grad())
        copied = meta_copy(model)
        copied = convert(copied, inplace=True) if converted else copied
        places = stack.enter_context(Places(copied))
        tally = _StepTally(places)
        stack.enter_context(dispatch.launch.substituted(tally.launch))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(places.keep, lambda t: t))
        inputs = meta(x if isinstance(x, tuple) else (x,))
        with tally:
            results = tensors_of(copied(*inputs) if loss is None else loss(copied(*inputs)))
        ends = [t for t in results if t.requires_grad]
        if not ends:
            raise RuntimeError(f"{type(model).__name__} has nothing to train: no parameter of it wants a gradient")
        gradients = [torch.empty_like(t) for t in ends] if loss is None else None
        with tally:
            torch.autograd.backward(ends, gradients)
        return tally.counted()
