"""Training by several processes, each with a share of every batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import TimeoutExpired
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cnnfast.nn as cnn


class DataParallel(DistributedDataParallel):
    """PyTorch refuses synchronised batch norms on a CPU, where it has none; ours work there."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        norms = [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]
        if not all(isinstance(m, cnn.SyncBatchNorm) for m in norms):
            super()._passing_sync_batchnorm_handle(module)


class RankStrategy(DDPStrategy):
    """lightning's, with DataParallel in training alone. In validation processes may have different numbers of batches,
    so nothing may be exchanged with each: the first process's buffers are sent to the others once before.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        return DataParallel(module=model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*args, **kwargs)


def rank() -> int:
    """Which of the processes that train or evaluate together this is: that of torch.distributed, or, before it connects
    them, as who has started them tells.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return vars(rank_zero_only).get("rank", 0)


def is_first() -> bool:
    """Whether this is the process that tells and writes what is the same in all of them."""
    return rank() == 0


class ProcessEnded(RuntimeError):
    """Another process that trains with this one has ended, and itself told why."""


def end_launched(trainer: Trainer, error: BaseException) -> None:
    """After an error: ends the processes that lightning has started for this one, which would wait for it for ever.

    Raises ProcessEnded from the error where it comes of one that has ended before.
    """
    started: list[Any] = [*getattr(trainer.strategy.launcher, "procs", [])]
    # A thread of lightning's looks at them every five seconds, and kills this process where one has failed.
    getattr(trainer.strategy.launcher, "procs", []).clear()
    lost = isinstance(error, dist.DistBackendError) or "gloo" in str(error)  # gloo's errors have no class
    ended = [process for process in started if lost and _ends(process)]
    for process in started:
        process.kill()
        process.wait()
    if ended:
        raise ProcessEnded(f"one of the processes ended, with exit code {ended[0].returncode}") from error


def _ends(process: Any) -> bool:
    """Whether a process has ended with an error, or is about to: its connections are closed a moment before."""
    try:
        return bool(process.wait(timeout=20))
    except TimeoutExpired:
        return False


@contextmanager
def connected() -> Iterator[torch.device]:
    """The device of this process: its GPU, or the CPU. Under torchrun all that it started are connected while the
    context lasts.
    """
    elastic = TorchElasticEnvironment
    local = elastic().local_rank() if elastic.detect() else 0
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if not elastic.detect():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def share_buffers(module: nn.Module) -> None:
    """All processes get the first one's buffers, as DistributedDataParallel does it before each forward in training."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
