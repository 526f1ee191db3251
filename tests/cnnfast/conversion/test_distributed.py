"""A converted model under DistributedDataParallel and fully_shard, in two processes."""

from __future__ import annotations

import json

import pytest

from tests.support.blocks import CONVOLUTIONS
from tests.support.processes import run_ranks

WORLD = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the processes found."""
    outputs = run_ranks("tests.support.distributed_steps", WORLD, tmp_path_factory.mktemp("processes"))
    return [json.loads(out.strip().splitlines()[-1]) for out in outputs]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_wrapped_models_train_as_the_original(wrapper, results):
    """After two steps the same parameters and buffers as without conversion, the same in both processes, by fused
    kernels.
    """
    for result in results:
        assert result[wrapper]["error"] < 1e-12
        assert result[wrapper]["moved"] > 1e-3
        assert result[wrapper]["first"] == results[0][wrapper]["first"]
        assert result[wrapper]["fused"] == 2 * CONVOLUTIONS


def test_accumulated_gradients_of_operators_that_training_has(results):
    """Under DistributedDataParallel with no_sync, in float16 by autocast."""
    for result in results:
        assert result["accumulated"] == {"error": 0, "of gram": 2, "of stem": 2}


@pytest.mark.parametrize(
    ("how", "blocks"),
    [
        ("ddp, converted", [3, 2]),
        ("by_block, converted", [3, 2]),
        ("by_block, of_ours", [3, 2]),
        ("by_convolution, converted", [2]),
    ],
)
def test_residual_blocks(how, blocks, results):
    """Of which two parts of a batch accumulate gradients: each is one operator, but for the one of which a convolution
    is wrapped by itself. Every tensor has moved, and to the same as without conversion.
    """
    for result in results:
        found = result["blocks"][how]
        assert found["error"] < 1e-11
        assert found["moved"] > 1e-4
        assert found["blocks"] == 2 * blocks
