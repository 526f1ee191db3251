"""F.augment and F.pack_images refuse what has no meaning, in a sentence, before anything is launched: whoever would
serve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import cnnfast
import cnnfast.functional as F

N, C, H, W, P, Q = 2, 3, 5, 6, 4, 7
INF, NAN = float("inf"), float("nan")


def good(device: torch.device) -> dict[str, Any]:
    """Arguments of which each may be given; numbers on the CPU."""
    return {
        "images": torch.zeros(N, C, H, W, dtype=torch.uint8).to(device),
        "maps": torch.eye(2, 3).repeat(N, 1, 1),
        "colours": torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]]).repeat(N, 1),
        "boxes": torch.tensor([[[0.0, 1.0, 2.0, 3.0, 0.5, 0.5, 0.5]]]).repeat(N, 1, 1),
        "partners": torch.tensor([[1.0, 0.5, 0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]),
        "noise": None,
        "size": (P, Q),
        "mean": (0.5, 0.5, 0.5),
        "std": 0.25,
    }


def row(name: str, column: int, value: float) -> dict[str, Any]:
    """The good numbers of an argument, but for one of image 1."""
    values = good(torch.device("cpu"))[name].clone()
    values[1].view(-1)[column] = value
    return {name: values}


def ragged(offsets: Any = (0, 90), sizes: Any = ((5, 6), (6, 5)), length: int = 180) -> dict[str, Any]:
    sizes = torch.tensor(sizes, dtype=torch.int32)
    return {"images": (torch.zeros(length, dtype=torch.uint8), torch.tensor(offsets), sizes)}


# name: (what is given in the place of a good argument, the error, what its message holds)
CASES = {
    "images a list": ({"images": [1, 2]}, TypeError, "images must be a Tensor [N, C, H, W]", "a list of 2"),
    "images no tensor": ({"images": None}, TypeError, "images must be a Tensor", "a NoneType"),
    "images of 3 axes": ({"images": torch.zeros(3, 5, 6)}, ValueError, "images must be [N, C, H, W]", "[3, 5, 6]"),
    "two channels": ({"images": torch.zeros(2, 2, 5, 6)}, ValueError, "1 or 3 channels", "[2, 2, 5, 6]"),
    "images of float64": (
        {"images": torch.zeros(2, 3, 5, 6).double()}, TypeError, "images must be of dtype uint8 or", "torch.float64",
    ),
    "images of int64": ({"images": torch.zeros(2, 3, 5, 6).long()}, TypeError, "images", "got torch.int64"),
    "images without rows": ({"images": torch.zeros(2, 3, 0, 6)}, ValueError, "images must have from 1 to", "0 x 6"),
    "images too wide": (
        {"images": torch.zeros(2, 3, 1, 2**20, device="meta")}, ValueError, "from 1 to 1048575", "1 x 1048576",
    ),
    "images too large": (
        {"images": torch.zeros(2, 3, 2**15, 2**15, device="meta")}, ValueError, "fewer than 2147483648", "32768 x",
    ),
    "images want a gradient": (
        {"images": torch.zeros(2, 3, 5, 6, requires_grad=True)}, ValueError, "no gradient", "images.detach()",
    ),
    "maps no tensor": ({"maps": [[1, 0, 0]]}, TypeError, "maps must be a Tensor", "list"),
    "maps of float64": ({"maps": torch.zeros(2, 2, 3).double()}, TypeError, "maps must be of dtype float32", "float64"),
    "maps of one image": ({"maps": torch.eye(2, 3)}, ValueError, "maps must be of shape [2, 2, 3]", "[2, 3]"),
    "maps of three": ({"maps": torch.zeros(3, 2, 3)}, ValueError, "maps must be of shape [2, 2, 3]", "[3, 2, 3]"),
    "maps elsewhere": ({"maps": torch.zeros(2, 2, 3, device="meta")}, ValueError, "maps must be on the CPU or", "meta"),
    "maps want a gradient": (
        {"maps": torch.zeros(2, 2, 3, requires_grad=True)}, ValueError, "no gradient", "maps.detach()",
    ),
    "a map infinite": (row("maps", 2, INF), ValueError, "maps must be finite", "maps[1] = [1.0, 0.0, inf"),
    "a map no number": (row("maps", 5, NAN), ValueError, "maps must be finite", "maps[1]", "nan"),
    "colours of four": ({"colours": torch.ones(2, 4)}, ValueError, "colours must be of shape [2, 5]", "[2, 4]"),
    "colours of float16": ({"colours": torch.ones(2, 5).half()}, TypeError, "colours must be of dtype", "float16"),
    "brightness negative": (row("colours", 0, -0.5), ValueError, "finite and not negative", "colours[1] = [-0.5,"),
    "contrast infinite": (row("colours", 1, INF), ValueError, "finite and not negative", "colours[1] = [1.0, inf"),
    "saturation no number": (row("colours", 2, NAN), ValueError, "finite and not negative", "nan"),
    "hue too far": (row("colours", 3, 0.75), ValueError, "within [-0.5, 0.5] turns", "0.75"),
    "hue too far back": (row("colours", 3, -0.75), ValueError, "within [-0.5, 0.5] turns", "-0.75"),
    "hue no number": (row("colours", 3, NAN), ValueError, "within [-0.5, 0.5] turns", "nan"),
    "half grey": (row("colours", 4, 0.5), ValueError, "0 or 1", "colours[1] = [1.0, 1.0, 1.0, 0.0, 0.5]"),
    "boxes without values": ({"boxes": torch.zeros(2, 1, 4)}, ValueError, "shape [2, any, 7]", "[2, 1, 4]"),
    "boxes with both": (
        {"noise": torch.zeros(2).long()}, ValueError, "boxes must be of shape [2, any, 4]", "[2, 1, 7]",
    ),
    "box beyond the left": (row("boxes", 0, -1), ValueError, "left <= right within [0, 7]", "boxes[1] = [-1.0,"),
    "box beyond the right": (row("boxes", 2, 7.5), ValueError, "left <= right within [0, 7]", "7.5"),
    "box beyond the top": (row("boxes", 1, -1), ValueError, "top <= bottom within [0, 4]", "-1.0"),
    "box beyond the bottom": (row("boxes", 3, 5), ValueError, "top <= bottom within [0, 4]", "5.0"),
    "box inside out": (row("boxes", 0, 3), ValueError, "left <= right", "boxes[1] = [3.0, 1.0, 2.0"),
    "box upside down": (row("boxes", 1, 3.5), ValueError, "top <= bottom", "3.5"),
    "box no number": (row("boxes", 2, NAN), ValueError, "left <= right", "nan"),
    "box filled with no number": (row("boxes", 4, NAN), ValueError, "finite where they are values", "nan"),
    "noise without boxes": (
        {"noise": torch.zeros(2).long(), "boxes": None}, ValueError, "noise fills boxes", "boxes=None",
    ),
    "noise of int32": (
        {"noise": torch.zeros(2).int(), "boxes": torch.zeros(2, 1, 4)}, TypeError, "noise must be of dtype int64", "32",
    ),
    "noise for each box": (
        {"noise": torch.zeros(2, 1).long(), "boxes": torch.zeros(2, 1, 4)}, ValueError, "noise must be of shape [2]",
    ),
    "partners of seven": ({"partners": torch.zeros(2, 7)}, ValueError, "partners must be of shape [2, 6]", "[2, 7]"),
    "partner outside the batch": (row("partners", 0, 2), ValueError, "0 to 1, at position 0", "partners[1] = [2.0"),
    "partner before the batch": (row("partners", 0, -1), ValueError, "the index of an image", "-1.0"),
    "partner between images": (row("partners", 0, 0.5), ValueError, "the index of an image", "0.5"),
    "partner no number": (row("partners", 0, NAN), ValueError, "the index of an image", "nan"),
    "weight above 1": (row("partners", 1, 1.5), ValueError, "weights within [0, 1]", "1.5"),
    "weight negative": (row("partners", 1, -0.5), ValueError, "weights within [0, 1]", "-0.5"),
    "partner's box outside": (row("partners", 4, 8), ValueError, "partners must be left <= right within", "8.0"),
    "no size": ({"size": (0, 4)}, ValueError, "size must be positive", "size=(0, 4)"),
    "size too large": ({"size": 2**20}, ValueError, "less than 1048576", "size=1048576"),
    "result too large": ({"size": 2**15, "boxes": None}, ValueError, "fewer than 2147483648 elements", "32768"),
    "size a float": ({"size": 4.0}, TypeError, "size must be an int or a pair of ints", "size=4.0"),
    "size a bool": ({"size": True}, TypeError, "size must be an int", "size=True"),
    "size of three": ({"size": (3, 4, 5)}, TypeError, "size must be an int or a pair", "(3, 4, 5)"),
    "mean of two": ({"mean": (0.5, 0.5)}, ValueError, "one number, or one for each of the 3", "(0.5, 0.5)"),
    "mean a word": ({"mean": "imagenet"}, TypeError, "mean must be a float", "'i'"),
    "mean no number": ({"mean": NAN}, ValueError, "mean must be finite", "mean=nan"),
    "std 0": ({"std": (1.0, 0.0, 1.0)}, ValueError, "std must not be 0", "std=(1.0, 0.0, 1.0)"),
    "std infinite": ({"std": INF}, ValueError, "std must be finite", "std=inf"),
    "fill above 1": ({"fill": 255}, ValueError, "fill must be within [0, 1]", "fill=255"),
    "fill of four": ({"fill": (0, 0, 0, 0)}, ValueError, "fill must be one number", "(0, 0, 0, 0)"),
    "border of another name": (
        {"border": "reflect"}, ValueError, "border must be 'constant' or 'reflection'", "Did you mean 'reflection'?",
    ),
    "border zeros": ({"border": "zeros"}, ValueError, "border='zeros'", "Did you mean 'constant'?"),
    "dtype float64": ({"dtype": torch.float64}, ValueError, "dtype must be torch.float16,", "dtype=torch.float64"),
    "dtype tf32": ({"dtype": "tf32"}, ValueError, "dtype must be torch.float16,", "dtype='tf32'"),
    "dtype uint8": ({"dtype": torch.uint8}, ValueError, "dtype must be torch.float16,", "torch.uint8"),
    "a misspelt keyword": ({"colors": None}, TypeError, "unexpected keyword argument 'colors'", "'colours'?"),
    "two tensors for a buffer": (
        {"images": (torch.zeros(9).byte(), torch.zeros(2).long())}, TypeError, "(flat, offsets, sizes)", "a tuple of 2",
    ),
    "a buffer of floats": (
        {"images": (torch.zeros(180), *ragged()["images"][1:])}, TypeError, "the buffer of images", "float32",
    ),
    "a buffer of rows": (
        {"images": (torch.zeros(2, 90).byte(), *ragged()["images"][1:])}, ValueError, "the buffer of images", "[2, 90]",
    ),
    "offsets of int32": (
        {"images": (torch.zeros(180).byte(), torch.zeros(2).int(), torch.ones(2, 2).int())}, TypeError,
        "offsets must be of dtype int64", "torch.int32",
    ),
    "sizes of one number": (
        {"images": (torch.zeros(180).byte(), torch.zeros(2).long(), torch.ones(2).int())}, ValueError,
        "sizes must be of shape [2, 2]", "[2]",
    ),
    "a buffer too short": (ragged(length=179), ValueError, "image 1 of size [6, 5]", "90 elements from 90"),
    "an offset at the end": (ragged((0, 180)), ValueError, "too short", "image 1", "from 180 on"),
    "an offset beyond 63 bits": (ragged((0, 2**63 - 1)), ValueError, "too short", "image 1"),
    "an offset negative": (ragged((-1, 90)), ValueError, "offsets must be not negative", "offsets[0] = [-1]"),
    "a size 0": (ragged(sizes=((5, 6), (0, 5))), ValueError, "sizes must be positive", "sizes[1] = [0, 5]"),
    "a size too large": (ragged(sizes=((1, 2**20), (6, 5))), ValueError, "less than 1048576", "[0] = [1, 1048576]"),
    "a size of too many": (ragged(sizes=((2**15, 2**15), (6, 5))), ValueError, "fewer than 2147483648", "[32768, 3"),
    "a buffer without channels": (ragged() | {"mean": 0.5}, ValueError, "mean must have 1 or 3 values", "mean=0.5"),
}  # fmt: skip


def placed(value: Any, device: torch.device) -> Any:
    """Images on the device; a buffer's offsets and sizes stay."""
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, tuple) and isinstance(value[0], torch.Tensor):
        return (value[0].to(device), *value[1:])
    return value


@pytest.mark.parametrize("backend", ["kernels", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_refused(case, backend, device, launches):
    given, error, *words = CASES[case]
    arguments = good(device) | given | ({"images": placed(given["images"], device)} if "images" in given else {})
    with cnnfast.backend(backend), pytest.raises(error) as refused:
        F.augment(**arguments)
    message = str(refused.value)
    assert message.startswith("augment()")
    assert not [word for word in words if word not in message], message
    assert launches == []


def test_what_is_good_is_taken(device):
    """So that each case is refused for what it changes."""
    for given in ({}, ragged()):
        arguments = good(device) | {name: placed(value, device) for name, value in given.items()}
        assert F.augment(**arguments).shape == (N, C, P, Q)
    numbers = good(device)
    edges = {
        "colours": torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0], [9.0, 9.0, 9.0, -0.5, 0.0]]),
        "boxes": torch.tensor([[[0.0, 0.0, Q, P, 1.0, -2.0, 3.0]], [[3.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0]]]),
        "partners": torch.tensor([[0.0, 0.0, 0.0, 0.0, Q, P], [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]]),
    }
    assert F.augment(**numbers | edges).isfinite().all()


def test_gradients_are_refused_only_where_they_are_recorded(device):
    images = torch.rand(N, C, H, W).to(device).requires_grad_()
    with torch.no_grad():
        y = F.augment(images, size=P, mean=0.5, std=1.0)
    assert not y.requires_grad
    with pytest.raises(ValueError, match=r"no gradient, but images requires one"):
        torch.func.grad(lambda x: F.augment(x, size=P, mean=0.5, std=1.0).sum())(images.detach())
    with pytest.raises(ValueError, match=r"no gradient, but images requires one"):
        torch.func.jvp(lambda x: F.augment(x, size=P, mean=0.5, std=1.0), *[(images.detach(),)] * 2)


PACKED = {
    "floats": ([np.zeros((4, 5, 3))], "image 0 is float64 of shape [4, 5, 3]"),
    "two axes": ([np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)], "image 1 is uint8 of shape [4, 5]"),
    "two channels": ([torch.zeros(4, 5, 2).byte()], "image 0 is torch.uint8 of shape [4, 5, 2]"),
    "no pixels": ([torch.zeros(0, 5, 3).byte()], "image 0 is torch.uint8 of shape [0, 5, 3]"),
    "a word": (["cat.jpg"], "image 0 is <U7 of shape []"),
    "channels of several": (
        [torch.zeros(4, 5, 3).byte(), torch.zeros(4, 5, 1).byte()], "the same number of channels, but got [1, 3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED)
def test_images_that_cannot_be_packed(case):
    images, words = PACKED[case]
    with pytest.raises(ValueError, match=r"pack_images\(\): images must ") as refused:
        F.pack_images(images)
    assert words in str(refused.value)
