"""What MODEL names on the command line, and an input for it where none is given.

A bare name is looked for in cnnfast.models, torchvision, timm and transformers, in this order and as far as they are
installed; SOURCE:NAME looks in one of them. FILE.py:NAME and package.module:NAME (or package.module.NAME) are the
user's own.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import typer

from ..dtypes import CHOICES, full_name

if TYPE_CHECKING:
    from torch import nn

HINT = "MODEL"
DTYPE_HELP = f"One of {CHOICES}. fp32 multiplies as IEEE says; tf32: float32 tensors, products rounded to TF32."
MODEL_HELP = (
    "resnet50, SOURCE:NAME of cnnfast, torchvision, timm or transformers, file.py:NAME, or package.module:NAME."
)
INPUT_HELP = "Shape of an input, as 1x3x224x224; repeat for several."
WAYS = "a bare name such as resnet50, file.py:NAME or package.module:NAME"
SIZES = (32, 28, 64, 96, 128, 224, 256, 299, 384, 512)  # that models are made for; the usual ones first
FRAMES = 16  # of a video
# values a channel: of two, a batch norm in training makes +1 and -1, whatever they are, and gradients of rounding
# errors
FEWEST = 8


@dataclass(frozen=True)
class Target:
    """What a name stands for: `value` is a module or a function, `source` where it was found."""

    name: str
    source: str
    value: Callable[..., Any]


def resolve(text: str) -> Target:
    """The module or function that `text` names. A class, or a function without required arguments, is called, and what
    it returns taken.

    Raises typer.BadParameter, saying what is wrong and what would be right.
    """
    where, colon, name = text.rpartition(":")
    if colon and where in SOURCES:
        return _from_sources(name, [where])
    if colon and where and name:
        return Target(text, where, _object(_load(where), where, name))
    if not colon and text.endswith(".py"):
        raise typer.BadParameter(
            f"{text} names no model: write file.py:NAME; {_offers(_load(text), text)}", param_hint=HINT
        )
    if colon or not text:
        raise typer.BadParameter(f"{text!r}: write {WAYS}", param_hint=HINT)
    sys.path.insert(0, str(Path.cwd()))
    if "." in text and _installed(text.partition(".")[0]):
        where, _, name = text.rpartition(".")
        return Target(text, where, _object(_load(where), where, name))
    return _from_sources(text, list(SOURCES))


def resolve_module(text: str) -> tuple[Target, nn.Module]:
    """The same, of commands that need a torch.nn.Module."""
    from torch import nn

    target = resolve(text)
    if isinstance(target.value, nn.Module):
        return target, target.value
    needs = missing_arguments(target.value)
    because = (
        f" needs arguments ({', '.join(needs)})"
        if needs
        else f" gives {type(target.value).__name__}, not a torch.nn.Module"
    )
    raise typer.BadParameter(
        f"{text}{because}: name a module, or a function that builds one without arguments", param_hint=HINT
    )


# ----------------------------------------------------------------------------------------------------------------------
# Libraries of models


@dataclass(frozen=True)
class Source:
    """A library: its module, the names it lists, and how it makes a model, whose weights are random; None if it has no
    such name.
    """

    module: str
    names: Callable[[ModuleType], Iterable[str]]
    make: Callable[[ModuleType, str], Any]


def _own_names(models: ModuleType) -> list[str]:
    return [
        name
        for name in getattr(models, "__all__", vars(models))
        if name[0] != "_" and inspect.isfunction(getattr(models, name))
    ]


def _own_make(models: ModuleType, name: str) -> Any:
    return getattr(models, name)() if name in _own_names(models) else None


def _torchvision_make(models: ModuleType, name: str) -> Any:
    if name.lower() not in models.list_models():
        return None
    build = models.get_model_builder(name)
    return build(
        **{parameter: None for parameter in inspect.signature(build).parameters if parameter.startswith("weights")}
    )


def _timm_make(timm: ModuleType, name: str) -> Any:
    return timm.create_model(name, pretrained=False) if timm.is_model(name) else None


def _transformers_architectures() -> dict[str, dict[str, Any]]:
    """Of images: for each automatic class the model types that it knows, and their classes."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    tasks = {
        "AutoModel": "IMAGE",
        "AutoModelForImageClassification": "IMAGE_CLASSIFICATION",
        "AutoBackbone": "BACKBONE",
        "AutoModelForSemanticSegmentation": "SEMANTIC_SEGMENTATION",
        "AutoModelForUniversalSegmentation": "UNIVERSAL_SEGMENTATION",
        "AutoModelForObjectDetection": "OBJECT_DETECTION",
        "AutoModelForDepthEstimation": "DEPTH_ESTIMATION",
        "AutoModelForImageToImage": "IMAGE_TO_IMAGE",
    }
    return {name: dict(getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})) for name, task in tasks.items()}


def _transformers_names(_: ModuleType) -> list[str]:
    names: list[str] = []
    for types in _transformers_architectures().values():
        for model_type, classes in types.items():
            names += [model_type, *((classes,) if isinstance(classes, str) else classes)]
    return list(dict.fromkeys(names))


def _transformers_make(transformers: ModuleType, name: str) -> Any:
    """By model type (convnext), or by the class of a model (ConvNextModel) or of its configuration: as configured by
    default.
    """
    if name in importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES:
        auto = next((auto for auto, types in _transformers_architectures().items() if name in types), "AutoModel")
        return getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(name))
    found = getattr(transformers, name) if name[:1].isupper() and name in dir(transformers) else None
    if hasattr(found, "config_class"):
        return _with_default_configuration(found)
    return transformers.AutoModel.from_config(found()) if found is not None and hasattr(found, "model_type") else None


def _with_default_configuration(model_class: Any) -> Any:
    return model_class(model_class.config_class())


SOURCES = {
    "cnnfast": Source("cnnfast.models", _own_names, _own_make),
    "torchvision": Source("torchvision.models", lambda models: models.list_models(), _torchvision_make),
    "timm": Source("timm", lambda timm: timm.list_models(), _timm_make),
    "transformers": Source("transformers", _transformers_names, _transformers_make),
}


def _from_sources(name: str, sources: Sequence[str]) -> Target:
    installed = [source for source in sources if _installed(SOURCES[source].module)]
    for source in installed:
        module = _import(source)
        if module is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            try:
                model = SOURCES[source].make(module, name)
            except Exception as error:
                raise typer.BadParameter(
                    f"{source} does not build {name}: {_in_a_line(error)}", param_hint=HINT
                ) from error
        if model is not None:
            return Target(name, source, model)
    here = [source for source in installed if _import(source)]
    places = (
        f"no model of {', '.join(here)}" if here else "a bare name, and no library of models is here to look it up in"
    )
    broken = (
        f" ({', '.join(source for source in installed if source not in here)} installed, but not importable)"
        if here != installed
        else ""
    )
    near = _near(name, here)
    end = f"; near: {', '.join(near)}" if near else f"; write {WAYS}" if len(sources) > 1 else ""
    if len(sources) == 1 and not here:
        raise typer.BadParameter(f"{sources[0]} is not {'importable' if installed else 'installed'}", param_hint=HINT)
    raise typer.BadParameter(f"{name!r} is {places}{broken}{end}", param_hint=HINT)


def _near(name: str, sources: Iterable[str]) -> list[str]:
    """Names like this one, the nearest first, whatever their case."""
    modules = [(source, module) for source in sources if (module := _import(source)) is not None]
    by_lower = {known.lower(): known for source, module in modules for known in SOURCES[source].names(module)}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=6, cutoff=0.7)]


def _installed(module: str) -> bool:
    try:
        return (
            sys.modules[module] is not None if module in sys.modules else importlib.util.find_spec(module) is not None
        )
    except ImportError:  # the parent of a submodule
        return False
    except Exception:  # that parent is there, but does not import: `_import` says so
        return True


@cache
def _import(source: str) -> ModuleType | None:
    """The library, or None, said once, if it is installed and does not import."""
    try:
        return importlib.import_module(SOURCES[source].module)
    except Exception as error:
        typer.echo(f"{source} is installed but does not import: {_in_a_line(error)}", err=True)
        return None


def _in_a_line(error: BaseException) -> str:
    """Of the first cause: lazy imports wrap it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


# ----------------------------------------------------------------------------------------------------------------------
# The user's own


def _load(where: str) -> ModuleType:
    """A module, from its file or by its name; both may import what lies beside them, or in the current folder."""
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise typer.BadParameter(f"there is no file {where}", param_hint=HINT)
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"cannot import {where}: {error}", param_hint=HINT) from None


def _offers(module: ModuleType, where: str) -> str:
    """Its own names, or those that it imports if it has none."""
    public = {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
    own = [name for name, value in public.items() if getattr(value, "__module__", module.__name__) == module.__name__]
    return f"{where} has {', '.join(sorted(own or public)) or 'nothing to call'}"


def _object(module: ModuleType, where: str, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(name, dir(found), n=3)
            says = f"near: {', '.join(near)}" if near else _offers(module, where)
            raise typer.BadParameter(f"{where} has no {name!r}; {says}", param_hint=HINT)
        found = getattr(found, part)
    if inspect.isclass(found) or inspect.isroutine(found):
        missing = missing_arguments(found)
        if missing == ["config"] and getattr(found, "config_class", None):
            return _with_default_configuration(found)
        if missing and inspect.isclass(found):
            message = f"{name} needs arguments ({', '.join(missing)}): name a function that builds it without"
            raise typer.BadParameter(message, param_hint=HINT)
        if missing or inspect.isbuiltin(found):  # a function of tensors; PyTorch's own do not say what they take
            return found
        found = found()
    if not callable(found):
        message = f"{where}:{name} is, or returns, {type(found).__name__}: nothing that can be called"
        raise typer.BadParameter(message, param_hint=HINT)
    return found


def missing_arguments(function: Any) -> list[str]:
    """The parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin says nothing of its arguments
        return []
    collecting = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in collecting]


# ----------------------------------------------------------------------------------------------------------------------
# Inputs


def parse_shape(text: str) -> tuple[int, ...]:
    """1x3x32x32 as a tuple."""
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(
            f"{text!r} is no shape: write positive sizes with x between them, as in 1x3x32x32", param_hint="--input"
        )
    return tuple(map(int, sizes))


def parse_dtype(text: str) -> str:
    """The full name: bf16 as "bfloat16"; "tf32" stays."""
    try:
        return full_name(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--dtype") from None


def input_shape(model: nn.Module, batch: int, *, small: bool) -> tuple[int, ...]:
    """A shape that the model takes, by its first convolution or linear layer and what it says of itself (timm,
    transformers).

    small: the first of SIZES on which it runs and every batch norm sees FEWEST values a channel, or at least it runs;
    else its own size, or 224, comes first. Raises typer.BadParameter for a model in which nothing tells.
    """
    import torch

    from ..summary import attempt

    features = _first_features(model)
    if features is None:
        raise typer.BadParameter(
            f"{type(model).__name__} has no layer with a weight that would tell its input: give it",
            param_hint="--input",
        )
    in_channels, dims = features
    if dims == 0:
        return (batch, in_channels)
    channels, own = _own_input(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    sizes = [(n, n) for n in SIZES]
    sizes = [*sizes, *own] if small else [*(own or [(224, 224)]), *sizes]
    shapes = [(batch, channels or in_channels, *(FRAMES,) * (dims - 2), *size[:dims]) for size in sizes]
    running: list[tuple[int, ...]] = []
    for shape in shapes:
        summary = attempt(model, torch.empty(shape, dtype=dtype, device="meta"))
        if summary is None:
            continue
        running.append(shape)
        norms = [
            layer.output_shape
            for layer in summary.layers
            if "BatchNorm" in layer.class_name and len(layer.output_shape) > 2
        ]
        if not small or all(math.prod(norm) >= FEWEST * norm[1] for norm in norms):
            return shape
    return (running or shapes)[0]


def _first_features(model: nn.Module) -> tuple[int, int] | None:
    """(channels, spatial axes) that the first convolution takes; else the first layer with a convolution's weight, or a
    linear one.
    """
    from torch import nn
    from torch.nn.parameter import is_lazy

    found: list[tuple[int, int]] = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.modules.conv._ConvNd):  # a lazy one takes any image
            return module.in_channels or 3, len(module.kernel_size)
        if weight is not None and not is_lazy(weight) and weight.dim() in (2, 3, 4, 5):
            found.append((weight.shape[1] * getattr(module, "groups", 1), weight.dim() - 2))
    return next((features for features in found if features[1]), found[0] if found else None)


def _own_input(model: nn.Module) -> tuple[int | None, list[tuple[int, int]]]:
    """(channels, [height and width]) as far as the model says: as configured for transformers, as trained for timm."""
    config: Any = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
        return getattr(config, "num_channels", None), [(height, width)]
    trained: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return getattr(config, "num_channels", None), [tuple(trained["input_size"][1:])] if "input_size" in trained else []
