"""An error that breaks the CUDA context ends the process that ran the test; no other test is blamed for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sticky import STICKY, sticky

REPOSITORY = Path(__file__).resolve().parents[2]
SUITE = """
    import os
    broken = False

    def call():
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def test_first():
        call()

    def test_culprit():
        global broken
        broken = True
        call()

    def test_second():
        call()

    def test_third():
        call()
"""


def run(folder: Path, suite: str, *options: str) -> str:
    (folder / "test_suite.py").write_text("\n".join(line.removeprefix("    ") for line in suite.splitlines()))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.support.sticky",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        "-rA",
        *options,
        str(folder),
    ]
    child = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 1, child.stdout + child.stderr
    return child.stdout


def outcomes(output: str) -> dict[str, set[str]]:
    """{"FAILED": names of tests}, as the summary has them."""
    found: dict[str, set[str]] = {"FAILED": set(), "PASSED": set(), "ERROR": set()}
    for line in output.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] in found and "::" in words[1]:
            found[words[0]].add(words[1].partition("::")[2])
    return found


def test_the_run_ends_after_it(tmp_path):
    output = run(tmp_path, SUITE)
    assert outcomes(output) == {"PASSED": {"test_first"}, "FAILED": {"test_culprit"}, "ERROR": set()}
    assert "every later call of CUDA in this process would fail" in output


def test_a_worker_is_replaced_and_the_others_tests_run(tmp_path):
    pytest.importorskip("xdist")
    output = run(tmp_path, SUITE, "-n", "1")
    assert outcomes(output) == {
        "PASSED": {"test_first", "test_second", "test_third"},
        "FAILED": {"test_culprit"},
        "ERROR": set(),
    }
    assert "an illegal memory access was encountered" in output, (
        "the test's own report is there, not the worker's end alone"
    )


def test_an_error_that_comes_up_after_the_test_ends_the_run_too(tmp_path):
    late = SUITE.replace(
        "    import os\n",
        "    import pytest\n\n    @pytest.fixture(autouse=True)\n    def settled():\n        yield\n        call()\n",
    )
    output = run(tmp_path, late.replace("broken = True\n        call()", "broken = True"))
    assert outcomes(output)["ERROR"] == {"test_culprit"}
    assert "test_second" not in outcomes(output)["FAILED"] | outcomes(output)["PASSED"]


def test_out_of_memory_ends_nothing(tmp_path):
    output = run(tmp_path, SUITE.replace("an illegal memory access was encountered", "out of memory"))
    assert outcomes(output) == {
        "PASSED": {"test_first"},
        "FAILED": {"test_culprit", "test_second", "test_third"},
        "ERROR": set(),
    }


@pytest.mark.parametrize("words", STICKY)
@pytest.mark.parametrize("prefix", ["CUDA error: ", "Triton Error [CUDA]: "])
def test_words_of_pytorch_and_of_triton(prefix, words):
    assert (
        sticky(RuntimeError(f"{prefix}{words}\nCUDA kernel errors might be asynchronously reported"))
        == (prefix + words)[(prefix + words).index("CUDA") :]
    )


def compare():
    try:
        raise RuntimeError("CUDA error: misaligned address")
    except RuntimeError as error:
        raise ValueError("could not compare") from error


def test_an_error_behind_another():
    with pytest.raises(ValueError, match="could not compare") as raised:
        compare()
    assert sticky(raised.value) == "CUDA error: misaligned address"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        AssertionError("the child process ended with 1\nCUDA error: misaligned address"),
        None,
    ],
    ids=str,
)
def test_what_breaks_nothing(error):
    assert sticky(error) == ""
