"""What calls cost the host: the Python functions that a repeated call enters, which no load of the machine changes; and
time.

Over the stub driver, which stands in for Triton's launcher too: what is bounded is our own code and PyTorch's. A bound
is a multiple of what PyTorch takes on the same machine for an operator of one tensor (host_cost.bare_operator). A load
adds to a measurement and never takes away: a call is measured until its least time is within its bound, or time is up.
`pytest benchmarks/test_host_cost.py` measures what there is to measure, with Triton's launcher and, for conv2d, without
it (benchmarks/results/cpu/host_cost.txt).
"""

from __future__ import annotations

import pytest

from tests.support.child import run_compiled

pytestmark = pytest.mark.compiled


def functions_entered():
    """{operation: {mode: [the Python functions that a repeated call enters: module and name]}}"""
    import sys

    from cnnfast.bench import host_cost

    def entered_by(call):
        entered = []

        def see(frame, event, argument):
            if event == "call":
                entered.append(f"{frame.f_globals['__name__']}:{frame.f_code.co_name}")

        sys.setprofile(see)
        try:
            call()
        finally:
            sys.setprofile(None)
        return entered

    told = {}
    with host_cost.pretended_gpu(launcher=False):
        for operation in host_cost.OPERATIONS:
            told[operation] = {}
            for mode in host_cost.MODES:
                with host_cost.prepared(operation, mode) as call:
                    told[operation][mode] = entered_by(call)
    return told


# Of our own packages, in each mode, and room for one: a function more is 0.1 us and what it does.
MOST = {
    "conv2d": (28, 36, 34),
    "conv_bn_act": (39, 49, 60),
    "conv_bn_act, training": (60, 70, 66),
    "conv_act": (37, 48, 54),
    "batch_norm": (20, 25, 36),
    "batch_norm, training": (42, 47, 36),
    "max_pool2d": (24, 31, 12),
    "avg_pool2d": (25, 31, 13),
    "global_avg_pool2d": (14, 20, 13),
}
# What works out a launch.
PLANNING = (
    "triton.runtime.jit",
    "triton.compiler",
    "tiling:",
    ":of",
    ":strides_nhwc",
    ":dense",
    ":plan_",
    ":_plan_",
    "launch:__init__",
)


@pytest.fixture(scope="module")
def entered():
    return run_compiled(functions_entered)


def test_a_repeated_call_plans_nothing(entered):
    for operation, modes in entered.items():
        for mode, functions in modes.items():
            assert [f for f in functions if any(part in f for part in PLANNING)] == [], (operation, mode)


def test_a_repeated_call_does_not_pass_the_dispatcher(entered):
    for operation, modes in entered.items():
        for mode, functions in modes.items():
            assert [f for f in functions if f.startswith("torch._ops")] == [], (operation, mode)


def is_ours(function):
    """Whether an entered function is one that a real call enters: neither the call's own, nor the stub driver's, nor
    the question which backend was chosen, which is asked here because the calls are made under one.
    """
    own = ("cnnfast.bench.", "cnnfast_kernels.aot.", "cnnfast.dispatch:_chosen")
    return function.startswith("cnnfast") and not function.startswith(own)


def test_a_repeated_call_enters_few_functions(entered):
    counts = {o: tuple(sum(map(is_ours, functions)) for functions in modes.values()) for o, modes in entered.items()}
    assert set(counts) == set(MOST)
    assert {o: c for o, c in counts.items() if any(n > most for n, most in zip(c, MOST[o], strict=True))} == {}


# ----------------------------------------------------------------------------------------------------------------------
# Time


def over_bounds(bounds, seconds):
    """{operation: {mode: (least time, that of the bare operator)}} of calls that stayed above their bound, in multiples
    of the bare operator's time, for as long as that.
    """
    import time

    import torch

    from cnnfast.bench import host_cost

    torch.set_num_threads(1)
    found = {}
    with host_cost.pretended_gpu(launcher=False):
        bare = host_cost.bare_operator()
        for operation, modes in bounds.items():
            for mode, bound in modes.items():
                with host_cost.prepared(operation, mode) as call:
                    calls = {"bare": bare, "call": call}
                    least, end = dict.fromkeys(calls, float("inf")), time.monotonic() + seconds
                    within = False
                    while not within and time.monotonic() < end:
                        taken = host_cost.fastest(calls, rounds=20)
                        least = {key: min(taken[key], least[key]) for key in calls}
                        within = least["call"] <= bound * least["bare"]
                    if not within:
                        found.setdefault(operation, {})[mode] = least["call"], least["bare"]
    return found


# What was measured with a quarter on top, by the one of two builds of Python that gave more: they differ by up to a
# fifth. That functions entered are few is bounded above, and closer.
BOUNDS = {
    "conv2d": {"inference": 12.7, "gradients": 21.9},
    "batch_norm": {"inference": 9.9, "gradients": 15.3},
    "max_pool2d": {"inference": 8.0, "gradients": 12.8},
    "global_avg_pool2d": {"inference": 5.3, "gradients": 8.4},
    "conv_bn_act": {"inference": 22.4, "gradients": 33.9},
}


def test_host_time_over_kernels():
    assert run_compiled(over_bounds, BOUNDS, 10.0) == {}


def test_a_bound_can_be_missed():
    assert list(run_compiled(over_bounds, {"conv2d": {"inference": 1.0}}, 0.2)) == ["conv2d"]
    assert "conv2d" in run_compiled(added_to_pytorch, -100.0, 0.2)


def added_to_pytorch(bound, seconds):
    """{function: microseconds} that ours adds to PyTorch's, of those that stayed above the bound."""
    import time

    import torch

    import cnnfast.functional as ours
    from cnnfast.bench import host_cost

    torch.set_num_threads(1)
    found = {}
    bare, x = host_cost.bare_operator(), torch.ones(1, 1, 1, 1)
    with torch.inference_mode():
        for name, call in host_cost.ONE_PIXEL.items():
            calls = {"bare": bare, "ours": call(ours, x), "theirs": call(torch.nn.functional, x)}
            least, end = dict.fromkeys(calls, float("inf")), time.monotonic() + seconds
            while True:
                taken = host_cost.fastest(calls, rounds=50)
                least = {key: min(taken[key], least[key]) for key in calls}
                within = least["ours"] - least["theirs"] <= bound * max(least["bare"], 1.7) / 1.7
                if within or time.monotonic() > end:
                    break
            if not within:
                found[name] = least
    return found


def test_where_pytorch_serves_next_to_nothing_is_added():
    """At most 1.5 us; measured 0.4 to 1.0."""
    assert run_compiled(added_to_pytorch, 1.5, 10.0) == {}
