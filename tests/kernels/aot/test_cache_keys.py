"""What Triton keeps compiled kernels under on disk: the same in every process, or nobody finds what another one
compiled.
"""

from __future__ import annotations

import ast
from pathlib import Path

import cnnfast_kernels

TREES = {file: ast.parse(file.read_text()) for file in Path(cnnfast_kernels.__file__).parent.rglob("*.py")}


def constants(tree: ast.Module) -> set[str]:
    """Names that a module gives to tl.constexpr(...)."""
    assigned = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("tl.constexpr(")
    ]
    return {name.id for node in assigned for name in node.targets if isinstance(name, ast.Name)}


def test_helpers_read_no_constant_of_a_module():
    """Up to version 3.7 Triton counts the constants that a helper reads to a kernel's key only if it met the helper
    before, in another kernel: the key then hangs on what the process compiled before. Those that a kernel reads itself
    always count.
    """
    names = set().union(*map(constants, TREES.values()))
    assert names, "the constants are looked for in a way that finds none"
    helpers = [
        (file, node)
        for file, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.decorator_list and not node.name.endswith("_kernel")
    ]
    offences = []
    for file, helper in helpers:
        used = [node for node in ast.walk(helper) if isinstance(node, ast.Name)]
        own = {node.id for node in used if isinstance(node.ctx, ast.Store)} | {
            argument.arg for argument in helper.args.args
        }
        offences += [
            f"{file.name}: {helper.name} reads {name}" for name in sorted({node.id for node in used} & names - own)
        ]
    assert offences == []
