"""`cnnfast freeze` as its users meet it: a file, what is said of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from typer.testing import CliRunner

import cnnfast
from cnnfast.__main__ import app
from cnnfast.engine import freezing
from tests.support.freezable import Exact, image

OWN = """\
from torch import nn
from tests.support.freezable import Branching, Exact
class Trained(Exact):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.fc.weight)
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
    def forward(self, x): return self.second(self.first(x))
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, code: int = 0):
    result = CliRunner().invoke(app, ["freeze", *line.split()], env={"COLUMNS": "1000", "TERM": "dumb"})
    assert result.exit_code == code, result.output
    return result


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_a_file_with_trained_weights_and_what_to_do_next(folder):
    save_model(Exact(), "exact.safetensors")
    Path("names.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    Path("how.json").write_text(json.dumps({"size": 10, "crop": 8, "mean": [0.5] * 3, "std": [0.5] * 3}))
    options = "--weights exact.safetensors --classes names.txt --preprocessing how.json --json report.json"
    said = run(f"own.py:Trained --input 1x3x8x8 --out exact.cnnfast {options}").stdout
    frozen = cnnfast.load("exact.cnnfast")
    assert torch.equal(frozen(image(2, 16)), Exact()(image(2, 16)))
    assert frozen.classes == ("ant", "bee", "cat", "dog", "elk")
    assert frozen.preprocessing.crop == (8, 8)
    data = json.loads(Path("report.json").read_text())
    assert data["bytes"] == Path("exact.cnnfast").stat().st_size
    assert data["file"] == "exact.cnnfast"
    assert data["steps"]
    assert data["summary"] in words(said)
    assert "exact.cnnfast is written: " in said
    assert "Next: cnnfast predict exact.cnnfast IMAGE, or in Python: frozen = cnnfast.load('exact.cnnfast')" in said
    assert "random" not in said


def test_the_dtype_and_the_shape_are_found_where_none_is_given():
    said = run("cnnfast:resnet18 --out r.cnnfast --dtype bf16 --input 1x3x32x32").stdout
    assert cnnfast.load("r.cnnfast").dtype == torch.bfloat16
    assert "Its weights are random, as cnnfast builds resnet18: --weights FILE gives trained ones." in said


def test_a_file_that_is_there_is_replaced_as_a_whole():
    Path("exact.cnnfast").write_text("old")
    run("own.py:Exact --input 1x3x8x8 --out exact.cnnfast")
    assert cnnfast.load("exact.cnnfast").example == ((1, 3, 8, 8),)


def test_tied_weights_are_loaded():
    state = {"first.weight": torch.eye(4), "first.bias": torch.ones(4), "second.bias": torch.ones(4)}
    save_file(state, "tied.safetensors")
    run("own.py:Tied --input 2x4 --out tied.cnnfast --weights tied.safetensors")
    assert torch.equal(cnnfast.load("tied.cnnfast")(torch.ones(1, 4)), torch.full((1, 4), 3.0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("fc.bias"), "w.safetensors does not fit Exact: "),
        (lambda state: state.update(more=torch.ones(1)), "more"),
        (lambda state: state.update({"fc.bias": torch.ones(6)}), "fc.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, says):
    state = Exact().state_dict()
    change(state)
    save_file(state, "w.safetensors")
    said = words(run("own.py:Exact --input 1x3x8x8 --out x.cnnfast --weights w.safetensors", code=2).stderr)
    assert says in said
    assert "fc.bias" in said or "more" in said
    assert not Path("x.cnnfast").exists()


def test_a_damaged_file_of_weights_is_refused():
    Path("w.safetensors").write_bytes(b"\x08\x00\x00")
    said = words(run("own.py:Exact --input 1x3x8x8 --out x.cnnfast --weights w.safetensors", code=2).stderr)
    assert "w.safetensors is no file of safetensors" in said


def test_results_that_are_too_far_end_with_1_and_leave_the_old_file(monkeypatch):
    fold = freezing.fold

    def wrong(graph, *others):
        graph = fold(graph, *others)
        graph.constants = {name: t * 1.01 for name, t in graph.constants.items()}
        return graph

    monkeypatch.setattr(freezing, "fold", wrong)
    Path("x.cnnfast").write_text("old")
    said = run("own.py:Exact --input 1x3x8x8 --out x.cnnfast", code=1).stdout
    assert "the frozen network is too far from Exact" in said
    assert Path("x.cnnfast").read_text() == "old"


def test_a_model_that_cannot_be_captured_cannot_be_written():
    said = words(run("own.py:Branching --input 1x3x8x8 --out x.cnnfast", code=2).stderr)
    assert "this network cannot be saved, because torch.export cannot capture Branching" in said
    assert not Path("x.cnnfast").exists()


def test_json_on_standard_output_is_all_that_is_there():
    result = run("own.py:Exact --input 1x3x8x8 --out x.cnnfast --json -")
    assert json.loads(result.stdout)["file"] == "x.cnnfast"
    assert "x.cnnfast is written" in result.stderr
