"""Inference as a library does it best: batch norms are folded into the weights, and one kernel convolves, adds, applies
ReLU and stores.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from ..patterns import ACTIVATIONS, addition, callee

# Of the activations in patterns.py, the only one that cuDNN's fused operators compute.
RELUS = ACTIVATIONS["relu"]


class Engine(Protocol):
    """What computes relu(conv(x) + bias + z). unavailable: why it cannot, or the empty string."""

    def unavailable(self, device: torch.device) -> str: ...
    def conv(self, layer: nn.Conv2d, x: Tensor, z: Tensor | None) -> Tensor: ...


class Plain:
    """PyTorch's operators one after the other: the reference for the two others, and what jax_model.py reads."""

    def unavailable(self, device: torch.device) -> str:
        return ""

    def conv(self, layer: nn.Conv2d, x: Tensor, z: Tensor | None) -> Tensor:
        y = layer(x)
        return torch.relu(y if z is None else y + z)


class Cudnn:
    """PyTorch's operators for cuDNN's fused kernels."""

    def unavailable(self, device: torch.device) -> str:
        return "" if device.type == "cuda" and torch.backends.cudnn.is_available() else "cuDNN needs an NVIDIA GPU"

    def conv(self, layer: nn.Conv2d, x: Tensor, z: Tensor | None) -> Tensor:
        geometry: Any = layer.stride, layer.padding, layer.dilation, layer.groups
        if z is None:
            return torch.cudnn_convolution_relu(x, layer.weight, layer.bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, layer.weight, z, 1.0, layer.bias, *geometry)


class CudnnGraph:
    """cuDNN's own graphs, by nvidia-cudnn-frontend: one for each convolution and size, built at its first call."""

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
    """relu(conv(x) + z), computed by an engine."""

    def __init__(self, layer: nn.Conv2d, engine: Engine) -> None:
        super().__init__()
        self.layer, self.engine = layer, engine

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return self.engine.conv(self.layer, x, z)


def unavailable(model: nn.Module, dtype: torch.dtype) -> str:
    """Why a model cannot be folded, or the empty string."""
    try:
        folded = fold(model)
    except Exception as error:  # of whatever kind: tracing runs the model's own code
        return f"torch.fx cannot trace the model: {type(error).__name__}"
    return (
        ""
        if any(isinstance(m, FusedConv) for m in folded.modules())
        else "the model has no convolution with a ReLU after it"
    )


def fold(model: nn.Module, engine: Engine | None = None) -> fx.GraphModule:
    """A copy of the model in eval mode, in which convolution (> batch norm) (> sum) > ReLU is one FusedConv.

    model: in PyTorch's own classes (job.plain), for `fuse`, which folds the norms, knows modules by their exact types.
    Raises what torch.fx raises.
    """
    folded = fuse(copy.deepcopy(model).eval())
    assert isinstance(folded, fx.GraphModule)
    modules: dict[str, nn.Module] = dict(folded.named_modules(remove_duplicate=False))

    def fusable(node: Any) -> bool:
        """Whether it is a convolution that every engine can do, and whose result nobody else uses."""
        if callee(node, modules) is not nn.Conv2d or len(node.users) > 1:
            return False
        layer: Any = modules[str(node.target)]
        return layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)

    for relu in [node for node in folded.graph.nodes if callee(node, modules) in RELUS]:
        before: Any = relu.args[0]
        z: tuple[Any, ...] = ()
        found = addition(before)
        if found is not None and found.is_of_two_tensors and len(before.users) == 1:
            # Of two convolutions the later one adds: what the other computes is there when it runs.
            order = {node: i for i, node in enumerate(folded.graph.nodes)}
            *_, before = sorted((found.left, found.right), key=lambda node: (fusable(node), order[node]))
            z = (found.right if before is found.left else found.left,)
        if not fusable(before):
            continue
        layer: Any = modules[str(before.target)]
        name = f"fused_{relu.name}"
        modules[name] = FusedConv(layer, engine or Plain())
        folded.add_module(name, modules[name])
        with folded.graph.inserting_before(relu):
            relu.replace_all_uses_with(folded.graph.call_module(name, (before.args[0], *z)))
    folded.graph.eliminate_dead_code()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded
