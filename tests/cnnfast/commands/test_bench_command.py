"""`cnnfast bench` as its users meet it: text, files, pictures, wrong arguments; and that conversion costs a CPU next to
nothing.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import cnnfast
from cnnfast.__main__ import app
from cnnfast.bench import compare as comparing
from cnnfast.bench.job import Job, plain
from cnnfast.bench.providers import PROVIDERS
from cnnfast.bench.report import report
from cnnfast.bench.rows import BenchRow, jobs, lines, read, speedup, to_json, verdict
from cnnfast.bench.running import run
from cnnfast.bench.task import model_task
from cnnfast.commands.bench_jobs import providers
from cnnfast.measuring.machine import Machine, Peaks, this_machine
from cnnfast.measuring.timing import HostClock, measure
from cnnfast.models import resnet18

MACHINE = Machine("a GPU", "1.2", "1000 MHz", "2.13", "3.9", "9", "abc")
OURS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(5, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)
    def forward(self, x):
        return {"logits": self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))}

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
    def forward(self, x, y):
        return self.conv(x) + y
"""


@pytest.fixture(autouse=True)
def served_by_torch():
    with cnnfast.backend("torch"):
        yield


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "own.py"
    file.write_text(OURS)
    return f"{file}:Net"


def bench(*arguments: str, width: int = 160):
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": str(width), "TERM": "dumb"})


def row(provider: str = "eager", median: float | None = 1.0, **other) -> BenchRow:
    spread = (
        {}
        if median is None
        else {"median": median, "low": 0.99 * median, "high": 1.01 * median, "samples": 9, "first": 2.0}
    )
    entry = PROVIDERS[provider]
    fixed = {
        "kind": "model", "subject": "net", "provider": provider, "baseline": entry.baseline, "ours": entry.ours,
        "mode": "infer",
        "dtype": "bfloat16", "layout": entry.layout, "batch": 8, "input": "8x3x9x9", "status": "ok", "machine": MACHINE,
        "peaks": Peaks(4e12, 2e9), "flops": 10**12, "bytes": 10**9, "level": entry.level,
        "ceilings": {entry.level: 0.5},
    }  # fmt: skip
    return BenchRow(**{**fixed, **spread, **other})


def write(rows, file: Path) -> None:
    file.write_text(to_json(lines(rows)))


def text(rows, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report(rows, width))
    return console.export_text()


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_an_own_model_in_both_modes(model, tmp_path):
    file = tmp_path / "rows.json"
    result = bench(
        model, "--mode", "infer,train", "--batch", "2,3", "--input", "1x5x12x10", "--seconds", "0", "--json", str(file)
    )
    assert result.exit_code == 0, result.output
    rows = read(file)
    assert [group[0].job[2:5] for group in jobs(rows)] == [
        (mode, n, f"{n}x5x12x10") for mode in ("infer", "train") for n in (2, 3)
    ]
    assert {r.provider for r in rows} == set(PROVIDERS)
    for data in json.loads(file.read_text()):
        assert data["machine"].keys() == {"device", "driver", "clocks", "torch", "triton", "cudnn", "commit"}
        assert data["machine"]["torch"] == torch.__version__
        assert data["dtype"] == "float32"
        assert (
            (data["status"] == "ok")
            == (data["median"] is not None)
            == (data["tflops"] is not None)
            == (not data["reason"])
        )
    assert "unavailable: CUDA graphs need a GPU" in result.output
    assert "takes minutes on a CPU" in result.output
    assert "No GPU here" in result.output


def test_every_name_of_a_dtype_is_taken(model, tmp_path):
    file = tmp_path / "rows.json"
    for name, full in {"fp64": "float64", "torch.float32": "float32", "bf16": "bfloat16"}.items():
        arguments = (
            model,
            "--mode",
            "infer,train",
            "--provider",
            "eager",
            "--seconds",
            "0",
            "--dtype",
            name,
            "--json",
            str(file),
        )
        result = bench(*arguments)
        assert result.exit_code == 0, result.output
        assert [(r.dtype, r.status) for r in read(file)] == [(full, "ok")] * 2


def test_only_the_named_provider_runs(model, tmp_path):
    file = tmp_path / "rows.json"
    arguments = (
        model,
        "--provider",
        "nchw",
        "--provider",
        "cnnfast",
        "--seconds",
        "0",
        "--json",
        str(file),
        "--input",
        "4x5x9x9",
    )
    result = bench(*arguments)
    assert result.exit_code == 0, result.output
    assert [(r.provider, r.batch) for r in read(file)] == [("nchw", 4), ("cnnfast", 4)]
    assert "no right result of a baseline" in " ".join(result.output.split())


def test_pictures(model, tmp_path):
    result = bench(model, "--seconds", "0", "--pictures", str(tmp_path / "pictures"))
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == ["images.png", "roofline.png"]


def test_a_wrong_provider_ends_with_1(model, monkeypatch):
    class Zero(type(PROVIDERS["eager"])):
        def network(self, job):
            network = super().network(job)
            network.head.weight.data.zero_()
            return network

    monkeypatch.setitem(PROVIDERS, "eager", Zero("eager", "of nothing"))
    result = bench(model, "--seconds", "0")
    assert result.exit_code == 1
    assert "eager             wrong: tensor 0 is off by" in result.output


def test_a_model_of_two_inputs(model):
    two = model.replace(":Net", ":Two")
    result = bench(two, "--input", "1x3x8x8", "--input", "1x4x8x8", "--batch", "2", "--seconds", "0")
    assert result.exit_code == 0, result.output
    assert "2x3x8x8 2x4x8x8" in result.output
    assert bench(two, "--input", "1x3x8x8").exit_code == 2


@pytest.fixture
def frozen(tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    file = tmp_path / "net.cnnfast"
    cnnfast.freeze(model, torch.randn(2, 3, 12, 10)).save(file)
    return str(file)


def test_a_file_of_freeze_runs_beside_the_engines(frozen, tmp_path):
    """Those that compile are asked for, as this takes a quarter of a minute."""
    file = tmp_path / "rows.json"
    chosen = [f"--provider={name}" for name in ("eager", "frozen", "onnxruntime")]
    result = bench(frozen, "--batch", "1,3", "--seconds", "0", "--json", str(file), *chosen)
    assert result.exit_code == 0, result.output
    rows = read(file)
    assert [group[0].job for group in jobs(rows)] == [
        ("model", "net.cnnfast", "infer", n, f"{n}x3x12x10", "float32") for n in (1, 3)
    ]
    assert {r.provider for r in rows if r.ours} == {"frozen"}
    assert {r.status for r in rows if r.provider in ("eager", "frozen")} == {"ok"}


def test_who_runs_a_file_unless_others_are_named():
    cpu = torch.device("cpu")
    assert [p.name for p in providers([], cpu, False, file=True)] == [
        "eager", "frozen", "onnxruntime", "openvino", "compile-freezing"
    ]  # fmt: skip
    skipped = {p.name: p.skipped for p in providers([], cpu, False)}
    assert all(skipped[name] for name in ("frozen", "onnxruntime", "openvino", "compile-freezing"))


@pytest.mark.parametrize("option", [("--dtype", "bf16"), ("--mode", "train"), ("--mode", "infer,train")])
def test_a_file_of_freeze_has_its_own_dtype_and_mode(frozen, option):
    result = bench(frozen, *option)
    assert result.exit_code == 2
    assert "computes in float32, and in mode infer" in " ".join(result.output.replace("│", " ").split())


def test_a_file_that_is_none_of_freeze_is_refused(tmp_path):
    file = tmp_path / "other.cnnfast"
    file.write_bytes(b"something else")
    for name in (str(file), str(tmp_path / "none.cnnfast")):
        result = bench(name)
        assert result.exit_code == 2
        assert Path(name).name in result.output.replace("\n", "")


def test_pictures_without_matplotlib_say_what_to_install(monkeypatch, model):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )
    result = bench(model, "--pictures", "folder")
    assert result.exit_code == 2
    assert 'pip install ".[demo]"' in " ".join(result.output.split())


# ----------------------------------------------------------------------------------------------------------------------
# The report


def test_losses_come_first():
    won = [row("eager", 2.0, batch=1), row("cnnfast", 1.0, batch=1)]
    lost = [row("max-autotune", 1.0, batch=8), row("eager", 3.0, batch=8), row("cnnfast-graph", 1.25, batch=8)]
    even = [row("eager", 1.0, batch=32), row("cnnfast", 1.015, batch=32)]
    lines = [line for line in text([*won, *lost, *even]).splitlines() if line.startswith(("loses", "wins", "even"))]
    assert [line.split()[:2] for line in lines] == [["loses", "0.80x"], ["even", "0.99x"], ["wins", "2.00x"]]
    assert "1,250 ms (cnnfast-graph) against 1,000 ms (max-autotune)" in lines[0]


def test_nchw_and_ourselves_are_no_baseline():
    assert speedup([row("nchw", 1.0), row("eager", 4.0), row("cnnfast-compile", 2.0)]) == 2.0
    assert speedup([row("nchw", 1.0), row("cnnfast", 2.0)]) is None
    assert verdict([row("nchw", 1.0), row("cnnfast", 2.0)]) == "even"


def test_figures_of_a_row():
    r = row("eager", 2.0)
    assert (r.images_per_second, r.tflops, r.gbps, r.fraction) == (4.0, 0.5, 0.5, 0.25)
    assert (row(median=None).tflops, row(median=None).fraction) == (None, None)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_report_fits(width):
    rows = [row(), row("cnnfast", 0.9), row("jax", None, status="unavailable", reason="jax is not installed")]
    rows += [
        row(kind="layer", subject="conv 3x3/1 > 64, 64x56x56", mode=m, level="operators") for m in ("forward", "dgrad")
    ]
    lines = text(rows, width).splitlines()
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if "…" in line]
    assert any("jax is not installed" in line for line in lines)


def test_what_was_left_out_is_named_and_judged_by_nobody():
    """Jobs as a whole by their reason; of a model's job that was begun, its providers; of layers, too."""
    spent, stopped = "the budget of 9 s was spent", "the run was interrupted"
    left = {"status": "left out", "reason": spent}
    layer = {"kind": "layer", "subject": "conv 3x3", "mode": "forward", "level": "operators"}
    rows = [
        row("eager"), row("cnnfast", 0.5), row("max-autotune", None, **left),
        row("eager", None, batch=9, **left), row("cnnfast", None, batch=9, **left),
        row("eager", None, batch=10, status="left out", reason=stopped),
        row("eager", **layer),
        row("cnnfast", None, **{**layer, **left}),
        row("eager", None, **{**layer, **left, "mode": "dgrad"}),
    ]  # fmt: skip
    said = text(rows, 200)
    assert f"left out: {spent}\nnet, batch 9 (infer); conv 3x3, batch 8 (forward by cnnfast, dgrad)" in said
    assert f"left out: {stopped}\nnet, batch 10 (infer)" in said
    assert f"max-autotune  left out: {spent}" in said
    assert "nothing to compare" not in said
    assert said.count("wins ") == 1


def test_times_that_are_not_of_the_rounds_are_marked():
    said = text([row("eager", alone=True), row("cnnfast", 0.5)], 160)
    assert "wins   2.00x  net, infer, batch 8, 8x3x9x9, bfloat16: 500 ms (cnnfast) against 1,000 ms (eager ~)" in said
    assert "eager * ~" in said
    assert "~: timed alone, right after its first result" in said
    assert "~" not in text([row("eager"), row("cnnfast", 0.5)])


def test_a_run_of_which_nothing_was_begun_is_reported():
    said = text([row("eager", None, status="left out", reason="the run was interrupted")])
    assert "left out: the run was interrupted" in said
    assert "a GPU" in said


def test_rows_survive_their_file(tmp_path):
    rows = [row(), row("jax", None, status="unavailable", reason="jax is not installed")]
    write(rows, tmp_path / "rows.json")
    assert read(tmp_path / "rows.json") == rows
    Path(tmp_path, "other.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"other\.json holds no rows"):
        read(tmp_path / "other.json")


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def test_what_changed_between_two_runs(tmp_path):
    before = [row("eager", 1.0), row("cnnfast", 1.0), row("nchw", 1.0), row("compile", 1.0), row("jax", 1.0)]
    after = [
        row("eager", 1.03), row("cnnfast", 1.2), row("nchw", 0.5), row("compile", 1.1, low=1.0, high=1.3),
        row("jax", None, status="wrong", reason="wrong: tensor 0"), row("max-autotune", 1.0),
    ]  # fmt: skip
    changes = comparing.compare(before, after)
    assert [(c.after.provider, c.verdict) for c in changes] == [
        ("jax", "BROKEN"), ("cnnfast", "slower"), ("nchw", "faster"), ("compile", "same"), ("eager", "same"),
    ]  # fmt: skip
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    write(before, files[0])
    write([replace(r, machine=replace(MACHINE, torch="2.14")) for r in after], files[1])
    result = bench("--compare", *map(str, files))
    assert result.exit_code == 1
    assert "torch: 2.13 before, 2.14 after" in result.output
    assert "5 compared, 2 slower or broken" in result.output
    assert bench("--compare", str(files[0]), str(files[0])).exit_code == 0
    write([row(batch=99)], files[1])
    assert "in common" in " ".join(bench("--compare", *map(str, files)).output.split())


def test_what_ended_early_is_compared_with_nothing():
    before = [row("eager", 1.0), row("cnnfast", 1.0), row("nchw", 1.0)]
    after = [
        row("eager", None, status="left out", reason="the run was interrupted"),
        row("cnnfast", 2.0, alone=True),
        row("nchw", 2.0),
    ]
    for one, other in ((before, after), (after, before)):
        assert [c.after.provider for c in comparing.compare(one, other)] == ["nchw"]


# ----------------------------------------------------------------------------------------------------------------------
# This machine


def test_the_standard_machine_is_described():
    found = this_machine(torch.device("cpu"))
    assert found.device
    assert (found.driver, found.clocks, found.cudnn) == ("", "", "")


BOUND, ATTEMPTS = 1.05, 5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt


@pytest.fixture
def memory_is_kept():
    """Freed memory stays in this process. Otherwise the C library returns some of it after a step and fetches it again
    in the next one, thousands of pages or none, as the heap happens to lie, and that would count as time of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.usefixtures("memory_is_kept")
def test_conversion_costs_a_cpu_next_to_nothing(mode):
    """Nine interleaved rounds; a few attempts, for other load only ever adds."""
    model = resnet18().train(mode == "train")
    cpu = torch.device("cpu")
    job = Job("resnet18", plain(model), ((2, 3, 96, 96),), mode, torch.float32, cpu, original=model)
    steps = {name: PROVIDERS[name].prepare(job).step for name in ("eager", "cnnfast")}
    ratios = []
    while len(ratios) < ATTEMPTS and (not ratios or ratios[-1] > BOUND):
        times = measure(steps, HostClock(), seconds=0)
        ratios.append(times["cnnfast"].median / times["eager"].median)
    assert min(ratios) <= BOUND


def test_a_run_twice_has_the_same_medians():
    """Within 5 %, on whatever load: a few attempts."""
    model = resnet18().eval()
    cpu = torch.device("cpu")
    job = Job("resnet18", plain(model), ((1, 3, 96, 96),), "infer", torch.float32, cpu)
    for _ in range(ATTEMPTS):
        runs = [
            run(model_task(job, [PROVIDERS["eager"]]), MACHINE, Peaks(1e11, 1e10), seconds=0.3)[0].median
            for _ in range(2)
        ]
        if abs(runs[0] / runs[1] - 1) <= 0.05:
            return
    pytest.fail(f"{runs}")
