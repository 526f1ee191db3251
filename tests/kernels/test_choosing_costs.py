"""What a convolution costs, from the question that a call asks: each family on each GPU."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import pytest
import torch

from cnnfast_kernels import devices
from cnnfast_kernels.choosing import candidates, default_tile
from cnnfast_kernels.choosing_costs import cost_of, roofline_of, work_of
from cnnfast_kernels.costs import cost, roofline
from cnnfast_kernels.gpus import KNOWN, KnownGpu, named
from cnnfast_kernels.layout import dense
from cnnfast_kernels.questions import (
    Geometry,
    Question,
    dgrad_question,
    fprop_question,
    wgrad_question,
)
from cnnfast_kernels.resource_keys import resource_key
from cnnfast_kernels.resources import resources_of
from cnnfast_kernels.tma.tiles import BoxTile

LAST = torch.channels_last
# x, filters, window, stride, groups
LAYERS = {
    "3x3": ((32, 128, 28, 28), 128, 3, 1, 1),
    "1x1 of one k-step": ((32, 64, 56, 56), 64, 1, 1, 1),
    "1x1 stride 2": ((32, 256, 56, 56), 512, 1, 2, 1),
    "stem": ((32, 3, 224, 224), 64, 7, 2, 1),
    "groups": ((32, 128, 28, 28), 128, 3, 1, 32),
    "depthwise": ((32, 96, 56, 56), 96, 3, 1, 96),
    "one image": ((1, 512, 7, 7), 512, 3, 1, 1),
}


def questions(name: str, gpu: KnownGpu, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> list[Question]:
    """Of all operations. batch: how many times the images."""
    (n, *image), filters, window, stride, groups = LAYERS[name]
    x, w = dense((batch * n, *image), dtype, LAST), dense((filters, image[0] // groups, window, window), dtype, LAST)
    pad = window // 2
    geometry = Geometry((stride, stride), (pad, pad, pad, pad), (1, 1), groups)
    g, on = geometry.problem(x.shape, w.shape), devices.Gpu(gpu.cuda, gpu.arch)
    y = dense((g.N, g.K, g.P, g.Q), dtype, LAST)
    forward = fprop_question(x, w, geometry, on)
    return [
        forward,
        fprop_question(x, w, geometry, on, statistics="stats"),
        fprop_question(x, w, geometry, on, statistics="norm", residual_strides=y.strides, activation="relu"),
        dgrad_question(y, w, x.shape, LAST, geometry, on),
        wgrad_question(x, y, w.shape, LAST, geometry, on),
    ]


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("name", LAYERS)
def test_every_tile_that_runs_has_a_cost(name, gpu):
    for q in questions(name, gpu):
        tile = default_tile(q)
        found = cost_of(q, tile, gpu)
        assert isfinite(found.seconds)
        assert found.seconds >= roofline_of(q, tile, gpu) > 0
        assert found == cost(work_of(q, tile), resources_of(resource_key(q, tile)), gpu)
        assert found.residents >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_take_their_own_rates(dtype):
    gpu = named("a100")
    halves = questions("3x3", gpu)
    for half, q in zip(halves, questions("3x3", gpu, dtype), strict=True):
        least = roofline_of(q, default_tile(q), gpu)
        assert least >= q.problem.flops / gpu.flops("ieee" if dtype == torch.float32 else "fp64")
        assert least > roofline_of(half, default_tile(half), gpu)


@pytest.mark.parametrize("name", LAYERS)
def test_the_roofline_does_not_depend_on_the_tile(name):
    gpu = named("h200")
    for q in questions(name, gpu):
        works = [work_of(q, tile) for tile in candidates(q)]
        assert len({(work.memory, work.flops) for work in works}) == 1
        assert all(roofline(work, gpu) == roofline(works[0], gpu) for work in works)


@pytest.mark.parametrize("name", LAYERS)
def test_twice_the_images_take_no_less(name):
    gpu = named("h200")
    for q, twice in zip(questions(name, gpu), questions(name, gpu, batch=2), strict=True):
        tile = default_tile(q)
        # as long, where one wave of few programs has places left; less than twice as long, where two waves become three
        assert cost_of(twice, tile, gpu).seconds >= cost_of(q, tile, gpu).seconds * (1 if name == "one image" else 1.4)
        assert roofline_of(twice, tile, gpu) > roofline_of(q, tile, gpu)


def test_statistics_and_a_norm_cost_something():
    gpu = named("h200")
    plain, stats, norm, *_ = questions("3x3", gpu)
    tile = default_tile(plain)
    times = [cost_of(q, tile, gpu).seconds for q in (plain, stats, norm)]
    assert times[0] < min(times[1:])


def test_a_pipeline_of_fewer_stages_lets_more_programs_live():
    """1x1 with 64 channels has one k-step: all stages but one hold nothing."""
    gpu = named("h200")
    (q, *_) = questions("1x1 of one k-step", gpu)
    tile = BoxTile(1, 1, 256, 64, 64, num_stages=4)
    one = cost_of(q, replace(tile, num_stages=1), gpu)
    four = cost_of(q, tile, gpu)
    assert (four.residents, four.limiter) == (1, "latency")
    assert one.residents > 2
    assert one.seconds < four.seconds
