"""What the command line says of itself: examples that can be typed, words that people type, lines that fit, in no time;
and JSON on standard output with nothing beside it.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from cnnfast import __version__, engine
from cnnfast.__main__ import COMMANDS, EXIT_CODES, app
from tests.support.child import environment

PANELS = {command.__name__: panel for panel, commands in COMMANDS.items() for command in commands}
LINES = {command.__name__: line for commands in COMMANDS.values() for command, (line, _) in commands.items()}
TYPED = [line for commands in COMMANDS.values() for _, examples in commands.values() for line in examples]
GROUP = typer.main.get_command(app)
# Python's and typer's names of types, which nobody types.
TYPES = re.compile(r"<[a-z]|\b(TEXT|INTEGER|FLOAT|BOOLEAN|PATH|str|bool|list\[)\b|class '|\[x>|[{}]")


def invoke(*arguments: str, width: int = 80):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width), "TERM": "dumb"})


def helped(command: str) -> str:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("command", [*PANELS, ""])
def test_help_is_in_words_that_people_type_and_fits_a_terminal(command):
    text = helped(command)
    assert max(map(len, text.splitlines())) <= 80
    assert not TYPES.search(text), TYPES.search(text)
    assert "•" in text.partition("Examples:")[2]
    assert f"• cnnfast {command}".rstrip() in text
    assert EXIT_CODES.replace("*", "") in " ".join(text.split())


@pytest.mark.parametrize("command", PANELS)
def test_options_that_commands_share_are_said_alike(command):
    text = helped(command)
    assert "─ Results ─" in text
    assert re.search(r"--json\s+FILE", text)
    for option, word in (("--dtype", "DTYPE"), ("--budget", "SECONDS|BUDGET"), ("--seconds", "SECONDS")):
        assert option not in text or re.search(rf"{option}\s+({word})", text) or command == "demo"


def test_the_commands_are_listed_by_purpose_in_one_line_each():
    text = helped("")
    found = re.findall(r"^│ ([a-z]+) +(\S.*?) +│$", text, re.MULTILINE)
    assert dict(found) == LINES
    assert [name for name, _ in found] == list(PANELS)
    assert next(iter(PANELS)) == "doctor"
    assert all(f"─ {panel} ─" in text for panel in COMMANDS)


@pytest.mark.parametrize("line", TYPED)
def test_examples_can_be_typed(line):
    program, name, *rest = shlex.split(line)
    assert program == "cnnfast"
    command = GROUP.commands[name]
    command.make_context(name, rest, resilient_parsing=False)


def test_version_and_nothing_at_all():
    assert invoke("--version").output == f"cnnfast {__version__}\n"
    assert "Start here" in invoke().output


SECONDS = 1.0  # of a processor, from start to end: other load on the machine does not count
MODULES = {"torch", "triton", "numpy", "sklearn", "matplotlib"}


@pytest.mark.parametrize("command", [*PANELS, ""])
def test_help_imports_nothing_heavy_and_is_there_at_once(command):
    """In a process of its own, as `python -m cnnfast`."""
    script = (
        "import resource, runpy, sys\n"
        f"sys.argv = ['cnnfast', *{command.split()!r}, '--help']\n"
        "try:\n    runpy.run_module('cnnfast', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"assert not {MODULES!r} & set(sys.modules)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, file=sys.stderr)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert float(child.stderr) < SECONDS


# ----------------------------------------------------------------------------------------------------------------------
# --json -

OWN = "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self): super().__init__(nn.Conv2d(3, 4, 3))\n"
JSON = {
    "info model.py:Net": lambda data: data["total"]["parameters"] == 112,
    "info model.py:Net --depth 0": lambda data: len(data["layers"]) == 1,
    "info model.py:Net --training --input 1x3x8x8": lambda data: data["steps"]["kernels"]["launches"] >= 2,
    "doctor": lambda data: "findings" in data,
    "check model.py:Net --input 1x3x4x4 --no-backward": lambda data: data["ok"],
    "bench model.py:Net --input 1x3x8x8 --provider eager --seconds 0": lambda data: data[0]["mode"] == "infer",
    "bench augment --input 2x3x16x16 --size 12 --provider cnnfast --seconds 0": lambda data: data[0]["launches"] >= 1,
    "bench --compare rows.json rows.json": lambda data: data[0]["verdict"] == "same",
    "freeze model.py:Net --input 1x3x8x8 --out own.cnnfast": lambda data: data["steps"][0]["pattern"] == "convolution",
    "predict net.cnnfast photo.png --preprocessing how.json": lambda data: len(data[0]["top"]) == 4,
    "augment photo.png --size 8 --count 2": lambda data: len(data["results"]) == 2,
    "explain model.py:Net --input 1x3x8x8": lambda data: data["rows"][0]["operation"] == "fprop",
    "tune model.py:Net --input 1x3x8x8 --dry-run --gpu h200": lambda data: data[0]["candidates"][-1] == "library",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's own model, the rows of a run of it, a frozen network, and an image for that."""
    made = tmp_path_factory.mktemp("own")
    (made / "model.py").write_text(OWN)
    pytest.importorskip("PIL.Image").new("RGB", (9, 8)).save(made / "photo.png")
    (made / "how.json").write_text('{"size": 8, "crop": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}')
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    engine.freeze(network, torch.zeros(1, 3, 8, 8)).save(made / "net.cnnfast")
    arguments = ["bench", f"{made}/model.py:Net", "--input", "1x3x8x8", "--provider", "eager", "--seconds", "0"]
    assert invoke(*arguments, "--json", f"{made}/rows.json").exit_code == 0
    return made


@pytest.mark.parametrize("line", JSON)
def test_json_on_standard_output_is_all_that_is_there(line, folder, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.chdir(folder)
    result = invoke(*line.split(), "--json", "-")
    assert result.exit_code == 0, result.output
    assert JSON[line](json.loads(result.stdout))
    first = result.stderr.splitlines()[0]
    long = line.startswith("check") or "--seconds" in line
    assert (", by an estimate" in first) == long, "how long it takes is said first"


@pytest.mark.compiled
def test_json_of_aot_in_a_process_that_compiles():
    """A name of a dtype is one here too, though it stands in the middle of a case's name."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "cnnfast", "aot", "--only", "im2col bf16", "--jobs", "1", "--json", "-"]
    child = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    rows = json.loads(child.stdout)
    assert f"{len(rows)} kernels compiled, 0 problems" in child.stderr
    assert re.search("1 case for sm_90, compiled by 1 process: .* seconds, by an estimate", child.stderr)
    assert "im2col_kernel" in {row["kernel"] for row in rows}
    assert all("bfloat16" in row["variant"] for row in rows)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["check", "--help"], ["chek"], ["info", "resnet18", "--input", "3x"]]
)
def test_both_ways_to_start_the_command_line_say_the_same(arguments):
    start = "import sys\nfrom cnnfast.__main__ import app\nsys.argv[0] = 'cnnfast'\nsys.exit(app())"
    ways = (["-m", "cnnfast"], ["-c", start])
    said = [
        subprocess.run(
            [sys.executable, *way, *arguments], env=environment() | {"COLUMNS": "80"}, capture_output=True, check=False
        )
        for way in ways
    ]
    assert [(s.returncode, s.stdout, s.stderr) for s in said[:1]] == [
        (s.returncode, s.stdout, s.stderr) for s in said[1:]
    ]
