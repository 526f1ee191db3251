"""Why there are no kernels: no triton at all, or one that our kernels cannot be imported with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from cnnfast import triton_here
from cnnfast.triton_here import SUPPORTED_TRITON, why_no_kernels
from tests.support.child import run_compiled


def test_a_triton_that_is_not_there_is_said_to_be_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_no_kernels(ImportError("No module named 'triton'")) == "triton is not installed"


@pytest.mark.parametrize(("version", "says"), [("2.1.0", "triton 2.1.0 ("), (None, "triton of unknown version (")])
def test_a_triton_of_another_version_is_named_with_those_that_fit(monkeypatch, version, says):
    def metadata(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(triton_here, "_is_missing", lambda: False)
    monkeypatch.setattr(triton_here.metadata, "version", metadata)
    said = why_no_kernels(ImportError("cannot import name 'knobs' from 'triton'\nand more"))
    assert f"need triton {SUPPORTED_TRITON} and cannot be imported with {says}cannot import name 'knobs'" in said
    assert "\n" not in said


def beside_an_old_triton(folder: str) -> list[str]:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] in ("triton", "cnnfast", "cnnfast_kernels")]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    import torch

    import cnnfast
    import cnnfast.functional as F

    with cnnfast.trace() as calls:
        F.max_pool2d(torch.zeros(1, 1, 4, 4), 2)
    return [call.reason for call in calls]


@pytest.mark.compiled
def test_beside_an_old_triton_pytorch_serves_and_the_reason_names_it(tmp_path: Path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("__version__ = '2.1.0'\n")
    (reason,) = run_compiled(beside_an_old_triton, str(tmp_path))
    assert reason.startswith(f"cnnfast's kernels need triton {SUPPORTED_TRITON} and cannot be imported with triton ")
