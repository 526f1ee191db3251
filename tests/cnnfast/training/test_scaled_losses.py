"""fp16 with a scaled loss: a step with infinite gradients is left out, and the scale halved, which is no divergence.

lightning does that on a GPU alone. PyTorch's scaler works on a CPU too, and is put into lightning's trainer here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cnnfast.training import Diverged, Module, trainers
from cnnfast.training.batches import EpochSampler
from tests.support.trainable import small_fit, weights

BATCHES = 5  # of an epoch


class Watched(Module):
    """Keeps each loss, and a weight before it."""

    seen: list[tuple[float, Tensor]]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen.append((loss.item(), self.model.fc.weight.detach().clone()))
        return loss


class Overflows(Module):
    """In the fourth batch of the second epoch the network's results are more than float16 holds."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits.half() * 6e4 * 6e4 if self.training and self.trainer.global_step == BATCHES + 3 else logits


class GradientsAreNoNumbers(Module):
    """Losses are finite."""

    def on_train_start(self) -> None:
        self.model.fc.weight.register_hook(lambda gradient: gradient * float("nan"))


@pytest.fixture
def begin_with(monkeypatch) -> Callable[[float], None]:
    """Lets `fit` train in float16, by a scaler that begins with this scale."""

    from lightning.pytorch.plugins import MixedPrecision  # after cnnfast.training, which makes it importable

    def begin(scale: float) -> None:
        real = trainers.Trainer

        def trainer(**options: Any) -> Any:
            half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
            return real(**options | {"precision": None, "plugins": [*options["plugins"], half]})

        monkeypatch.setattr(trainers, "Trainer", trainer)

    return begin


def test_steps_that_are_left_out_are_no_divergence(begin_with):
    begin_with(2.0**22)
    Watched.seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a schedule that goes on before the optimizer does
        run = small_fit(module=Watched)
    losses = [loss for loss, _ in Watched.seen]
    assert all(0 < loss < 20 for loss in losses)  # as they are, without the scale
    assert run.history[0].loss == pytest.approx(sum(losses[:BATCHES]) / BATCHES)
    same = [torch.equal(one, other) for (_, one), (_, other) in zip(Watched.seen, Watched.seen[1:], strict=False)]
    assert same[0]
    assert same == sorted(same, reverse=True)
    assert not same[-1]


def test_a_run_goes_on_with_its_scale(begin_with, tmp_path):
    """It would else leave out the steps of the beginning again."""

    class Ended(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.current_epoch == 2:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    begin_with(2.0**20)
    Watched.seen = []
    with pytest.raises(ZeroDivisionError):
        small_fit(out=tmp_path / "ended", module=Ended)
    small_fit(out=tmp_path / "ended", resume=True)
    small_fit(out=tmp_path / "whole")
    ended, whole = weights(tmp_path / "ended"), weights(tmp_path / "whole")
    assert all(torch.equal(ended[name], t) for name, t in whole.items())


def test_a_loss_that_is_no_number_stops_whatever_the_scale(begin_with, tmp_path):
    begin_with(2.0**10)
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) in epoch 2, batch 4, of ") as raised:
        small_fit(out=tmp_path, module=Overflows, validation=0, batch=8, count=8 * BATCHES)
    sampler = EpochSampler(range(8 * BATCHES), seed=0, batch=8, shuffle=True)
    sampler.set_epoch(1)
    assert ", ".join(f"digit {i}" for i in [*sampler][3]) in str(raised.value)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0


def test_steps_that_are_always_left_out_are_told(begin_with, tmp_path):
    begin_with(2.0)
    with pytest.raises(Diverged, match=r"^in epoch 1 gradients were not finite, though the loss was scaled by 0\.0"):
        small_fit(out=tmp_path, module=GradientsAreNoNumbers)
    assert not (tmp_path / "last.ckpt").exists()
