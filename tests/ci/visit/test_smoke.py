"""The smoke part: every kernel has a family, right numbers pass and wrong ones do not, and what compute-sanitizer says
is told apart.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cnnfast_kernels import launch, memory
from cnnfast_kernels.aot.judging import due_on, kernel_modules
from tests.support.child import REPOSITORY, environment


def test_every_kernel_belongs_to_one_family():
    from ci.visit.smoke.families import FAMILIES

    counted = Counter(kernel for family in FAMILIES.values() for kernel in family.kernels)
    assert set(counted) == set(kernel_modules())
    assert set(counted.values()) == {1}


def test_families_without_tensor_maps_run_on_every_architecture():
    from ci.visit.smoke.families import FAMILIES

    assert {kernel for family in FAMILIES.values() if not family.tensor_maps for kernel in family.kernels} == due_on(
        "sm_80"
    )


# Those with tensor maps take the interpreter half a minute each.
@pytest.mark.parametrize(
    "name",
    [
        "fprop",
        "wgrad",
        "moments",
        "normalize-gradients",
        "bits",
        "max-pool",
        "average-pool",
        "global-pool",
        "augmentation",
        "gram",
        "norm-max-pool",
    ],
)
def test_a_family_is_right(name, device):
    from ci.visit.smoke.__main__ import run
    from ci.visit.smoke.families import FAMILIES

    family = FAMILIES[name]
    if launch.INTERPRETED:
        # the third is of a million rows
        family = replace(family, trials=family.trials[:2] if name == "moments" else family.trials)
    assert run(family, device) == []


@pytest.fixture
def trial():
    from ci.visit.smoke.trial import SINGLE, SmokeTrial

    def operands(device):
        return (torch.arange(6, device=device, dtype=SINGLE).view(2, 3),)

    return SmokeTrial("doubling", operands, lambda x: (2 * x,), lambda x: (2 * x,))


def tried(trial, device):
    from ci.visit.smoke.__main__ import tried

    return tried(trial, device, poison=True, judge=True)


def test_what_is_right_passes(trial, device):
    assert tried(trial, device) == []


def test_a_wrong_number_is_told_with_its_place(trial, device):
    def ours(x):
        y = 2 * x
        y[1, 2] += 1
        return (y,)

    assert tried(replace(trial, ours=ours), device) == [
        "result 0 1 of 6 elements are wrong, the first at (1, 2): 11.0, not 10.0"
    ]


def test_what_is_never_written_is_wrong(trial, device):
    def ours(x):
        y = memory.empty(x.shape, x)
        y[0] = 2 * x[0]
        return (y,)

    (problem,) = tried(replace(trial, ours=ours), device)
    assert "3 of 6 elements are wrong, the first at (1, 0): nan, not 6.0" in problem


def test_other_bits_the_second_time_are_told(trial, device):
    calls = []

    def ours(x):
        calls.append(x)
        return (2 * x + (len(calls) > 1) * 2**-10,)

    assert tried(replace(trial, ours=ours), device) == ["result 0 has other bits the second time"]


def test_a_tolerance_is_of_the_largest_number(trial, device):
    close = replace(trial, ours=lambda x: (2 * x + 0.01,), tolerance=2.0**-9)
    assert tried(close, device) == []
    (problem,) = tried(replace(close, tolerance=2.0**-12), device)
    assert "6 of 6 elements are wrong" in problem


def test_numbers_that_the_dtype_cannot_hold_are_no_judge(trial, device):
    wide = replace(trial, ours=lambda x: ((x + 1000).bfloat16(),), exact=lambda x: (x + 1000,))
    (problem,) = tried(wide, device)
    assert "cannot be judged" in problem


def test_a_kernel_that_its_family_does_not_launch_is_told(trial, device):
    from ci.visit.smoke.__main__ import run
    from ci.visit.smoke.families import Family

    assert run(Family(("conv_fprop_kernel",), (trial,)), device) == ["conv_fprop_kernel was not launched"]


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ci.visit.smoke", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.compiled
@pytest.mark.skipif(not launch.INTERPRETED, reason="CPU ring: another libcuda is loaded where there is a GPU")
@pytest.mark.parametrize("family", ["max-pool", "tma-stem"])
def test_a_family_is_launched_over_the_driver_that_records(family):
    found = child(family, "--recorded", "90")
    assert found.returncode == 0, found.stdout + found.stderr
    from ci.visit.smoke.families import FAMILIES

    assert found.stdout.count("launched, not judged") == len(FAMILIES[family].trials)
    assert all(f"    launching {kernel}\n" in found.stdout for kernel in FAMILIES[family].kernels)


def test_a_kernel_that_hangs_is_named(tmp_path):
    """By the last line before it: it is written before the launch."""
    from ci.visit.running import Stage, StageCommand, Stop, run
    from ci.visit.smoke.sanitizer import LAUNCHING, last_launched

    code = f"import time; print('{LAUNCHING}one_kernel\\n{LAUNCHING}other_kernel', flush=True); time.sleep(60)"
    command = StageCommand("family", (sys.executable, "-c", code), clue=last_launched)
    (found,) = run(Stage((command,), 3), tmp_path, dict(os.environ), time.monotonic() + 3, Stop(), grace=1)
    assert found.state == "out of time"
    assert found.note.endswith("; the last kernel launched was other_kernel")


@pytest.mark.compiled
@pytest.mark.skipif(not launch.INTERPRETED, reason="CPU ring: another libcuda is loaded where there is a GPU")
def test_kernels_with_tensor_maps_are_left_out_where_there_are_none():
    found = child("tma-fprop", "--recorded", "80")
    assert (found.returncode, found.stdout.strip()) == (0, "tma-fprop skipped: sm_80 has no tensor maps")


@pytest.mark.parametrize("arguments", [("nosuch",), () if torch.cuda.is_available() else ("fprop",)])
def test_what_cannot_run_is_refused(arguments):
    assert child(*arguments).returncode == 2


MEMCHECK = """========= COMPUTE-SANITIZER
fprop 2x32x8x9 > 64, 3x3/1 bfloat16 ...
========= Invalid __global__ write of size 4 bytes
=========     at conv_fprop_kernel+0x1230 in fprop.py:71
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f0000000 is out of bounds
=========
========= Invalid __global__ read of size 2 bytes
=========     at void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)+0x60
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at tma_wgrad_kernel+0x800 in wgrad.py:90
=========     and Read access at tma_wgrad_kernel+0x910 in wgrad.py:92 [8 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n    right, 0.1 s\n========= ERROR SUMMARY: 0 errors\n"
REFUSED = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the documentation.
========= ERROR
"""
OURS = ("conv_fprop_kernel", "tma_wgrad_kernel")


def verdict(text: str, tmp_path: Path, code: int = 0):
    from ci.visit.smoke.sanitizer import judge

    log = tmp_path / "log"
    log.write_text(text)
    return judge(OURS, code, log)


def test_findings_are_blamed_on_kernels_by_name(tmp_path):
    found = verdict(MEMCHECK, tmp_path)
    assert (found.state, found.note, found.bad) == ("failed", "1 in conv_fprop_kernel", True)
    found = verdict(RACECHECK, tmp_path)
    assert (found.note, found.bad) == ("1 in tma_wgrad_kernel", True)


def test_findings_elsewhere_are_counted_and_are_no_fault(tmp_path):
    others = MEMCHECK.replace("conv_fprop_kernel", "somebody_else")
    found = verdict(others, tmp_path)
    assert (found.state, found.note, found.bad) == ("passed", "2 findings in kernels that are not ours", False)
    assert verdict(CLEAN, tmp_path) == type(found)("passed")


def test_every_family_comes_before_every_tool(tmp_path):
    from ci.visit.parts import PARTS
    from ci.visit.running import CORES
    from ci.visit.smoke.families import FAMILIES
    from ci.visit.smoke.sanitizer import TOOLS

    _, checked = PARTS["smoke"](tmp_path, None).stages
    assert len(checked.commands) <= CORES, "all of them at once"
    for tool in TOOLS:
        groups = [command.needs for command in checked.commands if command.name.startswith(tool)]
        assert sorted(family for group in groups for family in group) == sorted(FAMILIES)
    for command in checked.commands:
        assert set(command.needs) <= set(command.argv)


def test_a_tool_that_does_not_work_here_is_no_fault(tmp_path):
    found = verdict(REFUSED, tmp_path, code=1)
    assert not found.bad
    assert found.state == "failed"
    assert "did not come to an end: Error: Device not supported" in found.note


def test_a_family_that_fails_is_not_checked_again(tmp_path):
    """Nor is any where the tool is not installed, which is said once."""
    from ci.visit.results import PartOutcome, troubles
    from ci.visit.running import Ran, Stage, StageCommand, Stop, run

    stage = Stage(
        (
            StageCommand("a-memcheck", (sys.executable, "-c", ""), needs=("a",)),
            StageCommand("b-memcheck", ("no-such-program",), needs=("b",)),
        ),
        5,
    )
    before = [Ran("a", "failed", bad=True), Ran("b", "passed")]
    found = {ran.name: ran for ran in run(stage, tmp_path, dict(os.environ), float("inf"), Stop(), before)}
    assert (found["a-memcheck"].state, found["a-memcheck"].note) == ("not begun", "a did not pass")
    assert found["b-memcheck"].note == "no-such-program is not installed"
    missing = [Ran(name, "not begun", note="no-such-program is not installed") for name in "bcde"]
    (text,) = troubles(PartOutcome("smoke", "passed", 1, ran=missing), tmp_path)
    assert text.count("not installed") == 1
    assert "4 processes: not begun, no-such-program is not installed" in text
