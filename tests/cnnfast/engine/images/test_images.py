"""Which files are images, and what they are when they are read."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest

from cnnfast.engine.images import images
from cnnfast.engine.images.images import NO_PILLOW, UnreadableImage, find, look, read, to_mode

PIL = pytest.importorskip("PIL.Image")


def save(file: Path, size: tuple[int, int] = (4, 3), mode: str = "RGB", **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.new(mode, size).save(file, **options)
    return file


# ----------------------------------------------------------------------------------------------------------------------
# Finding


def test_folders_are_searched_by_name_and_files_are_taken_as_given(tmp_path):
    inside = [save(tmp_path / name) for name in ("a.png", "b.JPG", "deep/c.webp", "deep/deeper/a.bmp")]
    for name in (".hidden.png", "deep/.thumbnails/c.png"):
        save(tmp_path / name)
    for name in ("notes.txt", "data.h5", "drawing.eps", "README"):
        (tmp_path / "deep" / name).write_text("")
    found = find([tmp_path])
    assert found.files == inside
    assert found.others == {".txt": 1, ".h5": 1, ".eps": 1, "": 1}
    assert found.unreadable == {}
    assert found.hidden == [tmp_path / name for name in (".hidden.png", "deep/.thumbnails")]
    text = tmp_path / "deep" / "notes.txt"
    assert find([text, tmp_path / "deep"]).files == [text, *inside[2:]], "who names a file means it"
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*nothing"):
        find([tmp_path, tmp_path / "nothing"])


def test_links_are_followed_and_no_folder_is_visited_twice(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere / "x.png")
    here = tmp_path / "here"
    save(here / "a.png")
    (here / "link").symlink_to(elsewhere)
    (here / "loop").symlink_to(here)
    assert find([here]).files == [here / "a.png", here / "link" / "x.png"]


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    locked = tmp_path / "locked"
    locked.mkdir()
    look = os.scandir

    def scandir(folder):  # root may look into every folder
        if Path(folder) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return look(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find([tmp_path])
    assert found.files == [tmp_path / "a.png"]
    assert found.unreadable == {locked: "Permission denied"}


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(
    ("size", "at_least", "decoded"),
    [
        ((64, 48), 48, (64, 48)),
        ((64, 48), 25, (64, 48)),
        ((64, 48), 24, (32, 24)),
        ((64, 48), 7, (16, 12)),
        ((64, 48), 6, (8, 6)),
        ((64, 48), 1, (8, 6)),
        ((65, 50), 7, (17, 13)),
        ((64, 2), 1, (32, 1)),
        ((64, 1), 1, (64, 1)),
        ((64, 48), 1000, (64, 48)),
    ],
)
def test_as_few_pixels_of_a_jpeg_are_decoded_as_suffice(tmp_path, size, at_least, decoded):
    """Each is the mean of those that it stands for: a wave of one pixel is grey."""
    row = np.where(np.arange(size[0]) % 2, 255, 0).astype(np.uint8)
    file = tmp_path / "wave.jpg"
    PIL.fromarray(np.tile(row, (size[1], 1))).save(file, quality=100)
    image = read(file, at_least=at_least)
    assert image.size == decoded
    assert np.ptp(np.array(image)[:, : size[0] // 16]) < 8 or decoded == size
    png = save(tmp_path / "whole.png", size)
    assert read(png, at_least=at_least).size == size


def test_a_part_of_a_jpeg_stands_as_the_camera_was_held(tmp_path):
    exif = PIL.Exif()
    exif[0x0112] = 6
    file = save(tmp_path / "photo.jpg", (64, 48), exif=exif)
    assert read(file).size == (48, 64)
    assert read(file, at_least=24).size == (24, 32)


def test_a_look_reads_no_pixels(tmp_path):
    file = tmp_path / "truncated.jpg"
    whole = save(tmp_path / "whole.jpg", (64, 48)).read_bytes()
    file.write_bytes(whole[: whole.index(b"\xff\xda")])  # where the pixels begin
    assert look(file) == (64, 48)
    with pytest.raises(UnreadableImage):
        read(file)


def test_a_look_sees_that_pixels_have_no_white(tmp_path):
    PIL.fromarray(np.zeros((2, 3), np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(UnreadableImage, match=r"pixels of 32 bits .* do not tell what white is"):
        look(tmp_path / "depth.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_as_the_camera_was_held(tmp_path, orientation):
    """Two pixels of an image of 2 x 3, where they are after the camera's note was followed."""
    pixels = np.zeros((2, 3), np.uint8)
    pixels[0, 0], pixels[0, 2] = 100, 200
    turns = [
        pixels,
        pixels[:, ::-1],
        pixels[::-1, ::-1],
        pixels[::-1],
        pixels.T,
        np.rot90(pixels, -1),
        pixels[::-1, ::-1].T,
        np.rot90(pixels),
    ]
    exif = PIL.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.png"
    PIL.fromarray(pixels).save(file, exif=exif)
    assert np.array_equal(np.array(read(file)), turns[orientation - 1])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("note", [b"II*\0\xff\xff\xff\xff\0", b"no TIFF"])
def test_a_broken_note_of_the_camera_breaks_no_image(tmp_path, note):
    file = tmp_path / "photo.jpg"
    PIL.new("RGB", (4, 3), (9, 9, 9)).save(file, exif=b"Exif\0\0" + note)
    assert read(file).size == (4, 3)


@pytest.mark.parametrize("end", ["png", "tif"])
def test_white_of_16_bits_is_white(tmp_path, end):
    values = np.array([[0, 128, 129, 256, 257, 32767, 65407, 65535]], np.uint16)
    file = tmp_path / f"scan.{end}"
    PIL.fromarray(values).save(file)
    grey = to_mode(read(file), "L")
    assert np.array(grey).tolist() == [[0, 0, 1, 1, 1, 127, 255, 255]]
    assert np.array(to_mode(read(file), "RGB"))[0, :, 2].tolist() == [0, 0, 1, 1, 1, 127, 255, 255]
    as_32 = PIL.fromarray(values.astype(np.int32))  # as some versions of Pillow read such a file
    assert np.array(to_mode(as_32, "L")).tolist() == np.array(grey).tolist()


@pytest.mark.parametrize("pixel", [0.5, 65536, -1])
def test_pixels_without_a_white_are_refused(pixel):
    image = PIL.fromarray(np.full((2, 2), pixel, np.float32 if isinstance(pixel, float) else np.int32))
    with pytest.raises(UnreadableImage, match=r"pixels of 32 bits .* do not tell what white is"):
        to_mode(image, "RGB")


def broken(name: str, folder: Path) -> Path:
    """A file that is no image, or half of one."""
    file = folder / name
    jpeg = io.BytesIO()
    PIL.effect_noise((64, 64), 50).save(jpeg, "JPEG")
    png = io.BytesIO()
    PIL.effect_noise((64, 64), 50).save(png, "PNG")
    contents = {
        "empty.png": b"",
        "text.jpg": b"not an image",
        "truncated.jpg": jpeg.getvalue()[:700],
        "truncated.png": png.getvalue()[:700],
        "altered.png": png.getvalue()[:40] + b"\xff" * 9 + png.getvalue()[49:],
        "drawing.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "gone.png": None,
        "folder.png": None,
        "pipe.png": None,
    }
    if contents[name] is not None:
        file.write_bytes(contents[name])
    elif name == "folder.png":
        file.mkdir()
    elif name == "pipe.png":
        os.mkfifo(file)
    return file


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.png", "the file is empty"),
        ("text.jpg", "Pillow knows no image format like this"),
        ("truncated.jpg", "truncated"),
        ("truncated.png", "truncated"),
        ("altered.png", "."),
        ("drawing.png", "Pillow knows no image format like this"),
        ("gone.png", "No such file or directory"),
        ("folder.png", "it is no file, but a folder, a pipe or a device"),
        ("pipe.png", "it is no file, but a folder, a pipe or a device"),
    ],
)
def test_what_cannot_be_read_has_a_reason(tmp_path, name, reason):
    file = broken(name, tmp_path)
    with pytest.raises(UnreadableImage, match=reason):
        read(file)
    if reason not in ("truncated", "."):  # which the pixels show only
        with pytest.raises(UnreadableImage, match=reason):
            look(file)


def test_a_decompression_bomb_is_not_read(tmp_path, monkeypatch):
    file = save(tmp_path / "bomb.png", (30, 30))
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 400)
    for reads in (read, look):
        with pytest.raises(UnreadableImage, match="could be decompression bomb"):
            reads(file)


def test_without_pillow_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        images.pillow()
    assert str(missing.value) == NO_PILLOW
    assert 'pip install ".[images]"' in NO_PILLOW
