"""A converted model under DistributedDataParallel and fully_shard, in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch.distributed

from tests.support.blocks import CONVOLUTIONS
from tests.support.child import IMPORTABLE

WORLD = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the processes found."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch is built without gloo")
    meet = tmp_path_factory.mktemp("processes") / "meet"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, IMPORTABLE), os.environ.get("PYTHONPATH", "")]),
    }
    commands = [
        [sys.executable, "-m", "tests.support.distributed_steps", str(rank), str(WORLD), str(meet)]
        for rank in range(WORLD)
    ]
    children = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    try:
        outputs = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (out, error) in zip(children, outputs, strict=True):
        assert child.returncode == 0, f"{out[-2000:]}\n{error[-6000:]}"
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]


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
