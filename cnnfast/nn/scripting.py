"""What torch.jit.script is told when it meets a module of ours: TorchScript compiles Python that is written for it, and
ours is not.

It asks each module for `__prepare_scriptable__` before it compiles anything.
"""

from __future__ import annotations

from typing import NoReturn

from torch import nn


class RevertToScript(nn.Module):
    """For modules that are PyTorch's own after cnnfast.revert."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script(): {type(self).__name__} is converted, or a layer of cnnfast.nn, and TorchScript cannot compile it:"
            " revert the model first, torch.jit.script(cnnfast.revert(model))"
        )


class TraceToScript(nn.Module):
    """For modules that have no class in PyTorch: revert leaves them what they are."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script(): {type(self).__name__} is cnnfast's own, also after cnnfast.revert(), and TorchScript cannot compile it:"
            " trace the model, torch.jit.trace(model, inputs), which records PyTorch's operators"
        )
