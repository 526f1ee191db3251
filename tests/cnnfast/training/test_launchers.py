"""`cnnfast train` by two processes, as torchrun starts them and as lightning does: gloo, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.support.child import REPOSITORY, environment

pytest.importorskip("sklearn")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TRAIN = ("-m", "cnnfast", "train", "digits", "--epochs", "1", "--ema", "0")


class Launched(NamedTuple):
    """What a command has left, and what it printed on standard output."""

    folder: Path
    printed: str


def run(*arguments: str | Path) -> str:
    """What Python prints; no GPU is seen."""
    told = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-4000:]
    return told.stdout


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory) -> Launched:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch is built without gloo")
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    return Launched(folder, run(*TORCHRUN, *TRAIN, "--out", folder, "--json", "-"))


def test_torchrun(by_torchrun):
    """All is written and told once."""
    found = json.loads(by_torchrun.printed)
    (epoch,) = found["epochs"]
    assert found["accuracy"] == epoch["validation_accuracy"]
    evaluated = json.loads((by_torchrun.folder / "evaluation.json").read_text())
    assert found["accuracy"] == pytest.approx(evaluated["accuracy"])
    assert json.loads((by_torchrun.folder / "config.json").read_text())["options"]["processes"] == 2
    assert len((by_torchrun.folder / "metrics.csv").read_text().splitlines()) == 2
    names = {file.name for file in by_torchrun.folder.iterdir()}
    assert names >= {"best.safetensors", "last.ckpt", "curves.png", "confusion.png", "model.cnnfast"}
    assert ".lock" not in names


def test_lightning_s_own_launcher(by_torchrun, tmp_path):
    """It runs the whole command in each process; the weights are those of the run of torchrun."""
    found = json.loads(run(*TRAIN, "--devices", "2", "--out", tmp_path / "run", "--json", "-"))
    assert found["accuracy"] == json.loads(by_torchrun.printed)["accuracy"]
    ours, theirs = (load_file(folder / "last.safetensors") for folder in (tmp_path / "run", by_torchrun.folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


@pytest.mark.slow
def test_an_evaluation_by_torchrun(by_torchrun, tmp_path):
    """What both find together is what one finds, and is told once; a frozen file is evaluated by the first alone."""
    for network in (by_torchrun.folder, by_torchrun.folder / "model.cnnfast"):
        together = json.loads(run(*TORCHRUN, "-m", "cnnfast", "evaluate", network, "digits", "--json", "-"))
        alone = json.loads(run("-m", "cnnfast", "evaluate", network, "digits", "--json", "-"))
        assert together == alone
    assert together["images"] == 1797
