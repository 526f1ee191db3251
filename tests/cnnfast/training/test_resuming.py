"""A run that was stopped goes on as if it had not been; nothing else may go on."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.child import REPOSITORY, environment
from tests.support.killed_run import MOMENTS
from tests.support.trainable import small_fit, small_net, weights

OPTIONS = {"patience": 9, "batch": 8}
FILES = {"config.json", "metrics.csv", "best.safetensors", "last.safetensors", "last.ckpt"}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def lines(folder: Path) -> list[list[str]]:
    """Of metrics.csv, but for the seconds."""
    return [line[:-1] for line in csv.reader((folder / "metrics.csv").read_text().splitlines())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    import cnnfast

    folder = tmp_path_factory.mktemp("whole")
    with cnnfast.backend("torch"):
        small_fit(out=folder, **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By moment, what a killed run has left."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.support.killed_run", str(folder)]
    child = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    return {moment: folder / moment for moment in MOMENTS}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_with_the_same_bits(moment, whole, killed):
    folder = killed[moment]
    assert [line[0] for line in lines(folder)] == ["epoch", "1"] + ["2"] * (moment == "saving")
    run = small_fit(small_net(seed=99), out=folder, resume=True, **OPTIONS)
    assert same(weights(folder), weights(whole))
    for file in ("best.safetensors", "last.safetensors"):
        assert same(load_file(folder / file), load_file(whole / file))
    assert lines(folder) == lines(whole)
    assert [epoch.epoch for epoch in run.history] == [1, 2, 3]
    assert {file.name for file in folder.iterdir()} == FILES


def test_a_finished_run_is_returned_as_it_is(whole):
    before = {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    run = small_fit(small_net(seed=99), out=whole, resume=True, **OPTIONS)
    assert len(run.history) == 3
    assert {file.name: file.stat().st_mtime_ns for file in whole.iterdir()} == before
    assert same(dict(run.model.state_dict()), load_file(whole / "best.safetensors"))


def test_a_run_that_stopped_early_is_finished(tmp_path):
    """Nothing is learnt at such a rate: the accuracy of the first epoch stays the best."""
    options = {"epochs": 9, "patience": 1, "lr": 1e-12, "ema": None}
    run = small_fit(out=tmp_path, **options)
    assert len(run.history) == 2
    assert len(small_fit(out=tmp_path, resume=True, **options).history) == 2


def test_where_nothing_is_saved_a_run_begins(tmp_path, whole):
    (tmp_path / "config.json").write_text("{}")
    small_fit(out=tmp_path, resume=True, **OPTIONS)
    assert same(weights(tmp_path), weights(whole))
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((whole / "config.json").read_text())


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("epochs", 5, "epochs was 3 and is 5 now"),
        ("lr", 1e-4, "lr was 0.005 and is 0.0001 now"),
        ("frozen", ("stem",), r'frozen was \[\] and is \["stem"\] now'),
        ("seed", 1, "seed was 0 and is 1 now"),
        ("count", 121, "held_out was 25 and is 26 now"),
    ],
)
def test_other_options_are_refused(option, value, told, whole):
    with pytest.raises(ValueError, match=told):
        small_fit(out=whole, resume=True, **OPTIONS | {option: value})


def test_a_run_is_not_written_over(whole):
    with pytest.raises(ValueError, match="holds a run already"):
        small_fit(out=whole, **OPTIONS)


def test_resuming_needs_a_folder():
    with pytest.raises(ValueError, match="resume needs out"):
        small_fit(resume=True)


def test_a_damaged_checkpoint_is_told(tmp_path, whole):
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    content = (whole / "last.ckpt").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no checkpoint"):
        (tmp_path / "last.ckpt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last.ckpt is no checkpoint of a run, or damaged"):
            small_fit(out=tmp_path, resume=True, **OPTIONS)
