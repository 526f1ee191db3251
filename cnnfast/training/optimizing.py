"""The optimizer of a network, and which of its parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

# Each with the highest learning rate of a schedule that suits random weights.
LEARNING_RATES = {"adam": 4e-3, "adamw": 4e-3, "sgd": 0.1}
OPTIMIZERS = tuple(LEARNING_RATES)
MOMENTUM = 0.9  # of sgd, which is Nesterov's


def learning_rate(optimizer: str, given: float | None = None) -> float:
    """`given`, or if that is None the one that suits random weights. Raises ValueError for an optimizer that there is
    not.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    return LEARNING_RATES[optimizer] if given is None else given


def make_optimizer(name: str, model: nn.Module, lr: float | None, weight_decay: float) -> Optimizer:
    """An optimizer of the parameters that require gradients. What has one axis does not decay: biases and the weights
    of norms, which set scales rather than fit data. lr: learning_rate's `given`.

    Raises ValueError where nothing is left to train, and for an optimizer that there is not.
    """
    lr = learning_rate(name, lr)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient: frozen names all that the model has")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adam":
        return Adam(groups, lr)
    if name == "adamw":
        return AdamW(groups, lr)
    return SGD(groups, lr, momentum=MOMENTUM, nesterov=True)
