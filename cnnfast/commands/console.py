"""What the commands share: what is refused before any work, bars of progress, tables, files, and how work is
interrupted. Options stand in options.py.

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

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

STANDARD_OUTPUT = Path("-")
JSON_HELP = "Write the results to this file too, as JSON; - is standard output, and tables then go to standard error."
JsonFile = Annotated[
    Path | None, typer.Option("--json", help=JSON_HELP, metavar="FILE", show_default=False, rich_help_panel="Results")
]

# ----------------------------------------------------------------------------------------------------------------------
# What is refused before any work


@contextmanager
def refused_by(option: str | None, *errors: type[Exception]) -> Iterator[None]:
    """An error of these classes inside ends the command with exit code 2 and the error's message, as a wrong value of
    `option`.
    """
    try:
        yield
    except errors as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


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
        file.unlink(missing_ok=True)  # several processes may do this at once


def refuse_unwritable_folder(folder: Path | None, option: str) -> None:
    """The same for a folder that files are written into; it may be new, and so may the one that it is in. Leaves
    nothing behind.
    """
    if folder is None:
        return
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        why = "is no folder" if not there.is_dir() else f"cannot be written: {error.strerror}"
        raise typer.BadParameter(f"{there} {why}", param_hint=option) from None


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
def progress(text: str, wanted: bool = True) -> Iterator[Tell]:
    """A bar on standard error while the context lasts, if that is a terminal and it is wanted; `text` is what happens
    first.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with bars(console, disable=not (wanted and console.is_terminal)) as shown:
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


def announce(json_file: Path | None, text: str) -> None:
    """Prints a sentence before long work, where tables go."""
    printer(json_file).print(text, markup=False, highlight=False, soft_wrap=True)


def about(seconds: float) -> str:
    """A duration as people say it, "about 3 minutes", and no more exact than an estimate is."""
    if seconds < 10:
        return "a few seconds"
    size, unit = (1, "second") if seconds < 90 else (60, "minute") if seconds < 90 * 60 else (3600, "hour")
    count = round(seconds / size)
    count = round(count, -1) if count > 20 else count
    return f"about {count:,} {unit}{'s' * (count > 1)}"


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
