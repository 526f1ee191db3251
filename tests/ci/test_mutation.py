"""The mutation campaign (ci/mutate.py): its list fits the sources, its verdicts are right. The whole of it is run by
hand.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from tests.support.child import REPOSITORY

FAULTS = tomllib.loads((REPOSITORY / "ci" / "faults.toml").read_text())["fault"]
KERNELS = REPOSITORY / "kernels" / "cnnfast_kernels"
NO_KERNELS = {  # compilation ahead of time, and lists of names
    *("cases.py", "compiling.py", "decisions.py", "layers.py", "library.py", "processes.py", "record.py", "records.py"),
    *("passes.py", "sass.py", "specialisations.py", "stub_driver.py"),
    *("__init__.py", "operands.py"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["name"])
def test_the_list_fits_the_sources(fault):
    """The text that a fault replaces occurs once, and the tests that it names exist."""
    source = (REPOSITORY / fault["file"]).read_text()
    assert source.count(fault["old"]) == 1
    assert fault["new"] != fault["old"]
    assert fault["tests"]
    for node in fault["tests"]:
        file, _, test = node.partition("::")
        text = (REPOSITORY / file).read_text()
        assert not test or re.search(rf"^def {test.partition('[')[0]}\(", text, re.MULTILINE), node


def test_every_kernel_file_has_a_fault():
    files = {str(path.relative_to(REPOSITORY)) for path in KERNELS.rglob("*.py") if path.name not in NO_KERNELS}
    assert files <= {fault["file"] for fault in FAULTS}
    assert len({fault["name"] for fault in FAULTS}) == len(FAULTS)


HARMLESS = """
[[fault]]
name = "another name for a number"
file = "kernels/cnnfast_kernels/problem.py"
old = "MAX_PIXELS = 2**31 - 2**10"
new = "MAX_PIXELS = 2**31 - 1024"
tests = ["tests/kernels/test_problem.py::test_pixels_are_counted_in_32_bits"]
"""
BROKEN = """
[[fault]]
name = "a module that cannot be imported"
file = "kernels/cnnfast_kernels/problem.py"
old = "from math import gcd"
new = "from math import gdc"
tests = ["tests/kernels/test_problem.py::test_pixels_are_counted_in_32_bits"]
"""


def mutate(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "ci/mutate.py", "--jobs", "1", *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def test_a_fault_is_caught():
    run = mutate("--only", "ceil_mode: the last window may start behind the image")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"1 of 1 faults caught; torch .*, triton .*, Python .*, commit [0-9a-f]{7}", run.stdout), (
        run.stdout
    )


def test_what_no_test_fails_of_is_told(tmp_path):
    """Neither a change that changes nothing counts as caught, nor one with which no test can start."""
    faults, result = tmp_path / "faults.toml", tmp_path / "result.txt"
    faults.write_text(HARMLESS + BROKEN)
    run = mutate("--faults", str(faults), "--out", str(result))
    assert run.returncode == 1, run.stdout + run.stderr
    assert not [word for word in ("0 of 2 faults caught", "SURVIVED", "BROKEN") if word not in run.stdout], run.stdout
    assert not result.exists()  # it is of the whole list
