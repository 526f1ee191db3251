"""What commands share: a bar of progress, the file of --json, options that several of them have, and how work is
interrupted.
"""

from __future__ import annotations

import signal
import tempfile
import threading
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
    """Moves a bar: so many of `total` steps are done, None while nobody knows how many there are, and `text` comes
    next.
    """

    def __call__(self, done: int, total: int | None, text: str = "") -> None: ...


@contextmanager
def progress(text: str) -> Iterator[Tell]:
    """A bar on standard error while the context lasts, if that is a terminal; `text` is what happens first."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task(text, total=None)

        def tell(done: int, total: int | None, text: str = "") -> None:
            bars.update(bar, completed=done, total=total, description=text or None)

        yield tell


def refuse_unwritable(file: Path | None, option: str = "--json") -> None:
    """Ends the command with exit code 2, before any work, if a file that it is to write cannot be written. Leaves it as
    it was.
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


def refuse_no_time(budget: float | None) -> None:
    """Ends the command with exit code 2, before any work, if --budget leaves no time for it."""
    if budget is not None and not budget > 0:
        advice = "write seconds above 0, as in --budget 300, or leave it out to measure everything"
        raise typer.BadParameter(f"{budget:g} leaves no time: {advice}", param_hint="--budget")


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, as `timeout` and batch systems send it, raises Terminated while the context lasts: what was measured can
    be kept.
    """
    if threading.current_thread() is not threading.main_thread():  # Python lets no other set a handler
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
    """As shells have it: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def printer(json_file: Path | None) -> Console:
    """Where a command speaks to people: standard output, or standard error where that is to hold the JSON."""
    from rich.console import Console

    return Console(stderr=json_file == STANDARD_OUTPUT)


def write_text(file: Path | None, text: str) -> None:
    """Writes `text`, whose last line has no end yet, to a file or standard output; None writes nothing.

    Whoever reads the file meanwhile, or after the command was killed, finds the whole of what it held before or the
    whole text.
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
