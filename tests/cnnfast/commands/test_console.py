"""What commands share: files that are whole at any moment, and interrupts."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
import typer

from cnnfast.commands import console, options
from cnnfast.commands.console import Terminated, exit_code, interruptible, refuse_no_time, refuse_unwritable, write_text


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """Who was reading it goes on reading what it held; who is interrupted while writing leaves that."""
    file = tmp_path / "rows.json"
    write_text(file, "old")
    with file.open() as reader:
        write_text(file, "new")
        assert reader.read() == "old\n"
    assert file.read_text() == "new\n"
    whole = Path.write_text

    def interrupted(self, text):
        whole(self, text[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(file, "newer")
    assert file.read_text() == "new\n"
    assert list(tmp_path.iterdir()) == [file]


def test_a_new_file_may_be_read_by_whoever_may_read_any_other(tmp_path):
    write_text(tmp_path / "rows.json", "text")
    (tmp_path / "other").write_text("text")
    assert (tmp_path / "rows.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_is_no_file_is_written_into(tmp_path):
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "text")
    reader.join(10)
    assert read == ["text\n"]
    assert pipe.is_fifo()
    target.write_text("")
    link.symlink_to(target)
    write_text(link, "text")
    assert link.is_symlink()
    assert target.read_text() == "text\n"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, Terminated])
def test_interrupts_have_the_exit_codes_of_their_signals(interrupt):
    number = signal.SIGTERM if interrupt is Terminated else signal.SIGINT
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught, interruptible():
        signal.raise_signal(number)
    assert type(caught.value) is interrupt
    assert exit_code(caught.value) == 128 + number
    assert signal.getsignal(signal.SIGTERM) == before


def test_only_the_main_thread_sets_handlers():
    before, passed = signal.getsignal(signal.SIGTERM), []

    def work():
        with interruptible():
            passed.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert passed == [before]


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_no_time_is_refused(budget):
    with pytest.raises(typer.BadParameter, match="leaves no time: write seconds above 0"):
        refuse_no_time(budget)
    refuse_no_time(None)
    refuse_no_time(0.5)


@pytest.mark.parametrize(
    ("read", "text", "option", "says"),
    [
        (options.module_of, "resnet5O", "MODEL", "'resnet5O' is no model of"),
        (options.target_of, "nothing.py:Net", "MODEL", "there is no file nothing.py"),
        (options.sizes_of, ["1x3x32x32", "3x"], "--input", "'3x' is no shape"),
        (options.shape_for, torch.nn.ReLU(), "--input", "ReLU has no layer with a weight"),
        (options.dtype_named, "int8", "--dtype", "'int8' is none of bf16"),
        (options.modes_of, "infer,eval", "--mode", "'eval' is neither infer nor train"),
    ],
)
def test_what_the_library_refuses_ends_a_command_with_2_and_names_the_option(read, text, option, says):
    with pytest.raises(typer.BadParameter, match=re.escape(says)) as raised:
        read(text)
    assert (raised.value.param_hint, raised.value.exit_code) == (option, 2)


def test_modes_are_named_once():
    assert options.modes_of("train,infer,train") == ("train", "infer")
    assert options.modes_of("") == ()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="there is no folder"):
        refuse_unwritable(tmp_path / "no" / "file", "--pictures")
    for fine in (None, console.STANDARD_OUTPUT, tmp_path / "file"):
        refuse_unwritable(fine)
