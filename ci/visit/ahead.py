"""python -m ci.visit.ahead: the demo's kernels, compiled by all cores before the demo itself would compile them one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import typer
from torch import nn

from cnnfast import dispatch
from cnnfast.demo import digits, photograph, story
from cnnfast.dtypes import TF32, dtype_of
from cnnfast.precision import float32_products
from cnnfast.warming import compile_ahead, launches
from cnnfast_kernels import launch

META = torch.device("meta")


def networks() -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """What the demo proves, and the sizes of its input."""
    yield photograph.make_layers(0), tuple(photograph.load_photograph(None).shape)
    yield digits.make_network(0), (story.GPU_DIGITS, 1, 8, 8)


def of_the_demo(gpu: launch.Gpu) -> list[str]:
    """Descriptions of what its proofs launch on a GPU. What it times at its end compiles ahead itself."""
    lines: dict[str, None] = {}
    with dispatch.backend("kernels"):
        for (module, shape), name, train in product(networks(), story.GPU_DTYPES, (False, True)):
            module = module.to(META, dtype_of(name)).train(train)
            with float32_products("tf32" if name == TF32 else "ieee"):
                x = torch.empty(shape, device=META, dtype=dtype_of(name)).contiguous(memory_format=torch.channels_last)
                lines |= dict.fromkeys(launches(module, x, train=train, gpu=gpu))
    return list(lines)


def main() -> None:
    """Compile the demo's kernels into Triton's cache, for the GPU that is here."""
    gpu = launch.gpu(torch.device("cuda", torch.cuda.current_device()))
    done = compile_ahead(of_the_demo(gpu), gpu)
    print(done)
    for failure in done.failures:
        print(f"problem {failure}")
    raise typer.Exit(not done.ok)


if __name__ == "__main__":
    typer.run(main)
