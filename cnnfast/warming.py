"""Kernels are compiled before they are needed, many at a time.

Triton compiles a kernel when it is first launched, one after the other: the first training step of a ResNet-50 waits
for more than a hundred. Which kernels a call will launch follows from shapes, strides and dtypes. So the model is run
once without launching anything (calls.py). Of each launch all that Triton compiles by is written down
(aot/specialisations.py). And other processes compile the kernels into Triton's cache on disk (workers.py), where this
process and every later one finds them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import dispatch, workers
from .spelling import keywords_explained
from .workers import Warming

# Without triton `warm` says that PyTorch serves every call, and nothing else here is used.
if TYPE_CHECKING or dispatch.launch is not None:
    from cnnfast_kernels import devices, launch
    from cnnfast_kernels.aot.specialisations import described

    from . import calls


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
        done = workers.compile_ahead(lines, gpu, progress=progress)
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


@contextmanager
def _bar() -> Iterator[workers.Progress | None]:
    """A bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        bar = bars.add_task("compiling kernels", total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
