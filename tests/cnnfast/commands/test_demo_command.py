"""`cnnfast demo`: what it refuses before any work, what it prints, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cnnfast.__main__ import app
from cnnfast.checking import CheckReport, CheckRow, Comparison
from cnnfast.demo import effort, story
from cnnfast.training import Interrupted


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "80", "TERM": "dumb"})


@pytest.fixture
def judged(monkeypatch):
    """The rows of a check that nobody ran, in the place of each; the rest of the demo is small, and real."""
    asked = []

    def check(module, x, **options):
        asked.append((tuple(x.shape), options["backward"], options["dtype"]))
        errors = [
            Comparison("output", 1e-7, 2e-7, 4e-7, largest=1.0),
            Comparison("grad", 3e-7, 2e-7, 4e-7, largest=1.0),
        ]
        row = CheckRow("a", "conv2d", "1x1x8x8 1x1x3x3", "float32", "ok", "", ["conv_fprop_kernel"], [], errors)
        return CheckReport([row])

    monkeypatch.setattr(story, "check", check)
    monkeypatch.setattr(story.torch.cuda, "is_available", lambda: False)
    for name in ("QUICK", "WHOLE"):
        chosen = getattr(effort, name)
        tiny = dataclasses.replace(chosen, epochs=1, photograph=16, converted=1, views=1)
        monkeypatch.setattr(effort, name, tiny)
    return asked


def test_quick_prints_a_story_and_writes_a_report(judged, tmp_path, monkeypatch):
    """One epoch does not teach enough: the demo says so, and ends with exit code 1."""
    monkeypatch.chdir(tmp_path)
    result = invoke("--quick")
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert lines[0] == effort.QUICK.duration
    assert [line.partition(" ")[0] for line in lines if line[0] != " "] == [
        "This", "machine", "training", "held", "photograph", "augment", "errors", "judged", "convert", "ResNet-50",
        "left", "report", "next", "result",
    ]  # fmt: skip
    assert 16 <= len(lines) <= 20
    assert max(map(len, lines)) <= 80
    assert "FAILED: held out (" in lines[-1]
    assert judged == [((1, 3, 16, 16), True, "float32"), ((1, 3, 8, 8), True, "float32")]
    assert {file.name for file in Path("cnnfast-report").iterdir()} == {"report.md", "report.json", "demo.png"}
    data = json.loads(Path("cnnfast-report/report.json").read_text())
    assert not data["ok"]
    assert data["maps"]["ok"]
    assert data["conversion"]["ok"]
    assert data["augmentation"]["ok"]
    assert data["training"]["losses"]
    assert data["errors"]["forward"]["pytorch"] == pytest.approx(2e-7 / 2**-23)
    assert "FAILED" in Path("cnnfast-report/report.md").read_text()


def test_verbose_prints_tables_and_json_has_standard_output_for_itself(judged, tmp_path):
    result = invoke("--verbose", "--epochs", "2", "--json", "-", "--out", str(tmp_path / "a" / "b"))
    data = json.loads(result.stdout)
    assert len(data["training"]["losses"]) == 2
    assert data["effort"]["left_out"] == ""
    assert judged == [
        ((1, 3, 96, 96), False, "float32"),
        ((1, 3, 32, 32), True, "float32"),
        ((1, 3, 8, 8), True, "float32"),
        ((4, 1, 8, 8), True, "float32"),
    ]
    assert "largest errors against float64" in result.stderr
    assert "convolutions fused" in result.stderr
    assert (tmp_path / "a" / "b" / "demo.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "option", "sentence"),
    [
        (("--out", "file"), "--out", "file is a file: name a folder, or a new one"),
        (("--out", "file/below"), "--out", "file/below cannot be made: Not a directory"),
        (("--out", "taken"), "--out", "taken/demo.png cannot be written: Is a directory"),
        (("--out", "new", "--json", "nowhere/x.json"), "--json", "there is no folder nowhere"),
        (("--budget", "0"), "--budget", "0 leaves no time"),
        (("--budget", "nan"), "--budget", "nan leaves no time"),
        (("--seed", "-1"), "--seed", ""),  # in typer's words
        (("--seed", str(2**63)), "--seed", ""),
        (("--epochs", "0"), "--epochs", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_refused_before_any_work(monkeypatch, tmp_path, arguments, option, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story, "tell", None)
    Path("file").write_text("before")
    Path("taken/demo.png").mkdir(parents=True)
    result = invoke(*arguments)
    said = " ".join(result.output.replace("│", " ").replace(f"'{option}'", option).split())
    assert result.exit_code == 2
    assert f"Invalid value for {option}: " in said
    assert sentence in said
    assert Path("file").read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "taken"]


def test_training_that_somebody_ends_has_the_exit_code_of_the_signal(monkeypatch, tmp_path):
    def tell(*arguments):
        raise Interrupted("training was ended in epoch 2 of 15; nothing is saved", signal.SIGTERM)

    monkeypatch.setattr(story, "tell", tell)
    result = invoke("--out", str(tmp_path))
    assert result.exit_code == 128 + signal.SIGTERM
    assert result.stdout.splitlines()[1:] == ["training was ended in epoch 2 of 15; nothing is saved"]


def test_a_folder_that_was_tried_is_empty(tmp_path):
    from cnnfast.commands.demo import refuse_folder

    refuse_folder(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
