"""What a visit leaves in a folder: summary.md, visit.tar.gz with all logs, and the few files that others read. At most
eight files.

Everything is written anew after each command, and while one runs every few seconds, each file whole in one step: a
visit that is killed has left what it had. A later visit to the same folder keeps the parts that it does not run again.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import pytest_lines
from .parts import PARTS
from .running import PASSED, Ran

SUMMARY, ARCHIVE, STATE = "summary.md", "visit.tar.gz", "visit.json"
MOST_CHARACTERS = 11_500  # of the summary
LOG_LINES, LOG_CHARACTERS = 40, 2_500
MOST_NAMES = 25
MOST_BYTES = 8 * 2**20  # of a file in the archive: of a log without end, the end
RUNNING, KILLED = "running", "killed"


@dataclass
class PartOutcome:
    """How a part went. `machine` is what machine.py tells, `begun` the time of day."""

    part: str
    state: str
    limit: float
    begun: str = ""
    seconds: float = 0.0
    note: str = ""
    ran: list[Ran] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def bad(self) -> bool:
        return any(ran.bad for ran in self.ran)


def plain(outcomes: Iterable[PartOutcome]) -> str:
    return json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n"


def revived(text: str) -> list[PartOutcome]:
    return [PartOutcome(**{**entry, "ran": [Ran(**ran) for ran in entry["ran"]]}) for entry in json.loads(text)]


class VisitResults:
    """`folder` is where files are left; `work` is where they come to be, a folder for each part."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder, work
        self.outcomes: dict[str, PartOutcome] = {}
        self.published: dict[str, tuple[str, ...]] = {}

    def keep_earlier(self) -> None:
        """Takes over what an earlier visit has left here. Raises ValueError if that cannot be read."""
        archive = self.folder / ARCHIVE
        if not archive.exists():
            return
        try:
            shutil.unpack_archive(archive, self.work)
            earlier = revived((self.work / STATE).read_text())
        except (tarfile.TarError, OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{archive} is not what a visit leaves ({type(error).__name__}: {error}): move it away"
            ) from error
        for outcome in earlier:
            outcome.state = KILLED if outcome.state == RUNNING else outcome.state
            self.outcomes[outcome.part] = outcome

    def begin(self, outcome: PartOutcome, names: tuple[str, ...]) -> None:
        """Makes the folder of a part, which leaves files of these names beside the archive. What an earlier visit had
        of it goes.
        """
        self.outcomes[outcome.part], self.published[outcome.part] = outcome, names
        shutil.rmtree(self.work / outcome.part, ignore_errors=True)
        (self.work / outcome.part).mkdir()
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def publish(self) -> str:
        """Writes all files, the parts in the order of a visit, and returns the summary."""
        known = list(PARTS)
        in_order = sorted(self.outcomes, key=lambda name: known.index(name) if name in known else len(known))
        self.outcomes = {name: self.outcomes[name] for name in in_order}
        (self.work / STATE).write_text(plain(self.outcomes.values()))
        text = summary(list(self.outcomes.values()), self.work)
        fresh = self.work / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        with tarfile.open(fresh / ARCHIVE, "w:gz") as tar:
            for entry in sorted(self.work.iterdir()):
                if entry != fresh:
                    add(tar, entry, entry.name)
        (fresh / SUMMARY).write_text(text)
        for part, names in self.published.items():
            for name in names:
                if is_json(self.work / part / name):
                    shutil.copy(self.work / part / name, fresh / name)
        for file in sorted(fresh.iterdir(), key=lambda file: file.name == ARCHIVE):  # last: who sees it sees the others
            into_place(file, self.folder / file.name)
        shutil.rmtree(fresh)
        return text


def check(folder: Path) -> None:
    """Makes the folder. Raises OSError if that cannot be, or nothing can be written there, and ValueError as
    `keep_earlier` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    with tempfile.TemporaryDirectory() as work:
        VisitResults(folder, Path(work)).keep_earlier()


def add(tar: tarfile.TarFile, entry: Path, name: str) -> None:
    """A file, or all of a folder. Files are read first: what runs may write to them meanwhile."""
    if entry.is_dir():
        for inner in sorted(entry.iterdir()):
            add(tar, inner, f"{name}/{inner.name}")
    else:
        content = entry.read_bytes()[-MOST_BYTES:]
        about = tarfile.TarInfo(name)
        about.size, about.mtime = len(content), int(entry.stat().st_mtime)
        tar.addfile(about, io.BytesIO(content))


def is_json(file: Path) -> bool:
    """Whether the archive is there and whole: it may be being written just now."""
    try:
        json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return True


def into_place(file: Path, target: Path) -> None:
    """Copies a file so that whoever looks finds the old or the new one; the folders may be on two disks."""
    beside = target.with_name(".fresh")
    shutil.copy(file, beside)
    beside.replace(target)


# ----------------------------------------------------------------------------------------------------------------------
# The summary


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, the first column to the left, the others to the right."""
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def summary(outcomes: Sequence[PartOutcome], work: Path) -> str:
    """What ran, how long, what failed, what was measured, the ends of logs that matter: the first things first, cut
    where it gets long.
    """
    pieces = ["# Visit", *sorted({conditions(outcome) for outcome in outcomes})]
    rows = [(o.part, o.state, f"{o.seconds:.0f}", f"{o.limit:.0f}", o.note) for o in outcomes]
    pieces.append(table(("part", "state", "seconds", "limit", "note"), rows))
    pieces += [piece for outcome in outcomes for piece in troubles(outcome, work)]
    for outcome in outcomes:
        try:
            pieces += findings(outcome.part, work / outcome.part)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # a file that is not whole, or of another version
            pieces.append(f"## {outcome.part}\n\nits results cannot be read: {type(error).__name__}: {error}")
    pieces += [piece for outcome in outcomes for piece in ends_of_logs(outcome, work)]
    text = ""
    for piece in pieces:
        if len(text) + len(piece) > MOST_CHARACTERS - 100:
            return f"{text}\n(More is in {ARCHIVE}.)\n"
        text += f"{piece}\n\n"
    return text.rstrip() + "\n"


def conditions(outcome: PartOutcome) -> str:
    """One line about the machine and the commit that ran."""
    m = outcome.machine
    names = {"driver": "driver", "torch": "torch", "triton": "triton", "python": "Python", "commit": "cnnfast at"}
    return ", ".join(
        [m.get("device", "no machine is named"), *(f"{word} {m[name]}" for name, word in names.items() if m.get(name))]
    )


def said(ran: Ran) -> str:
    return f"{ran.state}, {ran.note}" if ran.note else ran.state


def troubles(outcome: PartOutcome, work: Path) -> Iterator[str]:
    """What failed, by name; and what is only to be noted."""
    lines = [f"- **{ran.name}**: {said(ran)}" for ran in outcome.ran if ran.bad]
    alike: dict[str, list[str]] = {}
    for ran in outcome.ran:
        if not ran.bad and (ran.state != PASSED or ran.note):
            alike.setdefault(said(ran), []).append(ran.name)
    lines += [
        f"- {', '.join(names) if len(names) < 4 else f'{len(names)} processes'}: {text}"
        for text, names in alike.items()
    ]
    for file in sorted((work / outcome.part).glob("*.jsonl")):
        tests = pytest_lines.read(file)
        lines.append(f"- {file.stem}: {tests}")
        told = [f"  - **{test}**: {said}" for test, said in tests.failed.items()]
        told += [f"  - {test}: under way" for test in tests.unfinished]
        lines += told[:MOST_NAMES] + [f"  - and {len(told) - MOST_NAMES} more"] * (len(told) > MOST_NAMES)
    if lines:
        yield "\n".join([f"## {outcome.part}: what to look at", "", *lines])


def findings(part: str, folder: Path) -> Iterator[str]:
    """Tables of what was measured."""
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text())
        if part in ("infer", "train"):
            yield models(file.stem, found)
        elif part == "layers":
            yield of_layers(found)
        elif part == "tune":
            yield from tuned(found)


Rows = list[dict[str, Any]]


def by_job(rows: Rows) -> Iterator[Rows]:
    jobs: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        jobs.setdefault((row["subject"], row["mode"], row["batch"], row["input"]), []).append(row)
    yield from jobs.values()


def fastest(rows: Rows, kind: str) -> dict[str, Any] | None:
    """The fastest row of a kind, which is "baseline" or "ours"."""
    return min((row for row in rows if row[kind] and row["median"]), key=lambda row: row["median"], default=None)


def models(name: str, rows: Rows) -> str:
    """Milliseconds of each provider; "alone": not yet in turns with the others. Speed: how many times as fast as the
    strongest baseline.
    """
    lines = []
    for job in by_job(rows):
        best = fastest(job, "baseline")
        for row in sorted(job, key=lambda row: row["median"] or float("inf")):
            ms = f"{row['median'] * 1000:.3g}{' (alone)' * row.get('alone', False)}" if row["median"] else row["status"]
            speed = f"{best['median'] / row['median']:.2f}x" if best and row["median"] else row["reason"][:60]
            lines.append((row["provider"] + " *" * (row is best), row["batch"], ms, speed))
    return f"## {name}\n\n{table(('provider (* strongest baseline)', 'batch', 'ms', 'speed'), lines)}"


def of_layers(rows: Rows) -> str:
    """How many layers are lost and won in each mode, and the worst of them."""
    ratios, modes = [], dict[str, list[float]]()
    for job in by_job(rows):
        theirs, ours = fastest(job, "baseline"), fastest(job, "ours")
        if theirs and ours:
            ratio = theirs["median"] / ours["median"]
            ratios.append((ratio, f"{job[0]['subject']}, {job[0]['mode']}", ours["provider"], theirs["provider"]))
            modes.setdefault(job[0]["mode"], []).append(ratio)
    counts = table(
        ("mode", "layers", "slower", "faster"),
        [(mode, len(each), sum(r < 1 for r in each), sum(r > 1 for r in each)) for mode, each in modes.items()],
    )
    worst = table(
        ("layer", "speed", "ours", "theirs"),
        [(name, f"{ratio:.2f}x", *who) for ratio, name, *who in sorted(ratios)[:10]],
    )
    wrong = [
        f"- **{row['subject']}, {row['mode']}, {row['provider']}**: {row['reason']}"
        for row in rows
        if row["status"] in ("wrong", "failed")
    ]
    open_ = sum(row["status"] == "left out" for row in rows)
    notes = [f"{open_} of {len(rows)} rows had no time"] * bool(open_) + ["\n".join(wrong[:MOST_NAMES])] * bool(wrong)
    return "\n\n".join(["## layers", counts, worst, *notes])


def tuned(found: Any) -> Iterator[str]:
    """The sentence that tune ends with, and who won where it was measured."""
    if not isinstance(found, dict) or "measured" not in found:  # the rows of the table, or what --dry-run lists
        return
    lines = []
    for entry in found["measured"]:
        if row := entry.get("row"):
            times = [
                f"{row['microseconds'][name]:.1f}" if name in row["microseconds"] else ""
                for name in ("default", "kernels", "library")
            ]
            lines.append((entry["convolution"], *times, row["winner"]))
    heads = ("convolution", "default us", "our best us", "library us", "winner")
    yield f"## tune\n\n{found.get('summary', '')}\n\n{table(heads, lines)}"


def ends_of_logs(outcome: PartOutcome, work: Path) -> Iterator[str]:
    """The last lines of the logs of what failed, of three commands a part at most."""
    for ran in [ran for ran in outcome.ran if ran.bad][:3]:
        log = work / outcome.part / f"{ran.name}.log"
        if log.exists():
            lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            yield f"## the end of {outcome.part}/{log.name}\n\n```\n{chr(10).join(lines)[-LOG_CHARACTERS:]}\n```"
