"""Without a package the tests that need it are skipped, and say which one is missing."""

from __future__ import annotations

import sys

import pytest

from cnnfast import torchvision_import
from tests.support.packages import FOREIGN, package


@pytest.fixture
def without(monkeypatch):
    """Takes packages away, however much of them was imported before."""

    def no_torchvision():
        raise ModuleNotFoundError(name="torchvision")

    def take_away(*names):
        for module in [name for name in sys.modules if name.partition(".")[0] in FOREIGN]:
            monkeypatch.delitem(sys.modules, module)
        for name in FOREIGN:
            monkeypatch.setitem(sys.modules, name, None)  # what is imported meanwhile is forgotten afterwards
            if name not in names:
                del sys.modules[name]
        monkeypatch.setattr(torchvision_import, "torchvision", no_torchvision)

    return take_away


@pytest.mark.parametrize("name", FOREIGN)
def test_a_package_that_is_missing_is_named(name, without):
    without(*FOREIGN)
    with pytest.raises(pytest.skip.Exception, match=f"^{name} is not installed$"):
        package(name)


@pytest.mark.parametrize("name", ["timm.layers", "transformers.utils"])
def test_a_module_of_a_missing_package_is_not_there_either(name, without):
    without("timm", "transformers")
    with pytest.raises(pytest.skip.Exception, match=f"^{name.partition('.')[0]} is not installed$"):
        package(name)


def test_what_a_package_imports_is_named_too(without, monkeypatch, tmp_path):
    """timm imports torchvision."""
    (tmp_path / "timm.py").write_text("import torchvision")
    monkeypatch.syspath_prepend(tmp_path)
    without("torchvision")
    with pytest.raises(pytest.skip.Exception, match=r"^torchvision is not installed$"):
        package("timm")


def test_a_package_that_lacks_something_else_is_broken(without, monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    without("torchvision")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        package("timm")


def test_a_package_that_is_there_is_given(without, monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("here = True")
    monkeypatch.syspath_prepend(tmp_path)
    without("torchvision")
    assert package("timm").here
