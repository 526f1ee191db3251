"""An error of a user's own code as one sentence, with the line of theirs that raised it."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

# Files below these are not the user's: those of Python and of this package. Installed packages are known by INSTALLED.
OTHERS = (Path(sysconfig.get_path("stdlib")).resolve(), Path(__file__).resolve().parent)
INSTALLED = {"site-packages", "dist-packages", "cnnfast_kernels"}


def located(error: BaseException) -> str:
    """The class of an error, the file and the line of the user's own code where it was raised, and the first line of
    its message: "ValueError in nets.py, line 3: width is odd". Without the file and the line if no code of theirs ran.
    """
    name = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{name} in {_short(error.filename)}, line {error.lineno or 1}: {error.msg}"
    own = own_frame(error)
    where = f" in {_short(own.filename)}, line {own.lineno}" if own else ""
    said = str(error).strip().splitlines()[:1] or [own.line if own and own.line else ""]
    return f"{name}{where}: {said[0]}".removesuffix(": ")


def own_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame of an error's traceback that stands in the user's own code; None without one."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if _is_own(frame.filename)), None)


def _is_own(file: str) -> bool:
    path = Path(file)
    if file.startswith("<") or INSTALLED & set(path.parts):
        return False
    resolved = path.resolve()
    return not INSTALLED & set(resolved.parts) and not any(resolved.is_relative_to(folder) for folder in OTHERS)


def _short(file: str) -> str:
    """Relative to the current folder, if it is below that."""
    path, here = Path(file).resolve(), Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
