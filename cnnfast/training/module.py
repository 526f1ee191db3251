"""The lightning module that a network is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import cnnfast.nn as cnn

from ..targets.inputs import first_features
from .frozen_parts import freeze, keep_still
from .losses import BatchPlace, LossWatch, cross_entropy
from .optimizing import learning_rate, make_optimizer
from .ranks import share_buffers
from .schedule import make_schedule


class Module(lightning.LightningModule):
    """Trains `model`, which makes of images [N, C, P, Q] logits [N, K], on batches as `cnnfast.training.loader` makes
    them: `images` as functional.augment takes them, `labels` int64 [N], `index` int64 [N]. Subclass it to change a
    step, the optimizer or what is logged, and hand the class to `fit(..., module=...)`, or train it with a Trainer of
    your own.

    classes: the names of the K classes, or K. augment: draws and applies the augmentation in training; in validation
    its eval() resizes and crops. optimizer: "adamw", "adam", or "sgd" with Nesterov's momentum. lr: the highest of the
    schedule; None: 4e-3, or for sgd 0.1, as fit has it. schedule: "one-cycle" or "cosine", both by the batch.
    label_smoothing: losses.cross_entropy's, as class_weights [K] are. frozen: names of parts that are not trained, or
    "backbone" for all but the head: they are in eval whatever train() says, and nothing of them is saved for backward.
    channels_last: the layout of the images that the model is given.

    Logs loss, accuracy, validation_loss and validation_accuracy, each the mean over the images of an epoch, whatever
    the batches and the processes they came in. Raises losses.Diverged when a loss is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: Sequence[str] | int,
        augment: cnn.Augment,
        optimizer: str = "adamw",
        lr: float | None = None,
        weight_decay: float = 0.01,
        schedule: str = "one-cycle",
        label_smoothing: float = 0.1,
        class_weights: Tensor | None = None,
        frozen: Sequence[str] = (),
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        count = classes if isinstance(classes, int) else len(classes)
        self.model, self.augment = model, augment
        self.classes = tuple(map(str, range(count))) if isinstance(classes, int) else tuple(classes)
        self.optimizer, self.lr = optimizer, learning_rate(optimizer, lr)
        self.weight_decay, self.schedule = weight_decay, schedule
        self.label_smoothing, self.channels_last = label_smoothing, channels_last
        self.register_buffer("class_weights", class_weights, persistent=False)
        device = next((p.device for p in model.parameters()), None)
        features = first_features(model)
        channels = len(augment.mean) if features is None else features[0]
        self._still = freeze(model, frozen, torch.zeros(2, channels, *augment.size, device=device))
        self.watch = LossWatch()
        self.losses = nn.ModuleDict({name: MeanMetric() for name in ("loss", "validation_loss")})
        accuracies = ("accuracy", "validation_accuracy")
        self.accuracies = nn.ModuleDict({name: MulticlassAccuracy(count, average="micro") for name in accuracies})
        self.train()

    def train(self, mode: bool = True) -> Module:
        super().train(mode)
        keep_still(self._still)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] of normalised images [N, C, P, Q]."""
        # Images of a single channel are in both layouts at once: a copy has the strides of the one that is meant.
        return self.model(images if self.channels_last else images.clone(memory_format=torch.contiguous_format))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = self.augment(batch.images, batch.labels, index=batch.index, epoch=self.current_epoch)
        logits = self(images)
        loss = cross_entropy(logits, labels, self._class_weights, self.label_smoothing)
        self.watch.note(loss, BatchPlace(self.current_epoch, batch_idx, batch.index))
        self._log("", loss, logits, labels)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Without smoothing, and each image counts alike."""
        images = self.augment(batch.images, index=batch.index)
        logits = self(images)
        self._log("validation_", cross_entropy(logits, batch.labels), logits, batch.labels)

    def on_train_epoch_end(self) -> None:
        self.watch.settle()

    def on_validation_epoch_start(self) -> None:
        share_buffers(self)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.optimizer, self.model, self.lr, self.weight_decay)
        schedule = make_schedule(self.schedule, optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _class_weights(self) -> Tensor | None:
        return cast("Tensor | None", self.class_weights)

    def _log(self, prefix: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        hard = labels if labels.dim() == 1 else labels.argmax(1)
        losses = cast("MeanMetric", self.losses[prefix + "loss"])
        accuracies = cast("MulticlassAccuracy", self.accuracies[prefix + "accuracy"])
        losses.update(loss.detach(), weight=len(logits))
        accuracies.update(logits.detach(), hard)
        for name, metric in (("loss", losses), ("accuracy", accuracies)):
            self.log(prefix + name, metric, on_step=False, on_epoch=True, batch_size=len(logits))
