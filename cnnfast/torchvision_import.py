"""torchvision, also where only half of it loads."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from pathlib import Path
from types import ModuleType

import torch

_importing = threading.Lock()  # two threads would define the operators twice
_defined: list[torch.library.Library] = []  # an operator ends with the Library that defined it


@functools.cache
def torchvision() -> ModuleType:
    """torchvision, importable also where its C library does not load. Raises ModuleNotFoundError where it is not
    installed.
    """
    make_importable()
    importlib.import_module("torchvision.models.detection")
    return importlib.import_module("torchvision")


@functools.cache
def make_importable() -> None:
    """Lets torchvision, and timm, which imports it, be imported where torchvision's C library does not load: PyPI's
    wheel is linked with CUDA, and beside a torch without CUDA the import fails for want of two operators that no model
    here calls. Does nothing where torchvision is not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    with _importing:
        if spec is not None and spec.origin is not None and not _defined:
            try:
                torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
            except OSError:
                library = torch.library.Library("torchvision", "DEF")
                for name in ("nms", "qnms"):
                    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _defined.append(library)
