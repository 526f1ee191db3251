"""`cnnfast bench`: a model, or single layers, against the strongest baselines that this machine has."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..dtypes import TF32, dtype_of
from .target import DTYPE_HELP, INPUT_HELP, MODEL_HELP, input_shape, parse_dtype, parse_shape, resolve_module

if TYPE_CHECKING:
    import torch

    from ..bench.job import Job
    from ..bench.providers import Provider
    from ..bench.rows import Row

MODES = ("infer", "train")
STANDARD = "resnet50"
# By device: images a step of the standard set.
BATCHES = {"cuda": {"infer": [1, 8, 32, 256], "train": [32, 256], "layers": [64]}, "cpu": {"infer": [1], "train": [2], "layers": [1]}}
LAYER_PROVIDERS = {"cuda": ("eager-graph", "cudnn-graph", "nchw", "cnnfast-graph", "cnnfast-kernels"), "cpu": ("eager", "nchw", "cnnfast")}


def bench(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default="the standard set, of ResNet-50")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Single layers of ResNet-50 and MobileNetV2 instead of a model.")] = False,
    mode: Annotated[str, typer.Option(help="infer, train, or infer,train.", show_default="infer")] = "",
    batch: Annotated[str, typer.Option(help="Images a step, as 1,8,32,256.", show_default="by device")] = "",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP, show_default="bf16 on a GPU, fp32 on a CPU")] = "",
    shapes: Annotated[
        list[str] | None,
        typer.Option("--input", help=INPUT_HELP + " --batch replaces its first size.", show_default="what the model is made for, or 224"),
    ] = None,
    provider: Annotated[list[str] | None, typer.Option(help="Only this one; repeat for several.", show_default="all")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of timing, for each provider and job.")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Folder for pictures: roofline, layers, images a second.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Measure nothing: compare two files of --json, the earlier first.", metavar="A B")
    ] = None,
) -> None:
    """Measure MODEL in eval or training against the strongest baselines: what is lost comes first.

    Baselines are PyTorch in channels_last with cudnn.benchmark, the same as a CUDA graph, torch.compile, cuDNN's fused convolutions and
    JAX, as far as this machine has them; what did not run is listed with the reason. Before it is timed, every one is checked against
    float64 (dropout is off for that): wrong numbers get no time. All take turns in every round. Beside each time stands what the machine
    allows, by its bandwidth and matrix rate, measured in the same run.

    Without MODEL the standard set runs: ResNet-50 in eval and in training, and --layers. Without a GPU PyTorch serves every call, so
    that ratios show what conversion costs. `--compare A B` ends with exit code 1 if something became slower or wrong.
    """
    if compare is not None:
        raise typer.Exit(_compare(*compare))
    if layers and (model or mode or shapes):
        raise typer.BadParameter("single layers have their own sizes and modes: leave out MODEL, --mode and --input", param_hint="--layers")
    modes = _modes(mode)
    batches = _batches(batch)
    sizes = [parse_shape(shape) for shape in shapes or []]
    name = parse_dtype(dtype) if dtype else ""
    if pictures is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter('pictures need matplotlib: pip install ".[demo]"', param_hint="--pictures")

    import torch
    from rich.console import Console

    from ..bench.report import report
    from ..bench.running import one_thread
    from ..precision import float32_products

    torch.manual_seed(0)  # the same parameters every time
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if name == TF32 and device.type == "cpu":
        raise typer.BadParameter("tf32 needs a GPU: on a CPU PyTorch, which serves every call there, rounds nothing", param_hint="--dtype")
    precision = dtype_of(name)
    chosen = _providers(provider or [], device, layers)

    jobs: list[tuple[str, Callable[..., list[Row]]]] = []
    if not layers:
        jobs += _model_jobs(model or STANDARD, modes or (MODES if model is None else MODES[:1]), batches, sizes, precision, device, chosen)
    if layers or (model is None and not modes and not sizes):
        jobs += _layer_jobs(batches, precision, device, _providers(provider or [], device, True), seconds)
    if precision == torch.float32:
        torch.backends.cudnn.allow_tf32 = name == TF32  # torch.compile still reads this older setting, which must not contradict
    with one_thread(device), float32_products("tf32" if name == TF32 else "ieee") if precision == torch.float32 else nullcontext():
        rows = _run(jobs, device, precision, seconds, json_file)
    console = Console()
    console.print(report(rows, console.width))
    if pictures is not None:
        from ..bench.pictures import draw

        for file in draw(rows, pictures):
            console.print(f"picture: {file}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if any(row.status == "wrong" for row in rows) else 0)


def _compare(before: Path, after: Path) -> int:
    """Prints the comparison; returns the exit code."""
    from rich.console import Console

    from ..bench.compare import compare, comparison, regressed
    from ..bench.rows import read

    try:
        runs = [read(file) for file in (before, after)]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from None
    changes = compare(*runs)
    if not changes:
        raise typer.BadParameter(f"{before} and {after} have no provider and job in common", param_hint="--compare")
    Console().print(comparison(changes))
    return 1 if regressed(changes) else 0


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(filter(None, text.split(",")))
    if wrong := [mode for mode in modes if mode not in MODES]:
        raise typer.BadParameter(f"{wrong[0]!r} is neither infer nor train", param_hint="--mode")
    return modes


def _batches(text: str) -> list[int]:
    sizes = text.split(",") if text else []
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"{text!r}: write positive sizes with commas between them, as in 1,8,32", param_hint="--batch")
    return list(map(int, sizes))


def _providers(names: list[str], device: torch.device, layers: bool) -> list[Provider]:
    from ..bench.providers import EAGER, PROVIDERS

    if wrong := [name for name in names if name not in PROVIDERS]:
        raise typer.BadParameter(f"{wrong[0]!r} is none of {', '.join(PROVIDERS)}", param_hint="--provider")
    if names:
        return [PROVIDERS[name] for name in names]
    if layers:
        return [PROVIDERS[name] for name in LAYER_PROVIDERS[device.type]]
    slow = "takes minutes on a CPU, ask by --provider"
    return [replace(p, skipped=slow) if device.type == "cpu" and p.how != EAGER else p for p in PROVIDERS.values()]


def _model_jobs(
    text: str, modes: tuple[str, ...], batches: list[int], sizes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device,
    providers: list[Provider],
) -> Iterator[tuple[str, Callable[..., list[Row]]]]:  # fmt: skip

    from ..bench.job import Job, plain, without_dropout
    from ..bench.running import run

    target, module = resolve_module(text)
    module = without_dropout(module.float().cpu())
    given = sizes or [input_shape(module, 1, small=False)]
    for mode in modes:
        try:
            baseline = plain(module.train(mode == "train"))
        except Exception as error:  # conversion and tracing run the model's own code
            raise typer.BadParameter(f"{text} cannot be had without cnnfast, as a baseline: {error}", param_hint="MODEL") from None
        for batch in batches or ([sizes[0][0]] if sizes else BATCHES[device.type][mode]):
            shapes = tuple((batch, *size[1:]) for size in given)
            job = Job(target.name, baseline, shapes, mode, dtype, device, original=module)
            yield f"{job.name}, {mode}, batch {batch}", _of_model(run, job, providers, text)


def _of_model(run: Callable[..., list[Row]], job: Job, providers: list[Provider], text: str) -> Callable[..., list[Row]]:
    def measure(*arguments: Any, **options: Any) -> list[Row]:
        job.original.train(job.mode == "train") if job.original is not None else None
        try:
            return run(job, providers, *arguments, **options)
        except (RuntimeError, TypeError, ValueError) as error:  # above all: an input that the model does not take
            given = " ".join("x".join(map(str, shape)) for shape in job.shapes)
            raise typer.BadParameter(f"{text} with inputs {given}: {type(error).__name__}: {error}") from None

    return measure


def _layer_jobs(
    batches: list[int], dtype: torch.dtype, device: torch.device, providers: list[Provider], seconds: float
) -> Iterator[tuple[str, Callable[..., list[Row]]]]:
    from functools import partial

    from ..bench.running import run_layer
    from ..bench.shapes import layers

    for batch in batches or BATCHES[device.type]["layers"]:
        for layer in layers():
            for mode in layer.modes:
                yield f"{layer}, {mode}", partial(run_layer, layer, batch, mode, dtype, device, providers)


def _run(
    jobs: list[tuple[str, Callable[..., list[Row]]]], device: torch.device, dtype: torch.dtype, seconds: float, json_file: Path | None
) -> list[Row]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..bench.rows import write
    from ..measuring.machine import measure_peaks, this_machine

    rows: list[Row] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task("the machine itself", total=len(jobs))
        machine, peaks = this_machine(device), measure_peaks(device, dtype)
        for name, job in jobs:
            rows += job(machine, peaks, budget=seconds, tell=lambda text, name=name: bars.update(bar, description=f"{name}: {text}"))
            bars.advance(bar)
            if json_file is not None:  # after every job: a run of hours may be cut short
                write(rows, json_file)
    return rows
