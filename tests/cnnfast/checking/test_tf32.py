"""check(dtype="tf32"): our kernels really round their operands, honest rounding passes, and nothing else does."""

from __future__ import annotations

import copy
import json

import pytest

pytest.importorskip("triton")

import torch
from torch import nn

import cnnfast
import cnnfast.functional as F
from cnnfast.checking.capture import capture_calls
from cnnfast.checking.judge import compare, judge
from cnnfast.checking.tf32 import rounded_products
from cnnfast.checking.whole import judge_whole
from cnnfast.dtypes import name_of
from cnnfast.precision import UNIT, float32_products, nearest_tf32
from cnnfast_kernels import conv, launch
from cnnfast_kernels.gather import tiles
from tests.support.child import run_compiled
from tests.support.planting import plant


def signed(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def positive(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """As activations after a ReLU: errors of truncation do not cancel."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device) + 0.5


CALLS = {
    "conv2d": lambda x, w: F.conv2d(x, w, padding=1),
    "im2col": lambda x, w: F.conv2d(x, w, padding=1, algorithm="im2col"),
    "conv1d": lambda x, w: F.conv1d(x[..., 0], w[..., 0]),
    "conv_transpose2d": lambda x, w: F.conv_transpose2d(x, w, None, 2, 1),
    "conv_bn_act, training": lambda x, w: F.conv_bn_act(x, w, training=True, padding=1),
    "conv_bn_act": lambda x, w: F.conv_bn_act(x, w, w.new_zeros(16), w.new_ones(16), w.new_ones(16), padding=1),
}
DRAWS = {"signed": signed, "positive": positive}


@pytest.fixture
def plans_forgotten():
    """Plans made of right kernels do not outlive the planting of wrong ones, nor the other way round."""
    launch.forget_plans()
    yield
    launch.forget_plans()


def operands(draw, device):
    return draw(2, 16, 6, 5, device=device), draw(16, 16, 3, 3, device=device, seed=1)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", CALLS)
def test_right_kernels_pass_and_have_rounded_their_operands(name, draw, device):
    inputs = operands(DRAWS[draw], device)
    tf32, ieee = (cnnfast.check(CALLS[name], *inputs, dtype=dtype) for dtype in ("tf32", "fp32"))
    assert tf32.ok, str(tf32)
    assert ieee.ok, str(ieee)
    assert [row.dtype for report in (tf32, ieee) for row in report.rows] == ["tf32", "float32"]
    assert "tf32" in str(tf32)
    assert json.loads(tf32.to_json())["rows"][0]["dtype"] == "tf32"
    errors = {c.tensor: c for c in ieee.rows[0].comparisons}
    for rounded in tf32.rows[0].comparisons:
        if "weight" in rounded.tensor or rounded.tensor == "output":
            assert rounded.error > 30 * errors[rounded.tensor].error, rounded.tensor
            assert rounded.error <= rounded.limit
            assert errors[rounded.tensor].limit < rounded.error, "and it would not pass for IEEE"


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", [name for name in CALLS if "training" not in name])
@pytest.mark.usefixtures("plans_forgotten")
def test_truncated_operands_are_caught(name, draw, device, monkeypatch, tmp_path):
    """As a GPU's matrix unit truncates what nobody has rounded. In training a norm divides out what that takes off
    every sum alike.
    """
    plant(monkeypatch, tmp_path, tiles, "((bits + 0x1000) & -0x2000)", "(bits & -0x2000)")
    report = cnnfast.check(CALLS[name], *operands(DRAWS[draw], device), dtype="tf32")
    assert report.rows[0].verdict == "FAIL", str(report)
    assert not report.rows[0].reason, "caught by its numbers, not by a crash"


@pytest.mark.parametrize("bits", [8, 9])
def test_fewer_bits_than_tf32_are_caught(bits, device, monkeypatch):
    """As if the kernel rounded to bfloat16's mantissa or a bit more."""
    step = 23 - bits + 1
    run = conv.FpropPlan.run

    def coarse(plan, x, w, epilogue):
        x, w = (((t.view(torch.int32) + (1 << (step - 1))) & -(1 << step)).view(torch.float32) for t in (x, w))
        return run(plan, x, w, epilogue)

    monkeypatch.setattr(conv.FpropPlan, "run", coarse)
    report = cnnfast.check(CALLS["conv2d"], *operands(signed, device), dtype="tf32", backward=False)
    assert [row.verdict for row in report.rows] == ["FAIL"]


def test_operands_that_are_tf32_numbers_leave_no_room(device):
    """The floor is what rounding these very operands costs: of integers nothing but the last place of a sum."""
    x, w = (
        torch.randint(-4, 5, t.shape, generator=torch.Generator().manual_seed(0)).float().to(device)
        for t in operands(signed, device)
    )
    report = cnnfast.check(CALLS["conv2d"], x, w, dtype="tf32", backward=False)
    (output,) = report.rows[0].comparisons
    assert output.error == 0
    assert output.limit < 2.0**-13 * 500


def test_what_multiplies_nothing_is_judged_as_float32(device):
    x = signed(2, 4, 6, 6, device=device)
    for function in (lambda x: F.avg_pool2d(x, 3), lambda x: F.batch_norm(x, None, None, training=True)):
        rows = [cnnfast.check(function, x, dtype=dtype).rows[0] for dtype in ("tf32", "float32")]
        assert [row.dtype for row in rows] == ["tf32", "float32"]
        assert [c.limit for c in rows[0].comparisons] == [c.limit for c in rows[1].comparisons]


def test_the_last_place_of_tf32_is_larger():
    exact = torch.tensor([1.0], dtype=torch.float64)
    off = exact.float() + 2.0**-15
    assert compare("output", off, exact.float(), exact.float(), exact, precision="tf32").ok
    assert not compare("output", off, exact.float(), exact.float(), exact, precision="float32").ok
    assert not compare("output", off + 2.0**-13, exact.float(), exact.float(), exact, precision="tf32").ok


def test_settings_of_pytorch_do_not_matter_and_stay(device):
    """float32 is judged as IEEE where the user's settings say TF32, and the other way round."""
    call = capture_calls(CALLS["conv2d"], operands(signed, device))[0]
    rows = {}
    for setting in ("ieee", "tf32"):
        with float32_products(setting):
            rows[setting] = [judge(call, tf32=tf32) for tf32 in (False, True)]
            assert torch.backends.cudnn.conv.fp32_precision == setting
    assert rows["ieee"] == rows["tf32"]
    assert [row.verdict for row in rows["ieee"]] == ["ok", "ok"]
    ieee, tf32 = (row.comparisons[0].error for row in rows["ieee"])
    assert tf32 > 30 * ieee


def test_autocast_to_half_is_half_whatever_float32_is(device):
    def function(x, w):
        with torch.autocast(device.type, torch.float16):
            return nn.functional.conv2d(x, w)

    (row,) = cnnfast.check(function, *operands(signed, device), dtype="tf32").rows
    assert (row.verdict, row.dtype) == ("ok", "float16"), row.problems


# ----------------------------------------------------------------------------------------------------------------------
# Whole models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_a_whole_model(device):
    torch.manual_seed(0)
    report = cnnfast.check(Net().to(device), signed(2, 4, 6, 6, device=device), dtype="tf32")
    assert report.ok, str(report)
    assert {row.dtype for row in report.whole} == {"", "tf32"}
    errors = [next(c for c in row.comparisons if c.tensor == "output") for row in report.whole[1:]]
    assert all(c.error > 1e-5 for c in errors), "rounded operands"
    ieee = cnnfast.check(Net().to(device), signed(2, 4, 6, 6, device=device))
    assert {row.dtype for row in ieee.whole} == {"", "float32"}


@pytest.mark.parametrize("tf32", [False, True], ids=["float32", "tf32"])
def test_a_whole_model_may_be_off_by_what_tf32_costs_only_in_tf32(tf32, device):
    torch.manual_seed(0)
    model = Net().to(device).eval()
    off = cnnfast.convert(copy.deepcopy(model))
    with torch.no_grad():
        off.conv.weight.mul_(1 + UNIT / 4)
    rows = {
        row.operation: row
        for row in judge_whole(model, off, (signed(2, 4, 6, 6, device=device),), backward=False, tf32=tf32)
    }
    assert rows["infer"].verdict == ("ok" if tf32 else "FAIL")
    with torch.no_grad():
        off.conv.weight.mul_(1 + 16 * UNIT)
    rows = {
        row.operation: row
        for row in judge_whole(model, off, (signed(2, 4, 6, 6, device=device),), backward=False, tf32=tf32)
    }
    assert rows["infer"].verdict == "FAIL"


# ----------------------------------------------------------------------------------------------------------------------
# The child process


def checked_in_a_child():
    import torch

    import cnnfast

    torch.cuda.is_available = lambda: False
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3)), torch.randn(1, 4, 5, 5)
    report = cnnfast.check(model, x, dtype="tf32")
    output = report.rows[0].comparisons[0]
    return [report.ok, str(report), report.rows[0].dtype, [row.dtype for row in report.whole], output.error > 1e-5]


@pytest.mark.compiled
def test_the_process_that_interprets_rounds_too():
    ok, table, *rest = run_compiled(checked_in_a_child)
    assert ok, table
    assert rest == ["tf32", ["", "tf32", "tf32"], True]


# ----------------------------------------------------------------------------------------------------------------------
# Rounding in plain torch


def test_products_are_rounded_in_every_direction():
    """Operands of the product, and in backward the gradient that comes back and the operands again; nothing else."""
    a, b, dy = (signed(*shape, device=torch.device("cpu"), seed=i) for i, shape in enumerate([(3, 4), (4, 5), (3, 5)]))
    a.requires_grad_()
    b.requires_grad_()
    with rounded_products():
        y = torch.einsum("ij,jk->ik", a, b) + 0
    y.backward(dy)
    ra, rb, rdy = (nearest_tf32(t.detach()) for t in (a, b, dy))
    for found, right in ((y, ra @ rb), (a.grad, rdy @ rb.T), (b.grad, ra.T @ rdy)):
        torch.testing.assert_close(found.detach(), right, rtol=1e-6, atol=1e-6)
    assert (y.detach() - a.detach() @ b.detach()).abs().max() > 1e-5


def test_the_kernels_round_as_plain_torch_does(device):
    """Ties, values near them, subnormal numbers, infinities: by a product with one, which is exact."""
    bits = torch.arange(0x3F7FF000, 0x3F7FF000 + 2**15, 37, dtype=torch.int32)
    x = torch.cat(
        [
            bits.view(torch.float32),
            -bits.view(torch.float32),
            torch.tensor([1 + 2.0**-11, -1 - 2.0**-11, 3e-39, float("inf")]),
        ]
    )
    x = x.view(-1, 1, 1, 1).to(device)
    with float32_products("tf32"):
        y = F.conv2d(x, torch.ones(1, 1, 1, 1, device=device), algorithm="direct")
    assert torch.equal(y, nearest_tf32(x))
    assert name_of(y.dtype, True) == "tf32"
