"""The parts of the demo: data, network, training, layers to time, and the report of a small made-up result."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import cnnfast.nn as cnn
from cnnfast import backend, report, trace
from cnnfast.bench.providers import PROVIDERS, Kernels
from cnnfast.bench.shapes import LayerShape as BenchLayer
from cnnfast.checking import CheckReport, CheckRow, Comparison
from cnnfast.checking.capture import capture_calls
from cnnfast.conversion import ConversionReport
from cnnfast.conversion.rows import ConvolutionRow
from cnnfast.demo import (
    assortment,
    augmented,
    costs,
    digits,
    effort,
    findings,
    panels,
    photograph,
    plain,
    story,
    timing,
)
from cnnfast.demo.markdown import markdown
from cnnfast.demo.picture import Images, draw, picture
from cnnfast.demo.results import Augmentation, Conversion, Known, Maps, Proof, Results, Training, in_units
from cnnfast.measuring.budget import Budget
from cnnfast.measuring.machine import Peaks
from cnnfast.models import resnet50
from cnnfast.training import fit
from cnnfast.training.samples import open_images, split
from tests.support.child import run_compiled


def test_split_is_that_of_training_and_complete():
    """What is held out is prepared as the network learns it."""
    learnt, held_out = digits.load_digits(7)
    whole = open_images("digits", 8)
    assert torch.equal(held_out.rows, split(whole, digits.HELD_OUT, 7)[1])
    assert not torch.equal(digits.load_digits(8)[1].rows, held_out.rows)
    names = {learnt.name(i) for i in range(len(learnt))} | {whole.name(i) for i in held_out.rows.tolist()}
    assert (len(learnt), len(held_out), len(names)) == (1438, 359, 1797)
    assert torch.equal(held_out.labels, whole.labels[held_out.rows])
    pixels = torch.stack([whole[i].image for i in held_out.rows.tolist()])
    torch.testing.assert_close(held_out.images, pixels.permute(0, 3, 1, 2) / 127.5 - 1, rtol=0, atol=1e-6)
    assert (float(held_out.images.min()), float(held_out.images.max())) == (-1, 1)


def test_training_is_that_of_the_package_and_reproducible():
    """It leaves the network where it was, as it was but for its weights, and judges it by nothing that it learnt."""
    learnt, held_out = digits.load_digits(0)
    learnt = learnt.taken(torch.arange(640))
    runs, told = [], []
    with backend("torch"):
        for _ in range(2):
            network = digits.make_network(0)
            before = {name: t.stride() for name, t in network.state_dict().items()}
            run = digits.train(network, learnt, 3, 0, told.append)
            runs.append((network.state_dict(), digits.predict(network, held_out)))
        again = fit(digits.make_network(0), learnt, validation=0, epochs=3, progress=False)
    (weights, read), (same, read_again) = runs
    assert run.model is network
    assert run.accuracy is None
    assert not network.training
    assert {name: t.stride() for name, t in weights.items()} == before
    assert told == 2 * [epoch.loss for epoch in run.history]
    assert told[2] < 0.9 * told[0]
    assert torch.equal(read, read_again)
    assert all(torch.equal(t, same[name]) for name, t in weights.items())
    assert all(torch.equal(t, weights[name]) for name, t in again.model.state_dict().items())


def imported_with_the_network():
    import sys

    from cnnfast.demo import digits

    digits.make_network(0)
    return [name for name in ("lightning", "torchmetrics", "sklearn", "cnnfast.training") if name in sys.modules]


@pytest.mark.compiled
def test_the_network_alone_imports_nothing_that_trains():
    """Other commands take it as their example."""
    assert run_compiled(imported_with_the_network) == []


def test_the_network_is_built_on_this_package(device):
    network = digits.make_network(0).to(device).eval()
    with trace() as calls, torch.no_grad():
        assert network(torch.rand(2, 1, 8, 8, device=device)).shape == (2, 10)
    operations = [call.operation for call in calls]
    assert {call.served_by for call in calls} == {"kernels"}
    assert len(operations) == 8  # six convolutions, two of them with a residual; max pool; global mean


def test_the_plain_twin_reads_the_same_and_is_not_ours(device):
    """Statistics and weights are random: one that is not carried over shows."""
    network = digits.make_network(0).to(device).eval()
    with torch.no_grad():
        for t in network.state_dict().values():
            if t.is_floating_point():  # all but the norms' counts of batches
                t.uniform_(0.5, 1.5)
    twin = plain.plain_twin(network)
    assert {type(m).__module__.partition(".")[0] for m in twin.modules() if not list(m.children())} == {"torch"}
    images = torch.rand(2, 1, 8, 8, device=device)
    with torch.no_grad(), backend("torch"):
        torch.testing.assert_close(twin(images), network(images), rtol=1e-5, atol=1e-3)


def test_maps_and_converted_digits_are_computed_by_kernels(device):
    """Beside PyTorch's. A kernel that is wrong would make them wrong, not the sentences about them."""
    network, layers = digits.make_network(0).to(device).eval(), photograph.make_layers(0).to(device)
    x = photograph.normalized(photograph.load_photograph(16)).to(device)
    state = {name: t.clone() for name, t in layers.state_dict().items()}
    images, source = torch.rand(3, 1, 8, 8, device=device), augmented.load_source()[:, :, :12, :20].to(device)
    views = augmented.Views(2, 0)
    maps, found, (stem, block), run = story.compute(layers, x, network, images, views, source)()
    assert (maps.ok, maps.size) == (True, "16 x 16")
    assert maps.launches.count("conv_fprop_kernel") == 3
    assert "max_pool_kernel" in maps.launches
    assert (stem.shape, block.shape) == ((64, 8, 8), (64, 4, 4))
    assert 0 <= maps.errors[0] < 50
    assert all(torch.equal(t, state[name]) for name, t in layers.state_dict().items())
    assert found.ok
    assert (found.digits, found.same, found.report.count("fused")) == (3, 3, 6)
    assert found.launches.count("conv_fprop_kernel") == 6
    assert not dataclasses.replace(found, same=2).ok
    assert run.output.shape == (2, 3, augmented.SIZE, augmented.SIZE)
    assert run.launches == ["grey_mean_kernel", "augment_kernel"]
    seen, views = augmented.augmentation_of(source, 0, run, kernels=True)
    assert seen.ok
    assert (seen.count, seen.by_kernels, seen.launches) == (24, 2, run.launches)
    assert 0 < seen.apart < 0.1
    assert seen.milliseconds["cnn.Augment"] > 0
    assert views.shape == (24, 3, augmented.SIZE, augmented.SIZE)
    assert (float(views.min()), float(views.max())) >= (0, 0.5)
    assert not torch.equal(views[0], views[1])
    run.output[1, 0, 0, 0] += 0.01
    assert not augmented.augmentation_of(source, 0, run, kernels=True)[0].ok


def compiled_runs():
    import torch

    from cnnfast import convert
    from cnnfast.demo import by_kernels, digits, photograph, plain

    twin = plain.plain_twin(digits.make_network(0).eval())
    images, x = torch.rand(2, 1, 8, 8), photograph.normalized(torch.rand(1, 3, 16, 16))
    maps = photograph.BothMaps(photograph.make_layers(0))
    read, seen = by_kernels.start([(convert(twin), images), (maps, x)])()
    same = read.output.argmax(1).tolist() == twin(images).argmax(1).tolist()
    near = [torch.allclose(a, b, atol=1e-4) for a, b in zip(seen.output, maps(x), strict=True)]
    return [same, read.launches.count("conv_fprop_kernel"), near, seen.launches.count("conv_fprop_kernel")]


@pytest.mark.compiled
def test_networks_run_in_a_process_that_interprets():
    assert run_compiled(compiled_runs) == [True, 6, [True, True], 3]


def test_the_assortment_has_one_of_each_kind(device):
    layers = assortment.make_assortment(0).to(device)
    x = torch.rand(1, 3, assortment.SIZE, assortment.SIZE, device=device)
    with trace() as calls:
        assert layers(x).shape == (1, 2)
    assert {call.served_by for call in calls} == {"kernels"}
    assert [call.operation for call in capture_calls(layers, (x,), None)] == [
        "conv2d",
        *["conv_bn_act"] * 2,
        "conv_act",
        "bn_act",
        "conv_transpose2d",
        "batch_norm",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "conv1d",
    ]
    assert any("im2col" in kernel for kernel in calls.launches)


def test_photograph_goes_through_the_stem_and_a_block():
    image = photograph.load_photograph(64)
    assert image.shape == (1, 3, 64, 64)
    assert photograph.load_photograph(None).shape == (1, 3, 427, 640)
    assert 0 <= image.min() < 0.1
    assert 0.9 < image.max() <= 1
    with backend("torch"):
        assert photograph.make_layers(0)(photograph.normalized(image)).shape == (1, 64, 16, 16)
    assert torch.equal(photograph.centre(image, 4), image[:, :, 30:34, 30:34])


@pytest.mark.parametrize("verbose", [False, True])
def test_prove_judges_and_shows_tables_only_if_asked(device, verbose):
    telling, console = a_telling(verbose)
    layer = cnn.ConvBNAct(2, 3, 3).to(device)
    proof = story.prove("a layer", "layer", layer, torch.rand(1, 2, 5, 5, device=device), "float32", telling)
    assert proof.report.ok
    assert [row.operation for row in proof.report.rows] == ["conv_bn_act"]
    assert any("conv_fprop" in kernel for kernel in proof.launches)
    assert any("conv_wgrad" in kernel for kernel in proof.launches)
    assert all(c.largest > 0 for c in proof.report.rows[0].comparisons)
    shown = console.file.getvalue()
    assert ("conv_fprop" in shown) == ("largest errors against float64" in shown) == verbose


def a_telling(verbose: bool = False):
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=io.StringIO(), width=80)
    return story.Telling(Progress(console=console, disable=True), verbose), console


def test_resnet50_has_its_53_convolutions():
    layers = timing.convolutions()
    assert sum(layer.count for layer in layers) == 53
    assert len(set(map(str, layers))) == len(layers)
    parameters = sum(layer.count * layer.module.weight.numel() for layer in layers)
    assert parameters == 23_454_912
    flops = [
        layer.count * timing.directions(layer, torch.device("cpu"), 1, torch.float32)[0].work["operators"].flops
        for layer in layers
    ]
    assert sum(flops) == 2 * 4_087_136_256


def test_the_costliest_layers_come_first_and_both_directions_together():
    found = [
        (layer, timing.directions(layer, torch.device("cpu"), 1, torch.float32)) for layer in timing.convolutions()
    ]
    peaks = Peaks(8e14, 4e12)
    ordered = timing.costliest_first(found, peaks)
    costs = [sum(task.seconds(peaks) for task in tasks) for _, tasks in ordered]
    assert costs == sorted(costs, reverse=True)
    assert {tuple(task.job.mode for task in tasks) for _, tasks in ordered} == {
        ("forward", "backward"),
        ("forward", "wgrad"),
    }


@pytest.fixture
def two_layers(monkeypatch):
    """Of small sizes, by eager providers under the names of those that need a GPU, with the machine's peaks made up."""
    both = [
        BenchLayer("first", nn.Conv2d(3, 4, 3), 3, 8, ("forward", "wgrad")),
        BenchLayer("second", nn.Conv2d(4, 4, 1), 4, 9, ALL, 2),
    ]
    monkeypatch.setattr(timing, "convolutions", lambda: both)
    monkeypatch.setattr(timing, "BATCH", 2)
    monkeypatch.setattr(timing, "DTYPE", torch.float32)
    monkeypatch.setattr(timing, "measure_peaks", lambda device, dtype: Peaks(1e11, 1e10))
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    for name, like in ((timing.THEIRS, "eager"), (timing.OURS, "cnnfast")):
        monkeypatch.setitem(timing.PROVIDERS, name, dataclasses.replace(timing.PROVIDERS[like], name=name))
    return both


ALL = ("forward", "dgrad", "wgrad")


def test_layers_are_judged_and_timed_beside_pytorchs(two_layers):
    told = []
    with backend("torch"):
        found = timing.time_layers(torch.device("cpu"), Budget(), lambda *what: told.append(what))
    assert {t.layer: t.count for t in found} == {"first 3x8x8": 1, "second 4x9x9": 2}
    for t in found:
        assert min(t.forward, t.torch_forward, t.backward, t.torch_backward) > 0
        assert t.right
        assert t.cells[-1] == "ok"
        assert len(t.cells) == len(timing.HEADING)
    assert told[-1][:2] == (4, 4)


def test_a_wrong_layer_gets_no_time_and_fails_the_demo(two_layers, monkeypatch):
    class Halved(type(timing.PROVIDERS["eager"])):
        def network(self, job):
            network = super().network(job)
            network.weight.data /= 2
            return network

    monkeypatch.setitem(timing.PROVIDERS, timing.OURS, Halved(timing.OURS, "", baseline=False, ours=True))
    with backend("torch"):
        found = timing.time_layers(torch.device("cpu"), Budget(), lambda *what: None)
    assert {t.forward for t in found} == {None}
    assert all(t.torch_forward and "off by" in t.problem and t.cells[-1].startswith("FAIL") for t in found)
    results = made_up()
    results.timings = found
    assert not results.ok


def test_layers_that_do_not_fit_are_named_in_every_report(two_layers, tmp_path):
    with backend("torch"):
        found = timing.time_layers(torch.device("cpu"), Budget(1e-9), lambda *what: None)
    assert {t.left_out for t in found} == {"the budget of 1e-09 s was spent"}
    results = made_up()
    results.timings += found
    named = {"first 3x8x8", "second 4x9x9", "the budget of 1e-09 s was spent"}
    assert results.ok
    assert all(name in results.left_out for name in named)
    assert results.left_out in markdown(results, "demo.png")
    assert json.loads(results.to_json())["left_out"] == results.left_out
    assert made_up().left_out == ""
    pictures = []
    for each in (made_up(), results):
        draw(each, images(), tmp_path / "demo.png")
        pictures.append((tmp_path / "demo.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_the_timing_names_whose_kernels_it_times():
    assert isinstance(PROVIDERS[timing.OURS], Kernels)
    assert PROVIDERS[timing.THEIRS].graph
    assert PROVIDERS[timing.THEIRS].baseline
    assert "our kernels alone" in timing.CONDITIONS


RESNET50 = costs.costs_of(resnet50, "ResNet-50")


TIMES = {"cnn.Augment": 12.3, "torchvision": 45.6}


def made_up(ok: bool = True) -> Results:
    errors = [
        Comparison("output", 1e-6, 2e-6, 4e-6, largest=2.0),
        Comparison("grad of weight", 3e-6, 2e-6, 4e-6, largest=8.0),
    ]
    stem = CheckRow(
        "stem",
        "conv_bn_act",
        "1x3x8x8 4x3x3x3",
        "float32",
        "ok",
        "",
        ["conv_fprop_kernel [64x32]"],
        ["conv_wgrad_kernel"],
        errors,
    )
    exact = Comparison("output", limit=1e-7, largest=1.0)
    pool = CheckRow("pool", "max_pool2d", "1x4x8x8", "float32", "ok", "", ["max_pool_kernel"], [], [exact])
    if not ok:
        pool.verdict, pool.reason = "FAIL", "it | broke"
    converted = ConversionReport(
        [ConvolutionRow("conv", "Conv2d", "fused", "conv + bn", 90, True)], [], 100, None, None, "", []
    )
    return Results(
        {"torch": "2.x+cpu", "triton": "3.x", "GPU": "none"},
        Training(3, 1437, 360, [2.0, 0.5], [(17, 8, 1)], "PyTorch", 12.0),
        effort.QUICK,
        Maps("9 x 12", [exact, errors[0]], ["conv_fprop_kernel"]),
        [Proof("photograph, small", "photograph", "float32", CheckReport([stem, pool]), 5.0)],
        Conversion(16, 16, ["conv_fprop_kernel"], converted),
        Augmentation(24, 96, 2, ["grey_mean_kernel", "augment_kernel"], 0.004, TIMES, "PyTorch's operators"),
        Known("a known model", converted),
        RESNET50,
        [timing.Timing("a layer", 2, 0.1, 0.2, 0.3, 0.4)],
        "conditions",
        20.0,
    )


def test_units_are_last_places_of_the_largest_value():
    assert in_units(3 * 2.0**-23, 1.0, "float32") == 3
    assert in_units(2.0**-8, 4.0, "bfloat16") == 2.0**-8 / (4 * 2.0**-7)
    assert in_units(2.0**-10, 1.0, "tf32") == 1
    assert in_units(0.0, 0.0, "float32") == 0
    assert in_units(1.0, 0.0, "float32") == float("inf")
    results = made_up()
    eps = torch.finfo(torch.float32).eps
    assert results.worst(backward=False) == (1e-6 / (2 * eps), 2e-6 / (2 * eps))
    assert results.worst(backward=True) == (3e-6 / (8 * eps), 2e-6 / (8 * eps))
    assert results.maps is not None
    assert results.maps.errors == results.worst(backward=False)


def said(found: list[findings.Told]) -> list[str]:
    return [line for each in found for line in each.lines()]


def test_the_story_is_about_twenty_lines_of_eighty_columns():
    """Of whatever there is to say: with what --quick leaves out, and with times."""
    results = made_up()
    lines = [results.effort.duration, *said(findings.all_of(results)), *said(findings.of_end(results, Path("report")))]
    text = " ".join(" ".join(lines).split())
    assert len(lines) <= 21
    assert max(map(len, lines)) <= 80
    for expected in (
        "359 of 360 unseen digits read right: 99.7% (wanted: 97%)",
        "forward: ours at most 4.2 ulp from float64, PyTorch's own 8.4",
        "backward: ours at most 3.1 ulp from float64, PyTorch's own 2.1",
        "1 ulp is the last place of the largest value in a tensor (float32)",
        "2 of 2 checks hold",
        "16 of 16 read as by PyTorch",
        "24 views of the photograph by 2 launches of our kernels",
        "12 ms by PyTorch's operators; 46 ms by torchvision, image by image",
        "a known model: 1 of 1 convolutions fused, 90.0% of FLOPs",
        "25,557,032 parameters, 8.2 GFLOPs an image (computed, not measured)",
        "left out by --quick: half the epochs",
        "faster than PyTorch's in 1 of 1 convolutions",
        "everything holds (20 s)",
    ):
        assert expected in text


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_an_effort_says_how_long_it_takes_and_what_it_leaves_out(gpu, quick):
    chosen = effort.effort_for(gpu, quick)
    assert chosen.duration.startswith("This takes ")
    assert ("minute" in chosen.duration) != gpu
    assert ("not measured" in chosen.duration) == gpu
    assert len(chosen.duration) <= 80
    assert bool(chosen.left_out) == quick
    whole = effort.effort_for(gpu, False)
    assert chosen.epochs <= whole.epochs
    assert set(chosen.dtypes) <= set(whole.dtypes)
    assert chosen.budget <= whole.budget


def test_what_failed_is_said_first():
    wrong = made_up(ok=False)
    assert "1 of 2 checks FAIL: the report names them, and why" in str(findings.of_errors(wrong)[-1])
    assert "FAILED: judged (20 s)" in str(findings.of_end(wrong, Path("x"))[-1])
    assert wrong.maps is not None
    wrong.maps.comparisons[0].error = 1.0
    assert not wrong.maps.ok
    assert "which is WRONG" in str(findings.of_maps(wrong))
    assert wrong.augmentation is not None
    wrong.augmentation.apart = 3.2
    assert "which are WRONG by up to 3.2 of 255 levels" in str(findings.of_augmentation(wrong))
    assert wrong.failed == ["photograph", "judged", "augment"]
    assert json.loads(wrong.to_json())["failed"] == wrong.failed


def test_report_as_markdown_and_json():
    text, data = markdown(made_up(), "demo.png"), json.loads(made_up().to_json())
    assert text.index("- errors: forward: ours at most 4.2 ulp from float64") < text.index("## ")
    assert "99.7%" in text
    assert "| 17 | 8 | 1 |" in text
    assert "| stem | conv_bn_act | 1x3x8x8 4x3x3x3 | 4.2, 8.4, 17 | 3.1, 2.1, 4.2 | ok |" in text
    assert "`conv_fprop_kernel [64x32]` | 1 |" in text
    assert "| a layer | 2 | 0.100 | 0.200 | 0.300 | 0.400 | ok |" in text
    assert "| layer1.0.conv2 | 14.80 | 0.039 | 49.1 | 98.0 | 49.1 |" in text
    assert data["ok"]
    assert data["training"]["accuracy"] == 359 / 360
    assert data["proofs"][0]["check"]["rows"][0]["layer"] == "stem"
    assert data["proofs"][0]["check"]["rows"][0]["comparisons"][0]["largest"] == 2.0
    assert data["proofs"][0]["launches"]["max_pool_kernel"] == 1
    assert data["errors"]["unit"].startswith("ulp: ")
    assert data["errors"]["forward"]["ours"] == pytest.approx(4.19, abs=0.01)
    assert data["maps"]["ok"]
    assert "24 views of 96 x 96 pixels each" in text
    assert "The first 2 were computed by our kernels too: they differ by at most 0.004 levels." in text
    assert "| torchvision | 45.6 |" in text
    assert "| `augment_kernel` | once a batch |" in text
    assert data["augmentation"]["ok"]
    assert data["augmentation"]["launches"] == ["grey_mean_kernel", "augment_kernel"]
    assert data["augmentation"]["milliseconds"] == TIMES
    assert data["known"]["name"] == "a known model"
    assert data["costs"]["parameters"] == 25_557_032
    assert data["costs"]["computed"] == "from shapes, not measured"
    assert data["effort"]["left_out"]


def test_report_of_a_failure():
    results = made_up(ok=False)
    text = markdown(results, "demo.png")
    assert not results.ok
    assert "FAILED" in text
    assert "it | broke" in text
    results = made_up()
    results.training.mistakes *= 12
    assert not results.ok


def test_costs_are_those_of_the_shapes():
    """Of one convolution by hand, and of the whole of ResNet-50 by what is known of it."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()
            self.head = nn.Linear(3, 5)

        def forward(self, x):
            return self.head(self.relu(self.norm(self.conv(x)) + x).mean((2, 3)))

    found = costs.costs_of(Small, "small", batch=2)
    image, vector = 2 * 3 * 224 * 224, 3 * 2  # elements of an image, bytes of a parameter of the norm
    conv, mean, head = found.layers
    assert (conv.name, head.name) == ("conv", "head")
    assert (conv.flops, conv.bytes) == (2 * 3 * image, 2 * (2 * image + 9))
    assert conv.pointwise_flops == (2 + 1 + 1) * image
    assert conv.pointwise_bytes == 2 * (2 + 3 + 2) * image + 4 * vector
    assert conv.fused_bytes == 2 * (2 * image + 9) + 4 * vector + 2 * image  # weights, norm and the addend are read
    assert mean.fused_bytes == mean.bytes == 2 * (image + 2 * 3)
    assert found.parameters == 9 + 6 + 20
    whole = made_up().costs
    assert whole is not None
    assert sum(layer.flops for layer in whole.layers) == 64 * 2 * 4_089_184_256  # torchvision's figure, twice
    assert sum(layer.name != "mean" and "pool" not in layer.name for layer in whole.layers) == 54
    with torch.device("meta"):
        model, x = resnet50().bfloat16().eval(), torch.empty(64, *costs.IMAGE, dtype=torch.bfloat16)
    counted = report(model, x)  # which counts modules and fused steps, not operators
    assert counted.total_bytes is not None
    assert counted.saved_bytes is not None
    assert whole.fused_bytes == counted.total_bytes
    assert whole.unfused_bytes == counted.total_bytes + counted.saved_bytes
    assert sum(whole.pointwise) < 1


def test_report_without_triton():
    results = made_up()
    results.proofs, results.timings = [], []
    assert results.conversion is not None
    results.conversion.launches = []
    assert not results.ok  # kernels could have run
    results.conversion.kernels = False
    assert results.augmentation is not None
    results.augmentation.launches = []
    assert not results.ok
    results.augmentation.kernels = False
    assert results.ok
    assert "by PyTorch: no kernel ran" in str(findings.of_augmentation(results))
    text = markdown(results, "demo.png")
    assert "no kernel ran" in text
    assert "none was judged" in text


def images() -> Images:
    read = torch.arange(20) % 10
    shown = digits.Digits(torch.rand(20, 1, 8, 8), read.roll(1), torch.arange(20))
    views = torch.rand(23, 3, 6, 6)
    return Images(torch.rand(3, 9, 12), torch.rand(16, 4, 5), torch.rand(16, 2, 3), views, shown, read)


@pytest.fixture
def shown():
    return images()


def texts(figure) -> list[str]:
    """Headlines and labels of a figure and of all figures in it."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("timings", [0, 1])
@pytest.mark.parametrize("proofs", [0, 2])
def test_picture(tmp_path, shown, proofs, timings):
    """It is not blank, its titles are findings and its axes name their units; what is not there is said."""
    from matplotlib.image import imread

    results = made_up()
    results.timings = results.timings[:timings]
    checked = results.proofs[0].report
    results.proofs = [Proof(f"subject {i}", f"subject {i}", "float32", checked, 1.0) for i in range(proofs)]
    draw(results, shown, tmp_path / "demo.png")
    pixels = imread(tmp_path / "demo.png")
    assert pixels.shape[1] == 1300
    assert pixels.shape[0] > 1000
    assert pixels[..., :3].std() > 0.1
    written = " ".join(texts(picture(results, shown)))
    assert "Our kernels computed these feature maps" in written
    assert "augmented 24 times by cnn.Augment: our kernels take 2 launches for the batch" in written
    assert "359 of 360 unseen digits are read right (99.7%)" in written
    assert "71% of its bytes: fused, it moves 65% less" in written
    assert "share of all FLOPs, %" in written
    assert "share of all bytes, %" in written
    assert (panels.ERRORS_AXIS in written) == bool(proofs)
    assert ("all 4 checks hold" if proofs else "no kernel ran") in written
    assert ("milliseconds of one call, measured" in written) == bool(timings)
    assert ("Times are not measured without a GPU" in written) != bool(timings)


def test_the_picture_says_what_failed(shown):
    results = made_up(ok=False)
    assert results.maps is not None
    results.maps.comparisons[0].message = "not finite"
    assert results.augmentation is not None
    results.augmentation.apart = 3.2
    written = " ".join(texts(picture(results, shown)))
    assert "1 of 2 checks FAIL" in written
    assert "pool: max pool FAIL" in written
    assert "These feature maps are WRONG" in written
    assert "hold" not in written
    assert "These views are WRONG: our kernels are 3.2 of 255 levels from PyTorch's operators" in written
    assert "read 0, is 9" in written


def test_errors_stand_on_a_logarithmic_axis_beside_the_limit(shown):
    figure = picture(made_up(), shown)
    (forward,) = [axes for part in figure.subfigs for axes in part.axes if axes.get_title("left") == "forward: results"]
    assert forward.get_xscale() == "symlog"
    assert [label.get_text() for label in forward.get_yticklabels()] == [
        "photograph · stem: 3x3 conv + norm + act",
        "photograph · pool: max pool",
    ]
    marks = {
        (line.get_marker(), round(float(line.get_xdata()[0]), 2)) for line in forward.lines if line.get_ydata()[0] == 0
    }
    assert marks >= {("o", 4.19), ("D", 8.39), ("|", 16.78)}
