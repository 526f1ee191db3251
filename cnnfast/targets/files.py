"""Models in the user's own code: by a file, or by a dotted name, and the name of a class, function or object in it.

Whatever that code raises when it is imported or called becomes a TargetError that names its line.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..located import located
from ..spelling import did_you_mean
from .target import TargetError

# Modules of the errors that a download raises, in the chain of causes, where there is no network.
NETWORK = {"urllib", "http", "socket", "ssl", "requests", "urllib3", "httpx", "httpcore", "huggingface_hub"}


@contextmanager
def own_code(doing: str) -> Iterator[None]:
    """What the user's code raises inside becomes a TargetError that begins with "cannot" and `doing`."""
    try:
        yield
    except TargetError:
        raise
    except SystemExit as error:
        advice = 'guard what a script does with `if __name__ == "__main__":`'
        raise TargetError(f"cannot {doing}: it ended the process ({located(error)}); {advice}") from error
    except Exception as error:
        raise TargetError(f"cannot {doing}: {located(error)}{_advice(error)}") from error


def _advice(error: BaseException) -> str:
    """What would help, if the error is of a download that failed."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__module__.partition(".")[0] in NETWORK or isinstance(cause, ConnectionError):
            return "; it fetches weights, which needs a network: build it with random weights (weights=None)"
        cause = cause.__cause__ or cause.__context__
    return ""


def load(where: str, known: Sequence[str] = ()) -> ModuleType:
    """A module, by its file or its dotted name. It may import what lies beside its file, or in the current folder.

    known: what else could have been meant by a name that nothing has.
    """
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            beside = [str(file) for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
            raise TargetError(f"there is no file {where}{did_you_mean(where, beside)}")
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        fresh = sys.modules.setdefault(path.stem, module) is module
        try:
            with own_code(f"import {where}"):
                spec.loader.exec_module(module)
        except TargetError:
            if fresh:
                del sys.modules[path.stem]
            raise
        return module
    sys.path.insert(0, str(Path.cwd()))
    try:
        with own_code(f"import {where}"):
            return importlib.import_module(where)
    except TargetError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is None or not f"{where}.".startswith(f"{missing}."):
            raise
        advice = did_you_mean(missing, known) or "; a file is written with its ending, as in file.py:NAME"
        raise TargetError(f"there is no module {missing}, neither installed nor in this folder{advice}") from None


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
            advice = did_you_mean(name, dir(found)) or f"; {offers(module, where)}"
            raise TargetError(f"{where} has no {name!r}{advice}")
        found = getattr(found, part)
    if inspect.isclass(found) or inspect.isroutine(found):
        missing = missing_arguments(found)
        if missing == ["config"] and getattr(found, "config_class", None):
            with own_code(f"build {where}:{name}"):
                return with_default_configuration(found)
        if missing and inspect.isclass(found):
            raise TargetError(f"{name} needs arguments ({', '.join(missing)}): {factory(name, missing)}")
        if missing or inspect.isbuiltin(found):  # a function of tensors; builtins do not say which arguments they take
            return found
        with own_code(f"build {where}:{name}"):
            found = found()
    if not callable(found):
        raise TargetError(f"{where}:{name} is, or returns, {type(found).__name__}: nothing that can be called")
    return found


def factory(name: str, missing: list[str]) -> str:
    """How a model that needs arguments is named: by a function without any that builds it."""
    given = ", ".join(f"{argument}=..." for argument in missing)
    return f"write a function that builds it, `def build(): return {name}({given})`, and name that: file.py:build"


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
