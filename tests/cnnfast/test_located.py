"""An error of a user's own code as one sentence: where in their file, and nothing of the libraries in between."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from cnnfast.located import located, own_frame

FILE = """\
import torch
from torch import nn
def plain(): raise ValueError("first\\nsecond")
def through_torch(): return nn.Conv2d(3, 4, 3)(torch.zeros(1, 2, 5, 5))
def silent(): assert 1 + 1 == 3
def caused():
    try:
        plain()
    except ValueError as error:
        raise KeyError("width") from error
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def caught(function) -> Exception:
    """What it raises, without this file in its traceback."""
    with pytest.raises(Exception) as raised:  # noqa: PT011
        function()
    error = raised.value
    assert error.__traceback__ is not None
    own = error.__traceback__.tb_next
    return error.with_traceback(own and own.tb_next if own and own.tb_frame.f_code.co_name == "<lambda>" else own)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("plain", "ValueError in mine.py, line 3: first"),
        ("through_torch", "RuntimeError in mine.py, line 4: Given groups=1"),
        ("silent", "AssertionError in mine.py, line 5: def silent(): assert 1 + 1 == 3"),
        ("caused", "KeyError in mine.py, line 10: 'width'"),
    ],
)
def test_an_error_names_the_users_line(module, name, says):
    said = located(caught(getattr(module, name)))
    assert said.startswith(says)
    assert "\n" not in said


def test_a_file_that_is_not_below_this_folder_is_named_whole(module, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    path = str(tmp_path).lstrip("/")
    assert located(caught(module.plain)) == f"ValueError in {path}/mine.py, line 3: first"
    monkeypatch.chdir(sys.prefix)
    assert located(caught(module.plain)) == f"ValueError in {tmp_path}/mine.py, line 3: first"


def test_an_error_of_libraries_alone_has_no_line():
    import torch

    error = caught(lambda: torch.nn.functional.conv2d(torch.zeros(1, 2, 5, 5), torch.zeros(4, 3, 3, 3)))
    assert own_frame(error) is None
    assert located(error).startswith("RuntimeError: Given groups=1")


def test_a_syntax_error_names_the_line_that_it_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = caught(lambda: compile("x = 1\ny = (\n", str(tmp_path / "broken.py"), "exec"))
    assert located(error) == "SyntaxError in broken.py, line 2: '(' was never closed"
