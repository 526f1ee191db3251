"""What launchers share: strides that address the right element, memory formats as PyTorch picks them, who is told of
launches.
"""

from __future__ import annotations

import threading

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch._prims_common import suggest_memory_format

from cnnfast_kernels import devices, launch, memory
from cnnfast_kernels.layout import Strides, is_channels_last, result_format, strides_nhwc


@st.composite
def views(draw) -> torch.Tensor:
    """A 4-d float64 view of an arange: any order of axes, slices with steps, expanded axes, axes of size 1."""
    shape = draw(st.lists(st.integers(1, 5), min_size=4, max_size=4))
    order = draw(st.permutations(range(4)))
    widened = [size * draw(st.sampled_from([1, 1, 2, 8])) + draw(st.integers(0, 2)) for size in shape]
    t = torch.arange(torch.Size(widened).numel(), dtype=torch.float64).view(widened)
    for d, (size, room) in enumerate(zip(shape, widened, strict=True)):
        every = draw(st.integers(1, max(1, room // size)))
        start = draw(st.integers(0, room - (size - 1) * every - 1))
        t = t.narrow(d, start, (size - 1) * every + 1)[(slice(None),) * d + (slice(None, None, every),)]
    for d in range(4):
        if draw(st.integers(0, 5)) == 0:
            t = t.narrow(d, 0, 1).expand(*[-1] * d, draw(st.integers(1, 4)), *[-1] * (3 - d))
    return t.permute(order)


def address(t: torch.Tensor) -> torch.Tensor:
    """Offset of every element [N, C, H, W] from the first, computed as the kernels do (pixel_offset,
    channel_offset).
    """
    s = strides_nhwc(t)
    n, c, h, w = torch.meshgrid(*[torch.arange(size) for size in t.shape], indexing="ij")
    return (n * s.n + h * s.h + w * s.w) * s.align + (c if s.c is None else c * s.c)


@given(views())
def test_strides_address_every_element(t):
    flat = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    assert torch.equal(flat[t.storage_offset() + address(t)], t)
    s = strides_nhwc(t)
    assert s.align in (1, 2, 4, 8)
    assert s.c is not None or t.stride(1) == 1 or t.shape[1] == 1


def test_aligned_channels_last_strides():
    t = torch.empty(2, 24, 5, 7).to(memory_format=torch.channels_last)
    assert strides_nhwc(t) == Strides(n=105, h=21, w=3, c=None, align=8)
    assert strides_nhwc(t[:, :20]) == Strides(n=105, h=21, w=3, c=None, align=8)
    assert strides_nhwc(torch.empty(2, 3, 5, 7)) == Strides(n=105, h=7, w=1, c=35, align=1)


@given(views())
def test_channels_last_is_what_pytorch_takes_for_it(t):
    assert is_channels_last(t) == (suggest_memory_format(t) == torch.channels_last)


ORDINARY = [
    (2, 3, 4, 5),
    (1, 3, 4, 5),
    (2, 1, 4, 5),
    (2, 3, 1, 1),
    (1, 1, 1, 1),
    (0, 3, 4, 5),
    (2, 3, 0, 5),
    (2, 3, 4, 1),
]


@pytest.mark.parametrize("shape", ORDINARY)
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_channels_last_of_ordinary_tensors(shape, fmt):
    t = torch.empty(shape).to(memory_format=fmt)
    assert is_channels_last(t) == (suggest_memory_format(t) == torch.channels_last)


def test_only_four_dimensions_have_a_format():
    assert not is_channels_last(torch.empty(3, 4, 5))
    assert not is_channels_last(torch.empty(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d))


def test_one_channels_last_operand_makes_the_result_so():
    a = torch.empty(2, 3, 4, 5)
    b = a.to(memory_format=torch.channels_last)
    assert result_format(a, a) == torch.contiguous_format
    assert result_format(a, b) == result_format(b, a) == torch.channels_last


def test_empty_is_poisoned_in_tests():
    x = torch.zeros(1, dtype=torch.bfloat16)
    y = memory.empty((2, 3, 4, 5), x, torch.channels_last)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.isnan().all()
    assert (memory.empty((4,), x, dtype=torch.int32) == -1).all()
    assert (memory.empty((4,), x, dtype=torch.uint8) == 255).all()
    assert memory.empty((4,), torch.empty(1, device="meta")).is_meta


@triton.jit
def fill_kernel(x_ptr, value, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), value)


def fill(x: torch.Tensor, value: float) -> None:
    launch.run(fill_kernel, (len(x) // 4,), x.device, x, value, tile="a tile", BLOCK=4)


def test_observers_hear_of_every_launch_and_empty_grids_launch_nothing(launches, device):
    x = torch.zeros(8, device=device)
    heard = []
    fill(x, 1.0)
    with launch.observe(heard.append):
        fill(x, 2.0)
        fill(x[:0], 3.0)
        thread = threading.Thread(target=fill, args=(x, 4.0))
        thread.start()
        thread.join()
    assert (x == 4).all()
    assert [(event.kernel, event.tile, event.grid) for event in launches] == [("fill_kernel", "a tile", (2,))] * 3
    assert heard == launches[1:]
    assert (launches[0].compiled is None) == launch.INTERPRETED


def test_compile_only_runs_nothing_and_ends_with_its_context(launches, device):
    x = torch.zeros(8, device=device)

    def compile_and_fail() -> None:
        with launch.observe(lambda event: None, compile_only=True):
            fill(x, 1.0)
            with launch.observe(lambda event: None):
                fill(x, 2.0)
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        compile_and_fail()
    assert not x.any()
    assert len(launches) == 2
    fill(x, 3.0)
    assert (x == 3).all()


def test_substituted_hands_launches_of_its_own_thread_over(launches, device):
    x = torch.zeros(8, device=device)
    handed: list[tuple[str, tuple[int, ...], int, dict]] = []
    thread = threading.Thread(target=fill, args=(x, 4.0))
    with launch.substituted(
        lambda kernel, grid, arguments, options: handed.append((kernel.__name__, grid, len(arguments), options))
    ):
        fill(x, 1.0)
        thread.start()
        thread.join()
    assert (x == 4).all()
    assert len(launches) == 1
    assert [(name, grid) for name, grid, *_ in handed] == [("fill_kernel", (2,))]
    fill(x, 3.0)
    assert (x == 3).all()


def test_meta_tensors_stand_for_those_of_a_gpu():
    meta, named = torch.device("meta"), devices.Gpu("A GPU", 100)
    with devices.meta_stands_for(named):
        assert devices.gpu(meta) == named
        assert devices.type_of(meta) == "cuda"
        with devices.meta_stands_for(devices.NO_GPU, "cpu"):
            assert (devices.gpu(meta), devices.type_of(meta)) == (devices.NO_GPU, "cpu")
        assert devices.type_of(torch.device("cpu")) == "cpu"
        assert devices.gpu(meta) == named
    assert devices.type_of(meta) == "meta"


def test_operands_are_named_as_the_kernels_parameters(monkeypatch):
    """A launch is called with a record, whose fields are the first parameters of its kernel, in their order."""
    from cnnfast_kernels.aot.cases import cases

    called: dict[str, tuple[str, ...]] = {}
    call = launch.Launch.__call__

    def noted(prepared, operands):
        fields = getattr(operands, "_fields", ())
        names = tuple(name.removesuffix("_ptr").removesuffix("_map") for name in prepared.kernel.arg_names)
        called[prepared.kernel.__name__] = fields
        assert fields == names[: len(operands)], prepared.kernel.__name__
        call(prepared, operands)

    monkeypatch.setattr(launch.Launch, "__call__", noted)
    with launch.substituted(lambda *launched: None):
        for case in cases(90):
            case.run()
    assert {"conv_fprop_kernel", "tma_wgrad_kernel", "depthwise_dgrad_kernel", "normalize_kernel"} <= called.keys()
