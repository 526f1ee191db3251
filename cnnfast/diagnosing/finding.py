"""What doctor says about one thing, and all that it says, for people and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

State = Literal["ok", "note", "broken"]

STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "broken": "bold red"}
WIDTH = 120  # of str(diagnosis)
MOST_COMMANDS = 3  # that are named as what to do next


class Command(NamedTuple):
    """A line for the shell, and what it is good for."""

    line: str
    why: str


AGAIN = Command("cnnfast doctor", "again, to see that all is mended")


@dataclass(frozen=True)
class Finding:
    """What is known of one thing.

    topic: the heading that it stands under. state: "ok"; "note", which is worth knowing but makes nothing fail; or
    "broken". text: what is known; of something broken also why it matters. advice: what to do, "" if nothing has to be
    done. command: a line that does it.
    """

    topic: str
    name: str
    state: State
    text: str
    advice: str = ""
    command: Command | None = None


class Diagnosis:
    """All findings, in the order of the topics, and what to do next.

    otherwise: commands that are worth running if nothing is broken.
    """

    def __init__(self, findings: Sequence[Finding], otherwise: Sequence[Command] = ()) -> None:
        self.findings = list(findings)
        self.otherwise = list(otherwise)

    @property
    def broken(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.state == "broken"]

    @property
    def ok(self) -> bool:
        return not self.broken

    @property
    def commands(self) -> list[Command]:
        """What to run next, at most MOST_COMMANDS. If something is broken: what mends it, and then doctor again."""
        if self.ok:
            found = [finding.command for finding in self.findings] + self.otherwise
        else:
            found = [finding.command for finding in self.broken][: MOST_COMMANDS - 1] + [AGAIN]
        return list({command.line: command for command in found if command is not None}.values())[:MOST_COMMANDS]

    def to_json(self) -> str:
        """An object with ok, findings and commands."""
        commands = [command._asdict() for command in self.commands]
        findings = [{**asdict(f), "command": f.command.line if f.command else None} for f in self.findings]
        return json.dumps({"ok": self.ok, "findings": findings, "commands": commands}, indent=1)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        for topic in dict.fromkeys(finding.topic for finding in self.findings):
            parts += [
                Text(topic, "bold"),
                _listed([finding for finding in self.findings if finding.topic == topic]),
                Text(),
            ]
        if self.broken:
            parts.append(Text(f"{len(self.broken)} broken:", STYLES["broken"]))
            parts += [Text(f"- {f.name}: {f.text} {f.advice}".rstrip()) for f in self.broken]
        else:
            parts.append(Text("Nothing is broken.", STYLES["ok"]))
        if self.commands:
            parts += [Text(), Text("Next:", "bold")]
            for command in self.commands:
                parts += [Text(f"  {command.line}", "bold cyan"), Text(f"      {command.why}")]
        return Group(*parts)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False).print(self)
        return text.getvalue().rstrip()


def _listed(findings: Sequence[Finding]) -> Table:
    """One line for each finding, and below it what to do about it."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(max_width=36, overflow="fold")
    table.add_column(overflow="fold")
    for f in findings:
        said = Text(f.text)
        if f.advice:
            said.append(f"\n{f.advice}", "italic")
        table.add_row(Text(f"  {f.state}", STYLES[f.state]), Text(f.name), said)
    return table


def in_a_line(text: object, longest: int = 300) -> str:
    """A message in one line, cut after `longest` characters."""
    words = " ".join(str(text).split())
    return words if len(words) <= longest else words[: longest - 4] + " ..."
