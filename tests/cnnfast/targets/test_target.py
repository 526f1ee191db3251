"""What MODEL may be: bare names of four libraries, files, dotted names; and the input that is derived from a model."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from cnnfast import torchvision_import
from cnnfast.targets.inputs import input_shape, parse_shape
from cnnfast.targets.libraries import imported
from cnnfast.targets.naming import resolve, resolve_module
from cnnfast.targets.target import TargetError
from tests.support.packages import package


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    imported.cache_clear()
    yield tmp_path
    imported.cache_clear()
    for name in list(sys.modules):
        if name.startswith("package"):  # a namespace package has no file
            del sys.modules[name]


def write(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))


@pytest.fixture
def libraries(folder, monkeypatch):
    """Small stand-ins of the three foreign libraries, torchvision with a C library that does not load."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "timm", "transformers")]:
        monkeypatch.delitem(sys.modules, name)
    write(
        folder, "torchvision/__init__.py", 'raise RuntimeError("operator torchvision::nms does not exist\\nand more")'
    )
    write(folder, "torchvision/models.py", "")
    write(
        folder,
        "timm/__init__.py",
        """
        from torch import nn
        def list_models(): return ["resnet50", "resnet50d", "resnext50_32x4d", "plainnet"]
        def is_model(name): return name.partition(".")[0] in list_models()
        def create_model(name, pretrained):
            assert not pretrained
            if name == "resnet50d":
                raise ValueError("no such luck")
            return nn.Sequential(nn.Conv2d(3, len(name), 3))
        """,
    )
    monkeypatch.setattr(torchvision_import, "make_importable", lambda: None)
    monkeypatch.setitem(sys.modules, "transformers", None)  # not installed
    monkeypatch.syspath_prepend(str(folder))
    return folder


def says(text: str) -> str:
    with pytest.raises(TargetError) as raised:
        resolve_module(text)
    return str(raised.value)


# ----------------------------------------------------------------------------------------------------------------------
# Bare names


def test_a_bare_name_is_cnnfasts_first(libraries, capsys):
    found = resolve("resnet18")
    assert found.source == "cnnfast"
    assert type(found.value).__module__.startswith("cnnfast.models")
    assert capsys.readouterr().err == "", "nothing else was imported"


def test_a_prefix_fixes_the_source(libraries):
    found, model = resolve_module("timm:resnet50")
    assert (found.name, found.source, model[0].out_channels) == ("resnet50", "timm", 8)
    assert "'resnet18' is no model of timm. Did you mean 'resnet50'" in says("timm:resnet18")


def test_a_source_that_does_not_import_is_passed_over(libraries, capsys):
    found = resolve("plainnet")
    assert found.source == "timm"
    assert (
        capsys.readouterr().err
        == "torchvision is installed but does not import: RuntimeError: operator torchvision::nms does not exist\n"
    )
    assert resolve("resnext50_32x4d.a1_in1k").source == "timm", "a tag of timm's is no dotted name"
    assert capsys.readouterr().err == "", "it is said once"
    assert says("torchvision:resnet50") == "torchvision is not importable"


def test_a_source_that_is_not_installed_is_said_to_be_so(libraries):
    assert says("transformers:ResNetModel") == "transformers is not installed"


def test_unknown_names_are_told_near_ones(libraries):
    message = says("resnext50_32x4")
    assert message.startswith(
        "'resnext50_32x4' is no model of cnnfast, timm (torchvision installed, but not importable). "
        "Did you mean 'resnext50_32x4d'"
    )
    assert "Did you mean 'resnet50'" in says("ResNet-50")
    assert "file.py:NAME" in says("xyzzy")


def test_a_builder_that_fails_says_why(libraries):
    assert says("timm:resnet50d") == "timm does not build resnet50d: ValueError: no such luck"


@pytest.mark.parametrize(
    ("library", "name", "kind"),
    [
        ("torchvision", "torchvision:mobilenet_v3_small", "MobileNetV3"),
        ("torchvision", "torchvision:fcn_resnet50", "FCN"),  # whose backbone would come with weights
        ("torchvision", "squeezenet1_1", "SqueezeNet"),
        ("timm", "timm:resnet10t", "ResNet"),
        ("timm", "resnet10t.c3_in1k", "ResNet"),
        ("transformers", "mobilenet_v1", "MobileNetV1Model"),
        ("transformers", "transformers:MobileNetV1ForImageClassification", "MobileNetV1ForImageClassification"),
        ("transformers", "MobileNetV1Config", "MobileNetV1Model"),
        ("transformers", "transformers.MobileNetV1Model", "MobileNetV1Model"),
        ("transformers", "transformers:MobileNetV1Model", "MobileNetV1Model"),
    ],
)
def test_real_libraries(library, name, kind, monkeypatch):
    package(library)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *a, **k: pytest.fail("weights are fetched"))
    assert type(resolve_module(name)[1]).__name__ == kind


@pytest.mark.parametrize(
    ("library", "name", "near"),
    [
        ("torchvision", "resnet5O", "resnet50"),
        ("torchvision", "torchvision:densnet121", "densenet121"),
        ("timm", "timm:convnext_tyni", "convnext_tiny"),
        ("transformers", "ConvNextModl", "ConvNextModel"),
    ],
)
def test_real_near_matches(library, name, near):
    package(library)
    message = says(name)
    assert repr(near) in message.partition(". Did you mean ")[2]


# ----------------------------------------------------------------------------------------------------------------------
# Files and dotted names


@pytest.fixture
def files(folder):
    write(
        folder,
        "nets.py",
        """
        import torch
        from torch import nn
        import beside
        class Net(nn.Sequential):
            def __init__(self, width=4): super().__init__(nn.Conv2d(beside.CHANNELS, width, 3))
        class Needy(nn.Module):
            def __init__(self, width, depth, bias=True): super().__init__()
        class Configured(nn.Module):
            config_class = dict
            def __init__(self, config): super().__init__(); self.config = config
        def build(width=5): return Net(width)
        def factory(width, *more, depth): return Net(width)
        def apply(x): return torch.relu(x)
        class Namespace:
            pool = nn.MaxPool2d(2)
        number = 3
        """,
    )
    write(folder, "beside.py", "CHANNELS = 3")
    write(
        folder,
        "package/inner/models.py",
        "from torch import nn\ndef net(): return nn.Conv2d(1, 1, 1)\nmade = nn.ReLU()\n",
    )
    return folder


@pytest.mark.parametrize(
    ("name", "source", "kind"),
    [
        ("nets.py:Net", "nets.py", "Net"),
        ("nets.py:build", "nets.py", "Net"),
        ("nets.py:Configured", "nets.py", "Configured"),
        ("nets.py:Namespace.pool", "nets.py", "MaxPool2d"),
        ("nets:build", "nets", "Net"),
        ("nets.build", "nets", "Net"),
        ("package.inner.models:net", "package.inner.models", "Conv2d"),
        ("package.inner.models.made", "package.inner.models", "ReLU"),
        ("torch.nn:ReLU", "torch.nn", "ReLU"),
        ("cnnfast.models.resnet18", "cnnfast.models", "ResNet"),
    ],
)
def test_files_and_dotted_names(files, name, source, kind):
    found, model = resolve_module(name)
    assert (found.name, found.source, type(model).__name__) == (name, source, kind)


def test_functions_of_tensors_stand_for_themselves(files):
    assert resolve("nets.py:apply").value(torch.tensor(-1.0)) == 0
    assert (
        says("nets.py:apply")
        == "nets.py:apply needs arguments (x): write a function that builds it, `def build(): return apply(x=...)`, "
        "and name that: file.py:build"
    )
    assert "needs arguments (width, depth)" in says("nets.py:factory")
    assert resolve("torch:relu").value is torch.relu
    assert "gives builtin_function_or_method" in says("torch:relu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nets.py",
            "nets.py names no model: write file.py:NAME; "
            "nets.py has Configured, Namespace, Needy, Net, apply, build, factory",
        ),
        ("nothing.py:Net", "there is no file nothing.py"),
        ("nothing.py", "there is no file nothing.py"),
        ("nothing.at.all:Net", "there is no module nothing, neither installed nor in this folder; a file is "),
        ("nets.py:Nett", "nets.py has no 'Nett'. Did you mean 'Net'?"),
        ("nets.py:zzz", "nets.py has no 'zzz'; nets.py has Configured, Namespace"),
        (
            "nets.py:Needy",
            "Needy needs arguments (width, depth): write a function that builds it, "
            "`def build(): return Needy(width=..., depth=...)`, and name that: file.py:build",
        ),
        ("nets.py:number", "nets.py:number is, or returns, int: nothing that can be called"),
        ("nets:", "write a bare name such as resnet50"),
        (":Net", "write a bare name"),
        ("", "write a bare name"),
        ("package.inner.models.nett", "package.inner.models has no 'nett'. Did you mean 'net'?"),
        ("package.outer.net", "there is no module package.outer"),
        ("nott.py:Net", "there is no file nott.py"),
        ("net.py:Net", "there is no file net.py. Did you mean 'nets.py'?"),
        ("torchvison:resnet18", "there is no module torchvison, neither installed nor in this folder. Did you mean"),
        ("nowhere.Net", "and there is no package nowhere"),
    ],
)
def test_errors_say_what_would_be_right(files, name, message):
    assert message in says(name)


def test_a_file_that_failed_is_read_again(folder):
    write(folder, "mended.py", "raise ValueError('not yet')")
    assert says("mended.py:net") == "cannot import mended.py: ValueError in mended.py, line 1: not yet"
    assert "mended" not in sys.modules
    write(folder, "mended.py", "from torch import nn\nnet = nn.ReLU()")
    assert type(resolve_module("mended.py:net")[1]) is nn.ReLU


def test_the_line_is_the_innermost_of_the_users_own(files):
    write(files, "outer.py", "import beside\ndef net():\n    return beside.broken()")
    write(files, "beside.py", "CHANNELS = 3\ndef broken():\n    return int('x')")
    assert says("outer.py:net") == (
        "cannot build outer.py:net: ValueError in beside.py, line 3: invalid literal for int() with base 10: 'x'"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Inputs


@pytest.mark.parametrize(("text", "shape"), [("1x3x32x32", (1, 3, 32, 32)), ("7", (7,)), ("2X3", (2, 3))])
def test_parse_shape(text, shape):
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "1x0x4", "1x-3", "3,4", "axb", "1x"])
def test_parse_shape_refuses(text):
    with pytest.raises(TargetError, match="is no shape"):
        parse_shape(text)


def classifier(size: int, channels: int = 1) -> nn.Module:
    """Runs on images of one size only."""
    return nn.Sequential(nn.Conv2d(channels, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * size * size, 3))


class OwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight)


@pytest.mark.parametrize(
    ("model", "large", "small"),
    [
        (nn.Conv2d(5, 2, 3), (1, 5, 224, 224), (2, 5, 32, 32)),
        (nn.Conv1d(5, 2, 3), (1, 5, 224), (2, 5, 32)),
        (nn.Conv3d(5, 2, 3), (1, 5, 16, 224, 224), (2, 5, 16, 32, 32)),
        (nn.ConvTranspose2d(5, 2, 3), (1, 5, 224, 224), (2, 5, 32, 32)),
        (nn.Sequential(nn.Conv2d(6, 6, 3, groups=3)), (1, 6, 224, 224), (2, 6, 32, 32)),
        (nn.Linear(7, 2), (1, 7), (2, 7)),
        (OwnWeight(), (1, 2, 224, 224), (2, 2, 32, 32)),
        (classifier(28), (1, 1, 28, 28), (2, 1, 28, 28)),
        (classifier(96, 3), (1, 3, 96, 96), (2, 3, 96, 96)),
        (classifier(33), (1, 1, 224, 224), (2, 1, 32, 32)),  # which says what is wrong
        (nn.Sequential(nn.Conv2d(3, 4, 64)), (1, 3, 224, 224), (2, 3, 64, 64)),
        # 2 values a channel at 32
        (nn.Sequential(nn.Conv2d(3, 4, 32, 32), nn.BatchNorm2d(4)), (1, 3, 224, 224), (2, 3, 64, 64)),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)),
            (1, 3, 224, 224),
            (2, 3, 32, 32),
        ),
        (nn.Conv2d(3, 4, 3, dtype=torch.float16), (1, 3, 224, 224), (2, 3, 32, 32)),
    ],
)
def test_inputs_that_a_model_takes(model, large, small):
    assert input_shape(model, 1, small=False) == large
    assert input_shape(model, 2, small=True) == small


def test_a_model_without_weights_needs_an_input():
    with pytest.raises(TargetError, match="ReLU has no layer with a weight"):
        input_shape(nn.ReLU(), 1, small=False)


def test_what_a_model_of_timm_says_of_itself():
    timm = package("timm")
    with torch.device("meta"):
        assert input_shape(timm.create_model("efficientnet_b4"), 1, small=False) == (1, 3, 320, 320)
        assert input_shape(timm.create_model("resnet18", in_chans=1), 1, small=False) == (1, 1, 224, 224)


def test_what_a_model_of_transformers_says_of_itself():
    transformers = package("transformers")
    with torch.device("meta"):
        config = transformers.MobileNetV1Config(image_size=160, num_channels=4)
        assert input_shape(transformers.MobileNetV1Model(config), 1, small=False) == (1, 4, 160, 160)
        assert input_shape(
            transformers.ViTModel(transformers.ViTConfig(image_size=[96, 48], patch_size=16)), 2, small=True
        ) == (
            2,
            3,
            96,
            48,
        )
