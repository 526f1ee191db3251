"""Convolutions of real networks on tensors without data, and the launchers that run them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import memory
from ..conv import conv_dgrad, conv_fprop, conv_fprop_words, conv_stats, conv_wgrad, dgrad_plan
from ..devices import Gpu
from ..epilogue import NO_NORM, BatchNorm, Epilogue
from ..gradient_epilogue import NO_EPILOGUE, GradientEpilogue
from ..keys import dgrad_key
from ..layout import layout_of
from ..problem import ConvProblem
from ..questions import Geometry, Question, Tile, dgrad_question, fprop_question, wgrad_question
from ..second_product import SecondProduct
from ..tiling import Precision

BATCH = 32
LAST = torch.channels_last
NCHW = torch.contiguous_format
FLOAT32 = torch.float32


def empty(*shape: int, dtype: torch.dtype = FLOAT32, fmt: torch.memory_format = NCHW) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype, memory_format=fmt)


@dataclass(frozen=True, slots=True)
class CaseLayer:
    """One convolution of a real network."""

    name: str
    C: int
    size: int
    K: int
    window: int
    stride: int = 1
    groups: int = 1
    fmt: torch.memory_format = LAST

    @property
    def geometry(self) -> Geometry:
        pad = self.window // 2
        return Geometry((self.stride, self.stride), (pad, pad, pad, pad), (1, 1), self.groups)

    @property
    def problem(self) -> ConvProblem:
        return self.geometry.problem((BATCH, self.C, self.size, self.size), self.w_shape)

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.K, self.C // self.groups, self.window, self.window

    def x(self, dtype: torch.dtype) -> torch.Tensor:
        return empty(BATCH, self.C, self.size, self.size, dtype=dtype, fmt=self.fmt)

    def w(self, dtype: torch.dtype) -> torch.Tensor:
        return empty(*self.w_shape, dtype=dtype, fmt=self.fmt)

    def y(self, dtype: torch.dtype) -> torch.Tensor:
        size = (self.size - 1) // self.stride + 1
        return empty(BATCH, self.K, size, size, dtype=dtype, fmt=self.fmt)

    def plain(self, tile: Tile | None, precision: Precision, dtype: torch.dtype) -> None:
        """No epilogue."""
        conv_fprop(self.x(dtype), self.w(dtype), self.geometry, tf32=precision == "tf32", tile=tile)

    def infer(
        self,
        tile: Tile | None,
        precision: Precision,
        dtype: torch.dtype,
        activation: str | None = "relu",
        residual: bool = True,
    ) -> None:
        """The heaviest epilogue of inference: batch norm, residual, activation, of prelu with a slope a channel."""
        norm = BatchNorm(empty(self.K), empty(self.K), empty(self.K), empty(self.K))
        slopes = empty(self.K, dtype=dtype) if activation == "prelu" else None
        epilogue = Epilogue(None, norm, self.y(dtype) if residual else None, activation, 0.01, slopes)
        conv_fprop(self.x(dtype), self.w(dtype), self.geometry, epilogue, tf32=precision == "tf32", tile=tile)

    def joined(self, tile: Tile | None, precision: Precision, dtype: torch.dtype, residual: bool = True) -> None:
        """The epilogue of a residual block's join in training: that of inference, and words of bits."""
        norm = BatchNorm(empty(self.K), empty(self.K), empty(self.K), empty(self.K))
        epilogue = Epilogue(None, norm, self.y(dtype) if residual else None, "relu")
        conv_fprop_words(self.x(dtype), self.w(dtype), self.geometry, epilogue, tf32=precision == "tf32", tile=tile)

    def act(
        self,
        tile: Tile | None,
        precision: Precision,
        dtype: torch.dtype,
        activation: str = "relu",
        residual: bool = True,
    ) -> None:
        """The epilogue without a norm: bias, residual, activation, of prelu with one slope for all channels."""
        bias, slopes = empty(self.K, dtype=dtype), empty(1, dtype=dtype) if activation == "prelu" else None
        epilogue = Epilogue(bias, NO_NORM, self.y(dtype) if residual else None, activation, 0.01, slopes)
        conv_fprop(self.x(dtype), self.w(dtype), self.geometry, epilogue, tf32=precision == "tf32", tile=tile)

    def train(self, tile: Tile | None, precision: Precision, dtype: torch.dtype) -> None:
        """The epilogue of training: bias and the statistics of a tile."""
        bias = empty(self.K, dtype=dtype)
        conv_stats(self.x(dtype), self.w(dtype), self.geometry, bias=bias, tf32=precision == "tf32", tile=tile)

    def dgrad(self, tile: Tile | None, precision: Precision, dtype: torch.dtype) -> None:
        x_shape = (BATCH, self.C, self.size, self.size)
        conv_dgrad(
            self.y(dtype), self.w(dtype), x_shape, self.geometry, fmt=self.fmt, tf32=precision == "tf32", tile=tile
        )

    def masked(
        self,
        tile: Tile | None,
        precision: Precision,
        dtype: torch.dtype,
        mask: str = "z",
        activation: str = "relu",
        sums: bool = True,
    ) -> None:
        """dgrad's kernel with an epilogue: a residual, a mask that is told by "y", "z" or "words", and the sums of its
        tiles, or none.
        """
        x = self.x(dtype)
        words = torch.empty(-(-BATCH * self.size**2 // 32), self.C, device="meta", dtype=torch.int32)
        vector, with_y = empty(self.C), sums or mask == "y"
        epilogue = GradientEpilogue(
            x, x if with_y else None, x if mask == "z" else None, words if mask == "words" else None,
            BatchNorm(vector, vector, vector, vector) if with_y else NO_NORM, activation, 0.01,
        )  # fmt: skip
        dy, w = self.y(dtype), self.w(dtype)
        plan = dgrad_plan(
            dgrad_key(dy, w, tuple(x.shape), self.fmt, self.geometry, precision == "tf32", tile, epilogue, sums)
        )
        plan.run(dy, w, None, epilogue, memory.empty(plan.slots, dy) if sums else None)

    def begun(self, tile: Tile | None, precision: Precision, dtype: torch.dtype, below: bool = True) -> None:
        """dgrad's kernel that begins with a second product, and below it the norm and the activation of another layer,
        whose sums it leaves; or nothing.
        """
        x, dy, w, vector = self.x(dtype), self.y(dtype), self.w(dtype), empty(self.C)
        second = SecondProduct(x, empty(self.C, self.C, 1, 1, dtype=dtype), vector, vector)
        norm = BatchNorm(vector, vector, vector, vector)
        epilogue = GradientEpilogue(None, x, None, None, norm, "relu") if below else NO_EPILOGUE
        plan = dgrad_plan(
            dgrad_key(dy, w, x.shape, self.fmt, self.geometry, precision == "tf32", tile, epilogue, below, second)
        )
        plan.run(dy, w, None, epilogue, memory.empty(plan.slots, dy) if below else None, second)

    def transposed(self, tile: Tile | None, precision: Precision, dtype: torch.dtype) -> None:
        """dgrad with the bias of a transposed convolution."""
        bias, x_shape = empty(self.C, dtype=dtype), (BATCH, self.C, self.size, self.size)
        conv_dgrad(
            self.y(dtype),
            self.w(dtype),
            x_shape,
            self.geometry,
            bias=bias,
            fmt=self.fmt,
            tf32=precision == "tf32",
            tile=tile,
        )

    def wgrad(
        self, tile: Tile | None, precision: Precision, dtype: torch.dtype, split: int = 8, packed: bool = True
    ) -> None:
        """Of packed tensors, or of slices: the lines of their images are apart."""
        tile = tile and replace(tile, SPLIT_K=split)
        x, y = self.x(dtype), self.y(dtype)
        if not packed:
            x, y = (empty(*t.shape[:3], t.shape[3] + 1, dtype=dtype, fmt=self.fmt)[..., : t.shape[3]] for t in (x, y))
        conv_wgrad(x, y, self.w_shape, self.geometry, fmt=self.fmt, tf32=precision == "tf32", tile=tile)

    def question(self, name: str, precision: Precision, dtype: torch.dtype, gpu: Gpu) -> Question:
        """What is asked by one of the methods above: plain, infer, train, dgrad or wgrad."""
        x, w, y = map(layout_of, (self.x(dtype), self.w(dtype), self.y(dtype)))
        tf32 = precision == "tf32"
        match name:
            case "dgrad":
                return dgrad_question(y, w, x.shape, self.fmt, self.geometry, gpu, tf32=tf32)
            case "wgrad":
                return wgrad_question(x, y, w.shape, self.fmt, self.geometry, gpu, tf32=tf32)
        q = fprop_question(x, w, self.geometry, gpu, tf32=tf32)
        match name:
            case "train":
                return q._replace(statistics="stats")
            case "infer":
                return q._replace(statistics="norm", residual=y, activation="relu")
        return q

    def im2col(self, dtype: torch.dtype) -> None:
        x, w, y = self.x(dtype), self.w(dtype), self.y(dtype)
        conv_fprop(x, w, self.geometry, algorithm="im2col")
        conv_dgrad(y, w, tuple(x.shape), self.geometry, fmt=self.fmt, algorithm="im2col")
        conv_wgrad(x, y, self.w_shape, self.geometry, fmt=self.fmt, algorithm="im2col")


STEM = CaseLayer("7x7/2 of 3 channels", 3, 224, 64, 7, stride=2)  # taps x channels without a gap
STEMS = (
    CaseLayer("3x3/2 of 3 channels", 3, 224, 32, 3, stride=2),
    CaseLayer("3x3 of 3 channels", 3, 224, 64, 3),
    CaseLayer("4x4/4 of 3 channels", 3, 224, 96, 4, stride=4),
    CaseLayer("7x7/2 of 6 channels", 6, 224, 64, 7, stride=2),
)
BODY = CaseLayer("3x3", 128, 28, 128, 3)
STRIDED = CaseLayer("3x3/2", 128, 56, 128, 3, stride=2)
POINTWISE = CaseLayer("1x1", 256, 56, 64, 1)
SHALLOW = CaseLayer("1x1 of 64 channels", 64, 56, 256, 1)  # a loop of fewer steps than most tiles have stages
DEEP = CaseLayer("1x1 of 1024 channels", 1024, 14, 1024, 1)  # a loop of so many steps is not unrolled
SHORTCUT = CaseLayer("1x1/2", 256, 56, 512, 1, stride=2)
NARROW = CaseLayer("3x3 of 32 channels", 32, 56, 32, 3)  # half a block of channels
MANY = CaseLayer("3x3 of 200 channels", 200, 28, 200, 3)  # blocks that reach beyond the channels
FLAT = CaseLayer("7x7 of 16 channels", 16, 28, 16, 7)  # k-steps that span several taps
UNEVEN = CaseLayer("3x3 of 48 channels", 48, 56, 48, 3)  # channels that no block divides
APART = CaseLayer("3x3 NCHW", 128, 28, 128, 3, fmt=NCHW)
FORMS = (
    DEEP,
    CaseLayer("7x7", 128, 14, 128, 7),  # too many taps for one bit each
    UNEVEN,
    APART,
    CaseLayer("3x3 in 32 groups", 128, 56, 128, 3, groups=32),
)


def depthwise_layer(
    window: int, C: int = 96, size: int = 56, stride: int = 1, multiplier: int = 1, fmt: torch.memory_format = LAST
) -> CaseLayer:
    name = f"{window}x{window}/{stride} depthwise of {C} channels"
    name += f", {multiplier} filters each" * (multiplier > 1) + " NCHW" * (fmt == NCHW)
    return CaseLayer(name, C, size, C * multiplier, window, stride, C, fmt)


# Strips of each number of rows, which divide 56 / 1 and none of them 58 / 2: a filter is taken whole, by columns, by
# parts of columns.
DEPTHWISE_WINDOWS = tuple(
    depthwise_layer(window, size=size, stride=stride) for window in (3, 5, 7) for size, stride in ((56, 1), (58, 2))
)
# Vectors of 8, 4, 2 channels and 1, of a narrower tile where channels are few, and channels that are apart.
DEPTHWISE_CHANNELS = (
    *(depthwise_layer(3, C) for C in (100, 58, 17, 16, 12, 10, 9)),
    depthwise_layer(3, 64, multiplier=2),
    depthwise_layer(3, fmt=NCHW),
    depthwise_layer(7, fmt=NCHW),
    depthwise_layer(9),
)
