from __future__ import annotations

import time

import pytest

from cnnfast.engine.planning.conditions import LONGEST, check, fixed_size, parsed, translated, violated

SHAPES = ((2, 3, 5, 7), (2, 11))

HOLD = [
    "size(0, 2) >= 3",
    "size(0, 0) == size(1, 0)",
    "size(0, 2) + 2 * size(0, 3) - 1 == 18",
    "(size(0, 3) - 1) // 2 + 1 == 4",
    "-1 // 2 == -1",
    "size(0, 3) % 4 == 3 and size(0, 2) % 4 == 1",
    "size(0, 2) > 100 or size(0, 3) < 100",
    "not size(0, 2) == 6",
    "1 < size(0, 0) <= 2",
    "max(1, size(0, 2), 9) == 9 and min(size(0, 2), size(0, 3)) == 5 and abs(-4) == 4",
    "size(1, 1) != 12",
]


@pytest.mark.parametrize("condition", HOLD)
def test_what_holds_and_its_opposite(condition):
    assert violated([condition], SHAPES) == ""
    assert violated([f"not ({condition})"], SHAPES) != ""


def test_the_sentence_names_the_first_that_does_not_hold():
    conditions = ["size(0, 2) >= 3", "size(0, 2) >= 6", "size(0, 2) >= 7"]
    assert violated(conditions, SHAPES) == ("inputs of the shapes (2, 3, 5, 7), (2, 11) do not satisfy size(0, 2) >= 6")


@pytest.mark.parametrize(
    "condition",
    [
        "__import__('os').system('true')",
        "().__class__",
        "size(0, 2) ** 9 > 1",
        "size(0, 2) / 2 > 1",
        "size(0, 2) << 60 > 1",
        "size(0, 2) > 1.5",
        "size(0, 2) > True",
        "'a' * 9 == 1",
        "[size(0, 2)]",
        "lambda: 1",
        "size(0, -1) > 1",
        "size(0, size(0, 0)) > 1",
        "size(0) > 1",
        "size(0, 2, 1) > 1",
        "size(0, 'a') > 1",
        "size(a=0, b=1) > 1",
        "max(1) > 0",
        "max(*(1, 2)) > 0",
        "sum(1, 2) > 0",
        "size > 1",
        "x > 1",
        "(y := 3) > 1",
        "1 in 2",
        "~3 > 1",
        "99999999999999999999 > 1",
        "size(0, 2) >",
        "1 > 0; 1 > 0",
        "",
        "(" * 300 + "1" + ")" * 300,
        "-" * 5000 + "1 > 0",
        "1" + " + 1" * LONGEST + " > 0",
        "1" + " + 1" * 200 + " > 0",
        "1 > 0\x00",
    ],
)
def test_what_is_not_understood(condition):
    began = time.monotonic()
    with pytest.raises(ValueError, match="condition"):
        parsed(condition)
    assert time.monotonic() - began < 1


def test_numbers_stay_small():
    huge = " * ".join(["size(0, 0)"] * 60) + " > 0"
    with pytest.raises(ValueError, match="beyond 2"):
        violated([huge], ((2**40,),))


def test_zero_divides_nothing():
    with pytest.raises(ValueError, match="divides by zero"):
        violated(["4 // (size(0, 0) - 2) > 0"], SHAPES)


def test_sizes_that_no_input_has():
    check("size(1, 1) > 0", [4, 2])
    for condition in ("size(1, 2) > 0", "size(2, 0) > 0", "1 > 0 or size(9, 9) > 0"):
        with pytest.raises(ValueError, match="which no input has"):
            check(condition, [4, 2])
        if "or" not in condition:
            with pytest.raises(ValueError, match="which no input has"):
                violated([condition], SHAPES)


def test_translation():
    names = {"s53": "size(0, 2)", "s0": "size(1, 3)"}
    assert translated("(-2) + 2*(s53 // 2) < s0", names) == "-2 + 2 * (size(0, 2) // 2) < size(1, 3)"
    assert translated("s53**2 >= 9", names) == "size(0, 2) * size(0, 2) >= 9"
    for text in ("s53**9 >= 9", "s1 > 3", "s53 / 2 > 1", "math.ceil(s53) > 1"):
        with pytest.raises(ValueError, match="condition"):
            translated(text, names)


def test_sizes_that_a_condition_fixes():
    assert fixed_size("size(0, 2) == 224") == (0, 2, 224)
    for condition in ("size(0, 2) >= 224", "size(0, 2) == size(0, 3)", "size(0, 2) + 1 == 2", "2 <= size(0, 2) == 224"):
        assert fixed_size(condition) is None
