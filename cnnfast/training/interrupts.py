"""Training that somebody ends: Ctrl-C, and SIGTERM, which `timeout` and batch systems send."""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException


class Interrupted(KeyboardInterrupt):
    """Somebody ended the training; the state of the last whole epoch is saved. `number` is that of the signal."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


class InterruptWatch(Callback):
    """What ended the training from outside: lightning itself makes SystemExit of Ctrl-C."""

    def __init__(self) -> None:
        self.number: int | None = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) or trainer.received_sigterm:
            self.number = signal.SIGTERM
        elif isinstance(exception, KeyboardInterrupt):
            self.number = signal.SIGINT
