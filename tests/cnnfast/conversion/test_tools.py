"""PyTorch's tools on a converted model: copies, files, transforms, averages, checkpointing, compile, export."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cnnfast
from tests.support.blocks import CONVOLUTIONS, Block, Net, build, image
from tests.support.child import run_compiled
from tests.support.steps import assert_same_steps, fusions, noise

# ----------------------------------------------------------------------------------------------------------------------
# Copies and files


def test_deepcopy(net, x):
    """Tensors of its own, and as fused as the original."""
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    twin = copy.deepcopy(ours)
    assert not {id(t) for t in twin.parameters()} & {id(t) for t in ours.parameters()}
    assert_same_steps(twin, original, x, fused=CONVOLUTIONS)
    with torch.no_grad():
        twin.stem[0].weight.zero_()
        twin.layers[0].bn = nn.Identity()
    assert_same_steps(ours, copy.deepcopy(net), x, fused=CONVOLUTIONS)


def test_a_shallow_copy(net, x):
    ours = cnnfast.convert(net)
    assert_same_steps(copy.copy(ours), copy.deepcopy(ours), x, modes=("no_grad",))


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickle(net, x, protocol):
    ours = cnnfast.convert(net)
    loaded = pickle.loads(pickle.dumps(ours, protocol))
    assert_same_steps(loaded, copy.deepcopy(net), x, fused=CONVOLUTIONS)


def test_save_and_load_of_weights(net, x):
    ours, buffer = cnnfast.convert(net), io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    other = build(Net, x.device)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_steps(other, copy.deepcopy(ours), x)


def load_and_run(model_file: str, input_file: str) -> list:
    import os

    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    import cnnfast

    model = torch.load(model_file, weights_only=False)
    x = torch.load(input_file)
    with torch.no_grad(), cnnfast.trace() as trace:
        y = model(x)
    kinds = [type(module).__name__ for module in model.modules()]
    return [y.tolist(), sum(call.operation == "conv_bn_act" for call in trace), kinds]


@pytest.mark.compiled
def test_a_whole_model_loads_in_another_process(tmp_path, device):
    """Converted by one process, called by the next, which has imported nothing for it."""
    net = build(Net)
    x, ours = image(3, 9), cnnfast.convert(net)
    torch.save(ours, tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    y, fused, kinds = run_compiled(load_and_run, str(tmp_path / "model.pt"), str(tmp_path / "x.pt"))
    torch.testing.assert_close(torch.tensor(y, dtype=torch.float64), net(x), rtol=1e-10, atol=1e-10)
    assert fused == CONVOLUTIONS
    assert kinds == [type(module).__name__ for module in ours.modules()]


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's tools


def test_pytorch_serves_bit_for_bit(net, x):
    """Where it does, the container's own forward runs."""
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    traces = assert_same_steps(ours, original, x, tolerance=0, within=lambda: cnnfast.backend("torch"))
    for trace in traces.values():
        assert {call.served_by for call in trace} == {"torch"}
        assert not [call for call in trace if call.operation == "conv_bn_act"], "nothing is fused for PyTorch"


def test_functional_call_and_transforms(net, x):
    """Parameters that are given for a call; gradients, Jacobian products and ensembles by functorch."""
    original, ours = copy.deepcopy(net).eval(), cnnfast.convert(net).eval()
    parameters = {name: p.detach() * 1.5 for name, p in net.named_parameters()}
    stacked = {name: torch.stack([p, p * 2]) for name, p in parameters.items()}
    tangents = {name: noise(p) for name, p in parameters.items()}
    results = []
    for model in (ours, original):
        call = lambda p, model=model: torch.func.functional_call(model, p, (x,))  # noqa: E731
        results.append(
            [
                call(parameters),
                *torch.func.grad(lambda p, call=call: call(p).square().sum())(parameters).values(),
                *torch.func.jvp(call, (parameters,), (tangents,)),
                torch.func.vmap(call)(stacked),
            ]
        )
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


def test_second_derivatives(net, x):
    original, ours = copy.deepcopy(net).eval(), cnnfast.convert(net).eval()
    results = []
    for model in (ours, original):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), [leaf, *model.parameters()], allow_unused=True))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


def test_inference_mode(net, x):
    original, ours = copy.deepcopy(net).eval(), cnnfast.convert(net).eval()
    with torch.inference_mode(), cnnfast.trace() as trace:
        torch.testing.assert_close(ours(x), original(x), rtol=1e-12, atol=1e-12)
    assert fusions(trace) == CONVOLUTIONS


def test_initialisation_by_apply(net, x):
    """Code that looks for classes goes on finding them."""

    def initialise(module):
        if isinstance(module, nn.Conv2d):
            torch.manual_seed(0)
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
        elif isinstance(module, Block):
            nn.init.zeros_(module.bn2.weight)

    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    assert_same_steps(ours.apply(initialise), original.apply(initialise), x, fused=CONVOLUTIONS)


def test_averaged_copies(net, x):
    """torch.optim.swa_utils: an EMA of a converted model, and its batch norms renewed."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    averages = []
    for model in (cnnfast.convert(copy.deepcopy(net)), copy.deepcopy(net)):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
        for _ in range(2):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(noise(p), alpha=0.1)
            average.update_parameters(model)
        update_bn([x, x * 2], average)
        averages.append(average)
    assert_same_steps(*averages, x, fused=CONVOLUTIONS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(net, x, reentrant):
    """Around converted blocks: the recomputation is the same, and updates running statistics as often as PyTorch's."""

    class Checkpointed(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            y = self.net.pool(self.net.stem(x))
            for layer in self.net.layers:
                y = checkpoint(layer, y, use_reentrant=reentrant)
            return self.net.fc(y.mean((2, 3)))

    ours, original = Checkpointed(cnnfast.convert(copy.deepcopy(net))), Checkpointed(net)
    traces = assert_same_steps(ours, original, x)
    assert [fusions(trace) for trace in traces.values()] == [CONVOLUTIONS, 2 * CONVOLUTIONS - 1, 2 * CONVOLUTIONS - 1]


def test_checkpoint_wrapper(net, x):
    """Modules that wrap a module, put between the converted ones afterwards."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    for model in (original, ours):
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    assert_same_steps(ours, original, x)


# These run the operators themselves: it is their schemas and fakes that compile and export.


@pytest.fixture
def small(device) -> tuple[nn.Module, Tensor]:
    """Eval and float32, and an input, for tools that take seconds."""
    return build(Net, device).float(), image(3, 7).float().to(device)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_compile_without_a_graph_break(small, training):
    net, x = small
    original, ours = copy.deepcopy(net).train(training), cnnfast.convert(net).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training), cnnfast.trace() as trace:
        y, right = compiled(x), original(x)
        torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)
        if training:
            y.square().sum().backward()
            right.square().sum().backward()
    assert fusions(trace) == CONVOLUTIONS
    for (name, mine), theirs in zip(ours.named_parameters(), original.parameters(), strict=True):
        if training:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
    for mine, theirs in zip(ours.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_check_judges_the_fused_calls(small):
    """cnnfast.check on a converted model: each fused call against float64, forward and backward."""
    net, x = small
    report = cnnfast.check(cnnfast.convert(net), x)
    assert report.ok, str(report)
    assert str(report).count("conv_bn_act") >= CONVOLUTIONS


def test_compile_notices_surgery(small):
    net, x = small
    original, ours = copy.deepcopy(net), cnnfast.convert(net)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad():
        compiled(x)
        for model in (original, ours):
            model.layers[0].bn = nn.Identity()
        torch.testing.assert_close(compiled(x), original(x), rtol=1e-4, atol=1e-4)


def test_export(small):
    net, x = small
    ours = cnnfast.convert(copy.deepcopy(net))
    with torch.no_grad():
        program = torch.export.export(ours, (x,))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("cnnfast.conv_bn_act.default") == CONVOLUTIONS
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-4)
    assert set(program.state_dict) == set(net.state_dict())


def test_onnx_by_revert(small, tmp_path):
    """ONNX has no operators of ours, and needs none: a reverted model is the user's own."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = small
    ours = cnnfast.convert(net)
    file = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(cnnfast.revert(ours).cpu(), (x.cpu(),), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net.cpu()(x.cpu()), rtol=1e-4, atol=1e-4)
