"""Weights that a network starts from: read from a file, or fetched by the library that published them.

A file is one of safetensors, or what torch.save wrote; that is read with weights_only=True, which runs no code of the
file's.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..spelling import quoted
from ..targets.naming import resolve_module
from ..targets.target import TargetError

# Where training scripts put the weights among the other things that a checkpoint holds; the first that is there counts.
PLACES = ("state_dict", "model_state_dict", "model", "network", "weights")
# What wrappers write before the names: DDP and DataParallel, torch.compile, Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.", "network.")
HUB, HUB_FILES = "huggingface.co", ("model.safetensors", "pytorch_model.bin")
# So many names a list shows.
SHOWN = 8


@dataclass(frozen=True)
class Loading:
    """What became of a file's weights: how many tensors fit, and the names of those that did not.

    missing: what the network has and the file has not. unexpected: the other way round. other_shapes: what both have in
    different shapes, with the shape in the file and in the network. new: heads of other classes, which start anew.
    """

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    new: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether everything fits but for heads."""
        return not (self.missing or self.unexpected or self.other_shapes)

    def __str__(self) -> str:
        lines = [f"{self.loaded:,} tensors loaded"]
        if self.new:
            lines.append(f"start anew, as heads of other classes: {_shown(self.new)}")
        if self.missing:
            lines.append(f"missing in the file: {_shown(self.missing)}")
        if self.unexpected:
            lines.append(f"unexpected, of which the network has none: {_shown(self.unexpected)}")
        if self.other_shapes:
            shapes = [f"{name} {_size(theirs)}, not {_size(own)}" for name, (theirs, own) in self.other_shapes.items()]
            lines.append(f"of another shape in the file: {_shown(shapes)}")
        return "\n".join(lines)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _shown(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:SHOWN])
    return first if len(names) <= SHOWN else f"{first} and {len(names) - SHOWN:,} more"


# ----------------------------------------------------------------------------------------------------------------------
# A file


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors in a file, by their names, on the CPU. Raises ValueError, which names the file and says what is
    wrong.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    found = _safetensors(file) if file.suffix.lower() == ".safetensors" else _saved(file)
    place = next((place for place in PLACES if isinstance(found.get(place), Mapping)), None)
    state = found if place is None else found[place]
    weights = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        keys = quoted([str(key) for key in list(state)[:SHOWN]]) if state else "nothing"
        raise ValueError(f"{file} holds no weights: a state_dict is a mapping of names to tensors, and it has {keys}")
    return weights


def _safetensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no file of safetensors: {error}") from None


def _saved(file: Path) -> dict[str, Any]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # of zipfile, pickle and torch, as the file may be anything
        raise ValueError(
            f"{file} cannot be read by torch.load with weights_only=True: it is damaged, or holds other objects than "
            f"tensors, which could run code. If it is your own, load it in Python and write its state_dict by "
            f"safetensors.torch.save_file(state_dict, FILE)"
        ) from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{file} holds {type(found).__name__}, not a mapping of names to tensors")
    return dict(found)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], heads: Collection[str] = ()) -> Loading:
    """Copies what fits of `weights` into `model`, and says what did not.

    What wrappers write before names is taken off where the names fit then (PREFIXES). `heads`: names of layers that may
    have other classes than the file's; one whose shape differs stays as it is. Raises ValueError if not one tensor
    fits.
    """
    own = model.state_dict()
    weights = _without_prefix(weights, own)
    shapes = {
        name: (tuple(weights[name].shape), tuple(t.shape))
        for name, t in own.items()
        if name in weights and weights[name].shape != t.shape
    }
    other_heads = {head for name in shapes for head in heads if name.startswith(f"{head}.")}
    new = tuple(name for name in own if any(name.startswith(f"{head}.") for head in other_heads))
    fitting = {name: t for name, t in weights.items() if name in own and name not in shapes and name not in new}
    if not fitting:
        theirs, ours = (quoted(list(names)[:3]) for names in (weights, own))
        raise ValueError(f"no tensor fits {type(model).__name__}: the file has {theirs}, the network {ours}")
    model.load_state_dict(fitting, strict=False)
    return Loading(
        loaded=len(fitting),
        missing=tuple(name for name in own if name not in weights and name not in new),
        unexpected=tuple(name for name in weights if name not in own),
        other_shapes={name: both for name, both in shapes.items() if name not in new},
        new=new,
    )


def _without_prefix(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that fit best: as they are, or without what wrappers wrote before most of them."""
    found = best = dict(weights)
    while prefix := next((p for p in PREFIXES if 2 * sum(name.startswith(p) for name in found) > len(found)), None):
        found = {name.removeprefix(prefix): t for name, t in found.items()}
        if sum(name in own for name in found) > sum(name in own for name in best):
            best = found
    return best


# ----------------------------------------------------------------------------------------------------------------------
# Published weights


def pretrained(name: str) -> nn.Module:
    """The published model of that name with the weights that its library offers first: torchvision's DEFAULT, timm's
    default tag; cnnfast.models take torchvision's.

    Raises TargetError where there are no such weights, or where they cannot be fetched: it then says which file to
    fetch elsewhere, and how to use it.
    """
    target, model = resolve_module(name)
    bare = name.rpartition(":")[2]
    match target.source:
        case "torchvision":
            return _from_torchvision(bare)
        case "cnnfast":
            model.load_state_dict(_from_torchvision(bare).state_dict())
            return model
        case "timm":
            return _from_timm(bare, model)
    raise TargetError(
        f"{name} has no published weights here: --pretrained fetches those of models of torchvision and timm. "
        f"--weights FILE starts from a file of yours"
    )


def _from_torchvision(name: str) -> nn.Module:
    from ..torchvision_import import torchvision

    models: Any = torchvision().models
    try:
        published = models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):
        raise TargetError(f"torchvision has no weights of {name}") from None
    try:
        return models.get_model(name, weights=published, progress=False)
    except (OSError, RuntimeError) as error:  # no network; a download that was cut off
        why = " ".join(str(error).split())
        raise _not_fetched(name, why, published.url, Path(torch.hub.get_dir(), "checkpoints")) from None


def _from_timm(name: str, model: nn.Module) -> nn.Module:
    import timm

    published: Any = model.pretrained_cfg
    hub = published.get("hf_hub_id")
    if not hub and not published.get("url"):
        raise TargetError(f"timm has no weights of {name}")
    at = f"model.safetensors of https://huggingface.co/{hub}" if hub else published["url"]
    if hub and not _reachable(hub):
        raise _not_fetched(name, f"no name server knows {HUB}", at)
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # of the hub's client, which has many
        raise _not_fetched(name, " ".join(str(error).split())[:200], at) from None


def _reachable(hub: str) -> bool:
    """Whether weights are in the hub's cache, or its server has an address: its client tries for a minute to find one
    where there is no network.
    """
    from huggingface_hub import try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(hub, file), str) for file in HUB_FILES):
        return True
    try:
        return bool(socket.getaddrinfo(HUB, 443))
    except OSError:
        return False


def _not_fetched(name: str, why: str, at: str, cache: Path | None = None) -> TargetError:
    beside = f", or lay it in {cache}" if cache else ""
    return TargetError(
        f"the weights of {name} cannot be fetched: {why}. On a machine with a network fetch {at}, and give the file by "
        f"--weights FILE{beside}"
    )
