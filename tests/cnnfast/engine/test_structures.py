from __future__ import annotations

import json
import math
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cnnfast.engine.structures import DEEPEST, Structure


class Boxes(NamedTuple):
    where: Tensor
    scores: Tensor


Pair = namedtuple("Pair", "left right")


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


class Refusing(dict):
    """Cannot be made of a dict."""

    def __init__(self) -> None:
        super().__init__(x=torch.ones(1))


def leaves(count: int) -> list[Tensor]:
    return [torch.tensor(float(i)) for i in range(count)]


A, B, C = leaves(3)
TREES = {
    "a tensor": A,
    "tuples and lists": (A, [B, (C,)], ()),
    "a dict in its order": {"b": A, "a": B},
    "constants": (A, None, True, 3, 2.5, "word"),
    "an OrderedDict": OrderedDict(out=A, aux=B),
    "a NamedTuple": Boxes(A, B),
    "a namedtuple in a dict": {"x": Pair(A, [B])},
    "a dataclass": Output(A, (B, C)),
    "nothing": None,
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one is other
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Output):
        return same(vars(one), vars(other))
    return one == other


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_a_tree_is_built_again(tree):
    flat, structure = Structure.flatten(tree)
    assert same(structure.build(flat), tree)
    assert structure.count == len(flat)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_a_file_keeps_all_but_the_class(tree):
    flat, structure = Structure.flatten(tree)
    loaded = Structure.from_json(json.loads(json.dumps(structure.to_json(), allow_nan=False)))
    assert loaded == structure
    assert str(loaded) == str(structure)
    again = Structure.flatten(loaded.build(flat))
    assert again[1] == structure
    assert all(map(same, again[0], flat))


def test_what_a_file_builds_is_plain():
    flat, structure = Structure.flatten((OrderedDict(a=A), Boxes(B, C)))
    plain = Structure.from_json(structure.to_json()).build(flat)
    assert [type(part) for part in plain] == [dict, tuple]


def test_the_classes_of_transformers_come_back():
    from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

    tree = ImageClassifierOutputWithNoAttention(logits=A, hidden_states=(B, C))
    flat, structure = Structure.flatten(tree)
    built = structure.build(flat)
    assert type(built) is type(tree)
    assert built.logits is A
    assert built.hidden_states == (B, C)
    assert built.loss is None


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_has_not(number):
    structure = Structure.flatten((A, number))[1]
    loaded = Structure.from_json(json.loads(json.dumps(structure.to_json(), allow_nan=False)))
    assert repr(loaded.parts[1].value) == repr(number)


def test_how_it_reads():
    structure = Structure.flatten((A, {"mask": [B, None]}, (C,), "word"))[1]
    assert str(structure) == """(tensor, {"mask": [tensor, None]}, (tensor,), 'word')"""


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({1: A}, "the keys of a dict of tensors must be str, but one is 1"),
        ((A, object()), "an object of class builtins.object is neither a tensor nor"),
        ((A, torch.float32), "an object of class torch.dtype is neither"),
        (defaultdict(list, x=A), "collections.defaultdict cannot be built again from its parts"),
        (Refusing(), "Refusing cannot be built again from its parts"),
    ],
    ids=["a key", "an object", "a dtype", "a defaultdict", "a class of its own"],
)
def test_what_has_no_structure(tree, words):
    with pytest.raises(ValueError, match=words):
        Structure.flatten(tree)


def test_a_list_in_itself():
    tree: list[Any] = [A]
    tree.append(tree)
    with pytest.raises(ValueError, match=f"deeper than {DEEPEST}"):
        Structure.flatten(tree)


def test_too_few_and_too_many():
    structure = Structure.flatten((A, B))[1]
    for count in (1, 3):
        with pytest.raises(ValueError, match=rf"\(tensor, tensor\) takes 2 tensors, but there are {count}"):
            structure.build(leaves(count))


def nested(depth: int) -> Any:
    data: Any = {"kind": "tensor"}
    for _ in range(depth):
        data = {"kind": "list", "parts": [data]}
    return data


DAMAGED = {
    "nothing": None,
    "a list": [],
    "no kind": {},
    "a kind that is none": {"kind": "set", "parts": []},
    "a kind that is a list": {"kind": []},
    "a tensor with parts": {"kind": "tensor", "parts": []},
    "a tuple without parts": {"kind": "tuple"},
    "parts that are none": {"kind": "tuple", "parts": 3},
    "a tuple with keys": {"kind": "tuple", "parts": [], "keys": []},
    "a class": {"kind": "tuple", "parts": [], "cls": "os.system"},
    "a dict without keys": {"kind": "dict", "parts": [{"kind": "tensor"}]},
    "too few keys": {"kind": "dict", "parts": [{"kind": "tensor"}], "keys": []},
    "a key twice": {"kind": "dict", "parts": [{"kind": "tensor"}] * 2, "keys": ["a", "a"]},
    "a key that is a number": {"kind": "dict", "parts": [{"kind": "tensor"}], "keys": [1]},
    "a constant that is a list": {"kind": "constant", "value": [1]},
    "a constant without value": {"kind": "constant"},
    "a float that is a word": {"kind": "constant", "value": {"float": "1e400000"}},
    "too deep": nested(DEEPEST + 1),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_what_no_file_of_ours_holds(data):
    with pytest.raises(ValueError, match="a structure of arguments or results is damaged"):
        Structure.from_json(data)


def test_as_deep_as_a_file_may_be():
    assert Structure.from_json(nested(DEEPEST)).count == 1
