"""How much a reader has to hold at a time: lengths of files, numbers of parameters, one class a name. Read from the
sources: nothing is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = [file for folder in ("kernels", "cnnfast") for file in sorted((REPOSITORY / folder).rglob("*.py"))]
TREES = {str(file.relative_to(REPOSITORY)): ast.parse(file.read_text()) for file in SHIPPED}
MOST_LINES = 300
# Of an entry that Triton launches, of what it calls, and of any other function.
ENTRY, HELPER, FUNCTION = 36, 12, 14
# What users call has the parameters that it has, and the judge's twin of it the same.
PUBLIC = {("cnnfast/functional/fused.py", "conv_bn_act"), ("cnnfast/nn/blocks.py", "__init__")}
PUBLIC |= {("cnnfast/nn/augment.py", "__init__"), ("cnnfast/training/fitting.py", "fit")}
PUBLIC |= {("cnnfast/commands/train.py", "train")}
PUBLIC |= {("cnnfast/reference/normalization.py", "conv_bn_act")}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield name, node


def most_parameters(function: ast.FunctionDef) -> int:
    if not any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list):
        return FUNCTION
    return ENTRY if function.name.endswith("_kernel") else HELPER


def test_files_have_one_subject():
    """Above so many lines one asks which subject has left."""
    lengths = {str(file.relative_to(REPOSITORY)): len(file.read_text().splitlines()) for file in SHIPPED}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_functions_take_what_a_reader_can_hold():
    counted = {
        (name, f.name): len([*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs])
        for name, f in functions()
        if len([*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]) > most_parameters(f)
    }
    assert counted.keys() == PUBLIC


def test_what_triton_compiles_is_not_type_checked_and_the_rest_is():
    """pyright cannot follow Triton's language; host code beside it is read, since nothing else keeps pyright out."""
    for name, f in functions():
        decorators = [ast.unparse(decorator).partition("(")[0] for decorator in f.decorator_list]
        assert ("triton.jit" in decorators) == ("no_type_check" in decorators), (name, f.name)
    assert "\nignore = [\n" not in (REPOSITORY / "pyproject.toml").read_text().partition("[tool.pyright]")[2]


def test_a_class_name_stands_once():
    """In what is shipped, and in ci/: who reads the name knows the class."""
    trees = TREES | {str(file): ast.parse(file.read_text()) for file in sorted((REPOSITORY / "ci").rglob("*.py"))}
    named: dict[str, list[str]] = {}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                named.setdefault(node.name, []).append(name)
    assert {name: files for name, files in named.items() if len(files) > 1} == {}
