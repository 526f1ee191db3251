"""ci/gpu.sh (ci/visit): parts run to their limits, and whatever ends a visit, what it had is left. Parts are made up
here.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.child import REPOSITORY, environment
from tests.support.visits import Fake, interrupt, left, log, run, start, states, until

MEASURES = (
    "import json, time; from pathlib import Path; "
    "Path('WORK/{0}.json').write_text(json.dumps([{1}])); print('measured', flush=True)"
)
SLEEPS = "; time.sleep(60)"
DEAF = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(60)
"""
ALWAYS = {"summary.md", "visit.tar.gz"}


def measuring(name: str, number: int = 1, then: str = "") -> Fake:
    return Fake(name, MEASURES.format(name, number) + then)


def test_all_parts_leave_their_files_and_the_summary_comes_last(tmp_path):
    code, output = run([measuring("one", 1), measuring("two", 2)], tmp_path / "out")
    assert code == 0
    found = left(tmp_path / "out")
    assert found.files == ALWAYS | {"one.json", "two.json"}
    assert json.loads((tmp_path / "out" / "two.json").read_text()) == [2]
    assert set(found.members) == {"visit.json", "one/one.json", "one/one.log", "two/two.json", "two/two.log"}
    assert found.members["one/one.log"].splitlines()[-1] == "measured"
    assert found.states == {"one": "passed", "two": "passed"}
    assert (
        output.index("=== one: a made-up part; 30 s at most")
        < output.index("=== one: passed")
        < output.index("=== two: a made-up")
    )
    assert output.rstrip().endswith("one.json, summary.md, two.json, visit.tar.gz")
    assert found.summary in output
    assert "a made-up GPU, cnnfast at abc" in found.summary


def test_files_are_left_after_each_part(tmp_path):
    """While the second one runs, those of the first are there."""
    process = start([measuring("one"), Fake("two", "import time; time.sleep(60)")], tmp_path)
    until(lambda: states(tmp_path).get("two") == "running")
    found = left(tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert found.states == {"one": "passed", "two": "running"}
    assert found.files == ALWAYS | {"one.json"}
    assert "one/one.log" in found.members


def test_what_fails_is_named_and_the_next_part_runs(tmp_path):
    code, output = run([Fake("bad", "print('the reason'); raise SystemExit(3)"), measuring("two")], tmp_path)
    assert code == 1
    found = left(tmp_path)
    assert found.states == {"bad": "failed", "two": "passed"}
    assert "**bad**: failed, exit code 3" in found.summary
    assert "the end of bad/bad.log" in found.summary
    assert "the reason" in found.summary
    assert found.summary in output


def test_a_signal_that_ends_a_part_is_named(tmp_path):
    code, _ = run([Fake("bad", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")], tmp_path)
    assert code == 1
    assert "**bad**: failed, ended by SIGSEGV" in left(tmp_path).summary


def test_a_part_is_asked_to_end_before_its_limit_and_writes_what_it_has(tmp_path):
    stops = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what it had')"
    begun = time.monotonic()
    code, _ = run([Fake("slow", stops, limit=4.0), Fake("two")], tmp_path)
    assert time.monotonic() - begun < 20
    found = left(tmp_path)
    assert code == 1
    assert found.states == {"slow": "out of time", "two": "passed"}
    assert "what it had" in found.members["slow/slow.log"]
    assert "**slow**: out of time, asked to end after 3 s, which ended it" in found.summary


def test_a_part_that_hears_no_signal_is_killed_at_its_limit_and_named(tmp_path):
    begun = time.monotonic()
    code, _ = run([Fake("deaf", DEAF, limit=4.0), measuring("two")], tmp_path)
    assert 3 < time.monotonic() - begun < 20
    found = left(tmp_path)
    assert code == 1
    assert found.states == {"deaf": "out of time", "two": "passed"}
    assert "**deaf**: out of time, asked to end after 3 s, and it did not end by SIGINT" in found.summary
    seconds = next(entry["seconds"] for entry in json.loads(found.members["visit.json"]) if entry["part"] == "deaf")
    assert seconds < 6.0


def test_what_a_part_leaves_running_is_ended(tmp_path):
    code = (
        "import subprocess, sys; "
        "print('child', subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    )
    run([Fake("parent", code)], tmp_path)
    child = int(left(tmp_path).members["parent/parent.log"].split()[-1])
    until(lambda: ended(child))


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupted_in_the_middle_of_a_part(tmp_path, number):
    parts = [measuring("one"), measuring("two", 2, SLEEPS), Fake("three")]
    code, output = interrupt(parts, tmp_path, "=== two: a made-up part", number)
    assert code == 130
    found = left(tmp_path)
    assert found.states["one"] == "passed"
    assert found.states["two"] in ("interrupted", "not begun")
    assert found.states["three"] == "not begun"
    assert "one.json" in found.files
    assert "| three | not begun | 0 | 30 | the visit was interrupted |" in found.summary
    assert found.summary in output


def test_what_was_measured_before_the_interrupt_is_kept(tmp_path):
    process = start([measuring("one", 7, SLEEPS)], tmp_path)
    until(lambda: "measured" in log(tmp_path, "one"))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    found = left(tmp_path)
    assert process.returncode == 130
    assert found.states == {"one": "interrupted"}
    assert json.loads((tmp_path / "one.json").read_text()) == [7]
    assert "measured" in found.members["one/one.log"]
    assert "KeyboardInterrupt" in found.members["one/one.log"], "it was asked to end, not killed"


def test_interrupted_between_two_parts(tmp_path):
    code, _ = interrupt([measuring("one"), Fake("two", "import time; time.sleep(60)")], tmp_path, "=== one: passed")
    found = left(tmp_path)
    assert code == 130
    assert found.states["one"] == "passed"
    assert found.states["two"] in ("interrupted", "not begun")


def test_a_second_interrupt_does_not_wait(tmp_path):
    process = start([Fake("deaf", DEAF)], tmp_path, grace=20.0)
    until(lambda: log(tmp_path, "deaf").endswith("deaf\n"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert time.monotonic() - begun < 5
    assert left(tmp_path).states == {"deaf": "interrupted"}


def test_a_visit_that_is_killed_has_left_what_it_had(tmp_path):
    """Nobody can react to SIGKILL: the files were written before. The part's own process ends too."""
    process = start(
        [
            measuring("one"),
            Fake("two", f"import os; print(os.getpid(), flush=True); {MEASURES.format('two', 2)}{SLEEPS}"),
        ],
        tmp_path,
    )
    until(lambda: "measured" in log(tmp_path, "two"))
    process.kill()
    process.communicate(timeout=60)
    found = left(tmp_path)
    assert found.states == {"one": "passed", "two": "running"}
    assert {"one.json", "two.json"} <= found.files
    assert "measured" in found.members["two/two.log"]
    until(lambda: ended(int(found.members["two/two.log"].splitlines()[1])))


def test_another_visit_keeps_the_parts_that_it_does_not_run(tmp_path):
    run([measuring("one", 1), measuring("two", 2)], tmp_path)
    code, _ = run([measuring("two", 3), measuring("three", 4)], tmp_path)
    assert code == 0
    found = left(tmp_path)
    assert found.states == {"one": "passed", "two": "passed", "three": "passed"}
    assert [found.members[f"{name}/{name}.json"] for name in ("one", "two", "three")] == ["[1]", "[3]", "[4]"]


def test_a_part_that_runs_again_and_measures_nothing_leaves_no_old_rows(tmp_path):
    run([measuring("one", 1)], tmp_path)
    assert "one.json" in left(tmp_path).files
    run([Fake("one", "raise SystemExit(1)")], tmp_path)
    assert left(tmp_path).files == ALWAYS


def test_what_is_not_begun_keeps_what_an_earlier_visit_had(tmp_path):
    run([measuring("two", 2)], tmp_path)
    code, output = run([Fake("one", "import time; time.sleep(2)"), measuring("two", 3)], tmp_path, budget=6.0)
    assert code == 0
    assert "=== two: not begun, the budget was used up" in output
    found = left(tmp_path)
    assert found.states == {"two": "passed", "one": "passed"}
    assert found.members["two/two.json"] == (tmp_path / "two.json").read_text() == "[2]"


def test_a_part_of_a_killed_visit_is_called_so_in_the_next(tmp_path):
    process = start([Fake("one", "import time; time.sleep(60)")], tmp_path)
    until(lambda: states(tmp_path) == {"one": "running"})
    process.kill()
    process.communicate(timeout=60)
    run([Fake("two")], tmp_path)
    assert left(tmp_path).states == {"one": "killed", "two": "passed"}


def test_what_no_time_is_left_for_is_not_begun(tmp_path):
    code, _ = run([Fake("one", "import time; time.sleep(2)"), Fake("two")], tmp_path, budget=6.0)
    assert code == 0
    assert left(tmp_path).states == {"one": "passed", "two": "not begun"}
    assert "| two | not begun | 0 | 30 | the budget was used up |" in left(tmp_path).summary


def test_later_parts_say_what_smoke_found(tmp_path):
    code, output = run([Fake("smoke", "raise SystemExit(1)"), Fake("two")], tmp_path)
    assert code == 1
    assert "| two | passed | 0 | 30 | smoke had found trouble with smoke |" in left(tmp_path).summary
    assert output.index("smoke had found trouble with smoke") > output.index("=== two: a made-up part")


def test_a_long_summary_is_cut(tmp_path):
    run([Fake(f"part{i}", f"print('{'x' * 3000}'); raise SystemExit(1)") for i in range(8)], tmp_path)
    found = left(tmp_path)
    assert len(found.summary) < 12_000
    assert found.summary.rstrip().endswith("(More is in visit.tar.gz.)")
    assert "| part7 | failed |" in found.summary


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["smoke", "nosuch"], "'nosuch' is none of smoke, tests, demo, infer, train, layers, tune"),
        (["--budget", "0"], "0.0 is no duration: give a positive number of seconds"),
        (["--budget", "nan"], "nan is no duration"),
        (["--plan", "--gpu", "h9"], "'h9' is none of"),
        (["--gpu", "h100"], "add --plan or --recorded"),
        (["--plan", "--recorded"], "give one of the two"),
        (["--json", "x.json"], "it is of --plan"),
        (["--plan", "--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--out", __file__], "is a file: name a folder"),
        (["--recorded", "--out", "/proc/no-such-folder"], "/proc/no-such-folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, sentence):
    child = subprocess.run(
        ["bash", str(REPOSITORY / "ci" / "gpu.sh"), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 2
    said = " ".join(child.stderr.replace("│", " ").split())
    assert sentence in said
    assert child.stdout == ""


def test_an_archive_of_something_else_is_refused(tmp_path):
    (tmp_path / "visit.tar.gz").write_text("no archive")
    command = ["bash", str(REPOSITORY / "ci" / "gpu.sh"), "--recorded", "--out", str(tmp_path), "tune"]
    child = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 2
    assert "is not what a visit leaves" in " ".join(child.stderr.replace("│", " ").split())
    assert (tmp_path / "visit.tar.gz").read_text() == "no archive"
