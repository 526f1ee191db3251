"""The layers of a model, by running it on meta tensors: shapes, parameters, FLOPs and receptive fields without
computing anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import dispatch, receptive_field
from .aside import is_callers, meta, meta_copy, on_a_copy, run_aside

# What a class is called after: the file of torch.nn that defines it, or one that it inherits from.
KINDS = {
    "torch.nn.modules.conv": "conv",
    "torch.nn.modules.linear": "linear",
    "torch.nn.modules.batchnorm": "norm",
    "torch.nn.modules.instancenorm": "norm",
    "torch.nn.modules.normalization": "norm",
    "torch.nn.modules.pooling": "pool",
    "torch.nn.modules.activation": "activation",
}
WORDS = ("attention", "conv", "norm", "pool", "linear", "activation")  # in the names of other libraries' leaves


@dataclass(frozen=True)
class Layer:
    """One call of one module.

    name: as in model.named_modules(), "" for the model itself. kind: conv, linear, norm, pool, activation, attention,
    other. input_shape, output_shape: of the first tensor that goes in and comes out; () without one. parameters: its
    own, counted at the first call; a convolution's are (R*S*C/groups + 1)*K with bias. trainable: whether one of them
    requires a gradient. flops: multiplications and additions of its convolutions and matrix products, as
    torch.utils.flop_counter counts them: 2*N*P*Q*K*R*S*C/groups, taps in the padding counted, bias and everything
    pointwise not. receptive_field: input rows that one position of the output depends on (see receptive_field.py);
    None: the whole input; 0: nothing of it. jump: input rows from one position to the next; None where there are no
    positions. output_bytes: of all tensors that come out, 0 for one that lies in the memory of one that went in.
    """

    name: str
    kind: str
    class_name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    trainable: bool
    flops: int
    receptive_field: int | None
    jump: int | float | None
    dtype: str
    output_bytes: int


@dataclass(frozen=True)
class Summary:
    """All layers of a model, and totals: `parameters` and those that are `trainable`, each counted once; `flops` of the
    whole run, whoever did them; `output_bytes` of the layers; `unused`, parameters of modules that the run did not
    call. Parameters of lazy modules have the sizes that the run gave them; one that it did not call has none, and does
    not count.
    """

    layers: list[Layer]
    parameters: int
    trainable: int
    unused: int
    flops: int
    output_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates: half of the FLOPs."""
        return self.flops // 2


def layers(model: nn.Module, *example_inputs: Any) -> list[Layer]:
    """The layers that `model(*example_inputs)` calls in eval mode, in the order of the calls: see `summarize`."""
    return summarize(model, *example_inputs).layers


def summarize(model: nn.Module, *example_inputs: Any) -> Summary:
    """One Layer for each call of a convolution, linear layer, norm, pooling or activation, of any other module with
    parameters of its own, and of any other that multiplies matrices itself.

    A copy of the model runs on meta tensors, in eval mode: nothing is computed, no weight is copied, and the model, its
    hooks and the random numbers stay as they are. A model that cannot run so (because it branches on values, say) runs
    on a real copy instead. Converted models are shown layer by layer, as their originals.

    example_inputs: tensors, of any device, meta too, or structures of them. Raises RuntimeError if the model does not
    run on them.
    """
    try:
        return on_a_copy(summary_of, model, example_inputs)
    except Exception as error:
        raise RuntimeError(f"{_does_not_run(model, example_inputs)}: {type(error).__name__}: {error}") from error


def attempt(model: nn.Module, *example_inputs: Any) -> Summary | None:
    """The same, or None if the model does not run on meta tensors of these shapes."""
    try:
        return run_aside(summary_of, meta_copy(model), meta(example_inputs))
    except Exception:
        return None


def summary_of(model: nn.Module, inputs: tuple[Any, ...]) -> Summary:
    """`summarize`, by running this very model, which is of no use afterwards: see `on_a_copy`."""
    return _Run(model).of(inputs)


def _does_not_run(model: nn.Module, inputs: Any) -> str:
    shapes = " ".join("x".join(map(str, t.shape)) for t in tree_leaves(inputs) if isinstance(t, Tensor))
    return f"{type(model).__name__} does not run on {shapes or 'these inputs'}"


# ----------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class _Call:
    """A module that is running."""

    row: int
    inputs: list[Tensor]
    parameters: list[nn.Parameter]  # its own, and of others those that it reaches for itself
    flops: int = 0


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """nn.MultiheadAttention's fast path has one operator for everything, of which nothing is known."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Run(TorchDispatchMode):
    """Runs a copy of a model and sees every module through hooks and every operator as a dispatch mode."""

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
        with torch.no_grad(), _unfused_attention(), dispatch.backend("torch"), self:
            self.model(*inputs)
        parameters = {id(p): p for p in self.model.parameters() if not is_lazy(p)}.values()
        found = [row for row in self.rows if row is not None]
        return Summary(
            layers=found,
            parameters=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            unused=sum(p.numel() for p in parameters if id(p) not in self.counted),
            flops=self.flops,
            output_bytes=sum(row.output_bytes for row in found),
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
            flops=call.flops,
            receptive_field=seen.size if seen else 0,
            jump=seen.jump if seen else None,
            dtype=str(outputs[0].dtype).removeprefix("torch.") if outputs else "",
            output_bytes=sum(t.nbytes for t in outputs if t.untyped_storage()._cdata not in memory),
        )
        self.counted |= own.keys()


def _kind(module: nn.Module) -> str:
    """By what it inherits from torch.nn; leaves of other libraries, and attention, by their name; else the empty
    string.
    """
    words = [word for word in WORDS if word in type(module).__name__.lower()]
    if "attention" in words:
        return "attention"
    for base in type(module).__mro__:
        if base.__module__ in KINDS and base is not nn.Identity:
            return KINDS[base.__module__]
    return words[0] if words and not module._modules else ""
