"""The parts of the demo: data, network, training, layers to time, and the report of a small made-up result."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from torch import nn

import cnnfast.nn as cnn
from cnnfast import backend, trace
from cnnfast.bench.providers import PROVIDERS, Kernels
from cnnfast.bench.shapes import LayerShape as BenchLayer
from cnnfast.checking import CheckReport, CheckRow, Comparison
from cnnfast.demo import digits, photograph, plain, story, timing
from cnnfast.demo.markdown import markdown
from cnnfast.demo.picture import Images, draw
from cnnfast.demo.results import Proof, Results, Training
from cnnfast.measuring.budget import Budget
from cnnfast.measuring.machine import Peaks
from tests.support.child import run_compiled


def test_split_is_seeded_disjoint_and_complete():
    training, held_out = digits.load_digits(7)
    assert torch.equal(digits.load_digits(7)[1].rows, held_out.rows)
    assert not torch.equal(digits.load_digits(8)[1].rows, held_out.rows)
    assert sorted([*training.rows.tolist(), *held_out.rows.tolist()]) == list(range(1797))
    assert len(held_out) == digits.HELD_OUT
    assert held_out.images.shape == (digits.HELD_OUT, 1, 8, 8)
    assert (float(held_out.images.min()), float(held_out.images.max())) == (0, 1)
    assert set(held_out.labels.tolist()) == set(range(10))


def test_shift_moves_each_image_by_at_most_a_pixel():
    image = torch.zeros(50, 1, 8, 8)
    image[:, :, 4, 4] = 1
    moved = digits.shifted(image, torch.Generator().manual_seed(0))
    places = {tuple(place[2:]) for place in moved.nonzero().tolist()}
    assert moved.sum() == 50
    assert places == {(h, w) for h in (3, 4, 5) for w in (3, 4, 5)}


def test_training_reduces_the_loss_and_is_reproducible():
    part, held_out = digits.load_digits(0)
    part = digits.Digits(part.images[:640], part.labels[:640], part.rows[:640])
    runs = []
    with backend("torch"):
        for _ in range(2):
            network = digits.make_network(0)
            losses = digits.train(network, part, 2, 0)
            runs.append((losses, digits.predict(network, held_out)))
    (losses, read), (again, read_again) = runs
    assert losses == again
    assert torch.equal(read, read_again)
    assert losses[1] < 0.9 * losses[0]
    assert not network.training


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


def test_converted_digits_are_read_by_kernels(device):
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    console = Console(file=io.StringIO(), width=120)
    with Progress(TextColumn("{task.description}"), console=console) as bars:
        found = story.convert_digits(
            digits.make_network(0).to(device).eval(), torch.rand(3, 1, 8, 8, device=device), bars
        )
    assert found.ok
    assert (found.digits, found.same, found.report.count("fused")) == (3, 3, 6)
    assert found.launches.count("conv_fprop_kernel") == 6
    assert "6 of 6 convolutions fused" in console.file.getvalue()
    assert not dataclasses.replace(found, same=2).ok


def compiled_reading():
    import torch

    from cnnfast import convert
    from cnnfast.demo import digits, plain

    twin = plain.plain_twin(digits.make_network(0).eval())
    images = torch.rand(2, 1, 8, 8)
    read, launches = plain.read(convert(twin), images)
    return [read == twin(images).argmax(1).tolist(), launches.count("conv_fprop_kernel")]


@pytest.mark.compiled
def test_converted_digits_are_read_in_a_process_that_interprets():
    assert run_compiled(compiled_reading) == [True, 6]


def test_photograph_goes_through_the_stem_and_a_block():
    image = photograph.load_photograph(64)
    assert image.shape == (1, 3, 64, 64)
    assert photograph.load_photograph(None).shape == (1, 3, 427, 640)
    assert 0 <= image.min() < 0.1
    assert 0.9 < image.max() <= 1
    with backend("torch"):
        assert photograph.make_layers(0)(photograph.normalized(image)).shape == (1, 64, 16, 16)
    assert torch.equal(story.centre(image, 4), image[:, :, 30:34, 30:34])


def test_prove_shows_errors_and_launches(device):
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    console = Console(record=True, width=120, quiet=True)
    with Progress(TextColumn("{task.description}"), console=console) as bars:
        layer = cnn.ConvBNAct(2, 3, 3).to(device)
        proof = story.prove("a layer", layer, torch.rand(1, 2, 5, 5, device=device), "float32", bars)
    assert proof.report.ok
    assert [row.operation for row in proof.report.rows] == ["conv_bn_act"]
    assert any("conv_fprop" in kernel for kernel in proof.launches)
    assert any("conv_wgrad" in kernel for kernel in proof.launches)


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


def made_up(ok: bool = True) -> Results:
    errors = [Comparison("output", 1e-6, 2e-6, 4e-6), Comparison("grad of weight", 3e-6, 2e-6, 4e-6)]
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
    pool = CheckRow(
        "pool", "max_pool2d", "1x4x8x8", "float32", "ok", "", ["max_pool_kernel"], [], [Comparison("output")]
    )
    if not ok:
        pool.verdict, pool.reason = "FAIL", "it | broke"
    training = Training(3, 1437, 360, [2.0, 0.5], [(17, 8, 1)], "PyTorch", 12.0)
    times = [timing.Timing("a layer", 2, 0.1, 0.2, 0.3, 0.4)]
    return Results(
        {"torch": "2.x"},
        training,
        [Proof("photograph", "float32", CheckReport([stem, pool]), 5.0)],
        times,
        "conditions",
        20.0,
    )


def test_report_as_markdown_and_json():
    text, data = markdown(made_up(), "demo.png"), json.loads(made_up().to_json())
    assert "99.7%" in text
    assert "| 17 | 8 | 1 |" in text
    assert "| stem | conv_bn_act | 1x3x8x8 4x3x3x3 | 1.0e-06 | 2.0e-06 | 3.0e-06 | 2.0e-06 | ok |" in text
    assert "`conv_fprop_kernel [64x32]` | 1 |" in text
    assert "| a layer | 2 | 0.100 | 0.200 | 0.300 | 0.400 | ok |" in text
    assert data["ok"]
    assert data["training"]["accuracy"] == 359 / 360
    assert data["proofs"][0]["check"]["rows"][0]["layer"] == "stem"
    assert data["proofs"][0]["launches"]["max_pool_kernel"] == 1


def test_report_of_a_failure():
    results = made_up(ok=False)
    text = markdown(results, "demo.png")
    assert not results.ok
    assert "FAILED" in text
    assert "it | broke" in text
    results = made_up()
    results.training.mistakes *= 12
    assert not results.ok


def test_report_without_triton():
    results = made_up()
    results.proofs, results.timings = [], []
    assert "no kernel ran" in markdown(results, "demo.png")


def images() -> Images:
    read = torch.arange(20) % 10
    return Images(torch.rand(3, 9, 12), torch.rand(16, 4, 5), "PyTorch", torch.rand(20, 8, 8), read.roll(1), read)


@pytest.mark.parametrize("timings", [0, 1])
@pytest.mark.parametrize("proofs", [0, 2])
def test_picture(tmp_path, proofs, timings):
    results = made_up()
    results.timings = results.timings[:timings]
    results.proofs = [Proof(f"subject {i}", "float32", results.proofs[0].report, 1.0) for i in range(proofs)]
    draw(results, images(), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
