"""Inference as a library does it best: batch norms folded into the weights, and convolutions that add, activate and
store at once.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

RELUS = (nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


class Engine(Protocol):
    """relu(conv(x) + bias + z) as one kernel."""

    def unavailable(self, device: torch.device) -> str: ...
    def conv(self, layer: nn.Conv2d, x: Tensor, z: Tensor | None) -> Tensor: ...


class Plain:
    """PyTorch's operators one after the other: what the others replace."""

    def unavailable(self, device: torch.device) -> str:
        return ""

    def conv(self, layer: nn.Conv2d, x: Tensor, z: Tensor | None) -> Tensor:
        y = layer(x)
        return torch.relu(y if z is None else y + z)


class Cudnn:
    """The fused operators that PyTorch has of cuDNN."""

    def unavailable(self, device: torch.device) -> str:
        return "" if device.type == "cuda" and torch.backends.cudnn.is_available() else "cuDNN needs an NVIDIA GPU"

    def conv(self, layer: nn.Conv2d, x: Tensor, z: Tensor | None) -> Tensor:
        geometry: Any = layer.stride, layer.padding, layer.dilation, layer.groups
        if z is None:
            return torch.cudnn_convolution_relu(x, layer.weight, layer.bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, layer.weight, z, 1.0, layer.bias, *geometry)


class CudnnGraph:
    """cuDNN's own graphs, one for each convolution and size, built when first called."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.plans: dict[Any, Callable[[Tensor, Tensor | None], Tensor]] = {}

    def unavailable(self, device: torch.device) -> str:
        if device.type != "cuda":
            return "cuDNN needs an NVIDIA GPU"
        return "" if importlib.util.find_spec("cudnn") else "nvidia-cudnn-frontend is not installed"

    def conv(self, layer: nn.Conv2d, x: Tensor, z: Tensor | None) -> Tensor:
        key = id(layer), x.shape, x.dtype, z is None
        if key not in self.plans:
            self.plans[key] = self.build(layer, x, z)
        return self.plans[key](x, z)

    def build(self, layer: nn.Conv2d, x: Tensor, z: Tensor | None) -> Callable[[Tensor, Tensor | None], Tensor]:
        cudnn = importlib.import_module("cudnn")
        self.handle = self.handle or cudnn.create_handle()
        types = {
            torch.float16: cudnn.data_type.HALF,
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float32: cudnn.data_type.FLOAT,
        }
        single = cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            handle=self.handle, io_data_type=types[x.dtype], intermediate_data_type=single, compute_data_type=single
        )
        weight = layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach().view(1, -1, 1, 1)
        image, filters = graph.tensor_like(x), graph.tensor_like(weight)
        y = graph.conv_fprop(
            image=image,
            weight=filters,
            padding=list(layer.padding),
            stride=list(layer.stride),
            dilation=list(layer.dilation),
        )
        given = {filters: weight}
        if bias is not None:
            shift = graph.tensor_like(bias)
            given[shift] = bias
            y = graph.bias(input=y, bias=shift)
        residual = None if z is None else graph.tensor_like(z)
        if residual is not None:
            y = graph.add(a=y, b=residual)
        y = graph.relu(input=y)
        y.set_output(True).set_data_type(types[x.dtype])
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        workspace = torch.empty(graph.get_workspace_size(), device=x.device, dtype=torch.uint8)
        shape = layer(x).shape

        def run(x: Tensor, z: Tensor | None) -> Tensor:
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
            graph.execute(
                {**given, image: x, y: out, **({} if residual is None else {residual: z})},
                workspace,
                handle=self.handle,
            )
            return out

        return run


ENGINES: dict[str, Engine] = {"cudnn-fused": Cudnn(), "cudnn-graph": CudnnGraph()}


class FusedConv(nn.Module):
    """relu(conv(x) + z) by an engine."""

    def __init__(self, layer: nn.Conv2d, engine: Engine) -> None:
        super().__init__()
        self.layer, self.engine = layer, engine

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return self.engine.conv(self.layer, x, z)


def unavailable(model: nn.Module, dtype: torch.dtype) -> str:
    """Why a model cannot be folded, or the empty string."""
    try:
        folded = fold(model)
    except Exception as error:  # of any kind: tracing runs the model's own code
        return f"torch.fx cannot trace the model: {type(error).__name__}"
    return (
        ""
        if any(isinstance(m, FusedConv) for m in folded.modules())
        else "the model has no convolution with a ReLU after it"
    )


def fold(model: nn.Module, engine: Engine | None = None) -> fx.GraphModule:
    """A copy of the model in eval; convolution (> batch norm) (> addition) > ReLU is a FusedConv. Raises what torch.fx
    raises.
    """
    folded = fuse(copy.deepcopy(model).eval())
    assert isinstance(folded, fx.GraphModule)

    def is_a(node: Any, kinds: tuple[Any, ...]) -> bool:
        if not isinstance(node, fx.Node):
            return False
        if node.op == "call_module":
            return type(folded.get_submodule(str(node.target))) in kinds
        return node.op.startswith("call") and node.target in kinds

    def fusable(node: Any) -> bool:
        """A convolution whose result goes one way, and that every engine can do."""
        if not is_a(node, (nn.Conv2d,)) or len(node.users) > 1:
            return False
        layer: Any = folded.get_submodule(node.target)
        return layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)

    for relu in [node for node in folded.graph.nodes if is_a(node, RELUS)]:
        before, z = relu.args[0], ()
        if is_a(before, ADDITIONS) and len(before.users) == 1 and all(isinstance(a, fx.Node) for a in before.args[:2]):
            order = {node: i for i, node in enumerate(folded.graph.nodes)}
            candidates = sorted(filter(fusable, before.args[:2]), key=lambda node: order[node])
            if candidates:  # the later one: the other operand is there when it runs
                z = tuple(a for a in before.args[:2] if a is not candidates[-1])
                before = candidates[-1]
        if not fusable(before) or (z and len(z) != 1):
            continue
        name, layer = f"fused_{relu.name}", folded.get_submodule(before.target)
        folded.add_module(name, FusedConv(layer, engine or Plain()))  # pyright: ignore[reportArgumentType]
        with folded.graph.inserting_before(relu):
            relu.replace_all_uses_with(folded.graph.call_module(name, (before.args[0], *z)))
    folded.graph.eliminate_dead_code()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded
