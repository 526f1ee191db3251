"""A captured network becomes one with fewer calls that gives the same results to rounding."""

from __future__ import annotations

import torch

from ..graph import Graph, Input
from .activations import spell_in_one_call
from .constants import fold_constants, main_dtype, round_constants
from .forms import use_one_form
from .fusing import fuse
from .labelling import label
from .merging import merge_branches
from .preactivation import cut_off_before_convolutions
from .scaling import fold_into_what_stands_after, fold_into_what_stands_before, use_affine
from .sizes import Shapes, Sizes


def fold(graph: Graph, dtype: torch.dtype, example: Shapes | None = None) -> Graph:
    """Another graph, rewritten, that computes in `dtype`; `graph` stays as it is.

    Batch norms and constant factors are folded, in float64, into the weights of convolutions and of products with
    constant matrices, and each constant is rounded once. A convolution adds and activates what the next calls would.
    example: shapes of all inputs that the network can take; without it some usual ones are tried.

    node.meta["fused"] of every call: the names of the calls of `graph` that it stands for. node.meta["pattern"]: what
    it belongs to ("convolution", "depthwise + pointwise", "pre-activation", "squeeze-excitation", "pool",
    "classifier"), or the empty string.
    """
    folded = graph.copy()
    for node in folded.calls.nodes:
        node.meta["fused"] = (node.name,)
    sizes = Sizes(folded, example)
    fold_constants(folded)
    spell_in_one_call(folded, sizes)
    use_one_form(folded, sizes)
    fold_into_what_stands_before(folded, sizes, dtype)
    merge_branches(folded, sizes, dtype)
    cut_off_before_convolutions(folded, sizes, dtype)
    fold_into_what_stands_after(folded, sizes, dtype)
    use_affine(folded, sizes, dtype)
    fuse(folded, sizes)
    folded.prune()
    label(folded, sizes)
    main = main_dtype(graph)
    folded.inputs = tuple(Input(i.name, i.shape, dtype if i.dtype == main else i.dtype) for i in folded.inputs)
    round_constants(folded, graph, dtype, sizes.shapes[0] if sizes.shapes else None)
    return folded
