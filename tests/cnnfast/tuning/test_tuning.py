"""tune: what it finds in a model, who may win, what is written, and who serves afterwards. Times are made up: there is
no clock here.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import cnnfast
import cnnfast.functional as F
from cnnfast import dispatch, tuning
from cnnfast.precision import float32_products
from cnnfast.tuning import racing, running
from cnnfast_kernels import choosing, devices, launch, memory, tables
from tests.support.tuned import LAST, Net, clock, convolution, image

pytestmark = pytest.mark.usefixtures("quick_tuning")


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def found(model, *inputs, **how):
    return {str(m): m.count for m in tuning.plan(model, *inputs, **how)}


def test_in_eval_the_fused_forms_are_found():
    """On a machine without a GPU; the fused forms that differ in what their kernel does are two, those that do not are
    one.
    """
    assert found(Net(), torch.zeros(2, 4, 6, 6)) == {
        "fprop + norm relu 2x4x6x6 > 8, 3x3/1": 1,
        "fprop + norm residual relu 2x8x6x6 > 8, 3x3/1": 2,
        "fprop 2x8x6x6 > 8, 3x3/1 groups 8": 1,
        "dgrad 2x4x8x8 > 8, 2x2/2": 1,
    }


def test_in_training_statistics_and_gradients_are_found_but_none_that_nobody_wants():
    model = Net()
    model.conv2.requires_grad_(False)
    assert found(model, torch.zeros(2, 4, 6, 6), train=True) == {
        "fprop + stats 2x4x6x6 > 8, 3x3/1": 1,
        "fprop + stats 2x8x6x6 > 8, 3x3/1": 2,
        "fprop 2x8x6x6 > 8, 3x3/1 groups 8": 1,
        "dgrad 2x4x8x8 > 8, 2x2/2": 1,
        "fprop 2x4x8x8 > 8, 2x2/2": 1,
        "wgrad 2x4x8x8 > 8, 2x2/2": 1,
        "dgrad 2x8x6x6 > 8, 3x3/1 groups 8": 1,
        "wgrad 2x8x6x6 > 8, 3x3/1 groups 8": 1,
        "dgrad 2x8x6x6 > 8, 3x3/1": 2,
        "wgrad 2x8x6x6 > 8, 3x3/1": 1,
        "wgrad 2x4x6x6 > 8, 3x3/1": 1,
    }


def test_dtype_and_layout_are_those_asked_for():
    for dtype in (torch.bfloat16, torch.float32):
        for fmt, layout in ((LAST, "NHWC NHWC NHWC"), (None, "NCHW NCHW NCHW")):
            planned = tuning.plan(Net(), torch.zeros(2, 4, 6, 6), dtype=dtype, memory_format=fmt)
            keys = [m.key for m in planned if not m.key.problem.is_depthwise]
            assert {(key.dtype, key.layout) for key in keys} == {(str(dtype).removeprefix("torch."), layout)}


@pytest.mark.parametrize(
    ("dtype", "expected"), [("tf32", "tf32"), ("fp32", "float32"), ("torch.float32", "float32"), ("bf16", "bfloat16")]
)
def test_names_say_how_float32_is_multiplied(dtype, expected):
    """Without a GPU, too; a torch.dtype leaves it to PyTorch's settings, which let no CPU round."""
    assert {m.key.dtype for m in tuning.plan(Net(), torch.zeros(2, 4, 6, 6), dtype=dtype)} == {expected}
    assert {m.key.dtype for m in tuning.plan(Net(), torch.zeros(2, 4, 6, 6), dtype=torch.float32)} == {"float32"}
    with pytest.raises(ValueError, match=r"tune\(\): dtype 'int8' is none of bf16, fp16, fp32, tf32"):
        tuning.plan(Net(), torch.zeros(2, 4, 6, 6), dtype="int8")


def test_the_model_stays_as_it_is():
    model = Net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tuning.plan(model, torch.zeros(2, 4, 6, 6), train=True, dtype=torch.float64)
    assert type(model.conv1) is nn.Conv2d
    assert model.conv1.weight.grad is None
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    with pytest.raises(RuntimeError, match="does not run on 2x5x6x6"):
        tuning.plan(model, torch.zeros(2, 5, 6, 6))


class WithoutNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = torch.nn.Parameter(torch.randn(4, 4, 1, 1, generator=torch.Generator().manual_seed(0)))
        self.slopes = torch.nn.Parameter(torch.tensor([0.25]))

    def forward(self, x):
        y = F.conv_act(x, self.filters, residual=x)
        y = F.conv_act(y, self.filters, activation="prelu", activation_arg=self.slopes)
        return F.conv_act(y, self.filters, activation="mish") + F.conv2d(y, self.filters)


def test_without_a_norm_the_epilogue_has_a_key_of_its_own(gpu, device):
    """Every candidate for it is right, the library's convolution with a pass after it too."""
    model = WithoutNorm().to(device).requires_grad_(False)
    names = ["fprop + residual relu", "fprop + prelu", "fprop + mish", "fprop"]
    assert found(model, image(device)) == {f"{name} 2x4x6x6 > 4, 1x1/1": 1 for name in names}
    result = tuning.tune(model, image(device), measure=clock())
    assert result.ok, str(result)
    assert [tables.find(row.key) for row in result.rows] == result.rows
    # where a gradient is wanted, mish is a pass of its own and so is prelu
    trained = found(model.requires_grad_(), image(device), train=True)
    assert {name: n for name, n in trained.items() if "fprop" in name} == {
        "fprop + residual relu 2x4x6x6 > 4, 1x1/1": 1,
        "fprop 2x4x6x6 > 4, 1x1/1": 3,
    }


def test_keys_are_those_that_calls_ask_for(gpu, device):
    """What plan finds on tensors that hold nothing is what the converted model asks tables for when it runs."""
    model = Net().to(device)
    for training in (False, True):
        planned = {m.key for m in tuning.plan(model, image(device), train=training)}
        asked, find = set(), tables.find
        launch.forget_plans()
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(training):
            patch.setattr(tables, "find", lambda key: asked.add(key) or find(key))  # noqa: B023
            y = cnnfast.convert(model, memory_format=LAST).train(training)(image(device).contiguous(memory_format=LAST))
            if training:
                y.backward(torch.ones_like(y))
        assert asked == planned


# ----------------------------------------------------------------------------------------------------------------------
# Who wins


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_every_candidate_of_a_model_is_right_and_its_rows_are_found(gpu, device, training):
    model = Net().to(device)
    result = tuning.tune(model, image(device), train=training, measure=clock())
    assert result.ok, str(result)
    assert [row.winner for row in result.rows] == ["kernels"] * len(result.measured)
    assert all(c.microseconds for m in result.measured for c in m.candidates.values())
    assert all(tuning.measured.LIBRARY in m.candidates for m in result.measured)
    assert [tables.find(row.key) for row in result.rows] == result.rows
    assert result.path == tables.user_file(*gpu)


def test_the_fastest_tile_serves_from_then_on_in_the_same_process(gpu, device, launches):
    model, x = convolution(device), image(device)
    converted = cnnfast.convert(model, memory_format=LAST)
    last = x.contiguous(memory_format=LAST)
    before = converted(last).detach()
    (measured,) = tuning.plan(model, x)
    fastest = list(measured.candidates)[1]
    result = tuning.tune(model, x, measure=clock(**{fastest: 1.0}))
    assert result.rows[0].microseconds == {
        "kernels": 1.0,
        "default": 10.0,
        "library": 10.0 + len(measured.candidates) - 1,
    }
    launches.clear()
    torch.testing.assert_close(converted(last).detach(), before)
    assert [str(event.tile) for event in launches] == [fastest]


def broken(monkeypatch, spoil):
    """Our kernels with a tile of other stages than the default's give what `spoil` makes of their result."""
    compute = running.ours

    def ours(convolution, a, tile):
        results = compute(convolution, a, tile)
        default = choosing.default_tile(convolution.question(False, devices.gpu(results[0].device)))
        return results if tile == default else spoil(results)

    monkeypatch.setattr(racing, "ours", ours)


def test_wrong_numbers_never_win(gpu, device, monkeypatch):
    def spoil(results):
        results[0][0, 0, 0, 0] += 0.01
        return results

    broken(monkeypatch, spoil)
    (measured,) = tuning.plan(convolution(device), image(device))
    wrong = [name for name in measured.candidates if name not in ("default", "library")]
    result = tuning.tune(convolution(device), image(device), measure=clock(**dict.fromkeys(wrong, 1.0)))
    assert not result.ok
    (measured,) = result.measured
    assert result.rows[0].tile == measured.candidates["default"].tile
    assert wrong
    for name in wrong:
        assert measured.candidates[name].microseconds is None
        assert "error" in measured.candidates[name].fault
    assert str(result).index(f"{wrong[0]}: result: error") < str(result).index("microseconds on")


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_tf32_candidates_are_run_and_judged_as_tf32(gpu, device, training, monkeypatch):
    """Of operands that TF32 cannot hold: rounded ones are right there and wrong in float32, and rows of the one do not
    serve the other.
    """
    results = {}
    compute = running.ours

    def ours(convolution, a, tile):
        results.setdefault(dtype, []).append(compute(convolution, a, tile)[0])
        return results[dtype][-1].clone(), *compute(convolution, a, tile)[1:]

    monkeypatch.setattr(racing, "ours", ours)
    for dtype in ("tf32", "float32"):
        result = tuning.tune(convolution(device), image(device), train=training, dtype=dtype, measure=clock())
        assert result.ok, str(result)
        assert {row.key.dtype for row in result.rows} == {dtype}
    assert (results["tf32"][0] - results["float32"][0]).abs().max() > 1e-5
    (measured,) = tuning.plan(convolution(device), image(device))
    a = running.operands(measured.convolution, device)
    rounded, straight = results["tf32"][0], results["float32"][0]
    for products, wrong in (("ieee", rounded), ("tf32", straight + (rounded - straight) * 4)):
        with float32_products(products):
            judge = running.Judge(measured.convolution, a)
        assert not judge.fault(((rounded if products == "tf32" else straight),))
        assert "error" in judge.fault((wrong,))


def test_what_is_not_written_is_seen_though_memory_holds_the_right_numbers(gpu, device, monkeypatch):
    """Kernels that write nothing, into memory of the default's result."""
    held, allocate = [], memory.empty

    def lazily(convolution, a, tile):
        default = choosing.default_tile(convolution.question(False, devices.gpu(a["x"].device)))
        if tile != default:
            return (memory.empty("the same memory", a["x"]),)
        held[:] = running.ours(convolution, a, tile)
        return tuple(held)

    def empty(shape, *args, **kwargs):
        return held[0].clone() if shape == "the same memory" else allocate(shape, *args, **kwargs)

    monkeypatch.setattr(racing, "ours", lazily)
    monkeypatch.setattr(memory, "empty", empty)
    result = tuning.tune(convolution(device), image(device), measure=clock())
    faults = {name: c.fault for name, c in result.measured[0].candidates.items()}
    assert not faults["default"]
    assert all("finite" in fault for name, fault in faults.items() if name not in ("default", "library"))


def test_a_candidate_that_does_not_run_is_out_and_no_fault(gpu, device, monkeypatch):
    def refuse(results):
        raise RuntimeError("out of resource: shared memory\nand more")

    broken(monkeypatch, refuse)
    result = tuning.tune(convolution(device), image(device), measure=clock())
    assert result.ok
    failures = {name: c.failure for name, c in result.measured[0].candidates.items()}
    assert failures.pop("default") == failures.pop("library") == ""
    assert set(failures.values()) == {"RuntimeError: out of resource: shared memory"}


def test_a_step_that_fails_on_the_clock_is_out(gpu, device):
    def measure(steps):
        return {**clock()(steps), "default": RuntimeError("lost")}

    result = tuning.tune(convolution(device), image(device), measure=measure)
    assert result.measured[0].candidates["default"].failure == "RuntimeError: lost"
    assert "default" not in result.rows[0].microseconds


def test_without_one_right_kernel_there_is_no_row(gpu, device, monkeypatch):
    monkeypatch.setattr(
        racing, "ours", lambda convolution, a, tile: (torch.zeros_like(running.ours(convolution, a, tile)[0]),)
    )
    result = tuning.tune(convolution(device), image(device), measure=clock())
    assert (result.ok, result.rows, result.path) == (False, [], None)
    assert not tables.user_file(*gpu).exists()
    assert "not measured" in str(result)


def test_an_interrupted_run_keeps_what_it_measured(gpu, device):
    measured = []

    def measure(steps):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(steps)
        return clock()(steps)

    with pytest.raises(KeyboardInterrupt):
        tuning.tune(Net().to(device), image(device), measure=measure)
    assert len(tables.read(tables.user_file(*gpu))) == 2


def test_a_folder_that_cannot_be_written_ends_it_before_it_begins(gpu, device):
    tables.user_folder().write_text("in the way")
    with pytest.raises(OSError, match="cannot be written"):
        tuning.tune(convolution(device), image(device), measure=lambda steps: pytest.fail("measured in vain"))


def test_progress_and_json(gpu, device):
    told = []
    result = tuning.tune(Net().to(device), image(device), measure=clock(), progress=lambda *what: told.append(what))
    # it is made twice: what costs most comes first
    assert told[0] == (0, 4, "fprop + norm residual relu 2x8x6x6 > 8, 3x3/1")
    assert told[-1] == (4, 4, "")
    data = json.loads(result.to_json())
    assert (data["ok"], data["gpu"], len(data["measured"])) == (True, gpu.name, 4)
    assert "our kernels win 4, the library 0" in data["summary"]


def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match=r"tune\(\) needs a GPU to measure on, but the model is on cpu"):
        tuning.tune(convolution("cpu"), image("cpu"))


def test_where_our_kernels_cannot_serve_at_all_it_says_why(gpu, device, monkeypatch):
    """A GPU before sm_80, or one on which Triton cannot launch."""
    monkeypatch.setattr(dispatch, "why_torch", lambda x: "the GPU is sm_75, and kernels need sm_80")
    with pytest.raises(
        RuntimeError, match=r"nothing to measure on .*, where PyTorch serves every call: the GPU is sm_75"
    ):
        tuning.tune(convolution(device), image(device), measure=lambda steps: pytest.fail("measured in vain"))


def test_a_model_without_convolutions_is_refused(gpu, device):
    with pytest.raises(RuntimeError, match="Linear makes no convolution"):
        tuning.tune(nn.Linear(4, 4).to(device), torch.zeros(2, 4, device=device))


def test_a_row_of_ours_and_no_row(gpu, device):
    model, x = convolution(device), image(device)
    converted = cnnfast.convert(model, memory_format=LAST)
    tuning.tune(model, x, measure=clock())
    with cnnfast.trace() as calls:
        converted(x.contiguous(memory_format=LAST))
    assert [(call.served_by, call.reason) for call in calls] == [("kernels", "")]


def test_sets_of_operands_differ(gpu, device, monkeypatch):
    seen, compute = {}, running.ours

    def ours(convolution, a, tile):
        seen[a["x"].data_ptr()] = a["x"]
        return compute(convolution, a, tile)

    monkeypatch.setattr(racing, "ours", ours)
    tuning.tune(convolution(device), image(device), measure=clock())
    first, second = seen.values()
    assert not torch.equal(first, second)


# ----------------------------------------------------------------------------------------------------------------------
# What costs most comes first, and what fits


def test_what_costs_the_model_most_comes_first():
    """By an estimate: calls x the larger of FLOPs / rate and bytes / bandwidth. One of these convolutions multiplies,
    one moves.
    """

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moves = nn.Conv2d(256, 256, 1, bias=False)
            self.multiplies = nn.Conv2d(256, 256, 3, padding=1, bias=False)

        def forward(self, x):
            for _ in range(6):
                x = self.moves(x)
            return self.multiplies(x)

    six, one = tuning.plan(Two(), torch.empty(8, 256, 32, 32, device="meta"), dtype="bf16")
    assert (str(six), six.count) == ("fprop 8x256x32x32 > 256, 1x1/1", 6)
    moved = 2 * (2 * 8 * 256 * 32 * 32 + 256 * 256)
    assert six.cost == pytest.approx(6 * moved / 4e12)
    assert one.cost == pytest.approx(2 * 8 * 32 * 32 * 256 * 256 * 9 / 8e14)
    first = tuning.plan(Two(), torch.empty(8, 256, 32, 32, device="meta"), dtype="fp32")[0]
    assert (first.key.problem.R, first.key.dtype) == (3, "float32")  # which multiplies thirteen times slower


def test_a_resnet_has_at_most_twelve_candidates_a_convolution_and_the_library():
    """And its blocks two each, after their convolutions, of which those of a block in training are together."""
    model, x = cnnfast.models.resnet50(), torch.empty(64, 3, 224, 224, device="meta")
    # in training five convolutions are asked for both ways, with statistics and by the Gram matrix with given ones
    for train, convolutions, blocks in ((False, 24, 0), (True, 73, 8)):
        found = tuning.plan(model, x, train=train, dtype="bf16", gpu=devices.Gpu("NVIDIA H200", 90))
        planned = [m for m in found if isinstance(m, tuning.Measured)]
        of_blocks = [m for m in found if isinstance(m, tuning.MeasuredBlock)]
        assert (len(planned), len(of_blocks)) == (convolutions, blocks)
        assert sum(m.count for m in of_blocks) == 2 * blocks
        assert all(list(m.candidates) == ["kernels", "library"] for m in of_blocks)
        for block in of_blocks:
            own = [i for i, m in enumerate(found) if m in planned and m.key.problem in block.key.problems]
            assert max(own) < found.index(block)
        costs, cost = [], 0.0
        for m in found:  # of each block with what comes before it
            cost += m.cost if m in planned else 0.0
            if m in of_blocks:
                costs.append(cost)
                cost = 0.0
        assert costs == sorted(costs, reverse=True)
        assert {m.key.gpu for m in planned} == {"NVIDIA H200"}
        assert max(len(m.candidates) for m in planned) == choosing.MOST_CANDIDATES + 1
        assert all(next(iter(m.candidates)) == "default" and list(m.candidates)[-1] == "library" for m in planned)
        if not train:
            assert [m.cost for m in planned] == sorted((m.cost for m in planned), reverse=True)


class Spent:
    """A budget of which so much is left, each time that somebody asks; the last for ever."""

    def __init__(self, *left: float) -> None:
        self.answers = list(left)

    @property
    def left(self) -> float:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_what_does_not_fit_the_budget_is_left_and_named(gpu, device):
    """Here time is over after one convolution. Rows of the others, from before, stay as they are."""
    model = Net().to(device)
    before = tuning.tune(model, image(device), measure=clock())
    measured = []

    def measure(steps):
        measured.append(steps)
        budget.answers[:] = [0.0]
        return clock(default=99.0)(steps)

    budget = Spent(1e9)
    tuning_now = tuning.begin(model, image(device))
    assert len(tuning_now.left) == 4
    tuning.proceed(tuning_now, device, budget=budget, measure=measure)
    assert len(measured) == len(tuning_now.measured) == 1
    assert tuning_now.ok
    names = [str(m) for m in tuning_now.left]
    assert names == [str(m) for m in before.measured[1:]]
    assert [tables.find(row.key) for row in before.rows] == [tuning_now.rows[0], *before.rows[1:]]
    text = str(tuning_now)
    assert "left unmeasured, their rows as they were: 3 convolutions" in text
    assert "1 of 4 convolutions measured" in text
    assert all(f"{name}, float32, calls: 1" in text for name in names)
    assert [left["convolution"] for left in json.loads(tuning_now.to_json())["left"]] == names


def test_a_convolution_that_would_take_as_long_as_the_one_before_is_not_begun(gpu, device, monkeypatch):
    """But a smaller one that comes later is, if it fits."""
    now = [0.0]
    monkeypatch.setattr(tuning, "monotonic", lambda: now[0])
    result = tuning.begin(Net().to(device), image(device))
    first, second, third, _ = result.left
    second.candidates = {str(i): tuning.Candidate(None) for i in range(50)}  # all of them would take 50 seconds

    def measure(steps):
        now[0] += len(first.candidates)  # a second for each candidate
        return clock()(steps)

    budget = Spent(1e9)
    monkeypatch.setattr(Spent, "left", property(lambda self: 40.0 - now[0]))
    tuning.proceed(result, device, budget=budget, measure=measure)
    assert second in result.left
    assert first in result.measured
    assert third in result.measured


def test_time_that_is_over_in_the_middle_of_a_convolution_leaves_it(gpu, device, monkeypatch):
    """What was found to be wrong until then is said all the same."""
    compute = running.ours
    budget = Spent(1e9)

    def ours(convolution, a, tile):
        budget.answers[:] = [0.0]
        return tuple(t + 1 for t in compute(convolution, a, tile))

    monkeypatch.setattr(racing, "ours", ours)
    result = tuning.begin(convolution(device), image(device))
    tuning.proceed(result, device, budget=budget, measure=lambda steps: pytest.fail("there is no time"))
    (left,) = result.left
    assert result.measured == result.rows == []
    assert not result.ok
    assert [name for name, c in left.candidates.items() if c.fault] == ["default"]
    assert "default: result: error" in str(result)
    assert not tables.user_file(*gpu).exists()


def test_time_that_is_over_on_the_clock_leaves_the_convolution(gpu, device):
    """One candidate was not timed: nobody knows whether it is the fastest."""

    def measure(steps):
        times = dict(clock()(steps))
        del times["library"]
        return times

    result = tuning.tune(convolution(device), image(device), measure=measure)
    assert (result.rows, len(result.left), result.ok) == ([], 1, True)


def test_the_clock_knows_how_much_time_is_left(gpu, device, monkeypatch):
    asked = []

    def measure(steps, the_clock, seconds, left):
        asked.append((seconds, left()))
        return clock()(steps)

    monkeypatch.setattr(tuning, "take_turns", measure)
    tuning.tune(convolution(device), image(device), seconds=0.5)
    tuning.tune(convolution(device), image(device), budget=500)
    (half, endless), (usual, left) = asked
    assert (half, endless, usual) == (0.5, float("inf"), tuning.SECONDS)
    assert 0 < left < 500


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["budget", "seconds"])
def test_durations_are_positive(gpu, device, name, value):
    with pytest.raises(
        ValueError, match=rf"tune\(\): {name}={value} is no duration: give a positive number of seconds"
    ):
        tuning.tune(convolution(device), image(device), **{name: value})


def test_without_a_budget_and_with_a_large_one_everything_is_measured(gpu, device):
    for budget in (None, 1e6):
        result = cnnfast.tune(Net().to(device), image(device), budget=budget, measure=clock())
        assert (len(result.measured), result.left) == (4, [])


# ----------------------------------------------------------------------------------------------------------------------
# Where rows go


def test_a_row_is_written_as_soon_as_its_convolution_is_measured_and_plans_are_forgotten_once(gpu, device, monkeypatch):
    seen, forgotten = [], []

    def measure(steps):
        seen.append(len(tables.read(tables.user_file(*gpu))) if tables.user_file(*gpu).exists() else 0)
        return clock()(steps)

    forget = launch.forget_plans
    monkeypatch.setattr(launch, "forget_plans", lambda: forgotten.append(forget()))
    tuning.tune(Net().to(device), image(device), measure=measure)
    assert seen == [0, 1, 2, 3]
    assert len(forgotten) == 1


def test_rows_go_to_another_table_too_which_says_what_they_were_measured_with(gpu, device, tmp_path):
    file = tmp_path / "rows.json"
    result = cnnfast.tune(Net().to(device), image(device), table=file, measure=clock())
    assert result.table == file
    assert tables.read(file) == tables.read(tables.user_file(*gpu)) == result.rows
    head = json.loads(file.read_text())
    assert {"driver", "clocks", "torch", "triton", "cudnn", "commit", "date"} <= set(head)
    assert head["torch"] == torch.__version__
    assert head["date"].endswith("+00:00")
    assert f"also written to {file}" in str(result).replace("\n", "")
    assert json.loads(result.to_json())["other_table"] == str(file)
    file.write_text("# notes")
    with pytest.raises(ValueError, match="is no table of cnnfast"):
        cnnfast.tune(
            Net().to(device), image(device), table=str(file), measure=lambda steps: pytest.fail("measured in vain")
        )
    assert file.read_text() == "# notes"


def test_an_interrupt_while_a_row_is_written_does_not_lose_it(gpu, device, monkeypatch):
    write, interrupts = tables.write, [KeyboardInterrupt]

    def interrupted(*arguments):
        if interrupts:
            raise interrupts.pop()
        return write(*arguments)

    monkeypatch.setattr(tables, "write", interrupted)
    result = tuning.begin(Net().to(device), image(device))
    with pytest.raises(KeyboardInterrupt):
        tuning.proceed(result, device, measure=clock())
    assert tables.read(tables.user_file(*gpu)) == result.rows
    assert (len(result.rows), len(result.left)) == (1, 3)


def test_a_table_of_another_version_makes_room(gpu, device):
    file = tables.user_file(*gpu)
    tuning.tune(convolution(device), image(device), measure=clock())
    file.write_text(file.read_text().replace(f'"cnnfast": "{cnnfast.__version__}"', '"cnnfast": "0.0.1"'))
    with pytest.warns(RuntimeWarning, match=r"cnnfast 0\.0\.1 wrote it"):
        result = tuning.tune(convolution(device), image(device), measure=clock())
    assert tables.read(file) == result.rows


# ----------------------------------------------------------------------------------------------------------------------
# How its caller may stand


def test_the_librarys_failure_leaves_ours(gpu, device, monkeypatch):
    def fails(convolution, a):
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(racing, "by_library", fails)
    result = tuning.tune(convolution(device), image(device), measure=clock())
    assert result.ok
    assert result.rows[0].winner == "kernels"
    assert "library" not in result.rows[0].microseconds
    assert "unable to find an engine" in result.measured[0].candidates["library"].failure


def under_inference_mode():
    return torch.inference_mode()


def under_no_grad():
    return torch.no_grad()


def under_backend_torch():
    return cnnfast.backend("torch")


@pytest.mark.parametrize("mode", [under_inference_mode, under_no_grad, under_backend_torch])
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
def test_the_modes_that_the_caller_is_in_change_nothing(gpu, device, mode, train):
    model = convolution(device)
    plainly = tuning.tune(model, image(device), train=train, measure=clock())
    with mode():
        result = tuning.tune(model, image(device), train=train, measure=clock())
        inside = tuning.tune(convolution(device), image(device), train=train, measure=clock())  # made under it, too
    assert result.ok, str(result)
    assert result.rows == inside.rows == plainly.rows


def test_autocast_says_what_the_model_computes_in(gpu, device):
    """And operands have that dtype already: nothing is cast while it is measured."""
    with torch.autocast(device.type, torch.float16):
        result = tuning.tune(convolution(device), image(device), measure=clock())
    assert result.ok, str(result)
    assert {row.key.dtype for row in result.rows} == {"float16"}
    assert {m.convolution.dtype for m in result.measured} == {torch.float16}


def test_converted_models_and_models_in_half_precision(gpu, device):
    model = convolution(device).half().eval()
    half = tuning.tune(model, image(device).half(), measure=clock())
    assert {row.key.dtype for row in half.rows} == {"float16"}
    converted = cnnfast.convert(model, memory_format=LAST)
    assert tuning.tune(converted, image(device).half(), measure=clock()).rows == half.rows
    assert type(model) is nn.Conv2d


def test_two_gpus_of_different_kinds_have_a_table_each(device, gpu, monkeypatch):
    first = tuning.tune(convolution(device), image(device), measure=clock())
    monkeypatch.setattr(devices, "gpu", lambda device: devices.Gpu("Another GPU", 80))
    second = tuning.tune(convolution(device), image(device), measure=clock())
    assert first.path != second.path
    assert first.path.exists()
    assert [tables.find(row.key) for row in (*first.rows, *second.rows)] == [*first.rows, *second.rows]


@pytest.mark.gpu
def test_a_tune_on_a_gpu(gpu, device, monkeypatch, tmp_path):
    """With nothing replaced: graphs, benchmark mode, compilation by other processes."""
    monkeypatch.undo()
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path)
    model, x = nn.Conv2d(64, 64, 3, padding=1).to(device), torch.randn(8, 64, 28, 28, device=device)
    result = cnnfast.tune(model, x, dtype="bf16", budget=240)
    assert result.ok, str(result)
    assert (result.left, result.notes) == ([], [])
    (measured,) = result.measured
    assert [c.failure for name, c in measured.candidates.items() if name in ("default", "library")] == ["", ""]
    times = [c.microseconds for c in measured.candidates.values() if c.microseconds is not None]
    assert min(times) > measured.key.problem.flops / 5e15 * 1e6  # no GPU multiplies that fast
    assert max(times) < 5000
    assert tables.find(result.rows[0].key) == result.rows[0]
