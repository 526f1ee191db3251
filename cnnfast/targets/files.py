"""Models in the user's own code: by a file, or by a dotted name, and the name of a class, function or object in it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .target import TargetError


def load(where: str) -> ModuleType:
    """A module, by its file or its dotted name. It may import what lies beside its file, or in the current folder."""
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise TargetError(f"there is no file {where}")
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise TargetError(f"cannot import {where}: {error}") from None


def offers(module: ModuleType, where: str) -> str:
    """What could be named in a module: what it defines itself, or, if that is nothing, what it imports."""
    public = {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
    own = [name for name, value in public.items() if getattr(value, "__module__", module.__name__) == module.__name__]
    return f"{where} has {', '.join(sorted(own or public)) or 'nothing to call'}"


def named_in(module: ModuleType, where: str, name: str) -> Any:
    """The object of that name, dots in it included. A class, or a function without required arguments, is called; a
    function of tensors is returned as it is.
    """
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(name, dir(found), n=3)
            says = f"near: {', '.join(near)}" if near else offers(module, where)
            raise TargetError(f"{where} has no {name!r}; {says}")
        found = getattr(found, part)
    if inspect.isclass(found) or inspect.isroutine(found):
        missing = missing_arguments(found)
        if missing == ["config"] and getattr(found, "config_class", None):
            return with_default_configuration(found)
        if missing and inspect.isclass(found):
            raise TargetError(f"{name} needs arguments ({', '.join(missing)}): name a function that builds it without")
        if missing or inspect.isbuiltin(found):  # a function of tensors; builtins do not say which arguments they take
            return found
        found = found()
    if not callable(found):
        raise TargetError(f"{where}:{name} is, or returns, {type(found).__name__}: nothing that can be called")
    return found


def missing_arguments(function: Any) -> list[str]:
    """The names of the parameters that have no default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature
        return []
    collecting = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in collecting]


def with_default_configuration(model_class: Any) -> Any:
    """A model of transformers' kind, which is made from an object of its `config_class`."""
    return model_class(model_class.config_class())
