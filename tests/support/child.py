"""Runs Python in a process of its own, where kernels are compiled and not interpreted."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
IMPORTABLE = (REPOSITORY, REPOSITORY / "kernels")


def environment(overlay: str = "") -> dict[str, str]:
    """The environment of a process that imports this checkout and compiles its kernels: this process's own, without
    what is meant for its tests. `overlay` is a folder whose packages stand before all others.
    """
    paths = [overlay, *map(str, IMPORTABLE), os.environ.get("PYTHONPATH")]
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    }
    return inherited | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_compiled(
    script: str | Path | Callable[..., Any], *arguments: Any, timeout: float = 600, overlay: str = ""
) -> Any:
    """Runs `script` without TRITON_INTERPRET and returns what the last line of its output says, as JSON.

    `script` is source text, the path of a file (given `arguments` as sys.argv), or a function. A function's source
    alone travels: it imports what it needs itself, its arguments are plain data, and what it returns is printed as
    JSON. `overlay` is a folder whose packages stand before those that are installed. Fails with the child's output if
    the child fails.
    """
    if isinstance(script, Path):
        command = [sys.executable, str(script), *map(str, arguments)]
    elif callable(script):
        source = textwrap.dedent(inspect.getsource(script))
        call = f"print(json.dumps({script.__name__}(*json.loads({json.dumps(arguments)!r}))))"
        command = [sys.executable, "-c", f"import json\n{source[source.index('def ') :]}\n{call}"]
    else:
        command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    child = subprocess.run(
        command, env=environment(overlay), capture_output=True, text=True, timeout=timeout, check=False
    )
    if child.returncode:
        raise AssertionError(
            f"the child process ended with {child.returncode}\n{child.stdout[-2000:]}\n{child.stderr[-6000:]}"
        )
    lines = child.stdout.strip().splitlines()
    if not lines:
        raise AssertionError(f"the child process printed nothing; its last line should be JSON\n{child.stderr[-6000:]}")
    return json.loads(lines[-1])
