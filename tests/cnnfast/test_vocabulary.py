"""Names of dtypes and modes: the same ones wherever one is given, and what is said to any other."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.dtypes import ALIASES, CHOICES, SHORT, argument, full_name
from cnnfast.modes import MODES, modes_named

NAMES = {
    **SHORT,
    **{full: full for full in SHORT.values()},
    **{f"torch.{full}": full for full in SHORT.values()},
    **ALIASES,
    **{f"torch.{name}": full for name, full in ALIASES.items()},
}


@pytest.mark.parametrize(("name", "full"), NAMES.items())
def test_every_name_of_a_dtype_stands_for_its_full_one(name, full):
    assert full_name(name) == full
    tf32 = full == "tf32"
    tensors = torch.float32 if tf32 else getattr(torch, full)
    assert argument(name, "check") == (tensors, "tf32" if tf32 else "ieee")
    assert argument(tensors, "check") == (tensors, None)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("fp33", "fp32"), ("float31", "float32"), ("BF16", "bf16"), ("Half", "half"), ("torch.flaot64", "float64"),
        ("f16", "fp16"), ("bfp16", "bf16"), ("single", "fp32"), ("ieee", "fp32"), ("tfloat32", "tf32"),
        ("int8", None), ("", None),
    ],
)  # fmt: skip
def test_other_names_are_told_the_right_ones(wrong, meant):
    with pytest.raises(ValueError, match=re.escape(f"{wrong!r} is none of {CHOICES}")) as raised:
        full_name(wrong)
    assert (f"Did you mean {meant!r}?" in str(raised.value)) == (meant is not None)


@pytest.mark.parametrize("dtype", ["float33", torch.int8, torch.complex64, 32])
def test_functions_refuse_what_is_no_dtype_of_theirs(dtype):
    with pytest.raises(ValueError, match=r"check\(\): dtype .* bf16, fp16, fp32, tf32, fp64"):
        cnnfast.check(nn.ReLU(), torch.zeros(1), dtype=dtype)


def test_modes_are_named_once_in_their_order():
    assert modes_named("train,infer,train") == ("train", "infer")
    assert modes_named("") == ()
    assert all(modes_named(mode) == (mode,) for mode in MODES)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("eval", "infer"),
        ("inference", "infer"),
        ("Infer", "infer"),
        ("training", "train"),
        ("trian", "train"),
        ("x", None),
    ],
)
def test_other_modes_are_told_the_right_ones(wrong, meant):
    with pytest.raises(ValueError, match=re.escape(f"{wrong!r} is neither infer nor train")) as raised:
        modes_named(f"infer,{wrong}")
    assert (f". Did you mean {meant!r}?" in str(raised.value)) == (meant is not None)
