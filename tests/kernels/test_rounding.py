"""Quotients and roots are rounded to nearest: in the kernels' sources, in what they compile to, and where it shows in a
result.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import cnnfast_kernels
from cnnfast_kernels import launch
from cnnfast_kernels.batchnorm import batch_moments, normalize
from cnnfast_kernels.conv import conv_fprop
from cnnfast_kernels.epilogue import BatchNorm, Epilogue
from cnnfast_kernels.gather.depthwise.tiles import StripTile
from cnnfast_kernels.questions import Geometry
from cnnfast_kernels.rounding import divide_again
from cnnfast_kernels.tma.tiles import BoxTile
from tests.support.child import run_compiled
from tests.support.convolutions import SMALL, needs_tensor_maps

PACKAGE = Path(cnnfast_kernels.__file__).parent
APPROXIMATE = {"sqrt", "rsqrt", "fdiv"}  # of triton.language
# The functions that may divide by `/`: the helpers themselves, and what an activation makes of an exponential.
MAY_DIVIDE = {"round_quotient", "round_root", "reciprocal"}


def jit_functions():
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                yield file.relative_to(PACKAGE), node


def is_approximate(node):
    """Whether a GPU computes this expression by an approximate division or root. Numbers are divided by Python."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return not (isinstance(node.left, ast.Constant) and isinstance(node.right, ast.Constant))
    return isinstance(node, ast.Attribute) and node.attr in APPROXIMATE


def test_no_kernel_divides_by_an_operator():
    functions = list(jit_functions())
    assert len(functions) > 40
    found = [
        f"{file}: {function.name}: {ast.unparse(node)}: use rounding.py's helpers"
        for file, function in functions
        if function.name not in MAY_DIVIDE
        for node in ast.walk(function)
        if is_approximate(node)
    ]
    assert found == []


def approximations(arch, names):
    """[case, kernel, approximate divisions and roots in its PTX] of what all cases of these names launch."""
    import re

    from cnnfast_kernels import aot, launch
    from cnnfast_kernels.aot.cases import cases

    found = []
    with aot.target(arch):
        for case in cases(aot.capability_of(arch)):
            if case.name in names:

                def see(launched, name=case.name):
                    ptx = launched.compiled.asm["ptx"]
                    found.append(
                        [
                            name,
                            launched.kernel,
                            sorted(set(re.findall(r"\b(?:div\.full|(?:div|rcp|r?sqrt)\.approx)[\w.]*", ptx))),
                        ]
                    )

                with launch.observe(see, compile_only=True):
                    case.run()
    return found


# Every kernel that normalises, combines, updates or divides; of convolutions those with batch norm, and with
# statistics.
CASES = [
    *(
        f"{operation} bfloat16 {layer}"
        for operation in ("infer", "train")
        for layer in ("3x3", "3x3/1 depthwise of 96 channels")
    ),
    *("batch norm bfloat16", "batch norm bfloat16, given statistics", "batch norm float32 NCHW", "batch norm float64"),
    *("pooling bfloat16", "pooling float32 NCHW"),
    *("augmentation uint8 to bfloat16", "augmentation uint8 to float16, noise", "augmentation float32"),
]
BOXES = ["infer bfloat16 3x3/2 in boxes", "train bfloat16 3x3/2 in boxes"]
EXPONENTIAL = ["infer bfloat16 1x1 silu", "infer bfloat16 1x1 gelu_tanh"]


@pytest.mark.compiled
@pytest.mark.parametrize(("arch", "cases"), [("sm_80", CASES), ("sm_90", CASES + BOXES)])
def test_compiled_quotients_and_roots(arch, cases):
    found = run_compiled(approximations, arch, cases + EXPONENTIAL)
    assert {name for name, *_ in found} == {*cases, *EXPONENTIAL}
    kernels = {kernel for _, kernel, _ in found}
    assert kernels >= {
        "conv_fprop_kernel",
        "depthwise_fprop_kernel",
        "combine_kernel",
        "batch_moments_kernel",
        "normalize_kernel",
    }
    assert kernels >= {"gradient_sums_kernel", "normalize_backward_kernel", "update_running_kernel"}
    assert kernels >= {"avg_pool_kernel", "avg_pool_backward_kernel", "plane_mean_kernel"}
    assert kernels >= {"augment_kernel", "grey_mean_kernel"}
    assert ("tma_fprop_kernel" in kernels) == (arch == "sm_90")
    assert [row for row in found if row[0] not in EXPONENTIAL and row[2]] == []
    assert {tuple(row[2]) for row in found if row[0] in EXPONENTIAL} == {("div.full.f32",)}, "sigmoid's"


# --- many quotients by one divisor ------------------------------------------------------------------------------------


@triton.jit
def divide_kernel(x_ptr, y_ptr, divisor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, divide_again(tl.load(x_ptr + i), divisor, tl.div_rn(1.0, divisor)))


@pytest.mark.parametrize("divisor", [255.0, 0.229, 0.224, 0.225, 0.2023, 0.1994, 0.201, 0.3081, 0.5, 3.0])
def test_quotients_by_one_divisor_are_rounded_to_nearest(divisor, device):
    """Of every mantissa of float32: what powers of two do to a quotient is exact."""
    x = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32, device=device).view(torch.float32)
    y = torch.empty_like(x)
    BLOCK = 2**20 if launch.INTERPRETED else 2**10
    divide_kernel[(len(x) // BLOCK,)](x, y, divisor, BLOCK)
    assert torch.equal(y.cpu(), x.cpu() / torch.tensor(divisor))


# --- where it shows: float32 variances below 2**-126, and no eps ------------------------------------------------------

TINY = 1e-40


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_a_subnormal_variance(training, layout, device):
    y = (
        torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0))
        .mul(TINY**0.5)
        .to(device, memory_format=layout)
    )
    weight, bias = torch.arange(1.0, 7.0, device=device), torch.arange(6.0, device=device)
    if training:
        mean, var = batch_moments(y)
    else:
        mean, var = torch.zeros(6, device=device), torch.full((6,), TINY, device=device)
    assert 0 < float(var.max()) < torch.finfo(torch.float32).tiny
    if training:  # PyTorch refuses to train without eps
        centred = y.double() - y.double().mean((0, 2, 3), keepdim=True)
        xhat = centred / centred.square().mean((0, 2, 3), keepdim=True).sqrt()
        exact = xhat * weight.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)
    else:
        exact = F.batch_norm(y.double(), mean.double(), var.double(), weight.double(), bias.double(), False, 0.0, 0.0)
    z = normalize(y, mean, var, weight, bias, None, 0.0, None, 0.0)
    tolerance = 1e-3 if training else 1e-6  # a subnormal sum has few digits
    torch.testing.assert_close(z.double(), exact, rtol=tolerance, atol=tolerance)


FAMILIES = [
    pytest.param(SMALL, 1, torch.float32, id="gather"),
    pytest.param(StripTile(32, 16, 2), 16, torch.float32, id="depthwise"),
    pytest.param(BoxTile(1, 8, 8, 64, 64), 1, torch.float16, id="tma", marks=needs_tensor_maps),
]


@pytest.mark.parametrize(("tile", "groups", "dtype"), FAMILIES)
def test_convolution_and_norm_of_a_subnormal_variance(tile, groups, dtype, device):
    """The norm's weight makes up for the size of 1 / sqrt(var): results are of the size of the sums, hence exact within
    their dtype.
    """
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randint(-2, 3, s, generator=generator).to(device, dtype)
        for s in ((2, 16, 6, 5), (16, 16 // groups, 3, 3))
    )
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    mean, bias = torch.arange(16.0, device=device) - 8, torch.arange(16.0, device=device)
    var, weight = torch.full((16,), TINY, device=device), torch.full((16,), TINY**0.5, device=device)
    epilogue = Epilogue(norm=BatchNorm(mean, var, weight, bias, 0.0))
    z = conv_fprop(x, w, Geometry((1, 1), (1, 1, 1, 1), (1, 1), groups), epilogue, tile=tile)
    y = F.conv2d(x.double(), w.double(), padding=1, groups=groups)
    exact = F.batch_norm(y, mean.double(), var.double(), weight.double(), bias.double(), False, 0.0, 0.0)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(z.double(), exact, rtol=tolerance, atol=64 * tolerance)
