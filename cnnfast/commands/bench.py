"""`cnnfast bench`: a model, or single layers, against the strongest baselines that this machine has."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bench import AUGMENT, AUGMENTERS, NAMES
from ..dtypes import TF32, dtype_of, name_of
from ..modes import INFER, MODES, TRAIN
from . import options
from .bench_augmentation import ResultSize, augmentation_tasks, refuse_what_is_not_for
from .bench_comparison import compared
from .bench_jobs import (
    batches,
    duration,
    file_tasks,
    frozen_in,
    model_tasks,
    providers,
    refuse_impossible,
    refuse_unknown,
    single_tasks,
)
from .console import (
    STANDARD_OUTPUT,
    JsonFile,
    announce,
    exit_code,
    interruptible,
    printer,
    progress,
    refuse_no_time,
    refuse_unwritable,
    refuse_unwritable_folder,
    write_text,
)

if TYPE_CHECKING:
    import torch

    from ..bench.providers import Provider
    from ..bench.series import Series
    from ..bench.task import Task
    from ..measuring.budget import Budget

EXAMPLES = (
    "cnnfast bench resnet50 --mode infer,train --batch 1,32",
    "cnnfast bench model.py:Net --provider eager --provider cnnfast --json -",
    "cnnfast bench model.cnnfast --batch 1,8",
    "cnnfast bench augment --batch 64 --size 224 --dtype bf16",
    "cnnfast bench --compare before.json after.json",
)
STANDARD = "resnet50"
WHAT = "What is compared"


def bench(
    model: Annotated[
        str | None,
        typer.Argument(help=options.MODEL_HELP, metavar="MODEL", show_default="the standard set, of ResNet-50"),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help=f"{options.INPUT_HELP} --batch replaces its first size.",
            metavar=options.SHAPE,
            show_default=options.INPUT_DEFAULT,
            rich_help_panel=options.INPUTS,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help=options.DTYPE_HELP,
            metavar=options.DTYPE,
            show_default="bf16 on a GPU, fp32 on a CPU",
            rich_help_panel=options.INPUTS,
        ),
    ] = "",
    mode: Annotated[
        str,
        typer.Option(
            help="infer, train, or both.", metavar=options.MODES, show_default="infer", rich_help_panel=options.INPUTS
        ),
    ] = "",
    batch: Annotated[
        str,
        typer.Option(help="Images a step.", metavar="1,8,32", show_default="by device", rich_help_panel=options.INPUTS),
    ] = "",
    size: ResultSize = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Single layers and residual blocks instead of a model.",
            rich_help_panel=options.INPUTS,
        ),
    ] = False,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this one; repeat it for several: {', '.join(NAMES)}; of augment {', '.join(AUGMENTERS)}.",
            metavar="NAME",
            show_default="all",
            rich_help_panel=WHAT,
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="Measure nothing: compare two files of --json, the earlier first.",
            metavar="FILE FILE",
            show_default=False,
            rich_help_panel=WHAT,
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help=f"{options.SECONDS_HELP} Each provider has one in each job.",
            metavar=options.SECONDS,
            rich_help_panel=options.TIME,
        ),
    ] = 1.0,
    budget: options.BudgetSeconds = None,
    json_file: JsonFile = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Folder for pictures: roofline, layers, images a second.",
            metavar="FOLDER",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
) -> None:
    """Time MODEL against the strongest baselines, with what the machine allows beside it; losses are listed first.

    Baselines are PyTorch in channels_last with cudnn.benchmark, the same as a CUDA graph, torch.compile, cuDNN's fused
    convolutions and JAX, as far as this machine has them; what did not run is listed with the reason. Each is checked
    against float64 before it is timed (dropout is off for that), and one that computes wrong numbers is not timed. All
    take turns in every round. Beside each time stands what the machine allows, by its bandwidth and matrix rate, which
    are measured in the same run.

    MODEL may be a file of `cnnfast freeze`. Then it runs beside PyTorch, torch.compile with freezing, onnxruntime and
    OpenVINO, as far as they are installed, on all threads.

    MODEL may be the word augment: uint8 images, by default of both layouts (as --input 1x3x256x256 and 1x256x256x3),
    become a normalised batch, by cnn.Augment, torchvision.transforms.v2 and kornia, as far as they are installed, in
    three recipes: crop and flip; the same with colours and erasing; the same with rotation. Launches and bytes are
    counted, with a GPU or without.

    Without MODEL the standard set runs: ResNet-50 in both modes, and --layers, that is layers of ResNet-50 and
    MobileNetV2, and residual blocks of ResNet-50 and ResNet-18 in training, each as a whole. Without a GPU PyTorch
    serves every call, so that ratios show what conversion costs. `--compare` ends with exit code 1 if something became
    slower or wrong.

    The file of --json is written after every result. Ctrl-C and SIGTERM end the run with a report of what it has, and
    exit code 130 or 143. A --budget counts from the start, compilation included. Models come before blocks, and these
    before layers, and those that compute or move most come first. A measurement that has begun is finished: a provider
    that compiles for a minute may exceed the budget by that minute.
    """
    modes = options.modes_of(mode)
    images = batches(batch)
    sizes = options.sizes_of(shapes)
    name = options.dtype_named(dtype) if dtype else ""
    refuse_unknown(provider or [], AUGMENTERS if model == AUGMENT else NAMES)
    refuse_no_time(budget)
    if not seconds < inf:
        raise typer.BadParameter(
            f"{seconds:g} is no time to measure for: write seconds, as in --seconds 1", param_hint="--seconds"
        )
    refuse_unwritable(json_file)
    refuse_unwritable_folder(pictures, "--pictures")
    if pictures is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter('pictures need matplotlib: pip install ".[demo]"', param_hint="--pictures")
    if compare is not None:
        if model or layers or mode or batch or size or shapes or dtype or provider or pictures:
            raise typer.BadParameter(
                "nothing is measured: leave out MODEL and all options but --json", param_hint="--compare"
            )
        raise typer.Exit(compared(*compare, json_file))
    refuse_what_is_not_for(model, size, mode)
    if layers and (model or mode or shapes):
        raise typer.BadParameter(
            "single layers have their own sizes and modes: leave out MODEL, --mode and --input", param_hint="--layers"
        )

    from ..measuring.budget import Budget

    limit = Budget(budget)  # counts from here

    import torch

    from ..bench.report import report
    from ..bench.surroundings import one_thread, quick_collections
    from ..precision import float32_products

    torch.manual_seed(0)  # the same parameters every time
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if name == TF32 and device.type == "cpu":
        raise typer.BadParameter(
            "tf32 needs a GPU: on a CPU PyTorch, which serves every call there, rounds nothing", param_hint="--dtype"
        )
    frozen = frozen_in(model)
    if frozen and (dtype or TRAIN in modes):
        raise typer.BadParameter(
            f"{model} computes in {name_of(frozen.dtype)}, and in mode infer: leave out --dtype and --mode",
            param_hint="MODEL",
        )
    precision = frozen.dtype if frozen else dtype_of(name)
    chosen: list[Provider] = []
    if model != AUGMENT:
        refuse_impossible(provider or [], device, modes)
        chosen = providers(provider or [], device, layers, frozen is not None)

    with ExitStack() as stack:
        if precision == torch.float32:
            # torch.compile still reads this older setting, which must not contradict
            torch.backends.cudnn.allow_tf32 = name == TF32
            stack.enter_context(float32_products("tf32" if name == TF32 else "ieee"))
        if frozen is None:
            stack.enter_context(one_thread(device))
        stack.enter_context(quick_collections())
        tasks: list[Task] = []
        if model == AUGMENT:
            tasks += augmentation_tasks(provider or [], images, sizes, size, name, device)
        elif model and frozen:
            tasks += file_tasks(model, frozen, images, sizes, device, chosen)
        elif not layers:
            wanted = modes or (MODES if model is None else (INFER,))
            tasks += model_tasks(model or STANDARD, wanted, images, sizes, precision, device, chosen)
        if layers or (model is None and not modes and not sizes):
            tasks += single_tasks(provider or [], images, precision, device)
        announce(json_file, duration(tasks, seconds, budget))
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
