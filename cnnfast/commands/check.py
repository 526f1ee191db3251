"""`cnnfast check`: a model or function of yours, call by call, against float64 and beside PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

DTYPES = ("float16", "bfloat16", "float32", "float64")


def check(
    target: Annotated[str, typer.Argument(help="file.py:NAME or package.module:NAME: a class, a factory, a model or a function.")],
    shapes: Annotated[
        list[str] | None, typer.Option("--input", help="Shape of an input; repeat for several.", show_default="1x3x32x32")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    backward: Annotated[bool, typer.Option(help="Check gradients too.")] = True,
    train: Annotated[bool | None, typer.Option("--train/--eval", help="Mode of the model.", show_default="as it is built")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Check every convolution, batch norm and pooling of TARGET on a random input, forward and backward.

    A class, or a function that can be called without arguments, is called to build the model. Without a GPU the kernels are
    interpreted. Ends with exit code 0 only if every covered call launched our kernels and holds.
    """
    sizes = [parse_shape(shape) for shape in shapes or ["1x3x32x32"]]
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..checking import check as run_check

    torch.manual_seed(0)  # the same parameters and input every time
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(target)
    if isinstance(model, torch.nn.Module):
        model = (model if train is None else model.train(train)).to(device)
    inputs = [torch.randn(size).to(device) for size in sizes]

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task("capturing the calls", total=None)
        try:
            report = run_check(
                model, *inputs, backward=backward, dtype=dtype,
                progress=lambda done, total, name: bars.update(bar, completed=done, total=total, description=name),
            )  # fmt: skip
        except (RuntimeError, TypeError, ValueError) as error:  # above all: an input that the model does not take
            raise typer.BadParameter(
                f"{target} with inputs {' '.join('x'.join(map(str, size)) for size in sizes)}: {type(error).__name__}: {error}"
            ) from None
    Console().print(report)
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n")
    raise typer.Exit(0 if report.ok else 1)


def parse_shape(text: str) -> tuple[int, ...]:
    """1x3x32x32 as a tuple."""
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"{text!r} is no shape: write positive sizes with x between them, as in 1x3x32x32", param_hint="--input")
    return tuple(map(int, sizes))


def build(target: str) -> Any:
    """What `target` names; a class, or a function without required arguments, is called, and what it returns taken."""
    where, colon, name = target.rpartition(":")
    if not (where and colon and name):
        raise typer.BadParameter(f"{target!r}: write file.py:NAME or package.module:NAME", param_hint="TARGET")
    found: Any = load(where)
    for part in name.split("."):
        if not hasattr(found, part):
            names = sorted(n for n, value in vars(found).items() if callable(value) and not n.startswith("_"))
            raise typer.BadParameter(f"{where} has no {name!r}; it has {', '.join(names) or 'nothing to call'}", param_hint="TARGET")
        found = getattr(found, part)

    is_class = inspect.isclass(found)
    if is_class or inspect.isroutine(found):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            if is_class:
                raise typer.BadParameter(f"{name} needs arguments ({error}): name a function that builds it", param_hint="TARGET") from None
        except ValueError:  # a builtin says nothing of its arguments
            pass
        else:
            found = found()
    if not callable(found):
        raise typer.BadParameter(f"{target} is, or returns, {type(found).__name__}: nothing that can be called", param_hint="TARGET")
    return found


def load(where: str) -> Any:
    """A module, from its file or by its name; both may import what lies beside them, or in the current folder."""
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise typer.BadParameter(f"there is no file {where}", param_hint="TARGET")
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
        raise typer.BadParameter(f"cannot import {where}: {error}", param_hint="TARGET") from None
