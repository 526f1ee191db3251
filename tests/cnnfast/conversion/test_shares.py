"""FLOPs and bytes of a report, against numbers worked out by hand, and what it says of what stays PyTorch's."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from cnnfast.summary import summarize
from tests.support.packages import package

N, C, K, H, W = 2, 3, 4, 5, 6


class Small(nn.Module):
    """Convolution, norm and activation, then a norm that stays PyTorch's, an addition, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(C, K, 3, padding=1, bias=False), nn.BatchNorm2d(K), nn.ReLU()
        self.group_norm = nn.GroupNorm(2, K)
        self.fc = nn.Linear(W, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        return self.fc(self.group_norm(y) + y)


X, Y, WEIGHT = N * C * H * W, N * K * H * W, K * C * 3 * 3  # elements
FLOPS = {"conv": 2 * Y * C * 3 * 3, "fc": 2 * (N * K * H) * W * 7}
ELEMENTS = {
    "conv": X + WEIGHT + 4 * K + Y,  # four tensors of the norm; what lies between the three modules does not move
    "group_norm": 2 * Y + 2 * K,
    "fc": Y + 7 * W + 7 + N * K * H * 7,
    "add": 3 * Y,
}
TRAINING = {"conv": 2 * Y}  # the convolution's own result is written, and read once its statistics are known
BATCHES = 8  # bytes of num_batches_tracked


def everything(report: cnnfast.conversion.ConversionReport) -> list[Any]:
    return [*report.rows, *report.collected]


def costs(report: cnnfast.conversion.ConversionReport) -> dict[str, tuple[Any, Any]]:
    """(FLOPs, bytes) by the names of rows; of collected rows by what they are of."""
    found = {row.name: (row.flops, row.bytes) for row in report.rows}
    found |= {" ".join(row.names): (row.flops, row.bytes) for row in report.collected}
    assert len(found) == len(everything(report)), "nothing is listed twice"
    if report.total_bytes is not None:
        assert sum(flops for flops, _ in found.values()) == report.total_flops
        assert sum(moved for _, moved in found.values()) == report.total_bytes
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_by_hand(training, dtype, memory_format, quick):
    model = cnnfast.convert(Small().to(quick, dtype).train(training), memory_format=memory_format)
    report = cnnfast.report(model, torch.zeros(N, C, H, W, dtype=dtype, device=quick).to(memory_format=memory_format))
    size = dtype.itemsize
    elements = {name: n + (TRAINING.get(name, 0) if training else 0) for name, n in ELEMENTS.items()}
    expected = {name: (FLOPS.get(name, 0), size * n) for name, n in elements.items()}
    expected["conv"] = expected["conv"][0], expected["conv"][1] + BATCHES * training
    assert costs(report) == expected | {"bn": (0, 0)}
    assert report.coverage == FLOPS["conv"] / sum(FLOPS.values())
    assert report.coverage_bytes == expected["conv"][1] / sum(moved for _, moved in expected.values())


def test_what_fusing_saves(quick):
    """Unfused, the convolution writes what the norm reads and writes, and the activation reads and writes."""
    small, x = Small().to(quick).eval(), torch.zeros(N, C, H, W, device=quick)
    fused, unfused = cnnfast.report(cnnfast.convert(small), x), cnnfast.report(small, x)
    assert fused.saved_bytes == 4 * 4 * Y
    assert unfused.saved_bytes == 0
    assert fused.total_bytes + fused.saved_bytes == unfused.total_bytes
    assert fused.total_flops == unfused.total_flops == sum(FLOPS.values())
    alone = costs(unfused)
    assert [alone[name][1] for name in ("conv", "bn", "relu")] == [
        4 * (X + WEIGHT + Y),
        4 * (2 * Y + 4 * K),
        4 * (2 * Y),
    ]
    assert unfused.coverage == unfused.coverage_bytes == 0, "not converted"


def test_a_module_that_is_called_twice_costs_twice(quick):
    class Twice(Small):
        def forward(self, x):
            return self.relu(self.bn(self.conv(x))) + self.relu(self.bn(self.conv(x)))

    found = costs(cnnfast.report(cnnfast.convert(Twice().to(quick).eval()), torch.zeros(N, C, H, W, device=quick)))
    assert found["conv"] == (2 * FLOPS["conv"], 2 * 4 * ELEMENTS["conv"])


def test_a_residual_is_read_by_the_step_that_adds_it(quick):
    class Residual(Small):
        def forward(self, x):
            return self.relu(self.bn(self.conv(x)) + x[:, :1].expand(N, K, H, W).contiguous())

    report = cnnfast.report(cnnfast.convert(Residual().to(quick).eval()), torch.zeros(N, C, H, W, device=quick))
    found = costs(report)
    assert found["conv"] == (FLOPS["conv"], 4 * (ELEMENTS["conv"] + Y))
    assert found["clone"] == (0, 4 * (N * H * W + Y)), "what is expanded is read once"


@pytest.mark.parametrize("given", [True, False])
def test_a_model_that_looks_at_numbers_runs_on_a_real_copy(given, quick):
    class Looks(Small):
        def forward(self, x):
            return super().forward(x) if x.sum() >= 0 else x

    model = cnnfast.convert(Looks().to(quick).eval())
    report = cnnfast.report(model, *[torch.zeros(N, C, H, W, device=quick)] * given)
    if given:
        found = costs(report)
        (operations,) = [row for row in report.collected if row.kind == "tensor operations"]
        assert operations.names[:2] == ["sum", "ge"]
        assert found["conv"] == (FLOPS["conv"], 4 * (X + WEIGHT + Y)), "not fused: its forward cannot be traced"
    else:  # an image of meta tensors, which have no numbers
        assert {cost for row in everything(report) for cost in (row.flops, row.bytes)} == {None}
        assert (report.total_flops, report.total_bytes, report.coverage_bytes) == (None, None, None)
        assert {row.kind for row in report.collected} == {"GroupNorm", "Linear", "ReLU"}


def test_training_that_cannot_run_is_counted_in_eval_mode(quick):
    """A batch norm refuses a single value a channel in training; the whole is then counted as in eval mode."""
    model = cnnfast.convert(nn.Sequential(nn.Conv2d(C, K, 1), nn.BatchNorm2d(K), nn.Flatten()).to(quick)).train()
    report = cnnfast.report(model, torch.zeros(1, C, 1, 1, device=quick))
    assert costs(report) == {"0": (2 * K * C, 4 * (C + K * C + K + 4 * K + K)), "1": (0, 0)}
    assert "raises ValueError" in report.notes[0]


def test_in_place_and_views(quick):
    """What is written in place is read and written; a view moves nothing, and is not listed."""
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Identity(), nn.Dropout(0.5))
    model = model.to(quick).eval()
    report = cnnfast.report(model, torch.zeros(N, C, H, W, device=quick))
    assert costs(report) == {"0": (0, 8 * X), "3": (0, 0)}
    assert report.collected[1].reason == "does nothing in eval mode"
    trained = cnnfast.report(model.train(), torch.zeros(N, C, H, W, device=quick)).collected
    assert {row.kind for row in trained} == {"ReLU", "Dropout"}
    assert all(row.bytes >= 8 * X for row in trained)


def test_padding_by_other_values_is_an_operation_of_its_own(quick):
    """It is not part of what the convolution's kernel reads, and belongs to the convolution all the same."""
    model = cnnfast.convert(nn.Sequential(nn.Conv2d(C, K, 3, padding=1, padding_mode="reflect")).to(quick).eval())
    report = cnnfast.report(model, torch.zeros(N, C, H, W, device=quick))
    assert sum(flops for flops, _ in costs(report).values()) == FLOPS["conv"]


# ----------------------------------------------------------------------------------------------------------------------
# What stays PyTorch's


class StdConv2d(nn.Conv2d):
    """As timm's, by its name: the weight is standardised at each call."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class Others(nn.Module):
    """One of each kind that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.standard = StdConv2d(C, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.LocalResponseNorm(2)])
        self.layer_norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))
        self.attention = Attention()
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gelu, self.drop, self.up = nn.GELU(), nn.Dropout(0.1), nn.Upsample(scale_factor=2)
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x):
        x = self.standard(x)
        for norm in self.norms:
            x = norm(x)
        x = self.up(F.interpolate(x, scale_factor=0.5))
        x = x.flatten(2).transpose(1, 2)
        for norm in self.layer_norms:
            x = x + norm(x)
        x = torch.cat([self.attention(x), self.heads(x, x, x)[0]], 1)
        return self.lstm(self.drop(self.gelu(x)))[0] @ x.transpose(1, 2)


def test_each_kind_is_named_with_its_reason(quick):
    report = cnnfast.report(cnnfast.convert(Others().to(quick).eval()), torch.zeros(1, C, 4, 4, device=quick))
    costs(report)
    (standard,) = [row for row in report.rows if row.name == "standard"]
    assert (standard.status, standard.flops) == ("left", 2 * 8 * 16 * C * 9)
    assert "standardises its weight" in standard.reason
    rows = {row.kind: row for row in report.collected}
    assert len(rows) == len(report.collected)
    reasons = {
        "GroupNorm": "batch norm only",
        "InstanceNorm2d": "batch norm only",
        "LocalResponseNorm": "batch norm only",
        "LayerNorm": "batch norm only",
        "Linear": "matrix product",
        "Attention": "attention",
        "MultiheadAttention": "attention",
        "GELU": "no convolution or norm to fuse it with",
        "Dropout": "does nothing in eval mode",
        "Upsample": "interpolation",
        "LSTM": "recurrent",
        "matrix products": "1 bmm",
        "tensor operations": "5 add",
    }
    assert rows.keys() == reasons.keys()
    assert {kind: words for kind, words in reasons.items() if words not in rows[kind].reason} == {}
    assert {row.status for row in report.collected} == {"left"}
    assert all(row.flops for kind, row in rows.items() if kind in ("Linear", "Attention", "MultiheadAttention"))
    assert (rows["LayerNorm"].count, len(rows["LayerNorm"].names)) == (5, 5)
    assert "upsample_nearest2d" in rows["tensor operations"].reason
    assert "cat" in rows["tensor operations"].names


def test_equal_ones_are_one_line(quick):
    """In the table; the JSON has every name."""
    model = nn.Sequential(*(nn.LayerNorm(W) for _ in range(24)), *(nn.Conv3d(1, 1, 1) for _ in range(7))).to(quick)
    report = cnnfast.report(model)
    lines = str(report).splitlines()
    assert len([line for line in lines if "LayerNorm" in line]) == 1
    assert any("LayerNorm x 24" in line for line in lines)
    assert len([line for line in lines if "Conv3d x 7" in line]) == 1
    (row,) = json.loads(report.to_json())["collected"]
    assert row["names"] == [str(i) for i in range(24)]


def test_functions_of_ours_that_a_forward_calls_are_served(quick):
    class Direct(nn.Module):
        def forward(self, x):
            return cnnfast.functional.max_pool2d(x, 2)

    report = cnnfast.report(Direct().to(quick), torch.zeros(N, C, 4, 4, device=quick))
    costs(report)
    (row,) = report.collected
    assert (row.kind, row.status, row.names, row.count) == ("functions of cnnfast", "replaced", ["max_pool2d"], 1)
    assert report.coverage_bytes == 1
    assert report.coverage is None, "no FLOPs"


def test_the_table_says_that_bytes_are_computed(quick):
    report = cnnfast.report(cnnfast.convert(Small().to(quick).eval()), torch.zeros(N, C, H, W, device=quick))
    table = " ".join(str(report).split())
    assert "Bytes are computed from shapes and dtypes, not measured" in table
    assert f"{report.coverage:.1%} of the FLOPs and {report.coverage_bytes:.1%} of the bytes served" in table
    data = json.loads(report.to_json())
    for name in ("coverage", "coverage_bytes", "total_flops", "total_bytes", "saved_bytes"):
        assert data[name] == getattr(report, name)
    assert [row["bytes"] for row in data["rows"]] == [row.bytes for row in report.rows]


@pytest.mark.parametrize("name", ["vit_b_16", "mobilenet_v3_small", "googlenet"])
def test_flops_are_those_of_a_summary(name):
    """Another run, without fusing, counts as many; whatever no module has been found for is in a row all the same."""
    with torch.device("meta"):
        options = {"init_weights": False} if name == "googlenet" else {}
        model = getattr(package("torchvision").models, name)(**options).eval()
    report = cnnfast.report(cnnfast.convert(model))
    costs(report)
    assert report.total_flops == summarize(model, torch.empty(1, 3, 224, 224, device="meta")).flops
