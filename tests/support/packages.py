"""Packages that some tests need, and that an installation of the library may lack."""

from __future__ import annotations

import importlib
from contextlib import suppress
from types import ModuleType

import pytest

from cnnfast import torchvision_import

FOREIGN = ("torchvision", "timm", "transformers")


def package(name: str) -> ModuleType:
    """One of FOREIGN, or a module of one of them. Skips the test, which then names what is missing, where the package
    is not installed, or torchvision, which timm imports.
    """
    with suppress(ModuleNotFoundError):
        torchvision_import.torchvision()  # first: the others import it, and it may load only in half
    try:
        importlib.import_module(name.partition(".")[0])
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in FOREIGN:
            raise
        pytest.skip(f"{error.name} is not installed")
