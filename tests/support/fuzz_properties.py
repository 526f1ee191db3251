"""All that is fuzzed, and how: a property is a strategy of cases and what has to hold of each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from cnnfast.precision import float32_products
from tests.support.fuzz import check_convolution, convolutions, transposed_convolutions
from tests.support.fuzz_augment import augmentations, check_augmentation
from tests.support.fuzz_errors import check_misuse, is_accident, misuses
from tests.support.fuzz_norm import batch_norms, check_batch_norm, check_fused_convolution, fused_convolutions
from tests.support.fuzz_pools import (
    adaptive_pools,
    average_pools,
    check_adaptive_pool,
    check_average_pool,
    check_global_pool,
    check_max_pool,
    global_pools,
    max_pools,
)
from tests.support.poison import poisoned_workspaces


class Property(NamedTuple):
    """`check` returns what the fuzz compared, or None where nothing is computed; a case tells by counts() what it is an
    instance of. `quick` cases are part of every test run, `share` is how often the long one draws this property.
    """

    cases: st.SearchStrategy[Any]
    check: Callable[..., Any]
    quick: int
    share: int


PROPERTIES = {
    "conv2d": Property(convolutions(2), partial(check_convolution, "conv2d"), 12, 500),
    "conv1d": Property(convolutions(1), partial(check_convolution, "conv1d"), 10, 250),
    "conv_transpose2d": Property(transposed_convolutions(), partial(check_convolution, "conv_transpose2d"), 10, 300),
    "conv_bn_act": Property(fused_convolutions(), check_fused_convolution, 10, 250),
    "conv_act": Property(fused_convolutions(normed=False), check_fused_convolution, 6, 200),
    "batch_norm": Property(batch_norms(), check_batch_norm, 20, 300),
    "max_pool2d": Property(max_pools(), check_max_pool, 15, 300),
    "avg_pool2d": Property(average_pools(), check_average_pool, 10, 200),
    "adaptive_avg_pool2d": Property(adaptive_pools(), check_adaptive_pool, 10, 150),
    "global_avg_pool2d": Property(global_pools(), check_global_pool, 8, 100),
    "augment": Property(augmentations(), check_augmentation, 40, 1000),
    "errors": Property(misuses().filter(lambda case: not is_accident(case)), check_misuse, 200, 2500),
}


@dataclass
class Tally:
    """How many different cases passed, in how many seconds, and how many of them were an instance of what: (aspect,
    instance).
    """

    cases: int = 0
    seconds: float = 0.0
    spread: Counter[tuple[str, str]] = field(default_factory=Counter)


MAX_ROUNDS = 20
CAMPAIGN = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)


def campaign(name: str, cases: int, device: torch.device, start: int = 0) -> Tally:
    """Draws so many different cases of a property, always the same ones from a seed `start`. The first that fails is
    made as small as possible, printed and raised.
    """
    found, drawn, seen = PROPERTIES[name], Tally(), set()
    begun = time.perf_counter()

    def run(case: Any) -> None:
        if len(seen) == cases or repr(case) in seen:
            return
        compared = found.check(case, device)
        seen.add(repr(case))
        drawn.spread += case.counts()
        if compared is not None:
            drawn.spread += Counter(("kernel", kernel) for kernel in set(compared.trace.launches))

    with poisoned_workspaces(), float32_products("ieee"):
        for turn in range(MAX_ROUNDS):  # hypothesis likes to draw what it has drawn
            if len(seen) < cases:
                seed(start + turn)(settings(CAMPAIGN, max_examples=cases)(given(case=found.cases)(run)))()
    drawn.cases, drawn.seconds = len(seen), time.perf_counter() - begun
    return drawn


@triton.jit
def read_kernel(x_ptr, i):
    tl.store(x_ptr, tl.load(x_ptr + i))


def assert_addresses_are_checked() -> None:
    """In the interpreter a kernel that leaves its arguments fails, here by one element of a slice."""
    x = torch.zeros(8)[2:6]
    read_kernel[(1,)](x, 3)
    for beyond in (-1, 4):
        with pytest.raises(Exception, match="out of bounds"):
            read_kernel[(1,)](x, beyond)
