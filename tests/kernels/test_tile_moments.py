"""tile_moments.py against float64: one tile of rows, whole and ragged, judged by PyTorch's own error and by that of
three passes over the deviations. Rows that do not exist are NaN.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from cnnfast_kernels.tile_moments import FirstRows, masks_of_first, store_moments

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (rows of a part, parts): a tile of most kernels; strips of two pixels; of seven, whose rows are no power of two
TILES = [(128, 1), (32, 2), (32, 7)]
INF, NAN = float("inf"), float("nan")


class PartRows(NamedTuple):
    """As FirstRows, of a tile of PARTS that follow each other."""

    whole: tl.tensor
    extent: tl.tensor
    PARTS: int


@triton.jit
def masks_of_parts(rows, BLOCK: tl.constexpr):
    exist = ()
    for i in tl.static_range(rows.PARTS):
        exist = exist + (tl.arange(0, BLOCK) + i * BLOCK < rows.extent,)
    return exist


@triton.jit
def tile_moments_kernel(
    y_ptr, moments_ptr, count, BLOCK: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr
):
    """Of rows [PARTS * BLOCK, COLUMNS], of which the first `count` exist. MASKED: masks are made even if all do."""
    column = tl.arange(0, COLUMNS)
    parts = ()
    for i in tl.static_range(PARTS):
        row = tl.arange(0, BLOCK) + i * BLOCK
        parts = parts + (tl.load(y_ptr + row[:, None] * COLUMNS + column[None, :]),)
    whole = (count == PARTS * BLOCK) & (not MASKED)
    tile, ok = tl.program_id(0), column < COLUMNS
    if PARTS == 1:
        store_moments(moments_ptr, tile, parts, FirstRows(whole, count), column, ok, COLUMNS, masks_of_first)
    else:
        store_moments(moments_ptr, tile, parts, PartRows(whole, count, PARTS), column, ok, COLUMNS, masks_of_parts)


def moments_of(y: torch.Tensor, tile: tuple[int, int], masked: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the columns of y [rows, columns], as the first rows of a tile."""
    (count, columns), (block, parts) = y.shape, tile
    padded = y.new_full((block * parts, columns), NAN)
    padded[:count] = y
    acc = torch.float64 if y.dtype == torch.float64 else torch.float32
    moments = y.new_full((2, columns), NAN, dtype=acc)
    tile_moments_kernel[(1,)](padded, moments, count, block, parts, columns, masked)
    return moments[0], moments[1]


def mean_of(y: torch.Tensor) -> torch.Tensor:
    """Rows are added one after the other, as the interpreter adds them."""
    return functools.reduce(torch.add, y) / len(y)


def three_passes(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mean, what it lacks, and squares of deviations from both together: what a tile's moments were before."""
    mean = mean_of(y)
    lack = mean_of(y - mean)
    return mean + lack, mean_of((y - mean - lack).square())


def normal(rows: int, mean: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """64 columns of deviation 1, their means between half of `mean` and one and a half."""
    generator = torch.Generator().manual_seed(rows)
    means = mean * (0.5 + torch.rand(64, generator=generator, dtype=torch.float64))
    return (torch.randn(rows, 64, generator=generator, dtype=torch.float64) + means).to(device, dtype)


def test_integers_are_exact(device):
    """A power of two of them: nothing is rounded."""
    for rows in (64, 32, 2):
        y = torch.randint(-3, 4, (rows, 64), generator=torch.Generator().manual_seed(rows)).to(device, torch.float32)
        mean, variance = moments_of(y, (64, 1))
        exact = y.double()
        assert torch.equal(mean.double(), exact.mean(0))
        assert torch.equal(variance.double(), (exact - exact.mean(0)).square().mean(0))


@pytest.mark.parametrize("ratio", [1, 1e2, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_as_near_to_float64_as_three_passes_and_pytorch(tile, dtype, ratio, device):
    """Where the mean is up to 1e4 deviations. To add row by row, as the interpreter does, takes roundings by the
    hundred: hence 16 units in the last place, and more in float64, where the judge rounds too.
    """
    block, parts = tile
    for rows in (block * parts, block * parts - 1, 100 % (block * parts), 3):
        y = normal(rows, ratio, dtype, device)
        found = moments_of(y, tile)
        wide = y.to(found[0].dtype)
        exact = y.double().mean(0)
        exact = exact + (y.double() - exact).mean(0)
        judges = exact, (y.double() - exact).square().mean(0)
        units = 64 if dtype == torch.float64 else 16
        for theirs in (three_passes(wide), torch.var_mean(wide, 0, correction=0)[::-1]):
            for mine, other, judge in zip(found, theirs, judges, strict=True):
                error, allowed = (mine.double() - judge).abs(), (other.double() - judge).abs()
                floor = units * torch.finfo(wide.dtype).eps * float(judge.abs().max())
                assert error.max() <= 2 * allowed.max() + floor
                assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + floor / 2
        assert (found[1] >= 0).all()


# Of float32 these would overflow as squares of what the sum of so many is rounded by; others are no normal numbers.
CONSTANTS = [1 / 3, -1e-3, 3e5, 1e25, -1e27, 3e38, 1e-20, 1e-40, 0.0, 1.7e308, -1e200]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_rows_that_are_alike(tile, dtype, device):
    """The mean is theirs to the bit, and the variance 0: of a single row too."""
    y = torch.tensor([c for c in CONSTANTS if abs(c) < torch.finfo(dtype).max] + [1.0] * 16, dtype=torch.float64)
    y = y[:16].to(device, dtype)
    block, parts = tile
    for rows in (block * parts, block * parts - 1, 37, 3, 1):
        mean, variance = moments_of(y.expand(rows, 16), tile)
        assert torch.equal(mean, y.to(mean.dtype)), rows
        assert torch.equal(variance, torch.zeros_like(variance)), rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_that_is_nearly_alike(dtype, device):
    """All rows but one, or half of them, are alike, and the others a unit in the last place away, so that a first mean
    is as far off as the deviations are.
    """
    generator = torch.Generator().manual_seed(0)
    alike = (1 + 1000 * torch.rand(32, generator=generator)).to(dtype)
    for rows in (128, 100, 3):
        y = alike.repeat(rows, 2)
        y[: rows // 2, :32] = torch.nextafter(alike, torch.zeros_like(alike))
        y[0, 32:] = torch.nextafter(alike, torch.full_like(alike, INF))
        mean, variance = moments_of(y.to(device), (128, 1))
        exact = y.double().to(device)
        torch.testing.assert_close(mean, exact.mean(0).float(), rtol=2.0**-24, atol=0)
        torch.testing.assert_close(variance.double(), exact.var(0, correction=0), rtol=4e-6, atol=0)


@pytest.mark.parametrize("rows", [128, 100])
def test_rows_that_are_nearly_alike(rows, device):
    """Means whose rounding would overflow if it were squared, and rows that differ by a unit in the last place: mean
    and variance are as right as elsewhere, but where float32 has no such variance.
    """
    constants = torch.tensor([1.0, 1e10, 1e20, 1e24, 1e25, 1e27, 1e30, 3e38], device=device)
    y = constants.repeat(rows, 1)
    y[::2] = torch.nextafter(constants, torch.zeros_like(constants))
    mean, variance = moments_of(y, (128, 1))
    exact = y.double()
    assert variance.isinf().tolist() == [False] * 5 + [True] * 3
    torch.testing.assert_close(variance, exact.var(0, correction=0).float(), rtol=4e-6, atol=0)
    assert torch.equal(mean[:5], exact.mean(0)[:5].float())
    torch.testing.assert_close(mean[5:], exact.mean(0)[5:].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [128, 100])
def test_numbers_at_the_end_of_the_range(rows, dtype, device):
    """The mean is finite where the numbers are. What is not finite stays in its column."""
    largest = torch.finfo(dtype).max * 0.99
    y = torch.zeros(rows, 8, dtype=dtype)
    y[:, 0] = largest
    y[:, 1], y[rows // 2 :, 1] = largest, -largest  # whose sum of deviations is infinity less infinity
    y[0, 2] = largest
    y[3, 3], y[7, 4], y[9, 5] = INF, -INF, NAN
    y[0, 6], y[1, 6] = INF, -INF
    y[:, 7] = torch.arange(rows) % 2
    mean, variance = (t.cpu() for t in moments_of(y.to(device), (128, 1)))
    scaled = y.double() / 4096  # float64's own sums would overflow
    torch.testing.assert_close(
        mean.double() / 4096, scaled.mean(0), rtol=1e-6, atol=1e-7 * largest / 4096, equal_nan=True
    )
    assert mean[3:7].tolist()[:2] == [INF, -INF]
    assert mean[5:7].isnan().all()
    assert variance[3:7].isnan().all()
    assert variance[0] == 0
    assert variance[7] == 0.25
    if dtype == torch.float16:
        torch.testing.assert_close(variance[1:3].double(), y[:, 1:3].double().var(0, correction=0), rtol=4e-6, atol=0)
    else:
        assert variance[1:3].tolist() == [INF, INF]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_whole_tile_is_that_of_no_masks(tile, device):
    """The bits are those of masks that let every row exist."""
    for dtype in DTYPES:
        y = normal(tile[0] * tile[1], 30.0, dtype, device)
        for whole, masked in zip(moments_of(y, tile), moments_of(y, tile, masked=True), strict=True):
            assert torch.equal(whole, masked)
