"""batch_norm and the pools on the samples with which PyTorch tests its own operators.

The tables hold the samples of torch.testing._internal.common_methods_invocations.op_db of torch 2.13: for each OpInfo
named nn.functional.batch_norm (12), adaptive_avg_pool2d (10) and avg_pool2d (7), every one of sample_inputs("cpu",
torch.float64, requires_grad=True); and of error_inputs("cpu"). They are written down because that module needs
expecttest, which PyTorch does not install, and because importing it forbids all other tests of its process to set TF32
(torch.backends.disable_global_flags). max_pool2d has 1,440, which are all combinations of nine options: here are enough
for each value of one option to meet each value of every other one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor
from torch.testing import make_tensor

import cnnfast
import cnnfast.functional as ours
from tests.support.agreement import assert_served_by_kernels, integers

ALL, RUNNING, NONE = "all", "running", "none"
# Input, which of (running_mean, running_var, weight, bias) are given, options.
BATCH_NORM: list[tuple[tuple[int, ...], str, dict[str, Any]]] = [
    ((5, 5, 5), ALL, {"training": True, "momentum": 0.5, "eps": 0.6}),
    ((3, 2, 4), ALL, {"training": False, "momentum": -1.2}),
    ((3, 1), ALL, {"training": True, "momentum": 0.0}),
    ((0,), RUNNING, {"training": True}),
    ((0,), RUNNING, {"training": False}),
    ((3, 2, 3, 4), ALL, {"training": True, "momentum": -1.0, "eps": 0.5}),
    ((3, 2, 3, 4), ALL, {"training": False, "momentum": -1.0, "eps": 0.5}),
    ((2, 1), ALL, {}),
    ((2, 1), ALL, {"training": True}),
    ((2, 1), ALL, {"training": False}),
    ((2, 1), ALL, {"training": False}),
    ((1, 2, 3), NONE, {"training": True}),
]
ADAPTIVE = [
    *(((1, 8, 8, 8), ((5, 7),)), ((8, 8, 8), ((5, 7),)), ((2, 8, 8, 8), ((None, 7),)), ((8, 8, 8), ((None, 7),))),
    *(
        ((1, 8, 4, 3), ((5, None),)),
        ((8, 4, 3), ((5, None),)),
        ((1, 8, 4, 3), ((None, None),)),
        ((8, 4, 3), ((None, None),)),
    ),
    *(((1, 8, 4, 3), (5,)), ((8, 4, 3), (5,))),
]
AVERAGE = [
    ((1, 3, 9, 9), (3, 1, 1, True, False, 2)),
    ((1, 3, 9, 9), ((4, 4), (2, 3), 1, True, False, 2)),
    ((1, 3, 9, 9), ((6, 6), (3, 3), (2, 3), True, True, 2)),
    ((2, 3, 9, 9), ((3, 3), (1, 1), (1,), True, False, 2)),
    ((1, 1, 4, 4), ((2, 2), (), (0,), False, True, -2)),
    ((1, 2, 6, 6), ((4, 4), (2, 2), (2,), True, True, None)),
    ((1, 3, 9, 9), (3, 3)),
]
MAXIMUM = [
    ((2, 2, 6, 6), (3, 2, padding, 1 if index else (1, 2), ceil, index))
    for padding, ceil, index in product((0, 1), (True, False), (True, False))
] + [
    ((2, 3, 6), ((3, 2), stride, (1, 1), dilation, ceil, not ceil))
    for stride, dilation, ceil in product((None, (2, 1), 2), (1, (1, 2)), (True, False))
]
POOLS = [
    *(("adaptive_avg_pool2d", *sample) for sample in ADAPTIVE),
    *(("avg_pool2d", *sample) for sample in AVERAGE),
    *(("max_pool2d", *sample) for sample in MAXIMUM),
]
ERRORS = [
    *(
        ("adaptive_avg_pool2d", (2, 2), ((2, 2),)),
        ("adaptive_avg_pool2d", (1, 2, 3, 4), ((),)),
        ("adaptive_avg_pool2d", (1, 1, 1, 1), ((-1, 0),)),
    ),
    *(("avg_pool2d", (0, 1, 49), (kernel, 50, padding)) for kernel in (2, (3, 2)) for padding in (-1, 4)),
    ("avg_pool2d", (3, 3, 3), ((2, 2), None, 0, False, True, 0)),
    *(
        ("max_pool2d", (0, 1, 49), (kernel, 50, padding, 1, False, True))
        for kernel in (2, (3, 2))
        for padding in (-1, 4)
    ),
    *(("max_pool2d", (1, 0, 10), (1,)), ("max_pool2d", (2, 1, 10, 0), (1,)), ("max_pool2d", (1, 1, 4), (2,))),
]


def outcome(
    function: Callable[..., Any], tensors: list[Tensor | None], wanted: list[int], *options: Any, **named: Any
) -> list[Tensor | None]:
    """The results, the gradients of the `wanted` tensors, and all tensors as the call leaves them."""
    copies = [None if t is None else t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    results = function(*copies, *options, **named)
    results = results if isinstance(results, tuple) else (results,)
    y = results[0]
    assert y.requires_grad == bool(wanted)
    grads = torch.autograd.grad(y, [copies[i] for i in wanted], integers(*y.shape, seed=1).to(y)) if wanted else ()
    return [*results, *grads, *copies]


def assert_same(mine: list[Tensor | None], other: list[Tensor | None]) -> None:
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, check_stride=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no-gradients"])
@pytest.mark.parametrize("sample", range(len(BATCH_NORM)))
def test_batch_norm(sample, gradients, dtype, device):
    shape, given, options = BATCH_NORM[sample]
    channels = shape[1] if len(shape) > 1 else 0
    vectors = [make_tensor(channels, dtype=dtype, device=device, low=0 if i == 1 else None) for i in range(4)]
    given_vectors = [v if given == ALL or (given == RUNNING and i < 2) else None for i, v in enumerate(vectors)]
    tensors = [make_tensor(shape, dtype=dtype, device=device), *given_vectors]
    wanted = [i for i in (0, 3, 4) if gradients and tensors[i] is not None]
    with cnnfast.trace() as trace:
        mine = outcome(ours.batch_norm, tensors, wanted, **options)
    assert_same(mine, outcome(theirs.batch_norm, tensors, wanted, **options))
    if 0 not in shape:
        assert_served_by_kernels(trace)


def test_every_sample_of_batch_norm_is_here():
    assert len(BATCH_NORM) == 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("pool", "shape", "options"), POOLS, ids=str)
def test_pools(pool, shape, options, dtype, device):
    x = make_tensor(shape, dtype=dtype, device=device)
    for fmt in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,):
        with cnnfast.trace() as trace:
            mine = outcome(getattr(ours, pool), [x.contiguous(memory_format=fmt)], [0], *options)
        assert_same(mine, outcome(getattr(theirs, pool), [x.contiguous(memory_format=fmt)], [0], *options))
        assert_served_by_kernels(trace)


@pytest.mark.parametrize(("pool", "shape", "options"), ERRORS, ids=str)
def test_errors(pool, shape, options, device):
    x = make_tensor(shape, dtype=torch.float32, device=device)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        getattr(theirs, pool)(x, *options)
    with pytest.raises(expected.type):
        getattr(ours, pool)(x, *options)
