"""`cnnfast tune`: what it lists, refuses, writes, and how it is interrupted."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from cnnfast.__main__ import app


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter ring: on a GPU it would measure")
def test_the_command_without_a_gpu_says_so():
    result = invoke("resnet18")
    assert result.exit_code == 2
    assert "there is no GPU here to measure on; --dry-run lists what would be measured" in " ".join(result.output.split())


def test_the_command_lists_what_it_would_measure(tmp_path):
    file = tmp_path / "plan.json"
    result = invoke("cnnfast.demo.digits:DigitNet", "--input", "64x1x8x8", "--mode", "train", "--dry-run", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "fprop + stats 64x16x8x8 > 16, 3x3/1" in result.output
    assert "bfloat16" in result.output
    assert "tf32" in invoke("cnnfast.demo.digits:DigitNet", "--input", "64x1x8x8", "--dtype", "tf32", "--dry-run").output
    planned = json.loads(file.read_text())
    assert {"convolution", "count", "candidates"} == set(planned[0])
    assert planned[0]["candidates"][0] == "default"
    assert planned[0]["candidates"][-1] == "library"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--dtype", "int8"), "'int8' is none of bf16, fp16, fp32, tf32, fp64, bfloat16, float16, float32, float64"),
        (("--mode", "both"), "'both' is neither infer nor train"),
        (("--input", "64x1x8x8x8", "--dry-run"), "DigitNet does not run on 64x1x8x8x8"),
    ],
)
def test_the_command_refuses(arguments, says):
    result = invoke("cnnfast.demo.digits:DigitNet", *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())
