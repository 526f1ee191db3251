"""How cnnfast is installed: what pip resolves, what is built, and what runs where only the wheel is.

pip resolves without installing or downloading (--dry-run), for the Python whose torch is a CUDA build and for the one
whose torch is a CPU build, whichever those are on the indexes that it asks.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email import message_from_bytes
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from cnnfast.__main__ import app
from cnnfast_kernels import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CONSTRAINTS = {
    r.name: r
    for line in (REPOSITORY / "ci" / "constraints.txt").read_text().splitlines()
    if line[0] != "#"
    for r in [Requirement(line)]
}
REQUIREMENTS = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
# The commands of README's first fenced block, which ci/check.sh runs.
README_LINES = (REPOSITORY / "README.md").read_text().split("```")[1].strip().splitlines()
COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]


def run(*command: str | Path, cwd: Path = REPOSITORY, environment: dict[str, str] | None = None) -> str:
    """What the command prints. Fails with its output if it fails."""
    child = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode == 0, (
        f"{shlex.join(map(str, command))} ended with {child.returncode}\n{child.stdout}\n{child.stderr}"
    )
    return child.stdout


# --- What pip resolves ------------------------------------------------------------------------------------------------


def pip_report(*arguments: str) -> dict[str, dict]:
    """The metadata of every distribution that `pip install` with these arguments would install, by name."""
    # Not by importing pip: its import takes setuptools' distutils away from this process, and torch.compile needs that.
    if Version(version("pip")) < Version("23.3"):
        pytest.skip("pip before 23.3 resolves by downloading whole wheels")
    output = run(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *arguments)
    return {item["metadata"]["name"]: item["metadata"] for item in json.loads(output)["install"]}


def elsewhere(python: str, folder: Path) -> list[str]:
    """Options by which pip resolves for another Python, as for an environment without any package."""
    return ["--python-version", python, "--only-binary=:all:", "--target", str(folder), "--retries=1", "--timeout=30"]


def own_triton(torch: dict) -> list[Requirement]:
    """The triton that a build of torch asks for: CUDA builds ask for one, CPU builds for none."""
    return [
        r
        for r in map(Requirement, torch.get("requires_dist", []))
        if r.name == "triton" and (r.marker is None or r.marker.evaluate())
    ]


@cache
def python_of(build: str) -> str:
    """A version of Python for which pip finds a CUDA or a CPU build of the torch that CI tests with, and what builds
    cnnfast.

    Skips where there is none: without a network, say.
    """
    for python in ("3.11", "3.12", "3.13"):
        try:
            found = pip_report(
                "--no-deps", *elsewhere(python, Path("never-written")), str(CONSTRAINTS["torch"]), "hatchling"
            )
        except AssertionError as error:
            if not re.search("No matching distribution|ResolutionImpossible", str(error)):
                raise
        else:
            if build == ("CUDA" if own_triton(found["torch"]) else "CPU"):
                return python
    pytest.skip(f"no index that pip asks here offers a {build} build of {CONSTRAINTS['torch']}, and hatchling")


def test_the_readme_begins_with_the_two_commands():
    assert [line.partition(" && ")[0] for line in README_LINES] == [
        'pip install -c ci/constraints.txt ".[demo]"',
        'pip install -c ci/constraints.txt -e ".[test]"',
    ]


@pytest.mark.parametrize("build", ["CUDA", "CPU"])
@pytest.mark.parametrize("line", README_LINES)
def test_the_readme_installs(line, build, tmp_path):
    """With a CUDA build of torch the triton is the one that it asks for, with a CPU build the newest that cnnfast
    allows.
    """
    pip, install, *arguments = shlex.split(line.partition(" && ")[0])
    assert (pip, install) == ("pip", "install")
    found = pip_report(*elsewhere(python_of(build), tmp_path / "nothing"), *arguments)
    assert found["cnnfast"]["version"] == __version__
    assert Version(found["torch"]["version"]).public == "2.13.0"
    if build == "CUDA":
        (asked,) = own_triton(found["torch"])
        assert str(asked.specifier) == "==3.7.1"
        assert found["triton"]["version"] == "3.7.1"
    else:
        assert own_triton(found["torch"]) == []
        assert Version(found["triton"]["version"]).release[:2] == (3, 9)
    wanted = {name for name, requirement in CONSTRAINTS.items() if name in {item.lower() for item in found}}
    assert {name: found[name]["version"].partition("+")[0] for name in wanted} == {
        name: pinned(name) for name in wanted
    }


def pinned(name: str) -> str:
    (specifier,) = CONSTRAINTS[name].specifier
    return specifier.version


def test_constraints_name_every_requirement_but_triton():
    """So that CI tests the same versions every day. triton is torch's to choose, and an extra's name is no
    distribution.
    """
    extras = [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]
    assert set(CONSTRAINTS) == {*REQUIREMENTS, *(extra.name for extra in extras)} - {"triton", "cnnfast"}
    assert all(
        len(requirement.specifier) == 1 and str(requirement.specifier).startswith("==")
        for requirement in CONSTRAINTS.values()
    )


def test_a_torch_that_is_there_stays():
    """README's `pip install .`: here all requirements are met already, and cnnfast alone would be installed."""
    pytest.importorskip("hatchling", reason="hatchling is not installed, and this asks no index")
    found = pip_report("--no-index", "--no-build-isolation", "--ignore-requires-python", ".")
    assert set(found) <= {"cnnfast"}


def test_the_tritons_of_the_gate():
    """The oldest, the one of CUDA builds and the newest: what is required, ci/check.sh, ci/aot_matrix.py and README
    agree on them.
    """
    gate = dict(
        re.findall(r"^(oldest|from_torch|newest)=([\d.]+)$", (REPOSITORY / "ci" / "check.sh").read_text(), re.MULTILINE)
    )
    tritons = list(map(Version, (gate["oldest"], gate["from_torch"], gate["newest"])))
    assert str(REQUIREMENTS["triton"].specifier) == f"<3.{tritons[2].minor + 1},>=3.{tritons[0].minor}"
    assert tritons == sorted(tritons)
    listed = re.search(r"^TRITONS = (.*)$", (REPOSITORY / "ci" / "aot_matrix.py").read_text(), re.MULTILINE)
    assert listed
    assert list(ast.literal_eval(listed[1])) == list(gate.values())
    assert (
        f"torch 2.11 or newer, triton 3.{tritons[0].minor} to 3.{tritons[2].minor}"
        in (REPOSITORY / "README.md").read_text()
    )
    assert str(REQUIREMENTS["torch"].specifier) == ">=2.11"


def test_messages_install_from_a_clone():
    """cnnfast is on no index: what a message says to install of it is the folder, with an extra that it has."""
    hints = [
        (path.name, hint)
        for folder in ("cnnfast", "kernels")
        for path in (REPOSITORY / folder).rglob("*.py")
        for hint in re.findall(r"""pip install ((?:-\S+ )*['"\\]*[.\w][^\s'"\\]*)""", path.read_text())
    ]
    assert {name for name, _ in hints} >= {"bench.py", "demo.py"}
    for name, hint in hints:
        assert "cnnfast" not in hint, f"{name}: pip install {hint}"
        for extra in re.findall(r"\.\[(\w+)\]", hint):
            assert extra in PROJECT["optional-dependencies"], f"{name}: pip install {hint}"


# --- What is built ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), built from this tree without asking an index."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def files_of(*folders: str) -> set[str]:
    """Every file below these folders, as seen from the tree, but for what Python and its tools leave there."""
    found = {
        path.relative_to(REPOSITORY)
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file()
    }
    return {
        path.as_posix()
        for path in found
        if path.suffix != ".pyc" and not any(part.startswith(".") for part in path.parts)
    }


def names_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_both_packages_whole_and_nothing_else(built):
    names = names_in(built[0])
    assert names == {name.removeprefix("kernels/") for name in files_of("cnnfast", "kernels")}
    assert names >= {"cnnfast/py.typed", "cnnfast_kernels/py.typed", "cnnfast_kernels/resources/triton-3.7/sm_90.csv"}


def test_tables_of_measured_tiles_are_in_the_wheel(tmp_path):
    """There may be none in this tree yet: one is put into a copy of what the wheel is made of."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    for name in ("README.md", "LICENSE", "pyproject.toml", ".gitignore"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("cnnfast", "kernels"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "kernels" / "cnnfast_kernels" / "tables" / "nvidia-h200-sm_90"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "planted.json").write_text("{}")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert "cnnfast_kernels/tables/nvidia-h200-sm_90/planted.json" in names_in(wheel)


def test_what_the_wheel_says_of_itself(built):
    """One version, which the sources hold and CHANGELOG.md describes."""
    with zipfile.ZipFile(built[0]) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        about = message_from_bytes(wheel.read(metadata))
        assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    assert about["Version"] == __version__
    newest = re.search(r"^## (\S+) - \d{4}-\d\d-\d\d$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == __version__
    required = {Requirement(text).name for text in about.get_all("Requires-Dist", []) if "extra ==" not in text}
    assert required == set(REQUIREMENTS)
    assert about["License-Expression"] == "MIT"
    assert (
        about["Author"]
        == re.search(r"^Copyright \(c\) \d+ (.*)$", (REPOSITORY / "LICENSE").read_text(), re.MULTILINE)[1]
    )  # type: ignore[index]


def test_the_sdist_builds_the_same_wheel_and_brings_the_tests(built, tmp_path):
    wheel, sdist = built
    shutil.unpack_archive(sdist, tmp_path)
    (tree,) = tmp_path.iterdir()
    names = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    top = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"}
    whole = files_of("cnnfast", "kernels", "tests", "benchmarks", "ci") | top
    assert names - {"PKG-INFO", ".gitignore"} == whole
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again", cwd=tree)
    (again,) = (tmp_path / "again").iterdir()
    assert again.name == wheel.name
    assert names_in(again) == names_in(wheel)


# --- What runs where only the wheel is --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment in which the wheel is installed, and which borrows all other packages from this
    one.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    scripts, packages = Path(paths["scripts"]), Path(paths["purelib"])
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        scripts / "python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        built[0],
    )
    borrowed = [path for path in sys.path if path and Path(path).is_dir() and not Path(path).is_relative_to(REPOSITORY)]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return scripts


@pytest.fixture
def alone(installed, tmp_path):
    """Runs one of the environment's scripts in an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"COLUMNS": "200", "TERM": "dumb"}

    def call(script: str, *arguments: str) -> str:
        return run(installed / script, *arguments, cwd=tmp_path, environment=environment)

    return call


def test_every_module_of_the_wheel_is_imported(alone, installed):
    script = """
import importlib, pathlib, pkgutil, cnnfast, cnnfast_kernels
for package in cnnfast, cnnfast_kernels:
    print(pathlib.Path(package.__file__).parent.parent)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(("__main__", ".worker")):  # these are programs
            importlib.import_module(module.name)
"""
    places = alone("python", "-c", script).splitlines()
    assert len(places) == 2
    assert all(Path(place).is_relative_to(installed.parent) for place in places)


def test_the_command_of_the_wheel(alone):
    assert alone("cnnfast", "--version").strip() == f"cnnfast {__version__}"
    listed = alone("cnnfast", "--help")
    for command in COMMANDS:
        assert command in listed
        assert f"Usage: cnnfast {command}" in alone("cnnfast", command, "--help")


def test_the_wheel_describes_a_model(alone):
    assert "11,689,512" in alone("cnnfast", "info", "resnet18")
