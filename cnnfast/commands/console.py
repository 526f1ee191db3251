"""What commands share: a bar of progress, the file of --json, options that several of them have, and how they are interrupted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import Console

JSON_HELP = "Write the results to this file too; - is standard output."
BUDGET_HELP = "Seconds of measuring in all. What costs most is measured first, and what no longer fits is named."
SECONDS_HELP = "Seconds of one timing."
STANDARD_OUTPUT = Path("-")


class Tell(Protocol):
    """Moves a bar: so many of `total` steps are done, None while nobody knows how many there are, and `text` comes next."""

    def __call__(self, done: int, total: int | None, text: str = "") -> None: ...


@contextmanager
def progress(text: str) -> Iterator[Tell]:
    """A bar on standard error while the context lasts, on a terminal; `text` is what happens first."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(text, total=None)

        def tell(done: int, total: int | None, text: str = "") -> None:
            bars.update(bar, completed=done, total=total, description=text or None)

        yield tell


def refuse_unwritable(file: Path | None, option: str = "--json") -> None:
    """Ends the command with exit code 2, before any work, if the folder of a file that it is to write is not there."""
    if file is not None and file != STANDARD_OUTPUT and not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}", param_hint=option)


def printer(json_file: Path | None) -> Console:
    """Where a command speaks to people: standard output, or standard error where that is to hold the JSON."""
    from rich.console import Console

    return Console(stderr=json_file == STANDARD_OUTPUT)


def write_text(file: Path | None, text: str) -> None:
    """Writes `text`, whose last line has no end yet, to a file or standard output; None writes nothing."""
    if file == STANDARD_OUTPUT:
        typer.echo(text)
    elif file is not None:
        file.write_text(text + "\n")


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: whoever cleans up after Ctrl-C does so now, too."""


@contextmanager
def terminable() -> Iterator[None]:
    """While the context lasts, SIGTERM raises Terminated in the main thread, as Ctrl-C raises KeyboardInterrupt."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """What a shell expects of a command that the signal ended."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
