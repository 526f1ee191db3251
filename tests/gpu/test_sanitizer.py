"""compute-sanitizer over one call of each family: addresses, races in shared memory, memory that is read before
anything wrote it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.support import each_family
from tests.support.child import environment

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

TOOLS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
}


def sanitized(tool: str, families: list[str], timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """The program each_family.py under one tool, which ends with 9 if it finds anything."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("GPU ring: compute-sanitizer is not installed")
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--target-processes",
        "application-only",
        *TOOLS[tool],
    ]
    # PyTorch's allocator hands out parts of what it got before: without it a byte beyond a tensor is out of bounds for
    # the tool too.
    alone = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command += [sys.executable, str(each_family.__file__), *families]
    return subprocess.run(command, env=alone, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("family", each_family.FAMILIES)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_family(tool, family, device):
    if family not in each_family.families(device):
        pytest.skip("GPU ring: this GPU has no tensor maps to feed wgmma or tcgen05 with")
    child = sanitized(tool, [family])
    assert child.returncode == 0, f"{child.stdout[-6000:]}\n{child.stderr[-2000:]}"
    assert f"{family}: " in child.stdout
    assert "ERROR SUMMARY: 0 errors" in child.stdout or "RACECHECK SUMMARY: 0 hazards" in child.stdout
