"""The demo's report, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .digits import ACCURACY_WANTED
from .results import Proof, Results, figure
from .timing import HEADING


def markdown(results: Results, picture: str) -> str:
    """The report; `picture` is the file name of the picture beside it."""
    t = results.training
    parts = [
        "# cnnfast demo",
        f"**{'Everything holds.' if results.ok else 'Something FAILED: see below.'}** {results.seconds:.0f} s in all.",
        table(("", ""), results.environment.items()),
        f"![photograph, feature maps, digits, errors]({picture})",
        "## Handwritten digits",
        f"A residual network was trained on {t.images} of scikit-learn's images for {len(t.losses)} epochs"
        f" ({t.seconds:.0f} s, seed {t.seed}; served by {t.served_by})."
        f" Of {t.held_out} held-out images it reads {t.held_out - len(t.mistakes)} right: **{t.accuracy:.1%}**"
        f" (wanted: {ACCURACY_WANTED:.0%})."
        f" Loss: {t.losses[0]:.3f} after the first epoch, {t.losses[-1]:.3f} after the last.",
    ]
    if t.mistakes:
        parts.append(table(("image", "is", "read as"), sorted(t.mistakes)))
    parts.append("## The kernels")
    if results.proofs:
        parts.append(
            "Each call was computed, on the values that reached it, by our kernels, by PyTorch, and in float64."
            " Errors are the largest distances from float64, shown for the tensor nearest to its limit. The limit is"
            " the sum of twice PyTorch's own error, twice that of the plain formulas in the accumulators' dtype, and"
            " one unit in the last place. The root mean square of the errors is held to the same rule. In float32 all"
            " multiply as IEEE says; tf32 is float32 with products of operands rounded to TF32, in the plain formulas"
            " too."
        )
        parts += [part for proof in results.proofs for part in proof_parts(proof)]
    else:
        parts.append("Triton is not installed here: no kernel ran.")
    if (c := results.conversion) is not None:
        rows = [(row.name, row.kind, row.status, row.reason) for row in c.report.rows]
        parts += [
            "## A model of plain torch.nn, converted",
            "The same network written with nothing but torch.nn, with the trained weights, and then"
            f" `cnnfast.convert(model)`: **{c.summary}** ({c.seconds:.0f} s; kernels launched: {len(c.launches)}).",
            table(("module", "class", "", "into, or why"), rows),
        ]
    if results.timings:
        parts += ["## Times", results.timed, table(HEADING, (t.cells for t in results.timings)), results.left_out]
    return "\n\n".join(filter(None, parts)) + "\n"


def proof_parts(proof: Proof) -> list[str]:
    rows = [
        (
            row.layer or "",
            row.operation,
            row.shapes,
            *(figure(row.worst(b), ours) for b in (False, True) for ours in (True, False)),
            row.verdict,
        )
        for row in proof.report.rows
    ]
    problems = [f"- {row}: {problem}" for row in proof.report.rows for problem in row.problems]
    return [
        f"### {proof.title}, {proof.dtype}",
        f"{proof.report.summary} ({proof.seconds:.0f} s)",
        table(("layer", "operation", "sizes", "forward", "PyTorch", "backward", "PyTorch", ""), rows),
        *(["\n".join(problems)] if problems else []),
        table(("kernel", "launched in calls"), ((f"`{kernel}`", n) for kernel, n in proof.launches.items())),
    ]


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
