"""What a type checker sees: pyright over typed_user_code.py flags the lines that are wrong, and no other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support.child import environment

USER_CODE = Path(__file__).with_name("typed_user_code.py")


def test_pyright_over_user_code():
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(USER_CODE)]
    child = subprocess.run(
        command, cwd=USER_CODE.parents[2], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert child.stdout, child.stderr
    lines = USER_CODE.read_text().splitlines()
    marks = [re.search(r"  # flagged: (.*)$", line) for line in lines]
    expected = {(i, rule) for i, mark in enumerate(marks) if mark for rule in mark.group(1).split(", ")}
    told = {
        (diagnostic["range"]["start"]["line"], diagnostic.get("rule", "")): diagnostic["message"]
        for diagnostic in json.loads(child.stdout)["generalDiagnostics"]
    }
    assert len(expected) > 20
    assert [f"{lines[i]}: no {rule}" for i, rule in sorted(expected - told.keys())] == []
    assert [f"{lines[i]}: {rule}: {told[i, rule]}" for i, rule in sorted(told.keys() - expected)] == []
