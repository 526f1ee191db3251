"""The plan of a visit: limits that fit fifteen minutes, costs that fit the limits, and a plan that is kept and is not
stale.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.visits import REPOSITORY

FOLDER = Path("FOLDER")


@pytest.fixture(scope="module")
def parts():
    from ci.visit.parts import chosen

    return chosen([], FOLDER)


@pytest.fixture(scope="module")
def kept():
    """What `--plan --json` wrote, by part."""
    from ci.visit.parts import KEPT

    return {part["part"]: part for part in json.loads((KEPT / "plan.json").read_text())["parts"]}


@pytest.fixture
def h200():
    from cnnfast_kernels import devices

    return devices.Gpu("NVIDIA H200", 90)


def test_a_visit_takes_twelve_minutes_and_no_part_more_than_eight(parts):
    assert [part.name for part in parts] == ["smoke", "tests", "demo", "infer", "train", "layers", "tune"]
    assert sum(part.limit for part in parts) <= 720
    assert max(part.limit for part in parts) <= 480


def test_every_command_has_a_stage_and_a_log_of_its_own(parts):
    for part in parts:
        names = [command.name for stage in part.stages for command in stage.commands]
        assert len(set(names)) == len(names)
    results = [name for part in parts for name in part.results]
    assert len(set(results)) == len(results) <= 6, "with the summary and the archive eight files"


def test_the_folders_of_tests_are_there():
    from ci.visit.parts import TESTS

    assert [path for path in TESTS if not (REPOSITORY / path).is_dir()] == []


def test_the_parts_that_measure_are_told_how_long_they_may(parts):
    from ci.visit.running import SECONDS

    for part in parts[3:]:
        for stage in part.stages:
            (command,) = stage.commands
            assert command.argv[command.argv.index("--budget") + 1] == SECONDS
            assert "--json" in command.argv


def test_what_is_counted_fits_the_limits(parts, kept):
    """With the time that a part is given to end in."""
    from ci.visit.running import CORES, GRACE

    assert CORES == 16
    for part in parts:
        assert kept[part.name]["seconds"] + GRACE <= part.limit, part.name


def test_the_plan_that_is_kept_is_of_these_parts(parts, kept):
    from ci.visit.plan import commands

    again = "count it again: ci/gpu.sh --plan --gpu h200 --json ci/results/visit/plan.json"
    assert list(kept) == [part.name for part in parts], again
    for part in parts:
        assert kept[part.name]["limit"] == part.limit, again
        assert kept[part.name]["commands"] == commands(part, FOLDER), again


def test_the_costs_that_are_told_are_those_of_the_plan(kept):
    from ci.visit.__main__ import costs

    told = costs()
    assert f"{kept['train']['binaries']:,} kernels to compile" in told["train"]
    assert "as modelled" in told["train"]


def test_smoke_is_counted_family_by_family(parts, h200):
    from ci.visit.plan import smoke
    from ci.visit.smoke.families import FAMILIES
    from cnnfast_kernels import devices

    of_h200, of_a100 = smoke(parts[0], h200), smoke(parts[0], devices.Gpu("NVIDIA A100-SXM4-80GB", 80))
    assert of_h200.binaries > sum(len(family.kernels) for family in FAMILIES.values())
    assert of_a100.binaries < of_h200.binaries, "there are no kernels with tensor maps"


def test_tune_is_counted_by_candidates(parts, h200):
    from ci.visit.plan import tune

    cost = tune(parts[-1], h200)
    assert cost.binaries > 100
    assert cost.timing > 0
    assert "candidates" in cost.note


def test_launchers_are_counted_by_types_alone():
    from ci.visit.launches import launchers

    def line(kernel, **arguments):
        return json.dumps({"kernel": f"cnnfast_kernels.slots:{kernel}", "arguments": arguments, "options": {}})

    half, single = {"tensor": "float16", "aligned": True}, {"tensor": "float32", "aligned": True}
    one = line("conv_wgrad_reduce_kernel", slots_ptr=half, dw_ptr=half)
    assert launchers([one, line("conv_wgrad_reduce_kernel", slots_ptr=single, dw_ptr=half)]) == 1
    assert launchers([one, line("conv_wgrad_reduce_kernel", slots_ptr=half, dw_ptr=None)]) == 2


def test_launches_that_tests_recorded_are_counted_once(tmp_path):
    from ci.visit.launches import count

    line = json.dumps(
        {"kernel": "cnnfast_kernels.slots:conv_wgrad_reduce_kernel", "arguments": {"dw_ptr": None}, "options": {}}
    )
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    count(tmp_path, tmp_path / "out" / "tests.json")
    found = json.loads((tmp_path / "out" / "tests.json").read_text())
    assert (found["launches"], found["launchers"], found["kernels"]) == (1, 1, {"conv_wgrad_reduce_kernel": 1})
