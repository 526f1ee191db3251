"""By which key the resources of a convolution's kernel are found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cnnfast_kernels import launch
from cnnfast_kernels.aot.layers import BODY, DEEP, POINTWISE, SHORTCUT, STEM, STRIDED, depthwise_layer
from cnnfast_kernels.choosing import default_tile
from cnnfast_kernels.devices import Gpu, meta_stands_for
from cnnfast_kernels.resource_keys import epilogue_class, resource_key
from cnnfast_kernels.resources import resources_of

H200, A100 = Gpu("NVIDIA H200", 90), Gpu("NVIDIA A100-SXM4-80GB", 80)
OPERATIONS = ("plain", "train", "infer", "dgrad", "wgrad")
HALF = torch.bfloat16


def launched(layer, operation):
    """(kernel, window, tile) of what the convolution itself launches; what packs, adds or combines has no tile."""
    windows, found = {}, []

    def see(kernel, grid, arguments, options):
        windows[kernel.__name__] = options["g"][3:5] if "g" in options else None

    with launch.substituted(see, told=True), launch.observe(found.append):
        getattr(layer, operation)(None, "half", HALF)
    (event,) = [event for event in found if event.tile is not None and event.kernel != "combine_kernel"]
    return event.kernel, windows[event.kernel], event.tile


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "layer", [BODY, POINTWISE, DEEP, STRIDED, SHORTCUT, STEM, depthwise_layer(3)], ids=lambda layer: layer.name
)
def test_the_key_names_the_kernel_and_the_tile_that_run(layer, operation, gpu):
    with meta_stands_for(gpu):
        kernel, window, tile = launched(layer, operation)
    question = layer.question(operation, "half", HALF, gpu)
    assert tile == default_tile(question)
    key = resource_key(question, tile)
    assert (key.kernel, key.arch) == (kernel, gpu.arch)
    assert key.tile == str(replace(tile, SPLIT_K=1)).removeprefix("packed ")
    assert key.dtype == "half"
    assert key.epilogue == {"train": "moments", "infer": "norm"}.get(operation, "plain")
    assert key.form != "1x1" or window == (1, 1)
    assert key.form == "phases" or window != (1, 1) or key.form == "1x1"
    assert resources_of(key).registers > 16


def test_the_default_tiles_of_a_body_are_on_record():
    for gpu in (H200, A100):
        for operation in OPERATIONS:
            for layer in (BODY, DEEP, POINTWISE):
                question = layer.question(operation, "half", HALF, gpu)
                found = resources_of(resource_key(question, default_tile(question)))
                assert found.exact or "tma" in resource_key(question, default_tile(question)).kernel, question


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "plain"),
        ({"activation": "relu"}, "plain"),
        ({"activation": "gelu"}, "norm"),
        ({"statistics": "norm"}, "norm"),
        ({"statistics": "stats"}, "moments"),
    ],
)
def test_classes_of_epilogues(changes, expected):
    assert epilogue_class(BODY.question("plain", "half", HALF, H200)._replace(**changes)) == expected


def test_a_residual_is_of_the_heaviest_class():
    question = BODY.question("plain", "half", HALF, H200)
    assert epilogue_class(question._replace(residual=question.y)) == "norm"
