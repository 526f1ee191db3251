"""What reached CUDA: launches, tensor maps, and the binaries that were loaded."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RecordedLaunch:
    """One launch as CUDA was asked for it. `parameters`: the kernel's, each as the bytes that the binary expects;
    `attributes` likewise.

    `function` is the loaded binary (RecordingDriver.kernels). Threads of a block are counted along three axes, as
    programs of a grid are.
    """

    function: int
    stream: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: tuple[bytes, ...]
    attributes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class RecordedEncode:
    """One tensor map as CUDA was asked for it. Axes are innermost first, strides are bytes, the innermost axis's is 0
    (it is not told).

    `refusal` says which of CUDA's limits it breaks; the empty string if none.
    """

    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    type: int
    element_bytes: int
    interleave: int
    swizzle: int
    promotion: int
    fill: int
    refusal: str

    @property
    def permuted(self) -> bool:
        """Whether an axis has a smaller stride than one inside it: allowed by the documentation's prose, not by every
        example in it.
        """
        return any(outer < inner for inner, outer in itertools.pairwise(self.strides[1:]))

    @property
    def overlapping(self) -> bool:
        """Whether two positions may share an address: an axis steps by less than what the axes of smaller strides reach
        over.
        """
        axes = sorted(zip((self.element_bytes, *self.strides[1:]), self.dims, strict=True))
        return any(step < stride * dim for (stride, dim), (step, extent) in itertools.pairwise(axes) if extent > 1)


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A binary that was loaded, and its digest.

    `parameter_bytes` are the sizes that its machine code expects, `passed_bytes` those of what Triton's launcher
    passes, both with the two pointers to scratch memory that Triton adds.
    """

    name: str
    digest: str
    parameter_bytes: tuple[int, ...]
    passed_bytes: tuple[int, ...]
    global_scratch_bytes: int
    profile_scratch_bytes: int
