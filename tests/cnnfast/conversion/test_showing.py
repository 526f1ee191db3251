"""What print(model) shows of a converted model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn

import cnnfast
from tests.support.blocks import CHANNELS, Block, Net, block, build, image


def test_a_block(quick):
    """Each member says in which step it is, the first of them what the step computes; an activation may be in two."""
    assert repr(cnnfast.convert(build(Block, quick))) == (
        "Block(\n"
        "  (conv): Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))  # one step: conv + bn + relu\n"
        "  (bn): BatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)"
        "  # in the step of conv\n"
        "  (relu): ReLU()  # in the steps of conv, conv2\n"
        "  (conv2): Conv2d(4, 4, kernel_size=(1, 1), stride=(1, 1), bias=False)"
        "  # one step: conv2 + bn2 + residual + relu\n"
        "  (bn2): BatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)"
        "  # in the step of conv2\n"
        ")"
    )


def comments(model: nn.Module) -> dict[str, str]:
    """The comment in each line, by the name that it begins with."""
    lines = [line.partition("  # ") for line in repr(model).splitlines()]
    return {line.split(":")[0].strip(" ()"): said for line, mark, said in lines if mark}


def test_numbered_children_and_layers_of_ours(quick):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 4))
    ours = cnnfast.convert(model)
    assert comments(ours) == {"0": "one step: Conv2d + ReLU", "1": "in the step of 0", "2": "cnnfast"}
    assert repr(ours).replace("  # cnnfast", "").splitlines()[3:] == repr(model).splitlines()[3:]
    assert repr(cnnfast.revert(ours)) == repr(model)
    assert "#" not in repr(model)


@pytest.mark.parametrize("kind", [Block, Net])
def test_reverted_it_is_pytorchs(kind, quick):
    model = build(kind, quick)
    ours = cnnfast.convert(model)
    assert repr(ours) != repr(model) == repr(cnnfast.revert(ours))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(twin) == repr(ours)


def test_without_the_comments_it_is_pytorchs(quick):
    model = build(Net, quick)
    lines = [line.partition("  # ")[0] for line in repr(cnnfast.convert(model)).splitlines()]
    assert lines == repr(model).splitlines()


def test_a_member_of_a_nested_container(quick):
    """The outer forward calls it past the inner one."""

    def forward(self, x):
        return self.relu(self.parts.first(x))

    parts = nn.Module()
    parts.first, parts.second = nn.Conv2d(CHANNELS, 4, 3), nn.MaxPool2d(2)
    ours = cnnfast.convert(build(block(forward, parts=parts), quick))
    said = comments(ours)
    assert (said["first"], said["second"]) == ("one step: first + relu", "cnnfast")
    assert said["relu"] == "in the step of parts.first"


def test_idle_steps_are_not_shown(quick):
    ours = cnnfast.convert(build(Block, quick))
    before = comments(ours)
    handle = ours.bn.register_forward_hook(lambda *call: None)
    assert set(comments(ours).values()) == {"cnnfast"}
    handle.remove()
    assert comments(ours) == before
    ours.relu.forward = lambda x: x
    assert set(comments(ours).values()) == {"cnnfast"}
    del ours.relu.forward
    ours.conv.forward = lambda x: x
    assert "conv" not in comments(ours)


def test_a_text_of_its_own(quick):
    class Quiet(Block):
        def __repr__(self):
            return "quiet"

    class Extra(Block):
        def extra_repr(self):
            return "first line\nsecond line"

        def _get_name(self):
            return "Name"

    assert repr(cnnfast.convert(build(Quiet, quick))) == "quiet"
    model = build(Extra, quick)
    lines = repr(cnnfast.convert(model)).splitlines()
    assert lines[:3] == ["Name(", "  first line", "  second line"]
    assert [line.partition("  # ")[0] for line in lines] == repr(model).splitlines()
    listed = nn.Sequential(nn.ModuleList([build(Block, quick), build(Block, quick)]))
    assert "(0-1): 2 x Block(" in repr(cnnfast.convert(listed))


def test_a_graph_module(quick):
    ours = cnnfast.convert(fx.symbolic_trace(build(Block, quick)))
    assert comments(ours)["conv"] == "one step: conv + bn + relu"
    assert "def forward" in str(ours)
    assert torch.equal(ours(image().to(quick)), cnnfast.revert(ours)(image().to(quick)))
