"""Which ring these tests run in, and what every test can ask for.

Rings: pure Python; Triton's interpreter on CPU tensors (where there is no CUDA GPU); a GPU. The ring is chosen here,
before anything imports triton: Triton decides at import whether kernels are interpreted.

Markers (pyproject.toml): `slow` runs only when asked for (-m slow), `gpu` needs a GPU (tests/gpu), `compiled` starts a
child process in which kernels are really compiled (see run_compiled), `cpu_tensors` hands our functions tensors of the
CPU on purpose.

Tests on a GPU make their tensors on the fixture `device`. `pytest --pretend-gpu` finds those that do not, without a GPU
(pretending.py).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

# pytest-xdist uses the cores; a BLAS or OpenMP thread pool in each of its workers would only get in the way.
for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(pool, "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.support.poison import poisoned_workspaces  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available()
pytest_plugins = ("tests.support.sticky",)  # a process whose CUDA context is broken runs no further test

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("cnnfast_kernels") is None:  # not installed: an editable install brings both packages
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]
torch.set_num_threads(1)
# float32 is multiplied as IEEE says, by PyTorch and by our kernels: on a GPU convolutions would otherwise be TF32, all
# or some of them. Tests of TF32 ask for it: cnnfast.precision.float32_products("tf32"). By PyTorch's older settings:
# torch.export still reads them.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

# The same examples on every run; an interpreted kernel has no deadline.
hypothesis.settings.register_profile("cnnfast", deadline=None, derandomize=True)
hypothesis.settings.load_profile("cnnfast")

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not HAS_GPU:
    from tests.support import interpreter

    interpreter.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--specialisations",
        metavar="FOLDER",
        help="write there what the tests launch, as Triton would compile it: for ci/specialisations.py",
    )
    parser.addoption(
        "--pretend-gpu",
        action="store_true",
        help="in the interpreter: refuse what would not work on a GPU (tests/support/pretending.py)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_gpu = pytest.mark.skip(reason="GPU ring: no CUDA GPU here")
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(skip_gpu)


@pytest.fixture(autouse=True)
def imports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test that writes Python files leaves none of them imported, and sys.path as it was: of another test's file of
    the same name nothing would be read.
    """
    path, names, written = list(sys.path), set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - names:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(written):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers of a test do not depend on the tests before it."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many branches of each argument of each function passed, in all dtypes together (test_arguments.py)."""
    counts: dict[str, Counter[str]] = {}
    for report in terminalreporter.getreports("passed"):
        _, found, name = report.nodeid.partition("test_arguments.py::test_branch[")
        if found and report.when == "call":
            function, argument, _ = name.split("-", 2)
            counts.setdefault(function, Counter())[argument] += 1
    if counts:
        terminalreporter.section("branches that passed, of each argument")
    for function, arguments in sorted(counts.items()):
        each = ", ".join(f"{argument} {count}" for argument, count in arguments.items())
        terminalreporter.write_line(f"{function}: {each}; in all {arguments.total()}")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where this ring's tensors live: the GPU, or the CPU for the interpreter."""
    if pytestconfig.getoption("pretend_gpu"):
        return torch.device("cpu", 0)
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """What a test launched has ended with it: an error on the GPU is its own, not the next test's."""
    yield
    if HAS_GPU:
        torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def pretended(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --pretend-gpu, tensors on `device` and on the CPU are told apart, and no test may hand ours the CPU's by
    mistake.
    """
    if HAS_GPU or not HAS_TRITON or not request.config.getoption("pretend_gpu"):
        yield
        return
    from tests.support.pretending import BLIND_TESTS, pretended_gpu

    if any(name in request.node.nodeid for name in BLIND_TESTS):
        pytest.skip("pretended GPU: functorch does not see where a tensor is")
    on_purpose = request.node.get_closest_marker("cpu_tensors") is not None
    with pretended_gpu(launch_anywhere=on_purpose) as gpu:
        yield
    if gpu.served_by_torch and not on_purpose:
        calls = ", ".join(gpu.served_by_torch[:5])
        pytest.fail(f"on a GPU PyTorch would serve these calls, whose tensors are on the CPU: {calls}")


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """The package; the tests of what it defines are skipped where it is not installed."""
    from tests.support.packages import package

    return package("torchvision")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Workspaces and outputs are full of NaN before a kernel writes to them."""
    with poisoned_workspaces() if HAS_TRITON else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="session")
def specialisations(pytestconfig: pytest.Config) -> Iterator[None]:
    """With --specialisations FOLDER, what this process launches is written there at its end."""
    folder = pytestconfig.getoption("specialisations")
    if folder is None:
        yield
        return
    from tests.support.specialisations import recorded

    with recorded(Path(folder)):
        yield


@pytest.fixture(autouse=True, scope="session")
def kernels_serve() -> Iterator[None]:
    """On a GPU too our kernels serve what was not measured: they are what is tested. Elsewhere they do by default."""
    with pytest.MonkeyPatch.context() as patch:
        if HAS_TRITON:
            from cnnfast.ops import serving

            patch.setattr(serving, "LIBRARY_FIRST", ())
        yield


@pytest.fixture(autouse=True, scope="session")
def no_tables_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run by defaults, whatever was tuned on this machine."""
    from cnnfast_kernels import tables

    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "user_folder", lambda: folder)
        yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: torch.device) -> Iterator:
    """The devices.Gpu whose tables hold for tensors on `device`: the one there is, or a name for the interpreter.
    It has no rows yet.
    """
    from cnnfast_kernels import devices, launch, tables

    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path / "user")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(devices, "NO_GPU", devices.Gpu("A GPU, 80 GB", 90))

    def forget() -> None:
        tables.forget()
        launch.forget_plans()

    forget()
    yield devices.gpu(device)
    forget()


@pytest.fixture
def library_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of this ring are decided about as a GPU's are: the library serves convolutions that were not
    measured.
    """
    pytest.importorskip("triton")
    from cnnfast.ops import serving

    monkeypatch.setattr(serving, "LIBRARY_FIRST", ("cpu", "cuda"))


@pytest.fixture
def launches() -> Iterator[list]:
    """The launch.Launched of every kernel started during the test, in order."""
    from cnnfast_kernels import launch

    seen: list[launch.Launched] = []
    with launch.observe(seen.append):
        yield seen
