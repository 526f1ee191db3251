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
