"""One run of a model, in which every module is seen by hooks, and every operator by a dispatch mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .. import dispatch
from ..aside import is_callers
from . import receptive_field
from .rows import Layer, Summary

# Kinds of layers, as they are named by the files of torch.nn, and in the class names of other libraries' leaves.
KINDS = ("attention", "conv", "norm", "pool", "linear", "activation")


def summary_of(model: nn.Module, inputs: tuple[Any, ...]) -> Summary:
    """Runs this very model, which is of no use afterwards: see `aside.on_a_copy`."""
    return _Run(model).of(inputs)


@dataclass
class _Call:
    """A module that is running."""

    row: int
    inputs: list[Tensor]
    parameters: list[nn.Parameter]  # its own, and those of other modules that it reads itself
    flops: int = 0


class _Run(TorchDispatchMode):
    """Runs a copy of a model and makes a Layer of each call of a module that is one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.rows: list[Layer | None] = []
        self.running: list[_Call] = []
        self.counted: set[int] = set()  # parameters
        self.flops = 0
        for module in model.modules():
            module.training = False
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if is_callers(hook)]:
                    del hooks[key]
            module.register_forward_pre_hook(self.enter, with_kwargs=True)
            module.register_forward_hook(self.leave)

    def of(self, inputs: tuple[Any, ...]) -> Summary:
        for t in tree_leaves(inputs):
            if isinstance(t, Tensor) and t.is_floating_point():
                receptive_field.see(t)
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it is one operator whose FLOPs nobody counts
        try:
            with torch.no_grad(), dispatch.in_this_thread("torch"), self:
                self.model(*inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
        parameters = {id(p): p for p in self.model.parameters() if not is_lazy(p)}.values()
        found = [row for row in self.rows if row is not None]
        return Summary(
            layers=found,
            parameters=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            unused=sum(p.numel() for p in parameters if id(p) not in self.counted),
            parameter_bytes=sum(p.nbytes for p in parameters),
            buffer_bytes=sum({id(b): b.nbytes for b in self.model.buffers() if not is_lazy(b)}.values()),
            flops=self.flops,
            output_bytes=sum(row.output_bytes for row in found),
            classes={name: type(module).__name__ for name, module in self.model.named_modules()},
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        self.flops += flops
        if self.running:
            self.running[-1].flops += flops
            self.running[-1].parameters += [t for t in args if isinstance(t, nn.Parameter)]
        receptive_field.follow(func, args, kwargs, result)
        return result

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.running.append(_Call(len(self.rows), inputs, list(module.parameters(recurse=False))))
        self.rows.append(None)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self.running.pop()
        kind = _kind(module)
        own = {id(p): p for p in call.parameters}
        if not (kind or call.flops or own.keys() - self.counted or list(module.parameters(recurse=False))):
            return
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        memory = {t.untyped_storage()._cdata for t in call.inputs}
        seen = receptive_field.of(outputs[0]) if outputs else None
        self.rows[call.row] = Layer(
            name=self.names[id(module)],
            kind=kind or "other",
            class_name=type(module).__name__,
            input_shape=tuple(call.inputs[0].shape) if call.inputs else (),
            output_shape=tuple(outputs[0].shape) if outputs else (),
            parameters=sum(p.numel() for i, p in own.items() if i not in self.counted),
            trainable=any(p.requires_grad for p in own.values()),
            trainable_parameters=sum(p.numel() for i, p in own.items() if p.requires_grad and i not in self.counted),
            flops=call.flops,
            receptive_field=seen.size if seen else 0,
            jump=seen.jump if seen else None,
            dtype=str(outputs[0].dtype).removeprefix("torch.") if outputs else "",
            output_bytes=sum(t.nbytes for t in outputs if t.untyped_storage()._cdata not in memory),
        )
        self.counted |= own.keys()


def _kind(module: nn.Module) -> str:
    """By the file of torch.nn that defines its class, or one that it inherits from; leaves of other libraries, and
    attention, by their names; "" if neither tells.
    """
    own = type(module).__name__.lower()
    files = [base.__module__ for base in type(module).__mro__ if base is not nn.Identity]
    places = [file.rpartition(".")[2] for file in files if file.startswith("torch.nn.modules.")]
    places = ["attention"] if "attention" in own else places + ([own] if not module._modules else [])
    return next((kind for place in places for kind in KINDS if kind in place), "")
