"""Plans: a repeated launch is the one that Triton would make, of the right binary, on the right device and stream, seen
by who watches.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from cnnfast_kernels import conv, launch, memory
from cnnfast_kernels.layout import dense, is_channels_last
from tests.support.child import run_compiled


@triton.jit(do_not_specialize=["n"])
def scale_kernel(x_ptr, y_ptr, bias_ptr, factor: tl.float64, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + i, mask=i < n) * factor
    if bias_ptr is not None:
        y += tl.load(bias_ptr + i, mask=i < n)
    tl.store(y_ptr + i, y, mask=i < n)


def test_a_plan_runs_on_any_tensors_of_its_shapes(launches, device):
    plan = launch.Launch(scale_kernel, (2,), 3.0, 8, tile="a tile", BLOCK=4)
    for bias in (None, torch.ones(8, device=device), None):
        x, y = torch.arange(9.0, device=device)[1:], torch.zeros(8, device=device)  # not aligned
        plan((x, y, bias))
        assert torch.equal(y, 3 * x + (0 if bias is None else bias))
    assert [(event.kernel, event.tile, event.grid) for event in launches] == [("scale_kernel", "a tile", (2,))] * 3
    launch.Launch(scale_kernel, (0,), 3.0, 0, BLOCK=4)((x, y, None))
    assert len(launches) == 3


def test_layouts_are_those_of_tensors(device):
    for shape in ((2, 3, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (7,)):
        for fmt in (torch.contiguous_format, torch.channels_last)[: 1 + (len(shape) == 4)]:
            t = torch.empty(shape, dtype=torch.float16, memory_format=fmt)
            layout = dense(shape, torch.float16, fmt)
            assert (layout.shape, layout.stride(), layout.dtype, layout.dim()) == (
                t.shape,
                t.stride(),
                t.dtype,
                t.dim(),
            )
            assert is_channels_last(layout) == is_channels_last(t)
            made = memory.empty(layout, torch.zeros(1, device=device))
            assert (made.shape, made.stride(), made.dtype, made.device) == (t.shape, t.stride(), t.dtype, device)


def test_plans_are_kept_until_forgotten():
    made = []

    @launch.planned
    def plan(*key):
        made.append(key)
        return key

    for key in ((1, (2, 3)), (1, (2, 4)), (1, (2, 3))):
        assert plan(*key) == key
    assert made == [(1, (2, 3)), (1, (2, 4))]
    launch.forget_plans()
    plan(1, (2, 3))
    assert len(made) == 3
    for i in range(launch.PLANS_KEPT):
        plan(i)
    plan(1, (2, 3))
    assert made[-1] == (1, (2, 3)), "not more than that many are kept"
    launch._plan_caches.pop()


class Kernel:
    """Notes the device that is current when Triton launches it."""

    __name__ = "kernel"
    arg_names = ("x",)

    def __init__(self, current):
        self.current, self.ran_on = current, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.ran_on.append(self.current[-1])


def test_a_plan_makes_its_tensors_device_current(monkeypatch):
    """Where the first tensor lives elsewhere, that device is current for the launch: Triton's stream is the current
    device's.
    """
    current, entered = [0], []

    @contextlib.contextmanager
    def guard(device):
        entered.append(device)
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch.runtime.driver, "_active", SimpleNamespace(get_current_device=lambda: current[-1]))
    kernel = Kernel(current)
    plan = launch.Launch(kernel, (1,))
    for index in (1, 0, 2):
        device = torch.device("cuda", index)
        known = {"device": device, "dtype": torch.float32, "get_device": lambda index=index: index}
        plan((SimpleNamespace(**known, data_ptr=lambda: 16),))
    assert kernel.ran_on == [1, 0, 2]
    assert entered == [torch.device("cuda", 1), torch.device("cuda", 2)]
    assert current == [0]


def test_im2col_plans_no_direct_kernel(device, monkeypatch):
    for name in ("fprop_plan", "dgrad_plan", "wgrad_plan"):
        monkeypatch.setattr(conv, name, lambda key: pytest.fail("a plan of a direct kernel is made"))
    x, w = torch.ones(1, 2, 4, 4, device=device), torch.ones(3, 2, 3, 3, device=device)
    geometry, how = conv.Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1), {"algorithm": "im2col"}
    y = conv.conv_fprop(x, w, geometry, **how)
    assert torch.equal(y, torch.full_like(y, 18.0))
    assert torch.equal(conv.conv_stats(x, w, geometry, **how)[0], y)
    assert conv.conv_dgrad(y, w, x.shape, geometry, **how).shape == x.shape
    assert conv.conv_wgrad(x, y, w.shape, geometry, **how).shape == w.shape


# ----------------------------------------------------------------------------------------------------------------------
# Compiled kernels. Each function below runs in a process of its own.


def specialisations():
    """Launches of one plan: [name, the binary, how many were compiled for it]."""
    import torch

    from cnnfast_kernels import launch
    from cnnfast_kernels.aot.stub_driver import stub_driver
    from cnnfast_kernels.gather.fprop import plan_fprop
    from cnnfast_kernels.operands import FpropOperands
    from cnnfast_kernels.problem import ConvProblem
    from cnnfast_kernels.tiling import TileConfig

    def image(offset=0, dtype=torch.float16):
        return torch.zeros(2 * 32 * 64 + offset, dtype=dtype)[offset:].view(2, 8, 8, 32).permute(0, 3, 1, 2)

    x, w, y = image(), torch.zeros(32, 32, 1, 1, dtype=torch.float16), image()
    problem = ConvProblem.of(x.shape, w.shape, (1, 1), (0,) * 4, (1, 1), 1)
    plan = plan_fprop(problem, TileConfig(64, 32, 32, 4, 2), "half", x, w, y)
    bias = torch.zeros(32)
    cases = {
        "first": (x, w, y, None),
        "again": (x, w, y, None),
        "others": (image(), w.clone(), image(), None),
        "x at an odd address": (image(1), w, y, None),
        "y at an odd address": (x, w, image(1), None),
        "x at an odd address again": (image(1), w, y, None),
        "x at 16 bytes": (image(8), w, y, None),
        "with a bias": (x, w, y, bias),
        "with a bias of 16 bits": (x, w, y, bias.half()),
        "with a bias again": (x, w, y, bias.clone()),
    }
    seen = []
    with stub_driver() as gpu:
        for name, tensors in cases.items():
            plan(FpropOperands(*tensors))
            seen.append([name, gpu.launches[-1].function, gpu.compiles])
        kept = len(plan.compiled)
        by_plan = gpu.launches[-1]
        launch.run(
            plan.kernel, plan.grid, x.device, *by_plan.arguments[:11], *plan.scalars, tile=plan.tile, **plan.options
        )
        by_triton = gpu.launches[-1]
    same = (
        by_plan.grid == by_triton.grid
        and by_plan.metadata is by_triton.metadata
        and len(by_plan.arguments) == len(by_triton.arguments)
    )
    same = same and all(a is b or a == b for a, b in zip(by_plan.arguments, by_triton.arguments, strict=True))
    return seen, kept, same, len(gpu.launches)


@pytest.mark.compiled
def test_tensors_that_triton_would_compile_for_get_a_binary_of_their_own():
    seen, kept, same, launched = run_compiled(specialisations)
    binary = {name: function for name, function, _ in seen}
    assert binary["again"] == binary["others"] == binary["x at 16 bytes"] == binary["first"]
    assert binary["x at an odd address again"] == binary["x at an odd address"]
    assert binary["with a bias again"] == binary["with a bias"]
    assert len(set(binary.values())) == kept == 5
    assert [compiles for *_, compiles in seen] == [1, 1, 1, 2, 3, 3, 3, 4, 5, 5]
    assert same, "grid, metadata and arguments are those that Triton's own launch passes"
    assert launched == len(seen) + 1


def watchers():
    """What a repeated launch does once something changed around it."""
    import threading

    import torch
    from triton import knobs

    from cnnfast_kernels import launch
    from cnnfast_kernels.aot.stub_driver import stub_driver
    from cnnfast_kernels.conv import Geometry, conv_fprop

    x, w = torch.zeros(2, 16, 8, 8), torch.zeros(16, 16, 3, 3)

    def call():
        conv_fprop(x, w, Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1))

    told = {}
    with stub_driver() as gpu:
        first = gpu.device
        call()
        call()
        told["once compiled"] = [gpu.compiles, len(gpu.launches)]

        for stream, device in ((3, first), (5, first), (7, first + 500), (9, first), (11, first + 500)):
            gpu.stream, gpu.device = stream, device
            call()
        told["streams"] = [launched.stream for launched in gpu.launches[2:]]
        told["devices"] = [launched.device - first for launched in gpu.launches[2:]]
        functions = [launched.function for launched in gpu.launches[2:]]
        told["binaries by device"] = [
            functions[0] == functions[1] == functions[3],
            functions[2] == functions[4] != functions[0],
        ]
        gpu.stream, gpu.device = 0, first

        seen = []
        with launch.observe(seen.append):
            call()
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        told["observed"] = [[event.kernel, event.compiled is gpu.compiled[0], str(event.tile) != ""] for event in seen]

        before = len(gpu.launches)
        with launch.observe(seen.append, compile_only=True):
            call()
        told["compiled only"] = [len(gpu.launches) - before, len(seen)]

        names = []
        for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            hook.add(lambda metadata: names.append(metadata.get()["name"]))
            call()
            hook.calls.clear()
            call()
        told["hooked"] = names

        compiles = gpu.compiles
        knobs.runtime.debug = True
        call()
        told["debug compiles"] = gpu.compiles - compiles
        knobs.runtime.debug = False
        call()
        told["debug no more"] = gpu.launches[-1].function == functions[0]

        launch.RUN_IS_KNOWN = False
        before = len(gpu.launches)
        call()
        told["an unknown Triton"] = [len(gpu.launches) - before, gpu.launches[-1].function == functions[0]]
    return told


@pytest.mark.compiled
def test_a_repeated_launch_follows_what_changed_around_it():
    assert run_compiled(watchers) == {
        "once compiled": [1, 2],
        "streams": [3, 5, 7, 9, 11],
        "devices": [0, 0, 500, 0, 500],
        "binaries by device": [True, True],
        "observed": [["conv_fprop_kernel", True, True]] * 2,
        "compiled only": [0, 3],
        "hooked": ["conv_fprop_kernel"] * 2,
        "debug compiles": 1,
        "debug no more": True,
        "an unknown Triton": [1, True],
    }


def threads():
    """Eight threads, few shapes: every launch has the grid of its own tensors."""
    import threading

    import torch

    from cnnfast_kernels import launch
    from cnnfast_kernels.aot.stub_driver import stub_driver
    from cnnfast_kernels.conv import Geometry, conv_fprop

    geometry = Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1)
    w = torch.zeros(32, 32, 1, 1)
    images = {n: torch.zeros(n, 32, 16, 16).to(memory_format=torch.channels_last) for n in range(1, 6)}
    failures = []

    def work(first):
        try:
            for i in range(100):
                conv_fprop(images[1 + (first + i) % 5], w, geometry)
                if i % 25 == first:
                    launch.forget_plans()
        except Exception as error:
            failures.append(repr(error))

    with stub_driver() as gpu:
        workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    pixels = {id(x): x.shape[0] * 256 for x in images.values()}
    blocks = {pixels[id(launched.arguments[0])] / launched.grid[0] for launched in gpu.launches}
    own = all(launched.arguments[2].shape == launched.arguments[0].shape for launched in gpu.launches)
    return (
        failures,
        len(gpu.launches),
        sorted(blocks),
        own,
        len({launched.arguments[2].data_ptr() for launched in gpu.launches}),
    )


@pytest.mark.compiled
def test_plans_are_shared_by_threads():
    failures, launched, blocks, own, results = run_compiled(threads)
    assert failures == []
    assert launched == results == 800
    assert own
    assert len(blocks) == 1
