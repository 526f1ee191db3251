"""`cnnfast bench`: a model, or single layers, against the strongest baselines that this machine has."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..dtypes import TF32, dtype_of
from .console import (
    DTYPE_HELP,
    INPUT_DEFAULT,
    INPUT_HELP,
    MODEL_HELP,
    MODES,
    SECONDS_HELP,
    STANDARD_OUTPUT,
    BudgetSeconds,
    JsonFile,
    dtype_named,
    exit_code,
    interruptible,
    modes_of,
    module_of,
    printer,
    progress,
    refuse_no_time,
    refuse_unwritable,
    refused_by,
    shape_for,
    sizes_of,
    write_text,
)

if TYPE_CHECKING:
    import torch

    from ..bench.providers import Provider
    from ..bench.series import Series
    from ..bench.task import Task
    from ..measuring.budget import Budget

STANDARD = "resnet50"
# Images of each step of the standard set, by device.
BATCHES = {
    "cuda": {"infer": [1, 8, 32, 256], "train": [32, 256], "layers": [64]},
    "cpu": {"infer": [1], "train": [2], "layers": [1]},
}
LAYER_PROVIDERS = {
    "cuda": ("eager-graph", "nchw", "cnnfast-graph", "cnnfast-kernels"),
    "cpu": ("eager", "nchw", "cnnfast"),
}


def bench(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default="the standard set, of ResNet-50")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Single layers of ResNet-50 and MobileNetV2 instead of a model.")
    ] = False,
    mode: Annotated[str, typer.Option(help="infer, train, or infer,train.", show_default="infer")] = "",
    batch: Annotated[str, typer.Option(help="Images a step, as 1,8,32,256.", show_default="by device")] = "",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP, show_default="bf16 on a GPU, fp32 on a CPU")] = "",
    shapes: Annotated[
        list[str] | None,
        typer.Option("--input", help=f"{INPUT_HELP} --batch replaces its first size.", show_default=INPUT_DEFAULT),
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Only this one; repeat for several.", show_default="all")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help=f"{SECONDS_HELP} Each provider has one in each job.")] = 1.0,
    budget: BudgetSeconds = None,
    json_file: JsonFile = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for pictures: roofline, layers, images a second.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Measure nothing: compare two files of --json, the earlier first.", metavar="A B"),
    ] = None,
) -> None:
    """Measure MODEL in eval or training against the strongest baselines; losses are listed first.

    Baselines are PyTorch in channels_last with cudnn.benchmark, the same as a CUDA graph, torch.compile, cuDNN's fused
    convolutions and JAX, as far as this machine has them; what did not run is listed with the reason. Each is checked
    against float64 before it is timed (dropout is off for that), and one that computes wrong numbers is not timed. All
    take turns in every round. Beside each time stands what the machine allows, by its bandwidth and matrix rate, which
    are measured in the same run.

    Without MODEL the standard set runs: ResNet-50 in eval and in training, and --layers. Without a GPU PyTorch serves
    every call, so that ratios show what conversion costs. `--compare A B` ends with exit code 1 if something became
    slower or wrong.

    The file of --json is written after every result. Ctrl-C and SIGTERM end the run with a report of what it has, and
    exit code 130 or 143. A --budget counts from the start, compilation included. Models come before layers, and those
    that compute or move most come first. A measurement that has begun is finished: a provider that compiles for a
    minute may exceed the budget by that minute.
    """
    if compare is not None:
        raise typer.Exit(_compare(*compare))
    if layers and (model or mode or shapes):
        raise typer.BadParameter(
            "single layers have their own sizes and modes: leave out MODEL, --mode and --input", param_hint="--layers"
        )
    modes = modes_of(mode)
    batches = _batches(batch)
    sizes = sizes_of(shapes)
    name = dtype_named(dtype) if dtype else ""
    refuse_no_time(budget)
    refuse_unwritable(json_file)
    refuse_unwritable(pictures, "--pictures")
    if pictures is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter('pictures need matplotlib: pip install ".[demo]"', param_hint="--pictures")

    from ..measuring.budget import Budget

    limit = Budget(budget)  # counts from here

    import torch

    from ..bench.report import report
    from ..bench.surroundings import one_thread, quick_collections
    from ..bench.task import layer_tasks
    from ..precision import float32_products

    torch.manual_seed(0)  # the same parameters every time
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if name == TF32 and device.type == "cpu":
        raise typer.BadParameter(
            "tf32 needs a GPU: on a CPU PyTorch, which serves every call there, rounds nothing", param_hint="--dtype"
        )
    precision = dtype_of(name)
    chosen = _providers(provider or [], device, layers)

    with ExitStack() as stack:
        if precision == torch.float32:
            # torch.compile still reads this older setting, which must not contradict
            torch.backends.cudnn.allow_tf32 = name == TF32
            stack.enter_context(float32_products("tf32" if name == TF32 else "ieee"))
        stack.enter_context(one_thread(device))
        stack.enter_context(quick_collections())
        tasks: list[Task] = []
        if not layers:
            wanted = modes or (MODES if model is None else MODES[:1])
            tasks += _model_tasks(model or STANDARD, wanted, batches, sizes, precision, device, chosen)
        if layers or (model is None and not modes and not sizes):
            of_layers = _providers(provider or [], device, True)
            tasks += layer_tasks(batches or BATCHES[device.type]["layers"], precision, device, of_layers)
        series, code = _run(tasks, device, precision, seconds, limit, json_file)

    console = printer(json_file)
    if series is None:
        console.print("Interrupted before anything was measured.")
        raise typer.Exit(code)
    console.print(report(series.rows, console.width))
    if pictures is not None:
        from ..bench.pictures import draw

        for file in draw(series.rows, pictures):
            console.print(f"picture: {file}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _run(
    tasks: list[Task], device: torch.device, dtype: torch.dtype, seconds: float, budget: Budget, json_file: Path | None
) -> tuple[Series | None, int]:
    """What was measured, or None if an interrupt came before anything was, and the exit code. Writes the file after
    every result.
    """
    from ..bench.rows import lines, to_json
    from ..bench.series import Series
    from ..bench.task import in_order
    from ..measuring.machine import measure_peaks, this_machine

    series, code = None, 0
    texts: list[list[str]] = []

    def write(file: Path | None) -> None:
        write_text(file, to_json(line for task in texts for line in task))

    def changed(i: int) -> None:
        texts[i] = lines(series.results[i]) if series else []
        if json_file != STANDARD_OUTPUT:
            write(json_file)

    try:
        with interruptible(), progress("the machine itself") as tell:
            machine, peaks = this_machine(device), measure_peaks(device, dtype)
            series = Series(in_order(tasks, peaks), machine, peaks, changed)
            texts += map(lines, series.results)
            series.run(seconds, budget, tell)
    except KeyboardInterrupt as interrupt:
        code = exit_code(interrupt)
        if series:
            series.ended("the run was interrupted")
    if series and len(series.errors) == len(tasks):
        job, error = series.tasks[0].job, series.errors[0]
        given = " ".join("x".join(map(str, shape)) for shape in job.shapes)
        raise typer.BadParameter(f"{job.name} with inputs {given}: {error}")
    write(json_file)
    wrong = series and (series.errors or series.lost or any(row.status == "wrong" for row in series.rows))
    return series, code or (1 if wrong else 0)


def _compare(before: Path, after: Path) -> int:
    """Prints the comparison; returns the exit code."""
    from rich.console import Console

    from ..bench.compare import compare, comparison, regressed
    from ..bench.rows import read

    with refused_by("--compare", OSError, ValueError):
        runs = [read(file) for file in (before, after)]
    changes = compare(*runs)
    if not changes:
        raise typer.BadParameter(f"{before} and {after} have no provider and job in common", param_hint="--compare")
    Console().print(comparison(changes))
    return 1 if regressed(changes) else 0


def _batches(text: str) -> list[int]:
    sizes = text.split(",") if text else []
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(
            f"{text!r}: write positive sizes with commas between them, as in 1,8,32", param_hint="--batch"
        )
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


def _model_tasks(
    text: str,
    modes: tuple[str, ...],
    batches: list[int],
    sizes: list[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    providers: list[Provider],
) -> Iterator[Task]:
    from ..bench.job import Job, plain, without_dropout
    from ..bench.task import model_task

    target, module = module_of(text)
    module = without_dropout(module.float().cpu())
    given = sizes or [shape_for(module)]
    for mode in modes:
        try:
            baseline = plain(module.train(mode == "train"))
        except Exception as error:  # conversion and tracing run the model's own code
            raise typer.BadParameter(
                f"{text} cannot be had without cnnfast, as a baseline: {error}", param_hint="MODEL"
            ) from None
        for batch in batches or ([sizes[0][0]] if sizes else BATCHES[device.type][mode]):
            shapes = tuple((batch, *size[1:]) for size in given)
            yield model_task(Job(target.name, baseline, shapes, mode, dtype, device, original=module), providers)
