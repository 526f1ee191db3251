"""Why torch.jit.script cannot have a module of ours: TorchScript compiles only Python that is written for it.

It calls `__prepare_scriptable__` of each module before it compiles anything.
"""

from __future__ import annotations

from typing import NoReturn

from torch import nn


class RevertToScript(nn.Module):
    """For modules that are PyTorch's own after cnnfast.revert."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script(): {type(self).__name__} is converted, or a layer of cnnfast.nn,"
            " and TorchScript cannot compile it: revert the model first, torch.jit.script(cnnfast.revert(model))"
        )


class TraceToScript(nn.Module):
    """For modules that have no class in PyTorch: cnnfast.revert leaves them as they are."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script(): {type(self).__name__} is cnnfast's own, also after cnnfast.revert(),"
            " and TorchScript cannot compile it: trace the model, torch.jit.trace(model, inputs),"
            " which records PyTorch's operators"
        )
