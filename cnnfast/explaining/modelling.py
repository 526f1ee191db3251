"""What a convolution costs on a GPU, by the model of cnnfast_kernels/costs.py: nothing of it was measured."""

from __future__ import annotations

from typing import NamedTuple

from cnnfast_kernels.choosing_costs import cost_of, roofline_of
from cnnfast_kernels.costs import TileCost
from cnnfast_kernels.gpus import KnownGpu
from cnnfast_kernels.questions import Question, Tile
from cnnfast_kernels.resource_keys import resource_key
from cnnfast_kernels.resources import resources_of


class ModelledTile(NamedTuple):
    """roofline: seconds if the convolution only multiplied, or only moved each of its tensors once. registers: of a
    thread. exact: whether these and the instructions were read from this very kernel's machine code.
    """

    cost: TileCost
    roofline: float
    registers: int
    exact: bool


def modelled(question: Question, tile: Tile, gpu: KnownGpu, packs: bool) -> ModelledTile:
    """What the convolution costs with this tile. packs: as choosing_costs.work_of has it."""
    known = resources_of(resource_key(question, tile))
    costs = cost_of(question, tile, gpu, packs), roofline_of(question, tile, gpu)
    return ModelledTile(*costs, known.registers, known.exact)
