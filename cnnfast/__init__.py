"""Hand-written Triton kernels for convolutional networks in PyTorch.

    import cnnfast, torch, torchvision

    model = torchvision.models.resnet50().cuda()
    model = cnnfast.convert(model, memory_format=torch.channels_last)
    print(cnnfast.report(model))  # what was fused, replaced or left, and why

`convert` puts any CNN on the kernels, `report` says what it did, `revert` undoes it, `check` proves it, `warm` compiles
what it will launch ahead, `tune` measures who serves it fastest on this GPU, `explain` models where its time goes on
one that need not be here. `functional` holds the operations, `nn` the layers, `models` the ResNets, `training` takes a
folder of images to a trained network; `trace` and `backend` show and steer who serves a call.

Everything runs on every machine: where no kernel can serve a call, PyTorch does, and `trace` says why. Each function's
own help says what it takes and returns.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cnnfast_kernels import __version__ as __version__

if TYPE_CHECKING:
    from . import functional as functional
    from . import models as models
    from . import nn as nn
    from . import training as training
    from .checking import check as check
    from .conversion import convert as convert
    from .conversion import report as report
    from .conversion import revert as revert
    from .dispatch import backend as backend
    from .engine import Frozen as Frozen
    from .engine import freeze as freeze
    from .engine import load as load
    from .explaining import explain as explain
    from .recording import trace as trace
    from .tuning import tune as tune
    from .warming import warm as warm

_MODULES = ("functional", "models", "nn", "training")
_HOME = {
    "Frozen": ".engine",
    "backend": ".dispatch",
    "check": ".checking",
    "convert": ".conversion",
    "explain": ".explaining",
    "freeze": ".engine",
    "load": ".engine",
    "report": ".conversion",
    "revert": ".conversion",
    "trace": ".recording",
    "tune": ".tuning",
    "warm": ".warming",
}
__all__ = [
    "Frozen",
    "__version__",
    "backend",
    "check",
    "convert",
    "explain",
    "freeze",
    "functional",
    "load",
    "models",
    "nn",
    "report",
    "revert",
    "trace",
    "training",
    "tune",
    "warm",
]


if not TYPE_CHECKING:  # a type checker would take every name, misspelt ones too, for one that this finds

    def __getattr__(name: str) -> Any:
        """Loads torch and the kernels on first use: `import cnnfast` costs nothing."""
        if name in _MODULES:
            return importlib.import_module(f".{name}", __name__)
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name], __name__), name)
        from .spelling import did_you_mean

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
