"""One of several processes that train together: gloo, on the CPU.

    python -m tests.support.trained_by_ranks RANK WORLD FILE CASE ...

FILE is where the processes meet, and FILE.CASE are the folders of runs. Each case is a function of this module; what
they return is saved in FILE.RANK.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rank, world = sys.argv[1:3]
    # What torchrun says to the processes that it starts.
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "a test"}

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cnnfast
from cnnfast.training import Module, evaluate
from cnnfast.training.preparing import OF_DIGITS, prepare
from tests.support.trainable import SmallNet, few_digits, small_fit, small_net

BATCH = 8  # of each process


class InDouble(nn.Module):
    """In float64, so that sums in another order are told from other sums; nothing is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.net: SmallNet = small_net().double()
        self.net.dropout.p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())


class Recorded(Module):
    """Keeps the first step's gradients and statistics, and which images were validated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        RECORDS.clear()
        RECORDS["validated"] = []
        augment = self.augment.forward
        self.augment.forward = cnnfast.backend("torch")(augment)  # interpreted it would take seconds a batch

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if "gradients" not in RECORDS:
            RECORDS["gradients"] = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            RECORDS["statistics"] = {name: b.clone() for name, b in self.model.named_buffers()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        RECORDS["validated"] += batch.index.tolist()


RECORDS: dict[str, Any] = {}


class Ended(Module):
    """An error in the second epoch, on all processes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch == 1:
            raise RuntimeError("ended on purpose")
        return super().training_step(batch, batch_idx)


def first_step(folder: Path | None = None, **options: Any) -> dict[str, Any]:
    run = small_fit(InDouble(), module=Recorded, epochs=1, out=folder, **options)
    return {**RECORDS, "accuracy": run.accuracy, "loss": run.history[0].loss}


def synchronised(folder: Path) -> dict[str, Any]:
    """By our kernels: PyTorch has no synchronised norm for a CPU."""
    with mock.patch.object(Path, "replace", autospec=True, side_effect=Path.replace) as replaced:
        found = first_step(folder, batch=BATCH, sync_batch_norm=True)
    return found | {"written": [call.args[1].name for call in replaced.call_args_list]}


@cnnfast.backend("torch")
def separate(folder: Path) -> dict[str, Any]:
    return first_step(folder, batch=BATCH)


@cnnfast.backend("torch")
def resumed(folder: Path) -> dict[str, Any]:
    """A run that was ended and went on, and in FILE.resumed.whole one that was not ended."""
    try:
        small_fit(out=folder, batch=BATCH, module=Ended)
    except RuntimeError as error:
        assert str(error) == "ended on purpose"  # noqa: PT017
    small_fit(out=folder, batch=BATCH, resume=True)
    small_fit(out=folder.with_name(folder.name + ".whole"), batch=BATCH)
    return {}


@cnnfast.backend("torch")
def evaluated(folder: Path | None = None) -> dict[str, Any]:
    """On a number of images that is no multiple of the processes'."""
    prepared = prepare(few_digits(101), 0, None, OF_DIGITS, 0)
    found = evaluate(small_net(), prepared.augment, prepared.training.images, batch=BATCH)
    mistakes = [tuple(mistake) for mistake in found.mistakes]
    return {"confusion": found.confusion, "in_top": found.in_top, "mistakes": mistakes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = sys.argv[3]
    patience = timedelta(seconds=120)  # a rank that waits for another in vain fails
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=int(rank), world_size=int(world), timeout=patience
    )
    results = {case: globals()[case](Path(f"{file}.{case}")) for case in sys.argv[4:]}
    torch.save(results, f"{file}.{rank}")
    dist.barrier()
    os._exit(0)  # gloo's threads, which nobody can wait for, now and then abort a process that ends in the usual way
