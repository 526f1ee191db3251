"""How tune times one convolution on a GPU: CUDA's streams and graphs are replaced, and operands lie on the CPU."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from cnnfast import tuning
from cnnfast.measuring import graphs
from cnnfast.measuring.timing import Times
from cnnfast.tuning import racing, running
from cnnfast_kernels import devices, launch
from tests.support.tuned import convolution, image

pytestmark = pytest.mark.skipif(
    not launch.INTERPRETED, reason="interpreter ring: CUDA is replaced, and kernels run on CPU tensors"
)

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


@dataclass
class Call:
    """One computation of a candidate. graph: that it is captured in, None if it runs at once."""

    tile: object
    x: torch.Tensor
    benchmark: bool
    graph: object


@dataclass
class FakeGpu:
    """What was computed on it. L2 is its second-level cache. `fails` may raise when a computation begins. lost: it no
    longer answers.
    """

    L2: int = 0
    calls: list[Call] = field(default_factory=list)
    graph: object = None
    lost: bool = False
    fails: object = staticmethod(lambda call: None)

    def captured(self) -> dict[object, list[Call]]:
        """By graph."""
        found = {}
        for call in self.calls:
            if call.graph is not None:
                found.setdefault(call.graph, []).append(call)
        return found


@pytest.fixture
def fake(gpu, monkeypatch) -> FakeGpu:
    fake = FakeGpu()

    class Graph:
        def __init__(self) -> None:
            self.replays = 0

        def replay(self) -> None:
            self.replays += 1

    class Stream:
        def __init__(self, device=None) -> None:
            pass

        def wait_stream(self, other) -> None:
            pass

        def synchronize(self) -> None:
            pass

    @contextmanager
    def capture(graph, stream):
        fake.graph = graph
        try:
            yield
        finally:
            fake.graph = None

    def synchronize(device) -> None:
        if fake.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    results = {}  # computed once, by tile: right for the first set, and that is the one which is judged

    def noted(compute):
        def run(convolution, a, tile=None):
            call = Call(tile, a["x"], torch.backends.cudnn.benchmark, fake.graph)
            fake.fails(call)
            fake.calls.append(call)
            if tile not in results:
                results[tile] = compute(convolution, a) if tile is None else compute(convolution, a, tile)
            return results[tile]

        return run

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=fake.L2))
    monkeypatch.setattr(
        racing, "operands", lambda convolution, device, seed=0: running.operands(convolution, CPU, seed)
    )
    monkeypatch.setattr(racing, "ours", noted(running.ours))
    monkeypatch.setattr(racing, "by_library", noted(running.by_library))
    return fake


def planned() -> tuning.Measured:
    """Of a default, one other tile, and the library."""
    (measured,) = tuning.plan(convolution(CPU), image(CPU))
    names = ["default", *list(measured.candidates)[1:2], "library"]
    measured.candidates = {name: measured.candidates[name] for name in names}
    return measured


def bytes_of(measured: tuning.Measured) -> int:
    return sum(t.nbytes for t in running.operands(measured.convolution, CPU).values() if isinstance(t, torch.Tensor))


def take_turns(microseconds: float = 80.0):
    """A clock on which each pass takes so long."""

    def measure(passes):
        for step in passes.values():
            step()
        return {name: Times(microseconds / 1e6, 0, 0, 1) for name in passes}

    return measure


def race(measured: tuning.Measured, measure=None) -> None:
    racing.race(measured, CUDA, measure or take_turns(), lambda: None)


def test_each_candidate_is_one_graph_over_sets_that_do_not_fit_the_cache(fake):
    measured = planned()
    fake.L2 = 3 * bytes_of(measured)
    race(measured)
    captured = fake.captured()
    assert [calls[0].tile for calls in captured.values()] == [c.tile for c in measured.candidates.values()]
    for graph, calls in captured.items():
        assert len({call.tile for call in calls}) == 1
        assert len({call.x.data_ptr() for call in calls}) == len(calls) == 6  # twice the cache
        assert graph.replays == 1
    at_once = [call for call in fake.calls if call.graph is None]
    assert len(at_once) == 3 * (1 + 6 * graphs.WARM_UPS)  # judged once, and warmed up on each set
    assert [c.microseconds for c in measured.candidates.values()] == pytest.approx([80.0 / 6] * 3)


def test_there_are_two_sets_at_least_and_not_thousands(fake):
    for cache, sets in ((1, 2), (10**9, 64)):
        fake.L2 = cache
        fake.calls.clear()
        measured = planned()
        race(measured)
        assert {len(calls) for calls in fake.captured().values()} == {sets}
        assert measured.microseconds("default") == pytest.approx(80.0 / sets)


@pytest.mark.parametrize("before", [False, True])
def test_the_library_runs_with_its_benchmark_mode_and_nobody_else(fake, monkeypatch, before):
    """While it is judged, warmed up and captured: what is judged is what is timed."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    race(planned())
    assert {call.benchmark for call in fake.calls if call.tile is None} == {True}
    assert {call.benchmark for call in fake.calls if call.tile is not None} == {before}
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize("name", ["default", "library"])
def test_what_cannot_be_captured_is_not_timed(fake, name):
    measured = planned()

    def fails(call):
        if call.graph is not None and call.tile == measured.candidates[name].tile:
            raise RuntimeError("operation not permitted when stream is capturing")

    fake.fails = fails
    raced = []
    race(measured, lambda passes: raced.extend(passes) or take_turns()(passes))
    assert measured.candidates[name].failure == "RuntimeError: operation not permitted when stream is capturing"
    assert measured.microseconds(name) is None
    assert raced == [other for other in measured.candidates if other != name]
    assert all(measured.microseconds(other) for other in raced)
    if name == "library":  # it may be faster than all of ours: no row says that ours win
        assert measured.row is None
        assert measured.problems == [f"not measured: library: {measured.candidates[name].failure}"]
    else:
        assert measured.row is not None


def test_where_memory_is_short_there_are_fewer_sets(fake):
    measured = planned()
    fake.L2 = 8 * bytes_of(measured)

    def fails(call):
        captured = fake.captured().get(call.graph, ()) if call.graph else ()
        if len(captured) >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    fake.fails = fails
    race(measured)
    assert {len(calls) for calls in list(fake.captured().values())[-3:]} == {4}  # after 16 and 8
    assert {c.microseconds for c in measured.candidates.values()} == {80.0 / 4}


def test_where_it_is_shorter_still_each_candidate_is_measured_alone(fake):
    """As if all graphs at once did not fit. What ends a failed capture hides the reason."""
    measured = planned()
    alive = weakref.WeakSet()

    def fails(call):
        if call.graph is not None:
            alive.add(call.graph)
            if len(alive) > 1:
                try:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                except torch.OutOfMemoryError:
                    raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    fake.fails = fails

    def measure(passes):
        raced.append(list(passes))
        times = take_turns()(passes)
        passes.clear()
        return times

    raced = []

    class Forgetful(list):
        """Keeps no graph alive."""

        def append(self, call) -> None:
            super().append(Call(call.tile, call.x, call.benchmark, None))

    fake.calls = Forgetful()
    gc.disable()  # so that it is not this which frees them
    try:
        race(measured, measure)
    finally:
        gc.enable()
    assert raced == [[name] for name in measured.candidates]
    assert {c.microseconds for c in measured.candidates.values()} == {40.0}


def test_memory_that_does_not_suffice_for_two_sets_is_said(fake, monkeypatch):
    measured = planned()
    operands = racing.operands

    def fails(convolution, device, seed=0):
        if seed:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return operands(convolution, device)

    monkeypatch.setattr(racing, "operands", fails)
    race(measured)
    assert {c.failure for c in measured.candidates.values()} == {
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"
    }
    assert measured.row is None


def test_operands_live_as_long_as_the_graphs_that_read_them(fake, monkeypatch):
    """A graph knows addresses only."""
    seen = []
    operands = racing.operands

    def remembered(convolution, device, seed=0):
        a = operands(convolution, device, seed)
        seen.append(weakref.ref(a["x"]))
        return a

    class Forgetful(list):
        def append(self, call) -> None:
            pass

    def measure(passes):
        gc.collect()
        assert len(seen) == 2
        assert all(x() is not None for x in seen)
        return take_turns()(passes)

    fake.calls = Forgetful()
    monkeypatch.setattr(racing, "operands", remembered)
    race(planned(), measure)
    gc.collect()
    assert all(x() is None for x in seen)


@pytest.mark.parametrize("when", ["judged", "captured", "timed"])
def test_a_gpu_that_no_longer_answers_ends_it_and_who_did_that_is_named(fake, when):
    measured = planned()

    def breaks(*_):
        fake.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    if when != "timed":
        fake.fails = lambda call: breaks() if call.tile is None and (when == "judged") == (call.graph is None) else None

    def measure(passes):
        times = take_turns()(passes)
        if when == "timed":
            fake.lost = True
            return {**times, "library": RuntimeError("CUDA error: an illegal memory access was encountered")}
        return times

    with pytest.raises(
        RuntimeError, match=r"the GPU no longer answers since library on fprop .* ran: RuntimeError: CUDA error"
    ):
        race(measured, measure)


def test_a_lost_gpu_keeps_what_was_measured_before(gpu, device, monkeypatch):
    """The row of the first convolution is written, the others are left."""
    from tests.support.tuned import Net, clock

    measured = []

    def measure(steps):
        if measured:
            raise RuntimeError("the GPU no longer answers")
        measured.append(steps)
        return clock()(steps)

    result = tuning.begin(Net().to(device), image(device))
    with pytest.raises(RuntimeError, match="no longer answers"):
        tuning.proceed(result, device, measure=measure)
    assert (len(result.rows), len(result.left)) == (1, 3)
    assert result.path is not None
    assert devices.gpu(device) == gpu
