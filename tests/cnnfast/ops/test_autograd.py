"""What autograd promises of any function: gradients that are asked for and no others, in-place changes detected,
saved-tensor hooks, checkpoints, hooks on tensors, the deterministic mode; and that nothing waits for the GPU.
"""

from __future__ import annotations

import ast
import functools
import itertools
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as theirs
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cnnfast
import cnnfast.functional as ours
import cnnfast.nn as cnn
import cnnfast_kernels
from tests.support.agreement import leaf, normal


def composition(x, w, mean, var, g, b, *, bias, residual, activation, training, **geometry):
    y = theirs.batch_norm(theirs.conv2d(x, w, bias, **geometry), mean, var, g, b, training)
    return getattr(theirs, activation)(y + residual)


def without_norm(x, w, bias, *, residual, activation, **geometry):
    return getattr(theirs, activation)(theirs.conv2d(x, w, bias, **geometry) + residual)


def without_convolution(x, mean, var, g, b, training, *, residual, activation):
    return getattr(theirs, activation)(theirs.batch_norm(x, mean, var, g, b, training) + residual)


COMPOSITIONS = {"conv_bn_act": composition, "conv_act": without_norm, "bn_act": without_convolution}
PYTORCH = SimpleNamespace(**vars(theirs) | COMPOSITIONS | {"global_avg_pool2d": lambda x: x.mean((2, 3), keepdim=True)})
X, IMAGE, W, ROW, TAPS = (2, 4, 4, 3), (2, 6, 4, 3), (6, 4, 3, 3), (2, 4, 6), (6, 2, 3)


def fused(activation, training):
    def call(f, x, w, bias, g, b, residual, mean, var):
        return f.conv_bn_act(
            x, w, mean, var, g, b, bias=bias, residual=residual, activation=activation, training=training, padding=1
        )

    return call, [X, W, (6,), (6,), (6,), IMAGE], (6,)


def finished(activation):
    def call(f, x, w, bias, residual):
        return f.conv_act(x, w, bias, padding=1, residual=residual, activation=activation)

    return call, [X, W, (6,), IMAGE], None


def normed(activation, training):
    def call(f, x, g, b, residual, mean, var):
        return f.bn_act(x, mean, var, g, b, training, residual=residual, activation=activation)

    return call, [X, (4,), (4,), X], (4,)


def norm(training):
    return lambda f, x, w, b, mean, var: f.batch_norm(x, mean, var, w, b, training), [X, (4,), (4,)], (4,)


# name: (call of a function f, shapes of the tensors that may want gradients, shape of running statistics)
CALLS = {
    "conv2d": (lambda f, x, w, b: f.conv2d(x, w, b, (2, 1), 1), [X, W, (6,)], None),
    "conv2d depthwise": (lambda f, x, w, b: f.conv2d(x, w, b, 1, 1, 1, 2), [(1, 2, 3, 3), (2, 1, 2, 2), (2,)], None),
    "conv1d": (lambda f, x, w, b: f.conv1d(x, w, b, 2, 1, 1, 2), [ROW, TAPS, (6,)], None),
    "conv_transpose2d": (
        lambda f, x, w, b: f.conv_transpose2d(x, w, b, (2, 1), 1, (1, 0)),
        [X, (4, 3, 3, 2), (3,)],
        None,
    ),
    "batch_norm training": norm(True),
    "batch_norm eval": norm(False),
    "max_pool2d": (lambda f, x: f.max_pool2d(x, 3, 2, 1), [X], None),
    "avg_pool2d": (lambda f, x: f.avg_pool2d(x, 3, 2, 1), [X], None),
    "adaptive_avg_pool2d": (lambda f, x: f.adaptive_avg_pool2d(x, (3, 6)), [X], None),
    "global_avg_pool2d": (lambda f, x: f.global_avg_pool2d(x), [X], None),
    "conv_bn_act relu training": fused("relu", True),
    "conv_bn_act relu eval": fused("relu", False),
    "conv_bn_act gelu eval": fused("gelu", False),
    "conv_act relu": finished("relu"),
    "conv_act gelu": finished("gelu"),
    "bn_act relu training": normed("relu", True),
    "bn_act gelu eval": normed("gelu", False),
}
NAMES = pytest.mark.parametrize("name", CALLS)


def operands(name, device, wanted=None) -> list[torch.Tensor]:
    """New tensors of the call: leaves, of which those `wanted` (all) want a gradient, and running statistics."""
    _, shapes, channels = CALLS[name]
    given = [
        normal(*shape, seed=i).to(device).requires_grad_(wanted is None or i in wanted)
        for i, shape in enumerate(shapes)
    ]
    return given + (
        [normal(*channels, seed=8).to(device), normal(*channels, seed=9).abs().add(0.5).to(device)] if channels else []
    )


def gradients(name, device, within=None):
    """(result, gradients) of a loss that is no linear function of the result."""
    inputs = operands(name, device)
    y = (within or (lambda call, *inputs: call(*inputs)))(lambda *inputs: CALLS[name][0](ours, *inputs), *inputs)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [t for t in inputs if t.requires_grad])]


plain_gradients = functools.cache(gradients)


def assert_same_bits(mine, right):
    torch.testing.assert_close(mine, right, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients that are asked for


@NAMES
def test_any_gradients(name, device):
    """Of the tensors none, one or two want one: they get what they get when all do."""
    complete = plain_gradients(name, device)[1:]
    count = len(complete)
    for wanted in itertools.chain(
        *(itertools.combinations(range(count), k) for k in range(min(count, 3 if count < 6 else 2)))
    ):
        inputs = operands(name, device, wanted)
        y = CALLS[name][0](ours, *inputs)
        assert y.requires_grad == bool(wanted)
        if wanted:
            grads = torch.autograd.grad(y.square().sum(), [inputs[i] for i in wanted])
            torch.testing.assert_close(list(grads), [complete[i] for i in wanted], rtol=1e-12, atol=1e-12)


NORM_KERNELS = {(): [], (0,): ["dy"], (1,): ["sums"], (2,): ["sums"], (1, 2): ["sums"], (0, 1, 2): ["sums", "dy"]}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("wanted", NORM_KERNELS, ids=str)
def test_batch_norm_launches_what_is_asked_for(wanted, training, device):
    """In training the gradient of the input goes through both sums."""
    name = "batch_norm training" if training else "batch_norm eval"
    with cnnfast.trace() as trace:
        y = CALLS[name][0](ours, *operands(name, device, wanted))
        if wanted:
            y.sum().backward()
    kernels = [event.kernel for call in trace if call.operation == "normalize_backward" for event in call.launches]
    expected = ["sums"] * (training and 0 in wanted) + NORM_KERNELS[wanted]
    names = {"sums": ["gradient_sums_kernel", "combine_kernel"], "dy": ["normalize_backward_kernel"]}
    assert kernels == [kernel for part in dict.fromkeys(expected) for kernel in names[part]]


@NAMES
def test_incoming_gradient_of_any_layout(name, device):
    """Expanded, with its axes turned, a slice, channels_last."""
    call = CALLS[name][0]
    results = []
    for f in (ours, PYTORCH):
        inputs = operands(name, device)
        y = call(f, *inputs)
        turned = tuple(reversed(range(y.dim())))
        layouts = [
            normal(1, *[1] * (y.dim() - 1)).expand(y.shape),
            normal(*(y.shape[i] for i in turned), seed=1).permute(turned),
            normal(*y.shape[:-1], 2 * y.shape[-1], seed=2)[..., ::2],
        ]
        if y.dim() == 4:
            layouts.append(normal(*y.shape, seed=4).contiguous(memory_format=torch.channels_last))
        wanted = [t for t in inputs if t.requires_grad]
        results.append([torch.autograd.grad(y, wanted, dy.to(y), retain_graph=True) for dy in layouts])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_autograd_accumulates(device):
    """One weight used twice gets the sum, whatever comes first; .grad is added to by a second backward."""
    x, w = normal(2, 2, 6, 6).to(device), normal(2, 2, 3, 3, seed=1).to(device)
    grads = []
    for f in (ours.conv2d, theirs.conv2d):
        weight = leaf(w.clone())
        for _ in range(2):
            y = f(f(x, weight, padding=1), weight)
            (y.sum() + f(x, weight).square().sum()).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_second_backward_needs_retain_graph(device):
    y = ours.conv2d(leaf(normal(*X).to(device)), normal(*W).to(device)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@NAMES
def test_hooks_and_retained_gradients(name, device):
    """A hook may change a gradient on its way; what it sees is retain_grad's."""
    call, results = CALLS[name][0], []
    for f in (ours, PYTORCH):
        inputs = operands(name, device)
        x = inputs[0] * 1.0
        x.retain_grad()
        x.register_hook(lambda g: 2 * g)
        y = call(f, x, *inputs[1:])
        if "relu" not in name:  # which reads its derivative off the result
            y.add_(1)
        y.register_hook(lambda g: g + 1)
        y.sum().backward()
        results.append([x.grad, *(t.grad for t in inputs if t.requires_grad)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_training_with_an_optimizer(device):
    """Parameters change in place between the steps."""
    left = []
    for namespace in (cnn, torch.nn):
        torch.manual_seed(0)
        layers = [
            namespace.Conv2d(4, 3, 3, padding=1),
            namespace.BatchNorm2d(3),
            namespace.MaxPool2d(2),
            namespace.ConvTranspose2d(3, 2, 2),
        ]
        model = torch.nn.Sequential(*layers).to(device, torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        for step in range(2):
            optimizer.zero_grad()
            model(normal(*X, seed=step).to(device)).square().mean().backward()
            optimizer.step()
        left.append(model.state_dict())
    torch.testing.assert_close(*(list(state.values()) for state in left), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# What is saved

# Kept where PyTorch keeps the argument of the activation: it is computed again from these.
RECOMPUTED = {"conv_bn_act gelu eval": (4, 5), "conv_act gelu": (2, 3), "bn_act gelu eval": (2, 3)}


def gradients_or_none(loss, inputs):
    """None if what backward needs has changed."""
    try:
        return torch.autograd.grad(loss, inputs)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


@NAMES
def test_changed_in_place(name, device):
    """Each tensor and the result, between forward and backward: an error where PyTorch has one, or else the right
    gradients.

    Ours keeps less: pools keep no image, a norm in training no running statistics.
    """
    call, shapes, _ = CALLS[name]
    for i in range(len(operands(name, device)) + 1):
        outcomes = []
        for f in (ours, PYTORCH):
            inputs = [t * 1.0 if t.requires_grad else t for t in operands(name, device)]
            y = call(f, *inputs)
            with torch.no_grad():
                (*inputs, y)[i].add_(1)
            outcomes.append(gradients_or_none((y * 1.0).sum(), inputs[: len(shapes)]))
        mine, right = outcomes
        if mine is None:
            assert right is None or i in RECOMPUTED.get(name, ())
        elif right is None:
            inputs = operands(name, device)
            right = torch.autograd.grad(call(PYTORCH, *inputs).sum(), inputs[: len(shapes)])
        if mine is not None:
            torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)


def to_numpy(t):
    return t.device, t.cpu().numpy().copy()


def from_numpy(packed):
    return torch.from_numpy(packed[1]).to(packed[0])


@NAMES
def test_saved_tensor_hooks(name, device):
    """What is saved is packed as something that is no tensor."""

    def within(call, *inputs):
        with saved_tensors_hooks(to_numpy, from_numpy):
            return call(*inputs)

    assert_same_bits(gradients(name, device, within), plain_gradients(name, device))


def test_save_on_cpu(device):
    def within(call, *inputs):
        with save_on_cpu():
            return call(*inputs)

    name = "conv_bn_act relu training"
    assert_same_bits(gradients(name, device, within), plain_gradients(name, device))


@NAMES
def test_mutation_on_saved_tensors_may_be_allowed(name, device):
    with allow_mutation_on_saved_tensors():
        inputs = [t * 1.0 if t.requires_grad else t for t in operands(name, device)]
        y = CALLS[name][0](ours, *inputs)
        loss = y.square().sum()
        wanted = inputs[: len(CALLS[name][1])]
        with torch.no_grad():
            for t in (*inputs, y):
                t.zero_()
        grads = torch.autograd.grad(loss, wanted)
    assert_same_bits(list(grads), plain_gradients(name, device)[1:])


@pytest.mark.parametrize("reentrant", [False, True])
@NAMES
def test_checkpoint(name, reentrant, device):
    """The forward that runs again within backward gives the same gradients."""
    inputs = operands(name, device)
    y = checkpoint(lambda *inputs: CALLS[name][0](ours, *inputs), *inputs, use_reentrant=reentrant)
    y.square().sum().backward()
    assert_same_bits([y.detach(), *(t.grad for t in inputs if t.requires_grad)], plain_gradients(name, device))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_modules(reentrant, device):
    """Buffers are updated twice, as PyTorch's."""
    left = []
    for namespace in (cnn, torch.nn):
        torch.manual_seed(0)
        layers = [
            namespace.Conv2d(4, 3, 3, padding=1),
            namespace.BatchNorm2d(3),
            namespace.AvgPool2d(2),
            namespace.AdaptiveAvgPool2d(1),
        ]
        model = torch.nn.Sequential(*layers).to(device, torch.float64)
        x = leaf(normal(*X).to(device))
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        left.append([x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*left, rtol=1e-11, atol=1e-11)


# ----------------------------------------------------------------------------------------------------------------------
# Modes


@NAMES
def test_deterministic_mode(name, device):
    """The same bits, without a warning, whether memory is filled with NaN or not; and under detect_anomaly, which sees
    no NaN.
    """
    plain = plain_gradients(name, device)
    try:
        for fill in (True, False):
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "Anomaly Detection")
                with torch.autograd.set_detect_anomaly(fill):
                    assert_same_bits(gradients(name, device), plain)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore


@NAMES
def test_without_gradients(name, device):
    """no_grad, inference_mode and set_grad_enabled: nothing is recorded, and the result is the same."""
    right = plain_gradients(name, device)[0]
    for context in (torch.no_grad(), torch.inference_mode(), torch.set_grad_enabled(False)):
        with context:
            y = CALLS[name][0](ours, *operands(name, device))
            assert not y.requires_grad
            assert y.is_inference() == isinstance(context, torch.inference_mode)
        # frozen statistics are fused where no gradient is wanted
        torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv2d", "conv1d", "conv_transpose2d", "batch_norm training", "batch_norm eval"])
def test_inference_tensors_are_not_saved(name, device):
    """What was made in inference mode cannot take part in a gradient that needs it, as in PyTorch."""
    with torch.inference_mode():
        frozen = [t.detach().clone() for t in operands(name, device)]
    mixed = [*operands(name, device)[:1], *frozen[1:]]
    for f in (ours, PYTORCH):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            CALLS[name][0](f, *mixed)


# ----------------------------------------------------------------------------------------------------------------------
# The host does not wait


class Asked(TorchDispatchMode):
    """Notes operators for which the host has to know a number that a GPU computes, or that copy between the two."""

    WAIT = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "equal",
        "nonzero",
        "_to_copy",
        "_unique2",
        "masked_select",
        "copy_",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and func._opname in self.WAIT:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@NAMES
def test_nothing_synchronises(name, device):
    """Forward, backward and a second derivative ask no tensor for its value."""
    inputs = operands(name, device)
    wanted = inputs[: len(CALLS[name][1])]
    with Asked() as asked:
        y = CALLS[name][0](ours, *inputs)
        grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
    assert asked.seen == []


def test_nothing_synchronises_in_the_source():
    """No method that waits for a GPU is called, but where the interpreter is tried out (CPU tensors), where images are
    packed and numbers drawn (on the CPU, from indices that are best there), and where PyTorch serves an augmentation.
    """
    waits = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "is_nonzero", "equal", "allclose"}
    packages = Path(cnnfast.__file__).parent, Path(cnnfast_kernels.__file__).parent
    files = [
        packages[0] / "dispatch.py",
        packages[0] / "recording.py",
        *(f for part in ("ops", "functional", "nn") for f in (packages[0] / part).glob("*.py")),
    ]
    files += [f for f in packages[1].rglob("*.py") if f.parent.name != "aot"]
    found = [
        (file.name, node.func.attr)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in waits
    ]
    on_the_cpu = {
        "dispatch.py": "item",
        "augmentation.py": "numpy tolist",
        "augment.py": "numpy",
        "augment_inputs.py": "cpu",
    }
    waiting = {(file, name) for file, name in found if not file.startswith("plain_")}
    assert waiting == {(file, name) for file, names in on_the_cpu.items() for name in names.split()}
