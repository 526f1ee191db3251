"""gather/wgrad.py against PyTorch in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cnnfast_kernels import conv, memory
from cnnfast_kernels.gather.wgrad import WgradMemory, plan_wgrad_slots, wgrad
from cnnfast_kernels.indexing import divisor
from cnnfast_kernels.layout import dense
from cnnfast_kernels.operands import WgradOperands
from cnnfast_kernels.problem import MAX_PIXELS, ConvProblem
from cnnfast_kernels.slots import ReductionOperands, empty_slots, plan_reduction
from cnnfast_kernels.tiling import TileConfig
from tests.support.convolutions import (
    CASES,
    DTYPES,
    EVEN,
    FLAT,
    GROUPED,
    LAYOUTS,
    OTHER_DTYPES,
    POSITIVE,
    RAGGED,
    SEEDED,
    SMALL,
    STRIDED,
    TILED,
    TILES,
    WHOLE_TILE,
    Case,
    arrange,
    assert_exact,
    assert_rounded_not_truncated,
    cases,
    operands,
    output,
    positive_operands,
    reference,
)


def check(case, device, tile=SMALL, dtype=torch.float32, precision="ieee", layout="channels_last"):
    x, w, dy = operands(case, dtype, device, layout)
    dw = output(case.w, dtype, device, "channels_last" if layout == "expanded" else layout)
    wgrad(case.problem, tile, precision, x, dy, dw)
    assert_exact(dw, reference(case, x, w, dy)[2])


@pytest.mark.parametrize("layout", ["packed", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_geometry(case, layout, device):
    """channels_last has gaps between the lines here, as slices have; what is packed has none."""
    check(case, device, layout=layout)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("case", [EVEN, FLAT, GROUPED], ids=str)
def test_layout(case, layout, device):
    check(case, device, layout=layout)


@pytest.mark.parametrize(("dtype", "precision"), OTHER_DTYPES)
@pytest.mark.parametrize("case", [RAGGED, STRIDED, FLAT], ids=str)
def test_dtype(case, dtype, precision, device):
    check(case, device, dtype=dtype, precision=precision)


@pytest.mark.parametrize(("split", "layout"), [(1, "channels_last"), (3, "packed")])
@pytest.mark.parametrize(("precision", "tile"), TILES, ids=str)
def test_default_tile(precision, tile, split, layout, device):
    check(WHOLE_TILE, device, replace(tile, SPLIT_K=split), DTYPES[precision], precision, layout)


# Of half precision's largest tile, whose columns lie within one tap, and whose rows and columns are all there.
LARGEST = TileConfig(128, 64, 32, 4, 4, SPLIT_K=2)
WHOLE_TILES = [
    Case("1x1: no pixel is looked for", (3, 64, 5, 5), (128, 1, 1)),
    Case("3x3 of the same size", (2, 64, 6, 7), (128, 3, 3), padding=(1, 1, 1, 1)),
    Case("3x3 stride 2", (2, 64, 8, 9), (128, 3, 3), (2, 2), (1, 1, 1, 1)),
    Case("of the same size in both groups", (2, 128, 4, 7), (256, 1, 3), padding=(0, 0, 2, 0), groups=2),
    Case("1x1 padded at the end", (1, 64, 5, 6), (128, 1, 1), padding=(0, 1, 0, 2)),
]


@pytest.mark.parametrize("case", WHOLE_TILES, ids=str)
def test_whole_tiles(case, device):
    check(case, device, LARGEST, torch.bfloat16, "half", "packed")


@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_of_an_empty_batch(algorithm, device):
    """A sum of nothing: the gradient is zero everywhere."""
    x, dy = torch.empty(0, 4, 5, 5, device=device), torch.empty(0, 3, 3, 3, device=device)
    dw = conv.conv_wgrad(x, dy, (3, 4, 3, 3), conv.Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1), algorithm=algorithm)
    assert torch.equal(dw, torch.zeros(3, 4, 3, 3, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("split", [2, 9])
def test_split(split, dtype, device):
    """RAGGED's 25 pixels are two k-steps: with nine parts, seven have nothing to add."""
    precision = {torch.float32: "ieee", torch.float64: "fp64"}.get(dtype, "half")
    check(RAGGED, device, replace(SMALL, SPLIT_K=split), dtype, precision, "transposed")


def test_workspace_dtype(device, monkeypatch):
    """Partial sums are kept in the accumulator's dtype, and only the total is rounded."""
    made = []
    allocate = memory.empty
    monkeypatch.setattr(memory, "empty", lambda *args, **kwargs: made.append(allocate(*args, **kwargs)) or made[-1])
    check(RAGGED, device, replace(SMALL, SPLIT_K=2), torch.float16, "half")
    check(RAGGED, device, replace(SMALL, SPLIT_K=2), torch.float64, "fp64")
    check(RAGGED, device)
    assert [t.dtype for t in made] == [torch.float32, torch.float64]


def test_chunks_of_a_batch(device):
    """Callers that see the pixels chunk by chunk fill one workspace, a range of slots each."""
    x, w, dy = operands(STRIDED, torch.float32, device)
    dw = output(STRIDED.w, torch.float32, device)
    slots = empty_slots(STRIDED.problem, 4, x)
    one_image = replace(STRIDED.problem, N=1)
    for i in range(2):
        image, gradient, mine = x[i : i + 1], dy[i : i + 1], slots[2 * i : 2 * i + 2]
        plan = plan_wgrad_slots(one_image, SMALL, "ieee", image, gradient, mine[0], 2, mine.stride(0))
        plan(WgradOperands(image, gradient, mine))
    plan_reduction(4, slots.stride(0), dw)(ReductionOperands(slots, dw))
    assert_exact(dw, reference(STRIDED, x, w, dy)[2])


def test_same_bits_twice(device):
    x, _, dy = positive_operands(POSITIVE, device)
    first, second = (output(POSITIVE.w, torch.float32, device) for _ in range(2))
    for dw in (first, second):
        wgrad(POSITIVE.problem, replace(SMALL, SPLIT_K=3), "ieee", x, dy, dw)
    assert torch.equal(first, second)


@pytest.mark.parametrize(("of_x", "of_dy"), [("packed", "nchw"), ("channels_last", "packed"), ("nchw", "packed")])
@pytest.mark.parametrize("case", [RAGGED, STRIDED, TILED, GROUPED], ids=str)
def test_one_of_both_is_packed(case, of_x, of_dy, device):
    x, w, dy = operands(case, torch.float32, device)
    dw = output(case.w, torch.float32, device)
    wgrad(case.problem, SMALL, "ieee", arrange(x, of_x), arrange(dy, of_dy), dw)
    assert_exact(dw, reference(case, x, w, dy)[2])


def memory_of(x: tuple[int, ...], filters: tuple[int, int, int], x_layout="packed", dy_layout="packed", **how):
    case = Case("", x, filters, **how)
    tensors = (arrange(torch.zeros(shape), of) for shape, of in ((case.x, x_layout), (case.y, dy_layout)))
    return WgradMemory.of(case.problem, *tensors, dw_align=8)


def test_what_the_kernel_is_compiled_for():
    """One kernel for all batches and image sizes, of which 1 is none of its own."""
    same = {"padding": (1, 1, 1, 1)}
    for x in ((2, 16, 5, 6), (1, 16, 5, 6), (3, 16, 1, 1), (1, 16, 1, 9)):
        assert memory_of(x, (24, 3, 3), **same) == (1, 1, 8, True, True, True)
    assert memory_of((2, 16, 5, 6), (24, 1, 1)) == (1, 1, 8, True, True, True)
    assert memory_of((2, 16, 5, 6), (24, 2, 4), padding=(0, 1, 1, 2)) == (1, 1, 8, True, True, True)
    # another size, and the same size by a stride
    assert memory_of((2, 16, 5, 6), (24, 3, 3)) == (1, 1, 8, True, True, False)
    assert memory_of((2, 16, 5, 6), (24, 1, 1), padding=(1, 0, 0, 1)) == (1, 1, 8, True, True, False)
    assert memory_of((2, 16, 5, 6), (24, 3, 3), **same, stride=(2, 1)) == (1, 1, 8, True, True, False)
    assert memory_of((2, 16, 3, 3), (24, 1, 1), padding=(1, 1, 1, 1), stride=(2, 2)) == (1, 1, 8, True, True, False)
    # slices and NCHW
    assert memory_of((2, 16, 5, 6), (24, 1, 1), "channels_last") == (2, 1, 8, False, True, False)
    assert memory_of((2, 16, 5, 6), (24, 1, 1), "packed", "nchw") == (1, 1, 8, True, False, True)
    assert memory_of((2, 12, 5, 6), (24, 1, 1), "channels_last", "channels_last") == (2, 2, 8, False, False, False)
    # pixels that 32 bits do not count
    wide = ConvProblem(1, 8, 8, 2**17, 8, 1, 1, 3, 2, 2**15, 2**17, pad_h=2**15)
    x, dy = dense((1, 8, 8, 2**17), torch.float16, torch.channels_last), dense((1, 8, 3, 2), torch.float16)
    assert not WgradMemory.of(wide, x, dy, 8).x_packed
    assert WgradMemory.of(replace(wide, pad_h=2**14 - 1), x, dy, 8).x_packed


@pytest.mark.parametrize(
    ("stride", "channels", "pixels"), [(1, 2**30 + 16, 3), (2, 2**29 + 16, 5)], ids=["same pixels", "stride 2"]
)
def test_offsets_beyond_31_bits(stride, channels, pixels, device):
    """The last pixel of x, and of dy where they have as many, lies 2^31 elements behind the first: of its channels one
    group is looked at, and the memory of the others is reserved, but never touched.
    """
    groups, outputs = channels // 16, 3
    problem = ConvProblem.of((1, channels, 1, pixels), (channels, 16, 1, 1), (1, stride), (0, 0, 0, 0), (1, 1), groups)
    x, dy = (dense((1, channels, 1, n), torch.float16, torch.channels_last) for n in (pixels, outputs))
    held = [torch.empty((n - 1) * channels + 16, dtype=torch.float16, device=device) for n in (pixels, outputs)]
    generator = torch.Generator().manual_seed(0)
    first_of = []
    for all_channels, n in zip(held, (pixels, outputs), strict=True):
        group = all_channels.as_strided((n, 16), (channels, 1))
        group.copy_(torch.randint(-3, 4, (n, 16), generator=generator))
        first_of.append(group[:: stride if n == pixels else 1].double())
    dw = torch.empty(16, 16, 1, 1, dtype=torch.float32, device=device)
    plan = plan_wgrad_slots(problem, SMALL, "half", x, dy, dw, 1, 0)
    plan.grid = (1,)
    plan(WgradOperands(*held, dw))
    assert torch.equal(dw[:, :, 0, 0].double(), first_of[1].T @ first_of[0])


def test_lines_beyond_31_bits(device):
    """An image of nearly 2^31 lines, all of them one: below its last line a tap lies at a line that 31 bits do not
    number, and above its first one at -1.
    """
    H, dilation = MAX_PIXELS, 3000
    problem = ConvProblem(1, 16, H, 1, 16, 3, 1, 2, 1, H - 1, 1, pad_h=1, dil_h=dilation)
    x, _, dy = operands(Case("", (1, 16, 1, 1), (16, 1, 1)), torch.float16, device)
    x, dy = x.expand(1, 16, H, 1), dy.expand(1, 16, 2, 1) * torch.tensor([1, 2], device=device).view(2, 1)
    dw = output((16, 16, 3, 1), torch.float16, device)
    wgrad(problem, SMALL, "half", x, dy, dw)
    product = (dy[0, :, 0].double() * x[0, :, 0].double().T)[:, :, None, None]
    # line -1 + 3000 r of p = 0, and H - 2 + 3000 r of p = 1
    assert_exact(dw, product * torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64, device=device).view(1, 1, 3, 1))


def test_mixed_layouts(device):
    """Each tensor brings its own strides."""
    x, w, dy = operands(RAGGED, torch.float32, device, "nchw")
    dw = output(RAGGED.w, torch.float32, device, "batch_last")
    wgrad(RAGGED.problem, SMALL, "ieee", x, arrange(dy, "channels_last"), dw)
    assert_exact(dw, reference(RAGGED, x, w, dy)[2])


@SEEDED
@given(case=cases(), split=st.integers(1, 3))
def test_any_geometry(case, split, device):
    check(case, device, replace(SMALL, SPLIT_K=split))


def test_tf32_rounds(device):
    x, w, dy = positive_operands(POSITIVE, device)
    dw = output(POSITIVE.w, torch.float32, device)
    wgrad(POSITIVE.problem, SMALL, "tf32", x, dy, dw)
    assert_rounded_not_truncated(dw, reference(POSITIVE, x, w, dy)[2])


@given(m=st.integers(0, 2**31 - 1), d=st.integers(1, 2**31 - 1))
@example(m=2**31 - 1, d=1)
@example(m=2**31 - 1, d=2**31 - 1)
@example(m=2**31 - 2, d=2**31 - 1)
@example(m=3 * 715827882 - 1, d=3)
def test_division_by_multiplication(m, d):
    """What indexing.divide computes: the high word of 2 m * magic, shifted. Neither factor has more than 32 bits."""
    magic, shift = divisor(d)
    assert 2**31 <= magic < 2**32
    assert (2 * m * magic >> 32) >> shift == m // d
