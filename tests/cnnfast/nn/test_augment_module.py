"""cnn.Augment as a module: its options and what they refuse, repr, copies, DataLoaders, other processes, torch.compile;
and options given as words.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import cnnfast.nn as cnn
from tests.support.child import run_compiled
from tests.support.packages import package

CPU = pytest.mark.cpu_tensors("a DataLoader, and a process without a GPU, hand them over")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"crop_scale": (0.5, 0.2)}, "crop_scale must be two numbers from 0 to 1, the least and the largest part"),
        ({"crop_scale": (0.5, 1.2)}, "crop_scale must be two numbers from 0 to 1"),
        ({"crop_scale": (0, 0)}, "crop_scale must be two numbers from 0 to 1"),
        ({"crop_scale": 0.5}, "crop_scale must be two numbers from 0 to 1"),
        ({"crop_ratio": (0, 2)}, "crop_ratio must be two numbers above 0"),
        ({"crop_ratio": (1, float("inf"))}, "crop_ratio must be two numbers above 0"),
        ({"padding": 4}, "padding must be None unless crop_scale=None is given"),
        ({"crop_scale": None, "padding": -1}, r"padding must be a whole number from 0, or two \(left and right, top"),
        ({"crop_scale": None, "padding": (1, 2, 3)}, "padding must be a whole number from 0, or two"),
        ({"crop_scale": None, "padding": 1.5}, "padding must be a whole number from 0, or two"),
        ({"horizontal_flip_p": 1.5}, "horizontal_flip_p must be a probability, from 0 to 1"),
        ({"vertical_flip_p": -0.1}, "vertical_flip_p must be a probability, from 0 to 1"),
        ({"grayscale_p": "often"}, "grayscale_p must be a probability, from 0 to 1"),
        ({"erasing_p": True}, "erasing_p must be a probability, from 0 to 1"),
        ({"degrees": -1}, "degrees must be a number of degrees from 0, or two numbers"),
        ({"degrees": (3, 1)}, "degrees must be a number of degrees from 0, or two numbers"),
        ({"degrees": (1, 2, 3, 4)}, "degrees must be a number of degrees from 0, or two numbers"),
        ({"degrees": float("nan")}, "degrees must be a number of degrees from 0, or two numbers"),
        ({"shear": (1, 2, 3)}, "shear must be a number of degrees from 0, or two or four numbers"),
        ({"shear": (1, 2, 4, 3)}, "shear must be a number of degrees from 0, or two or four numbers"),
        ({"translate": (0.1, 1.1)}, "translate must be two numbers from 0 to 1, parts of width and height"),
        ({"translate": 0.1}, "translate must be two numbers from 0 to 1, parts of width and height"),
        ({"scale": (0, 1)}, "scale must be two numbers above 0, the least and the largest factor"),
        ({"brightness": -1}, "brightness must be a number from 0, or two numbers from 0, the smaller one first"),
        ({"contrast": (-1, 1)}, "contrast must be a number from 0, or two numbers from 0"),
        ({"saturation": (2, 1)}, "saturation must be a number from 0, or two numbers from 0"),
        ({"saturation": None}, "saturation must be a number from 0, or two numbers from 0"),
        ({"hue": 0.6}, "hue must be a number from 0 to 0.5, or two numbers from -0.5 to 0.5"),
        ({"erasing_scale": (0, 2)}, "erasing_scale must be two numbers from 0 to 1, the least and the largest part"),
        ({"erasing_ratio": (0, 2)}, "erasing_ratio must be two numbers above 0"),
        ({"erasing_value": "noise"}, r"erasing_value must be a number for all channels, or one .*\(1 or 3\), or 'rand"),
        ({"erasing_value": (1, 2)}, "erasing_value must be a number for all channels"),
        ({"mixup_alpha": 0}, "mixup_alpha must be a number above 0"),
        ({"cutmix_alpha": float("inf")}, "cutmix_alpha must be a number above 0"),
        ({"num_classes": 0}, "num_classes must be a whole number from 1"),
        ({"resize_size": 0}, "resize_size must be a whole number from 1"),
        ({"resize_size": (256, 256)}, "resize_size must be a whole number from 1"),
        ({"mean": "imagenet"}, r"mean must be a number for all channels, or one for each of them \(1 or 3\)"),
        ({"std": 0}, "std must be a number above 0 for all channels"),
        ({"fill": 255}, "fill must be a number from 0 to 1 for all channels"),
        ({"dtype": torch.float64}, "dtype must be torch.float32, torch.float16 or torch.bfloat16"),
        ({"dtype": "tf32"}, "dtype must be torch.float32, torch.float16 or torch.bfloat16"),
        ({"dtype": 32}, "dtype must be torch.float32, torch.float16 or torch.bfloat16"),
        ({"border": "reflect"}, "border must be 'constant' or 'reflection', .* Did you mean 'reflection'"),
        ({"seed": 2**64}, "seed must be a whole number from -9223372036854775808 to 18446744073709551615"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"generator": 3}, "generator must be a torch.*Generator or None"),
        ({"size": 0}, "size must be a positive whole number, or two: height and width"),
        ({"size": (8, 8, 8)}, "size must be a positive whole number, or two: height and width"),
        ({"size": "large"}, "size must be a positive whole number, or two: height and width"),
    ],
    ids=str,
)
def test_values_without_a_meaning(options, rule):
    (name,) = [name for name in options if name != "crop_scale"] or ["crop_scale"]
    with pytest.raises((ValueError, TypeError), match=rule) as refused:
        cnn.Augment(**({"size": 8} | options))
    assert f"but got {name}={options[name]!r}" in str(refused.value)


def test_a_misspelt_option():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'brightnes'\. Did you mean 'brightness'"):
        cnn.Augment(8, brightnes=0.4)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("brightness", 0.4, (0.6, 1.4)),
        ("brightness", 1.5, (0, 2.5)),
        ("saturation", (0.2, 3), (0.2, 3)),
        ("hue", 0.1, (-0.1, 0.1)),
        ("hue", (-0.5, 0.2), (-0.5, 0.2)),
    ],
)
def test_ranges_are_color_jitters(name, ours, theirs):
    v2 = package("torchvision.transforms.v2")
    assert (
        getattr(v2.ColorJitter(**{name: ours}), name) == getattr(cnn.Augment(8, **{name: ours}).jitter, name) == theirs
    )


def test_options_are_those_of_torchvision():
    """What an option has by default, its transform has too, where it has a default."""
    v2 = package("torchvision.transforms.v2")
    ours = {name: option.default for name, option in cnn.Augment.options().items()}
    for transform, names in {
        "RandomResizedCrop": {"scale": "crop_scale", "ratio": "crop_ratio"},
        "RandomCrop": {"padding": "padding", "fill": "fill"},
        "RandomHorizontalFlip": {"p": "horizontal_flip_p"},
        "RandomAffine": {"translate": "translate", "scale": "scale", "shear": "shear"},
        "RandomErasing": {"scale": "erasing_scale", "ratio": "erasing_ratio", "value": "erasing_value"},
    }.items():
        theirs = inspect.signature(getattr(v2, transform)).parameters
        assert {name: theirs[name].default for name in names} == {name: ours[own] for name, own in names.items()}


def test_what_is_shown():
    assert repr(cnn.Augment(224)) == "Augment(224)"
    assert repr(cnn.Augment((8, 9), hue=0.1, border="reflection")) == "Augment((8, 9), hue=0.1, border='reflection')"
    assert repr(cnn.Augment(8, horizontal_flip_p=0.5)) == "Augment(8)"


def test_there_is_no_state():
    module = cnn.Augment(8, mixup_alpha=0.1)
    assert module.state_dict() == {}
    assert list(module.parameters()) == list(module.buffers()) == []
    assert repr(module.half().to("cpu")) == repr(module)


def batch(device: torch.device | str = "cpu") -> Tensor:
    return torch.arange(2 * 3 * 20 * 24, device=device).remainder(251).to(torch.uint8).view(2, 3, 20, 24)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(device, copied):
    module = cnn.Augment(8, brightness=0.4, degrees=9, erasing_p=0.5, generator=torch.Generator().manual_seed(3))
    module(batch(device))  # the generator is on its way
    again = copied(module)
    assert repr(again)[:-30] == repr(module)[:-30]
    assert torch.equal(module(batch(device), index=[1, 2]), again(batch(device), index=[1, 2]))
    assert torch.equal(module(batch(device)), again(batch(device)))
    assert again.generator is not module.generator


def drawn_there() -> tuple[list[list[str]], bool]:
    """In a process of its own: numbers that were drawn and used, and whether torch._dynamo was imported."""
    import sys

    import torch

    import cnnfast.nn as cnn

    module = cnn.Augment(8, brightness=0.4, degrees=9, erasing_p=0.5, mixup_alpha=0.4)
    assert module(torch.zeros(3, 3, 20, 24), index=range(3)).isfinite().all()
    drawn = module.draw((20, 24), [11, 12, -13], epoch=4)
    numbers = [drawn.maps, drawn.colours, drawn.boxes, drawn.partners]
    hexadecimal = [[float(v).hex() for v in t.flatten()] for t in numbers if t is not None]
    return hexadecimal, "torch._dynamo" in sys.modules


@CPU
def test_another_process():
    """The same to the bit; and torch._dynamo, which takes a second, is not imported."""
    numbers, imported = run_compiled(drawn_there)
    assert numbers == drawn_there()[0]
    assert not imported


class Photographs(Dataset[tuple[int, Tensor, int]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, Tensor, int]:
        return index, torch.full((3, 10 + index, 12), index * 30, dtype=torch.uint8), index % 3


class Collate:
    def __init__(self, module: cnn.Augment, with_index: bool) -> None:
        self.module, self.with_index = module, with_index

    def __call__(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        indices, images, labels = zip(*samples, strict=True)
        return self.module(list(images), torch.tensor(labels), index=list(indices) if self.with_index else None)


def loaded(
    module: cnn.Augment, workers: int, batch_size: int = 4, with_index: bool = True
) -> list[tuple[Tensor, Tensor]]:
    return list(
        DataLoader(
            Photographs(),
            batch_size,
            num_workers=workers,
            collate_fn=Collate(module, with_index),
            timeout=60 * bool(workers),
        )
    )


@CPU
def test_in_the_workers_of_a_data_loader():
    """What the main process gives, the workers give: to the bit, whatever the size of a batch."""
    module = cnn.Augment(8, brightness=0.4, mixup_alpha=0.3, num_classes=3)
    for (images, labels), (again, labels_again) in zip(loaded(module, 0), loaded(module, 2), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)
    module = cnn.Augment(8, brightness=0.4)
    whole, parts = (torch.cat([images for images, _ in loaded(module, 0, size)]) for size in (8, 3))
    assert torch.equal(whole, parts)


@CPU
def test_a_generator_in_a_worker_is_refused():
    with pytest.raises(RuntimeError, match="in a worker of a DataLoader a generator draws the same indices"):
        loaded(cnn.Augment(8, generator=torch.Generator()), 1, with_index=False)


@CPU
def test_workers_without_an_index_draw_differently():
    torch.manual_seed(0)
    (first, _), (second, _) = loaded(cnn.Augment(8, mean=0, std=1, brightness=0.9), 2, with_index=False)
    assert not torch.equal(first[1] / 30, second[1] / 150)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.augment = cnn.Augment(8, brightness=0.4, contrast=0.3, mixup_alpha=0.3, num_classes=3)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        x, labels = self.augment(x, labels, index=index)
        return self.conv(x).relu(), labels


@CPU
def test_a_compiled_model_with_it_in_front():
    """The graph breaks at it once, and what follows is one graph; nothing is compiled again for other indices."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    network = Network()
    compiled = torch.compile(network, backend=backend)
    given = batch(), torch.tensor([0, 2]), torch.tensor([0, 1])
    for n in range(3):
        given = (*given[:2], given[2] + n)
        for mine, theirs in zip(network(*given), compiled(*given), strict=True):
            assert torch.equal(mine, theirs)
    assert len(graphs) == 1
    network.eval()
    assert torch.equal(network(*given)[0], compiled(*given)[0])
    torch._dynamo.reset()


def test_options_as_words():
    words = ["brightness=0.4", "crop_scale=0.2,1", "crop_ratio = 3/4,4/3", "border=reflection", "dtype=bf16"]
    words += ["erasing_value=random", "mixup_alpha=none", "seed=3", "shear=(1,2,3,4)", "horizontal_flip_p=0"]
    options = cnn.augment_options(words)
    assert options == {
        "brightness": 0.4, "crop_scale": (0.2, 1), "crop_ratio": (3 / 4, 4 / 3), "border": "reflection",
        "dtype": "bf16", "erasing_value": "random", "mixup_alpha": None, "seed": 3, "shear": (1, 2, 3, 4),
        "horizontal_flip_p": 0,
    }  # fmt: skip
    assert cnn.Augment(8, **options).dtype == torch.bfloat16
    assert cnn.augment_options([]) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["brightnes=1"], "'brightnes' is no option of augmentation. Did you mean 'brightness'?"),
        (["hflip=1"], "Did you mean 'horizontal_flip_p'?"),
        (["xyz=1"], "'xyz' is no option of augmentation. There are crop_scale, crop_ratio, "),
        (["size=8"], "'size' is no option of augmentation"),
        (["brightness"], "an option of augmentation is NAME=VALUE, such as brightness=0.4, but got 'brightness'"),
        (["brightness=much"], "brightness must be a number from 0, or two numbers from 0"),
        (["brightness="], "brightness must be a number from 0, or two numbers from 0"),
        (["seed=1", "seed=2"], "the option seed of augmentation is given twice"),
        (["crop_ratio=1/0,1"], "crop_ratio must be two numbers above 0"),
        (["padding=1"], "padding must be None unless crop_scale=None is given"),
    ],
)
def test_words_that_are_no_options(words, message):
    with pytest.raises(ValueError, match=r"option|must be") as refused:
        cnn.augment_options(words)
    assert message in str(refused.value)
