"""What frozen.profile(x) says, and its picture."""

from __future__ import annotations

import json
import re
import sys

import pytest

import cnnfast
from cnnfast.engine import runtime
from cnnfast.engine.profiling import Profile, StepTime
from tests.support.freezable import Exact, image


@pytest.fixture(scope="module", params=["onnxruntime", "oneDNN"])
def profile(request):
    if request.param == "onnxruntime":
        pytest.importorskip("onnxruntime")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "oneDNN":
            patch.setattr(runtime.sessions, "available", lambda graph: "it is not wanted here")
        found = cnnfast.freeze(Exact(), image()).profile(image(3))
    assert found.runner == request.param
    return found


def test_the_slowest_step_comes_first_and_the_shares_make_a_whole(profile):
    times = [step.microseconds for step in profile.steps]
    assert times == sorted(times, reverse=True)
    assert times[0] > 0
    assert profile.microseconds == pytest.approx(sum(times))
    assert sum(step.share for step in profile.steps) == pytest.approx(1)
    assert {"conv2d", "conv2d_1"} <= {step.name for step in profile.steps}
    conv = next(step for step in profile.steps if step.name == "conv2d")
    assert (conv.operator, conv.pattern) == ("cnnfast.convolution", "convolution")


def test_as_a_table_and_as_json(profile):
    text = str(profile)
    assert max(map(len, text.splitlines())) <= 100
    assert profile.summary in " ".join(text.split())
    assert re.search(rf"\d+ us in all, by {profile.runner}, for 3x3x8x8", profile.summary)
    data = json.loads(profile.to_json())
    assert [step["name"] for step in data["steps"]] == [step.name for step in profile.steps]
    assert data["shapes"] == [[3, 3, 8, 8]]


def test_inputs_are_those_of_a_call():
    frozen = cnnfast.freeze(Exact(), image())
    with pytest.raises(ValueError, match="x must be"):
        frozen.profile(image()[0])


def made(count: int) -> Profile:
    steps = [
        StepTime(f"step_{i}", "cnnfast.convolution", ("", "stem", "block")[i % 3], 100 - i, 1 / count)
        for i in range(count)
    ]
    return Profile("oneDNN", ((1, 3, 8, 8),), tuple(steps))


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture(ending, tmp_path):
    pytest.importorskip("matplotlib")
    made(60).picture(tmp_path / f"profile.{ending}")
    written = (tmp_path / f"profile.{ending}").read_bytes()
    assert written.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    if ending == "svg":
        text = written.decode()
        assert "step_0 " in text.replace("-->", " ")
        assert "the 40 slowest" in text
        assert "stem: 33%" in text


def test_a_picture_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "cnnfast.engine.picturing", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape("pip install '.[demo]' brings it")):
        made(3).picture(tmp_path / "x.png")
