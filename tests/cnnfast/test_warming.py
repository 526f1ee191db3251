"""warm: that a fresh process compiles nothing afterwards, what it finds, what it leaves alone, and how its processes
may end.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton import knobs

import cnnfast
from cnnfast import calls, dispatch, warming, workers
from cnnfast.ops import plain
from cnnfast.precision import float32_products
from cnnfast_kernels import devices, launch
from tests.support.child import run_compiled
from tests.support.specialisations import described_launches

SM_90 = devices.Gpu("", 90)
LAST = torch.channels_last


class Net(nn.Module):
    """Fused blocks, one with a residual, a depthwise convolution, pools of all kinds, a convolution without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.alone = nn.Conv2d(16, 24, 1)
        self.pools = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        return self.fc(self.pools(self.alone(self.depthwise(torch.relu(y)))).flatten(1))


class Branching(Net):
    """Cannot run on tensors that hold nothing."""

    def forward(self, x):
        x = super().forward(x)
        return x * 2 if x.sum() > 1e9 else x


def image(batch=2):
    return torch.randn(batch, 3, 16, 16).to(memory_format=LAST)


# ----------------------------------------------------------------------------------------------------------------------
# What would be launched


needs_interpreter = pytest.mark.skipif(
    not launch.INTERPRETED, reason="a GPU's launches are not written down: plans launch by themselves"
)
CASES = [
    ("infer", Net, False),
    ("train", Net, True),
    ("branching, infer", Branching, False),
    ("branching, train", Branching, True),
]


@needs_interpreter
@pytest.mark.parametrize(("model", "train"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_found_is_what_a_call_launches(model, train):
    """To the last line: kernels, tiles, absent operands, strides."""
    model = cnnfast.convert(model(), memory_format=LAST).train(train)
    x = image()
    with float32_products("ieee"):  # meta tensors stand for a GPU's, which would be TF32 by default
        found = warming.launches(model, x, train=train, gpu=devices.NO_GPU, device_type="cpu")
        with described_launches() as launched, torch.set_grad_enabled(train):
            y = model(x)
            if train:
                y.sum().backward()
    assert set(found) == set(launched)
    assert len(found) > 5


def test_nothing_is_launched_or_compiled(launches):
    found = warming.launches(Net(), image(), train=True, gpu=SM_90)
    assert launches == []
    assert {json.loads(line)["kernel"].rpartition(":")[2] for line in found} > {"conv_dgrad_kernel", "max_pool_kernel"}


def test_the_modes_of_members_are_kept():
    """A frozen batch norm in a network that trains normalises by its running statistics."""
    model = Net().train()
    trained = warming.launches(model, image(), train=True, gpu=SM_90)
    model.bn1.eval()
    assert set(warming.launches(model, image(), train=True, gpu=SM_90)) != set(trained)
    assert warming.launches(model.eval(), image(), train=True, gpu=SM_90) == trained


def test_settings_in_force_count():
    """backend("kernels") keeps the library away, "torch" our kernels; on a GPU nothing was measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnfast.ops.serving.LIBRARY_FIRST", ("cuda",))

        def kernels():
            found = warming.launches(Net(), image(), gpu=SM_90)
            return {json.loads(line)["kernel"].rpartition(":")[2] for line in found}

        assert not any(name.startswith("conv_fprop") for name in kernels())
        with dispatch.backend("kernels"):
            assert any(name.startswith("conv_fprop") for name in kernels())
        with dispatch.backend("torch"):
            assert kernels() == set()


def test_autocast_is_followed():
    """On the device that it is on: meta tensors know of none."""
    with torch.autocast("cpu", torch.float16):
        found = warming.launches(Net(), image(), gpu=SM_90, device_type="cpu")
    half = [line for line in found if '"x_ptr": {"tensor": "float16"' in line]
    assert any("conv_fprop_kernel" in line for line in half)
    with (
        pytest.raises(
            RuntimeError, match="Net does not run on 2x3x16x16 under autocast unless all of it is on the xpu"
        ),
        torch.autocast("xpu", torch.float16),
    ):
        calls.operator_calls(Net(), (image(),), train=False, gpu=SM_90, device_type="xpu")


def test_a_resnet50_has_more_than_a_hundred_kernels_to_compile():
    """For its first training step by our kernels alone."""
    model = cnnfast.models.resnet50().bfloat16().to(memory_format=LAST)
    x = torch.empty(64, 3, 224, 224, dtype=torch.bfloat16, device="meta").to(memory_format=LAST)
    with dispatch.backend("kernels"):
        assert len(warming.launches(model, x, train=True, gpu=SM_90)) > 100


@pytest.mark.parametrize("model", [Net, Branching])
def test_the_model_and_random_numbers_stay_as_they_are(model):
    model = cnnfast.convert(model()).train()
    model.bn1.eval()  # frozen by its user: found so, and left so
    x = image().requires_grad_()
    model(x).sum().backward()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    versions = [t._version for t in model.state_dict().values()]
    state, of_x = torch.get_rng_state(), x.grad.clone()
    found = warming.launches(model, x, train=True, gpu=SM_90, device_type="cpu")
    assert any("normalize" in line for line in found)
    assert not model.bn1.training
    assert model.bn2.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert versions == [t._version for t in model.state_dict().values()]
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(of_x, x.grad)


def test_what_wrappers_wrap_is_run():
    """DistributedDataParallel copies its module and waits for others; torch.compile's cannot be converted any more."""
    model = cnnfast.convert(Net()).train()
    expected = warming.launches(model, image(), train=True, gpu=SM_90)
    assert warming.launches(torch.compile(model), image(), train=True, gpu=SM_90) == expected
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        assert warming.launches(nn.parallel.DistributedDataParallel(model), image(), train=True, gpu=SM_90) == expected
    finally:
        dist.destroy_process_group()


def test_a_model_that_does_not_run_is_named():
    with pytest.raises(RuntimeError, match=r"Net does not run on 2x5x16x16: RuntimeError: .*channels"):
        warming.launches(Net(), torch.zeros(2, 5, 16, 16, device="meta"), gpu=SM_90)


def test_pytorch_computes_every_forward_operator():
    """Numbers that a model may branch on: as many results as the operator has, of the same sizes."""
    assert set(calls.FORWARD) <= set(dir(plain)) & set(calls.OPERATORS)
    x = image()
    whole, taps = calls._by_pytorch("max_pool", (x, True, (3, 3), (2, 2), (1, 1), (1, 1), False))
    assert torch.equal(whole, torch.nn.functional.max_pool2d(x, 3, 2, 1))
    assert taps.shape == whole.shape
    assert not taps.any()
    y, mean, var = calls._by_pytorch(
        "conv_stats", (x, torch.ones(4, 3, 1, 1), None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "auto")
    )
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(var, y.var((0, 2, 3), correction=0))


def test_where_pytorch_serves_there_is_nothing_to_compile():
    done = cnnfast.warm(Net(), image())
    assert done.kernels == 0
    assert done.ok
    assert str(done).startswith("nothing to compile: ")
    assert "hold a tensor" in cnnfast.warm(nn.ReLU(), "no tensor").reason


def without_triton():
    import sys

    sys.modules["triton"] = None
    import torch

    import cnnfast

    return str(cnnfast.warm(torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)))


def test_without_triton_it_says_so():
    """As on macOS and Windows, where a script that warms its model shall run too."""
    assert (
        run_compiled(without_triton) == "nothing to compile: PyTorch serves every call, because triton is not installed"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.fixture
def fake_worker(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "WORKER", "tests.support.fake_worker")
    monkeypatch.setattr(workers, "require_compiled_kernels", lambda: None)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))


def lines(*names):
    return [json.dumps({"kernel": f"a.module:{name}"}) for name in names]


def test_every_kernel_is_compiled_once_and_counted(fake_worker):
    seen = []
    done = workers.compile_ahead(
        lines("a", "b", "a", "c"), SM_90, jobs=2, progress=lambda done, total: seen.append((done, total))
    )
    assert (done.kernels, done.failures, done.reason) == (3, (), "")
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert str(done).startswith("3 kernels compiled in ")
    assert "no kernel" in workers.compile_ahead([], SM_90).reason


def test_what_does_not_compile_is_named_and_a_process_that_dies_is_replaced(fake_worker):
    done = workers.compile_ahead(lines("wrong", "dies", "dies_too", "right", "wrong_too"), SM_90, jobs=1)
    assert done.kernels == 1
    assert not done.ok
    assert done.failures == (
        "wrong: it does not compile",
        "dies: the process that compiles ended with 3 out of memory, say",
        "dies_too: the process that compiles ended with 3 out of memory, say",
        "wrong_too: it does not compile",
    )


def test_processes_stay_for_the_next_call_and_end_with_the_context(fake_worker, monkeypatch):
    started, start = [], workers.start
    monkeypatch.setattr(workers, "start", lambda *a, **k: started.append(start(*a, **k)) or started[-1])
    with workers.compiling(SM_90, jobs=2) as compile_:
        for name in ("a", "b", "c"):
            assert compile_(lines(name)).kernels == 1
        (process,) = started
        assert process.poll() is None
    assert process.poll() is not None


def test_an_interrupt_does_not_wait_for_what_is_being_compiled(fake_worker):
    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        workers.compile_ahead(lines("a", "hangs", "hangs_too"), SM_90, jobs=2, progress=interrupt)
    assert time.perf_counter() - began < 30


def test_an_interrupt_stops_a_process_that_is_being_started(fake_worker, monkeypatch):
    """A process that a thread was about to start when the interrupt came had been left to run, and was waited for."""
    start, counted = workers.start, itertools.count()

    def slow_start(*arguments, **options):
        if next(counted):
            time.sleep(1)
        return start(*arguments, **options)

    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(workers, "start", slow_start)
    began = time.perf_counter()
    with workers.compiling(SM_90, jobs=2) as compile_:
        with pytest.raises(KeyboardInterrupt):
            compile_(lines("a", "hangs", "hangs_too"), interrupt)
        assert time.perf_counter() - began < 30
        assert compile_(lines("b")).kernels == 1  # whoever catches the interrupt may go on


def test_one_set_of_processes_compiles_on_a_machine(fake_worker, tmp_path):
    """Whoever holds the lock goes first; it ends with its holder."""
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / workers.LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # shared: whoever asks for less than all would get it
        found = []
        thread = threading.Thread(target=lambda: found.append(workers.compile_ahead(lines("a"), SM_90, jobs=1)))
        thread.start()
        time.sleep(3 * workers.WAIT)
        assert not found
    thread.join(60)
    assert found[0].kernels == 1


# ----------------------------------------------------------------------------------------------------------------------
# A fresh process compiles nothing

# name, network, train, whether the library serves what was not measured
WARMED = [
    ("infer", "Net", False, False),
    ("train", "Net", True, False),
    ("train beside the library", "Net", True, True),
    ("branching on values", "Branching", True, False),
    ("under autocast", "Autocast", True, False),
]


def in_turn(source, cache, cases, what):
    """In a child: warms, or runs, networks whose CPU tensors stand for a GPU's. What was launched, or is to be, and
    what is new in Triton's cache, of each.
    """
    from contextlib import ExitStack, nullcontext
    from pathlib import Path
    from unittest.mock import patch

    import torch
    from triton import knobs

    import cnnfast
    from cnnfast import dispatch
    from cnnfast.ops import serving
    from cnnfast.precision import float32_products
    from cnnfast_kernels.aot.recording_driver import recording_driver

    knobs.cache.dir = cache
    networks = {}
    exec(source, networks)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    held, told = set(), {}
    with recording_driver(90) as driver, patch.object(dispatch, "CPU_REASON", ""):
        if what == "run":
            cnnfast.functional.global_avg_pool2d(x)  # loads what Triton itself needs
            driver.taken()
            held = {str(file) for file in Path(cache).rglob("*") if file.is_file()}
        for name, network, train, library in cases:
            model = cnnfast.convert(networks[network](), memory_format=torch.channels_last).train(train)
            with ExitStack() as stack:
                stack.enter_context(patch.object(serving, "LIBRARY_FIRST", ("cpu",) if library else ()))
                stack.enter_context(torch.autocast("cpu", torch.bfloat16) if network == "Autocast" else nullcontext())
                stack.enter_context(torch.set_grad_enabled(train))
                # What float32 is multiplied as hangs on the device, for which meta tensors stand, unless it is said.
                stack.enter_context(float32_products("tf32"))
                if what == "warm":
                    done = cnnfast.warm(model, x, train=train)
                    assert done.ok, done
                    kernels = done.kernels
                else:
                    y = model(x)
                    if train:
                        y.sum().backward()
                    kernels = len({launch.function for launch in driver.taken()[0]})
            now = {str(file) for file in Path(cache).rglob("*") if file.is_file()}
            told[name] = kernels, sorted(now - held)
            held = now
    return told


def networks():
    """The source of the networks above, for a process in which they are defined anew."""
    source = Path(__file__).read_text()
    begin, end = source.index("class Net("), source.index("def image(")
    return f"import torch\nfrom torch import nn\n{source[begin:end]}\nclass Autocast(Net): pass\n"


@pytest.mark.compiled
def test_a_fresh_process_compiles_nothing(tmp_path):
    """Not a file is new in Triton's cache: neither a kernel, nor what Triton 3.6 compiles in C for each launch."""
    warmed = run_compiled(in_turn, networks(), str(tmp_path), WARMED, "warm")
    launched = run_compiled(in_turn, networks(), str(tmp_path), WARMED, "run")
    assert {name: files for name, (_, files) in launched.items() if files} == {}
    for name, *_ in WARMED:
        assert warmed[name][0] >= launched[name][0] > 5
    assert warmed["infer"][1]


@pytest.mark.compiled
def test_a_script_without_a_main_guard_runs_once(tmp_path):
    """And what cannot be compiled is said, and does not end the process that compiles."""
    script, count = tmp_path / "script.py", tmp_path / "count"
    script.write_text(
        f"""
import json
from pathlib import Path
Path({str(count)!r}).open("a").write("once ")
from cnnfast import warming, workers
from cnnfast_kernels import devices, launch
import cnnfast, torch
from triton import knobs
knobs.cache.dir = {str(tmp_path / "cache")!r}
lines = warming.launches(torch.nn.MaxPool2d(2), torch.zeros(1, 8, 4, 4), gpu=devices.Gpu("", 90))
unknown = '{{"kernel": "cnnfast_kernels.launchable:nothing", "arguments": {{}}, "options": {{}}}}'
done = workers.compile_ahead([*lines, unknown], devices.Gpu("", 90), jobs=1)
print(json.dumps([done.kernels, done.failures]))
"""
    )
    kernels, (failure,) = run_compiled(script)
    assert kernels == 1
    assert failure.startswith("nothing: ValueError: no such kernel")
    assert count.read_text() == "once "
