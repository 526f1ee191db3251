"""What a file of a frozen network holds: the graph, with batch norms folded and steps fused, and what surrounds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .graph import Graph
from .images.preprocessing import Preprocessing
from .structures import Structure


@dataclass(frozen=True)
class Network:
    """arguments, result: the structures that the flat inputs and results of the graph are taken from and put into.
    dtype: of the graph's floating values. result_dtypes: of the results, as the original gave them. fixed: why no other
    image size can be had, or the empty string. classes: a name for each column of the result.
    """

    graph: Graph
    arguments: Structure
    result: Structure
    dtype: torch.dtype
    result_dtypes: tuple[torch.dtype, ...]
    example: tuple[tuple[int, ...], ...]
    fixed: str = ""
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
