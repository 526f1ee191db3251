"""How the learning rate changes from batch to batch."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

SCHEDULES = ("one-cycle", "cosine")
WARM_UP = 0.05  # of all steps, before a cosine
FIRST = 0.01  # of the learning rate, at the first step of a warm-up


def make_schedule(name: str, optimizer: Optimizer, steps: int) -> LRScheduler:
    """A schedule over `steps` batches, whose highest learning rates are those that `optimizer` has; it is stepped after
    each batch.

    "one-cycle" (Smith and Topin 2018) rises over 0.3 of the steps from a 25th, falls to nearly nothing, and moves the
    momentum the other way; "cosine" rises linearly over 0.05 of them, then follows half a cosine to nothing
    (Loshchilov and Hutter 2017).
    """
    # A cycle has two phases, each with a step to end at: with fewer steps it would divide by zero.
    steps = max(steps, 4)
    if name == "one-cycle":
        return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps)
    if name == "cosine":
        rising = max(1, round(WARM_UP * steps))
        warm_up = LinearLR(optimizer, FIRST, total_iters=rising)
        return SequentialLR(optimizer, [warm_up, CosineAnnealingLR(optimizer, steps - rising)], milestones=[rising])
    raise ValueError(f"schedule {name!r} is none of {', '.join(SCHEDULES)}")
