"""Published models, with random weights: those of cnnfast, torchvision, timm and transformers, by their names there."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from ..spelling import near, quoted
from .files import with_default_configuration
from .target import Target, TargetError

WAYS = "a bare name such as resnet50, file.py:NAME or package.module:NAME"


@dataclass(frozen=True)
class Source:
    """A library of models: the module to import, the names that it lists, and how it makes a model; `make` returns None
    for a name that the library does not have.
    """

    module: str
    names: Callable[[ModuleType], Iterable[str]]
    make: Callable[[ModuleType, str], Any]


def looked_up(name: str, sources: Sequence[str]) -> Target:
    """The model of that name from the first of these libraries that has it. Raises TargetError with names like it."""
    present = [source for source in sources if installed(SOURCES[source].module)]
    for source in present:
        module = imported(source)
        if module is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            try:
                model = SOURCES[source].make(module, name)
            except Exception as error:
                raise TargetError(f"{source} does not build {name}: {_in_a_line(error)}") from error
        if model is not None:
            return Target(name, source, model)
    raise TargetError(_not_found(name, sources, present))


def _not_found(name: str, sources: Sequence[str], present: Sequence[str]) -> str:
    """Why no library gave the model: `sources` were asked for, `present` are those of them that are installed."""
    here = [source for source in present if imported(source)]
    if len(sources) == 1 and not here:
        return f"{sources[0]} is not {'importable' if present else 'installed'}"
    places = f"no model of {', '.join(here)}" if here else "a bare name, and no library of models can be imported here"
    broken = [source for source in present if source not in here]
    without = f" ({', '.join(broken)} installed, but not importable)" if broken else ""
    package, dot, _ = name.partition(".")
    if dot and not installed(package):
        without += f", and there is no package {package}"
    modules = [(source, module) for source in here if (module := imported(source)) is not None]
    known = [known for source, module in modules for known in SOURCES[source].names(module)]
    if like := near(name, known, most=3):
        advice = f". Did you mean {quoted(like)}?"
    else:
        advice = f"; write {WAYS}" if len(sources) > 1 else ""
    return f"{name!r} is {places}{without}{advice}"


def installed(module: str) -> bool:
    """Whether a module can be found, whether or not it can be imported."""
    try:
        return (
            sys.modules[module] is not None if module in sys.modules else importlib.util.find_spec(module) is not None
        )
    except ImportError:  # the package that a submodule belongs to is not installed
        return False
    except Exception:  # that package is installed, but importing it fails: `imported` says so
        return True


@cache
def imported(source: str) -> ModuleType | None:
    """The library's module. None if its import fails, which is said once on standard error."""
    try:
        if source in ("torchvision", "timm") and installed("torchvision"):
            # Not above: it imports torch, which `--help` does not wait for.
            importlib.import_module("cnnfast.torchvision_import").make_importable()
        return importlib.import_module(SOURCES[source].module)
    except Exception as error:
        print(f"{source} is installed but does not import: {_in_a_line(error)}", file=sys.stderr)
        return None


def _in_a_line(error: BaseException) -> str:
    """The first line of the first cause: libraries that import lazily wrap it in errors of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


# ----------------------------------------------------------------------------------------------------------------------
# The four libraries


def _cnnfast_names(models: ModuleType) -> list[str]:
    return [name for name in models.__all__ if inspect.isfunction(getattr(models, name))]


def _cnnfast_make(models: ModuleType, name: str) -> Any:
    return getattr(models, name)() if name in _cnnfast_names(models) else None


def _torchvision_make(models: ModuleType, name: str) -> Any:
    """Without weights: detection and segmentation models have a second argument for those of their backbones."""
    if name.lower() not in models.list_models():
        return None
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    return models.get_model(name, **{p: None for p in parameters if p.startswith("weights")})


def _timm_make(timm: ModuleType, name: str) -> Any:
    return timm.create_model(name, pretrained=False) if timm.is_model(name) else None


def _transformers_architectures() -> dict[str, dict[str, Any]]:
    """For each automatic class for images: the model types that it knows, and their classes."""
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
    """By model type (convnext), or by the class of a model (ConvNextModel) or of its configuration; configured as the
    library does by default.
    """
    if name in importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES:
        auto = next((auto for auto, types in _transformers_architectures().items() if name in types), "AutoModel")
        return getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(name))
    found = getattr(transformers, name) if name[:1].isupper() and name in dir(transformers) else None
    if hasattr(found, "config_class"):
        return with_default_configuration(found)
    return transformers.AutoModel.from_config(found()) if found is not None and hasattr(found, "model_type") else None


SOURCES = {
    "cnnfast": Source("cnnfast.models", _cnnfast_names, _cnnfast_make),
    "torchvision": Source("torchvision.models", lambda models: models.list_models(), _torchvision_make),
    "timm": Source("timm", lambda timm: timm.list_models(), _timm_make),
    "transformers": Source("transformers", _transformers_names, _transformers_make),
}
