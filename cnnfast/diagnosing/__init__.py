"""What `cnnfast doctor` asks of this machine, and what it makes of the answers.

Each question is a function that returns a Finding, or several. `diagnose` puts them in order, because one answer
decides what can be asked next: nothing about PyTorch if torch does not import, nothing of a kernel if there is no GPU,
and nothing is launched in this process that crashed another. A module of this package imports no more than its
questions need: software.py asks even if there is no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import software
from .finding import Command as Command
from .finding import Diagnosis as Diagnosis
from .finding import Finding as Finding
from .finding import in_a_line

if TYPE_CHECKING:
    from cnnfast_kernels.devices import Gpu

CHECK = Command("cnnfast check resnet18", "judges every layer of a model against float64, on this machine")
DEMO = Command("cnnfast demo", "the whole story on this machine, in a few minutes")
INFO = Command("cnnfast info resnet50", "the layers of a model: shapes, parameters, FLOPs")


def diagnose(tell: Callable[[str], None] = lambda text: None) -> Diagnosis:
    """All findings about this machine and this process. tell: called with what begins.

    On a GPU nothing is launched in this process that was not launched in another before, which takes as long as a few
    small kernels take to compile. Without a GPU all of it takes about as long as importing torch.
    """
    tell("asking for versions")
    found = [software.python(), software.torch()]
    if found[-1].state != "broken":
        found.append(software.cnnfast())
    if any(finding.state == "broken" for finding in found):
        return Diagnosis([*found, software.triton(False), *software.optional()])
    return _with_torch(found, tell)


def _with_torch(found: list[Finding], tell: Callable[[str], None]) -> Diagnosis:
    import torch

    from .. import dispatch
    from . import folders, gpus, servers

    tell("asking NVIDIA's driver")
    smi = gpus.nvidia_smi()
    tell("starting CUDA")
    cuda = gpus.cuda()
    covered = gpus.covered(cuda.gpus)
    found += [software.triton(bool(covered)), *filter(None, [software.interpreting()])]
    found += _asked(gpus.TOPIC, lambda: [gpus.driver(smi), gpus.usable(smi, cuda), *gpus.each(cuda.gpus)])

    launches = False if covered else None  # None: there is nothing to launch on
    refusal = ""  # why nobody may be asked who serves: that builds a launcher in this process
    names: dict[str, Gpu] = {}
    kernels: Any = dispatch.launch
    if kernels is not None:
        from . import launching

        tell("asking for a C compiler")
        found += _asked(launching.TOPIC, lambda: [launching.compiler(bool(covered))])
        if kernels.INTERPRETED:
            tell("interpreting small kernels")
            found += launching.findings(launching.here(torch.device("cpu")), {"cpu": "the CPU, interpreted,"})
            launches = None
        elif covered:
            # This comes before this process uses a GPU: one that only a single process may use would refuse the child.
            from cnnfast_kernels import devices

            names = {str(gpu): devices.gpu(gpu) for gpu in covered}
            trial = launching.tried(covered, lambda step: tell(f"launching in another process: {step}"))
            found += launching.findings(trial, {device: gpu.name for device, gpu in names.items()})
            launches, refusal = trial.launches, trial.ended
        found += _asked(folders.TOPIC, lambda: [folders.triton_cache(launching.cache_folder())])

    tell("reading tables")
    found += _asked(
        folders.TOPIC,
        lambda: [folders.table_folder(), *folders.table_files(bool(names)), *folders.measured(list(names.values()))],
    )

    tell("asking who serves")
    device = covered[0] if covered else torch.device("cuda", 0) if cuda.gpus else torch.device("cpu")
    if refusal:
        found.append(
            Finding(
                servers.TOPIC,
                "every call",
                "note",
                "Not asked: asking builds a launcher in this process too, and launching ended the other one.",
            )
        )
    else:
        found += _asked(servers.TOPIC, lambda: servers.who(device))
    if device.type == "cuda":
        found += _asked(servers.TOPIC, lambda: [servers.float32_products(device)])
    found += [*software.optional(), software.torch_compile(launches)]
    return Diagnosis(found, _otherwise(bool(covered)))


def _asked(topic: str, ask: Callable[[], list[Finding]]) -> list[Finding]:
    """The answers. A question that fails unexpectedly becomes a note, and the others are still asked."""
    try:
        return ask()
    except Exception as error:
        return [
            Finding(topic, "doctor", "note", f"This could not be asked: {type(error).__name__}: {in_a_line(error)}")
        ]


def _otherwise(covered: bool) -> list[Command]:
    """What to run if nothing is broken. covered: whether there is a GPU that our kernels cover."""
    missing = [
        line
        for name, (_, line) in software.OPTIONAL.items()
        if name in ("scikit-learn", "matplotlib") and not software.distribution(name)
    ]
    demo = Command(missing[0], "what cnnfast demo needs, from a clone of cnnfast's repository") if missing else DEMO
    return [CHECK, demo] if covered else [demo, INFO]
