"""What a visit costs, counted without a GPU: binaries to compile, numbers to draw, times to take; and seconds modelled
from these.

Counts are exact for the architecture that is named: the kernels' own functions and the converted models are called on
tensors that hold nothing, and what they would launch is written down (cnnfast/warming.py). Seconds follow from the
rates below. They are a model, made to see whether a part can fit its limit, and no GPU has confirmed them.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cnnfast import dispatch
from cnnfast.bench.job import Job, numbers_drawn, plain
from cnnfast.bench.shapes import layers as bench_layers
from cnnfast.demo import ahead as demo_kernels
from cnnfast.demo import assortment, digits, effort, photograph
from cnnfast.models import resnet50
from cnnfast.tuning import ahead
from cnnfast.tuning.planning import planned
from cnnfast.warming import launches, recorded
from cnnfast_kernels import devices
from cnnfast_kernels.tma.views import why_not_on

from . import parts
from .launches import COUNTED, launchers
from .parts import Part
from .running import CORES
from .smoke import sanitizer
from .smoke.families import FAMILIES

COMMAND = "ci/gpu.sh --plan --gpu h200 --json ci/results/visit/plan.json"

# Seconds. Binaries and launchers are those of one core, as measured on a processor; the others are allowances.
RATES = {
    "a binary of a model": 0.6,
    "a binary of the tests": 0.38,  # mostly of small tiles
    "a launcher": 0.37,  # a run of gcc, by Triton 3.6 alone
    "a process's start": 8.0,  # PyTorch, CUDA's context, cuDNN
    "a billion numbers": 0.1,  # drawn on the device
    "a model's provider before its timing": 1.5,  # its first result, cuDNN's benchmark, the judge, the warm-up
    "a layer's provider before its timing": 0.06,
    "torch.compile, infer": 40.0,
    "torch.compile, train": 80.0,
    "the tests themselves, by one core": 600.0,
    "the demo's training, judging and drawing": 15.0,
    "a candidate of tune": 0.05,
}


@dataclass(frozen=True)
class Cost:
    """binaries: kernels to compile, launchers: of Triton 3.6. numbers: to draw. timing: seconds on the clock, by
    --seconds. seconds: modelled, of the whole part with CORES cores. note: what is not counted.
    """

    part: str
    limit: float
    binaries: int
    launchers: int
    numbers: int
    timing: float
    seconds: float
    note: str

    def __str__(self) -> str:
        told = [f"{self.binaries:,} kernels to compile"]
        told += [f"{self.numbers / 1e9:.2f}e9 numbers to draw"] * bool(self.numbers) + [
            f"{self.timing:.0f} s of timing"
        ] * bool(self.timing)
        return f"{', '.join(told)}: about {self.seconds:.0f} s, as modelled"


def compiled(lines: Iterable[str], rate: str = "a binary of a model", cores: int = CORES) -> tuple[int, int, float]:
    """Binaries, launchers, and the seconds that these take."""
    found = list(lines)
    return of_counts(len(found), launchers(found), rate, cores)


def of_counts(binaries: int, launchers: int, rate: str, cores: int) -> tuple[int, int, float]:
    return binaries, launchers, (binaries * RATES[rate] + launchers * RATES["a launcher"]) / cores


# ----------------------------------------------------------------------------------------------------------------------
# Each part


def smoke(part: Part, gpu: devices.Gpu) -> Cost:
    """Each family compiles its own kernels on a core of its own: the slowest one counts."""
    found: list[tuple[int, int, float]] = []
    for family in FAMILIES.values():
        if not (family.tensor_maps and why_not_on(gpu.arch)):
            with recorded(gpu) as lines:
                for trial in family.trials:
                    trial.ours(*trial.operands(torch.device("meta")))
            found.append(compiled(lines, cores=1))
    binaries, makers, seconds = sum(f[0] for f in found), sum(f[1] for f in found), max(f[2] for f in found)
    checks = part.stages[1].limit
    note = f"under {sanitizer.PROGRAM} nobody knows: it gets {checks:.0f} s"
    return Cost(part.name, part.limit, binaries, makers, 0, 0, RATES["a process's start"] + seconds + checks, note)


def tests(part: Part, gpu: devices.Gpu) -> Cost:
    """The cost of the tests, whose launches were counted in the interpreter (launches.py)."""
    counted = json.loads(COUNTED.read_text())
    binaries, makers, seconds = of_counts(counted["launches"], counted["launchers"], "a binary of the tests", CORES)
    seconds += len(part.stages) * RATES["a process's start"] + RATES["the tests themselves, by one core"] / CORES
    return Cost(part.name, part.limit, binaries, makers, 0, 0, seconds, f"counted by: {counted['command']}")


def demo(part: Part, gpu: devices.Gpu) -> Cost:
    x, some = photograph.normalized(photograph.load_photograph(None)), torch.empty(effort.GPU_DIGITS, 1, 8, 8)
    piece = torch.empty(1, 3, assortment.SIZE, assortment.SIZE).contiguous(memory_format=torch.channels_last)
    layers, network = photograph.make_layers(0), digits.make_network(0)
    others = assortment.make_assortment(0)
    # As story.py has them.
    cases = [(layers, x, True), (network, some, True), (network, some, False), (others, piece, True)]
    binaries, makers, seconds = compiled(demo_kernels.launches(cases, effort.GPU_DTYPES, gpu))
    seconds += (
        len(part.stages) * RATES["a process's start"]
        + RATES["the demo's training, judging and drawing"]
        + parts.DEMO_SECONDS
    )
    return Cost(part.name, part.limit, binaries, makers, 0, parts.DEMO_SECONDS, seconds, "")


BACKENDS: dict[str, dispatch.Backend] = {"cnnfast": "auto", "cnnfast-graph": "auto", "cnnfast-kernels": "kernels"}


def model_lines(mode: str, batch: int, backend: dispatch.Backend, gpu: devices.Gpu) -> list[str]:
    model, x = (
        resnet50().to("meta", torch.bfloat16),
        torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device="meta"),
    )
    for t in model.parameters():
        t.data = t.data.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.data
    x = x.contiguous(memory_format=torch.channels_last)
    with dispatch.backend(backend):
        return launches(model.train(mode == "train"), x, train=mode == "train", gpu=gpu)


def bench(
    part: Part, gpu: devices.Gpu, mode: str, batches: Iterable[int], providers: Iterable[str], compiled_at: int
) -> Cost:
    """Each of our providers compiles what it launches, with nothing on disk: what others compiled is not found
    there.
    """
    binaries = makers = 0
    seconds = 0.0
    runs = [(batch, provider) for batch in batches for provider in providers] + [
        (compiled_at, p) for p in parts.COMPILERS
    ]
    for batch, provider in runs:
        if provider in BACKENDS:
            more = compiled(model_lines(mode, batch, BACKENDS[provider], gpu))
            binaries, makers, seconds = binaries + more[0], makers + more[1], seconds + more[2]
    shape = {batch: ((batch, 3, 224, 224),) for batch in (*batches, compiled_at)}
    model, device = plain(resnet50().train(mode == "train")), torch.device("cuda")
    jobs = [Job(parts.MODEL, model, shape[batch], mode, torch.bfloat16, device) for batch in (*batches, compiled_at)]
    numbers = sum(map(numbers_drawn, jobs))
    timing = len(runs) * parts.MODEL_SECONDS
    seconds += len(part.stages) * RATES["a process's start"] + numbers / 1e9 * RATES["a billion numbers"] + timing
    seconds += len(runs) * RATES["a model's provider before its timing"] + RATES[f"torch.compile, {mode}"]
    return Cost(part.name, part.limit, binaries, makers, numbers, timing, seconds, "torch.compile is an allowance")


def infer(part: Part, gpu: devices.Gpu) -> Cost:
    return bench(part, gpu, "infer", parts.INFER_BATCHES, parts.INFER_PROVIDERS, parts.INFER_COMPILED)


def train(part: Part, gpu: devices.Gpu) -> Cost:
    return bench(part, gpu, "train", (parts.TRAIN_BATCH,), parts.TRAIN_PROVIDERS, parts.TRAIN_BATCH)


def layers(part: Part, gpu: devices.Gpu) -> Cost:
    lines: dict[str, None] = {}
    numbers = jobs = 0
    for layer in bench_layers():
        shape = (parts.LAYER_BATCH, layer.C, layer.size, layer.size)
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
        module = layer.module.to("meta", torch.bfloat16)
        for mode in layer.modes:
            jobs += 1
            numbers += numbers_drawn(Job(str(layer), module, (shape,), mode, torch.bfloat16, torch.device("cuda")))
        for backend in dict.fromkeys(BACKENDS[provider] for provider in parts.LAYER_PROVIDERS if provider in BACKENDS):
            with dispatch.backend(backend):
                lines |= dict.fromkeys(launches(module.train(), x.requires_grad_(layer.C > 3), train=True, gpu=gpu))
                lines |= dict.fromkeys(launches(module.eval(), x.detach(), gpu=gpu))
    binaries, makers, seconds = compiled(lines)
    runs = jobs * len(parts.LAYER_PROVIDERS)
    timing = runs * parts.LAYER_SECONDS
    seconds += RATES["a process's start"] + numbers / 1e9 * RATES["a billion numbers"] + timing
    seconds += runs * RATES["a layer's provider before its timing"]
    return Cost(
        part.name,
        part.limit,
        binaries,
        makers,
        numbers,
        timing,
        seconds,
        f"{jobs} jobs; what costs its network most comes first",
    )


def tune(part: Part, gpu: devices.Gpu) -> Cost:
    model, x = resnet50().to("meta"), torch.empty(parts.TUNE_BATCH, 3, 224, 224, device="meta")
    found = planned(model, (x,), (False,), dtype=parts.DTYPE, memory_format=torch.channels_last, gpu=gpu)
    lines = dict.fromkeys(line for measured in found for line in ahead.launches(measured, gpu))
    binaries, makers, seconds = compiled(lines)
    candidates = sum(len(measured.candidates) for measured in found)
    timing = candidates * RATES["a candidate of tune"]
    note = f"{len(found)} convolutions with {candidates} candidates; what costs most comes first"
    return Cost(
        part.name, part.limit, binaries, makers, 0, timing, RATES["a process's start"] + seconds + 2 * timing, note
    )


COSTS: dict[str, Callable[[Part, devices.Gpu], Cost]] = {
    each.__name__: each for each in (smoke, tests, demo, infer, train, layers, tune)
}


# ----------------------------------------------------------------------------------------------------------------------


def commands(part: Part, folder: Path) -> list[str]:
    """What the part runs, as a shell takes it, wherever its files and Python are."""
    argvs = [command.argv for stage in part.stages for command in stage.commands]
    return [
        shlex.join("python" if word == sys.executable else word for word in argv).replace(str(folder), "FOLDER")
        for argv in argvs
    ]


def plain_json(costs: Iterable[Cost], wanted: Iterable[Part], folder: Path, gpu: devices.Gpu, commit: str) -> str:
    told: dict[str, Any] = {
        "command": COMMAND,
        "gpu": gpu.name,
        "arch": gpu.arch,
        "commit": commit,
        "cores": CORES,
        "rates": RATES,
    }
    told["parts"] = [
        {**asdict(cost), "told": str(cost), "commands": commands(part, folder)}
        for cost, part in zip(costs, wanted, strict=True)
    ]
    return json.dumps(told, indent=1)
