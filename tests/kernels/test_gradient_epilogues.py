"""conv.conv_dgrad with an epilogue, by whichever kernels serve, against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from cnnfast_kernels import conv, devices
from cnnfast_kernels.epilogue import BatchNorm
from cnnfast_kernels.gradient_epilogue import GradientEpilogue, check_gradient_epilogue
from cnnfast_kernels.keys import dgrad_key
from cnnfast_kernels.tma.tiles import BoxTile, candidate_boxes
from tests.support.convolutions import Case, arrange, draw, needs_tensor_maps, reference
from tests.support.gradient_epilogues import assert_sums, drawn
from tests.support.poison import poisoned_workspaces

DENSE = Case("dense", (2, 16, 3, 7), (8, 3, 3), padding=(1, 1, 1, 1))
DEPTHWISE = Case("depthwise", (2, 16, 3, 7), (16, 3, 3), padding=(1, 1, 1, 1), groups=16)
LAST = torch.channels_last


def geometry(case):
    return conv.Geometry(case.stride, case.padding, case.dilation, case.groups)


@pytest.mark.parametrize(
    ("case", "algorithm", "mask"),
    [
        (DENSE, "auto", "words"),
        (DENSE, "im2col", "z"),
        (DEPTHWISE, "auto", "y"),
        (DEPTHWISE, "auto", "words"),
    ],
    ids=str,
)
def test_whoever_serves(case, algorithm, mask, device):
    """Kernels with an epilogue, and those without, after which passes of their own do the same."""
    x, w, dy = draw(case, torch.float32, device)
    judged = drawn(case.x, torch.float32, device, arrange, mask, also_y=True)
    with poisoned_workspaces():
        g, *sums = conv.conv_dgrad_sums(dy, w, case.x, geometry(case), judged.epilogue, algorithm=algorithm)
    exact, *exact_sums = judged.judge(reference(case, x, w, dy)[1])
    assert torch.equal(g.double(), exact)
    assert_sums(sums, exact_sums)


@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_without_sums(algorithm, device):
    x, w, dy = draw(DENSE, torch.float32, device)
    judged = drawn(DENSE.x, torch.float32, device, arrange, "words")
    g = conv.conv_dgrad(dy, w, DENSE.x, geometry(DENSE), judged.epilogue, algorithm=algorithm)
    assert torch.equal(g.double(), judged.judge(reference(DENSE, x, w, dy)[1])[0])


@needs_tensor_maps
@pytest.mark.parametrize("residual", [False, True])
def test_slots_of_boxes(residual, device, monkeypatch):
    """A 1x1 convolution of a dense image is one row, where the residual has no gaps either: there are fewer boxes."""
    monkeypatch.setattr(devices, "gpu", lambda _: devices.Gpu("", 90))
    case = Case("", (2, 16, 6, 6), (8, 1, 1))
    x, w, dy = (t.contiguous(memory_format=LAST) for t in draw(case, torch.float16, device))
    judged = drawn(case.x, torch.float16, device, lambda t: t.contiguous(memory_format=LAST), "y", residual=residual)
    if residual:
        wide = torch.zeros(2, 16, 6, 8, device=device).half().contiguous(memory_format=LAST)[..., :6]
        wide.copy_(judged.epilogue.residual)
        judged = judged._replace(epilogue=judged.epilogue._replace(residual=wide))
    tile = BoxTile(1, 8, 8, 64, 64)
    with poisoned_workspaces():
        g, *sums = conv.conv_dgrad_sums(dy, w, case.x, geometry(case), judged.epilogue, fmt=LAST, tile=tile)
    exact, *exact_sums = judged.judge(reference(case, x, w, dy)[1])
    assert torch.equal(g.double(), exact)
    assert_sums(sums, exact_sums)


def question(epilogue, sums):
    dy, w = torch.empty(DENSE.y, device="meta"), torch.empty(DENSE.w, device="meta")
    return dgrad_key(dy, w, DENSE.x, LAST, geometry(DENSE), False, None, epilogue, sums).question


def test_words_of_tables():
    image, vector = torch.empty(DENSE.x, device="meta"), torch.empty(16, device="meta")
    words = torch.empty(2, 16, dtype=torch.int32, device="meta")
    norm = BatchNorm(vector, vector, vector, vector)
    asked = [
        (GradientEpilogue(image, image, norm=norm, activation="relu"), True, "residual relu sums"),
        (GradientEpilogue(None, None, image, activation="relu6"), False, "relu6 z"),
        (GradientEpilogue(None, None, None, words, activation="relu"), True, "relu words sums"),
        (GradientEpilogue(image), False, "residual"),
    ]
    for epilogue, sums, expected in asked:
        assert question(epilogue, sums).key.epilogue == expected
        assert question(epilogue, sums).finished


def test_no_box_of_many_sums_on_sm_100():
    """They spill there beside what an epilogue reads."""
    problem = Case("", (32, 128, 28, 28), (128, 3, 3), padding=(1, 1, 1, 1)).problem
    found = {arch: {*candidate_boxes(problem, "dgrad", None, arch, True)} for arch in (90, 100)}
    assert found[90] == {*candidate_boxes(problem, "dgrad", None, 90)}
    assert found[100] == {tile for tile in found[90] if tile.pixels * tile.TILE_C <= 128 * 64}


IMAGE, SHORT = (torch.empty(shape, device="meta") for shape in (DENSE.x, (2, 16, 3, 6)))
WORDS, VECTOR = torch.empty(2, 16, dtype=torch.int32, device="meta"), torch.empty(16, device="meta")
WRONG = {
    "epilogue.residual must have": GradientEpilogue(SHORT),
    "epilogue.y must have": GradientEpilogue(None, IMAGE.double(), activation="relu"),
    "epilogue.words must be": GradientEpilogue(words=WORDS[:1], activation="relu"),
    "epilogue.norm.gamma must have": GradientEpilogue(
        None, IMAGE, norm=BatchNorm(VECTOR, VECTOR, VECTOR[:8], None), activation="relu"
    ),
    "must have both mean and var": GradientEpilogue(None, IMAGE, norm=BatchNorm(VECTOR, None, None, None)),
    "activation='prelu' has no gradient": GradientEpilogue(None, IMAGE, activation="prelu"),
    "activation='relu' with slope=0.0 needs y": GradientEpilogue(activation="relu"),
    "activation='silu' with slope=0.0 needs y": GradientEpilogue(None, None, IMAGE, activation="silu"),
    "activation='relu6' with slope=0.0 needs y": GradientEpilogue(words=WORDS, activation="relu6"),
    "activation='leaky_relu' with slope=-1.0 needs y": GradientEpilogue(
        None, None, IMAGE, activation="leaky_relu", slope=-1.0
    ),
    "nothing follows from": GradientEpilogue(None, IMAGE, IMAGE, activation="relu"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit(message):
    with pytest.raises(ValueError, match=message):
        check_gradient_epilogue(WRONG[message], DENSE.x, torch.float32, False)
