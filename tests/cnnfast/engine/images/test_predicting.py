"""Predictions come for every file, in their order, from batches of one size, by a reader that is ahead but not far."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from cnnfast.engine.images import predicting
from cnnfast.engine.images.predicting import (
    NOT_FINITE,
    NoClasses,
    OtherClasses,
    Prediction,
    predict,
    probabilities,
)
from cnnfast.engine.images.preprocessing import Preprocessing

PIL = pytest.importorskip("PIL.Image")

WHOLE = Preprocessing(None, None, "bilinear", (0.0,) * 3, (1.0,) * 3)
SQUARE = Preprocessing((4, 4), None, "nearest", (0.0,) * 3, (1.0,) * 3)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Brightest:
    """Scores of an image are the means of its channels: its colour is its class. Keeps the shapes that it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[int, ...]] = []

    def __call__(self, x):
        self.given.append(tuple(x.shape))
        return x.mean((2, 3)) * 10


def paint(folder: Path, name: str, colour: str, size: tuple[int, int] = (5, 3)) -> Path:
    PIL.new("RGB", size, COLOURS[colour]).save(folder / name)
    return folder / name


def seen(groups) -> list[tuple[str, int | str]]:
    """The name of each file with its class or its error."""
    return [(one.file.name, one.top[0][0] if one.top else one.error) for group in groups for one in group]


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Ten, of which the first, the fifth and the last two are no images."""
    colours = [*COLOURS] * 4
    made = [paint(tmp_path, f"{i}.png", colours[i]) for i in range(10)]
    for i in (0, 4, 8, 9):
        made[i].write_bytes(b"")
    return made


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_every_file_has_its_own_prediction(files, batch):
    network = Brightest()
    found = seen(predict(network, SQUARE, files, batch=batch, top=1))
    empty = "the file is empty"
    assert found == [(f"{i}.png", empty if i in (0, 4, 8, 9) else i % 3) for i in range(10)]
    assert sum(shape[0] for shape in network.given) == 6
    assert max(shape[0] for shape in network.given) == min(batch, 6)


def test_the_most_probable_classes_come_first(tmp_path):
    mixed = tmp_path / "mixed.png"
    PIL.new("RGB", (4, 4), (51, 204, 102)).save(mixed)
    ((one,),) = predict(Brightest(), SQUARE, [mixed], batch=1, top=2)
    expected = torch.tensor([2.0, 8, 4], dtype=torch.float64).softmax(0).tolist()
    assert [index for index, _ in one.top] == [1, 2]
    assert [p for _, p in one.top] == pytest.approx([expected[1], expected[2]], rel=1e-6)
    ((one,),) = predict(Brightest(), SQUARE, [mixed], batch=1, top=9)
    assert [index for index, _ in one.top] == [1, 2, 0]
    assert sum(p for _, p in one.top) == pytest.approx(1)


def test_what_is_a_probability_already_is_left_alone():
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]])
    assert torch.equal(probabilities(rows), rows)
    assert torch.equal(probabilities(rows.half()), rows.half()), "rounded to half precision"
    assert torch.equal(probabilities(rows * 2), (rows * 2).softmax(1))
    assert torch.equal(probabilities(rows - 0.1), (rows - 0.1).softmax(1))
    one_of_both = torch.stack([rows[0], rows[1] * 5])
    assert torch.equal(probabilities(one_of_both), one_of_both.softmax(1))


def test_images_of_different_sizes_are_not_in_one_batch(tmp_path):
    sizes = [(5, 3), (5, 3), (3, 5), (5, 3), (5, 3), (5, 3)]
    files = [paint(tmp_path, f"{i}.png", "blue", size) for i, size in enumerate(sizes)]
    network = Brightest()
    assert seen(predict(network, WHOLE, files, batch=2, top=1)) == [(f"{i}.png", 2) for i in range(6)]
    assert network.given == [(2, 3, 3, 5), (1, 3, 5, 3), (2, 3, 3, 5), (1, 3, 3, 5)]


def test_a_size_that_the_network_refuses_is_the_error_of_its_images(tmp_path):
    files = [paint(tmp_path, f"{i}.png", "green", (4, height)) for i, height in enumerate((4, 1, 4))]

    def picky(x):
        if x.shape[2] < 2:
            raise ValueError("frozen(): x must be higher")
        return x.mean((2, 3))

    found = seen(predict(picky, WHOLE, files, batch=8, top=1))
    assert found == [("0.png", 1), ("1.png", "frozen(): x must be higher"), ("2.png", 1)]


def test_what_is_not_finite_is_no_prediction(tmp_path):
    files = [paint(tmp_path, "0.png", "red"), paint(tmp_path, "1.png", "green")]
    found = seen(predict(lambda x: x.mean((2, 3)).log() - x[:, :1].mean((2, 3)).log(), SQUARE, files, batch=2, top=1))
    assert found == [("0.png", 0), ("1.png", NOT_FINITE)]


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (lambda x: x, "its result is a tensor of Nx3x4x4, and classes are read from one tensor of N x classes"),
        (lambda x: {"out": x, "aux": x.mean((2, 3))}, "its result is a dict of Nx3x4x4 and Nx3, and classes"),
        (lambda x: (x.mean((2, 3)),) * 2, "its result is a tuple of Nx3 and Nx3"),
        (lambda x: x.mean((1, 2, 3)), "its result is a tensor of N, and"),
        (lambda x: x[:, :1].mean((2, 3)), "its result is a tensor of Nx1, and"),
        (lambda x: x[:1].mean((2, 3)), "its result is a tensor of Nx3, and"),
    ],
)
def test_a_result_that_tells_no_classes_is_described(tmp_path, network, says):
    files = [paint(tmp_path, f"{i}.png", "red") for i in range(2)]
    with pytest.raises(NoClasses, match=says):
        list(predict(network, SQUARE, files, batch=2, top=1, classes=3))


def test_another_number_of_classes_than_there_are_names(tmp_path):
    files = [paint(tmp_path, "0.png", "green")]
    with pytest.raises(OtherClasses, match="these are names of 4 classes, and the network tells 3"):
        list(predict(Brightest(), SQUARE, files, batch=2, top=1, classes=4))


def test_one_tensor_in_a_dict_tells_classes(tmp_path):
    """As the results of transformers' classifiers are."""
    files = [paint(tmp_path, "0.png", "green")]
    found = predict(lambda x: {"logits": x.mean((2, 3)), "loss": None}, SQUARE, files, batch=2, top=1, classes=3)
    assert seen(found) == [("0.png", 1)]


def test_the_reader_is_ahead_but_not_far(tmp_path, monkeypatch):
    """While the first batch runs the next ones are read, but not all; and who stops early does not wait for the
    rest.
    """
    files = [paint(tmp_path, f"{i:02}.png", "red") for i in range(40)]
    others = set(threading.enumerate())
    begun = []
    enough = threading.Event()

    def read(file):
        begun.append(file)
        if len(begun) == 7:
            enough.set()
        return PIL.open(file)

    monkeypatch.setattr(predicting, "read", read)

    def network(x):
        assert enough.wait(10), "nothing is read while the network runs"
        return x.mean((2, 3))

    groups = predict(network, SQUARE, files, batch=2, top=1)
    assert len(next(groups)) == 2
    assert len(begun) < 12
    groups.close()
    assert len(begun) < 12
    assert not [thread.name for thread in threading.enumerate() if thread not in others]


def test_no_memory_for_an_image_is_its_error(tmp_path, monkeypatch):
    files = [paint(tmp_path, "0.png", "red")]

    def read(file):
        raise MemoryError

    monkeypatch.setattr(predicting, "read", read)
    ((one,),) = predict(Brightest(), SQUARE, files, batch=2, top=1)
    assert one == Prediction(files[0], error="there is not enough memory for it")
