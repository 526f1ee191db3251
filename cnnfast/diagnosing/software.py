"""Versions of what cnnfast depends on, and whether they fit. Nothing here needs a torch that can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import __version__
from ..triton_here import NEWEST_TRITON, OLDEST_TRITON, SUPPORTED_TRITON
from .finding import Command, Finding, in_a_line

TOPIC = "Software"
OPTIONAL_TOPIC = "Optional"

OLDEST_TORCH = (2, 11)

# What each is for here, and how it is installed from a clone of cnnfast's repository.
OPTIONAL = {
    "torchvision": ("its models are known by name to all commands", "pip install torchvision"),
    "timm": ("its models are known by name to all commands", "pip install timm"),
    "transformers": ("its models are known by name to all commands", "pip install transformers"),
    "scikit-learn": ("cnnfast demo trains on its digits", 'pip install ".[demo]"'),
    "matplotlib": ("cnnfast demo, bench --pictures and profiles draw with it", 'pip install ".[demo]"'),
    "lightning": ("cnnfast demo and train learn by it", 'pip install ".[train]"'),
    "onnxruntime": ("cnnfast.freeze runs networks by it on a CPU", 'pip install ".[cpu]"'),
    "onnx": ("cnnfast.freeze writes networks for onnxruntime with it", 'pip install ".[cpu]"'),
    "pillow": ("cnnfast predict, augment and train read images with it", 'pip install ".[images]"'),
    "openvino": ("cnnfast bench compares with it on a CPU", "pip install openvino onnxscript"),
    "jax": ("cnnfast bench compares with it", "pip install jax"),
}


def distribution(name: str) -> str | None:
    """The version of an installed distribution, found without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def imported(name: str) -> ModuleType | Exception | None:
    """A module; what importing it raised; None where it is not installed."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
        return importlib.import_module(name)
    except (
        Exception
    ) as error:  # whatever a broken installation raises, such as OSError for a library that does not load
        return error


def numbers(version: str) -> tuple[int, ...]:
    """Major and minor, by which versions are compared: (2, 13) for "2.13.0+cu130"."""
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:2])


def python() -> Finding:
    interpreter = f"Python {platform.python_version()} ({sys.executable}) on {platform.platform()}"
    return Finding(TOPIC, "python", "ok", f"{interpreter}.")


def torch() -> Finding:
    """Its version, CUDA and cuDNN."""
    found = imported("torch")
    if not isinstance(found, ModuleType):
        why = "is not installed" if found is None else f"does not import: {type(found).__name__}: {in_a_line(found)}"
        line = "pip install --force-reinstall torch" if found else "pip install torch"
        advice = "Install it again; https://pytorch.org/get-started/locally names the build for this machine."
        text = f"torch {why}. Without it cnnfast can do nothing."
        return Finding(TOPIC, "torch", "broken", text, advice, Command(line, "cnnfast is built on it"))
    module: Any = found
    if numbers(module.__version__) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        text = f"torch is {module.__version__}; cnnfast needs {oldest} or newer, and uses what older ones do not have."
        update = Command(f'pip install "torch>={oldest}"', "cnnfast needs it")
        return Finding(TOPIC, "torch", "broken", text, "Update it.", update)
    if module.version.hip:
        text = f"torch {module.__version__}, built for AMD's GPUs by ROCm {module.version.hip}."
        return Finding(TOPIC, "torch", "ok", text)
    if module.version.cuda is None:
        return Finding(TOPIC, "torch", "ok", f"torch {module.__version__}, a build without CUDA: it computes on CPUs.")
    built = f"torch {module.__version__}, built for CUDA {module.version.cuda}"
    try:
        cudnn = module.backends.cudnn.version()  # PyTorch raises if the cuDNN that it finds does not fit
    except RuntimeError as error:
        text = f"{built}, finds a cuDNN that it was not built with, and every convolution on a GPU fails"
        text += f": {in_a_line(error)}"
        return Finding(TOPIC, "torch", "broken", text, "Take the folder of that cuDNN out of LD_LIBRARY_PATH.")
    if cudnn is None:
        return Finding(TOPIC, "torch", "note", f"{built}, without cuDNN: convolutions that are not ours are slow.")
    return Finding(TOPIC, "torch", "ok", f"{built}, with cuDNN {cudnn_version(cudnn)}.")


def cudnn_version(number: int) -> str:
    """9.10.2 of 91002; before version 9 the major version stood before three digits, not four."""
    major = number // 10_000 if number >= 90_000 else number // 1_000
    return f"{major}.{number // 100 % (100 if major >= 9 else 10)}.{number % 100}"


def triton_of_torch() -> str:
    """The version of triton that the installed torch asks for; "" if it asks for none, as builds for CPUs do."""
    try:
        requirements = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return ""
    asked = (re.match(r"triton\s*\(?==\s*([\d.]+)", requirement) for requirement in requirements)
    return next((match[1] for match in asked if match), "")


def triton(beside_a_gpu: bool) -> Finding:
    """Whether triton is installed, and supported by cnnfast. beside_a_gpu: whether our kernels cover a GPU here."""
    wrong = "broken" if beside_a_gpu else "note"
    asked = triton_of_torch()
    install = triton_command(asked)
    found = imported("triton")
    if found is None:
        text = "triton is not installed: there are no kernels of cnnfast's, and PyTorch serves every call."
        if sys.platform != "linux":
            return Finding(TOPIC, "triton", "note", f"{text} It is made for Linux, and cnnfast asks for it only there.")
        return Finding(TOPIC, "triton", wrong, text, "Install it.", install)
    if isinstance(found, Exception):
        text = f"triton does not import, and PyTorch serves every call: {type(found).__name__}: {in_a_line(found)}"
        again = install._replace(line=install.line.replace("install", "install --force-reinstall"))
        return Finding(TOPIC, "triton", wrong, text, "Install it again.", again)
    version = str(getattr(found, "__version__", ""))
    if not supported(version):
        text = f"triton is {version}; cnnfast supports {SUPPORTED_TRITON}, and was tested with no other."
        text += " Kernels may not compile."
        return Finding(TOPIC, "triton", wrong, text, "Install one of them.", install)
    kernels = imported("cnnfast_kernels.launch")
    if isinstance(kernels, Exception):
        text = (
            f"triton is {version}, but cnnfast's kernels do not import: {type(kernels).__name__}: {in_a_line(kernels)}"
        )
        return Finding(TOPIC, "triton", wrong, text, "Install triton again.", install)
    if asked and numbers(asked) != numbers(version):
        text = f"triton {version}, which cnnfast supports; torch asks for {asked}, and torch.compile may need that one."
        return Finding(TOPIC, "triton", "note", text)
    return Finding(TOPIC, "triton", "ok", f"triton {version}, which cnnfast supports.")


def supported(version: str) -> bool:
    return OLDEST_TRITON <= numbers(version) <= NEWEST_TRITON


def triton_command(asked: str) -> Command:
    """What installs a triton that fits: the one that torch asks for, if cnnfast supports that."""
    if asked and supported(asked):
        return Command(f'pip install "triton=={asked}"', f"the one that torch {distribution('torch')} asks for")
    versions = f">=3.{OLDEST_TRITON[1]},<3.{NEWEST_TRITON[1] + 1}"
    return Command(f'pip install "triton{versions}"', f"cnnfast supports {SUPPORTED_TRITON}")


def interpreting() -> Finding | None:
    """A note if Triton interprets: nothing else shows it but the time that everything takes."""
    kernels: Any = imported("cnnfast_kernels.launch")
    if not isinstance(kernels, ModuleType) or not kernels.INTERPRETED:  # type: ignore[attr-defined]
        return None
    text = (
        "TRITON_INTERPRET is set: kernels are interpreted on the CPU, right to the bit, but thousands of times slower."
    )
    return Finding(TOPIC, "interpreter", "note", text, "Unset it for anything but tests.")


def cnnfast() -> Finding:
    """Its version and place: more than one copy on a machine is common."""
    place = Path(__file__).resolve().parents[1]
    library = imported("cnnfast.dispatch")
    if isinstance(library, Exception):
        text = f"cnnfast {__version__} in {place} does not import: {type(library).__name__}: {in_a_line(library)}"
        advice, again = "Install it again, from a clone of its repository.", Command("pip install .", "in the clone")
        return Finding(TOPIC, "cnnfast", "broken", text, advice, again)
    return Finding(TOPIC, "cnnfast", "ok", f"cnnfast {__version__} in {place}.")


def optional() -> list[Finding]:
    """What only some commands need."""
    found = []
    for name, (purpose, line) in OPTIONAL.items():
        version = distribution(name)
        # Only torchvision is compiled against one build of torch and fails beside another; timm imports it.
        broken = imported(name) if version and name == "torchvision" else None
        if isinstance(broken, Exception):
            said = f"{version} does not import, nor does what needs it, such as timm"
            said += f": {type(broken).__name__}: {in_a_line(broken)}."
            advice = "Install the one that was built for this torch, from the same index."
            found.append(Finding(OPTIONAL_TOPIC, name, "note", said, advice))
        else:
            said = f"{version}: {purpose}." if version else f"not installed: {purpose} ({line})."
            found.append(Finding(OPTIONAL_TOPIC, name, "ok", said))
    return found


def torch_compile(launches: bool | None) -> Finding:
    """Whether torch.compile has the compiler that it needs. launches: whether Triton launches on the GPU, None if there
    is no GPU.
    """
    if launches is not None:
        fails = "not usable on this GPU, since Triton does not launch."
        said = "usable on this GPU: Triton launches." if launches else fails
        return Finding(OPTIONAL_TOPIC, "torch.compile", "ok" if launches else "note", said)
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++", "cl"))), None)
    fails = "not usable on the CPU: it needs a C++ compiler, and there is none."
    said = f"usable on the CPU: {compiler} is there." if compiler else fails
    return Finding(OPTIONAL_TOPIC, "torch.compile", "ok" if compiler else "note", said)
