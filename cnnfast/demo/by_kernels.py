"""Networks run by our kernels, whatever would serve by default: on a GPU, or in Triton's interpreter.

`python -m cnnfast.demo.by_kernels FILE` runs them in a process of its own, in which Triton interprets the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import cnnfast
from cnnfast.checking.child import interpreted
from cnnfast.dispatch import launch, prefer_kernels

MARK = "cnnfast-run "  # the name of a file with the results follows


@dataclass(frozen=True)
class KernelRun:
    """What a network returned, on the CPU, and the kernels that it launched; none if PyTorch served all of it."""

    output: Any
    launches: list[str]


def start(cases: Sequence[tuple[nn.Module, Tensor]]) -> Callable[[], list[KernelRun]]:
    """Runs each network on its input, without gradients; the result waits for what they return.

    Where this process compiles its kernels and the tensors are on the CPU, another process runs copies of them all, and
    interprets, while this one does something else. Otherwise they run at once.
    """
    if launch is not None and not launch.INTERPRETED and not cases[0][1].is_cuda:
        waiting = ThreadPoolExecutor(1)
        found = waiting.submit(_run_in_child, cases)
        waiting.shutdown(wait=False)
        return found.result
    runs = [_run(network, x) for network, x in cases]
    return lambda: runs


def _run(network: nn.Module, x: Tensor) -> KernelRun:
    with torch.no_grad(), prefer_kernels(), cnnfast.trace() as calls:
        output = network(x)
    return KernelRun(tree_map(lambda t: t.float().cpu(), output), calls.launches)


def _run_in_child(cases: Sequence[tuple[nn.Module, Tensor]]) -> list[KernelRun]:
    for line in interpreted(__name__, list(cases)):
        if line.startswith(MARK):
            found = torch.load(line.removeprefix(MARK).strip(), weights_only=True)
            return [KernelRun(output, launches) for output, launches in found]
    raise RuntimeError("the process that interprets kernels ended without a result")


def main(path: str) -> None:
    cases = torch.load(path, weights_only=False)  # the parent process has just written it
    results = Path(path).with_name("results.pt")
    torch.save([(found.output, found.launches) for found in start(cases)()], results)
    print(f"{MARK}{results}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
