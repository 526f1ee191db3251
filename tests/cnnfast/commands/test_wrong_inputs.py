"""What every command says to wrong input: one sentence that tells what would be right, exit code 2, within seconds.

A row is a command line and a distinctive part of the sentence. {own} is a folder with a user's own files, below. To add
a row, add a line.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cnnfast.__main__ import app
from tests.support.child import environment

# The user's own files.
OWN = {
    "fine.py": """\
from torch import nn
class Net(nn.Sequential):
    def __init__(self): super().__init__(nn.Conv2d(3, 4, 3))
def net(): return Net()
def pool(x): return nn.functional.max_pool2d(x, 2)
number = 3
""",
    "syntax.py": """\
from torch import nn
class Net(nn.Module:
    pass
""",
    "missing.py": """\
import os
import not_installed_anywhere
class Net: pass
""",
    "raising.py": """\
from torch import nn

width = 1 / 0
""",
    "leaving.py": """\
import sys
sys.exit(3)
""",
    "building.py": """\
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4)
class Bare(nn.Module):
    def __init__(self):
        self.width = 1
        self.norm = nn.BatchNorm2d(4)
class Needy(nn.Module):
    def __init__(self, width, depth): super().__init__()
def weights():
    import urllib.error
    raise urllib.error.URLError("no route")
""",
    "running.py": """\
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x):
        y = self.conv(x)
        return y.nothing
""",
    "rows.json": "[{}]",
}

NO_GPU = "there is no GPU here"
CHOICES = "none of bf16, fp16, fp32, tf32, fp64, bfloat16, float16, float32, float64"
ARCHS = "use one of sm_80, sm_86, sm_87, sm_89, sm_90, sm_100, sm_103, sm_120"

# Of the command line itself.
ANY = [
    ("chek resnet18", "No such command 'chek'. Did you mean 'check'?"),
    ("bnech resnet18", "Did you mean 'bench'?"),
    ("check resnet18 --dtyp fp32", "--dtype"),
    ("info resnet18 --dept 1", "--depth"),
    ("check", "Missing argument 'MODEL'"),
    ("info", "Missing argument 'MODEL'"),
    ("tune", "Missing argument 'MODEL'"),
    ("explain", "Missing argument 'MODEL'"),
    ("predict", "Missing argument 'NETWORK'"),
    ("predict model.cnnfast", "Missing argument 'IMAGE|FOLDER'"),
    ("train", "Missing argument 'DATA'"),
    ("evaluate run", "Missing argument 'DATA'"),
    ("doctor everything", "unexpected extra argument"),
]
# Of MODEL: each is asked of one command, and all of `info`, which needs nothing else.
MODEL = [
    ("resnet5O", "'resnet5O' is no model of cnnfast"),
    ("resnet5O", "Did you mean 'resnet50'"),
    ("cnnfast:resnet19", "'resnet19' is no model of cnnfast. Did you mean 'resnet1"),
    (
        "torchvison:resnet18",
        "there is no module torchvison, neither installed nor in this folder. Did you mean 'torchvis",
    ),
    ("nopackage:Net", "there is no module nopackage, neither installed nor in this folder; a file is written with its"),
    ("nopackage.Net", "and there is no package nopackage"),
    ("{own}/fin.py:Net", "there is no file {own}/fin.py. Did you mean '{own}/fine.py'?"),
    ("{own}/fine.py", "write file.py:NAME; {own}/fine.py has Net, net, pool"),
    ("{own}/fine.py:Nett", "has no 'Nett'. Did you mean 'Net'?"),
    ("{own}/fine.py:number", "is, or returns, int: nothing that can be called"),
    ("{own}/fine.py:pool", "needs arguments (x): write a function that builds it"),
    ("{own}/syntax.py:Net", "cannot import {own}/syntax.py: SyntaxError in {own}/syntax.py, line 2: "),
    (
        "{own}/missing.py:Net",
        "ModuleNotFoundError in {own}/missing.py, line 2: No module named 'not_installed_anywhere'",
    ),
    ("{own}/raising.py:Net", "ZeroDivisionError in {own}/raising.py, line 3: division by zero"),
    (
        "{own}/leaving.py:Net",
        "it ended the process (SystemExit in {own}/leaving.py, line 2: 3); guard what a script does",
    ),
    ("{own}/building.py:Net", "cannot build {own}/building.py:Net: TypeError in {own}/building.py, line 5: "),
    ("{own}/building.py:Bare", "AttributeError in {own}/building.py, line 9: cannot assign module before"),
    ("{own}/building.py:weights", "it fetches weights, which needs a network: build it with random weights"),
    ("{own}/building.py:Needy", "`def build(): return Needy(width=..., depth=...)`, and name that: file.py:build"),
    ("{own}/running.py:Net", "AttributeError in {own}/running.py, line 8: 'Tensor' object has no attribute 'nothing'"),
    ("torch.nn:Conv2d", "Conv2d needs arguments (in_channels, out_channels, kernel_size): write a function"),
    ("", "write a bare name such as resnet50, file.py:NAME or package.module:NAME"),
]
# What commands have in common. Numbers are refused in typer's own words, which change with its versions.
DTYPE = [
    ("--dtype int8", f"'int8' is {CHOICES}"),
    ("--dtype fp33", "Did you mean 'fp32'?"),
    ("--dtype BF16", "Did you mean 'bf16'?"),
    ("--dtype f16", "Did you mean 'fp16'?"),
    ("--dtype torch.flaot32", "Did you mean 'float32'?"),
]
MODE = [
    ("--mode eval", "'eval' is neither infer nor train. Did you mean 'infer'?"),
    ("--mode inference", "Did you mean 'infer'?"),
    ("--mode training", "Did you mean 'train'?"),
    ("--mode both", "'both' is neither infer nor train"),
    ("--mode infer,", "'' is neither infer nor train"),
]
INPUT = [("--input 3x", "'3x' is no shape: write positive sizes with x between them, as in 1x3x32x32")]
INPUT += [("--input 1,3,32,32", "'1,3,32,32' is no shape"), ("--input 1x0x32x32", "'1x0x32x32' is no shape")]
BUDGET = [("--budget 0", "0 leaves no time: write seconds above 0"), ("--budget nan", "nan leaves no time")]
BUDGET += [("--budget soon", "Invalid value for '--budget'")]
SECONDS = [("--seconds inf", "inf is no time to measure for"), ("--seconds soon", "Invalid value for '--seconds'")]
JSON = [
    ("--json nowhere/x.json", "there is no folder nowhere"),
    ("--json {own}", "{own} cannot be written: Is a directory"),
    ("--json {own}/fine.py/x.json", "there is no folder {own}/fine.py"),
]

ROWS = [
    *ANY,
    *((f"info {shlex.quote(model)}", says) for model, says in MODEL),
    *(
        (f"{command} {option}", says)
        for command, options in {
            "check resnet18": [*DTYPE, *MODE, *INPUT, *JSON],
            "bench resnet18": [*DTYPE, *MODE, *INPUT, *BUDGET, *SECONDS, *JSON],
            "tune resnet18": [*DTYPE, *MODE, *INPUT, *BUDGET, *SECONDS, *JSON],
            "explain resnet18": [*DTYPE, *MODE, *INPUT, *JSON],
            "info resnet18": [*INPUT, *JSON],
            "info resnet18 --training": [*DTYPE, *INPUT, *JSON],
            "freeze resnet18 --out x.cnnfast": [*DTYPE, *INPUT, *JSON],
            "aot": JSON,
            "doctor": JSON,
            "demo": [*BUDGET, *JSON],
            "predict {own}/fine.py {own}/fine.py": JSON,
            "augment": JSON,
            "train digits": JSON,
            "evaluate {own}/fine.py digits": JSON,
        }.items()
        for option, says in options
    ),
    ("info resnet18 --input 1x4x32x32", "ResNet does not run on 1x4x32x32: RuntimeError: "),
    ("info torch.nn:ReLU", "ReLU has no layer with a weight that would tell its input: give it"),
    ("info resnet18 --depth -1", "Invalid value for '--depth'"),
    ("info resnet18 --batch 8", "Invalid value for --batch: it is of a training step: add --training"),
    ("info resnet18 --dtype bf16", "Invalid value for --dtype: it is of a training step: add --training"),
    ("info resnet18 --format contiguous", "Invalid value for --format: it is of a training step: add --training"),
    ("info resnet18 --gpu h200", "Invalid value for --gpu: it is of a training step: add --training"),
    ("info resnet18 --training --batch 0", "Invalid value for '--batch'"),
    ("info resnet18 --training --gpu h300", "'h300' is none of b200, h200, h100, a100, l40s, rtx-4090, rtx-3090. Did"),
    ("info resnet18 --training --format NHWC", "is neither channels_last nor contiguous. Did you mean 'channels_last'"),
    ("info resnet18 --training --input 1x4x32x32", "ResNet does not run on 1x4x32x32: RuntimeError: "),
    ("info torch.nn:ReLU --training --input 1x3x8x8", "ReLU has nothing to train: no parameter of it wants a gradient"),
    ("info {own}/running.py:Net --training --input 1x3x5x5", "AttributeError in {own}/running.py, line 8: "),
    ("check {own}/syntax.py:Net", "SyntaxError in {own}/syntax.py, line 2: "),
    ("check {own}/running.py:Net --input 1x3x5x5", "AttributeError in {own}/running.py, line 8: "),
    ("check {own}/fine.py:net --input 1x2x5x5", "fine.py:net with inputs 1x2x5x5: RuntimeError: "),
    ("check {own}/fine.py:net --mode infer,train", "check one mode at a time, infer or train"),
    ("check {own}/fine.py:net --input 99999x99999x99999x9999", "99999, 99999, 99999, 9999"),
    ("bench {own}/missing.py:Net", "ModuleNotFoundError in {own}/missing.py, line 2: "),
    ("bench {own}/fine.py:pool", "needs arguments (x): write a function that builds it"),
    ("bench resnet18 --batch 1,x", "'1,x': write positive sizes with commas between them, as in 1,8,32"),
    ("bench resnet18 --batch 0", "'0': write positive sizes"),
    ("bench resnet18 --seconds -1", "Invalid value for '--seconds'"),
    ("bench resnet18 --provider tensorrt", "'tensorrt' is none of eager, eager-graph, cudnn-fused"),
    ("bench resnet18 --provider egaer", "Did you mean 'eager'?"),
    ("bench resnet18 --provider compile --mode infer --provider cudnnfused", "Did you mean 'cudnn-fused'?"),
    ("bench resnet18 --provider max-autotune --mode train", "max-autotune cannot run: it runs only in mode infer"),
    ("bench resnet18 --layers", "leave out MODEL, --mode and --input"),
    ("bench resnet18 --input 1x4x64x64", "ResNet does not run on 1x4x64x64: RuntimeError: "),
    ("bench cnnfast.functional:max_pool2d", "needs arguments (input, kernel_size): write a function that builds it"),
    ("bench --layers --mode train", "leave out MODEL, --mode and --input"),
    ("bench augment --provider cudnn-fused", "'cudnn-fused' is none of cnnfast, cnnfast-drawn, cnnfast-torch"),
    ("bench augment --provider korna", "Did you mean 'kornia'?"),
    ("bench resnet18 --provider kornia", "'kornia' is none of eager, eager-graph"),
    ("bench resnet18 --size 224", "it is of what augment makes: cnnfast bench augment --size 224"),
    ("bench augment --size 4", "Invalid value for '--size'"),
    ("bench augment --size much", "Invalid value for '--size'"),
    ("bench augment --mode train", "augment has no modes: leave out --mode"),
    ("bench augment --layers", "leave out MODEL, --mode and --input"),
    ("bench augment --dtype fp64", "augment makes bf16, fp16 or fp32, not float64"),
    ("bench augment --input 8x4x64x64", "8x4x64x64 are no images: write 64x3x256x256, or 64x256x256x3"),
    ("bench augment --input 3x64x64", "3x64x64 are no images"),
    ("bench augment --size 32 --compare {own}/rows.json {own}/rows.json", "leave out MODEL and all options but --json"),
    ("bench --compare no.json {own}/rows.json", "there is no file no.json"),
    ("bench --compare {own}/rows.json {own}/rows.json", "{own}/rows.json holds no rows of `cnnfast bench --json`"),
    ("bench resnet18 --compare {own}/rows.json {own}/rows.json", "leave out MODEL and all options but --json"),
    ("bench --pictures {own}/rows.json {own}/fine.py:net --seconds 0", "{own}/rows.json is no folder"),
    ("bench --pictures {own}/rows.json/deep {own}/fine.py:net --seconds 0", "{own}/rows.json is no folder"),
    ("tune resnet18 --format NHWC", "'NHWC' is neither channels_last nor contiguous. Did you mean 'channels_last'?"),
    ("tune resnet18 --gpu h300 --dry-run", "'h300' is none of b200, h200, h100, a100, l40s, rtx-4090, rtx-3090. Did"),
    ("tune resnet18 --gpu h200", "measuring is done on the GPU that is here: add --dry-run to list for another"),
    ("tune resnet18 --dry-run --budget 60", "nothing is measured with --dry-run: leave it out"),
    ("tune resnet18 --dry-run --table rows.json", "nothing is measured with --dry-run: leave it out"),
    ("tune resnet18 --table nowhere/rows.json", "there is no folder nowhere"),
    ("tune resnet18 --seconds 0", "0 is no time to measure for: write seconds above 0, as in --seconds 0.05"),
    ("explain resnet18 --gpu h300", "'h300' is none of b200, h200, h100, a100, l40s, rtx-4090, rtx-3090. Did you mean"),
    ("explain resnet18 --mode infer,train", "explain one mode at a time, infer or train"),
    ("explain resnet18 --mode ''", "explain one mode at a time, infer or train"),
    ("explain resnet18 --format NCHW", "is neither channels_last nor contiguous. Did you mean 'contiguous'?"),
    ("explain resnet18 --batch 0", "Invalid value for '--batch'"),
    ("explain resnet18 --picture net.gif", "net.gif is no name of a picture: let it end with .png, .svg or .pdf"),
    ("explain resnet18 --picture nowhere/net.png", "there is no folder nowhere"),
    ("explain resnet18 --input 1x4x32x32", "ResNet does not run on 1x4x32x32: RuntimeError: "),
    ("explain torch.nn:ReLU --input 1x3x8x8", "ReLU calls nothing that cnnfast has kernels for: there is nothing to"),
    ("explain {own}/running.py:Net --input 1x3x5x5", "AttributeError: 'Tensor' object has no attribute 'nothing'"),
    ("tune resnet18 --input 1x4x32x32 --dry-run", "ResNet does not run on 1x4x32x32"),
    ("tune {own}/building.py:Needy --dry-run", "Needy needs arguments (width, depth)"),
    (
        "predict resnet18 x.jpg",
        "there is no file resnet18: freeze a model first, by cnnfast freeze resnet18 --out resnet",
    ),
    ("predict {own}/fine.py {own}/fine.py", "{own}/fine.py is not a safetensors file"),
    ("predict {own}/fine.py none.jpg", "there is no file or folder none.jpg"),
    ("predict {own}/fine.py {own}", "no file in there has the extension of an image that Pillow reads"),
    ("predict {own}/fine.py {own}/fine.py --batch 0", "Invalid value for '--batch'"),
    ("predict {own}/fine.py {own}/fine.py --top few", "Invalid value for '--top'"),
    ("predict {own}/fine.py {own}/fine.py --csv nowhere/x.csv", "there is no folder nowhere"),
    ("predict {own}/fine.py {own}/fine.py --csv - --json -", "standard output can take the CSV or the JSON"),
    ("train digits --epochs 0", "Invalid value for '--epochs'"),
    ("train digits --augment turn=3", "'turn' is no option of augmentation"),
    ("train nowhere", "there is no folder and no CSV nowhere"),
    ("evaluate nowhere digits", "there is no file or folder nowhere"),
    ("evaluate {own} digits", "is no folder of a run"),
    ("evaluate {own}/fine.py digits", "{own}/fine.py is not a safetensors file"),
    ("freeze resnet18", "Missing option '--out'"),
    ("freeze resnet18 --out nowhere/x.cnnfast", "there is no folder nowhere"),
    ("freeze resnet18 --out {own}", "{own} cannot be written: Is a directory"),
    ("freeze resnet18 --out -", "write to a file: a network is no text"),
    ("freeze resnet18 --out x.cnnfast --dtype fp64", "no runner computes in float64: use fp32, bf16 or fp16"),
    ("freeze resnet18 --out x.cnnfast --dtype tf32", "no runner computes in tf32: use fp32, bf16 or fp16"),
    ("freeze resnet18 --out x.cnnfast --weights w.pt", "w.pt is a pickle, which can run any code when it is read"),
    ("freeze resnet18 --out x.cnnfast --weights w.pt", "safetensors.torch.save_model(model, 'model.safetensors')"),
    ("freeze resnet18 --out x.cnnfast --weights none.safetensors", "there is no file none.safetensors"),
    ("freeze resnet18 --out x.cnnfast --weights {own}/rows.json", "{own}/rows.json is no file of safetensors"),
    ("freeze resnet18 --out x.cnnfast --classes none.txt", "none.txt cannot be read"),
    ("freeze resnet18 --out x.cnnfast --preprocessing nonsense", "preprocessing='nonsense' is none of"),
    ("freeze {own}/fine.py:net --input 1x3x8x8 --out x.cnnfast --classes {own}/rows.json", "the name of class 0 is {"),
    ("freeze {own}/fine.py:net --input 1x2x8x8 --out x.cnnfast", "Net does not run on 1x2x8x8: RuntimeError: "),
    ("freeze {own}/fine.py:pool --out x.cnnfast", "needs arguments (x): write a function that builds it"),
    ("freeze {own}/running.py:Net --input 1x3x5x5 --out x.cnnfast", "AttributeError in {own}/running.py, line 8: "),
    ("aot --arch sm_75", f"arch='sm_75' is not known here: {ARCHS}"),
    ("aot --arch h200", "Did you mean 'sm_90'?"),
    ("aot --jobs 0", "Invalid value for '--jobs'"),
    ("aot --jobs some", "Invalid value for '--jobs'"),
    ("aot --only nonsense", "only='nonsense' is in no case's name: names begin with "),
    ("aot --record --only pool", "the record is of cases of its own: leave --only out"),
    ("augment cat.jpg", "there is no file cat.jpg; options are written NAME=VALUE, such as degrees=15"),
    ("augment degrees 15", "there is no file degrees; options are written NAME=VALUE"),
    ("augment {own}/fine.jpg", "there is no file {own}/fine.jpg. Did you mean '{own}/fine.py'?"),
    ("augment {own}", "{own} is a folder: name images in it"),
    ("augment {own}/fine.py", "{own}/fine.py: Pillow knows no image format like this"),
    ("augment degree=15", "'degree' is no option of augmentation. Did you mean 'degrees'?"),
    ("augment crop-scale=0.5,1", "Did you mean 'crop_scale'?"),
    ("augment degrees=15 degrees=20", "the option degrees of augmentation is given twice"),
    ("augment degrees=", "degrees"),
    ("augment brightness=-1", "brightness"),
    ("augment erasing_p=2", "erasing_p"),
    ("augment crop_scale=1,0.5", "crop_scale"),
    ("augment size=32", "size=32: write --size 32"),
    ("augment hue=0.1 seed=3", "seed=3: write --seed 3"),
    ("augment --size 0", "Invalid value for '--size'"),
    ("augment --size 100000", "Invalid value for '--size'"),
    ("augment --size 4096", "24 results of 4096 x 4096 are too many pixels: at most 2 of this size"),
    ("augment --count 0", "Invalid value for '--count'"),
    ("augment --columns 0", "Invalid value for '--columns'"),
    ("augment --columns few", "Invalid value for '--columns'"),
    ("augment --seed -1", "Invalid value for '--seed'"),
    ("augment --out sheet.gif", "sheet.gif is no name of a picture: let it end with .png, .jpg or .webp"),
    ("augment --out sheet", "sheet is no name of a picture"),
    ("augment --out -", "a picture goes to a file: let it end with .png"),
    ("augment --out nowhere/x.png", "there is no folder nowhere"),
    ("augment --out {own}/folder.png", "{own}/folder.png cannot be written: Is a directory"),
    ("demo --epochs 0", "Invalid value for '--epochs'"),
    ("demo --seed -1", "Invalid value for '--seed'"),
    ("demo --epochs many", "Invalid value for '--epochs'"),
]
# What only a machine without a GPU refuses.
WITHOUT_A_GPU = [
    (
        "check resnet18 --dtype bf16",
        "bf16 cannot be checked without a GPU: Triton's interpreter computes bfloat16 wrongly",
    ),
    ("check resnet18 --dtype torch.bfloat16", "Check fp32 or fp16 here, which run the same kernels, or bf16 on a GPU"),
    ("tune resnet18", f"{NO_GPU} to measure on; --dry-run lists what would be measured"),
    ("tune no.py:Net", f"{NO_GPU} to measure on"),
    (
        "bench resnet18 --dtype tf32",
        "tf32 needs a GPU: on a CPU PyTorch, which serves every call there, rounds nothing",
    ),
    ("bench augment --provider torchvision-worker", "torchvision-worker cannot run: without a GPU it is torchvision"),
    ("bench augment --provider cnnfast-torch", "cnnfast-torch cannot run: without a GPU it is cnnfast"),
    ("bench no.py:Net --provider eager-graph", f"eager-graph cannot run: it is a CUDA graph, and {NO_GPU}"),
    ("bench resnet18 --provider cnnfast --provider cudnn-fused", "cudnn-fused cannot run: it is a CUDA graph"),
]

SECONDS_ALLOWED = 30.0  # of one row in this process, which may be the first to import a library of models


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for name, text in OWN.items():
        (folder / name).write_text(text)
    (folder / "folder.png").mkdir()
    return folder


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)


def words(text: str) -> str:
    """All of it in one line, without the frames and line ends of a terminal."""
    return " ".join(text.replace("│", " ").split())


def refused(line: str, says: str, own: Path) -> None:
    began = time.perf_counter()
    arguments = shlex.split(line.replace("{own}", str(own)))
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "1000", "TERM": "dumb"})
    assert result.exit_code == 2, result.output
    assert says.replace("{own}", str(own)) in words(result.output), result.output
    assert result.stdout == "", "what is wrong is said on standard error"
    assert "Traceback" not in result.output
    assert time.perf_counter() - began < SECONDS_ALLOWED


@pytest.mark.parametrize(("line", "says"), ROWS, ids=lambda text: text[:60])
def test_wrong_input_is_refused_in_a_sentence(line, says, own):
    pytest.importorskip("triton")
    refused(line, says, own)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter ring: a GPU can do these")
@pytest.mark.parametrize(("line", "says"), WITHOUT_A_GPU, ids=lambda text: text[:60])
def test_what_needs_a_gpu_is_refused_without_one(line, says, own, monkeypatch):
    """Before a model is built."""
    monkeypatch.setattr("cnnfast.commands.options.resolve", None)
    monkeypatch.setattr("cnnfast.commands.options.resolve_module", None)
    refused(line, says, own)


def test_each_command_has_rows():
    asked = {line.split()[0] for line, _ in ROWS}
    assert asked >= {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert len(ROWS) + len(WITHOUT_A_GPU) >= 50


# Refused before torch is imported, and without it: in a process of its own.
AT_ONCE = [
    ("check resnet18 --dtype int8", CHOICES),
    ("bench resnet18 --provider tensorrt", "'tensorrt' is none of eager"),
    ("tune resnet18 --gpu h300 --dry-run", "Did you mean"),
    ("explain resnet18 --gpu h300", "Did you mean 'h"),
    ("aot --arch sm_75", "arch='sm_75' is not known here"),
    ("freeze resnet18 --out x.cnnfast --weights w.pth", "w.pth is a pickle"),
    ("info resnet18 --input 3x", "'3x' is no shape"),
    ("info resnet18 --training --gpu h300", "Did you mean 'h"),
    ("predict resnet18 x.jpg", "there is no file resnet18"),
    ("augment x.jpg", "there is no file x.jpg"),
    ("augment size=3", "write --size 3"),
    ("augment --size 4096", "are too many pixels"),
]
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # to import it is an error
from cnnfast.__main__ import app
app(sys.argv[1:], prog_name="cnnfast")
"""


@pytest.mark.parametrize(("line", "says"), AT_ONCE, ids=lambda text: text[:60])
def test_wrong_options_are_refused_without_torch(line, says):
    command = [sys.executable, "-c", WITHOUT_TORCH, *line.split()]
    child = subprocess.run(
        command, env=environment() | {"COLUMNS": "1000"}, capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stdout) == (2, ""), child.stderr
    assert says in words(child.stderr)


def test_a_users_own_fault_is_one_sentence_in_a_process_of_its_own(own):
    command = [sys.executable, "-m", "cnnfast", "info", f"{own}/syntax.py:Net"]
    child = subprocess.run(command, env=environment() | {"COLUMNS": "200"}, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout) == (2, "")
    assert f"SyntaxError in {own}/syntax.py, line 2: " in words(child.stderr)
    assert "Traceback" not in child.stderr
    assert "cnnfast/targets" not in child.stderr
