"""The parts of a visit: what is run, in which order, and within which limits.

A part's files lie in a folder of its name. The limits together are twelve minutes at most, so that three of fifteen
remain for a machine's start; no part has more than eight, because a command may be allowed ten.
tests/ci/visit/test_plan.py holds both, and that what plan.py counts fits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cnnfast_kernels.gpus import KnownGpu

from .running import ROOT, SECONDS, WORKERS, Stage, StageCommand, workers
from .smoke import sanitizer

KEPT = ROOT / "ci" / "results" / "visit"  # what was counted beforehand: plan.json, and tests.json for it
MOST_SECONDS = 720  # of all parts
MOST_OF_A_PART = 480

MODEL = "resnet50"
DTYPE = "bf16"
# a row serves half to twice its batch
INFER_BATCHES, INFER_COMPILED, TRAIN_BATCH, LAYER_BATCH, TUNE_BATCH = (32, 256, 1), 32, 64, 32, 64
MODEL_SECONDS, LAYER_SECONDS = 0.3, 0.03  # of timing, for each provider and job
DEMO_SECONDS = 8  # of the layers that it times: part layers has them all
# torch.compile comes apart, after what takes no minute. Left to `cnnfast bench`: max-autotune, which compiles for
# minutes, torch.compile of the converted model, JAX, and NCHW.
INFER_PROVIDERS = ("eager", "eager-graph", "cudnn-fused", "cudnn-graph", "cnnfast", "cnnfast-graph", "cnnfast-kernels")
COMPILERS = ("eager-graph", "compile", "cnnfast-graph")
TRAIN_PROVIDERS = ("eager", "eager-graph", "cnnfast", "cnnfast-graph", "cnnfast-kernels")
LAYER_PROVIDERS = ("eager-graph", "cnnfast-graph", "cnnfast-kernels")

BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}  # an error is that of the call which caused it
# each tensor has an allocation of its own, beyond which an access is out of bounds
APART = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Each with its limit.
RING, RING_WORKERS = "tests/gpu", 8
TESTS = {"tests/kernels": 105.0, RING: 50.0, "tests/cnnfast": 93.0}
SMOKE_LIMIT = 40.0
# of families under each of compute-sanitizer's tools: to start takes longest there, and all of them run at once on 16
# cores
GROUPS = 5


@dataclass(frozen=True)
class Part:
    """One part of a visit. `what` describes it in a sentence; `results` are the files of its folder that are left
    beside the archive too.
    """

    name: str
    what: str
    stages: tuple[Stage, ...]
    results: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """Seconds, of all stages."""
        return sum(stage.limit for stage in self.stages)


def python(*arguments: object) -> tuple[str, ...]:
    return sys.executable, "-m", *map(str, arguments)


def one(name: str, limit: float, *argv: object, **environment: str) -> Stage:
    return Stage((StageCommand(name, python(*argv), environment=environment),), limit)


def families() -> dict[str, tuple[str, ...]]:
    """The families of kernels, and the kernels of each."""
    from .smoke.families import FAMILIES  # not above: it imports PyTorch

    return {name: family.kernels for name, family in FAMILIES.items()}


# ----------------------------------------------------------------------------------------------------------------------


def smoke(folder: Path, pretended: KnownGpu | None) -> Part:
    """Each family by itself; then, of those that passed, groups under compute-sanitizer. If `pretended`, over the
    recording driver.
    """
    known = families()
    recorded = ("--recorded", str(pretended.arch)) if pretended else ()
    ours = [kernel for kernels in known.values() for kernel in kernels]
    plain = [
        StageCommand(
            name, python("ci.visit.smoke", name, "--limit", int(SMOKE_LIMIT - 15), *recorded), SMOKE_LIMIT, BLOCKING,
            clue=sanitizer.last_launched,
        )
        for name in known
    ]  # fmt: skip
    groups = [tuple(known)[i::GROUPS] for i in range(GROUPS)]
    checked = [
        StageCommand(
            f"{tool}-{i}",
            (*sanitizer.command(tool), *python("ci.visit.smoke", *group, *sanitizer.options(tool), *recorded)),
            environment={**BLOCKING, **APART},
            needs=group,
            judge=partial(sanitizer.judge, ours),
            matters=False,
        )
        for tool in sanitizer.TOOLS
        for i, group in enumerate(groups, 1)
    ]
    what = f"every kernel once, in {len(plain)} processes, then under {sanitizer.PROGRAM} where it is installed"
    limit = len(plain) * SMOKE_LIMIT if pretended else SMOKE_LIMIT  # a machine without a GPU may have one core
    return Part("smoke", what, (Stage(tuple(plain), limit, workers()), Stage(tuple(checked), 22.0, workers())))


def tests(folder: Path, pretended: KnownGpu | None) -> Part:
    """The kernels' tests, those that only a GPU can run, those of what faces PyTorch; over the recording driver a few
    of geometry.
    """
    chosen = {"tests/kernels/test_problem.py": 109.0} if pretended else TESTS

    def stage(path: str) -> Stage:
        name = Path(path).stem
        # Launches that block would hide what the ring is for: streams, graphs. Its largest tests ask for 12 GiB each.
        alone, processes = ({}, RING_WORKERS) if path == RING else (BLOCKING, WORKERS)
        how = (
            "-q",
            "-n",
            processes,
            "--dist",
            "worksteal",
            "-m",
            "not compiled and not slow",
            "-p",
            "no:cacheprovider",
        )
        lines = ("-p", "ci.visit.pytest_lines", "--lines", folder / "tests" / f"{name}.jsonl")
        return one(name, chosen[path], "pytest", *how, *lines, path, **alone)

    return Part("tests", "all tests but the slow ones, the kernels' own first", tuple(map(stage, chosen)))


def demo(folder: Path, pretended: KnownGpu | None) -> Part:
    """Without a GPU it interprets its kernels, which takes minutes."""
    limit = 420.0 if pretended else 53.0
    stage = one("demo", limit, "cnnfast", "demo", "--out", folder / "demo", "--budget", DEMO_SECONDS)
    return Part("demo", "the story on real images, in every dtype", (stage,))


def measured(
    folder: Path, part: str, name: str, limit: float, seconds: float, providers: Sequence[str], *what: object
) -> Stage:
    """`cnnfast bench`, whose rows go to a file of the stage's name as soon as they are there."""
    chosen = [option for provider in providers for option in ("--provider", provider)]
    how = ("--seconds", seconds, "--budget", SECONDS, "--json", folder / part / f"{name}.json")
    return one(name, limit, "cnnfast", "bench", *what, *how, *chosen)


SMALL_PROVIDERS = ("eager", "nchw", "cnnfast")


def small(folder: Path, mode: str) -> Part:
    """What a machine without a GPU measures in place of the model."""
    model = ("resnet18", "--mode", mode, "--input", "2x3x64x64")
    stage = measured(folder, mode, mode, 60, 0.05, SMALL_PROVIDERS, *model)
    return Part(mode, f"a small model on the CPU in place of {MODEL} on a GPU", (stage,), (f"{mode}.json",))


def infer(folder: Path, pretended: KnownGpu | None) -> Part:
    what = f"{MODEL} in eval against the strongest baselines, {DTYPE}, batch {', '.join(map(str, INFER_BATCHES))}"
    if pretended:
        return small(folder, "infer")
    model = (MODEL, "--mode", "infer", "--dtype", DTYPE, "--batch")
    first = measured(
        folder, "infer", "infer", 56, MODEL_SECONDS, INFER_PROVIDERS, *model, ",".join(map(str, INFER_BATCHES))
    )
    second = measured(folder, "infer", "infer-compile", 57, MODEL_SECONDS, COMPILERS, *model, INFER_COMPILED)
    return Part("infer", what, (first, second), ("infer.json",))


def train(folder: Path, pretended: KnownGpu | None) -> Part:
    what = f"{MODEL}'s training step against the strongest baselines, {DTYPE}, batch {TRAIN_BATCH}"
    if pretended:
        return small(folder, "train")
    model = (MODEL, "--mode", "train", "--dtype", DTYPE, "--batch", TRAIN_BATCH)
    first = measured(folder, "train", "train", 33, MODEL_SECONDS, TRAIN_PROVIDERS, *model)
    second = measured(folder, "train", "train-compile", 99, MODEL_SECONDS, COMPILERS, *model)
    return Part("train", what, (first, second), ("train.json",))


def layers(folder: Path, pretended: KnownGpu | None) -> Part:
    size = ("--batch", 1) if pretended else ("--dtype", DTYPE, "--batch", LAYER_BATCH)
    providers = SMALL_PROVIDERS if pretended else LAYER_PROVIDERS
    stage = measured(
        folder, "layers", "layers", 56, 0.001 if pretended else LAYER_SECONDS, providers, "--layers", *size
    )
    return Part(
        "layers", "single layers of ResNet-50 and MobileNetV2, forward and backward", (stage,), ("layers.json",)
    )


def tune(folder: Path, pretended: KnownGpu | None) -> Part:
    """Last: what comes before shall not run by the table that this writes."""
    what = f"{MODEL}'s forward convolutions, tile by tile; rows.json is what a table of this GPU takes"
    model = (MODEL, "--mode", "infer", "--dtype", DTYPE, "--json", folder / "tune" / "tune.json")
    if pretended:
        return Part(
            "tune",
            what,
            (one("tune", 50, "cnnfast", "tune", *model, "--input", "1x3x64x64", "--dry-run", "--gpu", pretended.name),),
            ("tune.json",),
        )
    how = ("--input", f"{TUNE_BATCH}x3x224x224", "--budget", SECONDS, "--table", folder / "tune" / "rows.json")
    return Part("tune", what, (one("tune", 56, "cnnfast", "tune", *model, *how),), ("tune.json", "rows.json"))


PARTS: dict[str, Callable[[Path, KnownGpu | None], Part]] = {
    part.__name__: part for part in (smoke, tests, demo, infer, train, layers, tune)
}


def chosen(names: Sequence[str], folder: Path, pretended: KnownGpu | None = None) -> list[Part]:
    """The parts of these names, all if there are none, in the order of a visit. Their files go to `folder`.

    pretended: a GPU that is not here: the parts as far as a machine without one goes.
    """
    return [make(folder, pretended) for name, make in PARTS.items() if not names or name in names]
