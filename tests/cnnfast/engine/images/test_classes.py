"""Names of classes, from wherever they come, in the order of the columns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from cnnfast.engine.images.classes import classes_of, found_on
from cnnfast.engine.images.preprocessing import Preprocessing
from tests.support.packages import package

NAMES = ("crane", "kite", "crane")


@pytest.mark.parametrize(
    "given",
    [
        list(NAMES),
        NAMES,
        {2: "crane", 0: "crane", 1: "kite"},
        {"1": "kite", "0": "crane", "2": "crane"},
        SimpleNamespace(config=SimpleNamespace(id2label={0: "crane", 1: "kite", 2: "crane"})),
        SimpleNamespace(id2label={0: "crane", 1: "kite", 2: "crane"}),
        SimpleNamespace(meta={"categories": list(NAMES)}),
    ],
    ids=str,
)
def test_forms(given):
    assert classes_of(given) == NAMES


def test_a_file_with_a_name_in_each_line(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffcrane\r\nkite \ncrane\n\n".encode())
    assert classes_of(str(file)) == classes_of(file) == NAMES
    file.write_text("crane\n\nkite\n")
    with pytest.raises(ValueError, match=r"names\.txt has no name in line 2"):
        classes_of(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"names\.txt is empty"):
        classes_of(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"names\.txt is no text in UTF-8"):
        classes_of(file)
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read: No such file"):
        classes_of(tmp_path / "gone.txt")
    file = tmp_path / "names.json"
    file.write_text('["crane", "kite", "crane"]')
    assert classes_of(file) == NAMES


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, "classes=3 is no list of names: give a list of names; weights of torchvision"),
        ([], "is no list of names"),
        ({1: "crane", 2: "kite"}, "is no list of names"),
        ({"crane": 0}, "is no list of names"),
        (["crane", 3], "the name of class 1 is 3, and must be a text"),
        (["crane", " "], "the name of class 1 is ' '"),
        (nn.ReLU(), "is no list of names"),
    ],
    ids=str,
)
def test_anything_else_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        classes_of(given)


def test_weights_of_torchvision():
    weights = package("torchvision").models.ResNet18_Weights.IMAGENET1K_V1
    names = classes_of(weights)
    assert len(names) == 1000
    assert names[207] == "golden retriever"
    assert classes_of("ResNet18_Weights.IMAGENET1K_V1") == names


def test_what_a_model_carries():
    timm = package("timm")
    model = timm.create_model("resnet10t")
    assert found_on(model) == (Preprocessing.of(model), None)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["a", "b"], "label_descriptions": {"a": "ant"}}
    assert found_on(model)[1] == ("ant", "b")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5, 0.5), "label_names": [3]}
    assert found_on(model) == (None, None)
    assert found_on(nn.ReLU()) == (None, None)


def test_labels_of_transformers_unless_they_are_numbers():
    labelled = nn.ReLU()
    labelled.config = SimpleNamespace(id2label={0: "ant", 1: "bee"})
    assert found_on(labelled) == (None, ("ant", "bee"))
    labelled.config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
    assert found_on(labelled) == (None, None)
