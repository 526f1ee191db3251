"""The network that a training starts from, by a name: with as many classes as the data, with weights of its own, those
of a file, or published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..targets.inputs import first_features
from ..targets.naming import resolve_module
from .heads import replace_heads
from .weights import Loading, load_weights, pretrained, read_weights


@dataclass(frozen=True)
class Start:
    """model: with heads of the wanted classes. heads: their names. loading: what became of a file's weights, None
    without a file.
    """

    model: nn.Module
    heads: tuple[str, ...]
    loading: Loading | None = None


def start(
    name: str,
    classes: int,
    size: tuple[int, int],
    *,
    channels: int = 3,
    published: bool = False,
    weights: Path | None = None,
    seed: int = 0,
) -> Start:
    """The network of that name (resnet18, timm:NAME, file.py:Class) with so many classes, for images [N, channels,
    *size].

    Its heads are replaced, unless it tells so many classes apart already and no published weights are wanted.
    published: with the weights that its library offers first; weights: a file of them. The random weights follow from
    the seed.

    Raises TargetError for a name, or published weights, that cannot be had; heads.NoHead where no layer can be told to
    be the head; ValueError for a file that does not fit, and for both kinds of weights at once.
    """
    if published and weights is not None:
        raise ValueError("published weights and a file of weights were both asked for: name one of them")
    found = None if weights is None else read_weights(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = pretrained(name) if published else resolve_module(name)[1]
        images = torch.zeros(2, channels, *size)
        heads = replace_heads(model, classes, images, only_others=not published)
    loading = None if found is None else load_weights(model, found, heads)
    return Start(model, tuple(heads), loading)


def channels_of(name: str) -> int:
    """How many channels, 1 or 3, the images of the network of that name have. Raises TargetError."""
    features = first_features(resolve_module(name)[1])
    return 1 if features is not None and features[0] == 1 else 3
