"""`cnnfast doctor`: what this machine has and lacks for cnnfast, who serves what on it, and what to do next."""

from __future__ import annotations

import typer

from .console import JsonFile, printer, progress, refuse_unwritable, write_text

EXAMPLES = ("cnnfast doctor", "cnnfast doctor --json doctor.json")


def doctor(json_file: JsonFile = None) -> None:
    """Tell what this machine has for cnnfast, what is broken, who serves which call, and what to do next.

    Looks at versions, NVIDIA's driver, GPUs, a C compiler, and the folders of caches and tables. On a GPU another
    process launches small kernels and compares their results with the right ones, so that a hang or a crash is reported
    and ends only that process. Changes no setting, and writes nothing but Triton's own cache.

    Ends with exit code 1 only if something is broken: a driver that does not fit torch, a GPU that PyTorch or Triton
    cannot use, wrong numbers, a folder that cannot be written, a corrupt table. A machine without a GPU is not broken:
    PyTorch serves there.
    """
    refuse_unwritable(json_file)

    from ..diagnosing import diagnose

    with progress("asking for versions") as tell:
        diagnosis = diagnose(lambda text: tell(0, None, text))
    printer(json_file).print(diagnosis)
    write_text(json_file, diagnosis.to_json())
    raise typer.Exit(0 if diagnosis.ok else 1)
