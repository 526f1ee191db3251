"""`cnnfast info` as its users meet it: what it prints, and where its JSON goes."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from cnnfast.__main__ import app

WHERE = "cnnfast.demo.plain:PlainDigitNet"


def info(*arguments: str):
    return CliRunner().invoke(
        app, ["info", WHERE, "--input", "1x1x8x8", *arguments], env={"COLUMNS": "120", "TERM": "dumb"}
    )


def test_a_table_and_totals_and_the_same_in_a_file(tmp_path):
    result = info("--json", str(tmp_path / "layers.json"))
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "layers.json").read_text())
    assert "stem.0" in result.stdout
    assert f"{data['total']['parameters']:,} parameters" in result.stdout
    assert data["input"] == [[1, 1, 8, 8]]
    assert {"name", "kind", "output_shape", "parameters", "flops"} <= data["layers"][0].keys()


def test_json_on_standard_output_is_all_that_is_there():
    result = info("--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == WHERE
    assert "parameters" in result.stderr


def test_a_file_in_no_folder_is_refused():
    result = info("--json", "no/such/layers.json")
    assert result.exit_code == 2
    assert "there is no folder no/such" in " ".join(result.output.replace("│", " ").split())
