"""What reaches CUDA: launches of every kernel, in each pattern of its operands, by Triton's real launcher over a driver
that records.

One launch of each here; python ci/recorded_launches.py has all tiles, dtypes, layouts and many geometries.
"""

from __future__ import annotations

import pytest

from cnnfast_kernels import aot
from tests.support.child import run_compiled

pytestmark = pytest.mark.compiled


def launch_each_pattern():
    from tests.support import launch_survey

    return launch_survey.plain(launch_survey.survey(once=True))


@pytest.fixture(scope="module")
def seen():
    """The harness's Survey, as JSON has it."""
    return run_compiled(launch_each_pattern)


def test_every_launch_succeeds(seen):
    assert seen["failed"] == []


def test_a_plan_passes_what_triton_passes(seen):
    """Parameters, grid, block, shared memory, stream, function, and the tensor maps, to the byte."""
    assert seen["differing"] == []
    assert sum(seen["by_plan"].values()) > 150


def test_every_kernel_of_the_package_is_launched(seen):
    assert set(aot.kernel_modules()) - set(seen["by_plan"]) - set(seen["by_triton"]) == set()


def test_every_launch_is_by_a_plan(seen):
    assert seen["by_triton"] == {}


def test_binaries_expect_the_parameters_that_the_launcher_passes(seen):
    assert seen["size_mismatches"] == []
    assert len(seen["binaries"]) > 100


def test_no_kernel_needs_scratch_memory(seen):
    assert seen["scratch"] == []


def test_tensor_maps_keep_within_what_cuda_documents_and_within_their_tensors(seen):
    assert seen["illegal"] == []
    assert seen["outside"] == []
    assert seen["encodes"] > 100


def test_operands_may_be_aligned_at_first_and_not_later(seen):
    """Each kernel gets one operand at an odd address after a launch of the same plan with aligned ones, and the aligned
    ones again.
    """
    assert set(seen["unaligned"]) == set(seen["by_plan"])
