"""What is known of a layer, and of a whole model."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layer:
    """One call of one module.

    name: as in model.named_modules(), "" for the model itself. kind: conv, linear, norm, pool, activation,
    attention, other. input_shape, output_shape: of the first tensor that goes in and comes out; () without one.
    parameters: its own, counted at its first call; a convolution's are (R*S*C/groups + 1)*K with bias. trainable:
    whether one of those that it has requires a gradient; trainable_parameters: how many of `parameters` do. flops:
    multiplications and additions of its convolutions and matrix products, as torch.utils.flop_counter counts them:
    2*N*P*Q*K*R*S*C/groups, taps in the padding counted, bias and everything pointwise not. receptive_field: input
    rows that one position of the output depends on (see receptive_field.py); None: the whole input; 0: nothing of
    it. jump: input rows from one position to the next; None where there are no positions. output_bytes: of all
    tensors that come out, 0 for one that lies in the memory of one that went in.
    """

    name: str
    kind: str
    class_name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    trainable: bool
    trainable_parameters: int
    flops: int
    receptive_field: int | None
    jump: int | float | None
    dtype: str
    output_bytes: int


@dataclass(frozen=True)
class Summary:
    """All layers of a model, and totals.

    parameters: of the whole model, each counted once; trainable: those of them that require gradients; unused: those
    of modules that the run did not call. Parameters of lazy modules have the sizes that the run gave them, and do not
    count if it did not call them. parameter_bytes, buffer_bytes: of the same parameters, and of all buffers, each once,
    in the dtypes that they have. flops: of the whole run, whatever did them. output_bytes: of all layers. classes: the
    name of each module's class, by the module's name.
    """

    layers: list[Layer]
    parameters: int
    trainable: int
    unused: int
    parameter_bytes: int
    buffer_bytes: int
    flops: int
    output_bytes: int
    classes: dict[str, str] = field(repr=False, compare=False)

    @property
    def macs(self) -> int:
        """Multiply-accumulates: half of the FLOPs."""
        return self.flops // 2
