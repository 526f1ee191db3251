"""What is known of each operation of a step, and of the whole."""

from __future__ import annotations

from dataclasses import dataclass

from cnnfast_kernels.costs import Limiter

OPERATIONS = ("fprop", "dgrad", "wgrad", "bias", "norm", "pool", "augment")  # bias: its gradient


@dataclass(frozen=True)
class Operation:
    """A call of one of our operators, as our kernels would serve it.

    layer: the module's name, "" for the model itself. operation: one of OPERATIONS; the forward pass of a transposed
    convolution is a dgrad. backward: whether it belongs to the backward pass. shapes: of its operands, as 2x3x8x8
    8x3x3x3. kernel: the one that does its work, or moves most. limiter: what takes longest. modelled_us, roofline_us:
    microseconds by the model, and if the operation only multiplied, or only moved each of its tensors once. bytes: that
    its kernels read and write, each tensor of each launch once. launches: of kernels. served: who would serve the call
    today: "measured row" (of a table: our kernels), "kernels" (ours without a row), "library" (PyTorch's convolution).

    Of a convolution, and None elsewhere: tile; registers (of a thread); exact (whether registers and instructions were
    read from this very kernel's machine code, or estimated from the nearest one that was compiled); residents (programs
    that live on a multiprocessor at once); intensity (FLOPs for each byte from the second-level cache); measured_us,
    library_us (what a table of this GPU has of our kernels and of the library; None without a row).
    """

    layer: str
    operation: str
    backward: bool
    shapes: str
    kernel: str
    tile: str | None
    registers: int | None
    exact: bool | None
    residents: int | None
    intensity: float | None
    limiter: Limiter
    modelled_us: float
    roofline_us: float
    flops: int
    bytes: int
    launches: int
    served: str
    measured_us: float | None = None
    library_us: float | None = None

    @property
    def share(self) -> float:
        """Of the roofline: 1 is as fast as the GPU can be."""
        return self.roofline_us / self.modelled_us if self.modelled_us else 1.0


@dataclass(frozen=True)
class BlockServed:
    """A residual block that trains as one operator, and who would serve its convolutions today, forward and backward.

    layer: the module's name, "" for the model itself. shape: of its input, as 2x64x56x56. served: "kernels" (ours) or
    "library" (PyTorch's convolution). by: what says so: "measured row" (of a table: of the block as a whole),
    "unmeasured" (there is none, and the library comes first), "less memory" (convert was asked for it). measured_us,
    library_us: what the row has of our kernels and of the library, of forward and backward together.
    """

    layer: str
    shape: str
    served: str
    by: str
    measured_us: float | None = None
    library_us: float | None = None


@dataclass(frozen=True)
class OperationTotal:
    """Microseconds of all rows of an operation, by the model and on the roofline."""

    modelled_us: float
    roofline_us: float


@dataclass(frozen=True)
class ForeignWork:
    """What PyTorch's own operators do in the same step, all calls of one operator in one module together.

    calls: of the operator; each launches a kernel or more. flops: of matrix products and convolutions. bytes: that they
    read and write, each tensor of each call once. roofline_us: microseconds that they take at least.
    """

    layer: str
    operator: str
    backward: bool
    calls: int
    flops: int
    bytes: int
    roofline_us: float
