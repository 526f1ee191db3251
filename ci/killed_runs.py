"""Runs that are killed at random moments: each, resumed, must end with the bits of the run that was not killed.

    python ci/killed_runs.py                       # 20 moments: some two minutes on two cores
    python ci/killed_runs.py --moments 100 --seed 7

A small network learns the digits for a few epochs, with a moving average, dropout and early stopping. A process that
does so gets SIGKILL after a random time, up to that of the whole run; another goes on in its folder, and may be killed
too, until one ends. Every tensor of the checkpoint, best.safetensors, last.safetensors and metrics.csv but for its
seconds are then compared with those of the first run. What came of them is printed, and written to
ci/results/killed_runs.txt; exit code 1 if a bit differs.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checkout import RESULTS, versions
from safetensors.torch import load_file

from tests.support.trainable import small_fit, weights

OPTIONS: dict[str, Any] = {"count": 400, "epochs": 5, "batch": 8, "patience": 3, "resume": True}
PROCESSES = multiprocessing.get_context("fork")  # what is imported here need not be imported by each


def train(folder: Path) -> None:
    os.close(2)  # a killed process has nothing to say
    small_fit(out=folder, **OPTIONS)


def trained(folder: Path, seconds: float | None = None) -> bool:
    """Whether a process trained to the end; it is killed after so many seconds."""
    child = PROCESSES.Process(target=train, args=(folder,))
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
    if child.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"a training ended by itself, with {child.exitcode}")
    return child.exitcode == 0


def left(folder: Path) -> dict[str, Any]:
    """All that a run has left, by name."""
    files = {
        f"{file}/{name}": t
        for file in ("best", "last")
        for name, t in load_file(folder / f"{file}.safetensors").items()
    }
    lines = [line[:-1] for line in csv.reader((folder / "metrics.csv").read_text().splitlines())]
    checkpoint = {f"checkpoint{name}": t for name, t in weights(folder).items()}
    return {**files, **checkpoint, "metrics": lines}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    def same(name: str) -> bool:
        a, b = one.get(name), other.get(name)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    return [name for name in sorted({*one, *other}) if not same(name)]


def saved_epochs(folder: Path) -> int:
    """How many epochs a checkpoint holds."""
    file = folder / "last.ckpt"
    return torch.load(file, weights_only=True)["epoch"] + 1 if file.exists() else 0


def main(
    moments: Annotated[int, typer.Option(help="How many runs are killed.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    lines = [f"{moments} runs killed at random moments (seed {seed}); {versions('torch', 'lightning')}"]
    with tempfile.TemporaryDirectory() as parent:
        small_fit(count=60, epochs=1)  # the first training of a process imports some modules
        began = time.perf_counter()
        if not trained(Path(parent, "whole")):
            raise SystemExit("the run that nobody kills was killed")
        duration, whole, wrong = time.perf_counter() - began, left(Path(parent, "whole")), 0
        number = 0
        while number < moments:
            folder, at = Path(parent, str(number)), list[str]()
            while not trained(folder, draw.uniform(0, duration) if len(at) < 2 else None):
                at.append(str(saved_epochs(folder)))
            if not at:  # it ended before its time came
                shutil.rmtree(folder)
                continue
            number += 1
            differing = differences(whole, left(folder))
            wrong += bool(differing)
            outcome = f"DIFFERS in {', '.join(differing[:3])}" if differing else "equal"
            lines.append(f"{number:3}  killed when {' and then '.join(at)} epochs were saved: {outcome}")
            print(lines[-1], flush=True)
    lines.append(
        f"{moments - wrong} of {moments} ended with the same {len(whole) - 1} tensors, to the bit, and the same lines"
    )
    print(lines[-1])
    RESULTS.joinpath("killed_runs.txt").write_text("\n".join(lines) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
