"""A task is a job and the providers that are to do it. Models come in the order in which they are asked for, then
residual blocks and then layers, each by what they cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..measuring.machine import Machine, Peaks
from ..measuring.rotation import copies_for
from .gate import Expected, expect
from .graph import graph_of
from .job import STEP, Job, plain
from .providers import Provider
from .roofline import OPERATORS, Work, levels
from .rows import BLOCK, LAYER, LEFT_OUT, MODEL, BenchRow
from .shapes import BlockShape, LayerShape, blocks, layers


def work_of(job: Job) -> dict[str, Work]:
    """The work of a job at every level of fusion; empty for a model that does not run on meta tensors."""
    try:
        return levels(graph_of(job.model, job.shapes, job.dtype, job.mode))
    except Exception:  # whatever a foreign forward raises on meta tensors
        return {}


@dataclass(frozen=True)
class Task:
    """A job, and the providers that are to do it. work: at every level of fusion. kind, count: as a row has them."""

    job: Job
    providers: Sequence[Provider]
    work: dict[str, Work]
    kind: str = MODEL
    count: int = 1

    def __str__(self) -> str:
        return f"{self.job.name}, {self.job.mode}, batch {self.job.batch}"

    def expected(self, job: Job) -> Expected:
        """What is right for this job, which is its own but for the numbers."""
        return expect(job)

    def level_of(self, provider: Provider) -> str:
        """The level of fusion by which a provider is measured."""
        fuses = self.kind != LAYER and (not provider.ours or self.job.device.type == "cuda")
        return provider.level if fuses and provider.level in self.work else OPERATORS

    def seconds(self, peaks: Peaks) -> float:
        """The least seconds that its network spends in the layer: computed by the roofline, not measured."""
        return self.count * self.work[OPERATORS].seconds(peaks)

    def row(self, provider: Provider, machine: Machine, peaks: Peaks, **found: object) -> BenchRow:
        """A row of what is known without measuring. found: the rest, by the names that a row has for it."""
        job, level = self.job, self.level_of(provider)
        done = self.work.get(level)
        return BenchRow(
            kind=self.kind,
            subject=job.name,
            provider=provider.name,
            baseline=provider.baseline,
            ours=provider.ours,
            mode=job.mode,
            dtype=job.precision,
            layout=provider.layout,
            batch=job.batch,
            input=job.input,
            machine=machine,
            peaks=peaks,
            count=self.count,
            flops=done.flops if done else None,
            bytes=done.bytes if done else None,
            level=level if done else "",
            ceilings={name: each.seconds(peaks) for name, each in self.work.items()},
            **found,  # pyright: ignore[reportArgumentType]
        )

    def left_out(self, machine: Machine, peaks: Peaks, reason: str) -> list[BenchRow]:
        """For each provider a row that was left out."""
        return [self.row(provider, machine, peaks, status=LEFT_OUT, reason=reason) for provider in self.providers]


def model_task(job: Job, providers: Sequence[Provider]) -> Task:
    return Task(job, providers, work_of(job))


def layer_task(
    layer: LayerShape, batch: int, mode: str, dtype: torch.dtype, device: torch.device, providers: Sequence[Provider]
) -> Task:
    """A task of a single layer, with so many sets of buffers that the last-level cache does not hold them all."""
    job = Job(str(layer), layer.module, ((batch, layer.C, layer.size, layer.size),), mode, dtype, device)
    work = work_of(job)
    return Task(replace(job, copies=copies_for(work[OPERATORS].bytes, device)), providers, work, LAYER, layer.count)


def layer_tasks(
    batches: Sequence[int], dtype: torch.dtype, device: torch.device, providers: Sequence[Provider]
) -> Iterator[Task]:
    """A task for every layer in each of its modes."""
    for batch in batches:
        for layer in layers():
            for mode in layer.modes:
                yield layer_task(layer, batch, mode, dtype, device, providers)


def block_task(
    block: BlockShape, batch: int, dtype: torch.dtype, device: torch.device, providers: Sequence[Provider]
) -> Task:
    """A task of a residual block, which is trained: PyTorch's modules of it, and what cnnfast makes of them."""
    shapes = ((batch, block.C, block.size, block.size),)
    job = Job(str(block), plain(block.module.train()), shapes, STEP, dtype, device, original=block.module)
    work = work_of(job)
    return Task(replace(job, copies=copies_for(work[OPERATORS].bytes, device)), providers, work, BLOCK, block.count)


def block_tasks(
    batches: Sequence[int], dtype: torch.dtype, device: torch.device, providers: Sequence[Provider]
) -> Iterator[Task]:
    """A task for every block."""
    for batch in batches:
        for block in blocks():
            yield block_task(block, batch, dtype, device, providers)


def in_order(tasks: Sequence[Task], peaks: Peaks) -> list[Task]:
    """What matters most first: the models as they come, then the blocks and then the layers, of both the one in which
    its network spends most first.
    """

    def place(task: Task) -> tuple[int, float]:
        kind = {BLOCK: 1, LAYER: 2}.get(task.kind, 0)
        return kind, -task.seconds(peaks) if kind else 0.0

    return sorted(tasks, key=place)
