"""Names of dtypes, the same wherever one is given: PyTorch's own, shorter ones, and tf32: float32 tensors that are
multiplied as TF32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .spelling import did_you_mean

if TYPE_CHECKING:
    import torch

    from .precision import Products

TF32 = "tf32"
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", TF32: TF32, "fp64": "float64"}
ALIASES = {"half": "float16", "float": "float32", "double": "float64"}  # PyTorch's own
SYNONYMS: dict[str, str | None] = {
    **{f"f{bits}": f"fp{bits}" for bits in (16, 32, 64)},
    **{"bfp16": "bf16", "brainfloat": "bf16", "single": "fp32", "ieee": "fp32", "tfloat32": "tf32"},
}  # of other libraries; never taken, but named
CHOICES = ", ".join((*SHORT, *(name for name in SHORT.values() if name not in SHORT)))


def full_name(text: str) -> str:
    """bf16, bfloat16 and torch.bfloat16 are all "bfloat16"; "tf32" stays.

    Raises ValueError, which lists what there is, and says what is near.
    """
    name = text.removeprefix("torch.")
    name = SHORT.get(name) or ALIASES.get(name) or name
    if name not in SHORT.values():
        advice = did_you_mean(name, (*SHORT, *SHORT.values(), *ALIASES), SYNONYMS)
        raise ValueError(f"{text!r} is none of {CHOICES}{advice}")
    return name


def argument(dtype: torch.dtype | str | None, function: str) -> tuple[torch.dtype | None, Products | None]:
    """What an argument `dtype` of a function asks for: the dtype of tensors, and how float32 is multiplied, which only
    a name can say.

    Raises ValueError in the name of `function`, also for a dtype that is not one of these, such as torch.int8.
    """
    import torch

    if dtype is None:
        return None, None
    if isinstance(dtype, torch.dtype):
        if str(dtype).removeprefix("torch.") not in SHORT.values():
            raise ValueError(f"{function}(): dtype {dtype} is none of {CHOICES}")
        return dtype, None
    if not isinstance(dtype, str):
        raise ValueError(f"{function}(): dtype {dtype!r} is neither a torch.dtype nor one of {CHOICES}")
    try:
        name = full_name(dtype)
    except ValueError as error:
        raise ValueError(f"{function}(): dtype {error}") from None
    return dtype_of(name), "tf32" if name == TF32 else "ieee"


def dtype_of(name: str) -> torch.dtype:
    """Of the tensors, for a full name; of "tf32" that is torch.float32."""
    import torch

    return torch.float32 if name == TF32 else getattr(torch, name)


def name_of(dtype: torch.dtype, tf32: bool = False) -> str:
    """The full name of what computes in `dtype`, float32 products being rounded to TF32 or not."""
    import torch

    return TF32 if tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")
