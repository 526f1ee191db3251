"""What doctor finds, on machines of all kinds: questions to the machine are answered by the tests, what follows from
them is the code's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import cnnfast
import cnnfast.functional as F
from cnnfast import diagnosing, dispatch
from cnnfast.__main__ import app
from cnnfast.diagnosing import Command, Diagnosis, Finding, folders, gpus, servers, software
from cnnfast.diagnosing.gpus import Cuda, Smi
from cnnfast.precision import float32_products
from cnnfast_kernels import tables
from cnnfast_kernels.problem import ConvProblem
from cnnfast_kernels.tiling import TileConfig
from tests.support.child import IMPORTABLE, run_compiled

pytest.importorskip("triton")
from cnnfast.diagnosing import launching, trial
from cnnfast_kernels import devices, launch, launchable

REPOSITORY = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
H200 = devices.Gpu("NVIDIA H200", 90)
LISTED = Smi(("NVIDIA H200",), "580.65.06")
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020)."
STEPS = [name for name, _ in trial.steps(CPU)]
FINE = launching.Trial([trial.Outcome("cpu", step, "", False, 0.1) for step in STEPS])


def states(findings) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def named(findings, name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What is said


def test_while_something_is_broken_nothing_else_comes_next():
    mend, other, tune = (Command(line, "why") for line in ("mend", "other", "tune"))
    broken = [Finding("GPU", f"b{i}", "broken", "It hurts.", "Mend it.", mend) for i in range(2)]
    found = Diagnosis([Finding("GPU", "n", "note", "Unmeasured.", "", tune), *broken], [other])
    assert not found.ok
    assert [command.line for command in found.commands] == ["mend", "cnnfast doctor"]
    assert str(found).count("It hurts. Mend it.") == 2
    assert [command.line for command in Diagnosis(found.findings[:1], [other]).commands] == ["tune", "other"]
    data = json.loads(found.to_json())
    assert (data["ok"], data["commands"][0]["line"]) == (False, "mend")
    assert [f["command"] for f in data["findings"]] == ["tune", "mend", "mend"]


# ----------------------------------------------------------------------------------------------------------------------
# Software


def modules(monkeypatch, **known) -> None:
    """What software.imported finds; what is not named, it finds as ever."""
    find = software.imported
    monkeypatch.setattr(software, "imported", lambda name: known[name] if name in known else find(name))


def torch_module(version="2.13.0+cu130", cuda="13.0", cudnn=lambda: 91002, hip=None) -> SimpleNamespace:
    module = type(sys)("torch")
    backends = SimpleNamespace(cudnn=SimpleNamespace(version=cudnn))
    module.__dict__.update(__version__=version, version=SimpleNamespace(cuda=cuda, hip=hip), backends=backends)
    return module


def raises(error: Exception):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize(
    ("found", "state", "says"),
    [
        (torch_module(), "ok", "torch 2.13.0+cu130, built for CUDA 13.0, with cuDNN 9.10.2."),
        (torch_module(cudnn=lambda: 8907), "ok", "cuDNN 8.9.7"),
        (torch_module(cuda=None), "ok", "without CUDA"),
        (torch_module(cuda=None, hip="6.4"), "ok", "ROCm 6.4"),
        (
            torch_module(cudnn=raises(RuntimeError("cuDNN version incompatibility:\n9 and 8"))),
            "broken",
            "incompatibility: 9 and 8",
        ),
        (torch_module(cudnn=lambda: None), "note", "without cuDNN"),
        (torch_module("2.10.1"), "broken", "needs 2.11 or newer"),
        (OSError("libcublas.so.13: cannot open"), "broken", "does not import: OSError: libcublas.so.13"),
        (None, "broken", "is not installed"),
    ],
)
def test_torch(monkeypatch, found, state, says):
    modules(monkeypatch, torch=found)
    finding = software.torch()
    assert finding.state == state
    assert says in finding.text
    assert (state != "broken") or finding.advice


def triton_module(version: str):
    module = type(sys)("triton")
    module.__version__ = version
    return module


@pytest.mark.parametrize(
    ("found", "asked", "beside", "alone", "says", "line"),
    [
        (triton_module("3.7.1"), "3.7.1", "ok", "ok", "supports", None),
        (triton_module("3.6.0"), "", "ok", "ok", "supports", None),
        (triton_module("3.9.0"), "3.7.1", "note", "note", "torch asks for 3.7.1", None),
        (triton_module("3.5.1"), "3.5.1", "broken", "note", "supports 3.6 to 3.9", 'pip install "triton>=3.6,<3.10"'),
        (triton_module("3.10.0"), "3.7.1", "broken", "note", "supports 3.6 to 3.9", 'pip install "triton==3.7.1"'),
        (None, "3.7.1", "broken", "note", "not installed", 'pip install "triton==3.7.1"'),
        (
            ImportError("libtriton.so"),
            "3.7.1",
            "broken",
            "note",
            "does not import",
            'pip install --force-reinstall "triton==3.7.1"',
        ),
    ],
)
def test_triton(monkeypatch, found, asked, beside, alone, says, line):
    """Which one is there, and whether it fits: broken only beside a GPU, since nothing needs it elsewhere."""
    monkeypatch.setattr(software.sys, "platform", "linux")
    monkeypatch.setattr(software, "triton_of_torch", lambda: asked)
    modules(monkeypatch, triton=found)
    for beside_a_gpu, state in ((True, beside), (False, alone)):
        finding = software.triton(beside_a_gpu)
        assert finding.state == state
        assert says in finding.text
        assert (finding.command.line if finding.command else None) == line


def test_a_triton_that_our_kernels_do_not_import_with(monkeypatch):
    modules(
        monkeypatch,
        **{"triton": triton_module("3.8.0"), "cnnfast_kernels.launch": ImportError("cannot import name 'knobs'")},
    )
    assert software.triton(True).state == "broken"
    assert "cannot import name 'knobs'" in software.triton(True).text


def test_the_supported_versions_are_those_that_are_required():
    required = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    (oldest, beyond), (torch_oldest,) = (
        next(re.findall(r"[>=<]=?([\d.]+)", r.partition(";")[0]) for r in required if r.startswith(name))
        for name in ("triton", "torch")
    )
    assert software.numbers(oldest) == software.OLDEST_TRITON
    assert software.numbers(beyond) == (3, software.NEWEST_TRITON[1] + 1)
    assert software.numbers(torch_oldest) == software.OLDEST_TORCH
    assert software.SUPPORTED_TRITON == " to ".join(
        ".".join(map(str, v)) for v in (software.OLDEST_TRITON, software.NEWEST_TRITON)
    )


def test_the_triton_that_torch_asks_for(monkeypatch):
    def requires(*lines):
        monkeypatch.setattr(metadata, "requires", lambda name: list(lines))
        return software.triton_of_torch()

    assert requires("filelock", 'triton==3.7.1; platform_system == "Linux"') == "3.7.1"
    assert requires("filelock") == ""


def test_optional_packages_and_torch_compile(monkeypatch):
    monkeypatch.setattr(software, "distribution", lambda name: "1.2" if name == "timm" else None)
    found = software.optional()
    assert set(states(found).values()) == {"ok"}  # nobody needs them
    assert named(found, "timm").text.startswith("1.2: ")
    assert 'pip install ".[demo]"' in named(found, "matplotlib").text
    modules(monkeypatch, torchvision=RuntimeError("operator torchvision::nms does not exist"))
    monkeypatch.setattr(software, "distribution", lambda name: "1.2")
    found = software.optional()
    assert [name for name, state in states(found).items() if state == "note"] == ["torchvision"]
    assert "torchvision::nms" in named(found, "torchvision").text
    monkeypatch.setattr(software.shutil, "which", lambda name: None)
    assert [software.torch_compile(launches).state for launches in (True, False, None)] == ["ok", "note", "note"]


# ----------------------------------------------------------------------------------------------------------------------
# Driver and GPUs


@pytest.mark.parametrize(
    ("smi", "module", "newest", "built", "state", "says"),
    [
        (Smi(), "", None, "13.0", "ok", "no NVIDIA driver"),
        (Smi(), "", None, None, "ok", "no NVIDIA driver"),
        (LISTED, "580.65.06", (13, 0), "12.8", "ok", "CUDA up to 13.0; torch was built for CUDA 12.8"),
        (LISTED, "580.65.06", (13, 0), "13.2", "ok", "the major version is the same"),
        (LISTED, "535.1", (12, 2), "13.0", "note", "which is newer"),
        (Smi(), "535.1", None, "13.0", "note", "finds no libcuda"),
        (Smi(complaint="Driver/library version mismatch"), "535.1", (12, 2), "13.0", "broken", "version mismatch"),
        (Smi(complaint="couldn't communicate with the NVIDIA driver"), "", None, "13.0", "note", "not loaded"),
    ],
)
def test_driver(monkeypatch, smi, module, newest, built, state, says):
    monkeypatch.setattr(gpus, "kernel_module", lambda: module)
    monkeypatch.setattr(gpus, "newest_cuda", lambda: newest)
    monkeypatch.setattr(gpus, "LIBCUDA", "libcuda.so.1")
    monkeypatch.setattr(torch.version, "cuda", built)
    finding = gpus.driver(smi)
    assert finding.state == state
    assert says in finding.text


UNFIT = "Found GPU0 NVIDIA GeForce GT 710 which is of compute capability (CC) 3.5."


@pytest.mark.parametrize(
    ("smi", "found", "built", "state", "says"),
    [
        (Smi(), Cuda(0, "Found no NVIDIA driver"), "13.0", "ok", "no GPU"),
        (Smi(), Cuda(0, "Torch not compiled with CUDA enabled"), None, "ok", "no CUDA"),
        (LISTED, Cuda(1), "13.0", "ok", "one GPU"),
        (Smi(LISTED.gpus * 8, "1"), Cuda(2), "13.0", "ok", "6 more are hidden"),
        (LISTED, Cuda(0, "Torch not compiled with CUDA enabled"), None, "broken", "a build without CUDA"),
        (
            LISTED,
            Cuda(0, TOO_OLD),
            "13.0",
            "broken",
            "supports CUDA 13.0, or install a torch that was built for CUDA 12",
        ),
        (Smi(), Cuda(0, TOO_OLD), "13.0", "broken", "supports CUDA 13.0"),
        (LISTED, Cuda(0, "No CUDA GPUs are available"), "13.0", "broken", "CUDA_VISIBLE_DEVICES"),
        (LISTED, Cuda(0, "Error 802: system not yet initialized"), "13.0", "broken", "fabricmanager"),
        (LISTED, Cuda(0, "Error 803: unsupported display driver"), "13.0", "broken", "restart"),
        (LISTED, Cuda(0, "Error 804: forward compatibility was attempted"), "13.0", "broken", "LD_LIBRARY_PATH"),
        (LISTED, Cuda(0, "CUDA unknown error - this may be due to"), "13.0", "broken", "nvidia_uvm"),
        (LISTED, Cuda(0, "CUDA error: out of memory"), "13.0", "broken", "nvidia-smi lists them"),
        (LISTED, Cuda(1, "", (UNFIT,)), "13.0", "broken", "GT 710"),
        (LISTED, Cuda(2, "", (UNFIT,)), "13.0", "note", "GT 710"),
    ],
)
def test_a_gpu_that_nvidia_smi_sees_and_torch_does_not(monkeypatch, smi, found, built, state, says):
    monkeypatch.setattr(gpus, "newest_cuda", lambda: (12, 2))
    monkeypatch.setattr(torch.version, "cuda", built)
    finding = gpus.usable(smi, found)
    assert finding.state == state
    assert says in f"{finding.text} {finding.advice}"
    if state == "broken":
        assert finding.advice


def test_each_gpu_and_whether_kernels_cover_it(monkeypatch):
    about = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(dispatch, "_gpu_reason", lambda index: "GPU sm_75 is older than sm_80" if index else "")
    new, old = gpus.each(2)
    assert (new.name, new.state, old.state) == ("cuda:0", "ok", "note")
    assert "NVIDIA H200, 140 GiB, sm_90" in new.text
    assert "older than sm_80" in old.text
    assert gpus.covered(2) == [torch.device("cuda", 0)]


def smi_script(folder: Path, monkeypatch, script: str) -> Smi:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return gpus.nvidia_smi()


def test_nvidia_smi(monkeypatch, tmp_path):
    """Its answers, its complaints and its silence."""
    two = smi_script(tmp_path, monkeypatch, "echo 'NVIDIA A100, 80 GB, 580.1'; echo 'NVIDIA H200, 580.1'")
    assert two == Smi(("NVIDIA A100, 80 GB", "NVIDIA H200"), "580.1")
    assert smi_script(tmp_path, monkeypatch, "echo Failed to initialize; exit 18").complaint == "Failed to initialize"
    monkeypatch.setattr(gpus, "SMI_LIMIT", 0.2)
    assert "did not answer within 0.2 s" in smi_script(tmp_path, monkeypatch, "exec sleep 30").complaint
    monkeypatch.setenv("PATH", "")
    assert gpus.nvidia_smi() == Smi()


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.223.02  Sat Oct  7 15:39:11 UTC 2023\nGCC version: 12",
            "470.223.02",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@x)", "580.65.06"),
        ("something else", ""),
    ],
)
def test_kernel_module(monkeypatch, tmp_path, line, version):
    monkeypatch.setattr(gpus, "KERNEL_MODULE", tmp_path / "version")
    assert gpus.kernel_module() == ""
    (tmp_path / "version").write_text(line)
    assert gpus.kernel_module() == version


def test_the_newest_cuda_of_a_driver(monkeypatch):
    monkeypatch.setattr(gpus, "LIBCUDA", "no-such-library.so")
    assert gpus.newest_cuda() is None

    def version(pointer):
        pointer._obj.value = 12020
        return 0

    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=version))
    assert gpus.newest_cuda() == (12, 2)


def test_what_pytorch_says_of_cuda_is_kept(monkeypatch):
    """What it raises and what it warns of, neither of which reaches the user twice."""
    monkeypatch.setattr(torch.cuda, "init", raises(RuntimeError(f"{TOO_OLD} Please update your GPU driver")))
    assert gpus.cuda() == Cuda(0, TOO_OLD)
    monkeypatch.setattr(torch.cuda, "init", lambda: gpus.warnings.warn(UNFIT, stacklevel=1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpus.cuda() == Cuda(1, "", (UNFIT,))


# ----------------------------------------------------------------------------------------------------------------------
# Compiler, launches


def test_the_compiler_is_tried(monkeypatch, capfd):
    """By Triton's own way to it, and what it complains of is told, not strewn over the terminal."""
    assert launching.compiler(True).state == "ok"

    def failing(*arguments):
        subprocess.check_call(["sh", "-c", "echo '  no such header' >&2; exit 3"])

    monkeypatch.setattr(launching.build, "_build", failing)
    finding = launching.compiler(False)
    assert finding.state == "note"
    assert "the C compiler sh ended with 3" in finding.text
    assert "no such header" in finding.text
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(launching.build, "_build", raises(RuntimeError("Failed to find C compiler.")))
    finding = launching.compiler(True)
    assert launchable.WHAT_IT_NEEDS in finding.text
    assert "Triton's cache" in finding.advice


def test_all_that_is_tried_is_right_here(device):
    begun = []
    outcomes = list(trial.run([device], lambda *step: begun.append(step)))
    assert [(o.step, o.wrong, o.fatal) for o in outcomes] == [(step, "", False) for step in STEPS]
    assert begun == [(str(device), step) for step in STEPS]
    (finding,) = launching.findings(launching.Trial(outcomes), {str(device): "NVIDIA H200"})
    assert finding.state == "ok"


def test_wrong_numbers_are_found(device, monkeypatch):
    """In one output, of one dtype, or NaN; and the steps after them are made."""
    right = F.conv2d

    def wrong(x, *arguments, **options):
        y = right(x, *arguments, **options)
        y[1, 3, 2, 5] += float("nan") if x.dtype == torch.float32 else 1
        return y

    monkeypatch.setattr(F, "conv2d", wrong)
    outcomes = list(trial.run([device]))
    assert [o.step for o in outcomes if o.wrong] == ["our convolution in float16", "our convolution in float32"]
    assert not any(o.fatal for o in outcomes)
    assert "1 of 5184 outputs are wrong, at [1, 3, 2, 5]" in outcomes[-1].wrong
    found = launching.findings(launching.Trial(outcomes), {str(device): "NVIDIA H200"})
    assert [f.state for f in found] == ["broken", "broken"]
    assert "computes wrong numbers" in found[0].text
    assert launching.Trial(outcomes).launches  # torch.compile's kernels may be right


def test_what_raises_is_the_last_step(device, monkeypatch):
    monkeypatch.setattr(launch, "run", raises(RuntimeError("CUDA error: an illegal memory access\nmore")))
    outcomes = list(trial.run([device, device]))
    assert [o.step for o in outcomes] == STEPS[:2]
    assert outcomes[-1].fatal
    assert not launching.Trial(outcomes).launches
    (finding,) = launching.findings(launching.Trial(outcomes), {str(device): "NVIDIA H200"})
    assert finding.state == "broken"
    assert "an illegal memory access more" in finding.text


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (
            f"it finds no C compiler, which it needs for its launcher; {launchable.WHAT_IT_NEEDS}",
            "sudo apt-get install gcc",
        ),
        (
            "there is no Python.h in /usr/include, which its launcher is compiled with",
            "sudo apt-get install python3-dev",
        ),
        (
            f"no space (if this is the C compiler, {launchable.WHAT_IT_NEEDS}; if it is Triton's cache, name a folder)",
            None,
        ),
        ("RuntimeError: something new", None),
    ],
)
def test_without_a_launcher_nothing_else_is_tried(device, monkeypatch, reason, line):
    monkeypatch.setattr(launchable, "why_no_launch", lambda device: f"Triton cannot launch kernels here: {reason}")
    outcomes = list(trial.run([device, device]))
    assert len(outcomes) == 1
    (finding,) = launching.findings(launching.Trial(outcomes), {str(device): "NVIDIA H200"})
    assert finding.state == "broken"
    assert reason in finding.text
    assert "PyTorch serves every call" in finding.text
    assert (finding.command.line if finding.command else None) == line


def launched_over_nothing():
    """The step that stores a number, by Triton's real launcher over a libcuda that runs nothing: nothing is stored."""
    import torch

    from cnnfast.diagnosing import trial
    from cnnfast_kernels.aot.recording_driver import recording_driver

    with recording_driver(90) as driver:
        wrong = trial.one_number(torch.device("cpu"))
        launches, _ = driver.taken()
    return [wrong, len(launches)]


@pytest.mark.compiled
def test_a_launch_that_does_nothing_is_seen():
    assert run_compiled(launched_over_nothing) == ["it should store 0, but 1 is there afterwards", 1]


# ----------------------------------------------------------------------------------------------------------------------
# The child


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Has `tried` start a program of the test's; what that prints by `begin` and `end` is read as the real one's."""
    prelude = f"""
import json, os, signal, sys, time
from collections import namedtuple
def begin(step): print({trial.MARK!r} + json.dumps(dict(device=sys.argv[2], step=step)), flush=True)
def end(step, wrong="", fatal=False):
    told = dict(device=sys.argv[2], step=step, wrong=wrong, fatal=fatal, seconds=0.1)
    print({trial.MARK!r} + json.dumps(told), flush=True)
"""

    def start(script: str, limit: float = 60) -> launching.Trial:
        (tmp_path / "a_child.py").write_text(prelude + script)
        return launching.tried([CPU], limit=limit)

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(launching, "CHILD", "a_child")
    return start


def ends(process: int) -> bool:
    """Whether a process is gone, or only waits for its parent to ask, within ten seconds: it is killed a little after
    it was told to be.
    """
    status = Path("/proc", str(process), "stat")
    for _ in range(100):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def broken_by(found: launching.Trial) -> str:
    """The text of the one thing that is broken, and why it matters."""
    (finding,) = [f for f in launching.findings(found, {"cpu": "NVIDIA H200"}) if f.state == "broken"]
    return finding.text


def test_a_child_that_hangs_is_killed_and_named(child, tmp_path):
    """With what it started, which would else hold the GPU."""
    script = """
import subprocess
begin("one"); end("one"); begin("two")
grandchild = subprocess.Popen(["sleep", "600"])
open(__file__ + ".pid", "w").write(str(grandchild.pid))
print("something else"); time.sleep(600)
"""
    found = child(script, limit=2)
    assert [o.step for o in found.outcomes] == ["one"]
    assert "it hung at two on cpu, and was killed after 2 s" in broken_by(found)
    assert ends(int((tmp_path / "a_child.py.pid").read_text()))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "begin('one'); os.kill(os.getpid(), signal.SIGSEGV)",
            "it crashed at one on cpu, by SIGSEGV: Fatal Python error",
        ),
        ("begin('one'); os.kill(os.getpid(), signal.SIGKILL)", "it crashed at one on cpu, by SIGKILL"),
        (
            "begin('one'); end('one'); raise MemoryError('no room')",
            "it ended with 1 after its last step: MemoryError: no room",
        ),
        ("sys.exit('cannot start')", "it ended with 1 at starting: cannot start"),
        ("begin('one')", "it ended at one on cpu"),
        ("begin('one'); end('one')", "ended before it had tried all on NVIDIA H200"),
    ],
    ids=("crash", "killed", "raises", "does not start", "silent in a step", "silent after one"),
)
def test_a_child_that_fails_is_named(child, script, says):
    assert says in broken_by(child(script))


def test_what_a_child_finds_wrong_is_told(child):
    found = child(
        "begin('our convolution in float16'); end('our convolution in float16', wrong='3 of 9 outputs are wrong')"
    )
    assert found.launches
    assert "Our convolution in float16 on NVIDIA H200 (cpu) computes wrong numbers" in broken_by(found)


def test_a_child_whose_parent_is_gone_ends_itself():
    script = """
import time
from cnnfast.diagnosing import trial
trial.steps = lambda device: [("a step that hangs", lambda: time.sleep(600))]
trial.main("0.5", "cpu")
"""
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {list(map(str, IMPORTABLE))!r}\n{script}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 1
    assert "a step that hangs" in found.stdout
    assert "Timeout" in found.stderr


def test_the_real_child(device):
    """Which interprets where this process does, and launches on a GPU where there is one."""
    told = []
    found = launching.tried([device], told.append)
    assert [(o.step, o.wrong) for o in found.outcomes] == [(step, "") for step in STEPS]
    assert found.launches
    assert told[0] == "starting"


# ----------------------------------------------------------------------------------------------------------------------
# Folders, tables

PROBLEM = ConvProblem(8, 16, 14, 14, 32, 3, 3, 14, 14, pad_h=1, pad_w=1)


def row(gpu, dtype="bfloat16", winner="kernels", **changes) -> tables.TableRow:
    key = tables.Key(*gpu, "fprop", "", dtype, "NHWC NHWC NHWC", PROBLEM)._replace(**changes)
    return tables.TableRow(
        key, TileConfig(32, 32, 16, 4, 2), winner, {"kernels": 9.0, "default": 12.0, "library": 10.0}
    )


@pytest.fixture
def kept(monkeypatch, tmp_path) -> Path:
    """The user's folder of tables, which is not there yet; none came with cnnfast."""
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path / "user" / "tables")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    yield tmp_path / "user" / "tables"
    tables.forget()


def test_folders_that_cannot_be_written(monkeypatch, tmp_path, kept):
    """Because something else is in their place, which stops root too."""
    assert folders.triton_cache(tmp_path / "a" / "b").state == "ok"
    assert folders.table_folder().state == "ok"
    assert not (tmp_path / "a").exists()  # asking leaves nothing
    (tmp_path / "file").touch()
    for finding in (folders.triton_cache(tmp_path / "file"), folders.triton_cache(tmp_path / "file" / "cache")):
        assert finding.state == "broken"
        assert "TRITON_CACHE_DIR" in finding.advice
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path / "file" / "tables")
    assert folders.table_folder().state == "broken"


def test_a_disk_that_is_full(monkeypatch, tmp_path):
    monkeypatch.setattr(folders, "free_bytes", lambda folder: 2**29)
    assert folders.triton_cache(tmp_path).state == "note"
    monkeypatch.setattr(folders.tempfile, "TemporaryFile", raises(OSError(28, "No space left on device")))
    assert "No space left on device" in folders.triton_cache(tmp_path).text


def test_a_folder_is_counted_for_a_while(tmp_path):
    for name in ("a", "b/c", "b/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(2**20))
    assert folders.held(tmp_path) == (3, 3 * 2**20, True)
    assert not folders.held(tmp_path, seconds=-1).whole
    assert str(folders.held(tmp_path / "none")) == "nothing yet"


def test_unmeasured_and_measured(kept):
    (finding,) = folders.measured([H200, H200])
    assert finding.state == "note"
    assert finding.command.line.startswith("cnnfast tune MODEL --input")
    rows = [row(H200), row(H200, winner="library", operation="wgrad"), row(H200, "tf32")]
    file = tables.write(*H200, rows, {})
    (finding,) = folders.measured([H200])
    assert finding.state == "ok"
    assert "3 rows (2 bfloat16, 1 tf32), of which the library won 1, are yours" in finding.text
    assert "are yours" not in folders.measured([H200._replace(arch=100)])[0].text
    assert "3 rows of NVIDIA H200" in folders.measured([])[0].text
    assert "1 table" in folders.table_folder().text
    tables.SHIPPED.mkdir()
    file.rename(tables.SHIPPED / file.name)
    assert "are cnnfast's" in folders.measured([H200])[0].text
    assert folders.table_files(True) == []


@pytest.mark.parametrize(
    ("change", "state", "says"),
    [
        (lambda data: "{", "broken", "JSONDecodeError"),
        (lambda data: "[1, 2]", "broken", "is not used"),
        (lambda data: json.dumps({**data, "rows": 3}), "broken", "is not used"),
        (lambda data: json.dumps({**data, "rows": [{**data["rows"][0], "winner": "nobody"}]}), "broken", "1 of 1 rows"),
        (lambda data: json.dumps({**data, "cnnfast": "0.0.1"}), "note", "cnnfast 0.0.1 wrote it"),
    ],
    ids=("cut off", "no table", "no rows", "a wrong row", "of another version"),
)
def test_tables_that_are_not_used(kept, change, state, says):
    file = tables.write(*H200, [row(H200)], {})
    file.write_text(change(json.loads(file.read_text())))
    (finding,) = folders.table_files(beside_a_gpu=True)
    assert finding.state == state
    assert says in finding.text
    assert str(file) in finding.text
    assert finding.command.line.startswith("cnnfast tune")
    (finding,) = folders.table_files(beside_a_gpu=False)  # where nothing can be measured
    assert finding.state == state
    assert finding.command is None


# ----------------------------------------------------------------------------------------------------------------------
# Who serves


def test_who_serves_is_what_a_trace_says(device, gpu, library_first, monkeypatch):
    """For every typical call, at a size that can be interpreted, before and after it was measured."""
    monkeypatch.setattr(servers, "BATCH", 1)
    monkeypatch.setattr(servers, "SIZE", 4)
    seen = set()
    for convolution in servers.CONVOLUTIONS:
        c = convolution
        x = torch.ones(1, c.channels, 4, 4, dtype=c.dtype, device=device).contiguous(memory_format=c.layout)
        w = torch.ones(c.filters, c.channels // c.groups, c.taps, c.taps, dtype=c.dtype, device=device).contiguous(
            memory_format=c.layout
        )
        norm = [torch.ones(c.filters, device=device)] * 4
        options = {"padding": c.taps // 2, "groups": c.groups}
        for winner in (None, "kernels", "library"):
            if winner is not None:
                key = servers.question(c, device).key
                tables.write(
                    *gpu,
                    [tables.TableRow(key, TileConfig(32, 32, 16, 4, 2), winner, {"kernels": 9.0, "library": 4.5})],
                    {},
                )
                launch.forget_plans()
            with torch.no_grad(), cnnfast.trace() as calls:
                F.conv_bn_act(x, w, *norm, **options) if c.fused else F.conv2d(x, w, **options)
            said = servers.of_convolution(c, device)
            (call,) = calls
            assert said.startswith(
                {"library": "the library", "kernels": "our kernel", "torch": "PyTorch"}[call.served_by]
            ), (c, winner)
            assert call.reason in said
            if call.served_by == "kernels":
                assert str(call.launches[0].tile) in said
            seen.add(call.served_by)
    assert seen == {"library", "kernels"}


def test_who_serves_follows_what_was_set(device, library_first):
    with cnnfast.backend("torch"):
        assert [(f.name, f.text) for f in servers.who(device)] == [("every call", 'PyTorch, because backend("torch").')]
    with cnnfast.backend("kernels"):
        assert all(f.text.startswith("our kernel") for f in servers.who(device))
    with cnnfast.backend("kernels"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "launch", None)
        (finding,) = servers.who(device)
    assert "Raises an error" in finding.text


def test_how_float32_is_multiplied(device):
    with float32_products("tf32"):
        assert "TF32" in servers.float32_products(device).text
    with float32_products("ieee"):
        assert "IEEE" in servers.float32_products(device).text


# ----------------------------------------------------------------------------------------------------------------------
# All of it


@pytest.fixture
def machine(monkeypatch, kept, tmp_path) -> SimpleNamespace:
    """A machine without a GPU, where kernels are not interpreted; a test may change it. Its GPU is this ring's
    device.
    """
    m = SimpleNamespace(
        smi=Smi(), cuda=Cuda(0, "Found no NVIDIA driver"), newest=None, built="13.0", covered=[], trial=FINE, tried=0
    )

    def tried(devices, tell):
        m.tried += 1
        return m.trial

    for module, answers in (
        (
            gpus,
            {
                "nvidia_smi": lambda: m.smi,
                "cuda": lambda: m.cuda,
                "newest_cuda": lambda: m.newest,
                "kernel_module": lambda: "",
            },
        ),
        (gpus, {"covered": lambda count: m.covered, "each": lambda count: []}),
        (launching, {"tried": tried, "cache_folder": lambda: tmp_path / "triton"}),
        (launch, {"INTERPRETED": False}),
        (devices, {"gpu": lambda device: H200}),
        (dispatch, {"CPU_REASON": "the tensors are on the CPU"}),
    ):
        for name, answer in answers.items():
            monkeypatch.setattr(module, name, answer)
    monkeypatch.setattr(torch.version, "cuda", m.built)
    return m


def with_a_gpu(machine, monkeypatch) -> None:
    machine.smi, machine.cuda, machine.newest, machine.covered = LISTED, Cuda(1), (13, 0), [CPU]
    monkeypatch.setattr(dispatch, "CPU_REASON", "")


def test_a_machine_without_a_gpu_is_not_broken(machine):
    found = diagnosing.diagnose()
    assert found.ok
    assert machine.tried == 0
    assert named(found.findings, "every call").text == "PyTorch, because the tensors are on the CPU."
    assert found.commands
    assert not any("tune" in command.line for command in found.commands)


def test_a_machine_whose_gpu_is_fine(machine, monkeypatch, library_first):
    """Unmeasured, then measured: that decides what comes next."""
    with_a_gpu(machine, monkeypatch)
    found = diagnosing.diagnose()
    assert found.ok, found
    assert machine.tried == 1
    assert named(found.findings, "launch on cpu").state == "ok"
    assert "cnnfast.tune" in named(found.findings, "1x1 convolution, bf16, channels_last").text
    assert found.commands[0].line.startswith("cnnfast tune")
    tables.write(*H200, [row(H200)], {})
    assert diagnosing.diagnose().commands[0] == diagnosing.CHECK


def test_what_crashed_another_process_is_not_tried_in_this_one(machine, monkeypatch):
    with_a_gpu(machine, monkeypatch)
    machine.trial = launching.Trial([], "it crashed at Triton's launcher on cpu, by SIGSEGV")
    monkeypatch.setattr(servers, "who", raises(AssertionError("asked")))
    found = diagnosing.diagnose()
    assert [f.name for f in found.broken] == ["launch"]
    assert named(found.findings, "torch.compile").state == "note"
    assert found.commands[-1].line == "cnnfast doctor"


def test_a_gpu_without_triton(machine, monkeypatch):
    with_a_gpu(machine, monkeypatch)
    monkeypatch.setattr(dispatch, "launch", None)
    monkeypatch.setattr(software.sys, "platform", "linux")
    modules(monkeypatch, triton=None)
    found = diagnosing.diagnose()
    assert [f.name for f in found.broken] == ["triton"]
    assert machine.tried == 0
    assert "triton is not installed" in named(found.findings, "every call").text


def test_a_driver_that_is_too_old(machine):
    machine.smi, machine.cuda, machine.newest = LISTED, Cuda(0, TOO_OLD), (12, 2)
    found = diagnosing.diagnose()
    assert [f.name for f in found.broken] == ["PyTorch"]


def test_a_torch_that_does_not_import_ends_the_questions(monkeypatch):
    modules(monkeypatch, torch=OSError("libcublas.so.13"))
    monkeypatch.setattr(diagnosing, "_with_torch", raises(AssertionError("asked")))
    found = diagnosing.diagnose()
    assert [f.name for f in found.broken] == ["torch"]


def test_a_question_that_fails_leaves_the_others(machine, monkeypatch):
    monkeypatch.setattr(gpus, "driver", raises(ZeroDivisionError("surprise")))
    found = diagnosing.diagnose()
    assert "ZeroDivisionError: surprise" in named(found.findings, "doctor").text
    assert named(found.findings, "every call")


def test_where_kernels_are_interpreted(device):
    """This process, as it is."""
    if not launch.INTERPRETED:
        pytest.skip("GPU ring: kernels are not interpreted")
    found = diagnosing.diagnose()
    assert named(found.findings, "interpreter").state == "note"
    assert named(found.findings, "launch on cpu").state == "ok"
    assert found.ok, found


# ----------------------------------------------------------------------------------------------------------------------
# The command


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_command(machine, kept, tmp_path):
    """Its exit code, and its JSON in a file and on standard output."""
    file = tmp_path / "found.json"
    result = invoke("--json", str(file))
    assert result.exit_code == 0, result.output
    assert "Nothing is broken." in result.output
    assert json.loads(file.read_text())["ok"]
    kept.mkdir(parents=True)
    (kept / "spoilt.json").write_text("{")
    result = invoke("--json", "-")
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["ok"]
    assert "1 broken:" in result.stderr
    result = invoke("--json", str(tmp_path / "nowhere" / "found.json"))
    assert result.exit_code == 2
    assert "there is no folder" in result.output


def test_the_command_without_triton(tmp_path):
    """In a process of its own, in which triton cannot be imported: it is not there, then."""
    script = f"""
import runpy, sys
sys.path[:0] = {list(map(str, IMPORTABLE))!r}
sys.modules["triton"] = None
sys.argv = ["cnnfast", "doctor", "--json", "-"]
runpy.run_module("cnnfast", run_name="__main__")
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(child.stdout)
    assert child.returncode == (0 if found["ok"] else 1), child.stderr
    (triton,) = [f for f in found["findings"] if f["name"] == "triton"]
    assert "not installed" in triton["text"]
    assert triton["state"] == ("broken" if torch.cuda.is_available() else "note")
    (served,) = [f for f in found["findings"] if f["topic"] == servers.TOPIC and f["name"] != "float32"]
    assert "triton is not installed" in served["text"]
