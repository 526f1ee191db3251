"""The two operators of augmentation, as PyTorch's tools see them, and how numbers reach the device of the images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cnnfast
import cnnfast.functional as F

pytest.importorskip("triton")
from cnnfast import image_numbers
from cnnfast.image_numbers import GivenNumbers
from cnnfast.ops import augmentation
from cnnfast_kernels.augment import sources

N, C, H, W = 2, 3, 5, 6
OPERATORS = ("augment", "augment_plain")


def numbers() -> tuple[torch.Tensor, ...]:
    """maps, colours, boxes, noise, partners."""
    return (
        torch.randn(N, 2, 3),
        torch.tensor([[0.5, 1.5, 0.7, 0.1, 0.0], [1.0, 1.0, 1.0, 0.0, 1.0]]),
        torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[0.0, 0.0, 0.0, 0.0]]]),
        torch.tensor([1, 2**40]),
        torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0, 3.0, 4.0]]),
    )


HOW = ([4, 5], [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], [0.0, 0.5, 1.0], False, torch.float16)


@pytest.fixture
def images(device) -> torch.Tensor:
    return torch.randint(0, 256, (N, C, H, W), dtype=torch.uint8).to(device)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, ragged, images):
    where = (torch.tensor([0, 90]), torch.tensor([[5, 6], [6, 5]])) if ragged else (None, None)
    given = images.permute(0, 2, 3, 1).flatten() if ragged else images
    operator = getattr(torch.ops.cnnfast, name)
    torch.library.opcheck(operator, (given, *where, *numbers(), *HOW))
    torch.library.opcheck(operator, (given, *where, *[None] * 5, *HOW))


@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_take_images_of_a_gpu_and_numbers_of_the_cpu(name):
    """As torch.compile sees them."""
    with FakeTensorMode() as mode:
        meta = torch.empty(N, C, H, W, dtype=torch.uint8, device="meta")
        gpu = FakeTensor(mode, meta, torch.device("cuda", 0))
        given = [mode.from_tensor(t) for t in numbers()]
        y = getattr(torch.ops.cnnfast, name)(gpu, None, None, *given, *HOW)
    assert (y.device, y.dtype, y.shape) == (torch.device("cuda", 0), torch.float16, (N, C, 4, 5))
    assert y.stride() == (60, 1, 15, 3)


def test_meta_images_have_results_without_values(launches):
    y = F.augment(torch.empty(2, 7, 6, 3, device="meta"), torch.eye(2, 3).repeat(2, 1, 1), size=4, mean=0.5, std=1.0)
    assert (y.device.type, y.shape) == ("meta", (2, 3, 4, 4))
    assert launches == []


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["kernels", "torch"])
def test_compiled(backend, dynamic, device):
    """The whole graph, once for all batches where sizes are dynamic; values are still checked when it runs."""

    def batch(n: int, h: int, w: int) -> tuple[torch.Tensor, ...]:
        images = torch.randint(0, 256, (n * N, C, h, w), dtype=torch.uint8).to(device)
        return images, *(torch.cat([t] * n) for t in numbers())

    def step(images, maps, colours, boxes, noise, partners):
        how = {"size": (4, 5), "mean": (0.5, 0.4, 0.3), "std": 0.25, "fill": 0.5}
        return F.augment(images * 1, maps, colours, boxes, partners, noise=noise, **how) + 1

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
    with cnnfast.backend(backend):
        given = batch(4, 7, 11)
        assert torch.equal(compiled(*given), step(*given))
        count = counter.frame_count
        other = batch(3, 9, 6) if dynamic else batch(4, 7, 11)
        assert torch.equal(compiled(*other), step(*other))
        assert counter.frame_count == count
        with pytest.raises(ValueError, match=r"augment\(\): colours must be factors"):
            compiled(*given[:2], -given[2], *given[3:])


# ----------------------------------------------------------------------------------------------------------------------
# From the CPU to the images


class Copies(TorchDispatchMode):
    """Counts what may be a copy to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.to_meta: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_to_copy", "aten::copy_") and result.is_meta:
            self.to_meta.append(result.shape)
        return result


def test_numbers_are_copied_together():
    """Each begins where a kernel for aligned pointers can read it, whatever the sizes of the others."""
    given = [torch.arange(3), None, torch.rand(5, 7)[:, ::2], torch.arange(5, dtype=torch.int32), torch.rand(0, 4)]
    with Copies() as copies:
        there = augmentation.together(given, torch.device("meta"))
    assert len(copies.to_meta) == 1
    assert copies.to_meta[0] == (32 + 80 + 32 + 0,)
    assert [t if t is None else (t.shape, t.dtype, t.is_contiguous()) for t in there] == [
        t if t is None else (t.shape, t.dtype, True) for t in given
    ]
    assert [t.storage_offset() * t.element_size() for t in there if t is not None] == [0, 32, 112, 144]


def test_numbers_arrive_as_they_were():
    """torch.device("cpu", 0) is another device than the CPU's, and the same memory."""
    given = [torch.arange(3), None, torch.rand(5, 7)[:, ::2], torch.arange(5, dtype=torch.int32)]
    there = augmentation.together(given, torch.device("cpu", 0))
    for t, copy in zip(given, there, strict=True):
        assert (t is None and copy is None) or (torch.equal(t, copy.cpu()) and copy.data_ptr() != t.data_ptr())


def test_numbers_that_are_there_stay():
    given = [torch.rand(2, 3), None]
    there = augmentation.together(given, torch.device("cpu"))
    assert there[0] is given[0]


def test_a_graph_is_captured_with_numbers_on_the_gpu_alone():
    nothing = GivenNumbers(None, None, None, None, None)
    augmentation._check_capturable(nothing, None)
    with pytest.raises(RuntimeError, match=r"CUDA graph capture numbers must be on the GPU.* give boxes.cuda\(\)"):
        augmentation._check_capturable(nothing._replace(boxes=torch.zeros(1, 1, 7)), None)
    with pytest.raises(RuntimeError, match="images of different sizes cannot be augmented under CUDA graph capture"):
        augmentation._check_capturable(nothing, torch.zeros(2))


def test_the_limits_are_those_of_the_kernels():
    """They are told without triton too, and so stand twice."""
    assert image_numbers.MOST_PIXELS == sources.MAX_EXTENT + 1
    assert image_numbers.MOST_ELEMENTS == sources.MAX_ELEMENTS + 1
