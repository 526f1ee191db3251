"""libcuda.c: the libcuda.so.1 that runs nothing, built, loaded, and its records as C has them."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime.cache import get_cache_manager

SOURCE = Path(__file__).with_name("libcuda.c")
NAME = "libcuda.so.1"
NO_LOAD = 4  # dlopen's RTLD_NOLOAD, which Python does not name


class LaunchStruct(ctypes.Structure):
    """A launch, as libcuda.c keeps it."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("function", "stream")),
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block")),
        *((name, ctypes.c_uint32) for name in ("shared_bytes", "attributes")),
        *((name, ctypes.c_uint64) for name in ("start", "parameter_bytes", "attribute_bytes")),
    ]


class EncodeStruct(ctypes.Structure):
    """A tensor map, as libcuda.c keeps it."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        *((name, ctypes.c_uint64 * 5) for name in ("dims", "strides")),
        *((name, ctypes.c_uint32 * 5) for name in ("box", "element_strides")),
        *(
            (name, ctypes.c_uint32)
            for name in ("rank", "type", "element_bytes", "interleave", "swizzle", "promotion", "fill")
        ),
        ("refusal", ctypes.c_char * 160),
    ]


def build() -> Path:
    """The library, compiled against Triton's own cuda.h; it is kept in Triton's cache. Raises RuntimeError without a C
    compiler.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("the recording driver is compiled by a C compiler, and there is none: install gcc or clang")
    include = Path(nvidia.__file__).with_name("include")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / NAME
        command = [
            compiler,
            "-std=c11",
            "-O2",
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{NAME}",
            f"-I{include}",
            str(SOURCE),
            "-o",
            str(made),
        ]
        key = hashlib.sha256(SOURCE.read_bytes() + (include / "cuda.h").read_bytes()).hexdigest()
        cache = get_cache_manager(key)
        found = cache.get_file(NAME)
        if found is None:
            subprocess.run([*command, "-lpthread"], check=True)
            found = cache.put(made.read_bytes(), NAME)
    return Path(found)


_library: Any = None


def load() -> Any:
    """The library in this process. The dynamic linker knows it by its name from then on, and gives it to all of
    Triton's modules.
    """
    global _library
    if _library is None:
        try:
            ctypes.CDLL(NAME, mode=NO_LOAD)
        except OSError:
            pass
        else:
            raise RuntimeError(f"another {NAME} is loaded in this process: record launches in a process of its own")
        path = build()
        knobs.nvidia.libcuda_path = str(path.parent)
        nvidia.libcuda_dirs.cache_clear()
        nvidia.library_dirs.cache_clear()
        _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name in ("launches", "encodes", "bytes"):
            getattr(_library, f"recorder_{name}").restype = ctypes.c_uint64
        _library.recorder_expect.argtypes = [ctypes.c_uint64, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint32)]
    return _library
