"""tune: what it finds in a model, who may win, what is written, and who serves afterwards. Times are made up: there is no clock here."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import cnnfast
from agreement import integers
from cnnfast import tuning
from cnnfast.__main__ import app
from cnnfast.measuring.timing import Times
from cnnfast.precision import float32_products
from cnnfast.tuning import racing, running
from cnnfast_kernels import choosing, launch, tables

LAST = torch.channels_last


class Net(nn.Module):
    """A fused block, its like, a depthwise convolution without batch norm, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        x = torch.relu(self.bn3(self.conv3(x)) + x)
        return self.up(self.depthwise(x))


def image(device, batch=2):
    return integers(batch, 4, 6, 6).to(device)


def clock(**microseconds):
    """Measures nothing: runs every step, and gives those named their times a set of operands, others ten and more, in their order."""

    def measure(steps):
        for step in steps.values():
            step()
        times = [microseconds.get(name, 10.0 + i) / 1e6 for i, name in enumerate(steps)]
        return {name: Times(racing.FEWEST_SETS * time, 0, 0, 1) for name, time in zip(steps, times, strict=True)}

    return measure


def convolution(device):
    """One plain convolution as a model."""
    return nn.Conv2d(4, 8, 3, padding=1).to(device)


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def found(model, *inputs, **how):
    return {str(m): m.count for m in tuning.plan(model, *inputs, **how)}


def test_in_eval_the_fused_forms_are_found():
    """On a machine without a GPU; the fused forms that differ in what their kernel does are two, those that do not are one."""
    assert found(Net(), torch.zeros(2, 4, 6, 6)) == {
        "fprop + norm relu 2x4x6x6 > 8, 3x3/1": 1,
        "fprop + norm residual relu 2x8x6x6 > 8, 3x3/1": 2,
        "fprop 2x8x6x6 > 8, 3x3/1 groups 8": 1,
        "dgrad 2x4x8x8 > 8, 2x2/2": 1,
    }


def test_in_training_statistics_and_gradients_are_found_but_none_that_nobody_wants():
    model = Net()
    model.conv2.requires_grad_(False)
    assert found(model, torch.zeros(2, 4, 6, 6), train=True) == {
        "fprop + stats 2x4x6x6 > 8, 3x3/1": 1,
        "fprop + stats 2x8x6x6 > 8, 3x3/1": 2,
        "fprop 2x8x6x6 > 8, 3x3/1 groups 8": 1,
        "dgrad 2x4x8x8 > 8, 2x2/2": 1,
        "fprop 2x4x8x8 > 8, 2x2/2": 1,
        "wgrad 2x4x8x8 > 8, 2x2/2": 1,
        "dgrad 2x8x6x6 > 8, 3x3/1 groups 8": 1,
        "wgrad 2x8x6x6 > 8, 3x3/1 groups 8": 1,
        "dgrad 2x8x6x6 > 8, 3x3/1": 2,
        "wgrad 2x8x6x6 > 8, 3x3/1": 1,
        "wgrad 2x4x6x6 > 8, 3x3/1": 1,
    }


def test_dtype_and_layout_are_those_asked_for():
    for dtype in (torch.bfloat16, torch.float32):
        for fmt, layout in ((LAST, "NHWC NHWC NHWC"), (None, "NCHW NCHW NCHW")):
            planned = tuning.plan(Net(), torch.zeros(2, 4, 6, 6), dtype=dtype, memory_format=fmt)
            keys = [m.key for m in planned if not m.key.problem.is_depthwise]
            assert {(key.dtype, key.layout) for key in keys} == {(str(dtype).removeprefix("torch."), layout)}


@pytest.mark.parametrize(("dtype", "expected"), [("tf32", "tf32"), ("fp32", "float32"), ("torch.float32", "float32"), ("bf16", "bfloat16")])
def test_names_say_how_float32_is_multiplied(dtype, expected):
    """Without a GPU, too; a torch.dtype leaves it to PyTorch's settings, which let no CPU round."""
    assert {m.key.dtype for m in tuning.plan(Net(), torch.zeros(2, 4, 6, 6), dtype=dtype)} == {expected}
    assert {m.key.dtype for m in tuning.plan(Net(), torch.zeros(2, 4, 6, 6), dtype=torch.float32)} == {"float32"}
    with pytest.raises(ValueError, match=r"tune\(\): dtype 'int8' is none of bf16, fp16, fp32, tf32"):
        tuning.plan(Net(), torch.zeros(2, 4, 6, 6), dtype="int8")


def test_the_model_stays_as_it_is():
    model = Net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tuning.plan(model, torch.zeros(2, 4, 6, 6), train=True, dtype=torch.float64)
    assert type(model.conv1) is nn.Conv2d
    assert model.conv1.weight.grad is None
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    with pytest.raises(RuntimeError, match="does not run on 2x5x6x6"):
        tuning.plan(model, torch.zeros(2, 5, 6, 6))


def test_keys_are_those_that_calls_ask_for(gpu, device):
    """What plan finds on tensors that hold nothing is what the converted model asks tables for when it runs."""
    model = Net().to(device)
    for training in (False, True):
        planned = {m.key for m in tuning.plan(model, image(device), train=training)}
        asked, find = set(), tables.find
        launch.forget_plans()
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(training):
            patch.setattr(tables, "find", lambda key: asked.add(key) or find(key))  # noqa: B023
            y = cnnfast.convert(model, memory_format=LAST).train(training)(image(device).contiguous(memory_format=LAST))
            if training:
                y.backward(torch.ones_like(y))
        assert asked == planned


# ----------------------------------------------------------------------------------------------------------------------
# Who wins


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_every_candidate_of_a_model_is_right_and_its_rows_are_found(gpu, device, training):
    model = Net().to(device)
    result = tuning.tune(model, image(device), train=training, measure=clock())
    assert result.ok, str(result)
    assert [row.winner for row in result.rows] == ["kernels"] * len(result.measured)
    assert all(c.microseconds for m in result.measured for c in m.candidates.values())
    assert all(tuning.report.LIBRARY in m.candidates for m in result.measured)
    assert [tables.find(row.key) for row in result.rows] == result.rows
    assert result.path == tables.user_file(*gpu)


def test_the_fastest_tile_serves_from_then_on_in_the_same_process(gpu, device, launches):
    model, x = convolution(device), image(device)
    converted = cnnfast.convert(model, memory_format=LAST)
    last = x.contiguous(memory_format=LAST)
    before = converted(last).detach()
    (measured,) = tuning.plan(model, x)
    fastest = list(measured.candidates)[1]
    result = tuning.tune(model, x, measure=clock(**{fastest: 1.0}))
    assert result.rows[0].microseconds == {"kernels": 1.0, "default": 10.0, "library": 10.0 + len(measured.candidates) - 1}
    launches.clear()
    torch.testing.assert_close(converted(last).detach(), before)
    assert [str(event.tile) for event in launches] == [fastest]


def broken(monkeypatch, spoil):
    """Our kernels with a tile of other stages than the default's give what `spoil` makes of their result."""
    compute = running.ours

    def ours(convolution, a, tile):
        results = compute(convolution, a, tile)
        default = choosing.default_tile(convolution.question(False, launch.gpu(results[0].device)))
        return results if tile == default else spoil(results)

    monkeypatch.setattr(racing, "ours", ours)


def test_wrong_numbers_never_win(gpu, device, monkeypatch):
    def spoil(results):
        results[0][0, 0, 0, 0] += 0.01
        return results

    broken(monkeypatch, spoil)
    (measured,) = tuning.plan(convolution(device), image(device))
    wrong = [name for name in measured.candidates if name not in ("default", "library")]
    result = tuning.tune(convolution(device), image(device), measure=clock(**dict.fromkeys(wrong, 1.0)))
    assert not result.ok
    (measured,) = result.measured
    assert result.rows[0].tile == measured.candidates["default"].tile
    assert wrong
    for name in wrong:
        assert measured.candidates[name].microseconds is None
        assert "error" in measured.candidates[name].fault
    assert str(result).index(f"{wrong[0]}: result: error") < str(result).index("microseconds on")


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_tf32_candidates_are_run_and_judged_as_tf32(gpu, device, training, monkeypatch):
    """Of operands that TF32 cannot hold: rounded ones are right there and wrong in float32, and rows of the one do not serve the other."""
    results = {}
    compute = running.ours

    def ours(convolution, a, tile):
        results.setdefault(dtype, []).append(compute(convolution, a, tile)[0])
        return results[dtype][-1].clone(), *compute(convolution, a, tile)[1:]

    monkeypatch.setattr(racing, "ours", ours)
    for dtype in ("tf32", "float32"):
        result = tuning.tune(convolution(device), image(device), train=training, dtype=dtype, measure=clock())
        assert result.ok, str(result)
        assert {row.key.dtype for row in result.rows} == {dtype}
    assert (results["tf32"][0] - results["float32"][0]).abs().max() > 1e-5
    (measured,) = tuning.plan(convolution(device), image(device))
    a = running.operands(measured.convolution, device)
    rounded, straight = results["tf32"][0], results["float32"][0]
    for products, wrong in (("ieee", rounded), ("tf32", straight + (rounded - straight) * 4)):
        with float32_products(products):
            judge = running.Judge(measured.convolution, a)
        assert not judge.fault(((rounded if products == "tf32" else straight),))
        assert "error" in judge.fault((wrong,))


def test_what_is_not_written_is_seen_though_memory_holds_the_right_numbers(gpu, device, monkeypatch):
    """Kernels that write nothing, into memory of the default's result."""
    held, allocate = [], launch.empty

    def lazily(convolution, a, tile):
        default = choosing.default_tile(convolution.question(False, launch.gpu(a["x"].device)))
        if tile != default:
            return (launch.empty("the same memory", a["x"]),)
        held[:] = running.ours(convolution, a, tile)
        return tuple(held)

    def empty(shape, *args, **kwargs):
        return held[0].clone() if shape == "the same memory" else allocate(shape, *args, **kwargs)

    monkeypatch.setattr(racing, "ours", lazily)
    monkeypatch.setattr(launch, "empty", empty)
    result = tuning.tune(convolution(device), image(device), measure=clock())
    faults = {name: c.fault for name, c in result.measured[0].candidates.items()}
    assert not faults["default"]
    assert all("finite" in fault for name, fault in faults.items() if name not in ("default", "library"))


def test_a_candidate_that_does_not_run_is_out_and_no_fault(gpu, device, monkeypatch):
    def refuse(results):
        raise RuntimeError("out of resource: shared memory\nand more")

    broken(monkeypatch, refuse)
    result = tuning.tune(convolution(device), image(device), measure=clock())
    assert result.ok
    failures = {name: c.failure for name, c in result.measured[0].candidates.items()}
    assert failures.pop("default") == failures.pop("library") == ""
    assert set(failures.values()) == {"RuntimeError: out of resource: shared memory"}


def test_a_step_that_fails_on_the_clock_is_out(gpu, device):
    def measure(steps):
        return {**clock()(steps), "default": RuntimeError("lost")}

    result = tuning.tune(convolution(device), image(device), measure=measure)
    assert result.measured[0].candidates["default"].failure == "RuntimeError: lost"
    assert "default" not in result.rows[0].microseconds


def test_without_one_right_kernel_there_is_no_row(gpu, device, monkeypatch):
    monkeypatch.setattr(racing, "ours", lambda convolution, a, tile: (torch.zeros_like(running.ours(convolution, a, tile)[0]),))
    result = tuning.tune(convolution(device), image(device), measure=clock())
    assert (result.ok, result.rows, result.path) == (False, [], None)
    assert not tables.user_file(*gpu).exists()
    assert "not measured" in str(result)


def test_an_interrupted_run_keeps_what_it_measured(gpu, device):
    measured = []

    def measure(steps):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(steps)
        return clock()(steps)

    with pytest.raises(KeyboardInterrupt):
        tuning.tune(Net().to(device), image(device), measure=measure)
    assert len(tables.read(tables.user_file(*gpu))) == 2


def test_a_folder_that_cannot_be_written_ends_it_before_it_begins(gpu, device):
    tables.user_folder().write_text("in the way")
    with pytest.raises(OSError, match="cannot be written"):
        tuning.tune(convolution(device), image(device), measure=lambda steps: pytest.fail("measured in vain"))


def test_progress_and_json(gpu, device):
    told = []
    result = tuning.tune(Net().to(device), image(device), measure=clock(), progress=lambda *what: told.append(what))
    assert told[0] == (0, 4, "fprop + norm residual relu 2x8x6x6 > 8, 3x3/1")  # it is made twice: what costs most comes first
    assert told[-1] == (4, 4, "")
    data = json.loads(result.to_json())
    assert (data["ok"], data["gpu"], len(data["measured"])) == (True, gpu.name, 4)
    assert "our kernels win 4, the library 0" in data["summary"]


def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match=r"tune\(\) needs a GPU to measure on, but the model is on cpu"):
        tuning.tune(convolution("cpu"), image("cpu"))


def test_a_model_without_convolutions_is_refused(gpu, device):
    with pytest.raises(RuntimeError, match="Linear makes no convolution"):
        tuning.tune(nn.Linear(4, 4).to(device), torch.zeros(2, 4, device=device))


def test_a_row_of_ours_and_no_row(gpu, device):
    model, x = convolution(device), image(device)
    converted = cnnfast.convert(model, memory_format=LAST)
    tuning.tune(model, x, measure=clock())
    with cnnfast.trace() as calls:
        converted(x.contiguous(memory_format=LAST))
    assert [(call.served_by, call.reason) for call in calls] == [("kernels", "")]


def test_a_pass_is_one_call_on_each_set_of_operands(gpu, device, monkeypatch):
    seen, passed, compute = [], [], running.ours

    def ours(convolution, a, tile):
        seen.append(a["x"])
        return compute(convolution, a, tile)

    def measure(steps):
        seen.clear()
        steps["default"]()
        passed.extend(seen)
        return clock()(steps)

    monkeypatch.setattr(racing, "ours", ours)
    tuning.tune(convolution(device), image(device), measure=measure)
    first, second = passed
    assert not torch.equal(first, second)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter ring: on a GPU it would measure")
def test_the_command_without_a_gpu_says_so():
    result = invoke("resnet18")
    assert result.exit_code == 2
    assert "there is no GPU here to measure on; --dry-run lists what would be measured" in " ".join(result.output.split())


def test_the_command_lists_what_it_would_measure(tmp_path):
    file = tmp_path / "plan.json"
    result = invoke("cnnfast.demo.digits:DigitNet", "--input", "64x1x8x8", "--mode", "train", "--dry-run", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "fprop + stats 64x16x8x8 > 16, 3x3/1" in result.output
    assert "bfloat16" in result.output
    assert "tf32" in invoke("cnnfast.demo.digits:DigitNet", "--input", "64x1x8x8", "--dtype", "tf32", "--dry-run").output
    planned = json.loads(file.read_text())
    assert {"convolution", "count", "candidates"} == set(planned[0])
    assert planned[0]["candidates"][0] == "default"
    assert planned[0]["candidates"][-1] == "library"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--dtype", "int8"), "'int8' is none of bf16, fp16, fp32, tf32, fp64, bfloat16, float16, float32, float64"),
        (("--mode", "both"), "'both' is neither infer nor train"),
        (("--input", "64x1x8x8x8", "--dry-run"), "DigitNet does not run on 64x1x8x8x8"),
    ],
)
def test_the_command_refuses(arguments, says):
    result = invoke("cnnfast.demo.digits:DigitNet", *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())
