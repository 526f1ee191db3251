"""What needs a GPU's compiler, not a GPU: kernels compiled ahead of time, and what their machine code says."""

from ..gpus import capability_of
from .compiling import KernelRow, compile_all, selected
from .judging import due_on, kernel_modules, problems, uncovered
from .stub_driver import require_compiled_kernels, target

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
