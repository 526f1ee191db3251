"""README's Python runs: on a laptop without a GPU, in a process in which nothing interprets kernels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.support.child import run_compiled

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(blocks: list[str]) -> list[list[str]]:
    """(statement, what it printed, what it raised) of each statement of the blocks, one after the other. The names that
    README leaves to its reader are a small model, images for it, and a loss.
    """
    import ast
    import io
    import os
    from contextlib import redirect_stdout
    from tempfile import mkdtemp

    import torch
    from torch import nn

    os.chdir(mkdtemp())  # of a child process: README's Python writes a file
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    names = {
        "torch": torch,
        "model": nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2)),
        "x": torch.randn(2, 3, 8, 8),
        "loss": lambda y: y.square().mean(),
    }
    told = []
    for block in blocks:
        for statement in ast.parse(block).body:
            source, printed, error = ast.unparse(statement), io.StringIO(), ""
            with redirect_stdout(printed):
                try:
                    exec(source, names)
                except Exception as raised:
                    error = f"{type(raised).__name__}: {raised}"
            told.append([source, printed.getvalue(), error])
    return told


@pytest.mark.compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU: tune has nothing to measure there")
def test_python_of_readme_runs_on_a_laptop():
    told = run_compiled(run, BLOCKS)
    assert [source for source, _, _ in told if "cnnfast.convert(" in source]
    assert [source for source, _, _ in told if "cnnfast.trace(" in source]
    for source, printed, error in told:
        if "cnnfast.tune(" in source:
            assert error.startswith("RuntimeError: ")
            assert "GPU" in error
        else:
            assert not error, source
        if "print(" in source and not error:
            assert printed.strip(), source
            assert "no operation of cnnfast's ran" not in printed, source
