"""Who serves a call, and how one sees and steers it."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
import torch

import cnnfast
import cnnfast.functional as F
from cnnfast import dispatch, recording
from cnnfast.functional import entrance
from cnnfast_kernels import launch, memory, pooling
from tests.support.agreement import integers, leaf
from tests.support.child import run_compiled

X, W = integers(2, 2, 4, 4), integers(3, 2, 3, 3)


@pytest.fixture
def operands(device) -> tuple[torch.Tensor, torch.Tensor]:
    return X.to(device), W.to(device)


def test_trace_lists_calls_with_their_launches(operands):
    x, w = operands
    w = leaf(w)
    with cnnfast.trace() as trace:
        F.conv2d(x, w).sum().backward()
        F.conv2d(x, w, algorithm="torch")
        F.max_pool2d(x.int() if x.is_cuda else x.to(torch.int64), 2)
    assert len(trace) == len(list(trace)) == 4
    fprop, wgrad, *torch_calls = trace
    assert (fprop.operation, fprop.served_by, fprop.reason) == ("conv_fprop", "kernels", "")
    assert (fprop.shapes, fprop.dtype) == (((2, 2, 4, 4), (3, 2, 3, 3)), "float32")
    assert [event.kernel for event in fprop.launches] == ["conv_fprop_kernel"]
    assert wgrad.operation == "conv_wgrad"
    assert [(call.operation, call.served_by) for call in torch_calls] == [("conv2d", "torch"), ("max_pool2d", "torch")]
    assert [call.reason for call in torch_calls] == [
        'algorithm="torch"',
        f"dtype torch.{'int32' if x.is_cuda else 'int64'} has no kernel",
    ]
    assert trace.launches == ["conv_fprop_kernel", "conv_wgrad_kernel"]
    assert str(fprop) == f"conv_fprop 2x2x4x4 3x2x3x3 float32: conv_fprop_kernel [{fprop.launches[0].tile}]"
    assert str(torch_calls[0]) == 'conv2d 2x2x4x4 3x2x3x3 float32: torch, because algorithm="torch"'


def test_a_call_without_launches(operands):
    with cnnfast.trace() as trace:
        F.conv2d(operands[0][:0], operands[1])
    assert str(*trace) == "conv_fprop 0x2x4x4 3x2x3x3 float32: no launch: nothing to compute"
    assert "no launch: nothing to compute" in str(trace)


def test_a_trace_prints_as_a_table(operands):
    """Equal calls share a row, each kernel has a line, and a reason that many calls have stands once, below."""
    x, w = operands
    with cnnfast.trace() as trace:
        for _ in range(3):
            F.conv2d(x, w)
        F.conv2d(x, w, algorithm="torch")
        F.max_pool2d(x, 2)
        with cnnfast.backend("torch"):
            F.conv2d(x, w)
    words = [line.split() for line in str(trace).splitlines()]
    shapes = ["2x2x4x4", "3x2x3x3"]
    assert " ".join(words[0]) == "6 calls: 4 by our kernels, 2 by PyTorch"
    assert words[2] == ["operation", "shapes", "dtype", "served", "by", "calls"]
    tile = f"[{trace.calls[0].launches[0].tile}]".split()
    assert words[4] == ["conv_fprop", *shapes, "float32", "conv_fprop_kernel", *tile, "3"]
    assert words[5] == ["conv2d", *shapes, "float32", "torch", "(1)", "1"]
    assert words[6][:2] == ["max_pool", "2x2x4x4"]
    assert words[7] == ["conv2d", *shapes, "float32", "torch", "(2)", "1"]
    assert [" ".join(line) for line in words[8:]] == ["", '(1) algorithm="torch"', '(2) backend("torch")']
    assert max(map(len, str(trace).splitlines())) <= recording.WIDTH
    assert repr(trace) == "<Trace of 6 calls: 4 by our kernels, 2 by PyTorch; print it for the table>"


def test_an_empty_trace_says_what_may_be_missing():
    with cnnfast.trace() as trace:
        pass
    assert "was it converted?" in str(trace)
    assert repr(trace) == "<Trace of no calls>"


def test_traces_nest(operands):
    """Each lists what ran while it lasted; the end of one, by an exception too, leaves the other."""
    with cnnfast.trace() as outer:
        F.conv2d(*operands)
        with suppress(ZeroDivisionError), cnnfast.trace() as inner:
            F.max_pool2d(operands[0], 2)
            raise ZeroDivisionError
        F.global_avg_pool2d(operands[0])
    F.conv2d(*operands)
    assert [call.operation for call in outer] == ["conv_fprop", "max_pool", "global_avg_pool"]
    assert [call.operation for call in inner] == ["max_pool"]
    assert outer.launches == ["conv_fprop_kernel", "max_pool_kernel", "plane_mean_kernel"]
    assert recording.traces == []


class Kernel:
    """What launch.run needs of one. (The interpreter runs one kernel at a time.)"""

    def __init__(self, name):
        self.__name__ = name

    def __getitem__(self, grid):
        return lambda *args, **options: None


def test_trace_hears_other_threads():
    """A launch belongs to the call of its own thread, whatever the others do meanwhile."""
    meet = threading.Barrier(2, timeout=60)

    def operator(name):
        @recording.recorded(name)
        def call(x):
            for _ in range(3):
                meet.wait()
                launch.run(Kernel(f"{name}_kernel"), (1,), x.device)

        return call

    threads = [threading.Thread(target=operator(name), args=(X,)) for name in ("left", "right")]
    with cnnfast.trace() as trace:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    kernels = {call.operation: [event.kernel for event in call.launches] for call in trace}
    assert kernels == {"left": ["left_kernel"] * 3, "right": ["right_kernel"] * 3}


def test_a_failing_call_is_left(operands, monkeypatch):
    """What a kernel raises reaches the caller, and nothing launched later is taken for the failed call's."""

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    with cnnfast.trace() as trace:
        with monkeypatch.context() as patch:
            patch.setattr(memory, "empty", fail)
            with pytest.raises(MemoryError, match="no room"):
                F.conv2d(*operands)
        F.conv2d(*operands)
        pooling.global_avg_pool(operands[0])  # a kernel alone, of no call
    assert [len(call.launches) for call in trace] == [0, 1]


def test_backend_kernels_raises_where_pytorch_would_serve(operands):
    x, w = operands
    with cnnfast.backend("kernels"):
        F.conv2d(x, w)
        for call in (
            lambda: F.conv2d(x, w, algorithm="torch"),
            lambda: F.max_pool2d(x.int(), 2),
            lambda: F.conv2d(x.cfloat(), w.cfloat()),
            lambda: F.batch_norm(x.to_sparse(), None, None, training=True),
            lambda: F.conv2d(x, w.to_sparse()),
            lambda: torch.func.vmap(lambda x: F.global_avg_pool2d(x))(x),
        ):
            with pytest.raises(RuntimeError, match=r'backend\("kernels"\).*because'):
                call()


def test_preferred_kernels_leave_the_rest_to_pytorch(operands):
    """And the choice before is back afterwards, after an error too."""
    x, w = operands
    with cnnfast.backend("torch"):
        with dispatch.prefer_kernels(), cnnfast.trace() as trace:
            assert not dispatch.library_allowed()
            F.conv2d(x, w)
            F.max_pool2d(x.int(), 2)
            with cnnfast.backend("auto"):
                assert dispatch.library_allowed()
        with suppress(ZeroDivisionError), dispatch.prefer_kernels():
            raise ZeroDivisionError
        F.conv2d(x, w)
        assert dispatch._backend == "torch"
    assert [call.served_by for call in trace] == ["kernels", "torch"]


def test_backend_torch_serves_pytorch(operands):
    with cnnfast.backend("torch"), cnnfast.trace() as trace:
        y = F.conv2d(*operands)
        F.conv_bn_act(*operands, training=True)
        F.batch_norm(operands[0], None, None, training=True)
        F.max_pool2d(operands[0], 2)
        F.avg_pool2d(operands[0], 2)
        F.global_avg_pool2d(operands[0])
    assert {call.served_by for call in trace} == {"torch"}
    assert {call.reason for call in trace} == {'backend("torch")'}
    assert [call.operation for call in trace] == [
        "conv2d",
        "conv_bn_act",
        "batch_norm",
        "max_pool2d",
        "avg_pool2d",
        "global_avg_pool2d",
    ]
    assert torch.equal(y, F.conv2d(*operands))


def test_backend_is_restored(operands):
    with cnnfast.backend("kernels"):
        with pytest.raises(ZeroDivisionError), cnnfast.backend("torch"):
            raise ZeroDivisionError
        assert dispatch._backend == "kernels"
        with cnnfast.backend("auto"):
            assert dispatch.why_torch(operands[0].int()) != ""
    assert dispatch._backend == "auto"
    with pytest.raises(ValueError, match=r"name='cuda'$"), cnnfast.backend("cuda"):
        pass


def test_reasons(operands):
    x, w = operands
    assert dispatch.why_torch(x, w, None) == ""
    assert dispatch.why_torch(x, w, algorithm="im2col") == ""
    assert dispatch.why_torch(x.to(torch.float8_e4m3fn)) == "dtype torch.float8_e4m3fn has no kernel"
    assert dispatch.why_torch(x, w.to("meta")) == "tensors are on different devices"
    assert dispatch.why_torch(x.to("meta")) == "device meta has no kernels"
    assert dispatch.why_torch(x.to_sparse()) == "the tensor is not plain strided memory"
    assert dispatch.why_torch(x, None, w.to_sparse()) == "a tensor is not plain strided memory"
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in dispatch.why_torch(x)


def test_a_lazy_negation_is_done(operands):
    """A view whose negation is still to be done is not read as memory."""
    x, w = operands
    for inputs in ((torch._neg_view(x), leaf(w)), (leaf(x), torch._neg_view(w))):
        y = F.conv2d(*inputs)
        assert torch.equal(y, F.conv2d(-x, w))
        wanted = inputs[0] if inputs[0].requires_grad else inputs[1]
        (mine,) = torch.autograd.grad(y.sum(), wanted)
        assert torch.equal(mine, torch.autograd.grad(torch.nn.functional.conv2d(*inputs).sum(), wanted)[0])


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "GPU sm_75 is older than sm_80"), ((8, 0), ""), ((10, 0), "")]
)
def test_old_gpus(capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert dispatch._gpu_reason.__wrapped__(0) == reason


def test_captured_calls():
    """Observers wrap every call of the public functions, innermost last."""
    seen = []

    class Observer:
        def __init__(self, name, args, kwargs):
            seen.append((name, len(args), sorted(kwargs)))

        def __enter__(self):
            seen.append("enter")

        def __exit__(self, *error):
            seen.append("exit")

    with entrance.capture(Observer):
        F.conv2d(X, W, algorithm="torch")
    F.conv2d(X, W, algorithm="torch")
    assert seen == [("conv2d", 2, ["algorithm"]), "enter", "exit"]


def without_the_interpreter():
    import torch

    import cnnfast
    import cnnfast.functional as F

    with cnnfast.trace() as trace:
        y = F.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    return [y.item(), *[(call.served_by, call.reason) for call in trace]]


def in_the_bare_interpreter():
    import os

    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    import cnnfast
    import cnnfast.functional as F

    x, w = torch.full((1, 1, 2, 2), 1.5), torch.full((1, 1, 2, 2), 0.5)
    results = []
    with cnnfast.trace() as trace:
        for dtype in (torch.float32, torch.bfloat16):
            results.append(F.conv2d(x.to(dtype), w.to(dtype)).item())
    return [results, *[(call.operation, call.reason) for call in trace if call.operation != "global_avg_pool"]]


@pytest.mark.compiled
def test_cpu_without_the_interpreter_is_pytorchs():
    assert run_compiled(without_the_interpreter) == [
        4.0,
        ["torch", "the tensors are on the CPU, and Triton does not interpret"],
    ]


@pytest.mark.compiled
def test_bfloat16_in_the_bare_interpreter_is_pytorchs():
    """It computes on the raw bits there; other dtypes are served by kernels."""
    results, ours, theirs = run_compiled(in_the_bare_interpreter)
    assert results == [3.0, 3.0]
    assert ours == ["conv_fprop", ""]
    assert theirs == ["conv2d", "Triton's interpreter computes bfloat16 wrongly"]


def test_what_torch_compile_takes_as_constant_is_marked_as_pytorch_marks_it():
    """dispatch marks it itself, because PyTorch's decorator imports torch._dynamo."""

    def ours():
        pass

    def theirs():
        pass

    assert vars(dispatch.assume_constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def import_without_dynamo() -> bool:
    import sys

    import cnnfast.checking
    import cnnfast.functional
    import cnnfast.summary  # noqa: F401

    return "torch._dynamo" in sys.modules


@pytest.mark.compiled
def test_importing_us_does_not_import_dynamo():
    assert not run_compiled(import_without_dynamo)
