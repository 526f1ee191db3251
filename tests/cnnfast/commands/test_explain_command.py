"""`cnnfast explain`: what it prints, writes and draws, and the options that decide it."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from cnnfast.__main__ import app

NET = "tests.support.explained:Net"
pytestmark = pytest.mark.usefixtures("with_triton")


@pytest.fixture
def with_triton():
    pytest.importorskip("triton")


def explain(*arguments: str, model: str = NET):
    result = CliRunner().invoke(app, ["explain", model, *arguments], env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result


def data_of(*arguments: str, model: str = NET):
    return json.loads(explain(*arguments, "--json", "-", model=model).stdout)


def test_a_table_and_the_same_in_files(tmp_path):
    pytest.importorskip("matplotlib")
    files = tmp_path / "net.json", tmp_path / "net.svg"
    result = explain("--input", "4x8x12x12", "--mode", "train", "--json", str(files[0]), "--picture", str(files[1]))
    data = json.loads(files[0].read_text())
    assert f"{NET} on NVIDIA H200, train, bfloat16, input 4x8x12x12" in result.stdout
    assert data["model"] == NET
    assert f"Kernels launched in a step: {data['launches']}, which" in result.stdout
    assert {row["operation"] for row in data["rows"]} == set(data["totals"])
    assert "<svg" in files[1].read_text()


def test_the_options_decide_what_is_explained():
    data = data_of("--batch", "3", "--input", "4x8x12x12", "--gpu", "rtx-3090", "--dtype", "tf32")
    assert (data["gpu"], data["arch"], data["mode"], data["dtype"]) == (
        "NVIDIA GeForce RTX 3090", 86, "infer", "tf32",
    )  # fmt: skip
    assert data["inputs"] == [[3, 8, 12, 12]]
    contiguous = data_of("--input", "32x8x12x12", "--format", "contiguous")
    assert contiguous["rows"][0]["modelled_us"] > data_of("--input", "32x8x12x12")["rows"][0]["modelled_us"]


def test_without_an_input_it_is_one_that_the_model_takes():
    data = data_of(model="cnnfast.demo.digits:DigitNet")
    assert data["inputs"][0][:2] == [32, 1]
    assert data_of("--batch", "5", model="cnnfast.demo.digits:DigitNet")["inputs"][0][:2] == [5, 1]


def test_without_a_triton_that_fits_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cnnfast.explaining", None)
    result = CliRunner().invoke(app, ["explain", NET], env={"COLUMNS": "500", "TERM": "dumb"})
    assert result.exit_code == 2
    assert "nothing can be explained: cnnfast's kernels need triton 3.6 to 3.9" in result.output
