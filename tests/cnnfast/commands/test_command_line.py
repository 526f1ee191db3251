"""The command line: what it refuses before any work, and what it says to read."""

from __future__ import annotations

import importlib.util
import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cnnfast.__main__ import app
from cnnfast.commands import console


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.mark.parametrize(
    ("arguments", "option", "sentence"),
    [
        (
            ("--arch", "sm_75"),
            "--arch",
            "arch='sm_75' is not known here: use one of sm_80, sm_86, sm_87, sm_89, sm_90, sm_100, sm_103, sm_120",
        ),
        (("--arch", "sm_90", "--arch", "sm_75"), "--arch", "arch='sm_75' is not known here: use one of sm_80"),
        (("--arch", "hopper"), "--arch", "arch='hopper' is not known here: use one of sm_80"),
        (("--jobs", "0"), "--jobs", ""),  # in typer's words
        (("--jobs", "-1"), "--jobs", ""),
        (("--only", "nonsense"), "--only", "only='nonsense' is in no case's name: names begin with "),
        (("--arch", "sm_80", "--only", "in boxes"), "--only", "only='in boxes' is in no case's name"),
        (("--json", "nowhere/rows.json"), "--json", "there is no folder nowhere"),
        (("--record", "--only", "boxes"), "--record", "the record is of cases of its own: leave --only out"),
    ],
)
def test_aot_refuses_before_it_compiles(monkeypatch, arguments, option, sentence):
    """With exit code 2 and a sentence that says what there is to choose from."""
    aot = pytest.importorskip("cnnfast_kernels.aot", reason="triton is not installed")
    monkeypatch.setattr(aot.stub_driver.launch, "INTERPRETED", False)
    monkeypatch.setattr(aot.compiling, "compile_case", None)
    monkeypatch.setattr(aot.processes, "ProcessPoolExecutor", None)
    result = invoke("aot", *arguments)
    said = " ".join(result.output.replace("│", " ").replace(f"'{option}'", option).split())
    assert result.exit_code == 2
    assert f"Invalid value for {option}: " in said
    assert sentence in said


@pytest.mark.parametrize("command", [("doctor",), ("check", "resnet18"), ("aot",)], ids=lambda command: command[0])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(monkeypatch, tmp_path, command):
    """A folder that is not there, a folder in its place, a disk that is full; what was in it before stays."""
    pytest.importorskip("triton")
    from cnnfast import checking, diagnosing
    from cnnfast_kernels import aot

    for module, name in ((diagnosing, "diagnose"), (checking, "check"), (aot, "compile_all")):
        monkeypatch.setattr(module, name, None)
    written = tmp_path / "before.json"
    written.write_text("before")
    for file, says in (
        ("nowhere/x.json", "there is no folder"),
        (".", "Is a directory"),
        ("before.json/x.json", "there is no folder"),
    ):
        result = invoke(*command, "--json", str(tmp_path / file))
        assert result.exit_code == 2
        assert "Invalid value for --json" in result.output
        assert says in " ".join(result.output.replace("│", " ").split())
    console.refuse_unwritable(written)
    console.refuse_unwritable(tmp_path / "after.json")
    assert written.read_text() == "before"
    assert not (tmp_path / "after.json").exists()


def test_a_bar_is_for_terminals(capsys):
    with console.progress("working") as tell:
        tell(1, 2, "still working")
    assert capsys.readouterr().err == ""


def test_aot_says_that_interpreted_kernels_do_not_compile(monkeypatch):
    compiling = pytest.importorskip("cnnfast_kernels.aot.compiling", reason="triton is not installed")
    monkeypatch.setattr(compiling.launch, "INTERPRETED", True)
    result = invoke("aot")
    assert result.exit_code == 2
    assert "unset TRITON_INTERPRET" in result.output


@pytest.mark.parametrize(
    ("module", "name"), [("sklearn", "scikit-learn"), ("lightning", "lightning"), ("PIL", "pillow")]
)
def test_demo_without_its_extra_says_what_to_install(monkeypatch, module, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *rest: None if wanted == module else found(wanted, *rest)
    )
    result = invoke("demo")
    assert result.exit_code == 2
    assert f'The demo needs {name}, not installed here: pip install ".[demo]" brings all' in result.output


def test_the_table_of_aot_fits_into_80_columns():
    """With the longest names and figures that there are."""
    aot = pytest.importorskip("cnnfast_kernels.aot", reason="triton is not installed")
    from cnnfast.commands.aot import summary

    figures = {"registers": 255, "spill_bytes": 1024, "shared_bytes": 232448, "seconds": 1234.56}
    names = ("normalize_backward_kernel", "max_pool_backward_kernel", "conv_wgrad_reduce_kernel")
    rows = [
        aot.KernelRow(name, f"variant {i}", "tile", arch, **figures, tensor_core=core, loop_instructions=loop)
        for name in names
        for arch in ("sm_90", "sm_120")
        for i, (core, loop) in enumerate((("DMMA", 100), ("HGMMA", 1323), (None, None)))
    ]
    text = io.StringIO()
    Console(width=80, file=text).print(summary(rows))
    lines = text.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert "…" not in text.getvalue()
    shown = [line.split() for line in lines if line.startswith(tuple(name.removesuffix("_kernel") for name in names))]
    assert len(shown) == len(names) * 2, "a row is one line"
    assert shown[0][1:] == ["sm_120", "3", "255", "1024", "227", "DMMA", "HGMMA", "100-1323", "3703.7"]
