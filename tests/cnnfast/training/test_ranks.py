"""Two processes that train together."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cnnfast
from cnnfast.training.preparing import OF_DIGITS, prepare
from cnnfast.training.ranks import ProcessEnded, end_launched
from tests.support.processes import run_ranks
from tests.support.trainable import few_digits, small_fit, weights
from tests.support.trained_by_ranks import BATCH, InDouble, evaluated, first_step

# Sums of some hundred float64 numbers in another order.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where they met, and what each has found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.support.trained_by_ranks", 2, folder, "synchronised", "separate", "resumed", "evaluated")
    return folder / "meet", [torch.load(folder / f"meet.{rank}", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same by one process, whose batches are those of both."""
    with cnnfast.backend("torch"):
        return first_step(batch=2 * BATCH)


def test_gradients_are_those_of_the_whole_batch(ranks, alone):
    for rank in ranks[1]:
        torch.testing.assert_close(rank["synchronised"]["gradients"], alone["gradients"], **CLOSE)
        torch.testing.assert_close(rank["synchronised"]["statistics"], alone["statistics"], **CLOSE)


def test_without_synchronisation_statistics_are_each_process_s(ranks):
    """As in PyTorch: each normalises by its own part, and the gradient is the mean of both."""
    prepared = prepare(few_digits(120), 0.2, None, OF_DIGITS, 0)
    order = [rank["separate"] for rank in ranks[1]]
    from cnnfast.training.batches import collate, loader

    (whole, *_) = loader(prepared.training.images, prepared.training.indices, batch=2 * BATCH, shuffle=True)
    gradients = []
    for rank, part in enumerate((slice(0, BATCH), slice(BATCH, None))):
        batch = collate([prepared.training.images[i] for i in whole.index[part].tolist()])
        images, labels = prepared.augment(batch.images, batch.labels, index=batch.index)
        model = InDouble().train()
        torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        torch.testing.assert_close(order[rank]["statistics"], dict(model.named_buffers()), **CLOSE)
    mean = {name: (g + gradients[1][name]) / 2 for name, g in gradients[0].items()}
    for rank in order:
        torch.testing.assert_close(rank["gradients"], mean, **CLOSE)


def test_each_image_is_validated_once(ranks, alone):
    for case in ("synchronised", "separate"):
        parts = [rank[case]["validated"] for rank in ranks[1]]
        assert sorted(parts[0] + parts[1]) == sorted(alone["validated"])
        assert ranks[1][0][case]["accuracy"] == ranks[1][1][case]["accuracy"]
    assert ranks[1][0]["synchronised"]["accuracy"] == alone["accuracy"]
    assert ranks[1][0]["synchronised"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_one_process_writes(ranks):
    first, second = (rank["synchronised"]["written"] for rank in ranks[1])
    assert first == ["config.json", "best.safetensors", "last.safetensors", "metrics.csv", "last.ckpt"]
    assert second == []


def test_a_run_of_two_that_goes_on_ends_with_the_same_bits(ranks):
    meet = ranks[0]
    resumed, whole = (Path(f"{meet}.resumed{end}") for end in ("", ".whole"))
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())
    best = load_file(resumed / "best.safetensors")
    assert all(torch.equal(t, best[name]) for name, t in load_file(whole / "best.safetensors").items())


def test_an_evaluation_is_of_all_images_in_each_process(ranks):
    alone = evaluated()
    assert int(alone["confusion"].sum()) == 101
    for rank in ranks[1]:
        found = rank["evaluated"]
        assert torch.equal(found["confusion"], alone["confusion"])
        assert found["in_top"] == alone["in_top"]
        assert [m[:3] for m in found["mistakes"]] == [m[:3] for m in alone["mistakes"]]


def trainer_under(monkeypatch, **environment: Any) -> Any:
    """What `fit` trains with where torchrun has set these variables."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from cnnfast.training.trainers import make_trainer

    for name, value in {"TORCHELASTIC_RUN_ID": "a test", "MASTER_ADDR": "localhost", **environment}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # which lightning sets
    options: dict[str, Any] = {"mixed": None, "clip": None, "deterministic": False, "callbacks": []}
    return make_trainer(epochs=1, devices=None, nodes=1, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without GPUs")
def test_machines_are_as_many_as_torchrun_tells(monkeypatch):
    """The second process of the second of two machines with two each."""
    found = trainer_under(monkeypatch, RANK=3, LOCAL_RANK=1, GROUP_RANK=1, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2)
    assert (found.num_nodes, found.num_devices, found.world_size) == (2, 2, 4)
    assert (found.global_rank, found.local_rank, found.node_rank) == (3, 1, 1)


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    from cnnfast.training.trainers import make_trainer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options: dict[str, Any] = {"mixed": None, "clip": None, "deterministic": False, "callbacks": []}
    with pytest.raises(ValueError, match=r"^devices is 3, and this machine has 2 GPUs$"):
        make_trainer(epochs=1, devices=3, nodes=1, **options)


def test_images_that_cannot_be_shared_are_refused_before_processes_start(monkeypatch, tmp_path):
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    monkeypatch.setattr(_SubprocessScriptLauncher, "launch", None)
    with pytest.raises(ValueError, match=r"^25 images in batches of 2 cannot be shared among 30 processes"):
        small_fit(devices=30, batch=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Started:
    """A process that lightning would have started."""

    def __init__(self, code: int | None) -> None:
        self.returncode, self.killed = code, False

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and timeout is not None:
            raise subprocess.TimeoutExpired("python", timeout)
        return self.returncode or 0


@pytest.mark.parametrize("lost", [True, False])
def test_processes_end_with_the_one_that_started_them(lost):
    """And one that has ended before has told why; the error that it caused here does not."""
    failed, lives = Started(1), Started(None)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[lives, failed])))
    error = RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer" if lost else "a wrong shape")
    with pytest.raises(ProcessEnded, match="with exit code 1") if lost else nullcontext():
        end_launched(trainer, error)
    assert lives.killed
    assert trainer.strategy.launcher.procs == []  # nobody else looks at them
