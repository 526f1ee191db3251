"""From a model to a frozen network: what is asked for is checked, a private copy captured, folded, and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import dtypes
from ..aside import does_not_run, is_callers, leaving_no_trace, real_copy
from ..conversion import revert
from ..spelling import keywords_explained
from .capturing.capture import CannotCapture
from .folding.folding import fold
from .frozen import Frozen
from .images.classes import classes_of, found_on
from .images.preprocessing import Preprocessing
from .judging import LIMITS, NotClose, SelfCheck
from .network import Network
from .original import Original
from .structures import Structure
from .unplanned import Unplanned

Progress = Callable[[int, int, str], None]
STAGES = ("running the model", "capturing", "folding", "building and checking")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
NO_GPU = "no runner for a GPU is there yet"


@keywords_explained
def freeze(
    model: nn.Module,
    *example_inputs: Any,
    dtype: torch.dtype | str | None = None,
    quantize: None = None,
    calibration: None = None,
    preprocessing: Any = None,
    classes: Any = None,
    progress: Progress | None = None,
) -> Frozen:
    """The trained model as a network that runs fast on any CPU, and can be saved as one file.

        frozen = cnnfast.freeze(model, torch.zeros(1, 3, 224, 224))
        y = frozen(x)  # any batch size
        frozen.save("model.cnnfast")  # cnnfast.load("model.cnnfast") needs no code of the model

    A private copy of the model, in eval mode, is captured by torch.export. Batch norms are folded into convolutions in
    float64, additions and activations fused. onnxruntime runs the result where it is installed (pip install
    '.[cpu]'), oneDNN through PyTorch's own operators elsewhere, and in half precision. The model and its hooks
    stay as they are, and so do modes, gradients and random numbers. Forward hooks that are functions of yours are not
    part of the frozen network, and its report says so.

    A model that torch.export cannot capture is served as `cnnfast.convert` makes it. The report says why, and such a
    network can be called, but not saved.

    model: on the CPU, in training mode or not; a converted one is reverted in the copy. example_inputs: what the model
    takes by position: tensors on the CPU, numbers, None, texts, and tuples, lists and dicts of those. Tensors may have
    another batch size later, and another image size where the model allows it (see Frozen); all else is fixed.

    dtype: that the network computes in, float32, bfloat16 or float16, or a name of theirs such as "bf16"; by default
    the model's. Results keep the dtypes that the model gives.

    preprocessing: how images are prepared, which `cnnfast predict` does then: weights of torchvision or their
    transforms(), a pretrained_cfg of timm, or a mapping such as dict(size=256, crop=224, mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225]). classes: names of the classes, in the order of the result's columns: a list, weights of
    torchvision, or a text file with a name in each line. What a model of timm or transformers has of both is found.
    quantize, calibration: reserved; int8 comes with the runner for GPUs. progress: called with (stages done, in all,
    what comes next).

    The results on the example are compared with the original's in float64. They must reach a signal-to-noise ratio of
    100 dB in float32, a relative error of 1e-5, or 40 dB in half precision. Where PyTorch's own results in that dtype
    do not reach it, as those of networks with random weights may, ours may be 6 dB below PyTorch's. Integers must be
    equal. report() tells the ratio, and how often the largest column is the same.

    Returns a Frozen. Raises TypeError if `model` is no module or a keyword is unknown; ValueError for a scripted,
    compiled or lazy model, for tensors on a GPU, for a dtype, preprocessing or classes that do not fit, and where the
    results are not close enough; RuntimeError if the model does not run on the example.
    """
    _check(model, example_inputs)
    if quantize is not None or calibration is not None:
        name = "quantize" if quantize is not None else "calibration"
        raise ValueError(f"freeze(): {name} must be None: int8 comes with the runner for GPUs, which is not there yet")
    wanted = _dtype(dtype, model, example_inputs)
    given = (
        None if preprocessing is None else Preprocessing.of(preprocessing),
        None if classes is None else classes_of(classes),
    )
    tell = progress or (lambda done, total, text: None)

    tell(0, len(STAGES), STAGES[0])
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        original, notes = _private(model, example_inputs, wanted)
        try:
            result = original.run()
        except Exception as error:
            raise does_not_run(model, example_inputs, error) from error
        tell(1, len(STAGES), STAGES[1])
        try:
            leaves, structure = _flat_result(result)
            captured = original.captured()
        except CannotCapture as error:
            frozen: Frozen = Unplanned(original, result, str(error), given, notes)
        else:
            tell(2, len(STAGES), STAGES[2])
            example = tuple(tuple(t.shape) for t in Structure.flatten(original.inputs)[0])
            network = Network(
                fold(captured.graph, wanted, example),
                captured.arguments,
                structure,
                wanted,
                tuple(t.dtype for t in leaves),
                example,
            )
            network, left_out = _surrounded(network, leaves, given, found_on(model))
            frozen = Frozen(network, original=original, notes=[*notes, *left_out])
        tell(3, len(STAGES), STAGES[3])
        check = frozen.self_check(original)
    if check is not None and not check.ok:
        raise NotClose(_refusal(original, check))
    tell(len(STAGES), len(STAGES), "frozen")
    return frozen


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for


def _check(model: Any, example_inputs: tuple[Any, ...]) -> None:
    if isinstance(model, Frozen):
        raise TypeError("freeze(): this network is frozen already: save it, or freeze the model that it was made of")
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze(): model must be a torch.nn.Module, but got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("freeze(): a scripted model has no Python to capture: freeze the model that was scripted")
    if type(model).__name__ == "OptimizedModule":
        raise ValueError("freeze(): this model is compiled: freeze the model that was given to torch.compile")
    state = dict([*model.named_parameters(), *model.named_buffers()])
    if lazy := next((name for name, t in state.items() if is_lazy(t)), ""):
        raise ValueError(f"freeze(): {lazy} has no size yet: call the model once, and load its weights, before")
    for name, t in state.items():
        if t.device.type != "cpu":
            raise ValueError(f"freeze(): the model is on {t.device} ({name}), and {NO_GPU}: freeze model.cpu()")
    if not example_inputs:
        raise ValueError(
            "freeze(): there is no example input: give what the model takes, such as torch.zeros(1, 3, 224, 224)"
        )
    try:
        leaves, _ = Structure.flatten(example_inputs)
    except ValueError as error:
        raise ValueError(f"freeze(): example_inputs: {error}") from None
    if not leaves:
        raise ValueError("freeze(): there is no tensor in the example inputs")
    for i, t in enumerate(leaves):
        if t.device.type != "cpu":
            raise ValueError(f"freeze(): tensor {i + 1} of the example is on {t.device}, and {NO_GPU}: use .cpu()")
        if t.layout != torch.strided or t.is_quantized:
            raise ValueError(f"freeze(): tensor {i + 1} of the example must be dense, but is {t.dtype}, {t.layout}")
        if t.numel() == 0:
            raise ValueError(f"freeze(): tensor {i + 1} of the example has no elements: {list(t.shape)}")


def _dtype(asked: torch.dtype | str | None, model: nn.Module, example_inputs: tuple[Any, ...]) -> torch.dtype:
    """What the network shall compute in."""
    dtype, products = dtypes.argument(asked, "freeze")
    if products == "tf32":
        raise ValueError("freeze(): dtype='tf32' is a way to multiply on a GPU: use 'fp32'")
    if dtype is None:
        leaves, _ = Structure.flatten(example_inputs)
        tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        found = {t.dtype for t in tensors or leaves if t.is_floating_point()} or {torch.float32}
        if len(found) > 1:
            names = ", ".join(sorted(map(str, found)))
            raise ValueError(f"freeze(): the model has parameters of several dtypes ({names}): say dtype=")
        dtype = found.pop()
    if dtype not in LIMITS:
        raise ValueError(f"freeze(): no runner computes in {dtype}: use dtype='fp32', 'bf16' or 'fp16'")
    return dtype


# ----------------------------------------------------------------------------------------------------------------------
# The private copy


def _private(model: nn.Module, example_inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Original, list[str]]:
    """A copy in eval mode, in PyTorch's classes and without the caller's own hooks, and what a user should know."""
    with leaving_no_trace():
        copied = revert(real_copy(model), inplace=True)
    hooked = []
    for name, module in copied.named_modules():
        for hooks in (vars(module)[kind] for kind in HOOKS):
            for key in [key for key, hook in hooks.items() if is_callers(hook)]:
                del hooks[key]
                hooked.append(name or "the model itself")
    leaves, structure = Structure.flatten(example_inputs)
    inputs = structure.build([t.detach().clone() for t in leaves])
    where = ", ".join(dict.fromkeys(hooked))
    notes = [f"forward hooks of yours are not part of the network: on {where}"] if hooked else []
    return Original(copied.eval().requires_grad_(False), inputs, dtype), notes


def _flat_result(result: Any) -> tuple[list[Tensor], Structure]:
    try:
        leaves, structure = Structure.flatten(result)
    except ValueError as error:
        raise CannotCapture(f"its result cannot be taken apart: {error}") from None
    if not leaves:
        raise CannotCapture("there is no tensor in its result")
    return leaves, structure


# ----------------------------------------------------------------------------------------------------------------------
# What surrounds the network


def _surrounded(
    network: Network,
    results: list[Tensor],
    given: tuple[Preprocessing | None, tuple[str, ...] | None],
    found: tuple[Preprocessing | None, tuple[str, ...] | None],
) -> tuple[Network, list[str]]:
    """The network with preprocessing and classes, and what was found on the model and left out, in sentences. Raises
    ValueError where what was given does not fit.
    """
    notes = []
    preprocessing = given[0] or found[0]
    if preprocessing is not None:
        problem = _misfit(preprocessing, network)
        if not problem:
            network = replace(network, preprocessing=preprocessing)
        elif given[0]:
            raise ValueError(f"freeze(): {problem}")
        else:
            notes.append(f"the preprocessing found on the model is left out: {problem}")
    classes = given[1] or found[1]
    if classes is not None:
        problem = _miscount(classes, results[0])
        if not problem:
            network = replace(network, classes=classes)
        elif given[1]:
            raise ValueError(f"freeze(): {problem}")
        else:
            notes.append(f"the classes found on the model are left out: {problem}")
    return network, notes


def _misfit(preprocessing: Preprocessing, network: Network) -> str:
    """Why the network does not take such images; the empty string if it does. Of which size they are is not looked at,
    for the network's image size may become free.
    """
    graph = network.graph.copy()
    graph.inputs = tuple(replace(one, shape=(*one.shape[:2], *(None for _ in one.shape[2:]))) for one in graph.inputs)
    try:
        preprocessing.check_sizes(replace(network, graph=graph))
    except ValueError as error:
        return str(error)
    return ""


def _miscount(classes: tuple[str, ...], result: Tensor) -> str:
    """Why the classes are no names of the result's columns; the empty string if they are."""
    if result.dim() != 2:
        return f"classes name the columns of a result [N, classes], and the first result is {list(result.shape)}"
    if result.shape[1] != len(classes):
        columns = f"the first result, {list(result.shape)}, has {result.shape[1]} columns"
        return f"there are {len(classes)} classes, and {columns}"
    return ""


def _refusal(original: Original, check: SelfCheck) -> str:
    if original.dtype == torch.float32:
        advice = (
            "An operator is computed differently here. Freezing a part of the model finds out which: please report it."
        )
    else:
        name = dtypes.name_of(original.dtype)
        advice = f"{name} is too coarse for this model: use dtype='fp32', or the other half precision."
    return (
        f"freeze(): on the example, the frozen network is too far from {original.name}. The limit is that of the dtype,"
        f" or 6 dB below PyTorch's own result where that is worse.\n{check}\n{advice}"
    )
