"""What reaches CUDA when kernels are launched, by Triton's real launcher over a driver that records
(aot/recording_driver).

A plan's repeated launch goes past the code by which Triton launches; it must pass the very same bytes. `survey` calls
the launchers of every kernel, on tensors whose contents do not matter, and compares. Only for processes in which
kernels are compiled.

    seen = survey(once=True)
    assert not seen.differing
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import triton

from cnnfast_kernels import batchnorm, launch, pooling
from cnnfast_kernels.aot import cases as aot_cases
from cnnfast_kernels.aot.cases import Case
from cnnfast_kernels.aot.recording_driver import RecordedEncode, RecordedLaunch, RecordingDriver, recording_driver
from cnnfast_kernels.conv import conv_dgrad, conv_fprop, conv_stats, conv_wgrad
from cnnfast_kernels.epilogue import PLAIN, BatchNorm, Epilogue
from cnnfast_kernels.problem import PoolProblem

STREAM = 0x57EA0  # any number that is not a default
LAST, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass
class Survey:
    """What was seen. Launches are counted by kernel; the lists name what is wrong, one line each.

    `by_plan` were compared: the same call by its plan, repeated, and by Triton. `by_triton` have no plan. `unaligned`:
    those of by_plan that came after a launch of the same plan whose operands were all at multiples of 16 bytes, where
    one is not.
    """

    triton: str = triton.__version__
    by_plan: Counter[str] = field(default_factory=Counter)
    by_triton: Counter[str] = field(default_factory=Counter)
    unaligned: Counter[str] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # cases that raised
    binaries: list[str] = field(default_factory=list)  # a digest of each
    size_mismatches: list[str] = field(default_factory=list)
    scratch: list[str] = field(default_factory=list)
    encodes: int = 0
    illegal: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)  # maps that reach beyond the memory of their tensors
    permuted: int = 0
    overlapping: int = 0

    def __add__(self, other: Survey) -> Survey:
        """Both, of other cases of one version of Triton."""
        both = Survey(
            self.triton, **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Survey)[1:]}
        )
        both.binaries = sorted(set(both.binaries))
        return both

    @property
    def kernels(self) -> set[str]:
        return set(self.by_plan) | set(self.by_triton)

    @property
    def wrong(self) -> list[str]:
        """Every line that should not be there."""
        return [*self.differing, *self.failed, *self.size_mismatches, *self.scratch, *self.illegal, *self.outside]


def plain(survey: Survey) -> dict[str, Any]:
    """As JSON has it."""
    told = {f.name: getattr(survey, f.name) for f in fields(survey)}
    return {name: dict(value) if isinstance(value, Counter) else value for name, value in told.items()}


def revived(told: dict[str, Any]) -> Survey:
    """The survey that `plain` told."""
    return Survey(**{name: Counter(value) if isinstance(value, dict) else value for name, value in told.items()})


Pattern = tuple[Any, ...]


def pattern(kernel: Any, tensors: Sequence[Any], mapped: Sequence[int]) -> Pattern:
    """The kernel, and of each operand whether it is there, its dtype, and whether it goes as a tensor map."""
    return kernel.__name__, *(None if t is None else (t.dtype, i in mapped) for i, t in enumerate(tensors))


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and dtype that starts one element behind a multiple of 16 bytes."""
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return torch.empty(reach + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride())


def last_byte(e: RecordedEncode) -> int:
    """Of those that the map can reach, counted from where its tensor starts."""
    strides = e.element_bytes, *e.strides[1:]
    return sum((dim - 1) * stride for dim, stride in zip(e.dims, strides, strict=True)) + e.element_bytes - 1


class Comparison:
    """Stands in for Plan.__call__ and launch.run. With `once`, a plan is launched only if no earlier one had its
    pattern.
    """

    def __init__(self, driver: RecordingDriver, survey: Survey, once: bool) -> None:
        self.driver, self.survey, self.once = driver, survey, once
        self.case = ""
        self.seen: set[Pattern] = set()
        self.misaligned: set[Pattern] = set()
        self.launched_by_triton = 0
        self.call, self.run = launch.Launch.__call__, launch.run

    def unplanned(self, kernel: Any, *args: Any, **options: Any) -> Any:
        """In place of launch.run, which plans call too where they do not know the kernel yet."""
        self.launched_by_triton += 1
        return self.run(kernel, *args, **options)

    def without_a_plan(self, kernel: Any, grid: Any, device: Any, *args: Any, **options: Any) -> Any:
        """In place of launch.run for what is not called from a plan."""
        if (
            self.once
            and (key := pattern(kernel, [a for a in args if a is None or isinstance(a, torch.Tensor)], ())) in self.seen
        ):
            return None
        self.driver.taken()
        compiled = self.run(kernel, grid, device, *args, **options)
        launches, _ = self.taken(())
        self.survey.by_triton[kernel.__name__] += len(launches)
        if self.once:
            self.seen.add(key)
        return compiled

    def planned(self, plan: launch.Launch[Any], tensors: Any) -> None:
        """In place of a plan's call."""
        key = pattern(plan.kernel, tensors, [i for i, _ in plan.maps])
        if 0 in plan.grid or (self.once and key in self.seen):
            return
        self.seen.add(key)
        name = plan.kernel.__name__
        with patch.object(launch, "run", self.unplanned):
            repeated = self.compare(plan, tensors)
            self.survey.by_plan[name] += 1
            present = [i for i in plan.pointers if tensors[i] is not None]
            if (
                not present
                or (name if self.once else key) in self.misaligned
                or any(tensors[i].data_ptr() % 16 for i in present)
            ):
                return
            self.misaligned.add(name if self.once else key)
            moved = [unaligned(t) if i == present[0] else t for i, t in enumerate(tensors)]
            self.compare(plan, moved)
            self.survey.unaligned[name] += 1
            again = self.launched(plan, tensors)
            if again != repeated:
                self.differs(plan, "with aligned operands again", repeated, again)

    def compare(self, plan: launch.Launch, tensors: Sequence[Any]) -> Any:
        """Launches by Triton, twice by the plan, and compares the first with the last."""
        self.driver.taken()
        plan.run(tuple(tensors))
        by_triton = self.taken(tensors)
        self.call(plan, tensors)  # in which the plan comes to know the kernel
        before = self.launched_by_triton
        by_plan = self.launched(plan, tensors)
        if self.launched_by_triton != before:
            self.survey.differing.append(
                f"{self.case}: {plan.kernel.__name__}: a repeated launch goes by Triton's code"
            )
        if by_plan != by_triton or len(by_plan[0]) != 1:
            self.differs(plan, "", by_triton, by_plan)
        return by_plan

    def launched(self, plan: launch.Launch, tensors: Sequence[Any]) -> Any:
        self.driver.taken()
        self.call(plan, tensors)
        return self.taken(tensors)

    def differs(self, plan: launch.Launch, when: str, expected: Any, found: Any) -> None:
        """One line that says in what two launches differ, each given with its encodes."""
        told = []
        for what, left, right in zip(("launch", "encode"), expected, found, strict=True):
            if len(left) != len(right):
                told.append(f"{len(left)} and {len(right)} of type {what}")
            for a, b in zip(left, right, strict=False):
                names = [f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)]
                told += [f"{what} {name} {getattr(a, name)} and {getattr(b, name)}"[:300] for name in names]
        self.survey.differing.append(f"{self.case}: {plan.kernel.__name__} {when}: {'; '.join(told)}")

    def taken(self, tensors: Sequence[Any]) -> tuple[list[RecordedLaunch], list[RecordedEncode]]:
        """What the driver recorded, its tensor maps judged: each must lie within the memory of one of `tensors`."""
        launches, encodes = self.driver.taken()
        for e in encodes:
            self.survey.encodes += 1
            self.survey.permuted += e.permuted
            self.survey.overlapping += e.overlapping
            if e.refusal:
                self.survey.illegal.append(f"{self.case}: {e.refusal}")
            ends = [t.data_ptr() + memory(t) for t in tensors if t is not None and t.data_ptr() == e.address]
            if not any(e.address + last_byte(e) < end for end in ends):
                self.survey.outside.append(
                    f"{self.case}: {e.dims} by {e.strides} bytes at {e.address:#x}, of tensors that end at {ends}"
                )
        return launches, encodes


def memory(t: torch.Tensor) -> int:
    """Bytes from the tensor's start to the end of its storage."""
    return t.untyped_storage().nbytes() - t.storage_offset() * t.element_size()


def survey(once: bool, part: int = 0, parts: int = 1, capability: int = 90) -> Survey:
    """Launches all cases on a GPU of sm_`capability` that is not there; with `once` one launch of each kernel and
    operand pattern.

    Of several `parts`, which processes may share, one takes every so manieth case.
    """
    found = Survey()
    with ExitStack() as stack:
        driver = stack.enter_context(recording_driver(capability))
        driver.stream = STREAM
        watch = Comparison(driver, found, once)
        stack.enter_context(patch.object(aot_cases, "empty", empty))
        stack.enter_context(patch.object(launch.Launch, "__call__", lambda plan, tensors: watch.planned(plan, tensors)))
        stack.enter_context(patch.object(launch, "run", watch.without_a_plan))
        for case in list(cases(capability, once))[part::parts]:
            watch.case = case.name
            try:
                case.run()
            except Exception as error:  # what a launch raises is a finding, and the other cases are due all the same
                driver.taken()
                found.failed.append(f"{case.name}: {type(error).__name__}: {error}"[:500])
    for kernel in driver.kernels.values():
        found.binaries.append(kernel.digest)
        if kernel.parameter_bytes != kernel.passed_bytes:
            found.size_mismatches.append(
                f"{kernel.name}: has {kernel.parameter_bytes}, is passed {kernel.passed_bytes}"
            )
        if kernel.global_scratch_bytes or kernel.profile_scratch_bytes:
            found.scratch.append(
                f"{kernel.name}: {kernel.global_scratch_bytes}, {kernel.profile_scratch_bytes} bytes of scratch memory"
            )
    found.binaries = sorted(set(found.binaries))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What is launched. Memory that nobody touches costs nothing: extents are those of real layers.


def empty(*shape: int, dtype: torch.dtype = torch.float32, fmt: torch.memory_format = NCHW) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=fmt)


def cases(capability: int, once: bool) -> Iterator[Case]:
    """Operands and layouts that may be absent, present and mixed; then all that is compiled ahead of time, every tile
    among it.
    """
    everywhere = [(dtype, LAST) for dtype in DTYPES]
    for dtype, fmt in everywhere if once else [*everywhere, (torch.bfloat16, NCHW), (torch.float32, NCHW)]:
        told = f"{str(dtype).removeprefix('torch.')} {'channels_last' if fmt == LAST else 'contiguous'}"
        for i, layer in enumerate(LAYERS if fmt == LAST and not once else LAYERS[:FIRST]):
            if not once or dtype == torch.bfloat16:
                yield Case(f"epilogues {told} {layer}", partial(epilogues, dtype, fmt, i < FIRST, *layer))
            yield Case(f"gradients {told} {layer}", partial(gradients, dtype, fmt, *layer))
        yield Case(f"batch norm {told}", partial(batch_norms, dtype, fmt, once))
        yield Case(f"pools {told}", partial(pools, dtype, fmt))
    yield from reversed(aot_cases.cases(capability))  # the largest tiles, which take longest to compile, come last


# (N, C, size, K, window, stride, padding, dilation, groups). The first of each family, then what makes views, boxes and
# strips differ.
LAYERS = (
    (4, 64, 14, 64, 3, 1, 1, 1, 1),
    (2, 64, 14, 64, 3, 1, 1, 1, 64),
    (2, 3, 32, 16, 7, 2, 3, 1, 1),
    (4, 64, 14, 60, 1, 1, 0, 1, 1),  # filters that are no multiple of 8: the general kernels, whatever the dtype
    (4, 64, 14, 64, 3, 2, 1, 1, 1),
    (4, 64, 14, 128, 1, 1, 0, 1, 1),
    (4, 64, 14, 128, 1, 2, 0, 1, 1),
    (2, 64, 9, 32, 3, 1, 2, 2, 1),
    (2, 64, 8, 64, 3, 1, 1, 1, 2),
    (8, 32, 7, 32, 5, 3, 2, 1, 1),
    (1, 200, 13, 72, 3, 1, 0, 1, 1),
    (2, 96, 11, 192, 5, 2, 2, 1, 96),
    (3, 17, 10, 9, 4, 2, 1, 1, 1),
    (16, 8, 1, 8, 1, 1, 0, 1, 1),
    (2, 4, 64, 24, 3, 2, 1, 1, 1),
)
FIRST = 4


def operands(dtype: torch.dtype, fmt: torch.memory_format, N, C, size, K, window, stride, pad, dilation, groups):
    """(x, w, dy, geometry) of a convolution of square images."""
    geometry = aot_cases.Geometry((stride, stride), (pad,) * 4, (dilation, dilation), groups)
    x, w = empty(N, C, size, size, dtype=dtype, fmt=fmt), empty(K, C // groups, window, window, dtype=dtype, fmt=fmt)
    g = geometry.problem(x.shape, w.shape)
    return x, w, empty(N, K, g.P, g.Q, dtype=dtype, fmt=fmt), geometry


def epilogues(dtype: torch.dtype, fmt: torch.memory_format, every: bool, *layer: int) -> None:
    """Forward with none and with all operands that may be absent; with `every`, with each of them present and absent."""
    x, w, residual, geometry = operands(dtype, fmt, *layer)
    vector = empty(w.shape[0])
    norms = [BatchNorm(vector, vector, weight, bias) for weight, bias in product((vector, None), repeat=2)]
    chosen = [PLAIN, Epilogue(vector, norms[0], residual, "leaky_relu", 0.2)]
    chosen += every * [
        Epilogue(bias=empty(w.shape[0], dtype=dtype)),
        *(Epilogue(norm=norm, activation="relu") for norm in norms),
        Epilogue(residual=residual),
    ]
    for epilogue in chosen:
        conv_fprop(x, w, geometry, epilogue)
    conv_stats(x, w, geometry)
    if every:
        conv_stats(x, w, geometry, bias=vector)


def gradients(dtype: torch.dtype, fmt: torch.memory_format, *layer: int) -> None:
    """Both gradients, the transposed convolution with its bias, and all of it by im2col."""
    x, w, dy, geometry = operands(dtype, fmt, *layer)
    for algorithm in ("auto", "im2col"):
        conv_dgrad(dy, w, tuple(x.shape), geometry, fmt=fmt, algorithm=algorithm)
        conv_dgrad(dy, w, tuple(x.shape), geometry, bias=empty(x.shape[1], dtype=dtype), fmt=fmt, algorithm=algorithm)
        conv_wgrad(x, dy, tuple(w.shape), geometry, fmt=fmt, algorithm=algorithm)
    conv_fprop(x, w, geometry, Epilogue(empty(w.shape[0])), algorithm="im2col")


def batch_norms(dtype: torch.dtype, fmt: torch.memory_format, once: bool) -> None:
    """Statistics, their running means, the pass and its gradients with each operand that may be absent, present and
    absent.
    """
    y, C = empty(4, 24, 11, 11, dtype=dtype, fmt=fmt), 24
    mean, var = batchnorm.batch_moments(y)
    for running in (torch.float32, dtype):
        batchnorm.update_running(empty(C, dtype=running), empty(C, dtype=running), mean, var, 0.1, 4 * 121)
    batchnorm.channel_sum(y)
    some = [(True, True, True), (False, False, False), (True, False, True), (False, True, False)]
    variants = list(product(some, ("relu", "silu", None), (True, False)))
    # every fifth: each alternative occurs
    for (scaled, shifted, added), activation, training in variants[:: 5 if once else 1]:
        weight, bias = empty(C) if scaled else None, empty(C) if shifted else None
        residual = torch.empty_like(y) if added else None
        z = batchnorm.normalize(y, mean, var, weight, bias, residual, 1e-5, activation, 0.0)
        needs = (True, scaled, shifted, added)
        batchnorm.normalize_backward(
            torch.empty_like(z), y, z, mean, var, weight, bias, residual, 1e-5, activation, 0.0, training, needs
        )


def pools(dtype: torch.dtype, fmt: torch.memory_format) -> None:
    """Windows that overlap, that do not, that are as large as the plane; planes that are cut in parts."""
    x = empty(2, 24, 23, 23, dtype=dtype, fmt=fmt)
    for window, stride, pad in ((3, 2, 1), (2, 2, 0), (20, 3, 0)):
        g = PoolProblem.of(tuple(x.shape), (window, window), (stride, stride), (pad, pad))
        y, taps = pooling.max_pool(g, x, with_taps=True)
        pooling.max_pool(g, x, with_taps=False)
        assert taps is not None
        pooling.max_pool_indices(g, taps)
        pooling.max_pool_backward(g, y, taps, fmt)
        pooling.avg_pool_backward(g, pooling.avg_pool(g, x, True, None), True, None, fmt)
        pooling.avg_pool(g, x, False, None)
    pooling.adaptive_avg_pool_backward(pooling.adaptive_avg_pool(x, 3, 3), (2, 24, 23, 23), fmt)
    pooling.global_avg_pool(x)
    pooling.global_avg_pool(empty(1, 8, 224, 224, dtype=dtype, fmt=fmt))
