"""A CSV of files and labels: how it may be written, which labels its classes are, and which line is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cnnfast.training.samples import ImageSet, open_images
from tests.support.labelled_images import save_noise

pytest.importorskip("PIL")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c d.png", "deep/e.png", "f,g.png"):
        save_noise(tmp_path / name)
    return tmp_path


def opened(folder: Path, text: str | bytes, name: str = "list.csv", **options) -> ImageSet:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_images(folder / name, 8, **options)


def listed(images: ImageSet, folder: Path) -> list[tuple[str, str]]:
    names = [str(Path(images.name(i)).relative_to(folder)) for i in range(len(images))]
    return [(name, images.classes[label]) for name, label in zip(names, images.labels.tolist(), strict=True)]


PLAIN = "file,label\na.png,dog\nb.png,cat\nc d.png,dog\n"
SAME = {
    "plain": PLAIN,
    "no end of the last line": PLAIN.rstrip(),
    "lines of Windows": PLAIN.replace("\n", "\r\n"),
    "the mark of UTF-8": "\ufeff" + PLAIN,
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "quoted": 'file,label\n"a.png","dog"\n"b.png",cat\n"c d.png",dog\n',
    "another order": "label,file\ndog,a.png\ncat,b.png\ndog,c d.png\n",
    "more columns": "id,file,split,label\n1,a.png,x,dog\n2,b.png,,cat\n3,c d.png,,dog\n",
    "spaces": "file, label \n a.png , dog\nb.png, cat\nc d.png,dog \n",
    "empty lines": "\nfile,label\n\na.png,dog\n,\nb.png,cat\nc d.png,dog\n\n\n",
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_ways_to_write_the_same(folder, text):
    images = opened(folder, text)
    assert listed(images, folder) == [("a.png", "dog"), ("b.png", "cat"), ("c d.png", "dog")]
    assert images.classes == ("cat", "dog")


def test_files_are_relative_to_the_csv_or_absolute(folder, monkeypatch):
    monkeypatch.chdir("/")
    text = f'file,label\ndeep/e.png,1\n{folder / "a.png"},2\n"f,g.png",1\n./deep/../b.png,2\n'
    images = opened(folder, text, "list.TSV")
    assert [Path(images.name(i)).resolve().relative_to(folder).as_posix() for i in range(4)] == [
        "deep/e.png",
        "a.png",
        "f,g.png",
        "b.png",
    ]
    assert images[1].image.shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        (("10", "9", "10"), ("9", "10")),
        (("-1", "0", "3"), ("-1", "0", "3")),
        (("10", "9", "x"), ("10", "9", "x")),
        (("010", "9", "9"), ("010", "9")),
        (("1.0", "2", "11"), ("1.0", "11", "2")),
        (("b", "B", "ä"), ("B", "b", "ä")),
    ],
)
def test_classes_are_in_the_order_of_numbers_or_of_names(folder, given, classes):
    rows = zip(("a.png", "b.png", "c d.png"), given, strict=True)
    images = opened(folder, "file,label\n" + "".join(f"{file},{label}\n" for file, label in rows))
    assert images.classes == classes
    assert tuple(label for _, label in listed(images, folder)) == given


@pytest.mark.parametrize(
    ("given", "classes", "labels"),
    [
        (("dog", "cat", "dog"), ("cat", "fish", "dog"), [2, 0, 2]),
        (("2", "0", "2"), ("cat", "fish", "dog"), [2, 0, 2]),
        (("1", "3", "1"), ("1", "2", "3"), [0, 2, 0]),  # names, though they are numbers
        (("0", "1", "1"), ("1", "2", "3"), [0, 1, 1]),  # 0 is no name
        (("dog", "dog", "dog"), ("cat", "dog"), [1, 1, 1]),
    ],
)
def test_known_classes_keep_their_labels(folder, given, classes, labels):
    rows = zip(("a.png", "b.png", "c d.png"), given, strict=True)
    images = opened(folder, "file,label\n" + "".join(f"{f},{label}\n" for f, label in rows), classes=classes)
    assert images.classes == classes
    assert images.labels.tolist() == labels


def test_files_that_come_twice_are_told(folder):
    images = opened(folder, "file,label\na.png,x\nb.png,y\na.png,x\nb.png,x\na.png,x\n")
    assert len(images) == 5
    assert images.notes == (
        "3 lines name a file that a line before has named: training and validation may both see it",
        "1 file has labels of several classes",
        "1 class has a single image, which is not held out for validation: 'y'",
    )


WRONG = {
    "nothing in it": ("", "{csv} is empty: it needs a header with the columns file and label"),
    "only empty lines": ("\n \n", "{csv} is empty: it needs a header with the columns file and label"),
    "only a header": ("file,label\n", "{csv} lists no images: there is no line below its header"),
    "no header": (
        "a.png,cat\nb.png,dog\n",
        "{csv}, line 1: the header must have one column 'file' and one 'label', but has 'a.png', 'cat'",
    ),
    "other columns": (
        "path,class,x,y,z\n",
        "{csv}, line 1: the header must have one column 'file' and one 'label', but has 'path', 'class', 'x' and 2 "
        "more",
    ),
    "a column twice": (
        "file,label,label\na.png,1,2\n",
        "{csv}, line 1: the header must have one column 'file' and one 'label', but has 'file', 'label', 'label'",
    ),
    "a column too few": ("file,label\na.png,x\nb.png\n", "{csv}, line 3: the header has 2 columns, and this line 1"),
    "a column too many": ("file,label\nf,g.png,x\n", "{csv}, line 2: the header has 2 columns, and this line 3"),
    "no file": ("file,label\na.png,x\n ,y\n", "{csv}, line 3: the column 'file' is empty"),
    "no label": ("file,label\na.png,x\nb.png,\n", "{csv}, line 3: the column 'label' is empty"),
    "one class": (
        "file,label\na.png,x\nb.png,x\n",
        "{csv} has the class 'x' only, and a network learns to tell two or more apart",
    ),
    "a missing file": ("file,label\na.png,x\n\ngone.png,y\n", "{csv}, line 4: there is no file {folder}/gone.png"),
    "missing files": (
        "file,label\ngone.png,x\na.png,x\ndeep,y\nlost.png,y\n",
        "{csv}, line 2: there is no file {folder}/gone.png; 2 more lines name files that are not there",
    ),
    "an open quote": ('file,label\na.png,x\n"b.png,y\n', "{csv}, line 3: unexpected end of data"),
    "a zero byte": ("file,label\na\0.png,x\nb.png,y\n", "{csv}, line 2: there is no file {folder}/a\0.png"),
    "no text": (b"file,label\n\xff\xfe,x\n", "{csv} is no text in UTF-8"),
}


@pytest.mark.parametrize(("text", "says"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_with_its_line(folder, text, says):
    expected = says.format(csv=folder / "list.csv", folder=folder)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        opened(folder, text)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (("cat", "bird", "cow"), "line 3 has the class 'bird', and the 2 known ones are 'cat', 'dog'"),
        (("1", "2", "3"), "line 3: the label 2 is none of 0 to 1"),
        (("1", "0", "-1"), "line 4: the label -1 is none of 0 to 1"),
    ],
)
def test_more_classes_than_are_known(folder, labels, says):
    rows = zip(("a.png", "b.png", "c d.png"), labels, strict=True)
    with pytest.raises(ValueError, match=f"list.csv, {says}"):
        opened(folder, "file,label\n" + "".join(f"{f},{label}\n" for f, label in rows), classes=("cat", "dog"))
