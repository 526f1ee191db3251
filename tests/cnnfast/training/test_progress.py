"""What a training tells on a terminal, and where there is none."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cnnfast.training import fitting
from cnnfast.training.beginning import Beginning
from cnnfast.training.progress import TrainingProgress
from cnnfast.training.runs import Epoch
from tests.support.trainable import small_fit

EPOCH = Epoch(3, 1e-3, 0.5, 0.75, 0.25, 0.875, 12.34)
TOLD = "epoch 3 of 9: loss 0.5000, 75.00% right, held out: 0.2500, 87.50% right, 12.3 s\n"


def trainer(**others: Any) -> Any:
    """Of a run that goes on after two epochs."""
    usual = {"num_training_batches": 4, "num_val_batches": [2], "current_epoch": 2, "max_epochs": 9}
    return SimpleNamespace(**usual | others)


def shown(terminal: bool, wanted: bool = True) -> tuple[TrainingProgress, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80, _environ={"TERM": "xterm"})
    return TrainingProgress(wanted, console), stream


def lines(progress: TrainingProgress) -> list[str]:
    """Of the bars, as they are now."""
    assert progress._bars is not None
    paper = Console(file=io.StringIO(), width=80)
    paper.print(progress._bars.get_renderable())
    assert isinstance(paper.file, io.StringIO)
    return [line.rstrip() for line in paper.file.getvalue().splitlines()]


def test_validation_is_a_part_of_an_epoch():
    progress, stream = shown(terminal=True)
    progress.on_train_start(trainer(), None)
    progress.on_train_epoch_start(trainer(), None)
    for i in range(4):
        progress.on_train_batch_end(trainer(), None, None, None, i)
    progress.on_validation_batch_end(trainer(), None, None, None, 0)
    assert progress._bars is not None
    epoch, whole = progress._bars.tasks
    assert (epoch.description, epoch.completed, epoch.total) == ("epoch 3 of 9", 5, 6)
    assert (whole.completed, whole.total) == (2 * 6 + 5, 9 * 6)
    progress.tell(EPOCH, 9)
    progress.on_train_end(trainer(), None)
    assert TOLD in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")  # the bars are wiped out
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1  # the cursor


def test_bars_leave_room_on_a_narrow_terminal():
    progress, _ = shown(terminal=True)
    large = trainer(num_training_batches=10_000, num_val_batches=[99], current_epoch=98, max_epochs=99)
    progress.on_train_start(large, None)
    progress.on_train_epoch_start(large, None)
    assert progress._bars is not None
    found = lines(progress)
    assert len(found) == 2
    assert "epoch 99 of 99" in found[0]
    assert "989702/999801" in found[1]
    assert max(map(len, found)) <= 77
    progress.on_exception(large, None, KeyboardInterrupt())
    assert progress._bars is None


def test_without_a_terminal_there_are_lines_alone():
    progress, stream = shown(terminal=False)
    progress.on_train_start(trainer(), None)
    progress.on_train_epoch_start(trainer(), None)
    progress.on_train_batch_end(trainer(), None, None, None, 0)
    progress.tell(EPOCH, 9)
    with progress.bar("looking at images") as step:
        step(1, 2)
        step(0, None, "drawing")
    progress.on_train_end(trainer(), None)
    assert stream.getvalue() == TOLD


def test_where_none_is_wanted_nothing_is_told():
    progress, stream = shown(terminal=True, wanted=False)
    progress.begins(Beginning(), 9, Path("run"))
    progress.on_train_start(trainer(), None)
    progress.on_train_epoch_start(trainer(), None)
    progress.tell(EPOCH, 9)
    with progress.bar("looking at images") as step:
        step(1, 2)
    progress.on_train_end(trainer(), None)
    assert stream.getvalue() == ""


def test_a_bar_is_without_an_end_where_none_is_known():
    progress, stream = shown(terminal=True)
    with progress.bar("evaluating") as step:
        step(3, 7)
        step(0, None, "drawing")
    assert "3/7" not in stream.getvalue().rpartition("drawing")[2]
    assert "0/?" in stream.getvalue()


@pytest.mark.parametrize(
    ("beginning", "told"),
    [
        (Beginning(), "nothing is saved in run: the run begins"),
        (Beginning((EPOCH,) * 3, Path("run/last.ckpt")), "the run in run goes on, after 3 of 9 epochs"),
        (Beginning((EPOCH,) * 5, Path("run/last.ckpt"), True), "the run in run is over, after 5 of 9 epochs"),
    ],
)
def test_where_a_run_stands_is_told(beginning, told):
    progress, stream = shown(terminal=False)
    progress.begins(beginning, 9, Path("run"))
    assert stream.getvalue() == f"{told}\n"


def test_a_training_counts_its_batches(monkeypatch, tmp_path):
    progress, stream = shown(terminal=True)
    monkeypatch.setattr(fitting, "TrainingProgress", lambda wanted: progress)
    small_fit(progress=True, epochs=2, out=tmp_path)
    text = stream.getvalue()
    assert "7/7" in text  # five batches, and two that are held out
    assert "14/14" in text
    assert text.count("right, held out") == 2
    small_fit(progress=True, epochs=2, out=tmp_path, resume=True)
    assert f"the run in {tmp_path} goes on, after" not in stream.getvalue()
    assert f"the run in {tmp_path} is over, after 2 of 2 epochs" in stream.getvalue()
