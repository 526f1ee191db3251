"""Starts several processes that meet in a group of torch.distributed, and waits for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

from tests.support.child import IMPORTABLE


def run_ranks(module: str, world: int, folder: Path, *arguments: str, timeout: float = 300) -> list[str]:
    """Runs `python -m module RANK WORLD FILE *arguments` for each rank, where FILE, in `folder`, is where they meet.
    Returns what each of them printed. Skips without gloo; fails with the output of a process that fails.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch is built without gloo")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, IMPORTABLE), os.environ.get("PYTHONPATH", "")]),
    }
    commands = [
        [sys.executable, "-m", module, str(rank), str(world), str(folder / "meet"), *arguments] for rank in range(world)
    ]
    children = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    try:
        outputs = [child.communicate(timeout=timeout) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (out, error) in zip(children, outputs, strict=True):
        assert child.returncode == 0, f"{out[-2000:]}\n{error[-6000:]}"
    return [out for out, _ in outputs]
