"""What the commands share: options and their values, bars of progress, tables, files, and how work is interrupted.

`refused_by` is the one place where an error of the library becomes typer's error with exit code 2.
"""

from __future__ import annotations

import json
import signal
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from ..dtypes import CHOICES, full_name
from ..targets.inputs import input_shape, parse_shape
from ..targets.naming import resolve, resolve_module
from ..targets.target import Target, TargetError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from torch import nn

STANDARD_OUTPUT = Path("-")
MODES = ("infer", "train")

# ----------------------------------------------------------------------------------------------------------------------
# Options

MODEL_HELP = (
    "resnet50, SOURCE:NAME of cnnfast, torchvision, timm or transformers, file.py:NAME, or package.module:NAME."
)
INPUT_HELP = "Shape of an input, as 1x3x224x224; repeat for several."
INPUT_DEFAULT = "what the model is made for, or 224"
DTYPE_HELP = f"One of {CHOICES}. fp32 multiplies as IEEE says; tf32: float32 tensors, products rounded to TF32."
JSON_HELP = "Write the results to this file too; - is standard output."
SECONDS_HELP = "Seconds of one timing."

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Shapes = Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP, show_default=INPUT_DEFAULT)]
Dtype = Annotated[str, typer.Option(help=DTYPE_HELP)]
JsonFile = Annotated[Path | None, typer.Option("--json", help=JSON_HELP)]
BudgetSeconds = Annotated[
    float | None,
    typer.Option(
        help="Seconds of measuring in all. What costs most is measured first, and what no longer fits is named.",
        show_default="no limit",
    ),
]


@contextmanager
def refused_by(option: str | None, *errors: type[Exception]) -> Iterator[None]:
    """An error of these classes inside ends the command with exit code 2 and the error's message, as a wrong value of
    `option`.
    """
    try:
        yield
    except errors as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def sizes_of(shapes: list[str] | None) -> list[tuple[int, ...]]:
    """The shapes of --input as tuples."""
    with refused_by("--input", TargetError):
        return [parse_shape(shape) for shape in shapes or []]


def dtype_named(text: str) -> str:
    """The full name of --dtype: bf16 as "bfloat16"; "tf32" stays."""
    with refused_by("--dtype", ValueError):
        return full_name(text)


def modes_of(text: str) -> tuple[str, ...]:
    """The modes of --mode, each once; none of them if it is empty."""
    modes = tuple(dict.fromkeys(text.split(","))) if text else ()
    if wrong := [mode for mode in modes if mode not in MODES]:
        raise typer.BadParameter(f"{wrong[0]!r} is neither infer nor train", param_hint="--mode")
    return modes


def target_of(text: str) -> Target:
    """The module or function that MODEL names."""
    with refused_by("MODEL", TargetError):
        return resolve(text)


def module_of(text: str) -> tuple[Target, nn.Module]:
    """The torch.nn.Module that MODEL names."""
    with refused_by("MODEL", TargetError):
        return resolve_module(text)


def shape_for(model: nn.Module, batch: int = 1, *, small: bool = False) -> tuple[int, ...]:
    """A shape that the model takes, where --input gives none."""
    with refused_by("--input", TargetError):
        return input_shape(model, batch, small=small)


def refuse_no_time(budget: float | None) -> None:
    """Ends the command with exit code 2, before any work, if --budget leaves no time for it."""
    if budget is not None and not budget > 0:
        advice = "write seconds above 0, as in --budget 300, or leave it out to measure everything"
        raise typer.BadParameter(f"{budget:g} leaves no time: {advice}", param_hint="--budget")


def refuse_unwritable(file: Path | None, option: str = "--json") -> None:
    """Ends the command with exit code 2, before any work, if a file that it is to write cannot be written. Leaves the
    file as it was.
    """
    if file is None or file == STANDARD_OUTPUT:
        return
    if not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}", param_hint=option)
    existed = file.exists()
    try:
        file.open("a").close()
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be written: {error.strerror}", param_hint=option) from None
    if not existed:
        file.unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Progress and tables


class Tell(Protocol):
    """Moves a bar: `done` steps of `total` are done, and `text` comes next; total is None while it is not known."""

    def __call__(self, done: int, total: int | None, text: str = "") -> None: ...


def bars(console: Console, disable: bool = False) -> Progress:
    """Bars of progress below each other; the field `note` of each stands at its end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    texts = (TextColumn("{task.description}"), TextColumn("{task.fields[note]}"))
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *texts)
    return Progress(*columns, console=console, disable=disable)


@contextmanager
def progress(text: str) -> Iterator[Tell]:
    """A bar on standard error while the context lasts, if that is a terminal; `text` is what happens first."""
    from rich.console import Console

    console = Console(stderr=True)
    with bars(console, disable=not console.is_terminal) as shown:
        bar = shown.add_task(text, total=None, note="")

        def tell(done: int, total: int | None, text: str = "") -> None:
            shown.update(bar, completed=done, total=total, description=text or None)

        yield tell


def table(headings: Sequence[str], *, right: Collection[str] = (), no_wrap: bool = False, **style: Any) -> Table:
    """An empty table with these columns; cells under the headings of `right` are aligned to the right."""
    from rich.table import Table

    made = Table(**style)
    for heading in headings:
        made.add_column(heading, justify="right" if heading in right else "left", no_wrap=no_wrap, overflow="fold")
    return made


# ----------------------------------------------------------------------------------------------------------------------
# Interrupts


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def interruptible() -> Iterator[None]:
    """While the context lasts, SIGTERM, which `timeout` and batch systems send, raises Terminated, so that what was
    measured can be kept.
    """
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set a handler
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """128 and the number of the signal, as shells report it."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written


def printer(json_file: Path | None) -> Console:
    """Where a command prints what people read: standard output, unless the JSON goes there, and then standard error."""
    from rich.console import Console

    return Console(stderr=json_file == STANDARD_OUTPUT)


def write_text(file: Path | None, text: str) -> None:
    """Writes `text`, whose last line has no end yet, to a file or standard output; None writes nothing.

    The file is replaced as a whole: a reader finds all of its old text or all of the new one, even after the command
    was killed.
    """
    if file == STANDARD_OUTPUT:
        typer.echo(text)
    elif file is not None and (file.is_symlink() or (file.exists() and not file.is_file())):
        # A device or a pipe, for example, must not be replaced by a file.
        file.write_text(text + "\n")
    elif file is not None:
        fresh = Path(tempfile.mkdtemp(prefix=f".{file.name}-", dir=file.parent)) / file.name
        try:
            fresh.write_text(text + "\n")  # with the permissions of any new file
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)
            fresh.parent.rmdir()


def write_json(file: Path | None, data: Any) -> None:
    write_text(file, json.dumps(data, indent=1))
