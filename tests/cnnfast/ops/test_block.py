"""Residual blocks in training as one operator: which these are, their numbers, what they launch and save, and PyTorch's
world around them.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
import cnnfast.nn as cnn
from cnnfast.checking.trained import judge_training
from cnnfast.functional import blocks
from cnnfast.ops import serving
from cnnfast_kernels import tables
from cnnfast_kernels.tiling import TileConfig
from tests.support.agreement import normal, saved_for_backward

LAST = torch.channels_last
KINDS = {
    "basic": (cnn.BasicBlock, 8, 8, 1),
    "basic, narrower": (cnn.BasicBlock, 6, 8, 2),
    "bottleneck": (cnn.Bottleneck, 32, 8, 1),
    "bottleneck, narrower": (cnn.Bottleneck, 8, 8, 1),
    "bottleneck, strided": (cnn.Bottleneck, 16, 8, 2),
}
FUSED = {"conv_dgrad_below", "apply_gradient_sums"}


def build(kind="bottleneck", dtype=torch.float64, device="cpu", fmt=LAST, **how) -> nn.Module:
    """In half precision norms are float32. All channels, on half of which a ReLU is 0, stay away from its kink."""
    cls, inplanes, planes, stride = KINDS[kind]
    torch.manual_seed(0)
    down = None
    if stride > 1 or inplanes != planes * cls.expansion:
        conv = cnn.Conv2d(inplanes, planes * cls.expansion, 1, stride, bias=False)
        down = nn.Sequential(conv, cnn.BatchNorm2d(planes * cls.expansion))
    block = cls(inplanes, planes, stride, down, **how).to(device, dtype).to(memory_format=fmt)
    for name, norm in block.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.to(torch.promote_types(dtype, torch.float32))
            nn.init.constant_(norm.weight, 0.125)
            if not name.startswith("downsample"):
                with torch.no_grad():
                    norm.bias.copy_(1.0 - 2.0 * (torch.arange(norm.num_features) % 2))
    return block


def image(kind="bottleneck", dtype=torch.float64, device="cpu", fmt=LAST, n=3) -> torch.Tensor:
    """Whose sum with the branch is away from the kink too."""
    x = normal(n, KINDS[kind][1], 9, 7, seed=1) / 16
    return x.to(device, dtype).contiguous(memory_format=fmt)


def trained(block, x, backend="kernels", again=None):
    """Its result, the gradients of x and of the parameters that want one, and its buffers, by name; and the trace."""
    x = x.detach().requires_grad_(x.requires_grad or again is None)
    with cnnfast.backend(backend), cnnfast.trace() as trace:
        y = block(x)
        y.backward(torch.empty_like(y, requires_grad=False).copy_(normal(*y.shape, seed=2)))
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    return found | {name: b.clone() for name, b in block.named_buffers()}, trace


def is_one(trace) -> bool:
    """Whether the gradients came from a block's operator by kernels of ours."""
    return {*FUSED} <= {call.operation for call in trace}


def assert_same(mine, right, tolerance=0.0):
    assert mine.keys() == right.keys()
    for name, t in right.items():
        torch.testing.assert_close(
            mine[name], t, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Its numbers


@pytest.mark.parametrize("fmt", [LAST, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("kind", KINDS)
def test_float64(device, kind, fmt):
    """PyTorch's numbers, dtypes and strides, of statistics and counters too."""
    block, x = build(kind, device=device, fmt=fmt), image(kind, device=device, fmt=fmt)
    right, _ = trained(copy.deepcopy(block), x, "torch")
    mine, trace = trained(block, x)
    assert is_one(trace)
    assert {call.served_by for call in trace} == {"kernels"}
    assert_same(mine, right, 1e-11)
    for name, t in right.items():
        assert (mine[name].dtype, mine[name].stride()) == (t.dtype, t.stride()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["basic, narrower", "bottleneck, narrower"])
def test_errs_no_more_than_twice_as_pytorch(kind, dtype):
    """By the Gram matrices too, in half precision."""
    row = judge_training(build(kind, torch.float32), image(kind, torch.float32, n=4), dtype, 2)
    assert not [(c.tensor, c.message, c.rms, c.rms_limit) for c in row.beyond]


def served_first_by_the_library(monkeypatch):
    monkeypatch.setattr(serving, "LIBRARY_FIRST", ("cpu", "cuda"))


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_library_comes_first(device, kind, monkeypatch):
    """Its convolutions serve in forward and backward, and what inner activations gave is computed again."""
    block, x = build(kind, device=device), image(kind, device=device)
    right, _ = trained(copy.deepcopy(block), x, "torch")
    served_first_by_the_library(monkeypatch)
    mine, trace = trained(block, x, "auto")
    assert {c.served_by for c in trace if c.operation.startswith("conv_")} == {"library"}
    assert not FUSED & {call.operation for call in trace}
    layers = len([name for name, _ in block.named_modules() if "conv" in name])
    passes = [c.operation for c in trace if c.operation in ("normalize", "normalize_words")]
    assert len(passes) == 2 * layers - 1 + ("narrower" in kind or "strided" in kind)
    assert passes.count("normalize_words") == 1
    assert_same(mine, right, 1e-11)


def test_a_row_for_the_last_layer(gpu, device, monkeypatch):
    """Where our kernel won its 1x1 convolution to many channels, that trains by its Gram matrix, and the others by the
    library.
    """

    def found(key):
        winner = "kernels" if key.problem.K > key.problem.C else "library"
        return tables.TableRow(key, TileConfig(32, 32, 16, 4, 2), winner, {"kernels": 4.5, "library": 9.0})

    block, x = build(dtype=torch.float16, device=device), image(dtype=torch.float16, device=device)
    own, _ = trained(copy.deepcopy(block), x, "torch")
    exact, _ = trained(copy.deepcopy(block).double(), x.double(), "torch")
    served_first_by_the_library(monkeypatch)
    monkeypatch.setattr(tables, "find", found)
    mine, trace = trained(block, x, "auto")
    servers = {(call.operation, call.served_by) for call in trace}
    assert {("gram_statistics", "kernels"), ("gram_gradients", "kernels"), ("conv_stats", "library")} <= servers
    assert ("conv_stats", "kernels") not in servers
    for name, t in exact.items():
        errors = [float((found[name].double() - t).norm()) for found in (mine, own)]
        assert errors[0] <= 2 * errors[1] + 2**-11 * float(t.double().norm()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_less_memory_has_the_same_bits(device, kind, dtype, monkeypatch):
    """Also without being asked for kernels: they serve all the same."""
    block, x = build(kind, dtype, device), image(kind, dtype, device)
    right, _ = trained(copy.deepcopy(block), x)
    served_first_by_the_library(monkeypatch)
    mine, trace = trained(cnnfast.convert(block, memory="less"), x, "auto")
    assert is_one(trace)
    assert_same(mine, right)


def test_twice_the_same_bits(device):
    block, x = (
        build("bottleneck, narrower", torch.float16, device),
        image("bottleneck, narrower", torch.float16, device),
    )
    first, _ = trained(copy.deepcopy(block), x)
    again, _ = trained(block, x)
    assert_same(again, first)


@pytest.mark.parametrize(
    "wanted",
    [
        ["x"],
        ["conv1.weight"],
        ["bn2.weight"],
        ["bn3.bias"],
        ["conv3.weight", "downsample.1.weight"],
        ["downsample.0.weight"],
        ["bn1.bias", "conv2.weight"],
    ],
    ids=str,
)
@pytest.mark.parametrize("served", ["kernels", "library"])
def test_only_what_is_wanted(device, wanted, served, monkeypatch):
    """Of a block with frozen members the others' gradients are the same, and no gradient of a weight or of an image is
    computed that nobody needs.
    """
    kind = "bottleneck, narrower"
    block, x = build(kind, torch.float16, device), image(kind, torch.float16, device)
    if served == "library":
        served_first_by_the_library(monkeypatch)
    backend = "kernels" if served == "kernels" else "auto"
    right, _ = trained(copy.deepcopy(block), x, backend)
    for name, p in block.named_parameters():
        p.requires_grad_(name in wanted)
    mine, trace = trained(block, x.requires_grad_("x" in wanted), backend, again=True)
    for name in ("x", *(name for name, _ in block.named_parameters())):
        if name in wanted:
            torch.testing.assert_close(mine[name], right[name], rtol=0, atol=0)
        else:
            assert mine[name] is None
    weights = sum(name.startswith(("conv", "downsample.0")) for name in wanted)
    by_gram = sum(call.operation.startswith("gram_gradients") for call in trace)
    computed = sum(call.operation == "conv_wgrad" for call in trace)
    assert computed <= weights <= computed + by_gram
    if wanted == ["bn3.bias"]:
        assert not {"conv_dgrad", "conv_dgrad_below", "conv_wgrad"} & {call.operation for call in trace}


@pytest.mark.parametrize("change", ["momentum", "no momentum", "affine", "untracked"])
def test_norms(device, change):
    block, x = build(device=device), image(device=device)
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        if change == "momentum":
            norm.momentum = 0.75
        elif change == "no momentum":
            norm.momentum = None
        elif change == "affine":
            norm.weight = norm.bias = None
        else:
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = False
    right, mine = copy.deepcopy(block), block
    for _ in range(2):
        found, trace = trained(mine, x)
        assert is_one(trace)
        expected, _ = trained(right, x, "torch")
        assert_same(found, expected, 1e-11)


# ----------------------------------------------------------------------------------------------------------------------
# Which blocks


def hooked(block):
    block.conv2.register_forward_hook(lambda *call: None)


def frozen(block):
    block.bn2.eval()


def biased(block):
    block.conv1.bias = nn.Parameter(torch.zeros(8, dtype=torch.float64))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(block):
    nn.utils.parametrize.register_parametrization(block.conv2, "weight", Halved())


def reflecting(block):
    block.conv2.padding_mode = "reflect"


def other_activation(block):
    block.relu = nn.SiLU()


def one_norm_twice(block):
    block.bn2 = block.bn1


def another_shortcut(block):
    block.downsample = nn.Sequential(nn.AvgPool2d(1), cnn.Conv2d(32, 32, 1, bias=False).double())


def eval_mode(block):
    block.eval()


def nothing_wanted(block):
    block.requires_grad_(False)


CHANGES = [
    hooked,
    frozen,
    biased,
    parametrized,
    reflecting,
    other_activation,
    one_norm_twice,
    another_shortcut,
    eval_mode,
]


@pytest.mark.parametrize("change", [*CHANGES, nothing_wanted], ids=lambda change: change.__name__)
def test_a_block_that_is_not_one(device, change):
    """Its layers are called, and compute what the modules do."""
    block, x = build(device=device), image(device=device)
    change(block)
    block.to(device)
    right = copy.deepcopy(block)
    with cnnfast.trace() as trace, cnnfast.backend("auto"):
        y = block(x.requires_grad_(change is not nothing_wanted))
        if y.requires_grad:
            y.backward(torch.ones_like(y))
    assert not is_one(trace)
    with cnnfast.backend("torch"):
        torch.testing.assert_close(y, right(x), rtol=1e-11, atol=1e-11)


def test_without_gradients(device):
    block, x = build(device=device), image(device=device)
    with torch.no_grad(), cnnfast.trace() as trace:
        block(x)
    assert "conv_bn_act" not in [call.operation for call in trace]
    assert [call.operation for call in trace].count("conv_stats") == 3
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(x[:1, :, :1, :1])


def test_an_image_that_does_not_fit(device):
    """The error is the layer's own."""
    block, x = build(device=device), image(device=device)
    for wrong, error in ((x[:, :5], RuntimeError), (x[0], ValueError)):
        with pytest.raises(error), cnnfast.backend("torch"):
            block(wrong)
        with pytest.raises(error):
            block(wrong)
    assert int(block.bn1.num_batches_tracked) == 0
    with pytest.raises(RuntimeError, match="dtype"):
        block(x.float())


# ----------------------------------------------------------------------------------------------------------------------
# Converted models


def theirs(torchvision, groups=1):
    down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    block = torchvision.models.resnet.Bottleneck(16, 8, 2, down, groups, 64)
    return block.double().to(memory_format=LAST)


@pytest.mark.parametrize("groups", [1, 2])
def test_torchvisions_blocks_converted(torchvision, device, groups):
    block, x = theirs(torchvision, groups).to(device), image("bottleneck, strided", device=device)
    right, _ = trained(copy.deepcopy(block), x, "torch")
    converted = cnnfast.convert(block)
    mine, trace = trained(copy.deepcopy(converted), x)
    assert is_one(trace)
    assert_same(mine, right, 1e-11)
    assert "1 residual block trains as one operator." in cnnfast.report(converted).notes
    converted.downsample[1].register_forward_hook(lambda *call: None)
    mine, trace = trained(converted, x)
    assert not is_one(trace)
    assert_same(mine, right, 1e-11)


class Strided(nn.Module):
    """A block that ends in a strided 1x1 convolution to more channels, with an identity between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.between = nn.Identity()
        self.conv2, self.bn2 = nn.Conv2d(8, 32, 1, 2, bias=False), nn.BatchNorm2d(32)
        self.downsample = nn.Sequential(nn.Conv2d(8, 32, 1, 2, bias=False), nn.BatchNorm2d(32))

    def forward(self, x):
        z = self.between(torch.relu(self.bn1(self.conv1(x))))
        return torch.relu(self.bn2(self.conv2(z)) + self.downsample(x))


def test_a_strided_end_by_its_gram_matrix(device):
    torch.manual_seed(0)
    block = Strided().to(device, torch.float16, memory_format=LAST)
    for norm in (block.bn1, block.bn2, block.downsample[1]):
        norm.float()
    x = image("basic", torch.float16, device, n=4)
    exact, _ = trained(copy.deepcopy(block).double(), x.double(), "torch")
    own, _ = trained(copy.deepcopy(block), x, "torch")
    mine, trace = trained(cnnfast.convert(block), x)
    assert {"gram_gradients", "conv_dgrad_below"} <= {call.operation for call in trace}
    for name, t in exact.items():
        errors = [float((found[name].double() - t).norm()) for found in (mine, own)]
        assert errors[0] <= 2 * errors[1] + 2**-11 * float(t.double().norm()), name


def test_an_identity_inside_that_is_watched(device):
    """It is called then; without a hook nobody can tell."""
    block, x = cnnfast.convert(Strided().double().to(device)), image("basic", device=device)
    right, trace = trained(copy.deepcopy(block), x)
    assert is_one(trace)
    seen = []
    block.between.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    mine, trace = trained(block, x)
    assert len(seen) == 1
    assert not is_one(trace)
    assert_same(mine, right, 1e-11)


def test_weights_of_several_layouts(device):
    """Each gradient is laid out as PyTorch's, though x is contiguous."""
    block, x = build(device=device, fmt=torch.contiguous_format), image(device=device, fmt=torch.contiguous_format)
    block.conv2.to(memory_format=LAST)
    right, _ = trained(copy.deepcopy(block), x, "torch")
    mine, trace = trained(block, x)
    assert is_one(trace)
    assert_same(mine, right, 1e-11)
    for name, t in right.items():
        longer = [d for d, extent in enumerate(t.shape) if extent > 1]  # the others' strides say nothing
        assert [mine[name].stride(d) for d in longer] == [t.stride(d) for d in longer], name


class Squeezed(nn.Module):
    """A block with something between its branch and the sum, and one of four convolutions."""

    def __init__(self, longer: bool) -> None:
        super().__init__()
        self.longer = longer
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))

    def forward(self, x):
        y = x
        for i in range(3 if self.longer else 0):
            y = torch.relu(self.norms[i](self.convs[i](y)))
        y = self.norms[3](self.convs[3](y))
        return torch.relu(y + x)


@pytest.mark.parametrize(("longer", "why"), [(True, "more than 3 convolutions"), (False, "one convolution")])
def test_what_is_not_joined_is_told(longer, why):
    notes = cnnfast.report(cnnfast.convert(Squeezed(longer)), torch.empty(2, 8, 5, 5)).notes
    (told,) = [note for note in notes if "residual block" in note]
    assert told.startswith("The sum after convs.3 is not part of a residual block")
    assert why in told


@pytest.mark.parametrize(
    ("name", "blocks", "apart"),
    [
        ("resnet18", 8, 0),
        ("resnet50", 16, 0),
        ("resnext50_32x4d", 16, 0),
        ("wide_resnet50_2", 16, 0),
    ],
)
def test_networks_of_torchvision(torchvision, name, blocks, apart):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    notes = cnnfast.report(cnnfast.convert(model)).notes
    assert f"{blocks} residual blocks train as one operator each." in notes
    assert sum("is not part of a residual block" in note for note in notes) == apart


def test_memory_is_kept_and_given_up():
    model = nn.Sequential(build(), build())
    less = cnnfast.convert(model, memory="less")
    assert all("_cnnfast_less_memory" in block.__dict__ for block in copy.deepcopy(less))
    assert all("_cnnfast_less_memory" in block.__dict__ for block in cnnfast.convert(less))
    assert not any("_cnnfast_less_memory" in module.__dict__ for module in cnnfast.revert(less).modules())
    with pytest.raises(ValueError, match=r"memory must be 'fast' or 'less', but got memory='low'"):
        cnnfast.convert(model, memory="low")  # pyright: ignore[reportArgumentType]


# ----------------------------------------------------------------------------------------------------------------------
# What is saved


@pytest.mark.parametrize(("memory", "images"), [("fast", 4), ("less", 2)])
def test_what_is_saved(device, memory, images):
    """Of a bottleneck by its Gram matrix: y of two layers, and their activations' results unless they are computed
    again; of the result a bit an element.
    """
    block = cnnfast.convert(build("bottleneck", torch.float16, device), memory=memory)
    x = image("bottleneck", torch.float16, device)
    with saved_for_backward() as saved, cnnfast.backend("kernels"):
        y = block(x)
    own = {t.untyped_storage().data_ptr() for t in (x, y, *block.parameters())}
    found = sorted(n for address, n in saved.items() if address not in own)
    narrow = 2 * 3 * 8 * 9 * 7
    assert found[-images:] == [narrow] * images
    statistics = 4 * (2 * (8 + 8 + 32) + 8 + 32 * 8)
    words = 4 * -(-3 * 9 * 7 // 32) * 32
    assert sum(found[:-images]) == statistics + words
    assert y.untyped_storage().data_ptr() not in saved


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's world around it


def test_second_derivatives(device):
    block, x = build("bottleneck, narrower", device=device), image("bottleneck, narrower", device=device)
    results = []
    for backend, model in (("kernels", block), ("torch", copy.deepcopy(block))):
        x = x.detach().requires_grad_()
        with cnnfast.backend(backend):
            parameters = [x, *model.parameters()]
            y = model(x)
            once = torch.autograd.grad((y * normal(*y.shape, seed=2).to(y)).sum(), parameters, create_graph=True)
            penalty = sum(g.square().sum() for g in once)
            results.append([*once, *torch.autograd.grad(penalty, parameters)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_a_batch_of_gradients(device):
    block, x = build(device=device), image(device=device).requires_grad_()
    y = block(x)
    batch = torch.stack([normal(*y.shape, seed=i).to(y) for i in (2, 3)])
    (found,) = torch.autograd.grad(y, x, batch, is_grads_batched=True, retain_graph=True)
    for mine, dy in zip(found, batch, strict=True):
        (right,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(device, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    kind, dtype = "bottleneck, narrower", torch.float16
    block = build(kind, dtype, device)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend=counter, dynamic=dynamic)
    compilations = []
    for n in (3, 5) if dynamic else (3,):
        x = image(kind, dtype, device, n=n)
        results = []
        for model in (compiled, block):
            model.zero_grad()
            mine, trace = trained(model, x)
            assert is_one(trace)
            results.append({name.removeprefix("_orig_mod."): t for name, t in mine.items()})
        assert_same(*results)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * len(compilations)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(device, reentrant):
    """Running statistics move once more, as PyTorch's own do."""
    block, x = build(device=device), image(device=device)
    plain, _ = trained(copy.deepcopy(block), x)
    again, trace = trained(Checkpointed(block, reentrant), x)
    assert is_one(trace)
    assert_same({n: again[n] for n in ("y", "x", "conv2.weight")}, {n: plain[n] for n in ("y", "x", "conv2.weight")})


class Checkpointed(nn.Module):
    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)

    def named_parameters(self, *how, **options):
        return self.block.named_parameters(*how, **options)


def test_autocast_and_the_scaler(device):
    """Parameters in float32 get gradients in float32; x has the dtype of autocast already, as behind a stem."""
    block, x = build(dtype=torch.float32, device=device), image(dtype=torch.float16, device=device).requires_grad_()
    scaler = torch.amp.GradScaler(x.device.type, init_scale=2.0**10)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for overflow in (False, True):
        before = [p.detach().clone() for p in block.parameters()]
        with torch.autocast(x.device.type, torch.float16), cnnfast.trace() as trace:
            y = block(x)
            loss = y.float().mean() * (float("inf") if overflow else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
        assert is_one(trace)
        assert y.dtype == torch.float16
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, block.parameters(), before)) == overflow
    with torch.autocast(x.device.type, torch.float16), cnnfast.trace() as trace:
        block(x.detach().float().requires_grad_()).sum().backward()
    assert not is_one(trace)  # x itself, which is added, has another dtype than the branch


def test_flops_are_pytorchs(device):
    kind = "bottleneck, narrower"
    block, x = build(kind, device=device), image(kind, device=device)
    counts = []
    for backend, frozen in itertools.product(("kernels", "torch"), (False, True)):
        model = copy.deepcopy(block)
        model.conv2.weight.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            trained(model, x, backend)
        counts.append(counter.get_total_flops())
    assert counts[:2] == counts[2:]
    assert counts[0] > counts[1] > 0


@pytest.mark.parametrize("kind", ["basic, narrower", "bottleneck", "bottleneck, narrower"])
@pytest.mark.parametrize("less", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_opcheck(device, kind, less, dtype, monkeypatch):
    """Both operators, as a block calls them: by Gram matrices in half precision. What is traced is compared in float64
    alone, in numbers: it is the gradient of a sum, all ones, of which batch norm lets nothing pass but rounding.
    test_compiled compares half precision, to the bits.
    """
    calls = []

    def spy(operator):
        name = "bottleneck" if kind.startswith("bottleneck") else "basic_block"
        return lambda *arguments: calls.append((name, arguments)) or operator(*arguments)

    for name in ("basic_block", "bottleneck"):
        monkeypatch.setattr(blocks.ops, name, spy(getattr(blocks.ops, name)))
    block, x = build(kind, dtype, device), image(kind, dtype, device).requires_grad_()
    if less:
        block = cnnfast.convert(block, memory="less")
    with cnnfast.backend("kernels"):
        block(x)
        ((name, arguments),) = calls
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        checks += ["test_aot_dispatch_dynamic"] * (dtype == torch.float64)
        torch.library.opcheck(getattr(torch.ops.cnnfast, name).default, arguments, test_utils=checks)
