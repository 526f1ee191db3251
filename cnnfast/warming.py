"""Kernels are compiled before they are needed, many at a time.

Triton compiles a kernel when it is first launched, one after the other: the first training step of a ResNet-50 waits
for more than a hundred. Which kernels a call will launch follows from shapes, strides and dtypes. So the model is run
once without launching anything (calls.py). Of each launch all that Triton compiles by is written down
(aot/specialisations.py). And other processes compile the kernels into Triton's cache on disk (aot/worker.py), where
this process and every later one finds them.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import dispatch
from .children import start
from .spelling import keywords_explained

# Without triton `warm` says that PyTorch serves every call, and nothing else here is used.
if TYPE_CHECKING or dispatch.launch is not None:
    import fcntl

    from triton import knobs

    from cnnfast_kernels import devices, launch
    from cnnfast_kernels.aot.processes import usable_cores
    from cnnfast_kernels.aot.specialisations import described
    from cnnfast_kernels.aot.stub_driver import require_compiled_kernels

    from . import calls

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


@keywords_explained
def warm(model: nn.Module, *example_inputs: Any, train: bool = False) -> Warming:
    """Compiles beforehand, in other processes, every kernel that `model(*example_inputs)` would launch.

    model: as `cnnfast.convert` made it; any other is treated as convert would make it. example_inputs: with the shapes,
    dtypes and layouts of the real ones; other batch sizes mostly need the same kernels. train: with gradients, and the
    backward pass too. Settings that are in force count: torch.autocast, cnnfast.backend, TF32, and the tables of
    measured tiles.

    Parameters, buffers, gradients and random numbers stay as they are. A model that branches on the values of tensors,
    and any model under autocast, is copied and run once by PyTorch. On one machine, one call at a time compiles: others
    wait for it, and then find what it has compiled. On a terminal a bar shows how far it is.

    Returns a Warming: str() is a line; .ok is False if a kernel could not be compiled, which a warning says as well.
    Where PyTorch serves every call there is nothing to compile, and .reason says why. Raises RuntimeError if the model
    does not run on these inputs.
    """
    tensors = [
        t for t in (*model.parameters(), *model.buffers(), *tree_leaves(example_inputs)) if isinstance(t, Tensor)
    ]
    if not tensors:
        return Warming(reason="neither the model nor its inputs hold a tensor")
    x = next((t for t in tensors if t.is_floating_point()), tensors[0])
    if reason := dispatch.why_torch(x.detach()):
        return Warming(reason=f"PyTorch serves every call, because {reason}")
    if launch.INTERPRETED:
        return Warming(reason="Triton interprets kernels in this process, and compiles none")
    gpu = devices.gpu(x.device)
    lines = launches(model, *example_inputs, train=train, gpu=gpu, device_type=x.device.type)
    with _bar() as progress:
        done = compile_ahead(lines, gpu, progress=progress)
    if not done.ok:
        text = f"{len(done.failures)} of {len(lines)} kernels could not be compiled: calls that need them will raise"
        warnings.warn(f"{text}: {done.failures[0]}", RuntimeWarning, stacklevel=3)  # keywords_explained is between
    return done


def launches(
    model: nn.Module,
    *example_inputs: Any,
    train: bool = False,
    gpu: devices.Gpu | None = None,
    device_type: str = "cuda",
) -> list[str]:
    """Descriptions (aot/specialisations.py) of the kernels that a call would launch on a GPU, each once. Nothing is
    compiled.

    Arguments and RuntimeError are as `warm` has them. gpu: by default the one that the model is on; another one need
    not be there. device_type: that of its tensors; tests take those of a CPU for a GPU's.
    """
    if gpu is None:
        gpu = devices.gpu(
            next(t.device for t in (*model.parameters(), *tree_leaves(example_inputs)) if isinstance(t, Tensor))
        )
    found = calls.operator_calls(model, example_inputs, train=train, gpu=gpu, device_type=device_type)
    with recorded(gpu, device_type) as lines:
        for call in found:
            calls.replay(call)
    return list(lines)


@contextmanager
def recorded(gpu: devices.Gpu, device_type: str = "cuda") -> Iterator[dict[str, None]]:
    """Meanwhile this thread launches nothing, and calls of cnnfast_kernels' functions on meta tensors, which stand for
    tensors on `gpu`, are written down: the context's dictionary has their descriptions as its keys, in order.
    """
    found: dict[str, None] = {}

    def note(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: Any) -> None:
        found[described(kernel, arguments, options)] = None

    with calls.standing_for(gpu, device_type), launch.substituted(note):
        yield found


# ----------------------------------------------------------------------------------------------------------------------
# Compilation


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

    def compiled(self, line: str) -> str | None:
        """Why a description cannot be compiled; None once it is. Raises OSError if the process cannot be started."""
        if self.process is None:
            self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
            libcuda = knobs.nvidia.libcuda_path
            environment = {"TRITON_CACHE_DIR": knobs.cache.dir} | ({"TRITON_LIBCUDA_PATH": libcuda} if libcuda else {})
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
            self.process = start(WORKER, self.arch, environment=environment, **pipes)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        if told := self.process.stdout.readline():
            return json.loads(told)
        return self.end()

    def kill(self) -> None:
        """Ends the process at once, from any thread. A thread that waits for its answer learns that it has ended."""
        if (process := self.process) is not None:
            process.kill()

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
                child.kill()
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


@contextmanager
def _bar() -> Iterator[Progress | None]:
    """A bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        bar = bars.add_task("compiling kernels", total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
