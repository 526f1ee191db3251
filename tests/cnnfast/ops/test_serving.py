"""Who serves a call: each row of README's table, in its order; and what the decision depends on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cnnfast
import cnnfast.functional as F
from cnnfast import dispatch
from cnnfast.ops import serving
from cnnfast.recording import Call
from cnnfast_kernels import choosing, fprop_plans, launch, questions, tables
from cnnfast_kernels.gather.fprop import plan_fprop
from cnnfast_kernels.layout import dense
from cnnfast_kernels.questions import Geometry
from cnnfast_kernels.tiling import TileConfig
from cnnfast_kernels.tma.tiles import BoxTile
from tests.support.agreement import integers

LAST, NCHW = torch.channels_last, torch.contiguous_format
HALF = torch.float16


def image(
    C: int = 8, size: int = 6, dtype: torch.dtype = torch.float32, fmt: torch.memory_format = LAST, device="cpu"
) -> torch.Tensor:
    return integers(2, C, size, size, dtype=dtype).to(device).contiguous(memory_format=fmt)


def filters(K: int = 8, C: int = 8, taps: int = 3, dtype=torch.float32, fmt=LAST, device="cpu") -> torch.Tensor:
    return integers(K, C, taps, taps, seed=1, dtype=dtype).to(device).contiguous(memory_format=fmt)


def traced(function: Callable[[], object]) -> list[Call]:
    with cnnfast.trace() as calls:
        function()
    return list(calls)


def servers(function: Callable[[], object]) -> set[str]:
    return {call.served_by for call in traced(function)}


def reasons(function: Callable[[], object]) -> set[str]:
    return {call.reason for call in traced(function)}


# ----------------------------------------------------------------------------------------------------------------------
# README's table. Each function below is of one row, whose first words its name in ROWS repeats.


def you_asked_for_pytorch(device):
    x, w = image(device=device), filters(device=device)
    assert reasons(lambda: F.conv2d(x, w, algorithm="torch")) == {'algorithm="torch"'}
    with cnnfast.backend("torch"):
        assert reasons(lambda: (F.conv2d(x, w), F.max_pool2d(x, 2))) == {'backend("torch")'}


def there_is_no_device(monkeypatch):
    on_the_cpu = "the tensors are on the CPU, and Triton does not interpret"
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "CPU_REASON", on_the_cpu)
        assert servers(lambda: F.conv2d(image(), filters())) == {"torch"}
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "launch", None)
        assert reasons(lambda: F.max_pool2d(image(), 2)) == {"triton is not installed"}
    for capability, reason in (((7, 5), "GPU sm_75 is older than sm_80"), ((8, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        assert dispatch._gpu_reason.__wrapped__(0) == reason


def transforms(device):
    x = image(device=device)
    assert servers(lambda: torch.func.vmap(lambda x: F.global_avg_pool2d(x))(x[None])) == {"torch"}
    with torch.autograd.forward_ad.dual_level():
        assert servers(lambda: F.global_avg_pool2d(x)) == {"torch"}


def recorders(device, monkeypatch):
    x = image(device=device)
    assert reasons(lambda: torch.jit.trace(F.global_avg_pool2d, x, check_trace=False)) == {
        "torch.jit.trace is recording"
    }
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert servers(lambda: F.global_avg_pool2d(x)) == {"kernels"}  # by torch.export, say
    monkeypatch.setattr(dispatch, "_to_onnx", lambda: True)
    assert reasons(lambda: F.global_avg_pool2d(x)) == {"the model is being exported to ONNX"}


def other_tensors(device):
    x, w = image(device=device), filters(device=device)
    for given in (x.cfloat(), x.int(), x.to(torch.float8_e4m3fn), x.to_sparse()):
        assert dispatch.why_torch(given)
    assert dispatch.why_torch(x, w.to("meta")) == "tensors are on different devices"


def wrappers(device, monkeypatch):
    x = image(device=device).as_subclass(type("Wrapper", (torch.Tensor,), {}))
    monkeypatch.setattr(dispatch, "is_traceable_wrapper_subclass", lambda t: True)
    assert dispatch.why_torch(x) == "the tensor wraps others"


def triton_cannot_launch(monkeypatch):
    reason = "Triton cannot launch kernels here: it finds no C compiler"
    monkeypatch.setattr(dispatch.launchable, "why_no_launch", lambda device: reason)
    monkeypatch.setattr(dispatch, "_gpu_reason", lambda index: "")
    dispatch._warn_of.cache_clear()
    gpu = torch.device("cuda", 0)
    on_gpu = SimpleNamespace(
        is_cuda=True,
        is_cpu=False,
        is_meta=False,
        is_nested=False,
        dtype=torch.float32,
        layout=torch.strided,
        device=gpu,
    )
    monkeypatch.setattr(dispatch, "PLAIN", (SimpleNamespace,))
    with pytest.warns(RuntimeWarning, match="finds no C compiler") as told:
        assert [dispatch.why_torch(on_gpu), dispatch.why_torch(on_gpu)] == [reason] * 2
    assert len(told) == 1
    with cnnfast.backend("kernels"), pytest.raises(RuntimeError, match="finds no C compiler"):
        dispatch.why_torch(on_gpu)
    dispatch._warn_of.cache_clear()


def bare_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "_interpreter_rounds_bf16", lambda: False)
    if launch.INTERPRETED:
        assert reasons(lambda: F.max_pool2d(image(dtype=torch.bfloat16), 2)) == {
            "Triton's interpreter computes bfloat16 wrongly"
        }


def single_passes(device, library_first):
    x = image(device=device)
    assert servers(lambda: (F.batch_norm(x, None, None, training=True), F.max_pool2d(x, 2), F.avg_pool2d(x, 2))) == {
        "kernels"
    }
    assert servers(lambda: F.global_avg_pool2d(x.contiguous())) == {"kernels"}


def you_asked_for_kernels(device, library_first):
    x, w = image(fmt=NCHW, device=device), filters(fmt=NCHW, device=device)
    for algorithm in ("direct", "im2col"):
        assert servers(lambda algorithm=algorithm: F.conv2d(x, w, algorithm=algorithm)) == {"kernels"}
    with cnnfast.backend("kernels"):
        assert servers(lambda: F.conv2d(x, w.requires_grad_()).sum().backward()) == {"kernels"}


def measured(device, gpu, library_first):
    x, w = image(device=device), filters(device=device)
    problem = Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1).problem(x.shape, w.shape)

    def row(winner, **changes):
        key = tables.Key(*gpu, "fprop", "", "float32", "NHWC NHWC NHWC", problem)._replace(**changes)
        tables.write(
            *gpu, [tables.TableRow(key, TileConfig(32, 32, 16, 4, 2), winner, {"kernels": 9.0, "library": 4.5})], {}
        )
        launch.forget_plans()

    def serves(n: int = 2, fmt=LAST) -> set[str]:
        many = x.repeat(n, 1, 1, 1)[:n].contiguous(memory_format=fmt)
        return servers(lambda: F.conv2d(many, w))

    row("kernels", operation="dgrad")
    assert serves() == {"library"}, "another operation was measured"
    row("kernels")
    assert [serves(n) for n in (1, 2, 4, 5)] == [{"kernels"}] * 3 + [{"library"}]
    assert serves(fmt=NCHW) == {"library"}, "another layout was measured"
    row("library")
    assert serves() == {"library"}
    assert reasons(lambda: F.conv2d(x, w)) == {
        "it took 4.5 us, our best kernel 9.0 us at batch 2 when measured on this GPU"
    }


def interpreted(device):
    if device.type == "cpu":
        x, w = image(fmt=NCHW, device=device), filters(fmt=NCHW, device=device)
        assert servers(lambda: (F.conv2d(x, w, padding=1), F.conv_bn_act(x, w, training=True))) == {"kernels"}


def depthwise(device, library_first):
    def serves(dtype=HALF, fmt=LAST, multiplier=1):
        x, w = (
            image(dtype=dtype, fmt=fmt, device=device).requires_grad_(),
            filters(8 * multiplier, 1, dtype=dtype, device=device),
        )
        return servers(lambda: F.conv2d(x, w.requires_grad_(), padding=1, groups=8).square().sum().backward())

    assert serves() == {"kernels"}
    assert serves(torch.float32) == serves(multiplier=2) == serves(fmt=NCHW) == {"library"}


def uneven_padding(device, library_first):
    x, w = image(device=device).requires_grad_(), filters(taps=2, device=device).requires_grad_()
    assert servers(lambda: F.conv2d(x, w, padding="same").square().sum().backward()) == {"kernels"}
    assert servers(lambda: F.conv2d(x, filters(device=device), padding="same")) == {"library"}
    up = filters(device=device)
    assert servers(lambda: F.conv_transpose2d(x, up, None, 2, 1, 1)) == {"library"}, (
        "the library can: no window ends in the padding"
    )


def uneven_padding_elsewhere(device, library_first):
    x, w = image(fmt=NCHW, device=device).requires_grad_(), filters(taps=2, fmt=NCHW, device=device).requires_grad_()
    assert servers(lambda: F.conv2d(x, w, padding="same").sum().backward()) == {"library"}


def everything_else(device, library_first):
    def serves(dtype, fmt, training):
        x, w = image(dtype=dtype, fmt=fmt, device=device), filters(dtype=dtype, fmt=fmt, device=device)
        ones = torch.ones(8, dtype=torch.promote_types(dtype, torch.float32), device=device)
        calls = traced(lambda: F.conv_bn_act(x, w, ones, ones, training=training, padding=1))
        (call,) = [call for call in calls if call.operation in ("conv_bn_act", "conv_stats")]
        assert (call.served_by, call.reason) == ("library", serving.UNMEASURED)
        return {event.kernel for call in calls for event in call.launches}

    statistics = {"batch_moments_kernel", "combine_kernel", "update_running_kernel"}
    for dtype in (torch.float32, HALF, torch.float64):
        for fmt in (LAST, NCHW):
            assert serves(dtype, fmt, training=False) == {"normalize_kernel"}
            assert serves(dtype, fmt, training=True) == {"normalize_kernel"} | statistics


ROWS = {
    '`algorithm="torch"`': you_asked_for_pytorch,
    "CPU tensors without the interpreter": there_is_no_device,
    "functorch transforms": transforms,
    "calls that `torch.jit.trace`": recorders,
    "complex, integer and fp8 dtypes": other_tensors,
    "tensors that wrap others": wrappers,
    "a GPU on which Triton cannot launch": triton_cannot_launch,
    "bfloat16 in the bare interpreter": bare_interpreter,
    "batch norm, pooling": single_passes,
    'convolution with `algorithm="direct"`': you_asked_for_kernels,
    "convolution measured on this GPU": measured,
    "convolution in the interpreter": interpreted,
    "depthwise convolution in half precision": depthwise,
    "convolution padded more at one end": uneven_padding,
    "the same in other layouts": uneven_padding_elsewhere,
    "every other convolution": everything_else,
}


@pytest.mark.parametrize("row", ROWS)
def test_each_row_of_the_readme(row, request):
    names = ROWS[row].__code__.co_varnames[: ROWS[row].__code__.co_argcount]
    ROWS[row](**{name: request.getfixturevalue(name) for name in names})


def test_these_are_the_rows_of_the_readme():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    table = readme.partition("### Who serves a call")[2].partition("\n|---|---|\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.*?) \| ", table, re.MULTILINE)
    assert len(rows) == len(ROWS)
    assert all(row.startswith(words) for row, words in zip(rows, ROWS, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Beyond the table


def test_a_measured_tile_that_the_tensors_cannot_take_does_not_count(gpu):
    """Tensors between multiples of 16 bytes have the key of those at them, but no tensor map: by what was measured
    nobody knows.
    """
    x, w = (dense((8, 64, 16, 16), HALF, LAST), dense((64, 64, 1, 1), HALF, LAST))
    geometry = Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1)
    asked = [questions.fprop_question(x, w, geometry, gpu, aligned=aligned) for aligned in (True, False)]
    tables.write(*gpu, [tables.TableRow(asked[0].key, BoxTile(1, 8, 8, 64, 64, 4, 3), "kernels", {})], {})
    rows = [choosing.measured(q) for q in asked]
    for library_first, by_library in ((True, [False, True]), (False, [False, False])):
        decisions = [serving.decide(q, row, library_first) for q, row in zip(asked, rows, strict=True)]
        assert [decision.library for decision in decisions] == by_library


def test_an_empty_batch_is_nobodys(device, library_first):
    calls = traced(lambda: F.conv2d(image(device=device)[:0], filters(device=device)))
    assert [(call.served_by, call.launches) for call in calls] == [("kernels", [])]


def test_under_kernels_a_trace_says_that_the_library_was_not_asked(device, library_first):
    with cnnfast.backend("kernels"):
        assert reasons(lambda: F.conv2d(image(device=device), filters(device=device))) == {
            "the library may not serve: kernels were asked for"
        }


def test_a_repeated_call_decides_nothing_anew(device, library_first, monkeypatch):
    x, w = image(device=device).requires_grad_(), filters(device=device).requires_grad_()

    def step():
        F.conv_bn_act(x, w, training=True).sum().backward()

    step()
    monkeypatch.setattr(serving, "decide", lambda *arguments: pytest.fail("the answer should have been kept"))
    step()


def test_the_decision_and_the_launch_come_from_one_plan(device, gpu, library_first, monkeypatch):
    """A call of a new shape asks the tables once, whoever serves, and no launch is prepared for the library."""
    find, asked, made = tables.find, [], []
    monkeypatch.setattr(tables, "find", lambda key: asked.append(key) or find(key))
    monkeypatch.setattr(fprop_plans, "plan_fprop", lambda *arguments: made.append(arguments) or plan_fprop(*arguments))
    x, w = image(fmt=NCHW, device=device), filters(fmt=NCHW, device=device)
    assert servers(lambda: F.conv2d(x, w)) == {"library"}
    assert (len(asked), len(made)) == (1, 0)
    with cnnfast.backend("kernels"):
        assert servers(lambda: F.conv2d(x, w)) == {"kernels"}
    assert (len(asked), len(made)) == (1, 1)
