"""What somebody sees who types a public name: its signature and its help, and which one was probably meant."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
from torch import nn

import cnnfast
import cnnfast.functional as functional
from cnnfast import dispatch, warming, workers

FUNCTIONS = {name: getattr(functional, name) for name in functional.__all__}
OF_IMAGES = ("augment", "pack_images")


def test_a_misspelt_name_of_the_package():
    with pytest.raises(AttributeError) as refused:
        cnnfast.convrt  # noqa: B018
    assert str(refused.value) == "module 'cnnfast' has no attribute 'convrt'. Did you mean 'convert'?"
    assert not hasattr(cnnfast, "quantum")
    assert set(dir(cnnfast)) == set(cnnfast.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_show_their_own_signature(name):
    """To inspect.signature and help(), though each is decorated; and they are pickled by their names."""
    shown = inspect.signature(FUNCTIONS[name])
    assert next(iter(shown.parameters)) == ("images" if name in OF_IMAGES else "input")
    assert shown.return_annotation.startswith("tuple[Tensor" if name == "pack_images" else "Tensor")
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in shown.parameters.values())
    assert FUNCTIONS[name].__name__ == FUNCTIONS[name].__qualname__ == name
    assert FUNCTIONS[name].__doc__
    assert pickle.loads(pickle.dumps(FUNCTIONS[name])) is FUNCTIONS[name]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("kernel", "'kernels'"), ("Triton", "'kernels'"), ("pytorch", "'torch'"), ("cudnn", "'torch'"), ("cuda", None)],
)
def test_a_backend_of_another_name(name, meant):
    with pytest.raises(ValueError, match="backend") as refused, cnnfast.backend(name):
        pass
    assert str(refused.value) == (
        f"backend(): name must be 'auto', 'kernels' or 'torch', but got name={name!r}"
        + (f". Did you mean {meant}?" if meant else "")
    )


@pytest.mark.parametrize(
    ("memory_format", "meant"),
    [
        ("channels_last", "torch.channels_last"),
        ("NHWC", "torch.channels_last"),
        ("nchw", "torch.contiguous_format"),
        (torch.preserve_format, None),
    ],
)
def test_a_memory_format_of_another_name(memory_format, meant):
    with pytest.raises(ValueError, match="memory_format") as refused:
        cnnfast.convert(nn.ReLU(), memory_format=memory_format)
    assert str(refused.value) == (
        "convert(): memory_format must be None, torch.channels_last or torch.contiguous_format, "
        f"but got memory_format={memory_format!r}" + (f". Did you mean {meant}?" if meant else "")
    )


@pytest.mark.parametrize(
    ("function", "keyword", "meant"),
    [
        (cnnfast.convert, "memoryformat", "memory_format"),
        (cnnfast.convert, "in_place", "inplace"),
        (cnnfast.revert, "in_place", "inplace"),
        (cnnfast.check, "d_type", "dtype"),
        (cnnfast.check, "backwards", "backward"),
        (cnnfast.tune, "training", "train"),
        (cnnfast.tune, "epochs", None),
        (cnnfast.explain, "training", "train"),
        (cnnfast.warm, "training", "train"),
        (cnnfast.freeze, "d_type", "dtype"),
        (cnnfast.freeze, "pre_processing", "preprocessing"),
    ],
)
def test_a_misspelt_keyword(function, keyword, meant):
    with pytest.raises(TypeError) as refused:
        function(nn.ReLU(), **{keyword: None})
    advice = f"Did you mean {meant!r}?" if meant else "Its arguments are model, train, budget, "
    says = f"{function.__name__}() got an unexpected keyword argument {keyword!r}. {advice}"
    assert str(refused.value).startswith(says)


def test_a_warning_of_warm_names_the_line_that_called_it(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "why_torch", lambda *tensors: "")
    monkeypatch.setattr(warming.launch, "INTERPRETED", False)
    monkeypatch.setattr(warming.devices, "gpu", lambda device: None)
    monkeypatch.setattr(warming, "launches", lambda *model, **options: ["one"])
    monkeypatch.setattr(workers, "compile_ahead", lambda *lines, **options: workers.Warming(failures=("no PTX",)))
    with pytest.warns(RuntimeWarning, match="1 of 1 kernels .* no PTX") as warned:
        cnnfast.warm(nn.Linear(1, 1))
    assert warned[0].filename == __file__


PUBLIC = {
    **{f"cnnfast.{name}": getattr(cnnfast, name) for name in cnnfast.__all__ if name != "__version__"},
    **{f"functional.{name}": function for name, function in FUNCTIONS.items()},
    **{f"nn.{name}": getattr(cnnfast.nn, name) for name in cnnfast.nn.__all__},
    **{f"models.{name}": getattr(cnnfast.models, name) for name in cnnfast.models.__all__},
}
# They refuse nothing themselves, or what they raise is said where another name is described.
RAISE_NOTHING = ("cnnfast.trace", "nn.Draws", "nn.GlobalAvgPool2d", "nn.fusable", "models.resn", "models.wide")


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_has_a_help_of_its_own(name):
    """It says what is raised, and a function's names each of its arguments, or whose they are."""
    thing = PUBLIC[name]
    text = thing.__doc__
    assert text
    assert text != next((base.__doc__ for base in getattr(thing, "__mro__", ())[1:]), None)
    if inspect.ismodule(thing) or name.startswith(RAISE_NOTHING):
        return
    assert "Raises" in text or "as conv_bn_act" in text
    if name.startswith("cnnfast."):
        arguments = [p for p in inspect.signature(thing).parameters if p not in text]
        assert arguments == []
