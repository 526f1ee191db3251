"""The heads of a network: the layers whose results are its classes, found and replaced by ones of other classes.

They are found by autograd's graph, not by names: from each result of the network back through operations that have no
weights, the first layer with weights is its head. So every family has one, whatever it calls it (fc, classifier[6],
heads.head), and those of GoogLeNet and Inception have more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class NoHead(ValueError):
    """A network in which no layer can be told to be the head; the message says what was found."""


def heads_of(model: nn.Module, images: Tensor) -> list[str]:
    """The names of the layers, nn.Linear or nn.Conv2d, whose results are what `model` returns for `images` [N, C, H,
    W]: that of its main result first.

    The network runs once, in training mode, so that heads which only training uses are found too; its batch norms'
    statistics and the generator of random numbers are left as they were. Raises NoHead where a result comes from
    anything else than one such layer.
    """
    names: list[str] = []
    for result in _results(model, images):
        for parameter in _last_parameters(result):
            name, layer = _owner(model, parameter)
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                raise NoHead(
                    f"the last layer with weights in {type(model).__name__} is {name or 'the model itself'}, a "
                    f"{type(layer).__name__}: only an nn.Linear or nn.Conv2d can be replaced by one of other classes"
                )
            if name not in names:
                names.append(name)
    if not names:
        raise NoHead(f"{type(model).__name__} returns no tensor that depends on its weights")
    return names


def replace_heads(model: nn.Module, classes: int, images: Tensor, only_others: bool = False) -> list[str]:
    """Gives `model` heads of so many classes, with weights as PyTorch initialises them, and returns the names of its
    heads. What a model says of its classes (`num_classes` of timm's and others' models) follows.

    only_others: a head that has so many classes already stays; else its weights, which are those of other classes, are
    replaced too. Raises NoHead, as heads_of does.
    """
    names = heads_of(model, images)
    for name in names:
        head = model.get_submodule(name)
        if only_others and _classes(head) == classes:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _like(head, classes).train(head.training))
    if isinstance(getattr(model, "num_classes", None), int):
        vars(model)["num_classes"] = classes
    return names


def _classes(head: nn.Module) -> int:
    assert isinstance(head, nn.Linear | nn.Conv2d)
    return head.weight.shape[0]


def _like(head: nn.Module, classes: int) -> nn.Module:
    """A new layer as `head` is, but of so many classes."""
    how: dict[str, Any] = {
        "bias": head.bias is not None,
        "device": head.weight.device,
        "dtype": head.weight.dtype,
    }
    if isinstance(head, nn.Linear):
        return nn.Linear(head.in_features, classes, **how)
    assert isinstance(head, nn.Conv2d)
    return nn.Conv2d(
        head.in_channels,
        classes,
        head.kernel_size,  # pyright: ignore[reportArgumentType] - a pair
        head.stride,  # pyright: ignore[reportArgumentType]
        head.padding,  # pyright: ignore[reportArgumentType]
        head.dilation,  # pyright: ignore[reportArgumentType]
        padding_mode=head.padding_mode,
        **how,
    )


def _results(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The tensors that the network returns in training mode, in their order, with autograd's graph."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    devices = [images.device] if images.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            for parameter in frozen:
                parameter.requires_grad_()
            return list(_tensors(model.train()(images)))
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, tuple | list):
        for value in result:
            yield from _tensors(value)


def _last_parameters(result: Tensor) -> Iterator[Tensor]:
    """One parameter of each layer from which a result comes without another layer between: several where heads are
    averaged.
    """
    seen: set[Any] = set()
    ahead = deque([result.grad_fn])
    while ahead:
        node = ahead.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        inputs = [function for function, _ in node.next_functions]
        own = [leaf for function in inputs if (leaf := _parameter(function)) is not None]
        if own:  # a layer: what lies before it is its input
            yield own[0]
        else:
            ahead.extend(inputs)


def _parameter(function: Any) -> Tensor | None:
    """The parameter that an operation takes as this input of it: as it is, or transposed, as a matrix product does."""
    if type(function).__name__ == "TBackward0":
        function = function.next_functions[0][0]
    return getattr(function, "variable", None)  # of AccumulateGrad, which is a leaf


def _owner(model: nn.Module, parameter: Tensor) -> tuple[str, nn.Module]:
    """The module that has a parameter as its own, and its name."""
    for name, module in model.named_modules():
        if any(own is parameter for own in module._parameters.values()):
            return name, module
    raise NoHead(f"a result of {type(model).__name__} depends on a tensor that is none of its parameters")
