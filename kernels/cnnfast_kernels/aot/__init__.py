"""What needs a GPU's compiler, not a GPU: kernels compiled ahead of time, and what their machine code says."""

from .compiling import KernelRow, capability_of, compile_all, require_compiled_kernels, selected, target
from .judging import due_on, kernel_modules, problems, uncovered

__all__ = [
    "KernelRow",
    "capability_of",
    "compile_all",
    "due_on",
    "kernel_modules",
    "problems",
    "require_compiled_kernels",
    "selected",
    "target",
    "uncovered",
]
