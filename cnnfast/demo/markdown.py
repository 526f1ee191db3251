"""The demo's report, as Markdown: findings first, then the tables that they are made from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cnnfast.checking import Comparison

from . import findings
from .results import Proof, Results, in_units
from .timing import HEADING

JUDGED = (
    "Each call was computed, on the values that reached it, by our kernels, by PyTorch, and in float64. Errors are the"
    " largest distances from float64, shown for the tensor nearest to its limit, in ulp: units in the last place of the"
    " dtype at the largest value of that tensor; report.json has them as absolute numbers. The limit is the sum of"
    " twice PyTorch's own error, twice that of the plain formulas in the accumulators' dtype, and one unit in the last"
    " place. The root mean square of the errors is held to the same rule. In float32 all multiply as IEEE says; tf32 is"
    " float32 with products of operands rounded to TF32, in the plain formulas too."
)


def markdown(results: Results, picture: str) -> str:
    """The report; `picture` is the file name of the picture beside it."""
    t = results.training
    end = "Everything holds." if results.ok else f"FAILED: {', '.join(results.failed)}."
    parts = [
        "# cnnfast demo",
        f"**{end}** {results.seconds:.0f} s in all.",
        "\n".join(f"- {each}" for each in findings.all_of(results)),
        f"![photograph, feature maps, digits, errors, costs]({picture})",
        "## The machine",
        table(("", ""), results.environment.items()),
        "## Handwritten digits",
        f"`cnnfast.training.fit` trained a residual network on {t.images} of scikit-learn's images, moved, turned and"
        f" slanted at random, for {len(t.losses)} epochs ({t.seconds:.0f} s, seed {t.seed}; served by {t.served_by})."
        f" Loss, of smoothed labels: {t.losses[0]:.3f} in the first epoch, {t.losses[-1]:.3f} in the last."
        f" `cnnfast train digits` does the same, and keeps the network.",
    ]
    if t.mistakes:
        parts.append(table(("image", "is", "read as"), sorted(t.mistakes)))
    parts.append("## The kernels")
    if results.proofs:
        parts += [JUDGED, *(part for proof in results.proofs for part in proof_parts(proof))]
    else:
        parts.append("Triton is not installed here: no kernel ran.")
    if (c := results.conversion) is not None:
        parts += [
            "## Models converted",
            "The digits' network written with nothing but torch.nn, with the trained weights, and then"
            f" `cnnfast.convert(model)`: **{c.summary}** (kernels launched: {len(c.launches)}).",
            converted(c.report),
        ]
    if (known := results.known) is not None:
        parts += [f"{known.name}, by the same call: **{known.report.summary}**.", converted(known.report)]
    if (a := results.augmentation) is not None:
        ours = (
            f"The first {a.by_kernels} were computed by our kernels too: they differ by at most {a.apart:.2g} levels."
        )
        parts += [
            "## The photograph, augmented",
            f"{a.count} views of {a.size} x {a.size} pixels each by `cnn.Augment`, in one batch: crops, flips,"
            " rotations, colours and erased boxes. The picture shows them as PyTorch's operators compute them, in"
            f" levels from 0 to 255. {ours if a.launches else 'No kernel ran.'}",
            table(("", "milliseconds of a batch"), ((name, f"{ms:.1f}") for name, ms in a.milliseconds.items())),
            f"`cnn.Augment` was timed as {a.served_by} compute it, torchvision's transforms image by image.",
            table(("kernel launched", ""), ((f"`{kernel}`", "once a batch") for kernel in a.launches))
            if a.launches
            else "",
        ]
    if (costs := results.costs) is not None:
        rows = (
            (
                layer.name,
                f"{layer.flops / 1e9:.2f}",
                f"{layer.pointwise_flops / 1e9:.3f}",
                *(f"{size / 2**20:.1f}" for size in (layer.bytes, layer.pointwise_bytes, layer.fused_bytes)),
            )
            for layer in costs.layers
        )
        heading = ("layer", "GFLOPs", "of norm, ReLU, addition", "MiB", "of norm, ReLU, addition", "MiB fused")
        parts += [
            f"## What {costs.name}'s layers compute and move",
            f"Computed from shapes, not measured: batch {costs.batch}, bfloat16, inference; MiB are read and written,"
            " each operand once. A layer is a convolution with what follows it.",
            table(heading, rows),
        ]
    if results.timings:
        parts += ["## Times", results.timed, table(HEADING, (t.cells for t in results.timings)), results.left_out]
    return "\n\n".join(filter(None, parts)) + "\n"


def converted(report) -> str:
    return table(("module", "class", "", "into, or why"), ((r.name, r.kind, r.status, r.reason) for r in report.rows))


def proof_parts(proof: Proof) -> list[str]:
    rows = [
        (
            row.layer or "",
            row.operation,
            row.shapes,
            *(ulps(row.worst(b), proof.dtype) for b in (False, True)),
            row.verdict,
        )
        for row in proof.report.rows
    ]
    problems = [f"- {row}: {problem}" for row in proof.report.rows for problem in row.problems]
    heading = ("layer", "operation", "sizes", "forward: ours, PyTorch's, limit, ulp", "backward", "")
    return [
        f"### {proof.title}, {proof.dtype}",
        f"{proof.report.summary} ({proof.seconds:.0f} s)",
        table(heading, rows),
        *(["\n".join(problems)] if problems else []),
        table(("kernel", "launched in calls"), ((f"`{kernel}`", n) for kernel, n in proof.launches.items())),
    ]


def ulps(comparison: Comparison | None, dtype: str) -> str:
    """Our error, PyTorch's and the limit, or nothing where none was judged."""
    if comparison is None:
        return ""
    errors = (comparison.error, comparison.torch_error, comparison.limit)
    return ", ".join(findings.short(in_units(error, comparison.largest, dtype)) for error in errors)


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
