"""Training that ends before its time: a loss that is no number, somebody's wish, a full disk."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnfast.training import Diverged, Interrupted, Module, saving
from cnnfast.training.batches import EpochSampler
from tests.support.trainable import small_fit, weights


class NanLater(Module):
    """The loss of a batch is no number: the fourth of the second epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if (self.current_epoch, batch_idx) == (1, 3):
            with torch.no_grad():
                self.model.fc.bias[0] = float("nan")
        return super().training_step(batch, batch_idx)


class SpoiltByTheLastStep(Module):
    """The losses of the second epoch are all finite; its last step makes a weight infinite."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) == (1, 4):
            with torch.no_grad():
                self.model.conv.weight[0, 0, 0, 0] = float("inf")


@pytest.mark.parametrize("module", [NanLater, SpoiltByTheLastStep])
def test_nan_stops_and_the_last_good_state_stays(module, tmp_path):
    small_fit(out=tmp_path / "good", epochs=3)
    with pytest.raises(Diverged) as raised:
        small_fit(out=tmp_path / "bad", module=module)
    kept = weights(tmp_path / "bad")
    assert all(t.isfinite().all() for t in kept.values() if t.is_floating_point())
    assert torch.load(tmp_path / "bad" / "last.ckpt", weights_only=True)["epoch"] == 0
    if module is NanLater:
        told = str(raised.value)
        assert "the loss is nan in epoch 2, batch 4" in told
        named = re.findall(r"digit (\d+)", told)
        assert len(named) == 8
        assert "and 8 more" in told
    else:
        assert "after epoch 2 conv.weight has NaN or infinity" in str(raised.value)
        assert "what epoch 1 left is kept" in str(raised.value)
    # It can be resumed, and without the fault ends as if nothing had been.
    small_fit(out=tmp_path / "bad", resume=True)
    good, bad = weights(tmp_path / "good"), weights(tmp_path / "bad")
    assert all(torch.equal(bad[name], t) for name, t in good.items())


def test_the_images_that_are_named_are_the_batch_s():
    """In the order that follows from (seed, epoch)."""
    with pytest.raises(Diverged) as raised:
        small_fit(module=NanLater, validation=0, batch=5, count=40)
    sampler = EpochSampler(range(40), seed=0, batch=5, shuffle=True)
    sampler.set_epoch(1)
    assert ", ".join(f"digit {i}" for i in [*sampler][3]) in str(raised.value)


class Sends(Module):
    """Gets a signal in the second epoch."""

    number = signal.SIGINT

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if (self.current_epoch, batch_idx) == (1, 2):
            os.kill(os.getpid(), self.number)
        return super().training_step(batch, batch_idx)


class SendsTerm(Sends):
    number = signal.SIGTERM


@pytest.mark.parametrize("module", [Sends, SendsTerm])
def test_a_signal_ends_with_the_last_state_saved(module, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"training was ended in epoch 2 of 3; .* keeps the epochs before") as raised:
        small_fit(out=tmp_path / "ended", module=module)
    assert raised.value.number == module.number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    small_fit(out=tmp_path / "ended", resume=True)
    small_fit(out=tmp_path / "whole")
    ended, whole = weights(tmp_path / "ended"), weights(tmp_path / "whole")
    assert all(torch.equal(ended[name], t) for name, t in whole.items())


def test_a_caller_s_own_handler_of_sigterm_counts(tmp_path):
    """As the commands have it: it raises a KeyboardInterrupt."""

    def terminate(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(Interrupted, match="nothing is saved") as raised:
            small_fit(module=SendsTerm)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert raised.value.number == signal.SIGTERM


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "metrics.csv", "last.ckpt"])
def test_a_full_disk_leaves_the_last_good_state(name, tmp_path, monkeypatch):
    """The disk is full in the middle of a file of the second epoch."""
    counted = {name: 0}

    def sync(descriptor: int) -> None:
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if file.name == name + saving.ASIDE:
            counted[name] += 1
            if counted[name] == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    small_fit(out=tmp_path / "whole", lr=1e-3)
    monkeypatch.setattr(saving.os, "fsync", sync)
    with pytest.raises(OSError, match="epoch 2 could not be saved: No space left on device; what epoch 1 left is kept"):
        small_fit(out=tmp_path / "full", lr=1e-3)
    assert not [file.name for file in (tmp_path / "full").iterdir() if file.name.endswith(saving.ASIDE)]
    assert torch.load(tmp_path / "full" / "last.ckpt", weights_only=True)["epoch"] == 0
    monkeypatch.undo()
    small_fit(out=tmp_path / "full", lr=1e-3, resume=True)
    full, whole = weights(tmp_path / "full"), weights(tmp_path / "whole")
    assert all(torch.equal(full[key], t) for key, t in whole.items())


def test_the_random_numbers_of_the_caller_are_kept():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    small_fit(epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
