"""The calls of each_family.py launch every kernel that there is, and give PyTorch's numbers."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from triton.runtime.jit import KernelInterface

import cnnfast_kernels
from cnnfast import reference
from tests.support.convolutions import needs_tensor_maps
from tests.support.each_family import FAMILIES, Pointers, Stem, families

pytestmark = needs_tensor_maps  # all of them: on older GPUs the ring leaves those families out


def kernels() -> set[str]:
    """Names of the package's kernels, which end in _kernel; other functions of Triton's are parts of them."""
    names = set()
    for module in pkgutil.walk_packages(cnnfast_kernels.__path__, "cnnfast_kernels."):
        if ".aot" not in module.name:
            found = vars(importlib.import_module(module.name)).items()
            names |= {name for name, value in found if isinstance(value, KernelInterface) and name.endswith("_kernel")}
    return names


# Of an operator without a gradient: tests/gpu/test_augmentation.py repeats and captures them.
WITHOUT_GRADIENT = {"augment_kernel", "grey_mean_kernel"}


def test_they_are_there_for_every_kernel():
    assert {kernel for family in FAMILIES.values() for kernel in family.kernels} == kernels() - WITHOUT_GRADIENT


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name, device, launches):
    family = FAMILIES[name]
    results = family(family.operands(device))
    assert set(family.kernels) <= {launch.kernel for launch in launches}
    assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize(
    ("name", "own"), [("pointers, half", Pointers), ("pointers, a stem", Stem), ("tensor maps, a stem", Stem)]
)
def test_those_with_a_backward_of_their_own(name, own, device):
    family = FAMILIES[name]
    operands = family.operands(device)
    mine = family(operands)
    x, w = (t.detach().cpu().double().requires_grad_() for t in operands)
    y = reference.conv2d(x, w, None, own.geometry.stride, own.geometry.padding[0])
    right = [y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))]
    for i, (ours, theirs) in enumerate(zip(mine, right, strict=True)):
        if own is Pointers or i != 1:  # the stem's image gets no gradient
            torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=0, atol=0)


def test_a_gpu_without_tensor_maps_leaves_those_out(monkeypatch, device):
    monkeypatch.setattr("tests.support.each_family.why_not_on", lambda arch: "it has none")
    assert {name for name in FAMILIES if name not in families(device)} == {
        name for name in FAMILIES if "tensor maps" in name
    }
