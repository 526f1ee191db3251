"""lightning's Trainer as `fit` uses it: without files, bars and advice of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from ..dtypes import full_name
from .ranks import RankStrategy
from .saving import WholeFiles

SMALL = 16  # pixels of a side
PRECISIONS = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}
# What lightning remarks on, and is meant here.
REMARKS = (
    ".*does not have many workers.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*GPU available but not used.*",
    ".*have no `val_dataloader`.*",
    ".*lr_scheduler.step.* before .*optimizer.step.*",  # where fp16 leaves the first steps out
)


def precision_of(mixed: str | None, device: str) -> str:
    """lightning's name of a mixed precision, bf16 or fp16 by any of their names; None: float32.

    Raises ValueError for others, and for fp16 on a CPU, where lightning would take bf16 in its place.
    """
    if mixed is None:
        return "32-true"
    precision = PRECISIONS.get(full_name(mixed))
    if precision is None:
        raise ValueError(f"mixed {mixed!r} is none of bf16, fp16")
    if device == "cpu" and precision == "16-mixed":
        raise ValueError("mixed 'fp16' needs a GPU: on a CPU write 'bf16', or leave it out")
    return precision


def make_trainer(
    *,
    epochs: int,
    mixed: str | None,
    devices: int | None,
    nodes: int,
    clip: float | None,
    deterministic: bool,
    callbacks: Sequence[Callback],
) -> Trainer:
    """On all processes that torchrun started, or else on `devices` GPUs (processes on a CPU) of each of `nodes`
    machines. None: one.
    """
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if devices is None:
        devices = TorchElasticEnvironment().world_size() // nodes if TorchElasticEnvironment.detect() else 1
    return Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=RankStrategy() if devices * nodes > 1 else "auto",
        precision=precision_of(mixed, accelerator),  # pyright: ignore[reportArgumentType]
        max_epochs=epochs,
        gradient_clip_val=clip,
        deterministic=deterministic or None,
        callbacks=list(callbacks),
        plugins=[WholeFiles()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_autolog_hparams=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Meanwhile lightning tells of what goes wrong only."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for remark in REMARKS:
            warnings.filterwarnings("ignore", remark)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def few_threads(size: tuple[int, int]) -> Iterator[None]:
    """One thread of PyTorch's meanwhile, for images so small that more of them wait for one another longer than they
    compute: much longer where other programs run.
    """
    threads = torch.get_num_threads()
    if max(size) <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def settings_kept() -> Iterator[None]:
    """What lightning sets for the whole process when it is asked to be deterministic is afterwards as it was."""
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
