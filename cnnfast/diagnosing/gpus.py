"""NVIDIA's driver, what PyTorch makes of it, and the GPUs."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .. import dispatch
from .finding import Command, Finding, in_a_line

TOPIC = "GPU"
SMI_LIMIT = 20  # seconds: with a GPU that has fallen off the bus nvidia-smi never answers
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
LIBCUDA = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# What PyTorch says when CUDA does not start, and what helps.
HELP = (
    ("too old", ""),  # `_help` says which driver is needed
    ("Error 802", "Start NVIDIA's fabric manager, which connects the GPUs: sudo systemctl start nvidia-fabricmanager."),
    ("Error 803", "The driver was updated and its older half is still loaded: restart the machine."),
    (
        "Error 804",
        "A libcuda of a cuda-compat package is found before the driver's: take its folder out of LD_LIBRARY_PATH.",
    ),
    (
        "unknown error",
        "Load the driver's module again (sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm),"
        " or restart the machine.",
    ),
    ("out of memory", "Other processes have taken the GPU's memory; nvidia-smi lists them."),
    ("busy or unavailable", "Another process has the GPU for itself; nvidia-smi lists it."),
)
CONTAINER = "start it with its GPUs (docker run --gpus all)"
HIDDEN = f"See whether CUDA_VISIBLE_DEVICES hides the GPU. If this is a container, {CONTAINER}."
LOCALLY = "https://pytorch.org/get-started/locally"


# ----------------------------------------------------------------------------------------------------------------------
# What is asked of the machine


class Smi(NamedTuple):
    """What nvidia-smi says: names of all GPUs, hidden ones too, and the driver's version; or why it does not work."""

    gpus: tuple[str, ...] = ()
    driver: str = ""
    complaint: str = ""


class Cuda(NamedTuple):
    """What PyTorch finds: how many GPUs it can use, why it cannot use any, and what it warned of."""

    gpus: int
    error: str = ""
    warned: tuple[str, ...] = ()


def nvidia_smi() -> Smi:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Smi()
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=SMI_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return Smi(complaint=f"it did not answer within {SMI_LIMIT} s")
    except OSError as error:
        return Smi(complaint=f"it does not start: {error}")
    if said.returncode:
        return Smi(complaint=in_a_line(said.stdout or said.stderr))
    rows = [line.rpartition(", ") for line in said.stdout.splitlines() if ", " in line]
    return Smi(tuple(name for name, _, _ in rows), rows[0][2] if rows else "")


def kernel_module() -> str:
    """The version of the driver's kernel module that Linux, or a container's host, has loaded; "" if there is none."""
    try:
        said = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", KERNEL_MODULE.read_text() + " ")
    except OSError:
        return ""
    return said[1] if said else ""


def newest_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports; None without the driver's library."""
    number = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL(LIBCUDA).cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed or not number.value else (number.value // 1000, number.value % 1000 // 10)


def cuda() -> Cuda:
    """Starts CUDA in this process, as PyTorch does at its first use."""
    error, count = "", 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()
            count = torch.cuda.device_count()
        # A build without CUDA raises AssertionError, a driver that does not fit RuntimeError.
        except Exception as raised:
            error = in_a_line(str(raised).partition(" Please ")[0])  # HELP has better advice than what follows
    return Cuda(count, error, tuple(in_a_line(warning.message) for warning in told))


# ----------------------------------------------------------------------------------------------------------------------
# What that means


def driver(smi: Smi) -> Finding:
    """The driver's version beside the CUDA that torch was built for."""
    version, newest = smi.driver or kernel_module(), newest_cuda()
    if smi.complaint and kernel_module():
        text = f"NVIDIA's driver {version} is loaded, but nvidia-smi does not work, and nothing on the GPU will"
        text += f": {smi.complaint}"
        advice = "Restart the machine, or the container with its GPUs; if that does not help, install the driver again."
        return Finding(TOPIC, "driver", "broken", text, advice)
    if smi.complaint:
        return Finding(TOPIC, "driver", "note", f"NVIDIA's driver is not loaded; nvidia-smi says: {smi.complaint}")
    if not version and newest is None:
        text = "There is no NVIDIA driver: this machine has no GPU of NVIDIA's, or this process is not given it."
        return Finding(TOPIC, "driver", "ok", text)
    if newest is None:
        text = f"This machine has NVIDIA's driver {version}, but this process finds no {LIBCUDA}, which belongs to it."
        return Finding(TOPIC, "driver", "note", text, f"If this is a container, {CONTAINER}.")
    text = f"NVIDIA's driver {version or '(version unknown)'} supports CUDA up to {_dotted(newest)}"
    if torch.version.cuda is None:
        return Finding(TOPIC, "driver", "ok", f"{text}.")
    built, text = _version(torch.version.cuda), f"{text}; torch was built for CUDA {torch.version.cuda}"
    if newest[0] < built[0]:
        return Finding(TOPIC, "driver", "note", f"{text}, which is newer.")
    if newest < built:
        return Finding(TOPIC, "driver", "ok", f"{text}, which is newer, but runs on it: the major version is the same.")
    return Finding(TOPIC, "driver", "ok", f"{text}.")


def usable(smi: Smi, found: Cuda) -> Finding:
    """Whether PyTorch can use what nvidia-smi lists."""
    listed = ", ".join(dict.fromkeys(smi.gpus))
    if found.gpus:
        unfit = [w for w in found.warned if "compute capability" in w or "CUDA capability" in w]
        if unfit:
            state = "broken" if len(unfit) >= found.gpus else "note"  # an old card for the screen is no defect
            text = f"This torch has no code for {'a' if state == 'note' else 'the'} GPU here, and every operator fails"
            return Finding(
                TOPIC, "PyTorch", state, f"{text} there: {unfit[0]}", "Install a torch that was built for it."
            )
        text = f"PyTorch can use {_gpus(found.gpus)}."
        if len(smi.gpus) > found.gpus:
            text += f" {len(smi.gpus) - found.gpus} more are hidden from this process, perhaps by CUDA_VISIBLE_DEVICES."
        return Finding(TOPIC, "PyTorch", "ok", text)
    if torch.version.cuda is None and not torch.version.hip:
        if not smi.gpus:
            return Finding(TOPIC, "PyTorch", "ok", "PyTorch computes on the CPU: this build has no CUDA.")
        text = f"nvidia-smi lists {listed}, but this torch is a build without CUDA: it computes on the CPU."
        advice = f"Install a build for CUDA; {LOCALLY} names those for your driver."
        command = Command("pip install --force-reinstall torch", "on Linux this is a build for CUDA")
        return Finding(TOPIC, "PyTorch", "broken", text, advice, command)
    why = f"and computes on the CPU: {found.error.rstrip('.')}."
    if smi.gpus:
        text = f"nvidia-smi lists {listed}, but PyTorch cannot use a GPU, {why}"
        return Finding(TOPIC, "PyTorch", "broken", text, _help(found.error))
    if "too old" in found.error:  # a driver is there, even if nvidia-smi is not
        return Finding(TOPIC, "PyTorch", "broken", f"PyTorch cannot use the GPU, {why}", _help(found.error))
    return Finding(TOPIC, "PyTorch", "ok", "PyTorch finds no GPU, and computes on the CPU.")


def _help(error: str) -> str:
    """What to do about an error that CUDA's start raised."""
    known = next((advice for words, advice in HELP if words.lower() in error.lower()), HIDDEN)
    if known:
        return known
    newest = newest_cuda()
    other = f", or install a torch that was built for CUDA {newest[0]}" if newest else ""
    return f"Update NVIDIA's driver to one that supports CUDA {torch.version.cuda}{other} ({LOCALLY})."


def each(count: int) -> list[Finding]:
    """Each GPU that PyTorch can use, and whether our kernels cover it."""
    found = []
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
        if not torch.version.hip:
            text += f", sm_{about.major}{about.minor}, {about.multi_processor_count} multiprocessors"
        why_not = dispatch._gpu_reason(index)
        if why_not:
            text += f". Our kernels do not cover it ({why_not}): PyTorch serves every call there."
            found.append(Finding(TOPIC, f"cuda:{index}", "note", text))
        else:
            found.append(Finding(TOPIC, f"cuda:{index}", "ok", f"{text}. Our kernels cover it."))
    return found


def covered(count: int) -> list[torch.device]:
    """The GPUs that our kernels cover."""
    return [torch.device("cuda", index) for index in range(count) if not dispatch._gpu_reason(index)]


def _gpus(count: int) -> str:
    return "one GPU" if count == 1 else f"{count} GPUs"


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
