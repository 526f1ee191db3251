"""ci/specialisations.py, and the option of pytest that records for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cnnfast_kernels import launch
from cnnfast_kernels.aot.specialisations import described
from tests.support.uncompilable import tuple_holds_none_kernel

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(not launch.INTERPRETED, reason="GPU ring: recorded in the interpreter"),
]


def run(command, **environment):
    paths = [REPOSITORY, REPOSITORY / "kernels", *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    }
    inherited["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=inherited | environment,
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
    told = front_end(folder)
    assert told.returncode == 1
    assert "wgrad_kernel was launched by no test that was recorded" in told.stdout
    assert "refused" not in told.stdout
    extra = folder / "extra.jsonl"
    extra.write_text(described(tuple_holds_none_kernel, (torch.ones(16), None), {"BLOCK": 16}) + "\n")
    try:
        told = front_end(folder)
    finally:
        extra.unlink()
    assert told.returncode == 1
    assert "sm_90 tuple_holds_none_kernel(x_ptr float32, bias_ptr None): CompilationError" in told.stdout


def test_nothing_recorded_is_an_error(tmp_path):
    for _ in range(2):
        told = front_end(tmp_path)
        assert told.returncode == 2
        assert "nothing is recorded" in told.stderr
        (tmp_path / "empty.jsonl").touch()
