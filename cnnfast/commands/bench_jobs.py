"""What `cnnfast bench` is to do: its jobs, by whom, and how long that takes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..located import located
from ..modes import INFER, MODES, TRAIN
from ..spelling import did_you_mean
from . import options
from .console import about, refused_by

if TYPE_CHECKING:
    import torch

    from ..bench.providers import Provider
    from ..bench.task import Task
    from ..engine import Frozen

# Images of each step of the standard set, by device.
BATCHES = {
    "cuda": {INFER: [1, 8, 32, 256], TRAIN: [32, 256], "layers": [64]},
    "cpu": {INFER: [1], TRAIN: [2], "layers": [1]},
}
LAYER_PROVIDERS = {
    "cuda": ("eager-graph", "nchw", "cnnfast-graph", "cnnfast-kernels"),
    "cpu": ("eager", "nchw", "cnnfast"),
}
BLOCK_PROVIDERS = {
    "cuda": ("eager-graph", "compile", "cnnfast-graph", "cnnfast-kernels"),
    "cpu": ("eager", "cnnfast"),
}
# By whom the network of a file of cnnfast.freeze is run, and by whom a model is only where that is asked for.
OF_A_FILE = ("eager", "frozen", "onnxruntime", "openvino", "compile-freezing")
ENGINES = ("frozen", "onnxruntime", "openvino")


def duration(tasks: Sequence[Task], seconds: float, budget: float | None) -> str:
    """How long it will take, as far as that is known before anything has run: in timing, and at most."""
    timings = sum(not provider.refusal(task.job) for task in tasks for provider in task.providers)
    jobs = f"{len(tasks)} job{'s' * (len(tasks) > 1)} with {timings} providers in all"
    text = f"{jobs}: {about(seconds * timings)} of timing, by an estimate"
    end = "first results, compiled and judged, come on top"
    if budget is None:
        return f"{text}; {end}. --budget SECONDS ends it, and Ctrl-C keeps what is measured."
    return f"{text}; {end}, but --budget ends it after {about(budget)}."


def batches(text: str) -> list[int]:
    sizes = text.split(",") if text else []
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(
            f"{text!r}: write positive sizes with commas between them, as in 1,8,32", param_hint="--batch"
        )
    return list(map(int, sizes))


def refuse_unknown(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"{name!r} is none of {', '.join(known)}{did_you_mean(name, known)}", param_hint="--provider"
            )


def refuse_impossible(names: Sequence[str], device: torch.device, modes: Sequence[str]) -> None:
    """Ends the command before a model is built if a provider that was asked for cannot run here, or in no mode of
    --mode.
    """
    from ..bench.providers import PROVIDERS

    for name in names:
        provider = PROVIDERS[name]
        reason = ""
        if provider.graph and device.type != "cuda":
            reason = "it is a CUDA graph, and there is no GPU here"
        elif name == "jax" and importlib.util.find_spec("jax") is None:
            reason = "jax is not installed: pip install jax"
        elif modes and not set(modes) & set(provider.modes):
            reason = f"it runs only in mode {' and '.join(mode for mode in MODES if mode in provider.modes)}"
        if reason:
            raise typer.BadParameter(f"{name} cannot run: {reason}", param_hint="--provider")


def frozen_in(text: str | None) -> Frozen | None:
    """The network in a file of cnnfast.freeze, or None for any other MODEL."""
    if text is None or Path(text).suffix != ".cnnfast":
        return None
    from ..engine import load

    with refused_by("MODEL", OSError, ValueError):
        return load(text)


def providers(names: Sequence[str], device: torch.device, layers: bool, file: bool = False) -> list[Provider]:
    """file: whether what runs is a file of cnnfast.freeze."""
    from ..bench.providers import EAGER, PROVIDERS

    if names:
        return [PROVIDERS[name] for name in names]
    if file:
        return [PROVIDERS[name] for name in OF_A_FILE]
    if layers:
        return [PROVIDERS[name] for name in LAYER_PROVIDERS[device.type]]
    slow, apart = "takes minutes on a CPU, ask by --provider", "an engine of its own, ask by --provider"
    skipped = {p.name: slow for p in PROVIDERS.values() if p.how != EAGER} if device.type == "cpu" else {}
    skipped |= dict.fromkeys((*ENGINES, "compile-freezing"), apart)
    return [replace(p, skipped=skipped.get(p.name, "")) for p in PROVIDERS.values()]


def single_tasks(names: Sequence[str], batches: list[int], dtype: torch.dtype, device: torch.device) -> Iterator[Task]:
    """Of residual blocks in training, and of single layers. names: of the providers that were asked for."""
    from ..bench.providers import PROVIDERS
    from ..bench.task import block_tasks, layer_tasks

    batches = batches or BATCHES[device.type]["layers"]
    of_blocks = [PROVIDERS[name] for name in names or BLOCK_PROVIDERS[device.type]]
    yield from block_tasks(batches, dtype, device, of_blocks)
    yield from layer_tasks(batches, dtype, device, providers(names, device, True))


def model_tasks(
    text: str,
    modes: tuple[str, ...],
    batches: list[int],
    sizes: list[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    providers: list[Provider],
) -> Iterator[Task]:
    import torch

    from ..bench.job import Job, plain, without_dropout
    from ..bench.task import model_task
    from ..summary import summarize

    target, module = options.module_of(text)
    module = without_dropout(module.float().cpu())
    given = sizes or [options.shape_for(module)]
    with refused_by("--input", RuntimeError):  # now, and not after the machine was measured
        summarize(module, *(torch.empty(size, device="meta") for size in given))
    for mode in modes:
        try:
            baseline = plain(module.train(mode == TRAIN))
        except Exception as error:  # conversion and tracing run the model's own code
            raise typer.BadParameter(
                f"{text} cannot be had without cnnfast, as a baseline: {located(error)}", param_hint="MODEL"
            ) from None
        for batch in batches or ([sizes[0][0]] if sizes else BATCHES[device.type][mode]):
            shapes = tuple((batch, *size[1:]) for size in given)
            yield model_task(Job(target.name, baseline, shapes, mode, dtype, device, original=module), providers)


def file_tasks(
    text: str,
    frozen: Frozen,
    batches: list[int],
    sizes: list[tuple[int, ...]],
    device: torch.device,
    providers: list[Provider],
) -> Iterator[Task]:
    """Inference of a frozen network, on images of the size that it was frozen with unless `sizes` says otherwise."""
    from ..bench.engines import module_of
    from ..bench.job import Job
    from ..bench.task import model_task

    network = frozen.network
    module = module_of(network.graph)
    for batch in batches or ([sizes[0][0]] if sizes else BATCHES[device.type][INFER]):
        shapes = tuple((batch, *size[1:]) for size in sizes or network.example)
        job = Job(Path(text).name, module, shapes, INFER, network.dtype, device, frozen=frozen)
        yield model_task(job, providers)
