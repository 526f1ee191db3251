"""A family of kernels on the GPU, in a process of its own: python -m ci.visit.smoke FAMILY. Several may share one.

Each trial is named before it is launched, so that a hang or an error of CUDA, which all later work of the process would
fail by, names its kernel: run it with CUDA_LAUNCH_BLOCKING=1. Exit code 0 if all numbers are right, 1 if one is not or
something raised, 2 for what cannot be run here.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

from cnnfast_kernels import devices, launch, memory
from cnnfast_kernels.tma.views import why_not_on

from .families import FAMILIES, Family
from .sanitizer import LAUNCHING
from .trial import SmokeTrial


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers, so that a NaN equals itself."""
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def difference(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> str:
    """What is wrong with a result, in one line; "" if nothing is."""
    if ours.shape != exact.shape:
        return f"has shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    if not tolerance and not torch.equal(exact.to(ours.dtype).to(exact.dtype), exact):
        return f"cannot be judged: {ours.dtype} does not hold the numbers that the trial asks for"
    found = ours.to(exact.dtype)
    allowed = tolerance * exact.abs().max() if tolerance else 0
    wrong = ~((found - exact).abs() <= allowed)  # NaN, which is in memory that no kernel wrote, is never below
    if not wrong.any():
        return ""
    first = tuple(wrong.nonzero()[0].tolist())
    values = f"{found[first].item()}, not {exact[first].item()}"
    return f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, the first at {first}: {values}"


def tried(trial: SmokeTrial, device: torch.device, poison: bool, judge: bool) -> list[str]:
    """What is wrong with a trial's results, launched twice: first by Triton's own code, then by the plan that
    is kept.
    """
    cpu = torch.device("cpu")
    operands = trial.operands(device)
    with ExitStack() as stack:
        if poison:
            stack.enter_context(memory.poisoned())
        first, second = trial.ours(*operands), trial.ours(*operands)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if not judge:
        return []
    expected = trial.exact(*(t.double() for t in trial.operands(cpu)))
    problems = []
    for i, (one, other, exact) in enumerate(zip(first, second, expected, strict=True)):
        ours = one.cpu()
        if not torch.equal(bits(ours), bits(other.cpu())):
            problems.append(f"result {i} has other bits the second time")
        if said := difference(ours, exact, trial.tolerance):
            problems.append(f"result {i} {said}")
    return problems


@contextmanager
def where(recorded: int) -> Iterator[torch.device]:
    """The GPU; or, if `recorded` is an architecture, the CPU, over the driver that launches nothing."""
    if not recorded:
        if launch.INTERPRETED:
            yield torch.device("cpu")
        else:
            yield torch.device("cuda", torch.cuda.current_device())
        return
    from cnnfast_kernels.aot.recording_driver import recording_driver

    with recording_driver(recorded, record=False):
        yield torch.device("cpu")


@contextmanager
def announced() -> Iterator[None]:
    """Says the name of each kernel before it is launched."""
    launched = launch.Launch.__call__

    def announce(plan: launch.Launch[Any], operands: Any) -> None:
        print(f"{LAUNCHING}{plan.kernel.__name__}", flush=True)
        launched(plan, operands)

    with patch.object(launch.Launch, "__call__", announce):
        yield


def run(family: Family, device: torch.device, poison: bool = True, judge: bool = True) -> list[str]:
    """What is wrong, one line each; says on the way what is tried."""
    problems = []
    seen: set[str] = set()
    with announced(), launch.observe(lambda event: seen.add(event.kernel)):
        for trial in family.trials:
            print(f"{trial.name} ...", flush=True)
            begun = time.perf_counter()
            found = tried(trial, device, poison, judge)
            said = "; ".join(found) or ("right" if judge else "launched, not judged")
            print(f"    {said}, {time.perf_counter() - begun:.1f} s", flush=True)
            problems += [f"{trial.name}: {problem}" for problem in found]
    problems += [f"{kernel} was not launched" for kernel in family.kernels if kernel not in seen]
    return problems


def main(
    families: Annotated[
        list[str], typer.Argument(metavar="FAMILY...", help="Their names, as smoke/families.py has them.")
    ],
    limit: Annotated[float, typer.Option(help="Seconds after which it says where it is stuck.")] = 60.0,
    poison: Annotated[bool, typer.Option(help="Outputs are full of NaN before each launch.")] = True,
    recorded: Annotated[
        int, typer.Option(metavar="ARCH", help="Launch nothing: over the recording driver, for 90, say.")
    ] = 0,
) -> None:
    """Launch the kernels of each FAMILY and judge their numbers."""
    if wrong := [family for family in families if family not in FAMILIES]:
        raise typer.BadParameter(f"{wrong[0]!r} is none of {', '.join(FAMILIES)}", param_hint="FAMILY")
    if not recorded and not launch.INTERPRETED and not torch.cuda.is_available():
        raise typer.BadParameter(
            "there is no GPU here: --recorded 90 launches over the driver that records", param_hint="FAMILY"
        )
    faulthandler.dump_traceback_later(limit, exit=False, file=sys.stderr)
    problems: list[str] = []
    with where(recorded) as device:
        for name in families:
            family = FAMILIES[name]
            if family.tensor_maps and (reason := why_not_on(devices.architecture(device))):
                print(f"{name} skipped: {reason}")
            else:
                problems += run(family, device, poison, judge=not recorded)
    faulthandler.cancel_dump_traceback_later()
    for problem in problems:
        print(f"problem {problem}")
    raise typer.Exit(bool(problems))


if __name__ == "__main__":
    typer.run(main)
