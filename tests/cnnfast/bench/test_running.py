"""What a run of bench keeps, whatever ends it; in which order it goes; and how its budget is spent."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import cnnfast
from cnnfast.__main__ import app
from cnnfast.bench import jax_model, running
from cnnfast.bench import task as tasks
from cnnfast.bench.job import Job
from cnnfast.bench.providers import EAGER, MAX_AUTOTUNE, PROVIDERS, Prepared, Provider
from cnnfast.bench.rows import FAILED, LAYER, LEFT_OUT, OK, UNAVAILABLE, read
from cnnfast.bench.running import ENDED
from cnnfast.bench.series import Series
from cnnfast.bench.shapes import layers
from cnnfast.bench.task import block_tasks, in_order, layer_task, layer_tasks, model_task
from cnnfast.measuring import budget as budgets
from cnnfast.measuring import failing
from cnnfast.measuring.budget import Budget
from cnnfast.measuring.machine import Peaks, this_machine

CPU = torch.device("cpu")
MACHINE, PEAKS = this_machine(CPU), Peaks(1e11, 1e10)
PYTORCH = PROVIDERS["eager"]
MODEL = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU())
"""


@pytest.fixture(autouse=True)
def served_by_torch():
    with cnnfast.backend("torch"):
        yield


def task(*providers: Provider, name: str = "net", mode: str = "infer", model: nn.Module | None = None):
    net = model or nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    return model_task(Job(name, net, ((2, 3, 9, 9),), mode, torch.float32, CPU), providers)


def doing(name: str, do, do_at_step=lambda: None, **fields) -> Provider:
    """PyTorch, and something else before it is prepared, or at each step."""

    class Doing(Provider):
        def prepare(self, job):
            do()
            step = super().prepare(job).step
            return Prepared(lambda: (do_at_step(), step())[1])

    return Doing(name, "", **fields)


def statuses(rows) -> dict:
    return {row.provider: (row.status, row.reason) for row in rows}


def interrupted(*arguments):
    raise KeyboardInterrupt


class Ticking:
    """A clock by which every step takes a second; the real time that passes is `now`'s."""

    least = 0.0

    def __init__(self, now: list[float]) -> None:
        self.now = now

    def sample(self, step, calls):
        step()
        self.now[0] += calls
        return 1.0


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time by which budgets are counted."""
    now = [0.0]
    monkeypatch.setattr(budgets.time, "monotonic", lambda: now[0])
    return now


# ----------------------------------------------------------------------------------------------------------------------
# What is told, and when


def test_every_provider_is_told_of_as_soon_as_it_is_timed():
    """A model's are timed alone at first; the rounds replace that."""
    told = []
    second = doing("second", lambda: told.append("preparing second"))
    rows = running.run(task(PYTORCH, second, PROVIDERS["eager-graph"]), MACHINE, PEAKS, seconds=0, found=told.append)
    before = told[told.index("preparing second") - 1]
    assert statuses(before) == {"eager": (OK, ""), "second": (LEFT_OUT, ENDED), "eager-graph": (LEFT_OUT, ENDED)}
    assert (before[0].alone, before[0].samples) == (True, running.ALONE)
    assert before[0].first > 0
    assert told[-1] == rows
    assert [(row.status, row.alone, row.samples >= 9) for row in rows[:2]] == [(OK, False, True)] * 2
    assert rows[2].status == UNAVAILABLE


def test_rounds_tell_what_they_have(monkeypatch):
    monkeypatch.setattr("cnnfast.measuring.timing.PAUSE", 0.0)
    told = []
    running.run(task(PYTORCH), MACHINE, PEAKS, seconds=0, found=told.append)
    counts = [rows[0].samples for rows in told if not rows[0].alone]
    assert counts == [0, *range(3, 10), 9, 9]  # nothing yet; from the third round on; after all of them; the end


def test_a_layer_is_neither_timed_alone_nor_asked_for_its_first_result(monkeypatch):
    told = []
    monkeypatch.setattr(running, "empty_caches", lambda compiling: pytest.fail("its kernels are compiled ahead"))
    layer = layer_task(list(layers())[-1], 1, "forward", torch.float32, CPU, [PYTORCH])
    (row,) = running.run(layer, MACHINE, PEAKS, seconds=0, found=told.append)
    assert (row.status, row.first) == (OK, None)
    assert not any(rows[0].alone for rows in told)


def test_a_provider_that_fails_in_its_rounds_keeps_no_time():
    left = itertools.count()

    def tire():
        if next(left) > 30:
            raise RuntimeError("worn out")

    rows = running.run(
        task(PYTORCH, doing("tiring", lambda: None, tire)), MACHINE, PEAKS, seconds=100, clock=Ticking([0.0])
    )
    assert statuses(rows) == {"eager": (OK, ""), "tiring": (FAILED, "RuntimeError: worn out")}
    assert (rows[1].median, rows[1].low, rows[1].samples, rows[1].alone) == (None, None, 0, False)


def test_memory_that_pytorch_does_not_allocate_is_not_told(monkeypatch):
    monkeypatch.setattr(running, "peak", lambda device, before: 7)
    seen = running.run(
        task(PYTORCH, type("Else", (Provider,), {"in_torch": False})("else", "")), MACHINE, PEAKS, seconds=0
    )
    assert [row.peak_bytes for row in seen] == [7, None]
    assert not PROVIDERS["jax"].in_torch


# ----------------------------------------------------------------------------------------------------------------------
# Series


def test_a_task_that_pytorch_cannot_do_leaves_the_others_their_rows():
    class Picky(nn.Linear):
        def forward(self, x):
            raise ValueError("not with me")

    series = Series(
        [task(PYTORCH), task(PYTORCH, mode="train", model=Picky(9, 9)), task(PYTORCH, mode="train")], MACHINE, PEAKS
    )
    series.run(0, Budget(), lambda done, total, text: None)
    assert [(row.status, row.reason) for row in series.rows] == [
        (OK, ""),
        (FAILED, "ValueError: not with me"),
        (OK, ""),
    ]
    assert series.errors == {1: "ValueError: not with me"}


def test_a_gpu_that_answers_no_more_ends_the_series(monkeypatch):
    """A sticky error of CUDA: what ran before keeps its times, and nothing is tried after it."""
    broken = []

    def wait(device):
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def break_it():
        broken.append(True)
        wait(CPU)

    monkeypatch.setattr(failing, "wait", wait)
    tasks = [
        task(PYTORCH, doing("breaks", break_it), doing("after", lambda: pytest.fail("it runs"))),
        task(PYTORCH, mode="train"),
    ]
    series = Series(tasks, MACHINE, PEAKS)
    series.run(0, Budget(), lambda done, total, text: None)
    first, second = series.results
    assert [row.status for row in first] == [OK, FAILED, LEFT_OUT]
    assert first[0].alone
    assert "illegal memory access" in first[1].reason
    assert first[2].reason == second[0].reason == series.lost
    assert series.lost.startswith("the GPU answers no more since net, infer, batch 2: RuntimeError: CUDA error")


def test_layers_come_after_models_and_by_their_cost():
    tasks = [*layer_tasks([1], torch.float32, CPU, [PYTORCH]), task(PYTORCH), task(PYTORCH, mode="train")]
    ordered = in_order(tasks, PEAKS)
    assert [t.kind for t in ordered[:2]] == ["model", "model"]
    assert [t.job.mode for t in ordered[:2]] == ["infer", "train"]
    assert {t.kind for t in ordered[2:]} == {LAYER}
    costs = [t.count * t.work["operators"].seconds(PEAKS) for t in ordered[2:]]
    assert costs == sorted(costs, reverse=True)
    assert ordered[2].count > 1  # not the largest single one, but what the network spends most in


def test_blocks_come_between_them():
    tasks = [*layer_tasks([1], torch.float32, CPU, [PYTORCH])]
    tasks = [*tasks[:3], *block_tasks([1], torch.float32, CPU, [PYTORCH]), task(PYTORCH)]
    ordered = in_order(tasks, PEAKS)
    assert [t.kind for t in ordered] == ["model", *["block"] * 15, *[LAYER] * 3]
    costs = [t.seconds(PEAKS) for t in ordered[1:16]]
    assert costs == sorted(costs, reverse=True)


def test_whoever_compiles_longest_runs_last():
    how = [provider.how for provider in PROVIDERS.values()]
    assert how == sorted(how, key=[EAGER, "compile", "freezing", MAX_AUTOTUNE].index)


# ----------------------------------------------------------------------------------------------------------------------
# Budget


def test_what_no_longer_fits_is_left_out_and_named(now):
    """Three tasks, of which the second's first provider takes longer than there is time."""

    def slow():
        now[0] += 100

    tasks = [task(PYTORCH, name="one"), task(doing("slow", slow), PYTORCH, name="two"), task(PYTORCH, name="three")]
    series = Series(tasks, MACHINE, PEAKS)
    series.run(0, Budget(60), lambda done, total, text: None)
    reason = "the budget of 60 s was spent"
    assert statuses(series.results[0]) == {"eager": (OK, "")}
    assert statuses(series.results[1]) == {"slow": (OK, ""), "eager": (LEFT_OUT, reason)}
    assert statuses(series.results[2]) == {"eager": (LEFT_OUT, reason)}
    assert series.results[1][0].alone  # its rounds had no time


def test_time_is_kept_for_the_rounds_of_what_is_prepared(now):
    def slow():
        now[0] += 15

    providers = [doing(name, slow) for name in "abcd"]
    rows = running.run(task(*providers), MACHINE, PEAKS, seconds=5, budget=Budget(50), clock=FastTicking(now))
    # after three, 45 of 50 seconds: none is left for a fourth
    assert [row.status for row in rows] == [OK, OK, OK, LEFT_OUT]
    assert not any(row.alone for row in rows[:3])


class FastTicking(Ticking):
    def sample(self, step, calls):
        step()
        self.now[0] += 0.01
        return 0.01


def test_rounds_end_with_the_budget(now):
    rows = running.run(task(PYTORCH), MACHINE, PEAKS, seconds=1000, budget=Budget(1005), clock=Ticking(now))
    assert not rows[0].alone
    assert 9 <= rows[0].samples < 1005


def test_a_layer_without_time_for_its_rounds_is_left_out(now):
    def slow():
        now[0] += 100

    layer = layer_task(list(layers())[-1], 1, "forward", torch.float32, CPU, [doing("slow", slow)])
    (row,) = running.run(layer, MACHINE, PEAKS, seconds=0, budget=Budget(60))
    assert (row.status, row.reason, row.median) == (LEFT_OUT, "the budget of 60 s was spent", None)


# ----------------------------------------------------------------------------------------------------------------------
# The command, interrupted


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(MODEL)
    return f"{tmp_path / 'own.py'}:Net"


def bench(*arguments: str):
    return CliRunner().invoke(
        app, ["bench", *arguments, "--input", "2x3x9x9", "--seconds", "0"], env={"COLUMNS": "160", "TERM": "dumb"}
    )


def only(monkeypatch, *providers: Provider) -> None:
    """These alone are known."""
    for name in list(PROVIDERS):
        monkeypatch.delitem(PROVIDERS, name)
    for provider in providers:
        monkeypatch.setitem(PROVIDERS, provider.name, provider)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["setup", "rounds"])
def test_an_interrupted_run_keeps_and_reports_what_it_has(monkeypatch, model, tmp_path, number, code, moment):
    file, before = tmp_path / "rows.json", signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("cnnfast.measuring.timing.PAUSE", 0.0)

    def strike():
        if moment == "setup" or (read(file)[0].status == OK and not read(file)[0].alone):
            signal.raise_signal(number)

    striking = doing("striking", strike) if moment == "setup" else doing("striking", lambda: None, strike)
    only(monkeypatch, PYTORCH, striking)
    result = bench(model, "--mode", "infer,train", "--json", str(file))
    assert result.exit_code == code, result.output
    rows = read(file)
    assert [(row.mode, row.provider) for row in rows] == [
        (mode, name) for mode in ("infer", "train") for name in ("eager", "striking")
    ]
    assert rows[0].status == OK
    assert rows[0].alone == (moment == "setup")
    assert {row.reason for row in rows[2:]} == {"the run was interrupted"}
    assert "timed alone" in result.output or moment == "rounds"
    assert "left out: the run was interrupted" in result.output
    assert "Net, batch 2 (train)" in " ".join(result.output.split())
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in tmp_path.glob("*rows*")] == ["rows.json"]


def test_a_killed_run_leaves_a_whole_file(monkeypatch, model, tmp_path):
    """What stands in the file while the last provider of the second mode is prepared."""
    file, seen = tmp_path / "rows.json", []
    only(monkeypatch, PYTORCH, doing("looking", lambda: seen.append(read(file))))
    assert bench(model, "--mode", "infer,train", "--json", str(file)).exit_code == 0
    in_infer, in_train = ([(row.status, row.alone, row.reason) for row in rows] for rows in seen)
    to_come = (LEFT_OUT, False, ENDED)
    assert in_infer == [(OK, True, ""), to_come, to_come, to_come]
    assert in_train == [(OK, False, ""), (OK, False, ""), (OK, True, ""), to_come]


def test_an_interrupt_before_everything_leaves_an_empty_list(monkeypatch, model, tmp_path):
    monkeypatch.setattr("cnnfast.measuring.machine.measure_peaks", interrupted)
    result = bench(model, "--json", str(tmp_path / "rows.json"))
    assert result.exit_code == 130
    assert read(tmp_path / "rows.json") == []
    assert "before anything was measured" in result.output


def test_a_mode_that_fails_ends_with_1_and_the_other_is_reported(monkeypatch, model, tmp_path):
    whole = tasks.expect

    def only_infer(job):
        if job.mode == "train":
            raise torch.cuda.OutOfMemoryError("much")
        return whole(job)

    monkeypatch.setattr(tasks, "expect", only_infer)
    only(monkeypatch, PYTORCH)
    file = tmp_path / "rows.json"
    result = bench(model, "--mode", "infer,train", "--json", str(file))
    assert result.exit_code == 1
    assert [(row.status, row.reason) for row in read(file)] == [(OK, ""), (FAILED, "out of memory")]
    assert "failed: out of memory" in result.output


def test_a_budget_is_kept_and_reported(monkeypatch, model, tmp_path):
    file = tmp_path / "rows.json"
    result = bench(model, "--mode", "infer,train", "--provider", "eager", "--budget", "1e-6", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert {row.status for row in read(file)} == {LEFT_OUT}
    assert "left out: the budget of 1e-06 s was spent" in result.output
    assert "nothing to compare" not in result.output


def test_json_on_standard_output_is_all_that_is_there(model):
    result = bench(model, "--provider", "eager", "--json", "-")
    assert result.exit_code == 0
    (data,) = json.loads(result.stdout)
    assert data["status"] == "ok"
    assert "measured on it" in result.stderr


REFUSED = {
    ("--budget", "0"): "--budget 300",
    ("--budget", "-3"): "-3 leaves no time",
    ("--budget", "nan"): "leaves no time",
    ("--budget", "soon"): "'--budget'",
    ("--json", "no/such/rows.json"): "there is no folder no/such",
    ("--mode", "eval"): "neither infer nor train",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_wrong_arguments_are_refused_before_any_work(monkeypatch, model, arguments):
    monkeypatch.setitem(sys.modules, "cnnfast.bench.series", None)  # importing it would raise
    result = bench(model, *arguments)
    assert result.exit_code == 2, result.output
    assert REFUSED[arguments] in " ".join(result.output.replace("│", " ").split())


# ----------------------------------------------------------------------------------------------------------------------
# JAX


@pytest.mark.parametrize(
    ("set_before", "imported", "found"), [(None, False, "false"), ("true", False, "true"), (None, True, None)]
)
def test_jax_is_asked_not_to_take_most_of_the_memory(monkeypatch, set_before, imported, found):
    """Unless its user has said something, or has imported it: then it is theirs."""
    variable = "XLA_PYTHON_CLIENT_PREALLOCATE"
    environment = {} if set_before is None else {variable: set_before}
    monkeypatch.setattr(jax_model.os, "environ", environment)
    seen = []
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    if imported:
        monkeypatch.setitem(sys.modules, "jax", json)
    monkeypatch.setattr(
        jax_model.importlib, "import_module", lambda name: seen.append((name, environment.get(variable)))
    )
    jax_model._jax()
    assert seen == [("jax", found)]
