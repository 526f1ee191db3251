"""Kernels compiled from descriptions (aot/specialisations.py) by other processes (aot/worker.py), many at a time, into
Triton's cache on disk.
"""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from . import dispatch
from .children import start

if TYPE_CHECKING or dispatch.launch is not None:
    import fcntl

    from triton import knobs

    from cnnfast_kernels import devices
    from cnnfast_kernels.aot.processes import usable_cores
    from cnnfast_kernels.aot.stub_driver import require_compiled_kernels

WORKER = "cnnfast_kernels.aot.worker"
LOCK = "cnnfast-warming.lock"  # in Triton's cache folder
WAIT = 0.2  # seconds between two looks at a lock that another process holds
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Warming:
    """What compiling ahead has done. kernels: how many of the kernels are in Triton's cache now, also if they were
    there before. failures: a line for each kernel that could not be compiled. reason: why there was nothing to compile,
    or the empty string.
    """

    kernels: int = 0
    seconds: float = 0.0
    failures: tuple[str, ...] = ()
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        if self.reason:
            return f"nothing to compile: {self.reason}"
        failed = f", {len(self.failures)} could not be compiled" if self.failures else ""
        return f"{self.kernels} kernels compiled in {self.seconds:.1f} s{failed}"


class Compile(Protocol):
    """Compiles those of some descriptions that are not in Triton's cache yet. May be called again, and from several
    threads.
    """

    def __call__(self, lines: Iterable[str], progress: Progress | None = None) -> Warming: ...


def compile_ahead(
    lines: Iterable[str], gpu: devices.Gpu, *, jobs: int | None = None, progress: Progress | None = None
) -> Warming:
    """Compiles the kernels of descriptions for a GPU, which need not be there, by `jobs` processes (default: one for
    each core).

    progress: called with (kernels done, all kernels). Raises RuntimeError where kernels are interpreted.
    """
    with compiling(gpu, jobs) as compile_:
        return compile_(lines, progress)


@contextmanager
def compiling(gpu: devices.Gpu, jobs: int | None = None) -> Iterator[Compile]:
    """The context is a function that compiles for a GPU, by processes that are started when they are first needed, and
    end with the context. Raises RuntimeError where kernels are interpreted.
    """
    require_compiled_kernels()
    children = [_Child(f"sm_{gpu.arch}") for _ in range(jobs or usable_cores())]
    one_at_a_time = threading.Lock()

    def compile_(lines: Iterable[str], progress: Progress | None = None) -> Warming:
        began, work = time.perf_counter(), list(dict.fromkeys(lines))
        if not work:
            return Warming(reason="no kernel is to be launched")
        with one_at_a_time, _machine_lock():
            failures = _share(work, children[: len(work)], progress or (lambda done, total: None))
        return Warming(len(work) - len(failures), time.perf_counter() - began, tuple(failures))

    try:
        yield compile_
    finally:
        for child in children:
            child.end()


class _Child:
    """A process that compiles (aot/worker.py)."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.process: subprocess.Popen[str] | None = None
        self.said: IO[str] | None = None
        self.stopped = False
        self.starting = threading.Lock()

    def compiled(self, line: str) -> str | None:
        """Why a description cannot be compiled; None once it is. Raises OSError if the process cannot be started."""
        if not self._started():
            return "it was not begun, because compiling was stopped"
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        if told := self.process.stdout.readline():
            return json.loads(told)
        return self.end()

    def _started(self) -> bool:
        """Starts the process, unless there is one. False after stop()."""
        with self.starting:  # so that stop() sees every process, also one that a thread is about to start
            if self.stopped:
                return False
            if self.process is None:
                self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
                libcuda = knobs.nvidia.libcuda_path
                environment = {"TRITON_CACHE_DIR": knobs.cache.dir}
                if libcuda:
                    environment["TRITON_LIBCUDA_PATH"] = libcuda
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
                self.process = start(WORKER, self.arch, environment=environment, **pipes)
            return True

    def stop(self) -> None:
        """Ends the process at once, from any thread, and starts no other until resume(). A thread that waits for its
        answer learns that it has ended.
        """
        with self.starting:
            self.stopped = True
            if self.process is not None:
                self.process.kill()

    def resume(self) -> None:
        """Allows a process to be started again."""
        self.stopped = False

    def end(self) -> str:
        """Ends the process, if there is one, and forgets it. Returns how it ended, and the last that it printed."""
        if self.process is None or self.said is None:
            return ""
        self.process.kill()
        code = self.process.wait()
        self.said.seek(0)
        last = self.said.read().strip().splitlines()[-1:]
        for stream in (self.process.stdin, self.process.stdout, self.said):
            with suppress(BrokenPipeError):  # closing first writes what is still in the buffer
                stream.close()  # type: ignore[union-attr]
        self.process = self.said = None
        return " ".join([f"the process that compiles ended with {code}", *last])


def _share(work: list[str], children: list[_Child], progress: Progress) -> list[str]:
    """Hands each item to the next child that is free, and returns the failures."""
    free: queue.SimpleQueue[_Child] = queue.SimpleQueue()
    for child in children:
        child.resume()
        free.put(child)

    def failure(line: str) -> str | None:
        child = free.get()
        try:
            told = child.compiled(line)
        finally:
            free.put(child)
        return told and f"{json.loads(line)['kernel'].rpartition(':')[2]}: {told}"

    progress(0, len(work))
    with ThreadPoolExecutor(len(children)) as pool:
        futures = [pool.submit(failure, line) for line in work]
        try:
            for done, _ in enumerate(as_completed(futures), 1):
                progress(done, len(work))
        except BaseException:  # an interrupt, mostly: it does not wait for what is being compiled
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.stop()
            raise
    return [told for future in futures if (told := future.result()) is not None]


@contextmanager
def _machine_lock() -> Iterator[None]:
    """A lock that one process holds of all that share Triton's cache folder. It is released when that process ends,
    however it does.
    """
    folder = Path(knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(WAIT)
        yield
