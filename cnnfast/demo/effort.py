"""How much a demo does: all of it, or with --quick less of each kind; on a CPU, or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from cnnfast.dtypes import TF32


@dataclass(frozen=True)
class Effort:
    """Sizes are pixels of each side of the photograph; None stands for all 427 x 640 of it.

    duration: a sentence that says how long it takes. epochs: of training. photograph: what goes through the layers
    for the picture. views: how many of the photograph's augmented views kernels compute. forward: what is judged
    forward alone; 0: nothing is. backward: what is judged forward and backward. digits: how many are judged in the
    trained network; 0: none. converted: how many the converted network reads. dtypes: in which calls are judged.
    budget: seconds for timing on a GPU. left_out: what the whole demo does besides; "" for the whole.
    """

    duration: str
    epochs: int
    photograph: int | None
    forward: int
    backward: int | None
    digits: int
    converted: int
    views: int
    dtypes: tuple[str, ...] = ("float32",)
    budget: float = 0.0
    left_out: str = ""


# Sizes are as much as Triton's interpreter can do in that time: it takes about a millisecond for each step of a loop.
WHOLE = Effort(
    "This takes about 2 minutes on two idle cores; --quick takes less than one.",
    epochs=30,
    photograph=160,
    forward=96,
    backward=32,
    digits=4,
    converted=64,
    views=4,
)
QUICK = Effort(
    "This takes less than a minute on two idle cores.",
    epochs=15,
    photograph=96,
    forward=0,
    backward=16,
    digits=0,
    converted=16,
    views=2,
    left_out="half the epochs, larger images, the digits' gradients",
)

GPU_DIGITS = 64
GPU_DTYPES = ("float32", TF32, "float16", "bfloat16")
GPU_BUDGET = 30.0  # timing 46 directions of layers for 0.2 s each takes 9 s; the rest is for compiling and judging them
ON_A_GPU = Effort(
    "This takes a time that was not measured on a GPU yet, much of it compiling.",
    epochs=30,
    photograph=None,
    forward=0,
    backward=None,
    digits=GPU_DIGITS,
    converted=360,
    views=24,
    dtypes=GPU_DTYPES,
    budget=GPU_BUDGET,
)
QUICK_ON_A_GPU = Effort(
    "This takes a time that was not measured on a GPU yet, much of it compiling.",
    epochs=15,
    photograph=None,
    forward=0,
    backward=None,
    digits=GPU_DIGITS,
    converted=64,
    views=24,
    dtypes=("float32", "bfloat16"),
    budget=10.0,
    left_out="half the epochs, tf32, float16, 20 s of timing",
)


def effort_for(gpu: bool, quick: bool) -> Effort:
    return (QUICK_ON_A_GPU if quick else ON_A_GPU) if gpu else (QUICK if quick else WHOLE)
