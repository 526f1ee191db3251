"""Whether weights that five of the ten digits have trained help to learn the other five from ten images each.

    python benchmarks/transferred_digits.py > benchmarks/results/cpu/transferred_digits.txt

For each of five seeds a network learns 0 to 4, all their images; then one that starts from its weights, with a new
head, and one that starts from random weights learn 5 to 9 from ten images each, with the same recipe and as many
steps; the other images of 5 to 9 are the test. It takes about a minute. The budget is
small, 50 steps: that is where a start matters, and with more of them both end closer together.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cnnfast.training import evaluate, fit, open_images, start
from cnnfast.training.preparing import prepare
from cnnfast.training.samples import ImageSet

NETWORK = "cnnfast.demo.digits:DigitNet"
FIRST, OTHERS = tuple("01234"), tuple("56789")
EACH = 10  # images of a class
RECIPE: dict[str, Any] = {"lr": 4e-3, "ema": None, "progress": False}
FIRST_EPOCHS, OTHER_EPOCHS, BATCH = 20, 10, 10
SEEDS = range(5)


def some_of_each(images: ImageSet, seed: int) -> tuple[Tensor, Tensor]:
    """(EACH images of every class, all others), as indices."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(len(images.classes)):
        own = torch.nonzero(images.labels == label).flatten()
        chosen.append(own[torch.randperm(len(own), generator=generator)[:EACH]])
    picked = torch.cat(chosen).sort().values
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[picked] = False
    return picked, torch.nonzero(rest).flatten()


def accuracy(weights: Path | None, others: ImageSet, seed: int) -> float:
    """Of a network that has learnt ten images of each of the others, on the rest of them."""
    few, rest = some_of_each(others, seed)
    model = start(NETWORK, len(OTHERS), (8, 8), channels=1, weights=weights, seed=seed).model
    run = fit(model, others.taken(few), validation=0, epochs=OTHER_EPOCHS, batch=BATCH, seed=seed, **RECIPE)
    return evaluate(run.model, prepare(others, 0, None, None, seed).augment, others, rest).accuracy


def main() -> None:
    digits, began = open_images("digits", 8), time.perf_counter()
    others = digits.only(OTHERS)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; the other digits by {EACH} images of each")
    print(f"{'seed':>4}  {'pretrained':>10}  {'from scratch':>12}")
    results = []
    for seed in SEEDS:
        with TemporaryDirectory() as folder:
            model = start(NETWORK, len(FIRST), (8, 8), channels=1, seed=seed).model
            fit(model, digits.only(FIRST), out=folder, validation=0, epochs=FIRST_EPOCHS, seed=seed, **RECIPE)
            results.append((accuracy(Path(folder, "best.safetensors"), others, seed), accuracy(None, others, seed)))
        print(f"{seed:>4}  {results[-1][0]:>10.2%}  {results[-1][1]:>12.2%}", flush=True)
    better = sum(first > second for first, second in results)
    means = [sum(column) / len(results) for column in zip(*results, strict=True)]
    print(f"mean  {means[0]:>10.2%}  {means[1]:>12.2%}")
    print(f"pretrained is better with {better} of {len(results)} seeds")
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
