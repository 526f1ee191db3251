"""check: what it captures, how it judges, and that it catches faults planted into the kernels' own source."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest

pytest.importorskip("triton")

import torch
from torch import nn
from typer.testing import CliRunner

import cnnfast
import cnnfast.functional as F
from cnnfast.checking.capture import Captured, capture_calls, clone
from cnnfast.checking.judge import compare, judge
from cnnfast.checking.report import WIDTH, CheckReport, CheckRow, Comparison
from cnnfast.commands.check import check as check_command
from cnnfast.dtypes import name_of
from cnnfast_kernels import launch
from cnnfast_kernels.batchnorm import gradients, running
from cnnfast_kernels.gather import dgrad, fprop, wgrad
from cnnfast_kernels.pooling import average, maximum, plane
from tests.support.child import run_compiled
from tests.support.planting import plant
from tests.support.poison import embed


def draw(*shape: int, device: torch.device | None = None) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def test_a_mean_near_zero_is_judged_by_its_terms():
    """PyTorch adds up in float64 on a CPU, and a mean of values that cancel is small: neither tells of float32."""
    for seed in (0, 4):
        x = torch.randn(2, 4, 40, 40, generator=torch.Generator().manual_seed(seed))
        x = x - x.mean((0, 2, 3), keepdim=True)
        statistics = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
        norm = {"weight": None, "bias": None, "training": True, "momentum": 0.1, "eps": 1e-5}
        row = judge(Captured("batch_norm", {"input": x, **statistics, **norm}), backward=False)
        assert row.verdict == "ok", row
        (mean,) = (c for c in row.comparisons if c.tensor == "running_mean")
        assert mean.limit < 4e-8, "of terms of size 0.1"


# ----------------------------------------------------------------------------------------------------------------------
# Planted faults


@pytest.fixture
def plans_forgotten():
    """Plans made of right kernels do not outlive the planting of wrong ones, nor the other way round."""
    launch.forget_plans()
    yield
    launch.forget_plans()


def conv(device):
    return F.conv2d(draw(1, 16, 5, 4, device=device), draw(16, 16, 3, 3, device=device), padding=1)


def max_pool(device):
    return F.max_pool2d(draw(1, 3, 6, 5, device=device), 3, 2, 1)


def avg_pool(device):
    return F.avg_pool2d(draw(1, 3, 6, 5, device=device), 3, 2, 1, count_include_pad=False)


def global_pool(device):
    return F.global_avg_pool2d(draw(1, 3, 30, 50, device=device).contiguous(memory_format=torch.channels_last))


def batch_norm(device):
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    return F.batch_norm(
        draw(4, 3, 5, 5, device=device), mean, var, draw(3, device=device), draw(3, device=device), True
    )


class Fault(NamedTuple):
    """What the kernels' `module` would compute with `wrong` for `right`, the call that meets it, and a tensor that is
    wrong then.
    """

    name: str
    call: Callable
    module: ModuleType
    right: str
    wrong: str
    tensor: str


PIXELS = "window_pixels(h0, h1, w0, w1, H, W, a.count_pad)"
ALL_PIXELS = "window_pixels(h0, h1, w0, w1, H, W, True)"

FAULTS = [
    Fault("mask off by one", max_pool, maximum, "w0 + s, H, W)", "w0 + s, H, W - 1)", "output"),
    Fault(
        "mask off by one",
        conv,
        wgrad,
        "w_tap[None, :], W)",
        "w_tap[None, :], W - 1)",
        "grad of weight",
    ),
    Fault("dropped tap", conv, fprop, "hide_steps(STEPS, M", "hide_steps(STEPS - 1, M", "output"),
    Fault("dropped tap", conv, dgrad, "hide_steps(steps, M", "hide_steps(steps - 1, M", "grad of input"),
    Fault(
        "wrong divisor",
        avg_pool,
        average,
        f"round_quotient(acc, {PIXELS}",
        f"round_quotient(acc, {ALL_PIXELS}",
        "output",
    ),
    Fault(
        "wrong divisor",
        avg_pool,
        average,
        f"tl.where(covers, {PIXELS}",
        f"tl.where(covers, {ALL_PIXELS}",
        "grad of input",
    ),
    Fault(
        "wrong divisor",
        batch_norm,
        gradients,
        "count = rows.to(ACC)",
        "count = (rows - 1).to(ACC)",
        "grad of input",
    ),
    Fault("missing accumulate", global_pool, plane, "acc += tl.load", "acc = tl.load", "output"),
    Fault(
        "missing accumulate",
        conv,
        fprop,
        "EVEN)\n        acc = multiply_accumulate(x, w, acc, PRECISION)",
        "EVEN)\n        acc = multiply_accumulate(x, w, acc * 0, PRECISION)",
        "output",
    ),
    Fault("missing accumulate", max_pool, maximum, "acc += tl.where(saved", "acc = tl.where(saved", "grad of input"),
    Fault(
        "missing accumulate", conv, wgrad, "(dy, x, acc, PRECISION)", "(dy, x, acc * 0, PRECISION)", "grad of weight"
    ),
    Fault(
        "stale running statistic",
        batch_norm,
        running,
        "keep * load_vector(running_ptr, offset, ok, ACC) + take * of_batch",
        "load_vector(running_ptr, offset, ok, ACC)",
        "running_var",
    ),
    Fault(
        "stale statistic",
        batch_norm,
        gradients,
        "(sum_g, sum_gx) if training else (None, None)",
        "(None, None)",
        "grad of input",
    ),
]


def conv_row(device):
    return torch.nn.functional.conv1d(
        draw(1, 16, 9, device=device), draw(8, 16, 3, device=device), draw(8, device=device), 2, "valid"
    )


def transposed(device):
    x, w, b = draw(1, 8, 4, 3, device=device), draw(8, 6, 3, 2, device=device), draw(6, device=device)
    return torch.nn.functional.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=(1, 0))


def adaptive_pool(device):
    return torch.nn.functional.adaptive_avg_pool2d(draw(2, 3, 6, 5, device=device), (None, 7))


@pytest.mark.parametrize(
    "function", [conv, conv_row, transposed, max_pool, avg_pool, adaptive_pool, global_pool, batch_norm]
)
def test_right_kernels_pass(function, device):
    report = cnnfast.check(function, device)
    (row,) = report.rows
    assert report.ok, str(report)
    assert row.forward
    assert row.backward


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.name}, {f.module.__name__.rpartition('.')[2]}, {f.tensor}")
@pytest.mark.usefixtures("plans_forgotten")
def test_planted_faults_are_caught(fault, device, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, fault.module, fault.right, fault.wrong)
    report = cnnfast.check(fault.call, device)
    (row,) = report.rows
    assert row.verdict == "FAIL"
    assert not report.ok
    assert not row.reason, "caught by its numbers, not by a crash"
    failed = {c.tensor.removesuffix(" (with gradients)") for c in row.comparisons if not c.ok}
    assert fault.tensor in failed
    assert fault.tensor in str(report)
    if fault.tensor.startswith("grad"):
        assert all(tensor.startswith("grad") for tensor in failed), "a fault in backward alone"


def test_a_kernel_that_raises_is_a_failure(device, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such tile")

    monkeypatch.setattr("cnnfast_kernels.pooling.max_pool", broken)
    report = cnnfast.check(max_pool, device)
    assert report.rows[0].verdict == "FAIL"
    assert report.rows[0].problems == ["RuntimeError: no such tile"]


# ----------------------------------------------------------------------------------------------------------------------
# The rule


def judged(
    ours: list[float], theirs: list[float] | None = None, exact=(1.0, -2.0, 3.0), dtype=torch.float32
) -> Comparison:
    exact64 = torch.tensor(exact, dtype=torch.float64)
    rounded = exact64.to(dtype)
    theirs = rounded if theirs is None else torch.tensor(theirs, dtype=dtype)
    return compare("output", torch.tensor(ours, dtype=dtype), theirs, rounded, exact64, precision=name_of(dtype))


NAN, INF = float("nan"), float("inf")


def test_the_limit_is_twice_pytorchs_error():
    assert judged([1.0, -2.0, 3.0]).ok
    assert not judged([1.0, -2.0, 3.001]).ok
    assert judged([1.0, -2.0, 3.0019], [1.001, -2.0, 3.0]).ok
    assert not judged([1.0, -2.0, 3.0021], [1.001, -2.0, 3.0]).ok
    assert not judged([1.0018, -1.9982, 3.0018], [1.001, -2.0, 3.0]).ok, "the root mean square is limited too"
    assert judged([1.0, -2.0, 3.0021], [1.001, -2.0, 3.0]).position == (2,)


def test_nan_and_infinity_must_stand_where_the_reference_has_them():
    assert not judged([1.0, NAN, 3.0], [1.0, NAN, 3.0]).ok, "that PyTorch has it too does not help"
    assert judged([1.0, NAN, 3.0], exact=[1.0, NAN, 3.0]).ok
    assert not judged([1.0, 2.0, 3.0], exact=[1.0, NAN, 3.0]).ok
    assert judged([1.0, INF, 3.0], exact=[1.0, INF, 3.0]).ok
    assert not judged([1.0, -INF, 3.0], exact=[1.0, INF, 3.0]).ok
    assert judged([1.0, INF, 3.0], exact=[1.0, 1e6, 3.0], dtype=torch.float16).ok
    assert judged([1.0, NAN, 3.0]).position == (1,)
    assert "nan, not -2.0" in str(judged([1.0, NAN, 3.0]))


def test_nan_and_infinity_in_the_input_pass_through(device):
    x = draw(1, 3, 6, 6, device=device)
    x[0, 0, 0, 0], x[0, 1, 2, 3], x[0, 2, 5, 5] = NAN, INF, -INF
    report = cnnfast.check(lambda x: (F.max_pool2d(x, 2), F.avg_pool2d(x, 3)), x)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("training", "dtype"),
    [(True, "float32"), (False, "float32"), (True, "bfloat16"), (False, "float16"), (True, "float64")],
)
def test_conv_bn_act(training, dtype, device):
    def function(x, w, mean, var, weight, bias, b, z):
        return F.conv_bn_act(x, w, mean, var, weight, bias, bias=b, residual=z, training=training)

    shapes = [(2, 5, 4, 4), (4, 5, 2, 2), (4,), (4,), (4,), (4,), (4,), (2, 4, 3, 3)]
    inputs = [draw(*shape, device=device) for shape in shapes]
    inputs[3] = inputs[3].square() + 0.5  # a variance
    report = cnnfast.check(function, *inputs, dtype=dtype)
    assert report.ok, str(report)
    tensors = {c.tensor for c in report.rows[0].comparisons}
    assert ("running_var" in tensors) == training
    # in eval another kernel serves frozen parameters
    assert ("grad of weight (bn_weight frozen)" in tensors) != training
    assert {
        f"grad of {n} (with gradients)" for n in ("input", "weight", "bias", "bn_weight", "bn_bias", "residual")
    } <= tensors


CALLS = {
    "conv_act": lambda x, w, b, z, s, v: F.conv_act(x, w, b, residual=z),
    "conv_act mish": lambda x, w, b, z, s, v: F.conv_act(x, w, b, residual=z, activation="mish"),
    "conv_act prelu": lambda x, w, b, z, s, v: F.conv_act(x, w, b, activation="prelu", activation_arg=s),
    "bn_act training": lambda x, w, b, z, s, v: F.bn_act(x, None, None, training=True, activation="silu"),
    "bn_act hardsigmoid": lambda x, w, b, z, s, v: F.bn_act(z, b, v, s, b, residual=z, activation="hardsigmoid"),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("name", CALLS)
def test_conv_act_and_bn_act(name, dtype, device):
    inputs = [draw(*size, device=device) for size in ((2, 5, 4, 4), (4, 5, 2, 2), (4,), (2, 4, 3, 3), (4,), (4,))]
    inputs[5] = inputs[5].square() + 0.5  # a variance
    report = cnnfast.check(CALLS[name], *inputs, dtype=dtype)
    assert report.ok, str(report)
    (row,) = report.rows
    assert row.operation == name.split()[0]
    tensors = {c.tensor for c in row.comparisons}
    assert {"output", "grad of input (with gradients)"} <= tensors
    assert ("grad of activation_arg (with gradients)" in tensors) == ("prelu" in name)
    # given statistics and a frozen weight: one pass gives the other gradients
    assert ("grad of bias (weight frozen)" in tensors) == (name == "bn_act hardsigmoid")


# ----------------------------------------------------------------------------------------------------------------------
# Capture


class Net(nn.Module):
    """PyTorch's own layers and a call of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.avg_pool2d(self.pool(nn.functional.dropout(self.stem(x))), 2)
        return self.head(x).flatten(1) + nn.functional.adaptive_avg_pool2d(x, 2).sum()


def test_calls_of_both_libraries_are_captured_once():
    calls = capture_calls(Net(), (draw(1, 3, 8, 8),))  # PyTorch serves ours, which makes no second call
    assert [(c.layer, c.operation) for c in calls] == [
        ("stem.0", "conv2d"),
        ("stem.1", "batch_norm"),
        ("", "max_pool2d"),
        ("", "avg_pool2d"),
        ("", "adaptive_avg_pool2d"),
        ("", "adaptive_avg_pool2d"),
    ]
    assert calls[-1].arguments["output_size"] == 2
    assert calls[0].arguments["padding"] == (1, 1)
    assert calls[1].training


def test_capture_leaves_the_model_and_the_random_numbers_alone():
    model, x = Net(), draw(2, 3, 8, 8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rng, input_before = torch.get_rng_state(), x.clone()
    (_, norm, *_) = capture_calls(model, (x,), torch.float64)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, input_before)
    assert norm.dtype == torch.float64
    assert torch.equal(norm.arguments["running_mean"], torch.zeros(4)), "as it was before the call"


@pytest.mark.parametrize(
    "t",
    [
        draw(2, 3, 4, 5),
        draw(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        embed(draw(2, 3)),
        draw(3, 1).expand(3, 4),
        draw(0, 2),
    ],
    ids=["nchw", "channels_last", "slice", "expanded", "empty"],
)
def test_clones_have_the_same_strides(t):
    copy = clone(t)
    assert torch.equal(copy, t)
    assert copy.stride() == t.stride()
    assert copy.numel() == 0 or copy.data_ptr() != t.data_ptr()


def test_autocast_is_part_of_a_call(device):
    def function(x, w):
        with torch.autocast(device.type, torch.float16):
            return nn.functional.conv2d(x, w)

    (row,) = cnnfast.check(function, draw(1, 3, 4, 4, device=device), draw(2, 3, 3, 3, device=device)).rows
    assert (row.verdict, row.dtype) == ("ok", "float16"), row.problems


# ----------------------------------------------------------------------------------------------------------------------
# Who served a call, and the report


def test_a_call_that_pytorch_serves_is_not_ours(device):
    report = cnnfast.check(
        lambda x, w: F.conv2d(x, w, algorithm="torch"), draw(1, 3, 4, 4, device=device), draw(2, 3, 3, 3, device=device)
    )
    assert not report.ok
    assert report.rows[0].verdict == "not ours"
    assert report.rows[0].reason == 'algorithm="torch"'
    assert "not ours" in str(report)


def test_an_empty_batch_needs_no_launch(device):
    report = cnnfast.check(lambda x: F.max_pool2d(x, 2), torch.empty(0, 3, 4, 4, device=device))
    assert report.ok, str(report)


def test_nothing_covered_is_not_ok():
    report = cnnfast.check(torch.relu, draw(3))
    assert not report.ok
    assert "no covered call" in str(report)
    assert json.loads(report.to_json())["ok"] is False


def test_what_the_model_raises_is_raised():
    with pytest.raises(RuntimeError, match="channels"):
        cnnfast.check(nn.Conv2d(3, 4, 3), draw(1, 2, 8, 8))
    with pytest.raises(
        ValueError, match=r"check\(\): dtype 'float33' is none of bf16, fp16, fp32, tf32, fp64, bfloat16"
    ):
        cnnfast.check(nn.Conv2d(3, 4, 3), draw(1, 3, 8, 8), dtype="float33")


def test_report_as_table_and_json():
    good = CheckRow(
        "layer",
        "conv2d",
        "1x3x8x8 4x3x3x3",
        "float32",
        "ok",
        "",
        ["kernel"],
        ["kernel"],
        [Comparison("output", 1e-7, 1e-7, 3e-7)],
    )
    bad = CheckRow(
        "x" * 90,
        "conv2d",
        "1x3x8x8",
        "float32",
        "FAIL",
        comparisons=[Comparison("grad of weight", 0.5, 1e-7, 3e-7, position=(1, 2))],
    )
    report = CheckReport([good, bad])
    text = str(report)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "grad of weight: error 5.00e-01 > 3.00e-07 at (1, 2), PyTorch's own 1.00e-07" in text.replace("\n", " ")
    assert "of 2 calls 1 ok, 1 FAIL" in text
    data = json.loads(report.to_json())
    assert [row["verdict"] for row in data["rows"]] == ["ok", "FAIL"]
    assert data["rows"][1]["comparisons"][0]["ok"] is False
    assert CheckReport([good]).ok


# ----------------------------------------------------------------------------------------------------------------------
# The child process, and the command line


@pytest.mark.compiled
def test_a_child_process_interprets_where_this_one_does_not():
    def check_in_a_child():
        import torch

        import cnnfast

        if torch.cuda.is_available():
            torch.cuda.is_available = lambda: False
        seen = []
        x = torch.randn(1, 2, 6, 6).contiguous(memory_format=torch.channels_last)
        pool = torch.nn.MaxPool2d(3, 2)
        report = cnnfast.check(pool, x, progress=lambda done, total, name: seen.append([done, total, name]))
        return [report.ok, report.rows[0].forward, report.rows[0].backward, seen, str(report)]

    ok, forward, backward, seen, table = run_compiled(check_in_a_child)
    assert ok, table
    assert forward[0].startswith("max_pool_kernel")
    assert backward[0].startswith("max_pool_backward_kernel")
    assert seen[0] == [0, 4, "max_pool2d"]
    assert seen[-1] == [4, 4, ""]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `cnnfast check` beside a file of models."""
    import typer

    (tmp_path / "models.py").write_text(
        "import torch, beside\n"
        "pool = torch.nn.MaxPool2d(2)\n"
        "def build(bias=True): return torch.nn.Conv2d(beside.CHANNELS, 2, 3, bias=bias)\n"
        "def function(x, y): return torch.nn.functional.max_pool2d(x, 2) + torch.relu(y)\n"
        "class Needy(torch.nn.Module):\n    def __init__(self, width): super().__init__()\n"
        "number = 3\n"
    )
    (tmp_path / "beside.py").write_text("CHANNELS = 3\n")
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(check_command)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_command_checks_a_model(command, tmp_path):
    result = command("models.py:build", "--input", "1x3x5x5", "--json", "out.json", "--no-backward")
    assert result.exit_code == 0, result.output
    assert "conv2d" in result.output
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["backward"] == []


def test_command_checks_a_function_and_an_object(command):
    assert command("models.py:function", "--input", "1x2x4x4", "--input", "2x2").exit_code == 0
    assert command("models:pool", "--input", "1x2x4x4", "--mode", "infer", "--dtype", "half").exit_code == 0
    assert command("torch.nn:ReLU", "--input", "1x2x4x4").exit_code == 1  # nothing covered


@pytest.mark.parametrize(("mode", "training"), [("infer", False), ("train", True), (None, True)])
def test_command_runs_the_model_in_the_mode_that_is_asked_for(command, tmp_path, mode, training):
    """A batch norm updates its statistics in training alone."""
    (tmp_path / "norms.py").write_text("import torch\nnorm = torch.nn.BatchNorm2d(2)\n")
    asked = ["--mode", mode] if mode else []
    result = command("norms.py:norm", "--input", "2x2x3x3", "--no-backward", "--json", "out.json", *asked)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert ("running_mean" in {c["tensor"] for c in row["comparisons"]}) == training
