"""`cnnfast info` as its users meet it: what it prints in a narrow window, what it adds up, and the same as JSON; and
what it tells of a training step.
"""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cnnfast import summary
from cnnfast.__main__ import app
from cnnfast.commands.info import broken, short
from cnnfast.commands.info_training import short as of_a_step
from cnnfast.models import resnet18
from cnnfast.summary import by_kind, summarize, to_depth
from tests.support.packages import package

NET = "tests.support.explained:Net"
WHERE = "cnnfast.demo.plain:PlainDigitNet"


def info(*arguments: str, width: int = 120):
    result = CliRunner().invoke(app, ["info", *arguments], env={"COLUMNS": str(width), "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result


def test_a_table_and_totals_and_the_same_in_a_file(tmp_path):
    result = info(WHERE, "--input", "1x1x8x8", "--json", str(tmp_path / "layers.json"))
    data = json.loads((tmp_path / "layers.json").read_text())
    total = data["total"]
    assert "stem.0" in result.stdout
    assert f"{total['parameters']:,} parameters: {total['trainable']:,} trainable, 0 frozen" in result.stdout
    sizes = (f"{total[name] / 2**20:,.2f} MiB of {what}" for name, what in (("parameter_bytes", "parameters"),))
    assert all(text in result.stdout for text in sizes)
    assert data["input"] == [[1, 1, 8, 8]]
    assert {"name", "kind", "output_shape", "parameters", "flops"} <= data["layers"][0].keys()
    for kind in data["kinds"]:
        row = re.search(rf"^{kind['kind']} +{kind['calls']} +{kind['parameters']:,} .*$", result.stdout, re.MULTILINE)
        assert row, kind
        assert kind["flops"] == 0 or short(kind["flops"]).rstrip() in row[0]


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Linear(36, 5, bias=False)
        self.unused = nn.Conv2d(1, 1, 1)
        self.norm.requires_grad_(False)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x))).flatten(1))


def test_kinds_add_up_to_the_whole():
    model = WithUnused()
    found = summarize(model, torch.zeros(2, 3, 5, 5))
    kinds = {kind.kind: (kind.calls, kind.parameters, kind.trainable) for kind in by_kind(found.layers)}
    assert kinds == {
        "conv": (1, 112, 112), "norm": (1, 8, 0), "linear": (1, 180, 180), "activation": (1, 0, 0),
    }  # fmt: skip
    assert list(kinds) == ["conv", "norm", "linear", "activation"]
    assert sum(kind.flops for kind in by_kind(found.layers)) == found.flops
    assert sum(kind.parameters for kind in by_kind(found.layers)) + found.unused == found.parameters == 302
    assert found.trainable == 294
    assert found.parameter_bytes == 4 * 302
    assert found.buffer_bytes == 2 * 4 * 4 + 8  # statistics, and the number of batches, an int64


def test_bytes_are_those_of_the_models_dtype():
    assert summarize(nn.Conv2d(3, 4, 3).half(), torch.zeros(1, 3, 5, 5).half()).parameter_bytes == 2 * 112


def test_shared_parameters_and_buffers_are_counted_once():
    conv = nn.Conv2d(3, 3, 1)
    found = summarize(nn.Sequential(conv, nn.BatchNorm2d(3), conv), torch.zeros(1, 3, 5, 5))
    assert found.parameters == sum(kind.parameters for kind in by_kind(found.layers)) == 12 + 6
    assert {kind.kind: kind.trainable for kind in by_kind(found.layers)} == {"conv": 12, "norm": 6}


@pytest.mark.parametrize("depth", range(5))
def test_depth_adds_up_what_is_deeper(depth):
    model = resnet18()
    found = summarize(model, torch.zeros(1, 3, 64, 64))
    layers = to_depth(found.layers, found.classes, depth)
    assert max(len(layer.name.split(".")) if layer.name else 0 for layer in layers) == min(depth, 4)
    for what in ("parameters", "trainable_parameters", "flops", "output_bytes"):
        assert sum(getattr(layer, what) for layer in layers) == sum(getattr(layer, what) for layer in found.layers)
    assert layers[-1].output_shape == (1, 1000)
    assert len({layer.name for layer in layers}) == len(layers)
    if depth == 0:
        assert [(layer.name, layer.class_name, layer.kind) for layer in layers] == [("", "ResNet", "other")]
    if depth == 1:
        assert [layer.name for layer in layers][:5] == ["conv1", "bn1", "relu", "maxpool", "layer1"]
        assert layers[4].output_shape == (1, 64, 16, 16)
        assert layers[0] == found.layers[0], "a layer that nothing is added to stays as it is"
    assert summary.to_depth is to_depth


def test_depth_at_the_command_line_is_that_of_the_json():
    result = info("resnet18", "--depth", "1", "--json", "-")
    data = json.loads(result.stdout)
    assert data["depth"] == 1
    assert [layer["name"] for layer in data["layers"]][4:8] == ["layer1", "layer2", "layer3", "layer4"]
    assert re.search(r"^layer4 +Sequential +1x512x7x7 +8,393,728 ", result.stderr, re.MULTILINE)


LARGEST = [("torchvision", "densenet121"), ("torchvision", "efficientnet_b0"), ("timm", "convnext_tiny")]


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(("library", "name"), LARGEST)
def test_a_narrow_window_cuts_nothing_away(library, name, width):
    package(library)
    result = info(f"{library}:{name}", "--json", "-", width=width)
    data = json.loads(result.stdout)
    lines = result.stderr.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in result.stderr
    # A name is told whole, over several lines if need be, and every other cell in one.
    rows, started = [], False
    for line in lines:
        if set(line) == {"─"}:
            started = not rows or started
            if rows:
                break
        elif started and line.startswith(" "):
            rows[-1][0] += line.split()[0]
        elif started:
            rows.append(line.split())
    assert [row[0] for row in rows[: len(data["layers"])]] == [layer["name"] for layer in data["layers"]]
    for row, layer in zip(rows, data["layers"], strict=False):
        assert "x".join(map(str, layer["output_shape"])) in row
        assert not layer["flops"] or short(layer["flops"]).rstrip() in " ".join(row)
        assert not layer["parameters"] or {f"{layer['parameters']:,}", short(layer["parameters"]).split()[0]} & set(row)


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("stem.conv", 20, ["stem.conv"]),
        ("stages.0.blocks.11.norm", 12, ["stages.0.", " blocks.11.", " norm"]),
        ("averylongnamewithoutdots", 10, ["averylongn", "amewithout", "dots"]),
        ("", 5, [""]),
    ],
)
def test_names_are_broken_behind_their_dots(name, width, lines):
    assert broken(name, width) == lines


def test_a_buffer_that_two_modules_hold_is_counted_once():
    one, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    other.running_mean = one.running_mean
    found = summarize(nn.Sequential(nn.Conv2d(3, 3, 1), one, other), torch.zeros(1, 3, 5, 5))
    assert found.buffer_bytes == 3 * 3 * 4 + 2 * 8


# ----------------------------------------------------------------------------------------------------------------------
# --training

STEPS = {"unmeasured": "cnnfast, unmeasured", "kernels": "cnnfast, kernels", "eager": "PyTorch eager"}
BYTES = ("forward_bytes", "backward_bytes", "moved_bytes", "saved_bytes")


def training(*arguments: str, width: int = 120):
    pytest.importorskip("triton")
    result = info(NET, "--training", "--input", "32x8x12x12", *arguments, "--json", "-", width=width)
    return json.loads(result.stdout), result.stderr


def test_a_step_and_its_layers_in_tables_and_in_a_file():
    data, text = training("--batch", "4")
    assert f"{NET} on NVIDIA H200, training, bfloat16, input 4x8x12x12" in text
    assert (data["model"], data["gpu"], data["input"], data["dtype"]) == (
        NET,
        "NVIDIA H200",
        [[4, 8, 12, 12]],
        "bfloat16",
    )
    for key, who in STEPS.items():
        step = data["steps"][key]
        (line,) = re.findall(rf"^{who} .*$", text, re.MULTILINE)
        numbers = (
            *(f"{sum(step[part].values()):,}" for part in ("kernels", "operators")),
            short_in(1e9, step["moved_bytes"]),
        )
        assert set(numbers) <= set(line.split())
        assert line.split()[-1] == short_in(4e6, step["saved_bytes"])
        assert step["launches"] == sum(step["kernels"].values()) + sum(step["operators"].values())
        assert all(sum(layer[name] for layer in step["layers"]) == step[name] for name in BYTES)
    assert re.search(rf"^torch.compile +{short_in(4e6, data['compile']['saved_bytes'])}$", text, re.MULTILINE)
    assert data["steps"]["eager"]["kernels"] == {}
    rows = {layer["layer"]: layer for layer in data["steps"]["kernels"]["layers"]}
    (line,) = re.findall(r"^stem .*$", text, re.MULTILINE)
    assert line.split()[-2:] == [short_in(1e6, rows["stem"][name]) for name in ("moved_bytes", "saved_bytes")]


def short_in(unit: float, number: int) -> str:
    return of_a_step(number / unit)


@pytest.mark.parametrize(
    ("number", "text"), [(0, ""), (1234.56, "1,234.6"), (12.345, "12.35"), (0.1, "0.10"), (0.0123, "0.01")]
)
def test_numbers_of_a_step_have_three_digits_or_so(number, text):
    assert of_a_step(number) == text


def test_options_decide_which_step_it_is():
    whole, data = (
        training()[0],
        training("--dtype", "fp32", "--gpu", "a100", "--format", "contiguous", "--depth", "1")[0],
    )
    assert whole["input"] == data["input"] == [[32, 8, 12, 12]]
    assert (data["gpu"], data["dtype"], data["format"]) == ("NVIDIA A100-SXM4-80GB", "float32", "contiguous")
    assert data["steps"]["eager"]["saved_bytes"] > 1.5 * whole["steps"]["eager"]["saved_bytes"]
    assert "tma_fprop_kernel" in whole["steps"]["kernels"]["kernels"]
    assert "conv_fprop_kernel" in data["steps"]["kernels"]["kernels"]
    names = [layer["layer"] for layer in data["steps"]["kernels"]["layers"]]
    assert len(names) == len(set(names))
    assert {"body", "stem"} < set(names)
    assert not any("." in name for name in names)


def test_what_cannot_be_traced_and_a_narrow_window(monkeypatch):
    def refuse(*arguments):
        raise ValueError("nobody traces this\nat all")

    pytest.importorskip("triton")
    monkeypatch.setattr("cnnfast.bench.training_traffic.saved_when_compiled", refuse)
    data, text = training(width=60)
    assert data["compile"] == {"saved_bytes": None, "reason": "ValueError: nobody traces this"}
    assert "torch.compile: not known, ValueError: nobody traces this" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 60
    assert "…" not in text


def test_without_a_triton_that_fits_no_step_is_counted(monkeypatch):
    monkeypatch.setitem(sys.modules, "cnnfast.bench.training_traffic", None)
    result = CliRunner().invoke(app, ["info", NET, "--training"], env={"COLUMNS": "500", "TERM": "dumb"})
    assert result.exit_code == 2
    assert "no step can be counted: cnnfast's kernels need triton 3.6 to 3.9" in result.output
