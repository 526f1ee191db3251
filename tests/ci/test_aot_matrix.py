"""ci/aot_matrix.py: what it reads of `cnnfast aot`, and what it makes of that. All of it, with three Tritons to
install, is run by hand.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.child import REPOSITORY, run_compiled

ROWS = [
    {"registers": 168, "spill_bytes": 0},
    {"registers": 255, "spill_bytes": 8},
    {"registers": None, "spill_bytes": None},
]
OUTPUT = """\
problem sm_89 conv_dgrad_kernel (dgrad bfloat16 1x1/2; 128x64x32 w4 s4): spills 8 bytes a thread, 255 registers
problem sm_89 wgrad float64 3x3: does not compile: CompilationError: no
error: on a line of its own
  the worst of all variants and tiles of each kernel
3 kernels compiled, 2 problems
"""


def judged(folder, outputs, rows):
    """The table of these outputs, one for each architecture, or why one was refused."""
    import sys

    sys.path.insert(0, folder)
    import aot_matrix

    try:
        return aot_matrix.table(
            [aot_matrix.told("3.7.1", arch, output, rows, 12.4) for arch, output in outputs.items()]
        )
    except ValueError as error:
        return f"refused: {error}"


def test_the_worst_row_and_the_problems_of_each_combination():
    clean = OUTPUT.splitlines()[-2] + "\n3 kernels compiled, 0 problems\n"
    text = run_compiled(judged, str(REPOSITORY / "ci"), {"sm_80": clean, "sm_89": OUTPUT}, ROWS)
    head, first, second, *problems = filter(None, text.splitlines())
    assert head.split() == ["triton", "arch", "rows", "problems", "worst", "registers", "worst", "spill", "seconds"]
    assert first.split() == ["3.7.1", "sm_80", "3", "0", "255", "8", "12"]
    assert second.split() == ["3.7.1", "sm_89", "3", "2", "255", "8", "12"]
    assert [problem.partition("sm_89 ")[2].split()[0] for problem in problems] == ["conv_dgrad_kernel", "wgrad"]
    assert all(problem.startswith("triton 3.7.1: sm_89 ") for problem in problems)


@pytest.mark.parametrize(
    "output",
    [
        "",
        OUTPUT.replace("3 kernels", "4 kernels"),
        OUTPUT.replace("2 problems", "1 problems"),
        OUTPUT.replace("problem sm_89", "", 1),
    ],
)
def test_what_does_not_fit_the_rows_is_refused(output):
    text = run_compiled(judged, str(REPOSITORY / "ci"), {"sm_89": output}, ROWS)
    assert text.startswith("refused: cnnfast aot --arch sm_89 on triton 3.7.1 wrote 3 rows and ended with:")


def test_a_triton_that_the_gate_does_not_know_is_refused():
    command = [sys.executable, "ci/aot_matrix.py", "--triton", "3.5.0"]
    child = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 2
    assert "3.5.0 is none of 3.6.0, 3.7.1, 3.9.0" in child.stderr
