"""A process of its own in which Triton interprets, for tensors on the CPU where this process compiles its kernels."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..children import start


def interpreted(module: str, data: Any) -> Iterator[str]:
    """The lines that `python -m module FILE` prints under TRITON_INTERPRET=1; FILE is `data` as torch.save writes it.

    Raises RuntimeError, with the end of its standard error, if the process does not end with exit code 0.
    """
    with tempfile.TemporaryDirectory(prefix="cnnfast-") as folder:
        path = Path(folder, "data.pt")
        torch.save(data, path)
        with Path(folder, "stderr").open("w+") as stderr:
            child = start(
                module, str(path), environment={"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=stderr
            )
            assert child.stdout is not None
            try:
                yield from child.stdout
                if child.wait():
                    stderr.seek(0)
                    raise RuntimeError(
                        f"the process that interprets kernels ended with {child.returncode}:\n{stderr.read()[-4000:]}"
                    )
            finally:
                child.kill()
                child.wait()
                child.stdout.close()
