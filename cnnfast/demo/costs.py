"""What a network computes and moves, layer by layer, counted from shapes on meta tensors: nothing here is a time.

PyTorch runs a convolution, its norm, its activation and an addition as operators of their own: each reads what the one
before it has written. One kernel that does all of them reads the input, the weights and the addend, and writes the
result. Caches are not modelled: each operator is taken to read its operands from memory once, and to write its result
there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cnnfast.dispatch import backend

BATCH = 64
DTYPE = torch.bfloat16
IMAGE = (3, 224, 224)

# How many operations one element of the result takes, where torch.utils.flop_counter counts none. A norm in eval mode
# multiplies and adds.
PER_ELEMENT = {"norm": 2, "activation": 1, "addition": 1}
KINDS = {"convolution": "convolution", "batch_norm": "norm", "relu": "activation", "add": "addition"}


@dataclass(frozen=True)
class LayerCosts:
    """A convolution with the norm, activation and addition that follow it, or any other layer.

    name: as in named_modules(). flops: of the layer itself; pointwise_flops: of what follows it. bytes: read and
    written by the layer itself; pointwise_bytes: by the operators that follow it. fused_bytes: by one kernel that does
    all of it; the sum of both for what is no convolution.
    """

    name: str
    flops: int
    pointwise_flops: int
    bytes: int
    pointwise_bytes: int
    fused_bytes: int

    @property
    def unfused_bytes(self) -> int:
        return self.bytes + self.pointwise_bytes


@dataclass(frozen=True)
class Costs:
    """Of one run of a network called `name` in eval mode, on a batch of images in bfloat16."""

    name: str
    batch: int
    parameters: int
    layers: list[LayerCosts]

    @property
    def image_flops(self) -> float:
        """FLOPs of one image."""
        return self.flops / self.batch

    @property
    def flops(self) -> int:
        return sum(layer.flops + layer.pointwise_flops for layer in self.layers)

    @property
    def unfused_bytes(self) -> int:
        return sum(layer.unfused_bytes for layer in self.layers)

    @property
    def fused_bytes(self) -> int:
        return sum(layer.fused_bytes for layer in self.layers)

    @property
    def pointwise(self) -> tuple[float, float]:
        """The shares of norms, activations and additions in the FLOPs and in the bytes of separate operators."""
        flops = sum(layer.pointwise_flops for layer in self.layers)
        return flops / self.flops, sum(layer.pointwise_bytes for layer in self.layers) / self.unfused_bytes

    @property
    def saved(self) -> float:
        """The share of the bytes that fused kernels do not move."""
        return 1 - self.fused_bytes / self.unfused_bytes

    def as_dict(self) -> dict[str, Any]:
        """Sizes are bytes; `computed` says that nothing here was measured."""
        totals = {name: getattr(self, name) for name in ("flops", "unfused_bytes", "fused_bytes")}
        return {**asdict(self), **totals, "dtype": "bfloat16", "mode": "infer", "computed": "from shapes, not measured"}


def costs_of(network: Callable[[], nn.Module], name: str, batch: int = BATCH) -> Costs:
    """Of a network for images of ImageNet's size, made on the meta device."""
    with torch.device("meta"):
        model = network().to(DTYPE).eval()
        images = torch.empty(batch, *IMAGE, dtype=DTYPE)
    counting = _Counting(model)
    with torch.no_grad(), backend("torch"), counting:
        model(images)
    parameters = sum(p.numel() for p in model.parameters())
    return Costs(name, batch, parameters, counting.layers)


class _Counting(TorchDispatchMode):
    """Makes the layers of the operators that PyTorch runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: list[LayerCosts] = []
        self.names = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
        self.in_convolution = False  # whether the last of the layers is a convolution, which others may follow

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.numel()]
        memory = {t.untyped_storage()._cdata for t in operands}
        is_view = outputs and outputs[0].untyped_storage()._cdata in memory and not func._schema.is_mutable
        if operands and outputs and not is_view:  # a view moves nothing
            self.count(func, args, kwargs or {}, result, operands, outputs)
        return result

    def count(self, func, args, kwargs, result, operands: list[Tensor], outputs: list[Tensor]) -> None:
        name = func._schema.name.removeprefix("aten::").strip("_").removeprefix("native_")
        kind = next((kind for begin, kind in KINDS.items() if name == begin), "")
        # The first result alone, as cnnfast.report counts: nobody reads the indices of a pool, or a norm's statistics.
        moved = sum(t.nbytes for t in (*operands, outputs[0]))
        if kind in PER_ELEMENT and self.in_convolution:
            layer = self.layers[-1]
            self.layers[-1] = replace(
                layer,
                pointwise_flops=layer.pointwise_flops + PER_ELEMENT[kind] * outputs[0].numel(),
                pointwise_bytes=layer.pointwise_bytes + moved,
                # The result is written once, by the convolution. Parameters are read, and so is another addend.
                fused_bytes=layer.fused_bytes + sum(t.nbytes for t in operands[1:]),
            )
            return
        self.in_convolution = kind == "convolution"
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else PER_ELEMENT.get(kind, 0) * outputs[0].numel()
        named = next((self.names[id(t)] for t in operands if id(t) in self.names), name)
        self.layers.append(LayerCosts(named, flops, 0, moved, 0, moved))
