"""Plants a fault into the source of a module of the kernels, for as long as a test lasts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, module: ModuleType, right: str, wrong: str) -> None:
    """Replaces what other modules use of `module` by what its source would define with one mistake in it."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in {module.__name__}"
    file = folder / "planted.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_planted", file)  # relative imports go on working
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, mutant)
    spec.loader.exec_module(mutant)
    right_ones = dict(vars(module))  # kept: the module's own names are replaced too, maybe first
    for name, user in list(sys.modules.items()):
        if name.startswith("cnnfast"):
            for attribute, value in list(vars(user).items()):
                if getattr(value, "__module__", None) == module.__name__ and right_ones.get(attribute) is value:
                    monkeypatch.setattr(user, attribute, getattr(mutant, attribute))
    for name in vars(module).keys() & vars(mutant).keys():  # ops call through the module
        if not name.startswith("__"):
            monkeypatch.setattr(module, name, getattr(mutant, name))
