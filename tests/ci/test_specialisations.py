"""ci/specialisations.py, and the option of pytest that records for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from cnnfast_kernels import launch
from cnnfast_kernels.aot.specialisations import described
from tests.support.child import REPOSITORY, environment, run_compiled
from tests.support.uncompilable import tuple_holds_none_kernel

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(not launch.INTERPRETED, reason="GPU ring: recorded in the interpreter"),
]


def run(command, **more):
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recorded by two processes of pytest, with one launch more, that the compiler refuses."""
    folder = tmp_path_factory.mktemp("recorded")
    tests = ["tests/kernels/gather/test_fprop.py", "tests/kernels/test_launch.py", "-k", "mixed or dtype or hear"]
    pytest_run = run(["-m", "pytest", "-q", "-n", "2", *tests], PYTEST_ADDOPTS=f"--specialisations {folder}")
    assert pytest_run.returncode == 0, pytest_run.stdout
    return folder


def test_each_process_of_the_tests_records_the_kernels_of_the_package(folder):
    files = list(folder.glob("*.jsonl"))
    assert len(files) == 2
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert {line["kernel"] for line in lines} == {"cnnfast_kernels.gather.fprop:conv_fprop_kernel"}, (
        "not those that tests define"
    )


def front_end(folder):
    return run(["ci/specialisations.py", "front-end", str(folder), "--jobs", "1"])


def test_what_is_refused_and_what_was_never_launched_fails(folder):
    extra = folder / "extra.jsonl"
    extra.write_text(described(tuple_holds_none_kernel, (torch.ones(16), None), {"BLOCK": 16}) + "\n")
    try:
        told = front_end(folder)
    finally:
        extra.unlink()
    assert told.returncode == 1
    failures = [line for line in told.stdout.splitlines() if line.startswith("sm_90 ")]
    (refused,) = failures  # and nothing of what the tests recorded
    assert refused.startswith("sm_90 tuple_holds_none_kernel(x_ptr float32, bias_ptr None): CompilationError")
    assert "wgrad_kernel was launched by no test that was recorded" in told.stdout


def ends(ci, folders):
    """[exit code, output] of the front end for each of the folders, in one process."""
    import sys

    sys.path.insert(0, ci)
    import specialisations
    from typer.testing import CliRunner

    results = [CliRunner().invoke(specialisations.app, ["front-end", folder, "--jobs", "1"]) for folder in folders]
    return [[result.exit_code, result.output] for result in results]


def test_nothing_recorded_is_an_error_and_too_little_fails(folder, tmp_path):
    """Nothing: no file, or an empty one. Too little: one launch, which compiles, of one kernel."""
    recorded = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    for name, lines in (("empty", ""), ("one", min(recorded) + "\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "launches.jsonl").write_text(lines)
    *nothing, one = run_compiled(
        ends, str(REPOSITORY / "ci"), [str(tmp_path), str(tmp_path / "empty"), str(tmp_path / "one")]
    )
    for code, said in nothing:
        assert code == 2
        assert "nothing is recorded" in said
    code, said = one
    assert code == 1
    assert "\nsm_90 " not in said
    assert "wgrad_kernel was launched by no test that was recorded" in said
