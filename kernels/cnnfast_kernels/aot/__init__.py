"""What needs a GPU's compiler, not a GPU: kernels compiled ahead of time, and what their machine code says."""

from .compiling import Row, capability_of, compile_all, kernel_names, problems, target, uncovered

__all__ = ["Row", "capability_of", "compile_all", "kernel_names", "problems", "target", "uncovered"]
