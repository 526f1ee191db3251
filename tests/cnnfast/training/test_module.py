"""The LightningModule, without fit: by a Trainer of one's own, and subclassed."""

from __future__ import annotations

import pytest
import torch

from cnnfast.nn import Augment
from cnnfast.training import Module, loader
from cnnfast.training.optimizing import LEARNING_RATES, make_optimizer
from tests.support.trainable import few_digits, small_net

GREY = {"mean": 0.5, "std": 0.5, "crop_scale": None, "resize_size": 8}


class Norms(Module):
    """Logs one thing more."""

    def on_before_optimizer_step(self, optimizer) -> None:
        gradients = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        self.log("gradient", torch.stack(gradients).norm())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_trainer_of_one_s_own():
    from lightning import Trainer  # which needs what cnnfast.training has done for torchvision

    images, model = few_digits(80), small_net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    module = Norms(model, classes=10, augment=Augment(8, **GREY), optimizer="sgd", schedule="cosine")
    trainer = Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    learnt, held_out = (
        loader(images, range(64), batch=16, shuffle=True),
        loader(images.resized(8), range(64, 80), batch=8),
    )
    trainer.fit(module, learnt, held_out)
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert seen.keys() == {"loss", "accuracy", "validation_loss", "validation_accuracy", "gradient"}
    assert round(seen["validation_accuracy"] * 16, 4) in range(17)
    assert seen["gradient"] > 0
    assert trainer.global_step == 8
    assert not any(torch.equal(p.detach().cpu(), before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_a_learning_rate_that_is_not_given_suits_the_optimizer(name):
    module = Module(small_net(), classes=10, augment=Augment(8, **GREY), optimizer=name)
    assert module.lr == LEARNING_RATES[name]
    assert make_optimizer(name, module.model, None, 0.0).param_groups[0]["lr"] == module.lr
    given = Module(small_net(), classes=10, augment=Augment(8, **GREY), optimizer=name, lr=0.25)
    assert given.lr == 0.25


def test_an_optimizer_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="optimizer 'adamm' is none of adam, adamw, sgd"):
        Module(small_net(), classes=10, augment=Augment(8, **GREY), optimizer="adamm")
