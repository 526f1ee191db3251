"""How torchvision, timm and transformers say what a network takes, as the fields of a Preprocessing. None of them is
imported here, unless a text names something in it: what is given is recognised by its class and its attributes.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ...torchvision_import import make_importable, torchvision

FORMS = (
    "a mapping with size, crop, interpolation, mean and std, such as dict(size=256, crop=224, interpolation='bilinear',"
    " mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]); a JSON file of that; weights of torchvision, such as"
    " ResNet50_Weights.IMAGENET1K_V2, or their transforms(), for classification or segmentation; a model of timm, its"
    " pretrained_cfg, or 'timm:' and the name of a model; or an image processor of transformers for classification"
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Image processors of transformers that resize, crop, rescale and normalise, and do nothing else for classification.
# Other classes have rules of their own.
PROCESSORS = ("BitImage", "CLIPImage", "ConvNextImage", "DeiTImage", "MobileNetV1Image", "MobileNetV2Image")
PROCESSORS += ("SiglipImage", "ViTImage")
# Below this ConvNext's processor crops; from it on it squeezes the whole image into a square.
CONVNEXT_CROPS_BELOW = 384
NAMES = "a JSON file (*.json), weights of torchvision, such as ResNet50_Weights.IMAGENET1K_V2, or timm:NAME"
# Names of torchvision's, and of Pillow's numbers, that are not ours: Pillow knows one way to take the nearest pixel.
INTERPOLATIONS: dict[Any, str] = {"nearest-exact": "nearest", 0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
INTERPOLATIONS |= {4: "box", 5: "hamming"}


def fields_from(given: Any) -> Mapping[str, Any] | None:
    """The fields of a Preprocessing, by name, or None if `given` is none of FORMS. Raises ValueError for something that
    is near to them, with the reason why it cannot be had.
    """
    given = as_object(given)
    if isinstance(given, str | Path):
        raise ValueError(f"preprocessing={str(given)!r} is none of {NAMES}{_advice(str(given))}")
    if isinstance(given, functools.partial):
        given = given()  # torchvision's weights.transforms, without the parentheses
    if isinstance(given, Enum):
        given = getattr(given, "transforms", lambda: None)()
    try:
        return _fields_from_object(given)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"preprocessing={shortened(given)} cannot be understood: {why}") from error


def _fields_from_object(given: Any) -> Mapping[str, Any] | None:
    cfg = timm_cfg(given)
    if cfg is not None:
        return _from_timm(cfg)
    if isinstance(given, Mapping):
        return given
    name = type(given).__name__
    if type(given).__module__ == "torchvision.transforms._presets":
        return _from_torchvision(given)
    if hasattr(given, "image_mean") and hasattr(given, "do_resize"):
        family = re.sub("Processor(Fast|Pil)?$", "", name)
        if family not in PROCESSORS:
            known = ", ".join(f"{family}Processor" for family in PROCESSORS)
            raise ValueError(f"preprocessing: {name} may have rules of its own; known are {known}. Give a mapping")
        return _from_transformers(given, family)
    return None


def as_object(given: Any) -> Any:
    """What a text names: the contents of a JSON file, weights of torchvision by the name of their class and their own,
    or the configuration of a model of timm's. Anything else is returned as it is.
    """
    if not isinstance(given, str | Path):
        return given
    text = str(given)
    if text.endswith(".json"):
        try:
            return json.loads(Path(text).read_text())
        except OSError as error:
            raise ValueError(f"{text} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{text} is no JSON: {error}") from None
    if re.fullmatch(r"(torchvision:)?\w+_Weights\.\w+", text):
        return _weights(text.removeprefix("torchvision:"))
    if text.startswith("timm:"):
        return _pretrained_cfg(text.removeprefix("timm:"))
    return given


def _advice(text: str) -> str:
    """What was probably meant by the name of a class of weights, or of a file that is there."""
    if re.fullmatch(r"(torchvision:)?\w+_Weights", text):
        return f". Did you mean '{text}.DEFAULT'?"
    return f"; {text} is a file, but its name does not end in .json" if Path(text).is_file() else ""


def _weights(name: str) -> Any:
    try:
        return torchvision().models.get_weight(name)
    except ModuleNotFoundError:
        raise ValueError(f"{name} needs torchvision, which is not installed") from None
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{name!r} is the name of no weights of torchvision") from None


def _pretrained_cfg(name: str) -> Any:
    make_importable()
    try:
        import timm
    except ModuleNotFoundError:
        raise ValueError(f"timm:{name} needs timm, which is not installed") from None
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not timm.is_model(name):
        raise ValueError(f"'timm:{name}' is no model of timm")
    return cfg


def timm_cfg(given: Any) -> Mapping[str, Any] | None:
    """The pretrained_cfg of timm that `given` is or has; None of anything else."""
    for name in ("pretrained_cfg", "data_config"):
        given = getattr(given, name, given)
    if is_dataclass(given) and not isinstance(given, type):
        given = asdict(given)
    return given if isinstance(given, Mapping) and "input_size" in given else None


def _from_timm(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """As timm.data.resolve_data_config and create_transform, for evaluation."""
    if len(cfg["input_size"]) != 3:
        raise ValueError(f"preprocessing: input_size is {cfg['input_size']}, and must be (channels, height, width)")
    _, height, width = cfg["input_size"]
    mean, std = cfg.get("mean") or IMAGENET_MEAN, cfg.get("std") or IMAGENET_STD
    crop_pct = cfg.get("crop_pct") or 0.875
    resized = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    fields = {"crop": (height, width), "mean": tuple(mean), "std": tuple(std)}
    fields |= {"interpolation": cfg.get("interpolation") or "bicubic", "size": resized}
    mode = cfg.get("crop_mode") or "center"
    if mode == "squash":
        return fields | {"fit": "stretch"}
    if mode == "border":
        return fields | {"fit": "contain", "fill": tuple(round(255 * v) for v in mean)}
    return fields | ({"size": resized[0]} if resized[0] == resized[1] else {"fit": "cover"})


def _from_torchvision(preset: Any) -> dict[str, Any]:
    if not hasattr(preset, "resize_size") or type(preset).__name__ == "VideoClassification":
        raise ValueError(f"preprocessing: torchvision's {type(preset).__name__} is not for classification of images")
    mean, std = tuple(preset.mean), tuple(preset.std)
    interpolation = preset.interpolation.value
    size, crop = (_side(getattr(preset, name, None)) for name in ("resize_size", "crop_size"))
    crop = (crop, crop) if isinstance(crop, int) else crop
    fields = {"size": size, "crop": crop, "mean": mean, "std": std}
    return fields | {"interpolation": INTERPOLATIONS.get(interpolation, interpolation)}


def _side(sizes: Any) -> Any:
    """torchvision writes a single number as a list of one."""
    return sizes[0] if isinstance(sizes, list | tuple) and len(sizes) == 1 else tuple(sizes) if sizes else None


def _from_transformers(processor: Any, family: str) -> dict[str, Any]:
    """Up to where the crop begins, by a pixel, and to rounding: transformers resizes tensors, and Pillow images."""
    size, crop = _sizes(processor.size), _sizes(getattr(processor, "crop_size", None))
    if not processor.do_rescale or not math.isclose(processor.rescale_factor, 1 / 255):
        raise ValueError("preprocessing: the image processor does not divide by 255; give a mapping")
    if not processor.do_resize:
        size = None
    crop = crop if getattr(processor, "do_center_crop", False) else None
    if family == "ConvNextImage" and size is not None:
        edge = size
        size = int(edge / processor.crop_pct) if edge < CONVNEXT_CROPS_BELOW else (edge, edge)
        crop = (edge, edge)
    channels = len(processor.image_mean)
    mean = tuple(processor.image_mean) if processor.do_normalize else (0.0,) * channels
    std = tuple(processor.image_std) if processor.do_normalize else (1.0,) * channels
    interpolation = INTERPOLATIONS[int(processor.resample)]
    return {"size": size, "crop": crop, "interpolation": interpolation, "mean": mean, "std": std}


def _sizes(given: Any) -> Any:
    """A number for the shorter side, (height, width), or None, from a mapping or an object with such attributes."""
    if given is None:
        return None
    found = dict(given) if isinstance(given, Mapping) else vars(given)
    found = {name: value for name, value in found.items() if value is not None}
    if found.keys() == {"shortest_edge"}:
        return found["shortest_edge"]
    if found.keys() == {"height", "width"}:
        return found["height"], found["width"]
    raise ValueError(f"preprocessing: the image processor resizes by {', '.join(found)}, which is not known here")


def shortened(value: Any) -> str:
    """How a value is shown in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({type(value).__name__})"
