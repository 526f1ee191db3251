"""One of several processes that train a model, given and converted, under PyTorch's wrappers: gloo, on the CPU, in the
interpreter.

    python distributed_steps.py RANK WORLD FILE

FILE is where the processes meet. Prints as JSON what test_conversion_distributed.py asks for.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # wrappers and interpreter find the CPU alone, also where there is a GPU

import copy
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import cnnfast
from cnnfast.functional import blocks, fused
from cnnfast.ops import serving
from tests.support.agreement import normal
from tests.support.blocks import Block, Net, build, image
from tests.support.plain_operators import plain_operators
from tests.support.residual import IMAGES, converted, joined, of_ours, plain_blocks
from tests.support.steps import fusions

Wrapper = Callable[[nn.Module], nn.Module]


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(wrap: Wrapper, convert: Wrapper) -> tuple[list[Tensor], int]:
    """Two steps on this process's part of a batch. Returns the whole tensors of the state_dict, and how often was
    fused.
    """
    model = wrap(convert(build(Net))).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = image(3, 7)[dist.get_rank() :: dist.get_world_size()]
    with cnnfast.trace() as trace:
        for _ in range(2):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in model.state_dict().values()], fusions(trace)


def compare(wrap: Wrapper) -> dict[str, float]:
    theirs, _ = train(wrap, copy.deepcopy)
    ours, fused = train(wrap, cnnfast.convert)
    error = max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    moved = max(
        (a.double() - b.double()).abs().max().item()
        for a, b in zip(ours, build(Net).state_dict().values(), strict=True)
    )
    return {"error": error, "moved": moved, "fused": fused, "first": ours[0].sum().item()}


def accumulated(model: nn.Module) -> list[Tensor]:
    """Gradients of two parts of a batch in float16, which a wrapped model exchanges once."""
    parts = normal(2, 6, 4, 5, 6, seed=dist.get_rank(), dtype=torch.float32)
    for i, part in enumerate(parts):
        held = model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) and i == 0 else nullcontext()
        with held:
            with torch.autocast("cpu", torch.float16):
                y = model(part.to(memory_format=torch.channels_last))
            y.float().square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def compare_accumulated() -> dict[str, float]:
    """A stem with its pool and a 1x1 convolution to many channels, which are operators of their own in training: the
    bits of both ranks' gradients, averaged by hand.
    """
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2, 1))
    wide = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
    model = cnnfast.convert(nn.Sequential(stem, wide), memory_format=torch.channels_last)
    with cnnfast.trace() as trace:
        found = accumulated(nn.parallel.DistributedDataParallel(copy.deepcopy(model)))
    right = accumulated(model)
    for grad in right:
        dist.all_reduce(grad)
    names = [call.operation for call in trace]
    return {
        "error": max((a - b / 2).abs().max().item() for a, b in zip(found, right, strict=True)),
        "of gram": names.count("gram_gradients"),
        "of stem": names.count("normalize_max_pool_backward"),
    }


def by_block(model: Any) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_convolution(model: Any) -> nn.Module:
    """A convolution of the first block apart."""
    fully_shard(model[0].conv2, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    return by_block(model)


def train_blocks(wrap: Wrapper, make: Wrapper) -> tuple[list[Tensor], list[int]]:
    """A step by the gradients of two parts of a batch, which are exchanged once. Returns the whole tensors of the
    state_dict, and the blocks that were one operator.
    """
    model: Any = wrap(make(plain_blocks()).train())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with joined() as seen:
        for i in range(2):
            part = normal(*IMAGES, seed=2 * dist.get_rank() + i)
            if wrap is not ddp:
                model.set_requires_gradient_sync(i == 1)
            with model.no_sync() if wrap is ddp and i == 0 else nullcontext():
                model(part).square().mean().backward()
    optimizer.step()
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in model.state_dict().values()], seen


def compare_blocks(wrap: Wrapper, make: Wrapper) -> dict[str, Any]:
    """The largest difference from PyTorch's own, the least that any tensor moved, and the blocks that were one
    operator.
    """
    right, _ = train_blocks(wrap, copy.deepcopy)
    mine, joined_blocks = train_blocks(wrap, make)
    found = [(a - b, b - c) for a, b, c in zip(mine, right, plain_blocks().state_dict().values(), strict=True)]
    return {
        "error": max(float(error.abs().max()) for error, _ in found),
        "moved": min(float(moved.abs().max()) for _, moved in found),
        "blocks": joined_blocks,
    }


def compare_all_blocks() -> dict[str, Any]:
    """Once by our operators, with the library's convolutions, whose kernels have had their turn with other models; and
    by PyTorch's in their place.
    """
    serving.LIBRARY_FIRST = ("cpu",)
    found = {"by_block, converted": compare_blocks(by_block, converted)}
    blocks.ops = fused.ops = plain_operators()
    for wrap, make in ((ddp, converted), (by_block, of_ours), (by_convolution, converted)):
        found[f"{wrap.__name__}, {make.__name__}"] = compare_blocks(wrap, make)
    return found


if __name__ == "__main__":
    rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    results = {wrap.__name__: compare(wrap) for wrap in (ddp, fsdp)}
    results["accumulated"] = compare_accumulated()
    results["blocks"] = compare_all_blocks()
    dist.destroy_process_group()
    print(json.dumps(results), flush=True)
    os._exit(0)  # gloo's threads, which nobody can wait for, now and then abort a process that ends in the usual way
