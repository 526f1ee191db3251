from __future__ import annotations

import pytest
import torch

from cnnfast.engine import operators
from cnnfast.engine.operators import ATEN, ENLARGING, NAMES, OPERATORS, multiplied, why_not

OVERLOADS = {name: OPERATORS[f"aten.{name}"] for name in ATEN}


@pytest.mark.parametrize("name", ATEN)
def test_none_writes_or_draws(name):
    overload = OVERLOADS[name]
    assert not overload._schema.is_mutable
    # Attention draws only for dropout, which capture refuses; the tag is PyTorch's.
    assert torch.Tag.nondeterministic_seeded not in overload.tags or "attention" in name
    assert not any(
        argument.name in ("device", "pin_memory", "generator") for argument in overload._schema.arguments
    ) or (name in operators.FROM_NOTHING or "like" in name)


def test_each_has_one_name():
    assert len(NAMES) == len(OPERATORS)
    assert len(set(ATEN)) == len(ATEN)
    assert set(ENLARGING) <= set(ATEN)


@pytest.mark.parametrize(
    "name", ["as_strided.default", "_unsafe_index.Tensor", "set_.source_Tensor", "from_file.default"]
)
def test_what_reads_anywhere_is_not_among_them(name):
    assert f"aten.{name}" not in OPERATORS


def test_products_of_sizes_stay_small():
    assert multiplied(6, 7) == 42
    with pytest.raises(OverflowError, match="beyond"):
        multiplied(2**40, 2**40)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.ops.aten.rand.default, "aten.rand.default, which draws random numbers"),
        (torch.ops.aten.bernoulli.default, "draws random numbers"),
        (torch.ops.aten.nonzero.default, "depends on the values in a tensor"),
        (torch.ops.aten.as_strided.default, "not among the operators that a frozen network may call"),
        (torch.ops.prims.add.default, "an operator of prims, of which nothing is known"),
    ],
)
def test_why_not(target, words):
    assert words in why_not(target)
