"""Names of the modes that a model is checked, timed and tuned in, the same wherever one is given."""

from __future__ import annotations

from .spelling import did_you_mean, fold

INFER, TRAIN = "infer", "train"  # eval mode without gradients; training mode with them
MODES = (INFER, TRAIN)
OTHERS = {
    INFER: ("eval", "evaluate", "evaluation", "inference", "test", "predict", "forward"),
    TRAIN: ("training", "fit", "grad", "gradients", "backward"),
}
SYNONYMS: dict[str, str | None] = {fold(word): mode for mode, words in OTHERS.items() for word in words}


def modes_named(text: str) -> tuple[str, ...]:
    """The modes in a text like "infer,train", each once; none of them if it is empty.

    Raises ValueError for any other word, with the mode that it may stand for.
    """
    modes = tuple(dict.fromkeys(text.split(","))) if text else ()
    if wrong := [mode for mode in modes if mode not in MODES]:
        advice = did_you_mean(wrong[0], MODES, SYNONYMS) if wrong[0] else ""
        raise ValueError(f"{wrong[0]!r} is neither {INFER} nor {TRAIN}{advice}")
    return modes
