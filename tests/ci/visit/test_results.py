"""The files that a visit leaves: tables of what was measured, tests by name, the end of long summaries."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.visits import environment


def row(subject, provider, median, **more):
    kinds = {"baseline": not provider.startswith("cnnfast"), "ours": provider.startswith("cnnfast")}
    told = {
        "subject": subject,
        "provider": provider,
        "median": median,
        "mode": "infer",
        "batch": 32,
        "input": "32x3x224x224",
    }
    return {
        **told,
        **kinds,
        "status": "ok" if median else "unavailable",
        "reason": "" if median else "not installed",
        **more,
    }


def summary(part, files, tmp_path, **outcome):
    from ci.visit.results import PartOutcome
    from ci.visit.results import summary as made

    folder = tmp_path / part
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return made([PartOutcome(part, "passed", 60, **outcome)], tmp_path)


def test_models_are_told_the_fastest_first_beside_the_strongest_baseline(tmp_path):
    rows = [
        row("resnet50", "eager", 0.02),
        row("resnet50", "cnnfast-graph", 0.008),
        row("resnet50", "eager-graph", 0.01),
    ]
    text = summary("infer", {"infer.json": [*rows, row("resnet50", "jax", None)]}, tmp_path)
    lines = [line for line in text.splitlines() if "| 32 |" in line]
    assert lines == [
        "| cnnfast-graph | 32 | 8 | 1.25x |",
        "| eager-graph * | 32 | 10 | 1.00x |",
        "| eager | 32 | 20 | 0.50x |",
        "| jax | 32 | unavailable | not installed |",
    ]


def test_layers_are_counted_and_the_worst_are_named(tmp_path):
    rows = [row("a", "eager", 1e-3), row("a", "cnnfast", 2e-3), row("b", "eager", 1e-3), row("b", "cnnfast", 0.5e-3)]
    text = summary(
        "layers",
        {"layers.json": [*rows, row("b", "cnnfast-kernels", None, status="wrong", reason="error 3")]},
        tmp_path,
    )
    assert "| infer | 2 | 1 | 1 |" in text
    assert text.index("| a, infer | 0.50x |") < text.index("| b, infer | 2.00x |")
    assert "- **b, infer, cnnfast-kernels**: error 3" in text


def test_tuning_is_told_by_winners(tmp_path):
    times = {"kernels": 10.0, "default": 12.0}
    measured = [
        {"convolution": "fprop 3x3", "row": {"microseconds": times, "winner": "kernels"}},
        {"convolution": "x", "row": None},
    ]
    text = summary(
        "tune", {"tune.json": {"summary": "1 of 2", "measured": measured}, "rows.json": {"rows": []}}, tmp_path
    )
    assert "1 of 2" in text
    assert "| fprop 3x3 | 12.0 | 10.0 |  | kernels |" in text


def test_a_file_that_breaks_off_does_not_end_the_summary(tmp_path):
    text = summary("infer", {"infer.json": '[{"subject": '}, tmp_path)
    assert "its results cannot be read: JSONDecodeError" in text


TESTS = """
import time, pytest
def test_right(): pass
def test_wrong(): assert 1 == 2, "numbers differ"
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError("no fixture")
def test_broken(broken): pass
def test_endless(): time.sleep(60)
"""


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "1")], ids=["alone", "xdist"])
def test_tests_are_named_also_when_the_run_is_killed(workers, tmp_path):
    from ci.visit.pytest_lines import read

    (tmp_path / "test_it.py").write_text(TESTS)
    lines = tmp_path / "lines.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "ci.visit.pytest_lines",
        "--lines",
        str(lines),
        *workers,
    ]
    process = subprocess.Popen(
        [*command, "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while not (lines.exists() and "test_endless" in lines.read_text()):
            assert process.poll() is None
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    with lines.open("a") as file:
        file.write('{"test": "brok')  # as a write that is cut off
    found = read(lines)
    assert (found.passed, found.skipped) == (1, 1)
    names = {name.rpartition("::")[2]: said for name, said in found.failed.items()}
    assert set(names) == {"test_wrong", "test_broken"}
    assert [name.rpartition("::")[2] for name in found.unfinished] == ["test_endless"]
    text = summary("tests", {"kernels.jsonl": lines.read_text()}, tmp_path)
    assert "kernels: 1 passed, 2 failed, 1 skipped, 1 under way at the end" in text
    assert "test_wrong**: " in text
    assert "test_endless: under way" in text
