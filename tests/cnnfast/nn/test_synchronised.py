"""SyncBatchNorm on two and three processes (tests/support/synchronised_steps.py) against one process that has the whole
batch, with PyTorch's plain batch norm in float64.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnnfast
import cnnfast.nn as cnn
from cnnfast_kernels.batchnorm import batch_moments, combine_ranks
from tests.support.agreement import normal
from tests.support.blocks import CHANNELS, build
from tests.support.processes import run_ranks
from tests.support.synchronised_steps import (
    NORMS,
    Preactivated,
    Residual,
    ResidualBlock,
    images,
    model_steps,
    norm_of,
    part,
    timm_model,
)

HAS_TIMM = importlib.util.find_spec("timm") is not None
CASES = (
    "norms",
    "models",
    "preactivated",
    "blocks",
    "frozen_input",
    "errors",
    "alone",
    "compiled",
    *["timms"] * HAS_TIMM,
)
PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
GATHER, REDUCE = ({"all_gather_single", "all_gather_into_tensor"}, {"all_reduce"})


def ranks(folder: Path, world: int, *cases: str) -> list[dict[str, Any]]:
    run_ranks("tests.support.synchronised_steps", world, folder, *cases)
    return [torch.load(folder / f"meet.{rank}", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    pytest.importorskip("triton")
    return ranks(tmp_path_factory.mktemp("two"), 2, *CASES)


def whole(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What one process with the whole batch finds, by PyTorch's plain batch norm. dx and z are of all images."""
    counts, axes, given, layout, options = NORMS[name]
    norm = PLAIN[axes](CHANNELS, **options).to(torch.float32 if dtype == torch.float16 else dtype)
    norm.load_state_dict(norm_of(options, given).state_dict())
    found: dict[str, Tensor] = {}
    for step in range(2):
        norm.zero_grad()
        parts = [part(count, axes, rank, step) for rank, count in enumerate(counts)]
        # the same numbers as the processes have, which round them
        x, dz = (torch.cat([p[i].to(given) for p in parts]).to(dtype).contiguous(memory_format=layout) for i in (0, 1))
        z = norm(x.requires_grad_())
        z.backward(dz)
        assert x.grad is not None
        found = {"z": z.detach(), "dx": x.grad}
    grads = {f"gradient of {key}": p.grad for key, p in norm.named_parameters() if p.grad is not None}
    return found | grads | dict(norm.named_buffers())


def assert_as_good(mine: Tensor, torchs: Tensor, exact: Tensor, name: str) -> None:
    """No further from float64 than twice PyTorch's own error, plus a few units of the largest value."""
    assert mine.shape == exact.shape, name
    if not exact.is_floating_point():
        assert torch.equal(mine, exact), name
        return
    unit = (32 if torchs.dtype == torch.float64 else 4) * torch.finfo(torchs.dtype).eps
    error, allowed = ((t.double() - exact).abs().max() for t in (mine, torchs))
    assert error <= 2 * allowed + unit * exact.abs().max(), f"{name}: {error:.3g}, PyTorch's {allowed:.3g}"


@pytest.mark.parametrize("name", NORMS)
def test_ranks_train_as_one_process_with_the_whole_batch(name, two):
    """Outputs and dx of each rank, gradients of weight and bias summed over the ranks, and all buffers."""
    found = [of_rank["norms"][name] for of_rank in two]
    dtype = NORMS[name][2]
    torchs, exact = whole(name, dtype), whole(name, torch.float64)
    for key, judge in exact.items():
        parts = [of_rank[key] for of_rank in found]
        if key in ("z", "dx"):
            assert [len(t) for t in parts] == list(NORMS[name][0])
            assert {t.dtype for t in parts} == {dtype}
            mine = torch.cat(parts)
        elif key.startswith("gradient"):
            mine = torch.stack(parts).double().sum(0)
        else:
            assert torch.equal(*parts), f"{key} has the same bits on both ranks"
            mine = parts[0]
        assert_as_good(mine, torchs[key], judge, key)


@pytest.mark.parametrize("name", NORMS)
def test_layouts_and_empty_parts(name, two):
    for rank, count in enumerate(NORMS[name][0]):
        found = two[rank]["norms"][name]
        z, dx, x = found["strides"]
        if count:  # else PyTorch's own result is not laid out as its input
            assert z == dx == x
        else:
            for key in ("gradient of weight", "gradient of bias"):
                assert torch.equal(found[key], torch.zeros(CHANNELS, dtype=found[key].dtype))


@pytest.mark.parametrize("name", NORMS)
def test_one_gather_forward_and_one_reduction_backward(name, two):
    """In each of two steps; without gradients the gather alone, in eval nothing. Every step is listed, and ours."""
    for of_rank in two:
        found = of_rank["norms"][name]
        assert set(found["collectives"]) - GATHER == REDUCE
        assert list(found["collectives"].values()) == [2, 2]
        assert list(found["collectives without gradients"].values()) == [1]
        assert set(found["collectives without gradients"]) < GATHER
        assert found["collectives in eval"] == {}
        assert found["operations"] == 2 * [
            *("batch_moments", "combine_ranks", "normalize", "gradient_sums", "apply_sums"),
        ]
        assert found["served by"] == ["kernels"]


@pytest.mark.parametrize(
    ("name", "model"),
    [("models", Residual), ("preactivated", Preactivated), ("blocks", ResidualBlock), ("timms", timm_model)],
)
def test_converted_models_under_distributed_data_parallel(name, model, two):
    """As one process that trains the original on the whole batch: parameters and buffers after two steps."""
    if name == "timms" and not HAS_TIMM:
        pytest.skip("timm is not installed")
    original = build(model).train()
    right = model_steps(original, [torch.cat([images(rank, step) for rank in (0, 1)]) for step in range(2)])
    found = [of_rank[name] for of_rank in two]
    for key, judge in right.items():
        parts = [of_rank[key] for of_rank in found]
        mine = torch.cat(parts) if key == "y" else parts[0]
        torch.testing.assert_close(mine, judge, rtol=1e-11, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")
        assert key == "y" or torch.equal(*parts), key


def test_synchronised_groups_are_fused_in_training(two):
    """Convolution with statistics, then one pass that normalises, adds and activates; nothing by PyTorch."""
    for of_rank in two:
        found = of_rank["models"]
        assert found["operations"].items() >= {"conv_stats": 6, "normalize": 6, "combine_ranks": 6}.items()
        assert not {"batch_moments", "update_running", "conv_fprop"} & set(found["operations"])
        assert found["served by"] == ["kernels"]
        assert {"stem.0", "conv", "conv2"} <= found["fused"].keys()
        assert found["gathered"] == 6


def test_a_residual_block_with_synchronised_norms_is_called_by_its_layers(two):
    """Each of them exchanges its statistics, and every convolution is fused with its norm."""
    for of_rank in two:
        found = of_rank["blocks"]
        assert found["operations"].items() >= {"conv_stats": 6, "normalize": 6, "combine_ranks": 6}.items()
        assert "update_running" not in found["operations"]
        assert found["gathered"] == 6


def test_a_synchronised_norm_and_the_activation_after_it_are_one_step(two):
    for of_rank in two:
        found = of_rank["preactivated"]
        assert found["operations"].items() >= {"batch_moments": 4, "normalize": 4, "combine_ranks": 4}.items()
        assert found["served by"] == ["kernels"]
        assert found["gathered"] == 4
        assert found["fused"] == {"bn": "bn + relu", "bn2": "bn2 + hardswish"}


@pytest.mark.skipif(not HAS_TIMM, reason="timm is not installed")
def test_timms_norm_is_fused_with_an_activation_that_kernels_know(two):
    for of_rank in two:
        found = of_rank["timms"]["operations"]
        assert found["conv_stats"] == found["batch_moments"] == 2, "SiLU with its convolution, and Sigmoid's norm alone"


def test_a_rank_whose_input_wants_no_gradient_joins(two):
    """The other one waits for its sums, and the gradients are those of the whole batch."""
    parts = [part(2, 4, rank, 0) for rank in (0, 1)]
    norm = nn.BatchNorm2d(CHANNELS).double()
    norm.load_state_dict(norm_of({}, torch.float64).state_dict())
    x = torch.cat([x for x, _ in parts]).requires_grad_()
    norm(x).backward(torch.cat([dz for _, dz in parts]))
    found = [of_rank["frozen_input"] for of_rank in two]
    assert found[0]["dx"] is None
    torch.testing.assert_close(found[1]["dx"], x.grad[2:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0]["weight"] + found[1]["weight"], norm.weight.grad, rtol=1e-12, atol=1e-12)
    assert [of_rank["collectives"]["all_reduce"] for of_rank in found] == [1, 1]


def test_what_is_refused_is_refused_on_every_rank_before_anything_is_exchanged(two):
    errors = {
        "axes": "ValueError: expected at least 2D input (got 1D input)",
        "channels": "RuntimeError: batch_norm(): running_mean must have size [3]",
        "no channels": "ValueError: SyncBatchNorm number of input channels should be non-zero",
        "dtype": "RuntimeError: batch_norm(): running_mean must have input's dtype torch.float32",
        "eps": "ValueError: batch_norm(): eps must be positive in training",
        "residual": "ValueError: conv_bn_act(): residual must be the output's size",
        "group": "TypeError: conv_bn_act(): process_group must be None or a group of torch.distributed",
        "running statistics": "ValueError: conv_bn_act(): running_mean and running_var must either both be None",
        "by PyTorch": "ValueError: SyncBatchNorm expected input tensor to be on GPU",
        "under vmap": "ValueError: SyncBatchNorm expected input tensor to be on GPU",
        "second derivative": "trying to differentiate twice a function that was marked with @once_differentiable",
    }
    for of_rank in two:
        found = of_rank["errors"]
        assert found["exchanged"] == {}
        assert found["errors"].keys() == errors.keys()
        for name, text in errors.items():
            assert found["errors"][name].startswith(text)


def test_what_looks_at_a_model_waits_for_nobody(two):
    """report, check and what tune and warm run, on one of two ranks; kernels for the step over ranks are seen."""
    found = two[0]["alone"]
    assert found["collectives"] == {}
    assert found["fused"] == 3
    assert found["checked"], found["text"]
    assert {"combine_ranks", "gradient_sums", "apply_sums"} <= set(found["operators"])


def test_compiled_models_train_as_they_are(two):
    """torch.compile breaks its graph at each synchronised norm."""
    for of_rank in two:
        found = of_rank["compiled"]
        for key, right in found["eager"].items():
            torch.testing.assert_close(found["compiled"][key], right, rtol=1e-12, atol=1e-12)


def test_three_ranks_in_their_order_and_groups_of_some(tmp_path):
    """The same bits on each, and those that the ranks' moments give in their order; a group of the first and the last,
    beside which the second is alone.
    """
    pytest.importorskip("triton")
    found = [of_rank["three"] for of_rank in ranks(tmp_path, 3, "three")]

    def told(x: Tensor) -> Tensor:
        return torch.cat([*batch_moments(x), torch.full((1,), float(x.numel() // CHANNELS))])

    for prefix, members in (("", [0, 1, 2]), ("pair ", [0, 2]), ("pair ", [1])):
        mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
        combine_ranks(torch.stack([told(found[rank]["x"]) for rank in members]), mean, var, 0.1)
        for rank in members:
            assert torch.equal(found[rank][f"{prefix}running_mean"], mean)
            assert torch.equal(found[rank][f"{prefix}running_var"], var)


# ----------------------------------------------------------------------------------------------------------------------
# One process


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape", [(5, CHANNELS), (3, CHANNELS, 4), (2, CHANNELS, 3, 4), (2, CHANNELS, 2, 3, 2)], ids=str
)
def test_without_a_process_group_it_is_batch_norm(shape, training, device):
    theirs = norm_of({}, torch.float64).to(device).train(training)
    ours = cnnfast.convert(norm_of({}, torch.float64).to(device)).train(training)
    assert type(ours) is cnn.SyncBatchNorm
    assert isinstance(ours, nn.SyncBatchNorm)
    assert repr(ours) == repr(theirs)
    x, dz = (normal(*shape, seed=seed).to(device) for seed in (0, 1))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with cnnfast.trace() as trace:
        z = ours(inputs[0])
    assert {call.served_by for call in trace} == {"kernels"}
    right = theirs(inputs[1])
    torch.testing.assert_close(z, right, rtol=1e-12, atol=1e-12)
    for t in (z, right):
        t.backward(dz)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-11, atol=1e-11)
    for (key, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")
    assert type(cnnfast.revert(ours)) is nn.SyncBatchNorm


def test_one_value_is_refused_without_other_ranks(device):
    norm = cnnfast.convert(norm_of({}, torch.float64).to(device))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.ones(1, CHANNELS, dtype=torch.float64, device=device))
