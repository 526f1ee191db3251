"""One of several processes that train with synchronised batch norms: gloo, on the CPU, in the interpreter.

    python -m tests.support.synchronised_steps RANK WORLD FILE CASE ...

FILE is where the processes meet. Each case is a function of this module; what it returns is saved in FILE.RANK. The
inputs follow from the case and the rank (`part`): the test makes the whole batch of them.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cnnfast
import cnnfast.functional as F
import cnnfast.nn as cnn
from cnnfast.ops import serving
from tests.support.agreement import normal
from tests.support.blocks import CHANNELS, Block, build
from tests.support.residual import PlainBlock

SIZES = {2: (), 3: (5,), 4: (4, 3), 5: (2, 3, 2)}  # of spatial axes, by the number of all axes

# By name: (images of each rank, axes, dtype, layout, options of the norm).
NORMS: dict[str, tuple[tuple[int, ...], int, torch.dtype, torch.memory_format, dict[str, Any]]] = {
    "float64": ((3, 1), 4, torch.float64, torch.contiguous_format, {}),
    "float32": ((3, 1), 4, torch.float32, torch.channels_last, {}),
    "float16": ((3, 1), 4, torch.float16, torch.channels_last, {}),
    "the second is empty": ((4, 0), 4, torch.float64, torch.channels_last, {}),
    "the first is empty": ((0, 4), 4, torch.float32, torch.contiguous_format, {}),
    "one value on a rank": ((1, 2), 2, torch.float64, torch.contiguous_format, {}),
    "two axes": ((3, 2), 2, torch.float32, torch.contiguous_format, {"momentum": None}),
    "three axes": ((2, 1), 3, torch.float64, torch.contiguous_format, {"affine": False}),
    "five axes": ((1, 2), 5, torch.float32, torch.channels_last_3d, {"track_running_stats": False}),
}


def norm_of(options: dict[str, Any], dtype: torch.dtype) -> nn.SyncBatchNorm:
    """PyTorch's own, with weights and biases of some size. In half precision they are float32, as under autocast."""
    norm = nn.SyncBatchNorm(CHANNELS, **options)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(normal(CHANNELS, seed=1))
            norm.bias.copy_(normal(CHANNELS, seed=2))
    return norm.to(torch.float32 if dtype == torch.float16 else dtype)


def part(count: int, axes: int, rank: int, step: int) -> tuple[Tensor, Tensor]:
    """A rank's images, whose means differ from rank to rank, and the gradient of what is made of them."""
    shape = (count, CHANNELS, *SIZES[axes])
    return normal(*shape, seed=10 * step + rank) * (1 + rank) + 3 * rank, normal(*shape, seed=100 + 10 * step + rank)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often this process takes part in collectives, by name."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        function = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    names = [name for name in dir(dist) if name.startswith(("all_", "_all_", "reduce", "broadcast", "gather"))]
    with contextlib.ExitStack() as stack:
        for name in names:
            if callable(getattr(dist, name)):
                stack.enter_context(counting(name))
        yield calls


def train(norm: nn.Module, name: str, rank: int) -> dict[str, Any]:
    """Two steps: what the last one gave, and what both left."""
    counts, axes, dtype, layout, _ = NORMS[name]
    found: dict[str, Any] = {}
    for step in range(2):
        norm.zero_grad()
        x, dz = (t.to(dtype).contiguous(memory_format=layout) for t in part(counts[rank], axes, rank, step))
        x.requires_grad_()
        z = norm(x)
        z.backward(dz)
        assert x.grad is not None
        found = {"z": z.detach(), "dx": x.grad, "strides": (z.stride(), x.grad.stride(), x.stride())}
    grads = {f"gradient of {key}": p.grad for key, p in norm.named_parameters()}
    return found | grads | {key: t.clone() for key, t in norm.named_buffers()}


def norms(rank: int) -> dict[str, Any]:
    """Every one of NORMS; and what was served, and exchanged, in training and in eval."""
    found: dict[str, Any] = {}
    for name in NORMS:
        original = norm_of(NORMS[name][4], NORMS[name][2])
        norm = cnnfast.convert(original)
        assert type(norm) is cnn.SyncBatchNorm
        with counted() as calls, cnnfast.trace() as trace:
            found[name] = train(norm, name, rank)
        found[name]["collectives"] = dict(calls)
        found[name]["operations"] = [call.operation for call in trace]
        found[name]["served by"] = sorted({call.served_by for call in trace})
        x = part(2, NORMS[name][1], rank, 0)[0].to(NORMS[name][2])
        with counted() as calls, torch.no_grad():
            norm(x)
        found[name]["collectives without gradients"] = dict(calls)
        with counted() as calls:
            norm.eval()(x)
        found[name]["collectives in eval"] = dict(calls)
    return found


class Residual(Block):
    """Block with an activation whose derivative needs its argument, on a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 2, bias=False), nn.BatchNorm2d(CHANNELS), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.stem(x))


class Preactivated(nn.Module):
    """Two norms before convolutions, as DenseNet has them, the first one of the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(CHANNELS + 3)
        self.conv, self.conv2 = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS + 3, 2, 1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.relu(self.bn(x)))
        return self.conv2(torch.nn.functional.hardswish(self.bn2(torch.cat((x, y), 1))))


ResidualBlock = functools.partial(PlainBlock, 3, CHANNELS)

IMAGES = (3, 2)  # of a model's batch, by rank


def images(rank: int, step: int) -> Tensor:
    return normal(IMAGES[rank], 3, 7, 6, seed=20 * step + rank) + rank


def model_steps(model: nn.Module, batches: list[Tensor], world: int = 1) -> dict[str, Any]:
    """A step for each batch by the sum of squares: parameters, buffers and the last output."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    y = batches[0]
    for batch in batches:
        optimizer.zero_grad()
        y = model(batch)
        # the mean over ranks, which DistributedDataParallel takes of gradients, is then that of a sum over images
        (y.square().sum() * world).backward()
        optimizer.step()
    return {"y": y.detach(), **{k.removeprefix("module."): t.clone() for k, t in model.state_dict().items()}}


def distributed(model: nn.Module) -> nn.Module:
    # It refuses synchronised norms on the CPU, where PyTorch has none.
    with mock.patch.object(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle"):
        return nn.parallel.DistributedDataParallel(model)


def models(rank: int) -> dict[str, Any]:
    """A converted model under DistributedDataParallel, whose convolutions are fused with the norms after them."""
    return converted(Residual, rank)


def preactivated(rank: int) -> dict[str, Any]:
    """The same of norms that are fused with activations before convolutions."""
    return converted(Preactivated, rank)


def blocks(rank: int) -> dict[str, Any]:
    """The same of a residual block that is one operator where its norms wait for nobody; the library convolves."""
    with mock.patch.object(serving, "LIBRARY_FIRST", ("cpu",)):
        return converted(ResidualBlock, rank)


def converted(kind: Callable[[], nn.Module], rank: int) -> dict[str, Any]:
    """Two steps, and what was fused."""
    model = cnnfast.convert(nn.SyncBatchNorm.convert_sync_batchnorm(build(kind))).train()
    report = cnnfast.report(model, images(rank, 0))
    wrapped = distributed(model)
    with counted() as calls, cnnfast.trace() as trace:
        found = model_steps(wrapped, [images(rank, step) for step in range(2)], dist.get_world_size())
    reverted = {type(m) for m in cnnfast.revert(model).modules() if "BatchNorm" in type(m).__name__}
    assert reverted == {nn.SyncBatchNorm}
    return found | {
        "operations": dict(Counter(call.operation for call in trace)),
        "served by": sorted({call.served_by for call in trace}),
        "gathered": calls["all_gather_single"] + calls["all_gather_into_tensor"],
        "fused": {row.name: row.reason for row in report.rows if row.status == "fused"},
    }


def timm_model() -> nn.Module:
    from cnnfast.torchvision_import import torchvision

    torchvision()
    from timm.layers import norm_act

    members = (
        nn.Conv2d(3, CHANNELS, 3),
        norm_act.BatchNormAct2d(CHANNELS, act_layer=nn.SiLU),
        nn.Conv2d(CHANNELS, 2, 1),
    )
    return nn.Sequential(*members, norm_act.BatchNormAct2d(2, act_layer=nn.Sigmoid))


def timms(rank: int) -> dict[str, Any]:
    """timm's layers of a synchronised norm and an activation: one that kernels know, one that they do not."""
    model = build(timm_model)
    from timm.layers import norm_act

    converted = cnnfast.convert(norm_act.convert_sync_batchnorm(model)).train()
    assert isinstance(converted[1], norm_act.SyncBatchNormAct)
    with cnnfast.trace() as trace:
        found = model_steps(distributed(converted), [images(rank, step) for step in range(2)], dist.get_world_size())
    assert type(cnnfast.revert(converted)[1]) is norm_act.SyncBatchNormAct
    return found | {"operations": dict(Counter(call.operation for call in trace))}


def frozen_input(rank: int) -> dict[str, Any]:
    """The input wants a gradient on the second rank alone."""
    norm, (x, dz) = cnnfast.convert(norm_of({}, torch.float64)), part(2, 4, rank, 0)
    with counted() as calls:
        norm(x.requires_grad_(rank == 1)).backward(dz)
    return {"weight": norm.weight.grad, "bias": norm.bias.grad, "dx": x.grad, "collectives": dict(calls)}


def errors(rank: int) -> dict[str, Any]:
    """Bad calls: what each raises, on every rank, and that nothing was exchanged before."""
    norm = cnnfast.convert(norm_of({}, torch.float64))
    x, conv = torch.ones(2, CHANNELS, 3, 3, dtype=torch.float64), torch.ones(CHANNELS, CHANNELS, 1, 1).double()
    mean, var, group = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double(), dist.group.WORLD
    options = {"training": True, "process_group": group}
    calls = {
        "axes": lambda: norm(x[0, 0, 0]),
        "channels": lambda: norm(x[:, 1:]),
        "no channels": lambda: norm(x[:, :0]),
        "dtype": lambda: norm(x.float()),
        "eps": lambda: F.batch_norm(x, mean, var, eps=0.0, **options),
        "residual": lambda: F.conv_bn_act(x, conv, mean, var, residual=x[:1], **options),
        "group": lambda: F.conv_bn_act(x, conv, mean, var, training=True, process_group="world"),
        "running statistics": lambda: F.conv_bn_act(x, conv, mean, None, **options),
        "by PyTorch": lambda: F.conv_bn_act(x, conv, mean, var, algorithm="torch", **options),
        "under vmap": lambda: torch.func.vmap(norm)(x[None]),
    }
    found: dict[str, Any] = {}
    with counted() as exchanged:
        for name, call in calls.items():
            try:
                call()
                found[name] = "nothing"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(norm(leaf).square().sum(), leaf, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        found["second derivative"] = str(error)
    return {"errors": found, "exchanged": dict(exchanged)}


def alone(rank: int) -> dict[str, Any]:
    """What looks at a model waits for nobody: only the first rank does this."""
    if rank:
        return {}
    from cnnfast.calls import operator_calls
    from cnnfast_kernels import devices

    model = cnnfast.convert(nn.SyncBatchNorm.convert_sync_batchnorm(build(Residual))).train()
    x = images(0, 0)
    with counted() as calls:
        report = cnnfast.report(model, x)
        checked = cnnfast.check(model, x)
        on_meta = operator_calls(model, (x,), train=True, gpu=devices.NO_GPU, device_type="cpu")
    return {
        "collectives": dict(calls),
        "fused": report.count("fused"),
        "checked": checked.ok,
        "text": str(checked),
        "operators": sorted({call.operator for call in on_meta}),
    }


def compiled(rank: int) -> dict[str, Any]:
    """A step of a model that torch.compile has compiled, and one of the same model as it is."""
    found: dict[str, Any] = {}
    for how in ("eager", "compiled"):
        model = cnnfast.convert(nn.SyncBatchNorm.convert_sync_batchnorm(build(Residual))).train()
        run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
        run(images(rank, 0)).square().sum().backward()
        found[how] = {**{k: p.grad for k, p in model.named_parameters()}, **dict(model.named_buffers())}
    return found


def three(rank: int) -> dict[str, Any]:
    """Three ranks; and a group of the first and the last, beside which the second trains alone."""
    x = normal(1 + rank, CHANNELS, 3, 3, seed=rank, dtype=torch.float32) * 0.01 + 1000.0 * (rank == 1) + 1.0
    norm = cnnfast.convert(norm_of({}, torch.float32))
    norm(x)
    pair = dist.new_group([0, 2])
    of_pair = cnnfast.convert(norm_of({"process_group": pair}, torch.float32))
    of_pair(x)
    return {"x": x, **dict(norm.named_buffers()), **{f"pair {k}": t for k, t in of_pair.named_buffers()}}


if __name__ == "__main__":
    here, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)  # a rank that waits for another in vain fails
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=here, world_size=world, timeout=patience)
    results = {name: globals()[name](here) for name in sys.argv[4:]}
    torch.save(results, f"{file}.{here}")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads, which nobody can wait for, now and then abort a process that ends in the usual way
