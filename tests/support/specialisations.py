"""Writes down what the tests launch, as Triton would compile it: pytest --specialisations FOLDER."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest.mock import patch

from triton.runtime import KernelInterface

import cnnfast_kernels
from cnnfast_kernels import launch
from cnnfast_kernels.aot.specialisations import described

PACKAGE = Path(cnnfast_kernels.__file__).parent


@contextmanager
def described_launches() -> Iterator[dict[str, None]]:
    """The descriptions of all that this process launches meanwhile, in order, each once. Kernels that the package does
    not hold are left out: those of tests, and those into which tests plant faults.

    Raises RuntimeError where kernels are compiled: there a plan launches by itself what it has launched before.
    """
    if not launch.INTERPRETED:
        raise RuntimeError(
            "launches are written down where kernels are interpreted: "
            "set TRITON_INTERPRET=1, hide the GPU, and start again"
        )
    found: dict[str, None] = {}
    run = launch.run

    def describe_and_run(kernel: Any, grid: tuple[int, ...], *arguments: Any, tile: Any = None, **options: Any) -> Any:
        ours = isinstance(kernel, KernelInterface) and PACKAGE in Path(kernel.fn.__code__.co_filename).parents
        if ours and 0 not in grid:
            found[described(kernel, arguments[1:], options)] = None
        return run(kernel, grid, *arguments, tile=tile, **options)

    with patch.object(launch, "run", describe_and_run):
        yield found


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Writes the descriptions of all launches meanwhile to a new file of `folder`: each process of pytest-xdist has its
    own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with described_launches() as found:
        yield
    with NamedTemporaryFile("w", dir=folder, suffix=".jsonl", delete=False) as file:
        file.writelines(f"{line}\n" for line in found)
