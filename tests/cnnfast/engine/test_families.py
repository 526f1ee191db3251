"""Networks that nobody here wrote, frozen: both of the CPU's makers, other batches, another image size."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import cnnfast
from cnnfast.engine.cpu import onednn
from cnnfast.engine.planning import plain
from cnnfast.engine.planning.planning import plan
from tests.support.model_zoo import FAMILIES, Family

LIMIT = 1e-5  # of ||frozen - exact|| / ||exact||, where exact is the original in float64
# Each is there for something: residuals, groups, squeeze-excitation, chunks, concatenations, ceil_mode, a dict of
# results, a list of results, timm's own paddings and norms. The others run with -m slow.
QUICK = (
    *("torchvision-resnet18", "torchvision-mobilenet_v3_small", "torchvision-regnet_y_400mf", "unet"),
    *("torchvision-shufflenet_v2_x0_5", "torchvision-densenet", "torchvision-squeezenet1_1"),
    *("torchvision-lraspp_mobilenet_v3", "timm-tf_efficientnetv2_b0", "timm-nf_regnet_b0"),
)


def families() -> list:
    return [
        pytest.param(family, id=str(family), marks=() if str(family) in QUICK else pytest.mark.slow)
        for family in FAMILIES
    ]


def tensors(tree: object) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def assert_close(found: list[Tensor], exact: list[Tensor], own: list[Tensor]) -> None:
    assert len(found) == len(exact)
    for ours, right, pytorchs in zip(found, exact, own, strict=True):
        assert ours.shape == right.shape
        error, theirs = (float((t.double() - right).norm() / right.norm()) for t in (ours, pytorchs))
        assert error <= max(LIMIT, 2 * theirs)


@pytest.mark.cpu_tensors("frozen networks run on the CPU")
@pytest.mark.parametrize("family", families())
def test_a_frozen_network_computes_what_the_original_does(family: Family):
    model, images = family.make(torch.float32)
    model.eval()
    exactly = copy.deepcopy(model).double()
    frozen = cnnfast.freeze(model, images)
    graph = frozen.network.graph
    for x in (images, images.new_empty(3, *images.shape[1:]).normal_()):
        with torch.no_grad():
            exact, own = tensors(exactly(x.double())), tensors(model(x))
        result = frozen(x)
        assert_close(tensors(result), exact, own)
        planned = plan(graph, [tuple(x.shape)])
        assert_close(list(onednn.build(planned, graph.constants)([x])), exact, own)
        safe = plain.run(planned, graph.constants, [x])
        for one, other in zip(safe, plain.run(planned, graph.constants, [x], poison=True), strict=True):
            assert torch.equal(one, other), "a value is read after its place was given to another"


@pytest.mark.cpu_tensors("frozen networks run on the CPU")
@pytest.mark.parametrize("name", ["torchvision-resnet18", "torchvision-squeezenet1_1", "unet"])
def test_another_image_size_before_and_after_a_file(name, tmp_path):
    (family,) = (each for each in FAMILIES if str(each) == name)
    model, images = family.make(torch.float32)
    frozen = cnnfast.freeze(model.eval(), images)
    other = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        exact, own = tensors(copy.deepcopy(model).double()(other.double())), tensors(model(other))
    assert_close(tensors(frozen(other)), exact, own)
    frozen.save(tmp_path / "net.cnnfast")
    loaded = cnnfast.load(tmp_path / "net.cnnfast")
    assert_close(tensors(loaded(other)), exact, own)
    assert all(map(torch.equal, tensors(loaded(images)), tensors(frozen(images))))


def test_the_quick_ones_are_there():
    assert set(QUICK) <= set(map(str, FAMILIES))
    assert importlib.util.find_spec("onnxruntime"), "CI has it: `cnnfast[test]` brings cnnfast[cpu]"
