"""Whether Triton can launch is asked once and never under capture, and what it lacks is named."""

from __future__ import annotations

import subprocess
import sysconfig

import pytest
import torch

from cnnfast_kernels import launch, launchable
from tests.support.child import run_compiled


def ask(compiler):
    """The answers of several threads at once, and how often Triton made its driver and a launcher for them; first while
    a capture is pretended.

    All of it is Triton's own code, over a libcuda that records. It finds nothing in its cache, and compiles by
    `compiler`, by the machine's if that is None, and without any on the path if it is "".
    """
    import os
    import tempfile
    import warnings
    from concurrent.futures import ThreadPoolExecutor
    from dataclasses import replace
    from unittest.mock import patch

    import torch
    import triton
    from triton.backends import backends

    from cnnfast_kernels.aot.recording_driver import RecordingDriver, recording_driver
    from cnnfast_kernels.launchable import why_no_launch

    with recording_driver():
        pass  # the library is there from now on
    if compiler == "":
        os.environ.pop("CC", None)
        os.environ["PATH"] = ""
    elif compiler:
        os.environ["CC"] = compiler
    made = []

    class Driver(RecordingDriver):
        """As Triton makes its own driver when it is first asked for: without arguments."""

        is_active = staticmethod(lambda: True)

        def __init__(self):
            made.append("driver")
            super().__init__(90, 0, True)

        def make_launcher(self, source, metadata):
            made.append(f"launcher of {metadata.name}")
            return super().make_launcher(source, metadata)

    def answer(_=None):
        return why_no_launch(torch.device("cpu"))

    warnings.simplefilter("error")  # Triton's own, which the user of a library shall not see
    with (
        tempfile.TemporaryDirectory() as triton.knobs.cache.dir,
        patch.dict(backends, {"nvidia": replace(backends["nvidia"], driver=Driver)}, clear=True),
        ThreadPoolExecutor(4) as pool,
    ):
        with patch.multiple(torch.cuda, is_initialized=lambda: True, is_current_stream_capturing=lambda: True):
            captured = [answer(), len(made)]
        answers = list(pool.map(answer, range(8)))
    launched = len(triton.runtime.driver.active.taken()[0]) if "launcher of smallest" in made else 0
    return {"captured": captured, "answers": sorted(set(answers)), "made": made, "launched": launched}


@pytest.mark.compiled
def test_asked_once_and_not_under_capture():
    assert run_compiled(ask, None) == {
        "captured": ["", 0],
        "answers": [""],
        "made": ["driver", "launcher of smallest"],
        "launched": 0,
    }


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("/bin/false", "the C compiler /bin/false ended with 1"),
        ("/no/such/compiler", "No such file or directory: /no/such/compiler"),
        ("", "it finds no C compiler"),
    ],
)
def test_a_compiler_that_fails_is_named(compiler, says):
    said = run_compiled(ask, compiler)
    assert said["captured"] == ["", 0]
    assert said["made"] == ["driver"]  # a failure is an answer too: not asked again
    (answer,) = said["answers"]
    assert answer.startswith("Triton cannot launch kernels here: ")
    assert says in answer
    assert "install a C compiler (gcc or clang) or name one in CC" in answer


@pytest.mark.compiled
def test_without_a_driver_there_is_a_reason():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU and its driver: nothing is missing")
    answer = run_compiled(
        """
        import json, torch
        from cnnfast_kernels.launchable import why_no_launch
        print(json.dumps(why_no_launch(torch.device("cpu"))))
        """
    )
    assert answer.startswith("Triton cannot launch kernels here: ")
    assert "driver" in answer


def test_what_is_interpreted_needs_no_launcher():
    if not launch.INTERPRETED:
        pytest.skip("GPU ring: kernels are not interpreted")
    assert launchable.why_no_launch(torch.device("cpu")) == ""


NO_LIBCUDA = 'libcuda.so cannot found!\nPlease make sure GPU is set up and then run "/sbin/ldconfig"'


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "gcc or clang"),
        (AssertionError(NO_LIBCUDA), "install NVIDIA's driver"),
        (FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig"), "TRITON_LIBCUDA_PATH"),
        (subprocess.CalledProcessError(1, ["/sbin/ldconfig", "-p"]), "install NVIDIA's driver"),
        (ImportError("libcuda.so.1: cannot open shared object file"), "install NVIDIA's driver"),
        (PermissionError(13, "Permission denied", "/elsewhere/.triton"), "name a folder in TRITON_CACHE_DIR"),
        (RuntimeError("0 active drivers ([]).\nOne is needed."), "RuntimeError: 0 active drivers ([]). One is needed."),
    ],
)
def test_every_reason_is_one_line_that_says_what_to_do(error, says):
    said = launchable.reason(error)
    assert says in said
    assert "\n" not in said


def test_headers_that_are_missing_are_named(monkeypatch, tmp_path):
    failure = subprocess.CalledProcessError(1, ["gcc", "main.c", "-l:libcuda.so.1"])
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    assert "the C compiler gcc ended with 1" in launchable.reason(failure)
    (tmp_path / "Python.h").unlink()
    assert f"no Python.h in {tmp_path}" in launchable.reason(failure)
    assert "python3-dev" in launchable.reason(failure)
