"""An image of few channels is packed once a step: backward takes what the forward pass packed."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as theirs
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import cnnfast
import cnnfast.functional as ours
from cnnfast_kernels import conv, launch, packing
from cnnfast_kernels.conv import Geometry
from cnnfast_kernels.gather import stem
from cnnfast_kernels.tiling import PackedTile
from cnnfast_kernels.tma.tiles import BoxTile
from tests.support.agreement import integers
from tests.support.convolutions import needs_tensor_maps

HALF, LAST = torch.float16, torch.channels_last
X, W, CHANNELS = (2, 3, 6, 7), (8, 3, 3, 3), (8,)
IMAGE_AND_FILTERS = ["pack_pixels_kernel"] * 2


@pytest.fixture(autouse=True)
def every_image_is_packed(monkeypatch):
    monkeypatch.setattr(stem, "LEAST_OUTPUTS", 1)
    launch.forget_plans()
    yield
    launch.forget_plans()


def operands(device, wanted=(False, True), dtype=HALF):
    """x and w of small integers."""
    x, w = integers(*X, largest=2).to(device, dtype), integers(*W, seed=1).to(device, dtype)
    return [t.contiguous(memory_format=LAST).requires_grad_(want) for t, want in zip((x, w), wanted, strict=True)]


def packs(launches):
    """Launches of the kernel that packs, which are forgotten."""
    found = [event.kernel for event in launches if event.kernel == "pack_pixels_kernel"]
    launches.clear()
    return found


def exact(x, w):
    """The gradient of w, of the sum of the result's squares, in float64."""
    w = w.detach().double().requires_grad_()
    y = theirs.conv2d(x.detach().double(), w, None, 1, 1)
    return torch.autograd.grad(y.square().sum(), w)[0]


def statistics(device):
    return torch.zeros(CHANNELS, device=device), torch.ones(CHANNELS, device=device)


CALLS = {
    "conv2d": lambda x, w, norm: ours.conv2d(x, w, None, 1, 1),
    "conv_act": lambda x, w, norm: ours.conv_act(x, w, None, padding=1, activation="relu"),
    "conv_bn_act eval": lambda x, w, norm: ours.conv_bn_act(x, w, *norm, padding=1),
    "conv_bn_act training": lambda x, w, norm: ours.conv_bn_act(x, w, *norm, training=True, padding=1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_step_packs_once(call, launches, device, poisoned):
    """To the same bits as a step whose gradient packs for itself."""
    x, w = operands(device)
    found = []
    for given in (packing.GivenImage.serves, lambda *_: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing.GivenImage, "serves", given)
            z = call(x, w, statistics(device))
            assert packs(launches) == IMAGE_AND_FILTERS
            found.append([z, *torch.autograd.grad(z.float().square().sum(), w)])
            assert len(packs(launches)) == len(found) - 1
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_gradient(device, poisoned):
    x, w = operands(device)
    y = ours.conv2d(x, w, None, 1, 1)
    torch.testing.assert_close(torch.autograd.grad((y * y).sum(), w)[0].double(), exact(x, w), rtol=0, atol=0)


def test_second_derivatives(device, poisoned):
    """Of the weights' gradient by x and by w: what was packed is of x, and no other tensor."""
    grads = []
    for function, dtype in ((ours.conv2d, HALF), (theirs.conv2d, torch.float64)):
        x, w = operands(device, (True, True), dtype)
        y = function(x, w, None, 1, 1)
        (dw,) = torch.autograd.grad(y.sum(), w, create_graph=True)
        (dx,) = torch.autograd.grad((dw * integers(*W, seed=2).to(dw)).sum(), x)
        grads.append([dw.double(), dx.double()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_what_is_kept(device):
    """As long as backward may need it, and not where it never will."""
    made = []

    class Kept(packing.KeptImage):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if value is not None:
                made.append(weakref.ref(value))

    def alive():
        gc.collect()
        return [reference() is not None for reference in made]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "KeptImage", Kept)
        x, w = operands(device)
        with torch.no_grad():
            ours.conv2d(x, w, None, 1, 1)
        ours.conv2d(*operands(device, (True, False)), None, 1, 1)
        assert made == []
        y = ours.conv2d(x, w, None, 1, 1)
        assert alive() == [True]
        y.sum().backward()
        assert alive() == [False]
        y = ours.conv2d(x, w, None, 1, 1)
        assert alive() == [False, True]
        del y
        assert alive() == [False, False]


def test_an_image_that_changed(device):
    x, w = operands(device)
    y = ours.conv2d(x, w, None, 1, 1)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpoints_and_hooks(launches, device, poisoned):
    """What was packed is saved as any tensor is: a checkpoint drops it and packs again, save_on_cpu may lay it out
    otherwise, and then it is not taken.
    """
    x, w = operands(device)
    y = checkpoint(lambda x, w: ours.conv2d(x, w, None, 1, 1), x, w, use_reentrant=False)
    again = torch.autograd.grad((y * y).sum(), w)[0]
    assert packs(launches) == 2 * IMAGE_AND_FILTERS
    with save_on_cpu():
        y = ours.conv2d(x, w, None, 1, 1)
    moved = torch.autograd.grad((y * y).sum(), w)[0]
    for dw in (again, moved):
        torch.testing.assert_close(dw.double(), exact(x, w), rtol=0, atol=0)


def test_a_compiled_function(launches, device, poisoned):
    x, w = operands(device)
    compiled = torch.compile(lambda x, w: ours.conv2d(x, w, None, 1, 1), fullgraph=True, backend="aot_eager")
    y = compiled(x, w)
    dw = torch.autograd.grad((y * y).sum(), w)[0]
    torch.testing.assert_close(dw.double(), exact(x, w), rtol=0, atol=0)
    assert packs(launches) == ["pack_pixels_kernel"] * 3  # in its graph backward packs for itself


def test_autocast(launches, device, poisoned):
    """What is packed is the image that was cast."""
    x, w = operands(device, dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        ours.conv2d(x, w)  # before the first in bfloat16 the interpreter is asked for its rounding
        launches.clear()
        y = ours.conv2d(x, w, None, 1, 1)
    dw = torch.autograd.grad(y.sum(), w)[0]
    assert packs(launches) == IMAGE_AND_FILTERS
    right = w.detach().double().requires_grad_()
    theirs.conv2d(x.double(), right, None, 1, 1).sum().backward()
    torch.testing.assert_close(dw.double(), right.grad, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# What is given serves the same image, packed in the same way, in the same thread

GEOMETRY = Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1)
TILE = PackedTile(64, 32, 32, 4, 4)


def gradient(x, dy):
    return conv.conv_wgrad(x, dy, W, GEOMETRY, fmt=LAST, tile=TILE)


def forward(x, w, tile=TILE):
    """What is packed of x."""
    with packing.keeping() as kept:
        conv.conv_fprop(x, w, GEOMETRY, tile=tile)
    return kept.packed


def test_what_is_given_serves_its_image_alone(launches, device, poisoned):
    x, w = operands(device, (False, False))
    other, dy = x + 1, integers(2, 8, 6, 7, seed=3).to(device, HALF).contiguous(memory_format=LAST)
    packed = forward(x, w)
    assert packed.shape == (2, 4, 6, 10)
    with packing.given(x, packed):
        packs(launches)
        mine = gradient(x, dy)
        assert packs(launches) == []
        theirs_ = gradient(other, dy)
        view = gradient(x.contiguous(), dy)
        assert packs(launches) == ["pack_pixels_kernel"] * 2
    torch.testing.assert_close(mine, gradient(x, dy), rtol=0, atol=0)
    torch.testing.assert_close(view, mine, rtol=0, atol=0)
    torch.testing.assert_close(theirs_, gradient(other, dy), rtol=0, atol=0)
    assert not torch.equal(mine, theirs_)


@needs_tensor_maps
def test_what_another_family_packed_otherwise(launches, device, poisoned):
    """Its pixels have 8 channels where outputs are one pixel apart."""
    x, w = operands(device, (False, False))
    dy = integers(2, 8, 6, 7, seed=3).to(device, HALF).contiguous(memory_format=LAST)
    packed = forward(x, w, BoxTile(1, 8, 8, 64, 32))
    assert packed.shape == (2, 8, 6, 9)
    packs(launches)
    with packing.given(x, packed):
        dw = gradient(x, dy)
    assert packs(launches) == ["pack_pixels_kernel"]
    torch.testing.assert_close(dw, gradient(x, dy), rtol=0, atol=0)


def test_threads_keep_for_themselves(device):
    x, w = operands(device, (False, False))
    with packing.keeping() as kept:
        thread = threading.Thread(target=forward, args=(x, w))
        thread.start()
        thread.join()
        assert kept.packed is None
        inner = forward(x, w)  # as does a call within a call
        assert kept.packed is None
        conv.conv_fprop(x, w, GEOMETRY, tile=TILE)
        assert kept.packed is not inner
    assert torch.equal(kept.packed, inner)


def test_under_kernels_alone(device):
    """A step under backend("kernels"), whose backward runs in autograd's own thread on a GPU."""
    x, w = operands(device)
    with cnnfast.backend("kernels"):
        y = ours.conv2d(x, w, None, 1, 1)
        (y * y).sum().backward()
    torch.testing.assert_close(w.grad.double(), exact(x, w), rtol=0, atol=0)
