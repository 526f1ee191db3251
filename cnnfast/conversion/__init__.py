"""convert: any CNN of PyTorch's onto our kernels. revert: back. report: what was done.

A converted model is the same tree of modules, with other classes. Single modules (leaves.py) get the class of
cnnfast.nn that inherits from their own. Containers get a subclass of their own class (grafts.py), whose forward was
generated (fusion.py) from a trace of the container's own (tracing.py). It serves only where it is sure to compute the
same, and calls the container's own forward otherwise. Names, parameters, buffers, hooks, methods and isinstance are
what they were. (A GraphModule of torch.fx has a class that was made for it alone, and its copy has another: graphs.py.)
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ..nn.fused import forward_replaced
from ..nn.residual import LESS_MEMORY
from ..spelling import keywords_explained, unknown_value
from .fusion import fuse, unfuse
from .leaves import swap, swap_back
from .reporting import report_on
from .rows import CollectedRow, ConversionReport, ConvolutionRow
from .stages import link, unlink
from .tree import share

__all__ = ["CollectedRow", "ConversionReport", "ConvolutionRow", "convert", "report", "revert"]

M = TypeVar("M", bound=nn.Module)

MEMORY = ("fast", "less")
FORMATS = (None, torch.channels_last, torch.contiguous_format)
# What somebody may call them, as spelling.py folds words.
OTHER_FORMATS = {
    **dict.fromkeys(("channelslast", "torch.channelslast", "nhwc"), torch.channels_last),
    **dict.fromkeys(("contiguous", "contiguousformat", "channelsfirst", "nchw"), torch.contiguous_format),
    **dict.fromkeys(("preserve", "preserveformat"), None),
}


@keywords_explained
def convert(
    model: M,
    *,
    inplace: bool = False,
    memory_format: torch.memory_format | None = None,
    memory: Literal["fast", "less"] = "fast",
) -> M:
    """The same model on cnnfast's kernels: convolutions, batch norms and pools replaced, and fused where they follow
    one another. state_dict, parameters, buffers, hooks, methods and isinstance are the model's own.

        model = cnnfast.convert(model, memory_format=torch.channels_last)
        y = model(x.to(memory_format=torch.channels_last))
        print(cnnfast.report(model, x))

    model: any torch.nn.Module, in training or in eval, on any device; the result has its class, or one derived from it.
    Unless `inplace`, the result is a new tree of modules over the same Parameter and buffer objects: an optimizer that
    was made before still trains it, a checkpoint of one is a checkpoint of the other, and training one changes the
    statistics of both. Where a hook holds a part of the model, its copy holds the copy of that part, as after
    copy.deepcopy; what else it holds, such as a recorder of yours, is shared. Functions are shared too, as deepcopy
    shares them: where one has closed over the model, use inplace=True.

    memory_format: torch.channels_last lays out the weights, which are the original's too, so that kernels read vectors.
    Outputs then become channels_last, and a later `.view` may raise where `.reshape` would not. None keeps all strides.
    memory: "less" trains residual blocks by our kernels, whatever would serve their convolutions, and computes what
    inner activations gave again in backward, so that they save less; `report` says which are one operator. A model that
    was converted so stays so, until revert.
    Converting a converted model converts what is new in it. `report` says what was done, and what was left and why.

    Several threads may convert, report and call models at once, the same one too. As everywhere in PyTorch, a model
    that is changed, by inplace=True or by setting an attribute of a part of it, must not be called by another thread
    meanwhile. While one thread converts, no other can trace by torch.fx, or call what torch.compile has compiled:
    torch.fx refuses both.

    Raises TypeError if `model` is no module, and if a part of it cannot be copied over the same tensors, as a scripted
    module (then use inplace=True), and for an unknown keyword; ValueError for another memory format or another word for
    memory, and for a compiled model (convert it first, then compile).
    """
    _check("convert", model)
    if memory not in MEMORY:
        raise unknown_value("convert", "memory", memory, MEMORY)
    if memory_format not in FORMATS:
        raise unknown_value("convert", "memory_format", memory_format, FORMATS, OTHER_FORMATS)
    if not inplace:
        model = share(model, "convert")
    modules = list(model.modules())
    for module in modules:
        if "forward" in module.__dict__ and not forward_replaced(module):
            # A library that had wrapped the forward left the class's own here. The class is about to change.
            del module.__dict__["forward"]
        swap(module)
        if memory == "less" and module._modules:
            module.__dict__[LESS_MEMORY] = True
    for module in reversed(modules):  # children first: then it is known what calling one may do to its arguments
        fuse(module)
        link(module)
    return model if memory_format is None else model.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]


@keywords_explained
def revert(model: M, *, inplace: bool = False) -> M:
    """The model in PyTorch's own classes again, over the same Parameter and buffer objects; cnnfast.nn's modules become
    torch.nn's too.

    For what knows PyTorch's classes only, such as torch.jit.script and quantization. A model that was never converted
    is left as it is. inplace: as convert has it. Raises TypeError and ValueError as convert does.

        scripted = torch.jit.script(cnnfast.revert(model))
    """
    _check("revert", model)
    if not inplace:
        model = share(model, "revert")
    for module in model.modules():
        unfuse(module)
        unlink(module)
        swap_back(module)
        module.__dict__.pop(LESS_MEMORY, None)
    return model


def report(model: nn.Module, *example_inputs: Any) -> ConversionReport:
    """What of `model` runs on our kernels, what does not and why, and the share that each part has of the FLOPs and of
    the bytes of one forward pass.

    FLOPs are multiplications and additions of convolutions and matrix products. Bytes are computed from shapes and
    dtypes, and not measured: what each call reads and returns, a fused step once. What stays PyTorch's and costs
    something is listed by class: norms of other kinds, linear layers, attention, activations that stand alone, and
    tensor operations between modules. The shares of all rows sum to 1.

    A copy of the model runs on meta tensors, or on real ones if it cannot, in the modes that the model is in. The
    report says what was fused in that run, and what was called alone. Where the run fails, it says what is planned, and
    that nothing was seen. The model, its hooks, its lazy modules and the random numbers stay as they are.

    example_inputs: what the model takes; FLOPs and bytes are counted on them. Without them one image of 224 x 224 is
    tried, and nothing is counted if the model does not take it. In modes in which the model does not run they are those
    of eval mode.
    Raises TypeError if `model` is no module, RuntimeError if it does not run on inputs that were given, not even in
    eval mode.
    """
    _check("report", model)
    return report_on(model, example_inputs)


def _check(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}(): model must be a torch.nn.Module, but got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{function}(): a scripted model has no Python to convert: convert the model that was scripted")
    if type(model).__name__ == "OptimizedModule":
        raise ValueError(
            f"{function}(): this model is compiled already: {function} it first, then torch.compile the result"
        )
