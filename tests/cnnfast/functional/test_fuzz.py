"""Random calls of every operation: bit for bit what float64 says, forward and backward, and errors as PyTorch's.

Few cases, always the same ones, are part of every run; `python ci/fuzz.py` draws thousands, from any seed.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("triton")

from tests.support.agreement import run
from tests.support.fuzz import Case, compare
from tests.support.fuzz_properties import PROPERTIES, Property, assert_addresses_are_checked, campaign
from tests.support.views import View, lay


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter ring: on a GPU addresses are not checked")
def test_addresses_are_checked():
    assert_addresses_are_checked()


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name, device):
    tally = campaign(name, PROPERTIES[name].quick, device)
    assert tally.cases == PROPERTIES[name].quick
    assert len(tally.spread) > 4


VIEW = View((0, 2, 1), (1, 2, 1), 1, (False, False, False))


def test_a_view_is_cut_out_of_nan():
    t = torch.arange(12.0).view(2, 3, 2)
    laid = lay(t, VIEW)
    assert torch.equal(laid, t)
    assert laid.stride() == (32, 2, 8)
    assert laid._base is not None
    assert int(laid._base.isnan().sum()) == laid._base.numel() - t.numel()
    repeated = lay(t, View((0, 1, 2), (1, 1, 1), 0, (False, True, False)))
    assert torch.equal(repeated, t[:, :1].expand_as(t))
    assert repeated.stride(1) == 0


PLAIN = View((0, 1), (1, 1), 0, (False, False))
CASE = Case(((2, 3),), (PLAIN, PLAIN), torch.float32, {})


@pytest.mark.parametrize(
    ("right", "message"),
    [
        (lambda x: x + 2.0**-12, "the result"),
        (lambda x: x * 2 - x.detach(), "the gradient of input 0"),
        (lambda x: x + 2.0**-40, "no accumulator can hold"),
    ],
    ids=["forward", "backward", "inexact"],
)
def test_a_difference_in_one_bit_is_found(right, message, device, monkeypatch):
    """The comparison itself: with a function that computes nothing, against one that differs."""
    monkeypatch.setattr("tests.support.fuzz.run", lambda function, *rest: served(run(function, *rest)))
    values = [torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)]
    compare(CASE, values, lambda x: x * 1, lambda x: x * 1, device)
    with pytest.raises(AssertionError, match=message):
        compare(CASE, values, lambda x: x * 1, right, device)


def served(outcome):
    """As if a kernel had been launched."""
    outcome.trace.calls.append(Call())
    return outcome


class Call:
    served_by = "kernels"
    launches = (type("Launch", (), {"kernel": "a kernel"}),)


def test_a_failure_is_raised(device, monkeypatch):
    def check(case, device):
        raise AssertionError

    failing = Property(st.integers(0, 100), check, 10, 10)
    monkeypatch.setitem(PROPERTIES, "failing", failing)
    with pytest.raises(AssertionError):
        campaign("failing", 10, device)
