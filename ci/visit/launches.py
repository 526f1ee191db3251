"""How much the tests compile: the launches that they make, counted for the plan of a visit.

    PYTEST_ADDOPTS="--specialisations FOLDER" pytest -n 2     # each process of the tests leaves a file in FOLDER
    python -m ci.visit.launches FOLDER                        # writes ci/results/visit/tests.json

The interpreter's tests are recorded. On a GPU the same tests run, some with other dtypes, beside those that need one:
the count is near what is compiled there, not equal to it.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from cnnfast.measuring.machine import this_machine
from cnnfast_kernels.aot.specialisations import Described, parameters

from .parts import KEPT

COUNTED = KEPT / "tests.json"


def launchers(lines: Iterable[str]) -> int:
    """How many C launchers Triton 3.6 builds for descriptions of launches: one for each sequence of C types, whatever
    the kernel.

    A pointer is one whatever it points to, and so is what is absent or a constant, which has no type.
    """

    def c_type(parameter: Any, value: Any) -> str:
        if parameter.is_constexpr or value is None or value == 1:
            return "constant"
        if isinstance(value, dict):
            return f"map of {len(value['box'])}" if "map" in value else "pointer"
        return "float" if isinstance(value, float) else "long" if value >= 2**31 else "int"

    seen = set()
    for line in lines:
        launched = Described.of(line)
        known = parameters(launched.kernel)
        seen.add(tuple(c_type(known[name], value) for name, value in launched.arguments.items()))
    return len(seen)


def count(
    folder: Annotated[Path, typer.Argument(help="Where the tests recorded their launches.")],
    out: Annotated[Path, typer.Option(help="The file of the result.")] = COUNTED,
) -> None:
    """Count the launches that the tests in FOLDER's recording make, each once."""
    lines = sorted({line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()})
    if not lines:
        raise typer.BadParameter(f"nothing is recorded in {folder}: run pytest with --specialisations {folder} first")
    import torch

    kernels = Counter(json.loads(line)["kernel"].rpartition(":")[2] for line in lines)
    found = {
        "command": "PYTEST_ADDOPTS='--specialisations FOLDER' pytest -n 2; python -m ci.visit.launches FOLDER",
        "launches": len(lines),
        "launchers": launchers(lines),
        "commit": this_machine(torch.device("cpu")).commit,
        "versions": f"torch {torch.__version__}, triton {version('triton')}, Python {platform.python_version()}",
        "kernels": dict(sorted(kernels.items())),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['launches']} launches with {found['launchers']} launchers: {out}")


if __name__ == "__main__":
    typer.run(count)
