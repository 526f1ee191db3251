"""torch.fx's tracers record our layers as they record torch.nn's: as one call of the layer, never what it does inside.

A tracer enters every module that is not of torch.nn, and runs its forward on proxies. So a layer that is called with a
proxy records its own call. It does so in `_call_impl`, before the layer's hooks, where a tracer stops at torch.nn's
layers. In forward it would be too late: hooks would be traced, and then run again with the layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn


def call_or_record(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`_call_impl` of a class of ours. Raises TypeError under torch.ao's tracers, which would not recognise the layer
    as a convolution.
    """
    if not (args and isinstance(args[0], Tensor)):
        # Tracers enter a class that is derived from ours, as they enter one that is derived from torch.nn's.
        proxy = next((a for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)), None)
        if proxy is not None and isinstance(proxy.tracer, fx.Tracer) and "_call_impl" in vars(type(self)):
            path = proxy.tracer.path_of_module(self)
            if _is_leaf(proxy.tracer, self, path):
                return proxy.tracer.create_proxy("call_module", path, args, kwargs)
    return nn.Module._call_impl(self, *args, **kwargs)


def _is_leaf(tracer: fx.Tracer, module: nn.Module, path: str) -> bool:
    """Whether `tracer` would record the call of torch.nn's layer of the same state."""
    for cls in type(tracer).__mro__:
        if cls.__module__.startswith("torch.ao."):
            raise TypeError(
                f"{cls.__module__}.{cls.__qualname__} looks for torch.nn's own classes, and would leave"
                f" {path} ({type(module).__module__}.{type(module).__qualname__}) as it is, without a word:"
                " revert first, cnnfast.revert(model)"
            )
    original: Any = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn."))
    twin = original.__new__(original)
    object.__setattr__(twin, "__dict__", module.__dict__)
    return tracer.is_leaf_module(twin, path)
