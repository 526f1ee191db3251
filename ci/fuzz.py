"""The long fuzz: thousands of random calls of every operation, forward and backward, bit for bit, and of bad arguments.

    python ci/fuzz.py                                     # all properties: some ten minutes
    python ci/fuzz.py --only conv2d --cases 100 --seed 7

The properties are those of tests/support/fuzz_properties.py. How many cases of each passed, and what they were
instances of, is printed and written to ci/results/fuzz/<property>.txt. The first case that fails is printed, as small
as it can be made, and ends the run.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from checkout import RESULTS, versions


def describe(name: str, tally: Any) -> str:
    """A paragraph: the counts, aspect by aspect, the most frequent instance first."""
    aspects: dict[str, Counter[str]] = {}
    for (aspect, instance), count in tally.spread.items():
        aspects.setdefault(aspect, Counter())[instance] = count
    lines = [f"{name}: {tally.cases} cases passed, {tally.seconds:.0f} s"]
    for aspect, instances in sorted(aspects.items()):
        lines.append(f"  {aspect}: " + ", ".join(f"{instance} {count}" for instance, count in instances.most_common()))
    return "\n".join(lines)


def choose_ring() -> bool:
    """Whether kernels will run on a GPU; if not, Triton interprets them, and its interpreter is mended: before anything
    imports triton.
    """
    from tests import conftest

    return conftest.HAS_GPU


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="A property; may be given several times.")] = None,
    cases: Annotated[int | None, typer.Option(help="Of each property, instead of its usual share.")] = None,
    seed: Annotated[int, typer.Option(help="Another one draws other cases.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS / "fuzz",
) -> None:
    """Fuzz every operation against PyTorch in float64."""
    on_gpu = choose_ring()
    import torch

    from tests.support.fuzz_properties import PROPERTIES, assert_addresses_are_checked, campaign

    device = torch.device("cuda" if on_gpu else "cpu")
    ring = torch.cuda.get_device_name() if on_gpu else "Triton's interpreter, every address checked"
    if not on_gpu:
        assert_addresses_are_checked()
    for name in only or []:
        if name not in PROPERTIES:
            raise typer.BadParameter(f"{name}: the properties are {', '.join(PROPERTIES)}", param_hint="--only")
    head = f"ci/fuzz.py --seed {seed}: {versions('torch', 'triton')}\non {ring}\n"
    print(head, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    for name in only or PROPERTIES:
        text = describe(name, campaign(name, cases or PROPERTIES[name].share, device, seed))
        print(f"{text}\n", flush=True)
        (out / f"{name}.txt").write_text(f"{head}\n{text}\n")
    print("none failed")


if __name__ == "__main__":
    app()
