"""Evaluations: counts by hand, models and frozen networks alike, and pictures of them."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from torch import Tensor, nn

import cnnfast.nn as cnn
from cnnfast.engine.images.preprocessing import Preprocessing
from cnnfast.training import pictures
from cnnfast.training.evaluating import Probabilities, evaluate, evaluate_frozen, judged, most_confused
from cnnfast.training.runs import Epoch
from cnnfast.training.samples import ImageSet, open_images

pytest.importorskip("sklearn")

AS_FROZEN = Preprocessing(8, (8, 8), "bilinear", (0.5,), (0.5,))


@functools.cache
def digits() -> ImageSet:
    return open_images("digits", 8)


def augment() -> cnn.Augment:
    return cnn.Augment(8, crop_scale=None, padding=1, resize_size=8, mean=0.5, std=0.5)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))


def said(rows: list[list[float]], index: list[int]) -> Probabilities:
    return Probabilities(torch.tensor(index), torch.tensor(rows, dtype=torch.float64))


def test_counts_by_hand():
    three = digits().only(["3", "1", "7"])  # in an order of its own
    index = [int(torch.nonzero(three.labels == label)[0]) for label in (0, 1, 1, 2)]
    told = [
        said([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]], index[:2]),
        said([[0.1, 0.8, 0.1], [0.5, 0.49, 0.01]], index[2:]),
    ]
    done = []
    found = judged(three, torch.tensor(index), told, lambda n, of: done.append((n, of)))
    assert found.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert (found.images, found.right, found.accuracy, found.top) == (4, 2, 0.5, 1.0)
    assert [tuple(score) for score in found.scores] == [
        ("3", 1, 1.0, 1 / 3), ("1", 2, 0.5, 1.0), ("7", 1, 0.0, None)
    ]  # fmt: skip
    assert [tuple(m) for m in found.mistakes] == [(index[3], 2, 0, 0.5, 0.01), (index[1], 1, 0, 0.6, 0.3)]
    assert most_confused(found) == [("1", "3", 1), ("7", "3", 1)]
    assert done == [(2, 4), (4, 4)]
    assert found.to_json()["classes"][2] == {"name": "7", "images": 1, "recall": 0.0, "precision": None}


def test_top_five_and_the_worst_mistakes():
    n = 60
    labels = digits().labels[:n]
    order = (labels[:, None] + torch.arange(10)) % 10  # the classes of a row, its own first
    rows = torch.empty(n, 10, dtype=torch.float64)
    places = torch.arange(n) % 7  # how many classes are more probable than an image's own
    for i in range(n):
        ranked = order[i].roll(int(places[i]))
        rows[i, ranked] = torch.linspace(0.19, 0.01, 10, dtype=torch.float64) + 1e-4 * i
    found = judged(digits(), torch.arange(n), [Probabilities(torch.arange(n), rows)])
    assert found.right == int((places == 0).sum())
    assert found.in_top == int((places < 5).sum())
    own = [m.of_label for m in found.mistakes]
    assert len(own) == 24
    assert own == sorted(own)
    assert own[0] == min(float(rows[i, labels[i]]) for i in range(n) if places[i])


@pytest.mark.parametrize("batch", [7, 64])
def test_a_model_and_its_frozen_twin_are_judged_alike(batch, device):
    model, indices = network().to(device), torch.arange(0, 400, 3)
    model.train()
    model[1].eval()
    drawing = augment()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = evaluate(model, drawing, digits(), indices, batch=batch)
    frozen = network().eval()
    twin = evaluate_frozen(frozen, AS_FROZEN, digits(), indices, batch=batch)
    assert torch.equal(found.confusion, twin.confusion)
    assert [m[:3] for m in found.mistakes] == [m[:3] for m in twin.mistakes]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True, True]
    assert drawing.training
    assert found.images == len(indices)


def test_probabilities_are_not_softened_twice():
    model = nn.Sequential(network(), nn.Softmax(1)).eval()
    plain = evaluate_frozen(model[0], AS_FROZEN, digits(), torch.arange(50))
    found = evaluate_frozen(model, AS_FROZEN, digits(), torch.arange(50))
    assert found.mistakes[0].of_label == pytest.approx(plain.mistakes[0].of_label, rel=1e-5)


def test_what_cannot_be_judged_is_told(device):
    with pytest.raises(ValueError, match="no image to evaluate"):
        evaluate(network(), augment(), digits(), torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="tells 10 classes apart, and the images are of 2"):
        evaluate(network().to(device), augment(), digits().only(["3", "4"]))
    broken = network().to(device)
    nn.init.constant_(broken[4].bias, float("nan"))
    with pytest.raises(ValueError, match="no finite numbers for digit 5"):
        evaluate(broken, augment(), digits(), torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="returns no tensor"):
        evaluate_frozen(lambda x: (x, x), AS_FROZEN, digits(), torch.arange(4))


def png_size(content: bytes | None) -> tuple[int, int]:
    from PIL import Image

    assert content is not None
    image = Image.open(io.BytesIO(content))
    image.load()
    assert image.format == "PNG"
    return image.size


def test_pictures():
    pytest.importorskip("PIL")
    pytest.importorskip("matplotlib")
    found = evaluate_frozen(network().eval(), AS_FROZEN, digits(), torch.arange(100))
    history = [Epoch(i, 1e-3, 2.0 / i, 0.5, 2.1 / i, 0.4 + 0.01 * i, 1.0) for i in range(1, 5)]
    assert png_size(pictures.curves(history)) == (1100, 440)
    assert png_size(pictures.curves([e._replace(validation_loss=None, validation_accuracy=None) for e in history]))
    assert png_size(pictures.confusion(found))
    wide, high = png_size(pictures.mistakes(found, digits()))
    assert wide > 6 * pictures.TILE
    assert high > 4 * pictures.TILE
    right = judged(
        digits(), torch.tensor([0]), [Probabilities(torch.tensor([0]), nn.functional.one_hot(digits().labels[:1], 10))]
    )
    assert pictures.mistakes(right, digits()) is None
    drawing = augment()
    assert png_size(pictures.augmented(drawing.eval(), digits(), range(30)))
    assert not drawing.training


def test_what_is_shown_is_what_the_network_sees(monkeypatch):
    pytest.importorskip("PIL")
    shown: list[Tensor] = []
    real = pictures.sheet
    monkeypatch.setattr(
        pictures, "sheet", lambda images, *rest, **how: (shown.append(images), real(images, *rest, **how))[1]
    )
    drawing = cnn.Augment(8, crop_scale=None, padding=1, mean=0.25, std=2.0, horizontal_flip_p=1.0)
    pictures.augmented(drawing, digits(), [4, 9])
    batch = torch.stack([digits()[4].image, digits()[9].image])
    seen = drawing(batch, index=[4, 9])
    torch.testing.assert_close(shown[0], seen * 2.0 + 0.25)
