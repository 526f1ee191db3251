"""`cnnfast tune`: what it lists, refuses, writes, and how it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from subprocess import PIPE

import pytest
import torch
from typer.testing import CliRunner

from cnnfast import tuning
from cnnfast.__main__ import app
from cnnfast.measuring.timing import Times
from cnnfast_kernels import tables
from tests.support.child import IMPORTABLE


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_command_lists_what_it_would_measure(tmp_path):
    file = tmp_path / "plan.json"
    result = invoke(
        "cnnfast.demo.digits:DigitNet", "--input", "64x1x8x8", "--mode", "train", "--dry-run", "--json", str(file)
    )
    assert result.exit_code == 0, result.output
    assert "fprop + stats 64x16x8x8 > 16, 3x3/1" in result.output
    assert "bfloat16" in result.output
    assert (
        "tf32" in invoke("cnnfast.demo.digits:DigitNet", "--input", "64x1x8x8", "--dtype", "tf32", "--dry-run").output
    )
    planned = json.loads(file.read_text())
    assert {"convolution", "count", "candidates"} == set(planned[0])
    assert planned[0]["candidates"][0] == "default"
    assert planned[0]["candidates"][-1] == "library"


def said(result) -> str:
    """All output, without the frames and line ends of a terminal."""
    return " ".join(result.output.replace("│", " ").split())


def test_the_command_lists_for_a_gpu_that_is_not_here():
    """Its own candidates: kernels that load by tensor maps are for sm_90 on."""
    listed = {}
    for gpu in ("h200", "rtx-4090"):
        result = invoke("cnnfast.demo.digits:DigitNet", "--input", "64x1x8x8", "--dry-run", "--gpu", gpu, "--json", "-")
        assert result.exit_code == 0, result.output
        listed[gpu] = json.loads(result.stdout)  # and nothing else stands there
    assert "pixels" in str(listed["h200"])
    assert "pixels" not in str(listed["rtx-4090"])
    assert "to measure on NVIDIA GeForce RTX 4090 (sm_89), with" in said(result)


def test_the_command_lists_both_modes_and_another_layout():
    def planned(*arguments):
        result = invoke("cnnfast.demo.digits:DigitNet", "--input", "64x1x8x8", "--dry-run", "--json", "-", *arguments)
        assert result.exit_code == 0, result.output
        return {entry["convolution"] for entry in json.loads(result.stdout)}, result.stderr

    (infer, last), (train, _), (both, _) = planned(), planned("--mode", "train"), planned("--mode", "infer,train")
    assert both == infer | train
    assert not infer >= train
    assert "NHWC NHWC NHWC" in last
    assert "NCHW NCHW NCHW" not in last
    assert "NCHW NCHW NCHW" in planned("--format", "contiguous")[1]


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs, in a process of their own, in which the interpreter is taken for a GPU

PRETENDED = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from cnnfast import tuning
from cnnfast.__main__ import app
from cnnfast.measuring.timing import Times
from cnnfast.tuning import racing
from cnnfast_kernels import devices, tables

folder, slow_from, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
tables.user_folder = lambda: folder / "tables"
devices.NO_GPU = devices.Gpu("A GPU", 90)
randn, measured = torch.randn, []
torch.cuda.is_available = lambda: True
torch.randn = lambda *size, device=None, **how: randn(*size, **how, device=None if device == "cuda" else device)
nn.Module.cuda = lambda self: self

def measure(steps, clock, seconds, left):
    measured.append(steps)
    print("measuring", len(measured), seconds, file=sys.stderr, flush=True)
    if len(measured) >= slow_from:
        time.sleep(60)
    return {name: Times(2e-6, 2e-6, 2e-6, 1) for name in steps}

tuning.take_turns = measure
app(["tune", "tests.support.tuned:Net", "--input", "2x4x6x6", "--dtype", "fp32", *arguments], prog_name="cnnfast")
"""


def begun(folder, slow_from: int, *arguments) -> subprocess.Popen[str]:
    """The command in a child, which sleeps from its measurement number `slow_from` on."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, IMPORTABLE)),
        "COLUMNS": "200",
        "TERM": "dumb",
    }
    command = [sys.executable, "-c", PRETENDED, str(folder), str(slow_from), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=PIPE, stderr=PIPE)


def until_the_third(child: subprocess.Popen[str]) -> None:
    assert child.stderr is not None
    lines = []
    for line in child.stderr:
        lines.append(line)
        if line.startswith("measuring 3"):
            return
    pytest.fail("".join(lines))


def whole(folder) -> list[tables.TableRow]:
    (file,) = (folder / "tables").iterdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tables.read(file)


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter ring: on a GPU it would measure")


@interpreted
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_run_that_is_ended_in_its_middle_keeps_what_it_measured(tmp_path, number, code):
    child = begun(tmp_path, 3, "--json", tmp_path / "tune.json", "--table", tmp_path / "rows.json")
    until_the_third(child)
    child.send_signal(number)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == code
    assert len(whole(tmp_path)) == 2
    assert tables.read(tmp_path / "rows.json") == whole(tmp_path)
    told = json.loads((tmp_path / "tune.json").read_text())
    assert (len(told["measured"]), len(told["left"])) == (2, 2)
    if number != signal.SIGKILL:
        assert "The run was interrupted." in output
        assert "2 of 4 convolutions measured" in output
        assert told["notes"] == ["The run was interrupted."]
        assert all(left["convolution"] in output for left in told["left"])
    assert {file.name for file in tmp_path.iterdir()} == {"tables", "rows.json", "tune.json"}


@pytest.fixture
def stand_in(gpu, monkeypatch):
    """The interpreter is taken for a GPU. Gives what was measured, and for how many seconds."""
    measured, randn = [], torch.randn

    def measure(steps, clock, seconds, left):
        measured.append(seconds)
        return {name: Times(2e-6, 2e-6, 2e-6, 1) for name in steps}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(
        torch,
        "randn",
        lambda *size, device=None, **how: randn(*size, **how, device=None if device == "cuda" else device),
    )
    monkeypatch.setattr(tuning, "take_turns", measure)
    return measured


NET = ("tests.support.tuned:Net", "--input", "2x4x6x6", "--dtype", "fp32")


@interpreted
def test_a_whole_run_prints_and_writes(stand_in, tmp_path):
    result = invoke(
        *NET,
        "--mode",
        "infer,train",
        "--json",
        "-",
        "--seconds",
        "0.01",
        "--budget",
        "600",
        "--table",
        str(tmp_path / "rows.json"),
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)  # all of standard output
    assert told["ok"]
    assert told["left"] == []
    count = len(told["measured"])
    assert {entry["operator"] for entry in told["measured"]} == {
        "conv_bn_act",
        "conv_stats",
        "conv_fprop",
        "conv_dgrad",
        "conv_wgrad",
    }
    assert stand_in == [0.01] * count
    assert len(tables.read(tmp_path / "rows.json")) == count
    assert f"{count} of {count} convolutions measured" in result.stderr
    first = result.stderr.splitlines()[0]
    assert first.startswith(f"{count} convolutions with ")
    assert first.endswith("but --budget ends it after about 10 minutes.")


@interpreted
def test_a_run_without_options_measures_for_the_usual_time_and_says_where_rows_went(stand_in):
    result = invoke(*NET)
    assert result.exit_code == 0, result.output
    assert stand_in == [tuning.SECONDS] * 4
    assert "table: " in result.stdout


@interpreted
def test_a_file_that_is_no_table_is_refused_before_anything_is_measured(stand_in, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("# mine")
    result = invoke(*NET, "--table", str(file))
    assert result.exit_code == 2
    assert "is no table of cnnfast" in said(result)
    assert (stand_in, file.read_text()) == ([], "# mine")


@interpreted
def test_what_ends_a_run_early_is_said_and_what_was_measured_is_kept(stand_in, monkeypatch, tmp_path):
    def lost(steps, clock, seconds, left):
        if stand_in:
            raise RuntimeError("the GPU no longer answers since library on fprop ran")
        stand_in.append(seconds)
        return {name: Times(2e-6, 2e-6, 2e-6, 1) for name in steps}

    monkeypatch.setattr(tuning, "take_turns", lost)
    result = invoke(*NET, "--json", str(tmp_path / "tune.json"))
    assert result.exit_code == 1
    assert "The run ended early: the GPU no longer answers since library on fprop ran" in said(result)
    told = json.loads((tmp_path / "tune.json").read_text())
    assert (len(told["measured"]), len(told["left"])) == (1, 3)


@interpreted
def test_an_interrupt_before_anything_is_measured_says_so(stand_in, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "begin", interrupted)
    result = invoke(*NET)
    assert result.exit_code == 130
    assert "Interrupted before anything was measured." in result.output
