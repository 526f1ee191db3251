"""Layers put together: by their kinds, and by the modules that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .rows import Layer

ORDER = ("conv", "norm", "linear", "pool", "activation", "attention", "other")


@dataclass(frozen=True)
class KindTotal:
    """All layers of one kind. calls: of layers; parameters, trainable (those of them that require a gradient), flops
    and output_bytes: as a Summary has them.
    """

    kind: str
    calls: int
    parameters: int
    trainable: int
    flops: int
    output_bytes: int


def by_kind(layers: Iterable[Layer]) -> list[KindTotal]:
    """The kinds that there are, in the order of ORDER. Together they have all parameters but the unused ones, and all
    FLOPs.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    return [
        KindTotal(
            kind,
            calls=len(group),
            parameters=sum(layer.parameters for layer in group),
            trainable=sum(layer.trainable_parameters for layer in group),
            flops=sum(layer.flops for layer in group),
            output_bytes=sum(layer.output_bytes for layer in group),
        )
        for kind, group in sorted(groups.items(), key=lambda item: ORDER.index(item[0]))
    ]


def to_depth(layers: Sequence[Layer], classes: Mapping[str, str], depth: int) -> list[Layer]:
    """The layers whose names have more than `depth` parts added up in the module that has so many; 0 is the model.

    classes: the name of each module's class. What a module adds up has the kind "other", the input of its first layer,
    and the output and the receptive field of its last, or its own, where it is itself a layer. It stands where its
    first call stood, with all its calls.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        parts = layer.name.split(".") if layer.name else []
        groups.setdefault(".".join(parts[:depth]), []).append(layer)
    return [_together(name, group, classes[name]) for name, group in groups.items()]


def _together(name: str, group: Sequence[Layer], class_name: str) -> Layer:
    if all(layer.name == name for layer in group) and len(group) == 1:
        return group[0]
    last = next((layer for layer in group if layer.name == name), group[-1])
    return replace(
        last,
        name=name,
        kind=last.kind if all(layer.name == name for layer in group) else "other",
        class_name=class_name,
        input_shape=group[0].input_shape,
        parameters=sum(layer.parameters for layer in group),
        trainable_parameters=sum(layer.trainable_parameters for layer in group),
        trainable=any(layer.trainable for layer in group),
        flops=sum(layer.flops for layer in group),
        output_bytes=sum(layer.output_bytes for layer in group),
    )
