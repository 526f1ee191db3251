"""The check of whole models: honest conversions pass, and each planted fault is caught, in the step and the tensor
where it is.
"""

from __future__ import annotations

import copy
import json
import random
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.checking import _judge_conversion_in_child, worker
from cnnfast.checking.randomness import reproducible
from cnnfast.checking.report import WIDTH, CheckReport, CheckRow, Comparison
from cnnfast.checking.whole import _Step, judge_conversion, judge_whole, steps
from cnnfast.functional import blocks
from tests.support.child import run_compiled
from tests.support.residual import joined

pytestmark = pytest.mark.usefixtures("quick")


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class Net(nn.Module):
    """Everything that a fault can be planted in: two norms that are one, dropout, a frozen parameter, a norm in eval if
    asked for.
    """

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.LeakyReLU(0.01)
        self.block = Block(6)
        self.again = nn.Conv2d(6, 6, 1)
        self.again.weight = nn.Parameter(torch.randn(6, 6, 1, 1))
        self.twin = nn.Conv2d(6, 6, 1)
        self.twin.weight = self.again.weight
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(6, 4)
        self.register_buffer("scale", torch.tensor([1.5]), persistent=False)
        self.head.bias.requires_grad_(False)
        with torch.no_grad():
            for norm in (self.norm, self.block.bn1, self.block.bn2):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_()
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 1.5)
        self.block.bn1.train(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twin(self.again(self.block(self.act(self.norm(self.stem(x)))))) * self.scale
        return self.head(self.dropout(y.mean((2, 3))))


def build(frozen: bool = False) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(frozen)


def image(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(device)


def judged(original: nn.Module, converted: nn.Module, x: Any, **options: Any) -> dict[str, CheckRow]:
    return {row.operation: row for row in judge_whole(original, converted, (x,), **options)}


# ----------------------------------------------------------------------------------------------------------------------
# Honest conversions


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", None])
def test_an_honest_conversion_holds(dtype, device):
    model = build(frozen=True).to(device)
    rows = judged(model, cnnfast.convert(model), image(device), dtype=dtype and getattr(torch, dtype))
    assert list(rows) == ["state", "infer", "train", "as given"] == steps(model, True)
    assert {name: row.problems for name, row in rows.items()} == {name: [] for name in rows}
    assert {row.verdict for row in rows.values()} == {"ok"}
    tensors = {c.tensor for c in rows["train"].comparisons}
    trained = {f"grad of {name}" for name, p in model.named_parameters() if p.requires_grad}
    assert {
        "output",
        "norm.running_var",
        "block.bn1.num_batches_tracked",
        "scale",
        "grad of input",
        *trained,
    } <= tensors
    assert "grad of head.bias" not in tensors
    assert {row.dtype for row in rows.values()} == {"", dtype or "float32"}


def test_another_order_of_summation_is_honest(device):
    """As channels_last makes it; PyTorch's own kernels differ by as much."""
    model = build().to(device)
    converted = cnnfast.convert(copy.deepcopy(model), memory_format=torch.channels_last)
    rows = judged(model, converted, image(device))
    assert {row.verdict for row in rows.values()} == {"ok"}, [row.problems for row in rows.values()]


def test_both_models_stay_as_they_are(device):
    model = build(frozen=True).to(device)
    converted = cnnfast.convert(copy.deepcopy(model))
    x = image(device)
    before, x_before = copy.deepcopy(model), x.clone()
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    judged(model, converted, x)
    for m in (model, converted):
        assert all(
            torch.equal(a, b) for a, b in zip(m.state_dict().values(), before.state_dict().values(), strict=True)
        )
        assert all(p.grad is None for p in m.parameters())
        assert [module.training for module in m.modules()] == [module.training for module in before.modules()]
        assert not any(module._forward_hooks for module in m.modules())
    assert torch.equal(x, x_before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_steps_that_are_asked_for(device):
    model = build().to(device).eval()
    assert steps(model, backward=False) == ["state", "infer"]
    assert steps(model.train(), backward=False) == ["state", "infer", "train"]
    rows = judged(model, cnnfast.convert(model), image(device), backward=False)
    assert not any(c.backward for row in rows.values() for c in row.comparisons)


# ----------------------------------------------------------------------------------------------------------------------
# Planted faults


class Fault(NamedTuple):
    """What `plant` does to a converted model, the step that fails, and a tensor that is wrong there."""

    name: str
    plant: Callable[[Net], object]
    step: str
    tensor: str


def forward_of(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = types.MethodType(forward, module)


def block_forward(join: Callable[[Block, Tensor, Tensor], Tensor]) -> Callable[[Net], None]:
    def forward(self: Block, x: Tensor) -> Tensor:
        return join(self, self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))), x)

    return lambda net: forward_of(net.block, forward)


def after(change: Callable[[Any, Tensor, Tensor], Any], name: str = "") -> Callable[[Net], None]:
    """`change(module, input, output)` follows the forward of a module, and what it returns is returned."""

    def plant(net: Net) -> None:
        module = net.get_submodule(name)
        inner = type(module).forward
        forward_of(module, lambda self, x: change(self, x, inner(self, x)))

    return plant


def drift(norm: nn.BatchNorm2d, x: Tensor, y: Tensor) -> Tensor:
    """A statistic that is updated although the norm is in eval."""
    if not norm.training:
        norm.running_mean = norm.running_mean.lerp(x.detach().mean((0, 2, 3)), norm.momentum)
    return y


def undo(change: Callable[[nn.BatchNorm2d, Tensor], None]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """What `change` makes of the statistics after a step of training."""

    def forward(norm: nn.BatchNorm2d, x: Tensor, y: Tensor) -> Tensor:
        if norm.training:
            with torch.no_grad():
                change(norm, x)
        return y

    return forward


def biased(norm: nn.BatchNorm2d, x: Tensor) -> None:
    count = x.numel() // x.shape[1]
    norm.running_var -= norm.momentum * x.var((0, 2, 3)) / count


def strip(net: Net) -> None:
    net.norm.running_mean = net.norm.running_var = net.norm.num_batches_tracked = None


def rename(net: Net) -> None:
    net.root = net._modules.pop("stem")
    forward_of(net, lambda self, x: Net.forward(self, x) if "stem" in self._modules else _renamed(self, x))


def _renamed(net: Net, x: Tensor) -> Tensor:
    net = copy.copy(net)
    net._modules = {**net._modules, "stem": net._modules["root"]}
    return Net.forward(net, x)


def reorder(net: Net) -> None:
    net._modules = OrderedDict(reversed(net._modules.items()))


def deaf(net: Net) -> None:
    net.head._load_from_state_dict = lambda *arguments: None


class Detached(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.detach(), self.bias)


def scaled_in_training(y: Tensor, training: bool) -> Tensor:
    return y * 1.001 if training else y


def broken(net: Net, x: Tensor, y: Tensor) -> Tensor:
    if net.training:
        raise RuntimeError("no such tile")
    return y


FAULTS = [
    Fault("forgotten residual", block_forward(lambda block, y, x: block.relu(y)), "infer", "output"),
    Fault("residual after the activation", block_forward(lambda block, y, x: block.relu(y) + x), "infer", "output"),
    Fault(
        "residual without gradient",
        block_forward(lambda block, y, x: block.relu(y + x.detach())),
        "train",
        "grad of stem.weight",
    ),
    Fault("activation forgotten", block_forward(lambda block, y, x: y + x), "infer", "output"),
    Fault("another slope", lambda net: setattr(net.act, "negative_slope", 0.012), "infer", "output"),
    Fault("another eps", lambda net: setattr(net.norm, "eps", 1e-3), "infer", "output"),
    Fault("another momentum", lambda net: setattr(net.norm, "momentum", 0.11), "train", "norm.running_mean"),
    Fault("frozen statistic updated", after(drift, "block.bn1"), "as given", "block.bn1.running_mean"),
    Fault("statistic updated in eval", after(drift, "norm"), "infer", "norm.running_mean"),
    Fault("statistics of the batch in eval", strip, "infer", "output"),
    Fault(
        "statistic not updated",
        after(undo(lambda norm, x: norm.running_var.fill_(1.0)), "norm"),
        "train",
        "norm.running_var",
    ),
    Fault("biased variance", after(undo(biased), "norm"), "train", "norm.running_var"),
    Fault(
        "step not counted",
        after(undo(lambda norm, x: norm.num_batches_tracked.sub_(1)), "norm"),
        "train",
        "norm.num_batches_tracked",
    ),
    Fault("frozen norm in training", lambda net: net.block.bn1.train(), "state", "training flags"),
    Fault("renamed key", rename, "state", "state_dict"),
    Fault("other order of keys", reorder, "state", "parameters"),
    Fault("lost buffer", lambda net: net.__dict__.update(scale=net._buffers.pop("scale")), "state", "buffers"),
    Fault("other dtype of the state", lambda net: net.norm.half(), "state", "state_dict"),
    Fault("other values", lambda net: net.head.weight.data.mul_(1.001), "state", "state_dict"),
    Fault(
        "parameters no longer shared",
        lambda net: setattr(net.twin, "weight", copy.deepcopy(net.again.weight)),
        "state",
        "parameters",
    ),
    Fault("frozen parameter trained", lambda net: net.head.bias.requires_grad_(), "state", "parameters"),
    Fault("deaf to load_state_dict", deaf, "state", "loading into the converted model"),
    Fault(
        "weight without gradient",
        lambda net: setattr(net.stem, "__class__", Detached),
        "train",
        "grad of stem.weight",
    ),
    Fault("dropout in eval", after(lambda net, x, y: nn.functional.dropout(y, 0.3), ""), "infer", "output"),
    Fault("no dropout in training", lambda net: setattr(net, "dropout", nn.Identity()), "train", "output"),
    Fault(
        "a thousandth too much in training",
        after(lambda net, x, y: scaled_in_training(y, net.training), ""),
        "train",
        "output",
    ),
    Fault(
        "a wrong gradient alone",
        after(lambda net, x, y: y + (y - y.detach()) * 0.3, "block"),
        "train",
        "grad of stem.weight",
    ),
    Fault("raises in training", after(broken, ""), "train", ""),
    Fault("writes into its input", after(lambda net, x, y: (x.mul_(2), y)[1], ""), "infer", "input afterwards"),
    Fault("another structure", after(lambda net, x, y: (y, y), ""), "infer", "output"),
    Fault(
        "another dtype",
        after(lambda net, x, y: y.double() if y.dtype == torch.float32 else y.float(), ""),
        "infer",
        "output",
    ),
    Fault(
        "NaN",
        after(lambda net, x, y: y.index_fill(1, torch.tensor([1], device=y.device), float("nan")), ""),
        "infer",
        "output",
    ),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_faults_are_caught(fault, dtype, device):
    model = build(frozen=True).to(device)
    converted = cnnfast.convert(copy.deepcopy(model))
    fault.plant(converted)
    row = judged(model, converted, image(device), dtype=getattr(torch, dtype))[fault.step]
    assert row.verdict == "FAIL"
    wrong = {c.tensor for c in row.comparisons if not c.ok}
    assert fault.tensor in wrong if fault.tensor else row.reason == "RuntimeError: no such tile"
    assert not CheckReport([], [row]).ok


def test_a_faulty_conversion_in_place_does_not_hide_behind_its_original(device, monkeypatch):
    """Whatever convert does to what it is given, the original that is compared with is another copy."""

    def convert(model):
        block_forward(lambda block, y, x: block.relu(y))(model)
        return model

    monkeypatch.setattr("cnnfast.checking.whole.convert", convert)
    rows = {row.operation: row for row in judge_conversion(build().to(device), (image(device),))}
    assert rows["infer"].verdict == "FAIL"


def test_a_model_that_convert_refuses_is_not_judged(device):
    (row,) = judge_conversion(torch.jit.script(nn.Conv2d(3, 4, 3)).to(device), (image(device),))
    assert (row.verdict, "scripted" in row.reason) == ("not judged", True)


def test_a_conversion_that_changes_nothing_is_not_ours(device):
    model = build().to(device)
    rows = judged(model, copy.deepcopy(model), image(device))
    assert {name: row.verdict for name, row in rows.items()} == {
        "state": "ok",
        "infer": "not ours",
        "train": "not ours",
    }
    assert not CheckReport([], list(rows.values())).ok


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be judged


class Noisy(nn.Module):
    """Adds noise from where no seed reaches it, or as dropout, or as the seed says but otherwise in every dtype."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.draw = nn.Conv2d(3, 4, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.draw(y) if self.training else y


def unseeded() -> Callable[[Tensor], Tensor]:
    generator = random.Random(0)
    return lambda y: torch.full_like(y, generator.random())


def other_in_float64(y: Tensor) -> Tensor:
    return torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0)).to(y.device)


@pytest.mark.parametrize(
    ("draw", "verdict", "reason"),
    [
        (unseeded(), "not judged", "other numbers the second time"),
        (other_in_float64, "not judged", "other numbers in float32 than in float64"),
        (lambda y: torch.full_like(y, random.random() + np.random.rand()), "ok", ""),
        (lambda y: nn.functional.dropout2d(y, 0.5), "ok", ""),
        (lambda y: torch.empty_like(y).bernoulli_(0.5), "ok", ""),
        (torch.rand_like, "ok", ""),
        (lambda y: torch.randn(y.shape, dtype=y.dtype, device=y.device), "ok", ""),
    ],
    ids=["unseeded", "other in float64", "python and numpy", "dropout2d", "bernoulli_", "rand_like", "randn"],
)
def test_randomness(draw, verdict, reason, device):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Noisy(draw).to(device)
    rows = judged(model, cnnfast.convert(model), image(device))
    assert rows["infer"].verdict == "ok"
    assert rows["train"].verdict == verdict, rows["train"].problems
    assert reason in rows["train"].reason
    report = CheckReport([CheckRow("", "conv2d", "", "", "ok")], list(rows.values()))
    assert report.ok
    assert ("not judged" in report.summary) == bool(reason)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_random_numbers_are_the_same_in_every_dtype(dtype, inplace):
    def draws(dtype: torch.dtype) -> list[Tensor]:
        ones = torch.ones(2, 3, 4, 4, dtype=dtype)
        with reproducible(3):
            return [
                nn.functional.dropout(ones.clone(), 0.5, inplace=inplace),
                nn.functional.dropout1d(ones[0].clone(), 0.5, inplace=inplace),
                nn.functional.dropout2d(ones.clone(), 0.5, True, inplace),
                nn.Dropout(0.2, inplace)(ones.clone()),
                nn.Dropout(0.2, inplace).eval()(ones.clone()),
                torch.rand(2, 3, dtype=dtype),
                torch.randn((4,), dtype=dtype),
                torch.rand(size=(3,), dtype=dtype),
                torch.rand_like(ones),
                torch.randn_like(ones),
                torch.bernoulli(ones * 0.5),
                ones.new_empty(5).bernoulli_(0.3),
                ones.new_empty(5).uniform_(-1, 1),
                ones.new_empty(5).normal_(mean=1.0, std=2.0),
            ]

    for drawn, right in zip(draws(dtype), draws(torch.float32), strict=True):
        assert drawn.dtype == dtype
        assert torch.equal(drawn, right.to(dtype)) or dtype == torch.float16
        torch.testing.assert_close(drawn, right.to(dtype), rtol=2e-3, atol=1e-3)


def test_a_generator_of_the_models_own_is_left_alone():
    generator = torch.Generator().manual_seed(5)
    with reproducible(0):
        drawn = torch.empty(3, dtype=torch.float64).uniform_(generator=generator), torch.rand(3, generator=generator)
    generator.manual_seed(5)
    assert torch.equal(drawn[0], torch.empty(3, dtype=torch.float64).uniform_(generator=generator))
    assert torch.equal(drawn[1], torch.rand(3, generator=generator))


def test_a_step_that_the_original_cannot_take_is_not_judged(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(device)
    rows = judged(model, cnnfast.convert(model), image(device, 1, 3, 3, 3))
    assert rows["infer"].verdict == "ok"
    assert rows["train"].verdict == "not judged"
    assert "more than 1 value per channel" in rows["train"].reason


def test_a_step_that_rounding_decides_is_not_judged(device):
    """Of two values a channel a batch norm makes +1 and -1; their difference, where it is a rounding error, decides the
    gradients.
    """
    layers = [layer for _ in range(8) for layer in (nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, eps=1e-12))]
    model = nn.Sequential(*layers).to(device)
    x = image(device, 1, 4, 1, 1).repeat(2, 1, 1, 1) * torch.tensor([1, 1 + 1e-6], device=device).view(2, 1, 1, 1)
    rows = judged(model, cnnfast.convert(model), x)
    assert rows["train"].verdict == "not judged"
    assert "rounding alone changes" in rows["train"].reason


def test_gradients_that_would_overflow_are_scaled(device):
    model = build().to(device)
    with torch.no_grad():
        model.head.weight *= 1.4e5
        model.scale *= 1e-4
    rows = judged(model, cnnfast.convert(model), image(device), dtype=torch.float16)
    assert rows["train"].verdict == "ok", rows["train"].problems
    unscaled = _Step(model, model, (image(device),), "train", True, torch.float16).run(model.half()).tensors
    assert unscaled["output"].isfinite().all()
    assert not unscaled["grad of block.conv1.weight"].isfinite().all()


def test_infinite_outputs_must_be_infinite_in_both(device):
    """What float16 cannot hold, it cannot hold in the converted model either."""
    model = build().to(device)
    with torch.no_grad():
        model.head.weight *= 1e5
        model.head.weight.clamp_(-6e4, 6e4)
    rows = judged(model, cnnfast.convert(model), image(device), dtype=torch.float16, backward=False)
    assert rows["infer"].verdict == "ok", rows["infer"].problems


# ----------------------------------------------------------------------------------------------------------------------
# Outputs of every kind


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: dict[str, Tensor]) -> dict[str, Any]:
        y = self.conv(images["left"]) + images["right"].mean()
        return {"features": (y, [y.relu(), None]), "classes": y.argmax(1), "waves": torch.fft.rfft2(y), "size": 3}


def test_structures_of_tensors(device):
    model = Many().to(device)
    inputs = {"left": image(device), "right": image(device, 2, 1, 4, 4)}
    converted = cnnfast.convert(model)
    row = judged(model, converted, inputs)["train"]
    assert row.verdict == "ok", row.problems
    assert {
        "output['features'][0]", "output['features'][1][0]", "output['classes']", "output['waves']",
        "grad of input[0]['left']", "grad of input[0]['right']",
    } <= {c.tensor for c in row.comparisons}  # fmt: skip
    forward_of(
        converted,
        lambda self, images: {**Many.forward(self, images), "classes": Many.forward(self, images)["classes"] + 1},
    )
    assert "output['classes']" in {c.tensor for c in judged(model, converted, inputs)["infer"].comparisons if not c.ok}


def test_a_class_that_rounding_decides_is_nobodys_fault(device):
    """Between two equal maxima, float64 chooses by digits that float32 does not have."""

    class Tie(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).flatten()
            return torch.stack([y, y + y.double().mul(1e-12).to(y.dtype)]).argmax(0)

    model = Tie().to(device)
    row = judged(model, cnnfast.convert(model), image(device, 1, 1, 4, 4).abs() + 1)["infer"]
    assert row.verdict == "ok", row.problems


# ----------------------------------------------------------------------------------------------------------------------
# The report, and check


def test_check_judges_modules_as_a_whole(device):
    seen = []
    report = cnnfast.check(
        build(frozen=True).to(device), image(device), dtype="float64", progress=lambda *event: seen.append(event)
    )
    assert [row.operation for row in report.whole] == ["state", "infer", "train", "as given"]
    assert report.summary.endswith("of 4 steps of the whole model 4 ok"), str(report)
    data = json.loads(report.to_json())
    assert [row["operation"] for row in data["whole"]] == [row.operation for row in report.whole]
    assert len(data["rows"]) == len(report.rows)
    total = len(report.rows) + 4
    assert seen[-1] == (total, total, "")
    assert (len(report.rows), total, "whole model, state") in seen


def test_functions_are_not_converted(device):
    assert cnnfast.check(lambda x: nn.functional.max_pool2d(x, 2), image(device)).whole == []


def test_a_compiled_model_is_judged_uncompiled(device):
    report = cnnfast.check(torch.compile(build().to(device)), image(device), backward=False)
    assert [row.verdict for row in report.whole] == ["ok"] * 3


def test_whole_rows_count_and_are_shown_shortened():
    call = CheckRow("layer", "conv2d", "1x3x8x8", "float32", "ok")
    wrong = [Comparison(f"grad of layer{i}.weight", 0.5, 1e-7, 3e-7) for i in range(30)]
    report = CheckReport(
        [call],
        [
            CheckRow("", "state", "", "", "ok"),
            CheckRow("", "train", "2x3x8x8", "float32", "FAIL", comparisons=wrong),
        ],
    )
    assert not report.ok
    text = str(report)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "train 2x3x8x8 float32" in text
    assert "and 20 more" in text
    assert "FAIL: of 1 calls 1 ok; of 2 steps of the whole model 1 ok, 1 FAIL" in text
    assert CheckReport([call], [CheckRow("", "train", "", "", "not judged", "random")]).ok
    assert json.loads(report.to_json())["whole"][1]["verdict"] == "FAIL"


# ----------------------------------------------------------------------------------------------------------------------
# The child process


@pytest.mark.compiled
def test_a_child_process_judges_the_whole_where_this_one_does_not_interpret():
    def check_in_a_child():
        import torch
        from torch import nn

        import cnnfast

        torch.cuda.is_available = lambda: False
        model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        seen = []
        whole = cnnfast.check(
            model, torch.randn(2, 2, 3, 3), progress=lambda done, total, name: seen.append(name)
        ).whole
        return [[[row.operation, row.verdict, row.problems, row.forward] for row in whole], seen]

    rows, seen = run_compiled(check_in_a_child)
    assert [row[:3] for row in rows] == [["state", "ok", []], ["infer", "ok", []], ["train", "ok", []]]
    assert any("conv_fprop" in kernel for kernel in rows[1][3])
    assert "whole model, train: 1 kernels" in seen


@pytest.mark.parametrize("module", [__name__, "__main__"])
def test_a_model_that_cannot_be_sent_to_the_child_is_not_judged(module):
    class Local(nn.Conv2d):
        pass

    Local.__module__ = module
    (row,) = _judge_conversion_in_child(Local(2, 3, 1), (torch.randn(1, 2, 2, 2),), False, None, lambda text: None)
    assert row.verdict == "not judged"
    assert "Local" in row.reason
    assert "TRITON_INTERPRET=1" in row.reason


def test_a_child_that_cannot_load_the_model_says_so(tmp_path):
    (tmp_path / "data.pt").write_bytes(b"nothing")
    (row,) = worker.rows(str(tmp_path / "data.pt"))
    assert row.verdict == "not judged"
    assert "cannot load it" in row.reason


def test_training_is_judged_by_the_operator_that_a_block_is(device, monkeypatch):
    """And a fault of that is found, which no single call and no step in eval shows."""
    model, x = Block(4).to(device), torch.randn(3, 4, 6, 5, device=device)
    with joined() as seen:
        verdicts = {row.operation: row.verdict for row in judge_conversion(model, (x,))}
    assert seen == [2]
    assert verdicts == {"state": "ok", "infer": "ok", "train": "ok"}
    operator = blocks.ops.basic_block
    monkeypatch.setattr(blocks.ops, "basic_block", lambda *given: (operator(*given)[0] * 1.01,))
    verdicts = {row.operation: row.verdict for row in judge_conversion(model, (x,))}
    assert verdicts == {"state": "ok", "infer": "ok", "train": "FAIL"}
