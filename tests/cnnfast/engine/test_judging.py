"""The self-check: decibels by hand, limits, and what counts as equal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cnnfast.engine import judging
from cnnfast.engine.judging import Reference, judge, sqnr_of
from cnnfast.engine.structures import Structure

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("result", "right", "decibels"),
    [
        ([1.0, 1.0], [1.0, 1.0], INF),
        ([1.1, 1.0], [1.0, 1.0], 10 * math.log10(2 / 0.01)),
        ([3.0, 0.0], [3.0, 4.0], 10 * math.log10(25 / 16)),
        ([1e-200, 1.1e-200], [1e-200, 1e-200], 10 * math.log10(2 / 0.01)),  # squares that vanish
        ([1e200, 1.1e200], [1e200, 1e200], 10 * math.log10(2 / 0.01)),  # and that overflow
        ([0.0, 0.0], [0.0, 0.0], INF),
        ([0.0, 1e-9], [0.0, 0.0], -INF),
        ([NAN, 1.0], [NAN, 1.0], INF),
        ([NAN, 1.0], [1.0, 1.0], -INF),
        ([1.0, 1.0], [NAN, 1.0], -INF),
        ([INF, 1.1], [INF, 1.0], 10 * math.log10(1 / 0.01)),
        ([-INF, 1.0], [INF, 1.0], -INF),
        ([INF, 1.0], [1e30, 1.0], -INF),
        ([], [], INF),
    ],
)
def test_decibels(result, right, decibels):
    found = sqnr_of(torch.tensor(result, dtype=torch.float64), torch.tensor(right, dtype=torch.float64))
    assert found == pytest.approx(decibels, abs=1e-6)


def off_by(decibels: float) -> tuple[Tensor, Tensor]:
    """A result and what is right, so many dB apart."""
    right = torch.randn(4, 100, dtype=torch.float64)
    noise = torch.randn(4, 100, dtype=torch.float64)
    noise *= right.norm() / noise.norm() * 10 ** (-decibels / 20)
    return right + noise, right


def never() -> tuple[Tensor, ...]:
    raise AssertionError("the original was asked, though nothing is below its limit")


@pytest.mark.parametrize(
    ("dtype", "decibels", "ok"),
    [
        (torch.float32, 101, True),
        (torch.float32, 99, False),
        (torch.bfloat16, 41, True),
        (torch.bfloat16, 39, False),
        (torch.float16, 39, False),
    ],
)
def test_limits(dtype, decibels, ok):
    result, right = off_by(decibels)
    check = judge([result], Reference((right,)), Structure("tensor"), dtype, never if ok else lambda: (right,))
    assert check.ok == ok
    assert check.sqnr == pytest.approx(decibels, abs=1e-3)
    assert "below its limit" in str(check) or ok


@pytest.mark.parametrize(("ours", "theirs", "ok"), [(85, 90, True), (83, 90, False), (95, 200, False)])
def test_where_pytorch_is_worse_than_the_limit_ours_may_be_6_db_worse_still(ours, theirs, ok):
    result, right = off_by(ours)
    noise = torch.randn(4, 100, dtype=torch.float64)
    own = right + noise * (right.norm() / noise.norm() * 10 ** (-theirs / 20))
    check = judge([result], Reference((right,)), Structure("tensor"), torch.float32, lambda: (own,))
    assert check.ok == ok
    assert check.results[0].own == pytest.approx(theirs, abs=1e-3)
    assert check.results[0].limit == pytest.approx(min(100, theirs - 6), abs=1e-3)


def test_top_1_agreement_counts_rows_of_a_result_with_columns():
    right = torch.tensor([[1.0, 2.0], [4.0, 3.0], [5.0, 6.0], [8.0, 7.0]], dtype=torch.float64)
    near = right.clone()
    near[3] = torch.tensor([7.4, 7.6])  # another column is the largest
    structure = Structure("tuple", (Structure("tensor"), Structure("tensor")))
    maps = torch.ones(1, 2, 3, 3, dtype=torch.float64)
    check = judge([near, maps], Reference((right, maps)), structure, torch.bfloat16, lambda: (right, maps))
    assert [r.agreement for r in check.results] == [0.75, None]
    assert check.agreement == 0.75
    assert [r.name for r in check.results] == ["result[0]", "result[1]"]


@pytest.mark.parametrize(
    ("result", "own", "dtype", "ok"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], torch.float32, True),
        ([1, 2, 3, 5], [1, 2, 3, 4], torch.float32, False),
        ([1, 2, 3, 5], [1, 2, 4, 4], torch.float32, True),  # PyTorch's own differ as often
        ([1, 2, 5, 5], [1, 2, 4, 4], torch.float32, False),
        ([1, 2, 5, 5], [1, 2, 3, 4], torch.bfloat16, True),  # told, and not judged
    ],
)
def test_integers_are_equal_or_their_share_is_told(result, own, dtype, ok):
    right = torch.tensor([1, 2, 3, 4])
    check = judge([torch.tensor(result)], Reference((right,)), Structure("tensor"), dtype, lambda: (torch.tensor(own),))
    assert check.ok == ok
    assert check.results[0].equal == sum(a == b for a, b in zip(result, (1, 2, 3, 4), strict=True)) / 4
    assert check.sqnr is None


def test_another_shape_is_never_right():
    check = judge(
        [torch.ones(3)], Reference((torch.ones(1, 3),)), Structure("tensor"), torch.float32, lambda: (torch.ones(1, 3),)
    )
    assert not check.ok
    assert "its shape is [3], not [1, 3]" in str(check).replace("\n", " ")


def test_the_reference_is_of_a_copy_in_float64():
    model = nn.BatchNorm1d(3).eval()
    model.running_mean.fill_(1 / 3)
    x = torch.rand(2, 3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = judging.reference(model, (x,))
    assert (found.results[0].dtype, found.why) == (torch.float64, "")
    assert torch.equal(found.results[0], model.double()(x.double()))
    assert all(torch.equal(before[name], t.to(before[name].dtype)) for name, t in model.state_dict().items())


class NeedsFloat32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.float())


def test_a_model_that_float64_stops_is_judged_by_float32():
    model, x = NeedsFloat32(), torch.rand(2, 3)
    found = judging.reference(model, (x,))
    assert torch.equal(found.results[0], model(x).detach())
    assert found.why.startswith("float32, since in float64 it raises RuntimeError: ")
