"""What threads share below conversion: the choice of who serves, plans, kernels in the interpreter, and the random
numbers that are put back after a look at a model.
"""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext

import pytest
import torch

import cnnfast
import cnnfast.functional as F
from cnnfast import dispatch
from cnnfast.aside import leaving_no_trace
from cnnfast.functional import entrance
from cnnfast.nn import fused
from cnnfast_kernels import devices, launch
from tests.support.agreement import integers
from tests.support.threads import MOMENT, SECONDS, elsewhere, together

GPU = devices.Gpu("a GPU", 80)
META = torch.empty(0, device="meta")


class Worker:
    """A thread that does one thing after another, when it is told to."""

    def __init__(self) -> None:
        self.thread, self.contexts = ThreadPoolExecutor(1), ExitStack()

    def does(self, function):
        return self.thread.submit(function).result(SECONDS)

    def enters(self, context):
        return self.does(lambda: self.contexts.enter_context(context))

    def leaves(self):
        self.does(lambda: self.contexts.pop_all().close())


@pytest.fixture
def workers():
    made = [Worker() for _ in range(3)]
    yield made
    for worker in made:
        worker.leaves()
        worker.thread.shutdown()


def test_who_serves_where_several_threads_choose(workers):
    """Each has its own choice; who has none has the last one; and each takes back only its own, in whatever order."""
    first, second, third = workers
    first.enters(cnnfast.backend("torch"))
    assert [worker.does(dispatch._chosen) for worker in workers] == ["torch"] * 3
    second.enters(cnnfast.backend("kernels"))
    assert [worker.does(dispatch._chosen) for worker in workers] == ["torch", "kernels", "kernels"]
    first.leaves()
    assert [worker.does(dispatch._chosen) for worker in workers] == ["kernels"] * 3
    third.enters(cnnfast.backend("auto"))
    second.leaves()
    assert [worker.does(dispatch._chosen) for worker in workers] == ["auto"] * 3
    third.leaves()
    assert dispatch._chosen() == dispatch._backend == "auto"


def test_a_backward_pass_in_another_thread_is_served_as_its_caller_chose(workers):
    """As autograd's own threads are on a GPU: they choose nothing."""
    assert dispatch.library_allowed()
    with cnnfast.backend("kernels"):
        assert not elsewhere(dispatch.library_allowed)
        with cnnfast.backend("torch"):
            assert elsewhere(dispatch.library_allowed)
        assert not elsewhere(dispatch.library_allowed)
    assert elsewhere(dispatch.library_allowed)


def test_what_is_looked_at_aside_changes_nothing_for_other_threads(workers):
    first, second, _ = workers
    first.enters(dispatch.in_this_thread("torch"))
    first.enters(dispatch.meta_as_gpu())
    first.enters(devices.meta_stands_for(GPU))
    assert first.does(lambda: (dispatch._chosen(), dispatch.on_gpu(META), devices.gpu(META.device))) == (
        "torch",
        True,
        GPU,
    )
    for ask in (dispatch._chosen, lambda: dispatch.on_gpu(META), lambda: devices.type_of(META.device)):
        assert second.does(ask) == ask() != first.does(ask)
    second.enters(devices.meta_stands_for(devices.Gpu("another", 90)))
    first.leaves()
    assert second.does(lambda: devices.gpu(META.device).name) == "another"


def test_captures_and_fused_steps_are_of_one_thread(quick):
    heard: list[tuple[str, int]] = []

    def called(name, args, kwargs):
        heard.append((name, threading.get_ident()))
        return nullcontext()

    def step():
        with torch.no_grad():
            fused.conv_bn_act(conv, norm, x)
        return entrance.captured()

    conv, norm = torch.nn.Conv2d(1, 1, 1).to(quick), torch.nn.BatchNorm2d(1).to(quick).eval()
    x = torch.zeros(1, 1, 2, 2, device=quick)
    with entrance.capture(called), fused.observed(lambda *step: heard.append(("a step", threading.get_ident()))):
        assert not elsewhere(step)
        assert heard == []
        assert step()
    here = threading.get_ident()
    assert heard == [("a step", here), ("conv_bn_act", here)]
    assert not entrance.captured()


def test_a_plan_that_was_overtaken_is_made_again():
    """tune writes a row, and forgets plans, while another thread makes one from the table as it was."""
    row, made = ["old"], []

    @launch.planned
    def plan(key):
        made.append(row[0])
        if len(made) == 1:
            row[0] = "new"
            elsewhere(launch.forget_plans)
            return "old"
        return row[0]

    try:
        assert [plan(1), plan(1)] == ["new", "new"]
        assert made == ["old", "new"]
    finally:
        launch._plan_caches.pop()


def test_one_look_at_a_time():
    """Each puts the random numbers back that it found: the second would find, and put back, the first one's."""
    before = torch.get_rng_state(), random.getstate()
    first, second = threading.Event(), threading.Event()

    def look(mine, other, seconds):
        with leaving_no_trace():
            torch.rand(1), random.random()
            mine.set()
            other.wait(seconds)

    def late():
        first.wait(SECONDS)
        look(second, threading.Event(), MOMENT)

    together(lambda: look(first, second, MOMENT), late)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.skipif(not launch.INTERPRETED, reason="interpreter ring: compiled kernels share nothing")
def test_kernels_in_the_interpreter_run_one_after_another(monkeypatch):
    """Triton's interpreter has one position in the grid for all threads."""
    inside, most = [], []

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            def run(*arguments, **options):
                inside.append(1)
                most.append(len(inside))
                threading.Event().wait(0.02)
                inside.pop()

            return run

    together(*[lambda: launch.run(Kernel(), (1,), torch.device("cpu"))] * 4)
    assert most == [1] * 4


def test_operations_called_by_several_threads_at_once(device):
    """Forward and backward, the same sizes and others: exact sums, so that any mix-up shows."""
    operands = [(integers(1, 2, 4 + i % 2, 4).to(device), integers(2, 2, 3, 3).to(device)) for i in range(3)]

    def step(x, w):
        w = w.clone().requires_grad_()
        y = F.max_pool2d(F.conv_bn_act(x, w, None, None, training=True, padding=1, activation=None), 2)
        z = F.conv2d(x, w, padding=1)
        z.sum().backward()
        return z.detach(), w.grad, y.detach()

    alone = [step(*each) for each in operands]
    at_once = together(*(lambda each=each: step(*each) for each in operands))
    for mine, theirs in zip(at_once, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
