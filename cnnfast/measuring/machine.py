"""The machine that a run is made on: what it is, and how fast it can be."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from .timing import Clock, clock_of

COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # well beyond the last-level cache
MATRIX = {"cuda": 8192, "cpu": 768}


@dataclass(frozen=True)
class Machine:
    """The machine and its software, which every row carries. device: the name of the GPU, or of the processor. clocks:
    in MHz, each with its limit, before the run; empty if unknown. commit: of cnnfast's own checkout, with + if files
    have changed since; empty if there is none.
    """

    device: str
    driver: str
    clocks: str
    torch: str
    triton: str
    cudnn: str
    commit: str


@dataclass(frozen=True)
class Peaks:
    """The most that the machine does in a second: FLOPs of a matrix product, and bytes of a copy, read and written."""

    flops: float
    bytes: float


def this_machine(device: torch.device) -> Machine:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    gpu = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if gpu else _processor(),
        driver=_smi("driver_version") if gpu else "",
        clocks=_smi("clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem") if gpu else "",
        torch=torch.__version__,
        triton=version,
        cudnn=str(torch.backends.cudnn.version() or "") if gpu else "",
        commit=_commit(),
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _smi(fields: str) -> str:
    return _output(
        "nvidia-smi",
        f"--query-gpu={fields}",
        "--format=csv,noheader",
        "-i",
        f"GPU-{torch.cuda.get_device_properties().uuid}",
    )


def _commit() -> str:
    """The commit of the repository that this file is in; the empty string if it is in none."""
    here = str(Path(__file__).resolve().parents[2])
    if not Path(here, ".git").exists():
        return ""
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    return commit + "+" * bool(commit and _output("git", "-C", here, "status", "--porcelain"))


def _output(*command: str) -> str:
    """What a command prints; the empty string where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def measure_peaks(device: torch.device, dtype: torch.dtype, clock: Clock | None = None) -> Peaks:
    """Measures the peaks: the fastest of five copies of a large tensor, and of five products of large matrices in
    `dtype`, as PyTorch does them.
    """
    clock = clock or clock_of(device)
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = MATRIX[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = [min(clock.sample(step, 3) for _ in range(5)) for step in (lambda: target.copy_(source), lambda: a @ b)]
    return Peaks(flops=2 * n**3 / seconds[1], bytes=2 * source.nbytes / seconds[0])
