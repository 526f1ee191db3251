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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any
from unittest.mock import patch

import torch
import triton

from cnnfast_kernels import launch
from cnnfast_kernels.aot import layers
from cnnfast_kernels.aot.recording_driver import RecordedEncode, RecordedLaunch, RecordingDriver, recording_driver
from tests.support.surveyed_launches import cases, empty

STREAM = 0x57EA0  # any number that is not a default


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
        """Both surveys in one, if they are of different cases on one version of Triton."""
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
        """All lines of the lists that should be empty."""
        return [*self.differing, *self.failed, *self.size_mismatches, *self.scratch, *self.illegal, *self.outside]


def plain(survey: Survey) -> dict[str, Any]:
    """The survey as JSON can hold it."""
    told = {f.name: getattr(survey, f.name) for f in fields(survey)}
    return {name: dict(value) if isinstance(value, Counter) else value for name, value in told.items()}


def revived(told: dict[str, Any]) -> Survey:
    """The survey that `plain` told."""
    return Survey(**{name: Counter(value) if isinstance(value, dict) else value for name, value in told.items()})


Pattern = tuple[Any, ...]


def pattern(kernel: Any, tensors: Sequence[Any], mapped: Sequence[int]) -> Pattern:
    """The kernel, and for each operand: whether it is there, its dtype, and whether it is passed as a tensor map."""
    return kernel.__name__, *(None if t is None else (t.dtype, i in mapped) for i, t in enumerate(tensors))


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and dtype that starts one element behind a multiple of 16 bytes."""
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return torch.empty(reach + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride())


def last_byte(e: RecordedEncode) -> int:
    """The offset of the last byte that the map can reach, from where its tensor starts."""
    strides = e.element_bytes, *e.strides[1:]
    return sum((dim - 1) * stride for dim, stride in zip(e.dims, strides, strict=True)) + e.element_bytes - 1


class Comparison:
    """Stands in for Launch.__call__ and launch.run. With `once`, a plan is launched only if no earlier one had its
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
        """Stands in for launch.run while a plan is called, which calls it where it does not know the kernel yet."""
        self.launched_by_triton += 1
        return self.run(kernel, *args, **options)

    def without_a_plan(self, kernel: Any, grid: Any, device: Any, *args: Any, **options: Any) -> Any:
        """Stands in for launch.run for launches that no plan makes."""
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
        """Stands in for Launch.__call__."""
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
        """Launches by Triton, then twice by the plan, and compares the first launch with the last."""
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
        stack.enter_context(patch.object(layers, "empty", empty))
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
