"""Who may import whom, read from the sources: nothing is imported here."""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = {
    "cnnfast_kernels": REPOSITORY / "kernels",
    **dict.fromkeys(("cnnfast", "tests", "benchmarks"), REPOSITORY),
}

# These are pure Python.
PURE = (
    *("problem", "gpus", "costs", "resources", "tiling", "traffic", "tables", "table_files", "table_rows"),
    "packed_tiles",
    *("gather.work", "gather.depthwise.tiles", "gather.depthwise.work", "tma.tiles", "tma.work"),
)

# (importer, imported, exceptions): no module that matches the first may import what matches the second.
FORBIDDEN = [
    ("cnnfast_kernels*", "cnnfast*", ["cnnfast_kernels*"]),
    *[(f"cnnfast_kernels.{pure}", other, []) for pure in PURE for other in ("torch*", "triton*")],
    ("cnnfast*", "tests*", []),
    ("cnnfast*", "benchmarks*", []),
    ("tests*", "benchmarks*", []),
    ("benchmarks*", "tests*", []),
    # It stands in for a GPU's drivers, and is there for benchmarks and tests alone.
    ("cnnfast*", "cnnfast.bench.host_cost*", ["by cnnfast.bench.host_cost"]),
    ("cnnfast.reference*", "cnnfast*", ["cnnfast.reference*"]),
    ("cnnfast*", "cnnfast.reference*", ["by cnnfast.checking*", "by cnnfast.reference*"]),
    # Kernel files do not import one another, but a family's index algebra and tiles are shared in it, im2col and stem
    # are ways to call the others, and the parts of depthwise import one another. The families do not know each other.
    ("cnnfast_kernels.tma*", "cnnfast_kernels.gather*", []),
    ("cnnfast_kernels.gather*", "cnnfast_kernels.tma*", []),
    ("cnnfast_kernels.gather.*", "cnnfast_kernels.gather.depthwise*", ["by cnnfast_kernels.gather.depthwise*"]),
    *[
        (
            f"cnnfast_kernels.{importer}*",
            f"cnnfast_kernels.{imported}*",
            [
                *(f"cnnfast_kernels.gather.{shared}*" for shared in ("tiles", "gradient_tiles", "depthwise")),
                *(f"cnnfast_kernels.tma.{shared}*" for shared in ("boxes", "tiles", "views", "gradient_pieces")),
                "by cnnfast_kernels.gather.im2col",
                "by cnnfast_kernels.gather.stem",
                "by cnnfast_kernels.tma.stem",
            ],
        )
        for importer in ("gather.", "tma.", "batchnorm", "pooling", "augment")
        for imported in ("gather.", "tma.", "batchnorm", "pooling", "augment")
        if importer != imported or importer.endswith(".")  # parts of pooling may
    ],
]

# Each may import its own row and those above it. A module that is not named here is free of this rule.
LAYERS = {
    "cnnfast_kernels": [
        "problem rounding gpus",
        "tiling layout dtypes operands resources",
        "costs packed_tiles",
        "traffic",
        "activations epilogue gradient_epilogue words launch launchable indexing memory devices",
        "planes moments slots tile_moments",
        "packing",
        "gather tma batchnorm pooling augment",
        "table_rows",
        "table_files",
        "tables",
        "questions",
        "keys resource_keys gradient_passes",
        "choosing_costs",
        "choosing",
        "plans fprop_plans dgrad_plans",
        "conv",
        "gram",
        "aot",
    ],
    "cnnfast": [
        "spelling",
        "activations patterns modes triton_here located",
        "ops dispatch recording aside precision dtypes measuring children torchvision_import",
        "functional summary drawing",
        "nn",
        "models conversion",
        "targets moved_bytes",
        "calls",
        "warming workers",
        "checking tuning",
        "engine",
        "explaining",
        "bench sheets",
        "training",
        "diagnosing",
        "demo commands",
    ],
}


def sources(package: str) -> dict[str, Path]:
    """Module name -> file."""
    root = ROOTS[package]
    files = (root / package).rglob("*.py")
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in sorted(files)}


def imports(module: str, path: Path) -> set[str]:
    """Every name a file imports, wherever it does: `from a import b` counts as a.b (b may be a module)."""
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*origin, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


MODULES = {module: imports(module, path) for package in ROOTS for module, path in sources(package).items()}


@pytest.mark.parametrize(("importer", "imported", "exceptions"), FORBIDDEN)
def test_forbidden_imports(importer, imported, exceptions):
    offences = [
        f"{module} imports {name}"
        for module, names in MODULES.items()
        if fnmatch(module, importer) and not any(fnmatch(f"by {module}", e) for e in exceptions)
        for name in names
        if fnmatch(name, imported)
        and not any(fnmatch(name, e) or fnmatch(name.rpartition(".")[0], e) for e in exceptions)
    ]
    assert not offences


@pytest.mark.parametrize("package", LAYERS)
def test_layers(package):
    layer = {f"{package}.{name}": i for i, row in enumerate(LAYERS[package]) for name in row.split()}

    def layer_of(name: str) -> int | None:
        return layer.get(".".join(name.split(".")[:2]))

    offences = [
        f"{module} imports {name}"
        for module, names in MODULES.items()
        for name in names
        if None not in (mine := layer_of(module), theirs := layer_of(name)) and theirs > mine
    ]
    assert not offences


def attributes(path: Path) -> set[str]:
    """Dotted names used in a file: torch.empty, os.environ, ..."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}


def test_the_environment_is_not_read():
    """Except for processes that are started, which see what this one sees, and by bench, which asks jax not to take
    most of a GPU's memory: jax has no other setting for that. What the user has set is left as it is: bench calls
    setdefault, and nothing else.
    """
    files = {**sources("cnnfast"), **sources("cnnfast_kernels")}
    readers = [
        m
        for m, f in files.items()
        if {"os.environ", "os.getenv"} & attributes(f) or any(n.startswith("os.") for n in MODULES[m])
    ]
    # trainers: how many processes torchrun has started, which it tells by the environment alone
    assert readers == ["cnnfast.bench.jax_model", "cnnfast.children", "cnnfast.training.trainers"]
    text = files["cnnfast.bench.jax_model"].read_text()
    assert text.count("os.environ") == text.count('os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE"') == 1


# But for memory.py these have tensors on meta only: for their strides, or for a tensor map that has no tensor yet.
MAY_ALLOCATE = tuple(f"cnnfast_kernels.{name}" for name in ("memory", "layout", "launch", "aot"))


def test_memory_comes_from_one_function():
    """So that poisoned_workspaces (conftest.py) sees all of it: no torch.empty but in memory.empty, and no
    `from .memory import empty`, which would hide its replacement.
    """
    uninitialised = ("torch.empty", "torch.empty_like", "torch.empty_strided")
    for module, path in sources("cnnfast_kernels").items():
        if not module.startswith(MAY_ALLOCATE):
            assert not any(name in uninitialised or name.endswith(".new_empty") for name in attributes(path)), module
        assert not any(name.endswith("memory.empty") for name in MODULES[module]), module


def test_no_module_hides_behind_a_function_of_its_package():
    """`from .convert import convert` in cnnfast/__init__.py would make cnnfast.convert the one or the other, by import
    order.
    """
    for module, path in sources("cnnfast").items():
        if path.stem == "__init__":
            assert not [
                name
                for name in MODULES[module]
                if name in MODULES and f"{name}.{name.rpartition('.')[2]}" in MODULES[module]
            ]
