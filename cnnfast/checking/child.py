"""A process of its own in which Triton interprets: for tensors on the CPU in a process whose kernels are compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def importing_alike(**more: str) -> dict[str, str]:
    """The environment of a child process that finds every module where this process does; `more` is added to it."""
    importable = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": importable, **more}


def interpreted(module: str, data: Any) -> Iterator[str]:
    """Lines that `python -m module FILE` prints under TRITON_INTERPRET=1; FILE is `data` as torch.save writes it.

    Raises RuntimeError, with the end of what it wrote to stderr, if it does not end with exit code 0.
    """
    with tempfile.TemporaryDirectory(prefix="cnnfast-") as folder:
        path = Path(folder, "data.pt")
        torch.save(data, path)
        with Path(folder, "stderr").open("w+") as stderr:
            command = [sys.executable, "-P", "-m", module, str(path)]
            child = subprocess.Popen(command, env=importing_alike(TRITON_INTERPRET="1"), stdout=subprocess.PIPE, stderr=stderr, text=True)
            assert child.stdout is not None
            try:
                yield from child.stdout
                if child.wait():
                    stderr.seek(0)
                    raise RuntimeError(f"the process that interprets kernels ended with {child.returncode}:\n{stderr.read()[-4000:]}")
            finally:
                child.kill()
                child.wait()
                child.stdout.close()
