"""A visit, from part to part: says what each will take, runs it, and leaves its files before the next one begins."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from .parts import MOST_SECONDS, Part
from .results import RUNNING, PartOutcome, VisitResults
from .running import FAILED, GRACE, INTERRUPTED, LATE, PASSED, ROOT, SKIPPED, Ran, Stop, run

EVERY = 15.0  # seconds between two states of the files while a part runs
LEAST = 5.0  # seconds without which a part is not begun
FAILURE, INTERRUPTION = 1, 130  # exit codes
FIRST = "smoke"


def environment() -> dict[str, str]:
    """Of every command: cnnfast is imported from these sources, kernels are compiled, output is written at once.

    Triton's cache is one folder for all parts, its own default or the caller's, so that a later part finds what an
    earlier one compiled.
    """
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    }
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def state_of(ran: Sequence[Ran]) -> str:
    """The state of a part, which is the worst that matters among its commands'."""
    for state in (INTERRUPTED, LATE, FAILED):
        if any(r.state == state and (r.bad or state == INTERRUPTED) for r in ran):
            return state
    return PASSED if any(r.state == PASSED for r in ran) else SKIPPED


def visit(
    make: Callable[[Path], Sequence[Part]],
    folder: Path,
    machine: Mapping[str, str],
    costs: Mapping[str, str],
    *,
    budget: float = MOST_SECONDS,
    grace: float = GRACE,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> int:
    """Runs the parts that `make` makes for a folder of work, and returns the exit code: 0, 1 if anything failed, 130 if
    interrupted.

    folder: where files are left; it is made. machine: what the summary says of it. costs: what each part was counted to
    take, in words. budget: seconds of all parts. grace: seconds before its limit at which a command is asked to end.
    Raises what results.check does.
    """
    end = time.monotonic() + budget
    folder = folder.absolute()  # commands run elsewhere
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="cnnfast-visit-"))
    results, bad = VisitResults(folder, work), False
    parts = make(work)
    try:
        results.keep_earlier()
        with Stop().listening() as stop:
            for part in parts:
                outcome = PartOutcome(part.name, RUNNING, part.limit, machine=dict(machine))
                if left := why_not(end, stop):
                    outcome.state, outcome.note = SKIPPED, left
                    results.outcomes.setdefault(part.name, outcome)
                    say(f"=== {part.name}: {SKIPPED}, {left}")
                    continue
                results.begin(outcome, part.results)
                outcome.begun = datetime.now().isoformat(timespec="seconds")
                outcome.note = shadow(results.outcomes.get(FIRST)) if part.name != FIRST else ""
                allowed = min(part.limit, end - time.monotonic())
                say(f"=== {part.name}: {part.what}; {allowed:.0f} s at most{costs.get(part.name, '')}")
                if outcome.note:
                    say(f"    {outcome.note}")
                run_part(part, outcome, results, end, stop, grace)
                say(f"=== {part.name}: {outcome.state}, {outcome.seconds:.0f} s")
                bad = bad or outcome.bad
            text = results.publish()
        say(f"\n{text}\nin {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
        return INTERRUPTION if stop else FAILURE if bad else 0
    finally:
        shutil.rmtree(work, ignore_errors=True)


def why_not(end: float, stop: Stop) -> str:
    """Why no further part is begun; "" if the next one is."""
    if stop:
        return "the visit was interrupted"
    return "the budget was used up" if end - time.monotonic() < LEAST else ""


def shadow(first: PartOutcome | None) -> str:
    """What must be known of all results if smoke found kernels that hang or fail; "" if it did not."""
    names = [ran.name for ran in first.ran if ran.bad] if first else []
    return f"smoke had found trouble with {', '.join(names)}" if names else ""


def run_part(part: Part, outcome: PartOutcome, results: VisitResults, end: float, stop: Stop, grace: float) -> None:
    """Fills in the outcome, and leaves files meanwhile. A stage that ends early leaves its time to the next one."""
    folder = results.work / part.name
    begun = last = time.monotonic()
    end = min(end, begun + part.limit)
    results.publish()
    spent = 0.0
    for stage in part.stages:
        before = list(outcome.ran)

        def tick(ran: Sequence[Ran], before: Sequence[Ran] = before) -> None:
            nonlocal last
            if time.monotonic() - last > EVERY or len(before) + len(ran) > len(outcome.ran):
                last = time.monotonic()
                outcome.ran, outcome.seconds = [*before, *ran], last - begun
                results.publish()

        spent += stage.limit
        run(stage, folder, environment(), min(end, begun + spent), stop, before, tick, grace)
    outcome.seconds = time.monotonic() - begun
    outcome.state = state_of(outcome.ran)
    results.publish()
