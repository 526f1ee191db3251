"""A residual block in training on random operands, forward and backward: by our kernels, by the library, and by PyTorch
in any dtype, by which both are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels.dtypes import accumulator_dtype
from cnnfast_kernels.questions import BlockQuestion

from .. import dispatch
from ..checking.judge import compare
from ..checking.tf32 import rounded_product
from ..dtypes import name_of
from ..functional.blocks import NormedConv, residual_block
from ..ops.block_serving import asked_first
from ..precision import float32_products
from .running import Arguments, Results

EPS = 1e-5
FEWEST_BALANCED = 4  # numbers of a filter that can be of mean 0 and random still
PARAMETERS = ("w", "gamma", "beta")  # of each layer, with its number behind
Convolve = Callable[..., Tensor]


def operands(block: BlockQuestion, device: torch.device, seed: int = 0) -> Arguments:
    """x, and of each layer filters and a norm's parameters and running statistics; and the gradient of the result. On
    the meta device they have no numbers.

    Norms keep all activations away from the kink of a ReLU, every second channel above and the others below, since
    which of those at the kink pass is chance. Filters are of mean 0 over either of these, so that what they give is no
    sum of much that is alike. Gradients of filters are of about 1.
    """
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    vectors = accumulator_dtype(block.dtype)

    def normal(shape: tuple[int, ...], strides: tuple[int, ...], size: float) -> Tensor:
        made = torch.empty_strided(tuple(shape), strides, dtype=block.dtype, device=device)
        return (
            made
            if generator is None
            else made.copy_(torch.randn(tuple(shape), device=device, generator=generator) * size)
        )

    def vector(number: float, K: int) -> Tensor:
        return torch.full((K,), number, dtype=vectors, device=device)

    a: Arguments = {"x": normal(block.x_shape, block.x_strides, 1 / 16)}
    for i, ((shape, strides, _), problem) in enumerate(zip(block.layers, block.problems, strict=True)):
        K, ends = problem.K, i >= block.branch - 1
        a[f"w{i}"] = w = normal(shape, strides, (problem.group_channels * problem.R * problem.S) ** -0.5)
        for half in (w[:, ::2], w[:, 1::2]):
            if half[:1].numel() >= FEWEST_BALANCED:
                half -= half.mean((1, 2, 3), keepdim=True)
        a[f"gamma{i}"] = vector(1 / 16 if ends else 1 / 8, K)
        a[f"beta{i}"] = 1 - 2 * (torch.arange(K, device=device) % 2).to(vectors) if i < block.branch else vector(0, K)
        a[f"mean{i}"], a[f"var{i}"] = vector(0, K), vector(1, K)
    end = block.problems[block.branch - 1]
    result = torch.empty((end.N, end.K, end.P, end.Q), dtype=block.dtype, device="meta")
    last = block.key.layout.startswith("NHWC")
    strides = result.to(memory_format=torch.channels_last).stride() if last else result.stride()
    pixels = end.N * end.P * end.Q
    a["dout"] = normal(tuple(result.shape), strides, 0.5 ** ((pixels.bit_length() - 1) // 2))
    return a


def _differentiated(block: BlockQuestion, a: Arguments) -> dict[str, Tensor]:
    """Leaves of a new graph of autograd, by name."""
    names = "x", *(f"{name}{i}" for i in range(len(block.layers)) for name in PARAMETERS)
    return {name: a[name].detach().requires_grad_() for name in names}


def by_us(block: BlockQuestion, ours: bool, a: Arguments) -> Results:
    """The result and all gradients, as the operator would compute them: by our kernels or by the library."""
    with torch.enable_grad(), dispatch.backend("auto"), asked_first(lambda *question: ours):
        t = _differentiated(block, a)
        layers: list[NormedConv] = []
        for i, (_, _, (stride, padding, dilation, groups)) in enumerate(block.layers):
            norm = a[f"mean{i}"], a[f"var{i}"], t[f"gamma{i}"], t[f"beta{i}"], 0.1, EPS
            layers.append(NormedConv(t[f"w{i}"], *norm, stride, (padding[0], padding[2]), dilation, groups))
        projection = layers[-1] if len(layers) > block.branch else None
        y, _ = residual_block(t["x"], layers[: block.branch], projection)
        return y.detach(), *torch.autograd.grad(y, list(t.values()), a["dout"])


# ----------------------------------------------------------------------------------------------------------------------
# Judgement


def by_pytorch(
    block: BlockQuestion, a: Arguments, dtype: torch.dtype | None = None, convolve: Convolve = F.conv2d
) -> tuple[Results, list[Tensor]]:
    """By PyTorch's own functions and gradients, in `dtype`, or in the dtypes of the arguments; and the gradients of
    what each norm gives.
    """
    a = {name: t.to(dtype or t.dtype) for name, t in a.items()}
    normed: dict[int, Tensor] = {}
    with torch.enable_grad():
        t = _differentiated(block, a)

        def layer(i: int, image: Tensor) -> Tensor:
            stride, (high, _, wide, _), dilation, groups = block.layers[i][2]
            y = convolve(image, t[f"w{i}"], None, stride, (high, wide), dilation, groups)
            normed[i] = F.batch_norm(y, None, None, t[f"gamma{i}"], t[f"beta{i}"], True, 0.0, EPS)
            return normed[i]

        z = t["x"]
        for i in range(block.branch - 1):
            z = layer(i, z).relu()
        shortcut = layer(block.branch, t["x"]) if len(block.layers) > block.branch else t["x"]
        y = (layer(block.branch - 1, z) + shortcut).relu()
        found = torch.autograd.grad(y, [*t.values(), *(normed[i] for i in range(len(block.layers)))], a["dout"])
    return (y.detach(), *found[: len(t)]), list(found[len(t) :])


class BlockJudge:
    """Knows what is right for one set of operands of a block: running.py's Judge, of a result and all gradients.

    The gradients of a norm's parameters are sums that cancel where a convolution and another norm follow, which takes
    the mean away again: their errors are measured beside the terms of the sum.
    """

    def __init__(self, block: BlockQuestion, a: Arguments) -> None:
        self.names = ["result", *(f"the gradient of {name}" for name in _differentiated(block, a))]
        self.precision = name_of(block.dtype, block.tf32)
        self.theirs, _ = by_pytorch(block, a)
        wide = accumulator_dtype(block.dtype)
        with float32_products("ieee"):
            convolve = partial(rounded_product, F.conv2d) if block.tf32 else F.conv2d
            self.plain, _ = by_pytorch(block, a, wide, convolve)
        self.exact, normed = by_pytorch(block, a, torch.float64)
        terms = [float(g.square().sum((0, 2, 3)).sqrt().max()) for g in normed]
        self.terms = [0.0, 0.0, *(term for of in terms for term in (0.0, of, of))]

    def fault(self, results: Results) -> str:
        """What is wrong with results for these operands; the empty string if nothing is."""
        of_each = zip(results, self.theirs, self.plain, self.exact, strict=True)
        for name, term, others in zip(self.names, self.terms, of_each, strict=True):
            comparison = compare(name, *others, precision=self.precision, terms=term)
            if not comparison.ok:
                return str(comparison)
        return ""
