"""cnnfast.freeze: what it computes, that it leaves the model alone, what it refuses."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.engine import original
from tests.support.agreement import integers, normal
from tests.support.freezable import Branching, Exact, Structured, image
from tests.support.model_zoo import randomise
from tests.support.packages import package

PREPARED = {"size": 10, "crop": 8, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


# ----------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("batch", [1, 2])
def test_exact_numbers_for_any_batch_and_image_size(batch):
    model = Exact()
    frozen = cnnfast.freeze(model, image(batch))
    for x in (image(1), image(2), image(5), image(0), image(2, 16), image(3, 8, 16), image(1, 16, 8), image(1)):
        y = frozen(x)
        assert torch.equal(y, model(x))
        assert (y.requires_grad, y.is_inference(), y.is_contiguous()) == (False, False, True)


def test_a_structure_comes_back_as_it_went():
    model = Structured()
    inputs = Structured.inputs()
    frozen = cnnfast.freeze(model, *inputs)
    for batch in (2, 3, 1):
        inputs = Structured.inputs(batch)
        found, right = frozen(*inputs), model(*inputs)
        assert list(found) == list(right)
        assert isinstance(found["maps"], list)
        assert isinstance(found["maps"][1], tuple)
        assert found["name"] == "structured"
        tensors = [
            (found["maps"][0], right["maps"][0]),
            *zip(found["maps"][1], right["maps"][1], strict=True),
            *((found[key], right[key]) for key in ("best", "input", "view", "scale")),
        ]
        for mine, theirs in tensors:
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


def test_results_belong_to_the_caller():
    """None is in the memory of an input, of the model, of the network, or of another result, of this call or before."""
    model, inputs = Structured(), Structured.inputs()
    frozen = cnnfast.freeze(model, *inputs)
    held = [*frozen.network.graph.constants.values(), *model.parameters(), inputs[0], inputs[1]["shift"]]
    seen = {t.untyped_storage().data_ptr() for t in held}
    kept = []
    for _ in range(2):
        y = frozen(*inputs)
        results = [y["maps"][0], *y["maps"][1], y["best"], y["input"], y["view"], y["scale"]]
        kept.append(y)  # what is alive has an address of its own
        addresses = [t.untyped_storage().data_ptr() for t in results]
        assert len(set(addresses)) == len(addresses)
        assert not seen & set(addresses)
        seen |= set(addresses)
        for t in results:
            t.zero_()
    assert torch.equal(frozen(*inputs)["maps"][0], model(*inputs)["maps"][0])


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, torch.float16)])
def test_half_precision_takes_and_gives_what_the_original_does(dtype, name):
    """Small integers are exact in half precision too."""
    model = Exact()
    frozen = cnnfast.freeze(model, image(2), dtype=name)
    assert frozen.dtype == dtype
    x = image(3)
    y = frozen(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, model(x), rtol=0.02, atol=0.02 * model(x).abs().max().item())
    assert torch.equal(frozen(x.to(dtype)), y)
    assert frozen.report().why


def test_the_dtype_is_the_models_where_none_is_given():
    assert cnnfast.freeze(Exact().bfloat16(), image().bfloat16()).dtype == torch.bfloat16
    assert cnnfast.freeze(nn.Flatten(), image()).dtype == torch.float32
    frozen = cnnfast.freeze(Exact().double(), image().double(), dtype="fp32")
    assert (frozen.dtype, frozen(image()).dtype) == (torch.float32, torch.float64)


class OddPlaces(nn.Module):
    """Batch norms where nothing stands to fold them into: first, after a sum, after a pool, before and after linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late = nn.BatchNorm2d(3), nn.BatchNorm2d(6, affine=False)
        self.conv, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.twice = nn.BatchNorm2d(6)
        self.before, self.fc, self.after = nn.BatchNorm1d(6), nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        shared = self.conv(x)
        y = self.late(self.twice(shared) + self.other(x))
        y = self.twice(nn.functional.max_pool2d(y, 2)) * shared.mean((2, 3), keepdim=True)
        return self.after(self.fc(self.before(y.amax((2, 3))))), y


def test_batch_norms_in_odd_places_are_as_exact_as_pytorch():
    model, x = randomise(OddPlaces()).eval(), normal(3, 3, 6, 6, dtype=torch.float32)
    found = cnnfast.freeze(model, x)(x)
    exact = copy.deepcopy(model).double()(x.double())
    for mine, theirs, right in zip(found, model(x), exact, strict=True):
        scale = right.abs().max()
        assert (mine - right).abs().max() / scale <= 4 * (theirs - right).abs().max() / scale + 1e-6


def test_one_graph_for_a_model_that_is_converted():
    """It is reverted in the copy, and stays converted."""
    model = Exact()
    converted = cnnfast.convert(copy.deepcopy(model))
    before = [type(m) for m in converted.modules()]
    frozen = cnnfast.freeze(converted, image())
    assert torch.equal(frozen(image(2)), model(image(2)))
    assert [type(m) for m in converted.modules()] == before


def test_a_caller_in_inference_mode_or_autocast_freezes_and_calls_the_same():
    model = Exact()
    with torch.inference_mode():
        x = image(2)
        frozen = cnnfast.freeze(model, x)
        assert torch.equal(frozen(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        again = cnnfast.freeze(model, image(2))
        found = again(image(2, 16)), frozen(image(2))
    assert torch.equal(found[0], model(image(2, 16)))
    assert torch.equal(found[1], model(image(2)))
    y = frozen(image(2)) * torch.ones(1, requires_grad=True)
    y.sum().backward()  # what inference mode made could not be saved for backward


# ----------------------------------------------------------------------------------------------------------------------
# What is left as it was


class Drawing(nn.Module):
    """It draws random numbers in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu(self.norm(self.conv(x))))


def test_the_model_and_the_random_numbers_stay_as_they_are():
    model = Drawing().to(memory_format=torch.channels_last).train()
    model.norm.eval()
    model(image(4, 5)).sum().backward()
    seen: list[Any] = []
    model.conv.register_forward_hook(lambda module, given, result: seen.append(result))
    model.register_forward_pre_hook(lambda module, given: seen.append(given))
    held = [*model.parameters(), *model.buffers()]
    before = [(id(t), t.clone(), t.stride(), t.requires_grad, t._version) for t in held]
    grads = [(id(p.grad), p.grad.clone()) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    draws = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    x = image(2, 5).requires_grad_()

    frozen = cnnfast.freeze(model, x)
    frozen(image(1, 7))

    after = [(id(t), t, t.stride(), t.requires_grad, t._version) for t in (*model.parameters(), *model.buffers())]
    for was, now in zip(before, after, strict=True):
        assert was[0] == now[0]
        assert was[2:] == now[2:]
        assert torch.equal(was[1], now[1])
    assert all(id(p.grad) == i and torch.equal(p.grad, g) for p, (i, g) in zip(model.parameters(), grads, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == draws[1:]
    assert seen == []
    assert len(model.conv._forward_hooks) == len(model._forward_pre_hooks) == 1
    assert x.grad is None
    assert frozen.report().notes == ("forward hooks of yours are not part of the network: on the model itself, conv",)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), copy.deepcopy(model).eval()(x), rtol=1e-5, atol=1e-5)


def test_later_changes_of_the_model_do_not_reach_the_network():
    model = Exact()
    frozen = cnnfast.freeze(model, image())
    right = model(image(2)), model(image(2, 16))
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.zero_()
    assert torch.equal(frozen(image(2)), right[0])
    assert torch.equal(frozen(image(2, 16)), right[1])


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.LazyConv2d(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


GREY = {**PREPARED, "mean": 0.5, "std": 0.5}
V, T, R = ValueError, TypeError, RuntimeError


def mixed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1).bfloat16())


@pytest.mark.parametrize(
    ("model", "inputs", "options", "error", "says"),
    [
        (nn.ReLU, (image(),), {}, T, "model must be a torch.nn.Module, but got type"),
        (lambda x: x, (image(),), {}, T, "model must be a torch.nn.Module, but got function"),
        (torch.jit.trace(nn.ReLU(), image()), (image(),), {}, V, "freeze the model that was scripted"),
        (torch.compile(nn.ReLU()), (image(),), {}, V, "this model is compiled: freeze the model that was"),
        (Lazy(), (image(),), {}, V, "conv.weight has no size yet: call the model once"),
        (nn.Conv2d(3, 4, 1, device="meta"), (image(),), {}, V, "the model is on meta (weight), and no runner"),
        (nn.ReLU(), (image().to("meta"),), {}, V, "tensor 1 of the example is on meta, and no"),
        (nn.ReLU(), (image().to_sparse(),), {}, V, "tensor 1 of the example must be dense"),
        (nn.ReLU(), (image(0),), {}, V, "tensor 1 of the example has no elements: [0, 3, 8, 8]"),
        (nn.ReLU(), (), {}, V, "there is no example input: give what the model takes"),
        (nn.ReLU(), (1, None), {}, V, "there is no tensor in the example inputs"),
        (nn.ReLU(), (object(),), {}, V, "example_inputs: an object of class builtins.object is neither"),
        (nn.ReLU(), (image(),), {"quantize": "int8"}, V, "quantize must be None: int8 comes with"),
        (nn.ReLU(), (image(),), {"calibration": [1]}, V, "calibration must be None"),
        (nn.ReLU(), (image(),), {"dtype": "fp64"}, V, "no runner computes in torch.float64: use dtype='fp32'"),
        (nn.ReLU(), (image(),), {"dtype": "tf32"}, V, "dtype='tf32' is a way to multiply on a GPU: use 'fp32'"),
        (nn.ReLU(), (image(),), {"dtype": "int8"}, V, "dtype 'int8' is none of bf16, fp16"),
        (Exact().double(), (image().double(),), {}, V, "no runner computes in torch.float64"),
        (mixed(), (image(),), {}, V, "of several dtypes (torch.bfloat16, torch.float32): say dtype="),
        (Exact(), (image()[:, :2],), {}, R, "Exact does not run on 1x2x8x8: RuntimeError"),
        (Exact(), (image(),), {"classes": ["a", "b"]}, V, "2 classes, and the first result, [1, 5], has 5"),
        (nn.Flatten(0), (image(),), {"classes": ["a"]}, V, "and the first result is [192]"),
        (Exact(), (image(),), {"classes": 3}, V, "classes=3 is no list of names"),
        (Exact(), (image(),), {"preprocessing": 3}, V, "preprocessing=3 is nothing that tells"),
        (Exact(), (image(),), {"preprocessing": GREY}, V, "preprocessing makes images of 1 channels"),
        (Exact(), (image(),), {"batch": 3}, T, "freeze() got an unexpected keyword argument 'batch'"),
    ],
)  # fmt: skip
def test_what_cannot_be_frozen_is_refused_in_a_sentence(model, inputs, options, error, says):
    with pytest.raises(error, match=re.escape(says)) as refused:
        cnnfast.freeze(model, *inputs, **options)
    assert "freeze()" in str(refused.value) or error is RuntimeError or "preprocessing" in says or "classes=" in says


def test_a_frozen_network_is_not_frozen_again():
    with pytest.raises(TypeError, match="this network is frozen already"):
        cnnfast.freeze(cnnfast.freeze(nn.ReLU(), image()), image())  # pyright: ignore[reportArgumentType]


def test_results_that_are_too_far_are_refused_with_a_table(monkeypatch):
    """A fold that loses a bias: nothing else would notice."""
    from cnnfast.engine import freezing

    fold = freezing.fold

    def wrong(graph, *others):
        graph = fold(graph, *others)
        graph.constants = {name: t * (1 + 1e-4) for name, t in graph.constants.items()}
        return graph

    monkeypatch.setattr(freezing, "fold", wrong)
    with pytest.raises(ValueError, match="the frozen network is too far from Exact") as refused:
        cnnfast.freeze(Exact(), image(2))
    assert "below its limit" in str(refused.value)
    assert "100.0 dB" in str(refused.value)
    assert "please report it" in str(refused.value)


class Amplifying(nn.Module):
    """It computes small differences of large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        large = 1e5 * x
        return (self.fc(x) + large) - large


def test_where_pytorch_itself_is_far_off_ours_may_be_as_far():
    model, x = Amplifying(), torch.randn(4, 16)
    frozen = cnnfast.freeze(model, x)
    result = frozen.report().check.results[0]
    assert result.sqnr < 100
    assert result.limit == result.own - 6


# ----------------------------------------------------------------------------------------------------------------------
# What surrounds the network


def test_preprocessing_and_classes_travel_with_the_network():
    frozen = cnnfast.freeze(Exact(), image(), preprocessing=PREPARED, classes=list("abcde"))
    assert frozen.classes == ("a", "b", "c", "d", "e")
    assert frozen.preprocessing.crop == (8, 8)
    assert cnnfast.freeze(Exact(), image()).preprocessing is None


class Labelled(Exact):
    """As timm's and transformers' models carry them."""

    def __init__(self, labels: int = 5, channels: int = 3) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (channels, 8, 8),
            "mean": (0.5,) * channels,
            "std": (0.25,) * channels,
            "interpolation": "bicubic",
            "crop_pct": 0.8,
            "architecture": "labelled",
        }
        self.config = type("Config", (), {"id2label": {i: f"class {i}" for i in range(labels)}})()


def test_what_a_model_carries_is_found_and_left_out_where_it_does_not_fit():
    frozen = cnnfast.freeze(Labelled(), image())
    assert frozen.classes == tuple(f"class {i}" for i in range(5))
    assert frozen.preprocessing.mean == (0.5, 0.5, 0.5)
    assert frozen.report().notes == ()
    assert cnnfast.freeze(Labelled(), image(), classes=list("abcde")).classes == tuple("abcde")
    frozen = cnnfast.freeze(Labelled(labels=7, channels=1), image())
    assert (frozen.classes, frozen.preprocessing) == (None, None)
    said = " ".join(frozen.report().notes)
    assert "the classes found on the model are left out: there are 7 classes" in said
    assert "the preprocessing found on the model is left out: preprocessing makes images of 1 channels" in said


def test_progress_is_told_stage_by_stage():
    told: list[tuple[int, int, str]] = []
    cnnfast.freeze(nn.ReLU(), image(), progress=lambda *now: told.append(now))
    assert [done for done, _, _ in told] == list(range(5))
    assert {total for _, total, _ in told} == {4}


# ----------------------------------------------------------------------------------------------------------------------
# Models of others


@pytest.mark.parametrize("size", [(1, 3, 64, 64), (3, 3, 96, 64)])
def test_torchvisions_resnet18(size, torchvision):
    model = randomise(torchvision.models.resnet18(weights=None)).eval()
    frozen = cnnfast.freeze(model, normal(1, 3, 64, 64, dtype=torch.float32))
    agrees(frozen, model, normal(*size, dtype=torch.float32))
    assert frozen.report().pytorchs == ()


def agrees(frozen: Any, model: nn.Module, x: Tensor) -> None:
    """The root mean square of the error is at most 1e-5 of that of the result."""
    found, right = frozen(x), copy.deepcopy(model).double()(x.double())
    found, right = (y if isinstance(y, Tensor) else y["logits"] for y in (found, right))
    assert (found - right).norm() <= 1e-5 * right.norm()


def test_a_model_of_timm():
    timm = package("timm")
    model = randomise(timm.create_model("resnet10t", pretrained=False)).eval()
    frozen = cnnfast.freeze(model, normal(1, 3, 64, 64, dtype=torch.float32))
    agrees(frozen, model, normal(2, 3, 64, 64, dtype=torch.float32))
    assert frozen.preprocessing is not None


def test_a_model_of_transformers():
    transformers = package("transformers")
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 2, 1], image_size=32, num_labels=7)
    model = randomise(transformers.ConvNextForImageClassification(config)).eval()
    x = normal(1, 3, 32, 32, dtype=torch.float32)
    frozen = cnnfast.freeze(model, x)
    y = frozen(x)
    assert type(y) is type(model(x))
    assert y.logits.shape == (1, 7)
    agrees(frozen, model, normal(3, 3, 32, 32, dtype=torch.float32))
    assert frozen.classes is None  # LABEL_0 to LABEL_6 are no names


# ----------------------------------------------------------------------------------------------------------------------
# What torch.export cannot capture


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_what_cannot_be_captured_is_converted(dtype, tmp_path):
    model, x = randomise(Branching()).train(), normal(2, 3, 6, 6, dtype=torch.float32)
    frozen = cnnfast.freeze(model, x, dtype=dtype)
    right = copy.deepcopy(model).eval()(x)
    y = frozen(x)
    tolerance = 1e-5 if dtype is None else 0.05
    torch.testing.assert_close(y[0], right[0].detach(), rtol=tolerance, atol=tolerance)
    assert (y[0].dtype, y[0].requires_grad, y[0].is_inference()) == (torch.float32, False, False)
    assert y[1].data_ptr() != x.data_ptr()
    assert frozen(normal(3, 3, 9, 8, dtype=torch.float32))[0].shape == (3, 4, 7, 6)
    assert model.training
    reason = "torch.export cannot capture Branching: "
    assert reason in frozen.report().why
    assert "the converted model runs, without a plan" in frozen.report().summary
    assert " ".join(reason.split()) in " ".join(str(frozen.report()).split())
    assert reason in repr(frozen)
    for refused in (
        lambda: frozen.save(tmp_path / "x"),
        lambda: frozen.to_onnx(tmp_path / "x"),
        lambda: frozen.profile(x),
    ):
        with pytest.raises(ValueError, match=reason):
            refused()
    with pytest.raises(ValueError, match="tensor 1 must be floating-point"):
        frozen(x.long())
    assert list(tmp_path.iterdir()) == []


class Boxes(nn.Module):
    """Its result is an object of a class of its own, which nobody can take apart."""

    class Found:
        def __init__(self, boxes: Tensor) -> None:
            self.boxes = boxes

    def forward(self, x: Tensor) -> Any:
        return self.Found(x.flatten(1))


def test_a_result_that_cannot_be_taken_apart_comes_as_it_is():
    frozen = cnnfast.freeze(Boxes(), image(2))
    assert isinstance(frozen(image(3)), Boxes.Found)
    assert "its result cannot be taken apart" in frozen.report().why
    assert frozen.report().check is None


def test_a_capture_that_is_given_up_leaves_the_image_size_fixed(monkeypatch):
    def given_up(model, inputs, seconds):
        return f"given up after {seconds:g} seconds"

    monkeypatch.setattr(original, "capture_within", given_up)
    model = Exact()
    frozen = cnnfast.freeze(model, image())
    for _ in range(2):
        with pytest.raises(
            ValueError, match=re.escape("x must be [any, 3, 8, 8], but got [1, 3, 16, 16]; Exact has only")
        ) as refused:
            frozen(image(1, 16))
        assert "given up after 60 seconds" in str(refused.value)
        assert "freeze the model again, on an example of this size" in str(refused.value)
    assert torch.equal(frozen(image(3)), model(image(3)))
    assert "given up after 60 seconds" in frozen.report().summary


def test_integers_are_inputs_too():
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            return self.fc(x.float()) * keep

    model = Looked().eval()
    x, keep = integers(3, 4).long(), integers(3, 2) > 0
    frozen = cnnfast.freeze(model, x[:1], keep[:1])
    torch.testing.assert_close(frozen(x, keep), model(x, keep).detach(), rtol=1e-6, atol=1e-6)
