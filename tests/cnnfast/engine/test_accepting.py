"""What a frozen network says to arguments that it does not take."""

from __future__ import annotations

import re

import pytest
import torch

from cnnfast.engine.accepting import accept, misfits
from cnnfast.engine.graph import Input
from cnnfast.engine.structures import Structure

TAKES = (Input("x", (None, 3, 8, 8), torch.float32), Input("mask", (None, 8), torch.bool))
X, MASK = torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, dtype=torch.bool)
ARGUMENTS = Structure.flatten((X, {"mask": MASK, "scale": 2}))[1]


def test_tensors_come_in_order_and_floating_ones_are_cast():
    x, mask = accept((X.double().requires_grad_(), {"mask": MASK, "scale": 2}), ARGUMENTS, TAKES, torch.bfloat16)
    assert (x.dtype, x.requires_grad, mask.dtype) == (torch.bfloat16, False, torch.bool)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((X,), "the network takes 2 arguments, but got 1"),
        ((X, MASK), "argument 2 must be a dict, but got a tensor"),
        (([X], {"mask": MASK, "scale": 2}), "argument 1 must be a tensor, but got a list"),
        ((X, {"mask": MASK}), "argument 2 takes 2 parts, but got 1"),
        ((X, {"mask": MASK, "size": 2}), "argument 2 must have the keys mask, scale, but got mask, size"),
        (
            (X, {"mask": MASK, "scale": 3}),
            "argument 2['scale'] was 2 when the network was frozen and cannot change, but got 3",
        ),
        ((X, {"mask": MASK, "scale": MASK}), "argument 2['scale'] must be 2, but got a tensor"),
        ((X.long(), {"mask": MASK, "scale": 2}), "x must be floating-point, but got torch.int64"),
        ((X, {"mask": MASK.int(), "scale": 2}), "mask must be of torch.bool, but got torch.int32"),
        (
            (X[0], {"mask": MASK, "scale": 2}),
            "x must be [any, 3, 8, 8], but got [3, 8, 8]: an image alone needs a batch",
        ),
        ((X.to("meta"), {"mask": MASK, "scale": 2}), "x must be on the CPU, but got a tensor on meta"),
        ((X.to_sparse(), {"mask": MASK, "scale": 2}), "x must be a dense tensor"),
        ((X, {"mask": object(), "scale": 2}), "object is neither a tensor nor a constant"),
    ],
)
def test_other_arguments_are_refused_by_name(given, says):
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        accept(given, ARGUMENTS, TAKES, torch.float32)
    assert str(refused.value).startswith("frozen(): ")


def test_a_dict_in_another_order_is_put_into_its_order():
    swapped = (X, {"scale": 2, "mask": MASK})
    assert [t.shape for t in accept(swapped, ARGUMENTS, TAKES, torch.float32)] == [X.shape, MASK.shape]


def test_sizes():
    assert misfits(TAKES, ((5, 3, 8, 8), (5, 8))) == ""
    assert misfits(TAKES, ((5, 3, 8, 9), (5, 8))) == "x must be [any, 3, 8, 8], but got [5, 3, 8, 9]"
    assert misfits(TAKES, ((5, 3, 8, 8), (5, 7))) == "mask must be [any, 8], but got [5, 7]"
