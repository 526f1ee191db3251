"""What a demo found, in plain words, each under a word that says what it is about: the console shows them, and the
report begins with them.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from .digits import ACCURACY_WANTED
from .effort import Effort
from .results import Results, Training

WIDTH = 80
INDENT = 11  # where sentences begin
ULP = "1 ulp is the last place of the largest value in a tensor"


@dataclass(frozen=True)
class Told:
    """What it is about, and sentences without their full stops, each of which begins on a line of its own."""

    about: str
    sentences: tuple[str, ...]

    def lines(self) -> list[str]:
        """As the console shows it. A word that is longer than a line, a path for example, is not broken."""
        found: list[str] = []
        for sentence in self.sentences:
            found += textwrap.wrap(sentence, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
        return [f"{'' if i else self.about:<{INDENT}}{line}" for i, line in enumerate(found)]

    def __str__(self) -> str:
        return f"{self.about}: {'; '.join(self.sentences)}."


def told(about: str, *sentences: str) -> Told:
    return Told(about, sentences)


def of_machine(environment: dict[str, str]) -> Told:
    versions = ", ".join(
        f"{name} {environment[name].partition('+')[0]}" for name in ("torch", "triton") if name in environment
    )
    where = environment["GPU"]
    if where == "none":
        interpreted = "no GPU: Triton interprets the kernels"
        where = interpreted if "triton" in environment else "no GPU and no triton: PyTorch computes everything"
    return told("machine", f"{where}; {versions}")


def of_training(t: Training) -> Told:
    how = f"{len(t.losses)} epochs of AdamW by {t.served_by}, {t.seconds:.0f} s"
    return told("training", f"{t.images:,} digits, moved and turned; {how}")


def of_accuracy(t: Training) -> Told:
    right = f"{t.held_out - len(t.mistakes)} of {t.held_out} unseen digits read right"
    return told("held out", f"{right}: {t.accuracy:.1%} (wanted: {ACCURACY_WANTED:.0%})")


def of_maps(results: Results) -> Told:
    m = results.maps
    assert m is not None
    by = "by our kernels" if m.launches else "by PyTorch: no kernel ran"
    wrong = "" if m.ok else ", which is WRONG"
    return told("photograph", f"{m.size} pixels through ResNet's stem and a block, {by}{wrong}")


def of_errors(results: Results) -> list[Told]:
    if not results.proofs:
        return [told("errors", "triton is not installed here: no kernel ran, and none was judged")]
    dtypes = ", ".join(dict.fromkeys(p.dtype for p in results.proofs))
    said = []
    for name, backward in (("forward", False), ("backward", True)):
        if (worst := results.worst(backward)) is not None:
            ours, theirs = map(short, worst)
            said.append(f"{name}: ours at most {ours} ulp from float64, PyTorch's own {theirs}")
    held, calls = results.held
    judged = f"{held} of {calls} checks hold: within twice PyTorch's own error + rounding"
    if held < calls:
        judged = f"{calls - held} of {calls} checks FAIL: the report names them, and why"
    return [told("errors", *said, f"{ULP} ({dtypes})"), told("judged", judged)]


def of_conversion(results: Results) -> Told:
    c, known = results.conversion, results.known
    assert c is not None
    by = f"{c.same} of {c.digits} read as by PyTorch" if c.launches else "no kernel ran"
    said = [f"digits' network in plain torch.nn: {by}"]
    if known is not None:
        said.append(f"{known.name}: {known.convolutions}, {known.coverage:.1%} of FLOPs")
    return told("convert", *said)


def of_augmentation(results: Results) -> Told:
    a = results.augmentation
    assert a is not None
    by = f"{len(a.launches)} launches of our kernels" if a.launches else "PyTorch: no kernel ran"
    ours, *theirs = a.milliseconds.values()
    times = f"{ours:.0f} ms by {a.served_by}"
    if theirs:
        times += f"; {theirs[0]:.0f} ms by torchvision, image by image"
    wrong = "" if a.ok else f", which are WRONG by up to {a.apart:.2g} of 255 levels"
    return told("augment", f"{a.count} views of the photograph by {by}{wrong}", times)


def of_costs(results: Results) -> Told:
    c = results.costs
    assert c is not None
    moved = c.pointwise[1]
    return told(
        c.name,
        f"{c.parameters:,} parameters, {c.image_flops / 1e9:.1f} GFLOPs an image (computed, not measured)",
        f"norms, ReLUs, additions move {moved:.0%} of bytes; fusion saves {c.saved:.0%} of all",
    )


def of_times(results: Results) -> Told:
    if not results.timings:
        return told("times", "not measured: an interpreter's seconds say nothing about a GPU's")
    timed = [(t.forward, t.torch_forward) for t in results.timings if t.forward and t.torch_forward]
    faster = sum(ours < theirs for ours, theirs in timed)
    return told("times", f"forward, ours are faster than PyTorch's in {faster} of {len(timed)} convolutions")


def of_left_out(effort: Effort) -> Told:
    return told("left out", f"by --quick: {effort.left_out}")


def of_end(results: Results, folder: Path) -> list[Told]:
    end = "everything holds" if results.ok else f"FAILED: {', '.join(results.failed)}"
    return [
        told("report", f"{folder / 'report.md'}, report.json, demo.png"),
        told("next", "cnnfast doctor; cnnfast check resnet18 --input 1x3x32x32"),
        told("result", f"{end} ({results.seconds:.0f} s)"),
    ]


def short(units: float) -> str:
    """Two digits or three, without an exponent where it can be avoided."""
    if units == 0:
        return "0"
    return f"{units:.1f}" if 0.095 <= units < 10 else f"{units:.0f}" if 10 <= units < 10_000 else f"{units:.1e}"


def all_of(results: Results) -> list[Told]:
    """What the report begins with."""
    found = [of_machine(results.environment), of_training(results.training), of_accuracy(results.training)]
    found += [of_maps(results)] if results.maps else []
    found += of_errors(results)
    found += [of_conversion(results)] if results.conversion else []
    found += [of_augmentation(results)] if results.augmentation else []
    found += [of_costs(results)] if results.costs else []
    found.append(of_times(results))
    found += [of_left_out(results.effort)] if results.effort.left_out else []
    return found
