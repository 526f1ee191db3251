"""explain: the operations of a step, whose they are, who serves them today, totals that another way of counting finds
too, and what is refused.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cnnfast
import cnnfast.functional as F
import cnnfast.nn as cnn
from cnnfast.bench.step_counts import count_step
from cnnfast_kernels import launch, tables
from tests.support.explained import H200, LAST, Body, Net, counted, image

BACKWARD = "conv_bn_act_pool_backward"


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.device("meta"):
        return Net().bfloat16()


def rows_of(explanation, *operations):
    return [(row.operation, row.layer, row.backward) for row in explanation.rows if row.operation in operations]


# ----------------------------------------------------------------------------------------------------------------------
# Which operations there are, and whose they are


@pytest.mark.parametrize("train", [True, False], ids=["train", "infer"])
def test_resnet50_at_batch_256(train):
    """All of it within seconds, since nothing is computed."""
    with torch.device("meta"):
        model, x = cnnfast.models.resnet50().bfloat16(), torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
    found = cnnfast.explain(model, x, gpu="h200", train=train)
    assert (found.launches, found.bytes) == counted(model, x, train)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    # What trains by a Gram matrix has both gradients at once, and its statistics before the convolution.
    by_gram = {row.layer for row in found.rows if row.kernel and row.operation == "norm" and row.layer in layers}
    ends = {name for name in layers if name.endswith("conv3")} | {"layer1.0.downsample.0", "layer2.0.downsample.0"}
    assert by_gram == (ends if train else set())
    for operation in ("fprop", "dgrad", "wgrad") if train else ("fprop",):
        missing = {"fprop": set(), "dgrad": {"conv1"}, "wgrad": by_gram}[operation]  # nobody wants the image's gradient
        wanted = sorted((operation, layer, operation != "fprop") for layer in layers - missing)
        assert sorted(rows_of(found, operation)) == wanted
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    last = {"layer4.2"}  # whose ReLU no block masks the gradient for
    assert {layer for _, layer, _ in rows_of(found, "norm")} - by_gram == (norms | last if train else set())
    convolutions = [row for row in found.rows if row.tile is not None]
    assert all(row.modelled_us >= row.roofline_us > 0 for row in convolutions)
    assert all(row.modelled_us >= row.roofline_us for row in found.rows)
    assert sum(row.flops for row in convolutions if row.operation == "fprop") == 256 * 8_174_272_512


def test_what_trains_as_one_operator_and_what_it_keeps():
    """As the counts of a step have it, whose layers are found in another way."""
    with torch.device("meta"):
        model, x = cnnfast.models.resnet18().bfloat16(), torch.empty(8, 3, 64, 64, dtype=torch.bfloat16)
    found = cnnfast.explain(model, x, train=True)
    assert cnnfast.explain(model, x).training is None
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    forward = [("conv1", "conv_bn_act_pool_training"), *((block, "basic_block") for block in blocks)]
    told = [(step.layer, step.operator) for step in found.training.operators]
    assert told == [*forward, *((*of, "basic_block_backward") for of in zip(reversed(blocks))), ("conv1", BACKWARD)]
    assert [step.backward for step in found.training.operators] == [False] * 9 + [True] * 9

    given = model.train().to(memory_format=LAST), x.contiguous(memory_format=LAST)
    how = {"loss": None, "gpu": H200}
    ours = count_step(*given, backend="prefer kernels", **how)
    eager = count_step(*given, backend="torch", converted=False, **how)
    layers = {layer.layer: layer for layer in ours.layers}
    saved = {name: layer.saved_bytes for name, layer in layers.items() if layer.saved_bytes}
    assert found.training.saved == saved
    moved = sum(layer.moved_bytes for name, layer in layers.items() if name.startswith(("layer", "conv1", "bn1")))
    # PyTorch's operators within one of ours, on tensors of a channel each, are not told.
    assert sum(step.bytes for step in found.training.operators) == pytest.approx(moved, rel=0.01)
    for mine, right in ((found.training.ours, ours), (found.training.eager, eager)):
        assert mine.saved_bytes == right.saved_bytes
        assert mine.bytes == pytest.approx(right.moved_bytes, rel=0.01)
    assert found.training.ours.us < found.training.eager.us
    assert found.training.ours.us >= sum(row.bytes for row in found.rows) / found.gpu.memory * 1e6
    text = " ".join(str(found).split())
    assert "layer1.0" in text
    assert "PyTorch's eager mode moves" in text


def test_products_of_operators_by_a_gram_matrix():
    """As the formulas of ops/gram.py take them: of x with itself, and in the gradient of x one with a C x C matrix."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU()).bfloat16()
    x = torch.empty(64, 64, 32, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    found = cnnfast.explain(model, x, train=True)
    pixels = 64 * 32 * 32
    flops = [row.flops for row in found.rows if row.flops]
    assert flops == [2 * pixels * 64 * 64, 2 * pixels * 64 * 256, 2 * pixels * 64 * (2 * 256 + 64)]
    assert [step.operator for step in found.training.operators] == [
        "conv_bn_act_by_gram",
        "conv_bn_act_by_gram_backward",
    ]


def test_the_operations_of_a_training_step_and_their_layers(net):
    found = cnnfast.explain(net, image().requires_grad_(), train=True)
    assert (found.launches, found.bytes) == counted(net, image().requires_grad_(), True)
    assert rows_of(found, "fprop", "dgrad", "wgrad", "bias", "pool") == [
        ("fprop", "stem", False),
        ("fprop", "body.0.conv", False),
        ("fprop", "body.1.conv", False),
        ("fprop", "depthwise", False),
        ("dgrad", "up", False),  # a transposed convolution is the gradient of one
        ("pool", "pools.0", False),
        ("pool", "pools.1", False),
        ("pool", "pools.1", True),
        ("pool", "pools.0", True),
        ("fprop", "up", True),
        ("wgrad", "up", True),
        ("dgrad", "depthwise", True),
        ("wgrad", "depthwise", True),
        ("bias", "depthwise", True),
        ("dgrad", "body.1.conv", True),
        ("wgrad", "body.1.conv", True),
        ("dgrad", "body.0.conv", True),
        ("wgrad", "body.0.conv", True),
        ("dgrad", "stem", True),
        ("wgrad", "stem", True),
    ]
    kernels = [(row.layer, row.kernel) for row in found.rows if row.operation == "norm"]
    forward = [(norm, kernel) for norm in ("norm", "body.0.bn", "body.1.bn") for kernel in ("running", "normalize")]
    assert [(layer, kernel) for layer, kernel in kernels if "backward" not in kernel] == [
        (norm, {"running": "update_running_kernel", "normalize": "normalize_kernel"}[kernel])
        for norm, kernel in forward
    ]
    assert [layer for layer, kernel in kernels if "backward" in kernel] == ["body.1.bn", "body.0.bn", "norm"]


def test_what_pytorch_does_besides(net):
    """The linear layer, and the gradients that meet where a block's input goes two ways."""
    found = cnnfast.explain(net, image(), train=True)
    products = [work for work in found.foreign if work.flops]
    assert [(w.layer, w.operator, w.backward, w.calls, w.flops) for w in products] == [
        ("head", "addmm", False, 1, 2 * 4 * 8 * 5),
        ("head", "mm", True, 2, 2 * 2 * 4 * 8 * 5),
    ]
    (sums,) = {w.bytes for w in found.foreign if w.operator == "add" and w.backward}
    assert sums == 3 * 2 * 4 * 16 * 12 * 12
    assert [w.layer for w in found.foreign if w.operator == "add" and w.backward] == ["body.1.conv", "body.0.conv"]
    views = {"t", "view", "detach", "expand", "flatten", "_unsafe_view", "ones_like", "empty_like"}
    assert not views & {w.operator for w in found.foreign}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_backward_pass_computes_again_is_its_modules(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Conv2d(8, 16, 1, bias=False), Body()

        def forward(self, x):
            return checkpoint(self.body, self.first(x), use_reentrant=reentrant)

    with torch.device("meta"):
        model = Checkpointed().bfloat16()
    found = rows_of(cnnfast.explain(model, image(), train=True), "fprop", "dgrad", "wgrad", "norm")
    norm = ("norm", "body.bn")
    assert found == [
        ("fprop", "first", False),
        ("fprop", "body.conv", False),
        *[(*norm, False)] * 2,
        ("fprop", "body.conv", True),
        *[(*norm, True)] * 3,
        ("dgrad", "body.conv", True),
        ("wgrad", "body.conv", True),
        ("wgrad", "first", True),
    ]


def test_in_eval_mode_a_block_is_one_kernel(net):
    found = cnnfast.explain(net, image())
    assert rows_of(found, "norm") == []
    assert (found.launches, found.bytes) == counted(net, image(), False)
    assert [row.shapes for row in found.rows if row.layer == "body.1.conv"] == [
        "4x16x12x12 16x16x1x1 16 16 16 16 4x16x12x12"
    ]


def test_a_convolution_by_im2col_is_all_its_kernels():
    class Columns(nn.Conv2d):
        def forward(self, input):
            return F.conv2d(input, self.weight, algorithm="im2col")

    with torch.device("meta"):
        model = nn.Sequential(Columns(8, 16, 3, bias=False)).bfloat16()
    found = cnnfast.explain(model, image())
    (row,) = found.rows
    assert (row.layer, row.operation, row.tile, row.launches) == ("0", "fprop", None, 2)
    assert (found.launches, found.bytes) == counted(model, image(), False)


def test_filters_of_three_axes_keep_their_layout():
    """PyTorch lays out no video as channels_last; its norm is ours."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv3d(8, 16, 1), nn.BatchNorm3d(16), nn.ReLU())
    found = cnnfast.explain(model, torch.empty(2, 8, 3, 4, 4, device="meta"), train=True)
    assert {row.layer for row in found.rows} == {"1"}
    assert "convolution" in {work.operator for work in found.foreign}


# ----------------------------------------------------------------------------------------------------------------------
# On which GPU, in which dtype, and who serves today


def test_the_gpu_decides_which_kernels_there_are(net):
    kernels = {gpu: {row.kernel for row in cnnfast.explain(net, image(), gpu=gpu).rows} for gpu in ("h200", "RTX-4090")}
    assert "tma_fprop_kernel" in kernels["h200"]
    assert "tma_fprop_kernel" not in kernels["RTX-4090"]


def test_what_was_not_compiled_ahead_is_called_estimated():
    """The tiles of ResNet-50 were, for sm_90."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(1024, 256, 1, bias=False)).bfloat16()
    x = torch.empty(256, 1024, 14, 14, dtype=torch.bfloat16, device="meta")
    found = {gpu: cnnfast.explain(model, x, gpu=gpu) for gpu in ("h200", "rtx-3090")}
    assert [row.exact for explanation in found.values() for row in explanation.rows] == [True, False]
    assert all(row.registers for explanation in found.values() for row in explanation.rows)
    assert "~" not in str(found["h200"])
    assert "~: estimated from the nearest kernel that was compiled ahead of time." in str(found["rtx-3090"])


def test_the_dtype_is_the_models_or_the_one_that_is_asked_for(net):
    asked = {dtype: cnnfast.explain(net, image(), dtype=dtype) for dtype in (None, "bf16", "tf32", "fp32", torch.half)}
    assert [found.dtype for found in asked.values()] == ["bfloat16", "bfloat16", "tf32", "float32", "float16"]
    assert asked["tf32"].bytes == asked["fp32"].bytes > asked["bf16"].bytes
    products = [asked[dtype].totals["fprop"].modelled_us for dtype in ("fp32", "bf16")]
    assert products[0] > products[1]


def test_the_library_serves_what_no_table_has_but_for_depthwise_convolutions(net):
    found = cnnfast.explain(net, image(), train=True)
    served = {(row.layer, row.operation): row.served for row in found.rows}
    assert served["stem", "fprop"] == served["up", "dgrad"] == "library"
    assert served["depthwise", "fprop"] == served["norm", "norm"] == served["pools.0", "pool"] == "kernels"
    assert "by default on this GPU: 11 of 14," in " ".join(str(found).split())


@pytest.mark.parametrize(("ours", "library", "served"), [(4.0, 5.0, "measured row"), (4.0, 3.0, "library")])
def test_what_a_table_has_measured_stands_beside(net, ours, library, served, monkeypatch):
    before = next(row for row in cnnfast.explain(net, image(), gpu="h200").rows if row.layer == "stem")
    monkeypatch.setattr(tables, "find", Measured(ours, library))
    launch.forget_plans()
    try:
        found = cnnfast.explain(net, image(), gpu="h200")
    finally:
        launch.forget_plans()
    (row,) = [row for row in found.rows if row.layer == "stem"]
    assert (row.measured_us, row.library_us, row.served) == (ours, library, served)
    assert row.tile == "64x32x32 w4 s2" != before.tile, "the row's tile runs"
    others = {row.measured_us for row in found.rows if row.layer != "stem"}
    assert others == {None}
    assert f"ours {ours:.0f} us" in str(found)
    assert f"library {library:.0f} us" in str(found)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        down = nn.Sequential(nn.Conv2d(8, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.first, self.others = cnn.BasicBlock(8, 8), nn.Sequential(cnn.BasicBlock(8, 8), cnn.BasicBlock(8, 8))
        self.last = cnn.Bottleneck(8, 8, 2, down)

    def forward(self, x):
        return self.last(self.others(self.first(x)))


def test_who_serves_a_block_and_by_what_row(monkeypatch):
    """The library without a row; and a row is of the block as a whole, on the GPU that is explained."""
    with torch.device("meta"):
        model = Blocks().bfloat16()
    found = cnnfast.explain(model, image(), gpu="h200", train=True)
    names = ["first", "others.0", "others.1", "last"]
    assert [(b.layer, b.served, b.by) for b in found.blocks] == [(name, "library", "unmeasured") for name in names]
    assert found.blocks[0].shape == "4x8x12x12"
    text = " ".join(str(found).split())
    assert "Residual blocks that train as one operator: 4." in text
    assert "PyTorch's library (unmeasured: cnnfast.tune(model, *inputs, train=True) measures them): first," in text
    asked = []

    def find_block(key):
        asked.append(key)
        winner, times = ("library", (90.0, 80.0)) if key.projection else ("kernels", (50.0, 60.0))
        return tables.BlockRow(key, winner, dict(zip(("kernels", "library"), times, strict=True)))

    monkeypatch.setattr(tables, "find_block", find_block)
    launch.forget_plans()
    try:
        found = cnnfast.explain(model, image(), gpu="h200", train=True)
        assert [(b.served, b.by, b.measured_us, b.library_us) for b in found.blocks] == [
            *[("kernels", "measured row", 50.0, 60.0)] * 3,
            ("library", "measured row", 90.0, 80.0),
        ]
        assert {(key.gpu, key.arch) for key in asked} == {("NVIDIA H200", 90)}
        text = " ".join(str(found).split())
        assert "our kernels (by a measured row of the block; ours 50 us, the library 60 us): first, others.0" in text
        less = cnnfast.convert(model, memory="less")
        assert {(b.served, b.by) for b in cnnfast.explain(less, image(), gpu="h200", train=True).blocks} == {
            ("kernels", "less memory")
        }
    finally:
        launch.forget_plans()
    assert cnnfast.explain(model, image(), gpu="h200").blocks == []


class Measured:
    """A table of an H200, whose one row is of Net's first convolution."""

    def __init__(self, ours: float, library: float) -> None:
        self.times = {"kernels": ours, "default": 9.0, "library": library}

    def __call__(self, key: tables.Key) -> tables.TableRow | None:
        from cnnfast_kernels.tiling import TileConfig

        if (key.gpu, key.problem.C, key.problem.R) != ("NVIDIA H200", 8, 3):
            return None
        winner = "library" if self.times["library"] < self.times["kernels"] else "kernels"
        return tables.TableRow(key, TileConfig(64, 32, 32, 4, 2), winner, self.times)


# ----------------------------------------------------------------------------------------------------------------------
# The model stays as it is; what is refused


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Dropout())
    called = []
    model[1].register_forward_hook(lambda *call: called.append(call))
    before, draws = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    found = cnnfast.explain(model, torch.zeros(2, 8, 6, 6), train=True)
    assert {row.layer for row in found.rows} == {"0", "1"}
    assert not called
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d, nn.Dropout]
    assert all("_compiled_call_impl" not in vars(module) for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"gpu": "h20"},
            "explain(): gpu='h20' is none of b200, h200, h100, a100, l40s, rtx-4090, rtx-3090. Did you mean 'h200'?",
        ),
        ({"dtype": "bf61"}, "explain(): dtype 'bf61' is none of bf16, "),
        ({"memory_format": "nhwc"}, "explain(): memory_format must be None, torch.channels_last or torch.contiguous"),
    ],
)
def test_values_that_are_none_of_those_there_are(net, how, says):
    with pytest.raises(ValueError, match="explain") as refused:
        cnnfast.explain(net, image(), **how)
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize("model", [nn.Conv3d(3, 4, 1), nn.LazyConv3d(4, 1)])
def test_a_model_without_a_call_that_we_have_kernels_for(model):
    kind = type(model).__name__
    with pytest.raises(RuntimeError, match=f"^{kind} calls nothing that cnnfast has kernels for: there is nothing to"):
        cnnfast.explain(model, torch.empty(2, 3, 4, 4, 4))


def test_inputs_that_the_model_does_not_run_on(net):
    with pytest.raises(RuntimeError, match=r"^Net does not run on 4x3x12x12: RuntimeError: "):
        cnnfast.explain(net, torch.empty(4, 3, 12, 12, dtype=torch.bfloat16, device="meta"))


def test_a_model_in_channels_last_of_its_own_or_not(net):
    found = {fmt: cnnfast.explain(net, image(), memory_format=fmt) for fmt in (LAST, torch.contiguous_format, None)}
    assert found[None].bytes == found[torch.contiguous_format].bytes
    times = {fmt: explanation.rows[0].modelled_us for fmt, explanation in found.items()}
    assert times[None] == times[torch.contiguous_format] > times[LAST]
