"""Converted models, and modules of cnnfast.nn, traced by torch.fx: the nodes, targets and names of the originals, and
their numbers.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import cnnfast
import cnnfast.nn as cnn
from tests.support.blocks import CHANNELS, CONVOLUTIONS, Block, Net, block, build, image
from tests.support.model_zoo import randomise
from tests.support.packages import package
from tests.support.steps import assert_same_steps


def nodes(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(n.op, n.name, n.target, str(n.args), str(n.kwargs)) for n in graph.nodes]


def by(tracer: type[fx.Tracer] = fx.Tracer, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: nodes(tracer(**options).trace(model))


def outcome(call: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    try:
        return call(model)
    except Exception as error:
        return type(error)


class NoLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


class LeavesByType(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in (nn.Conv2d, nn.BatchNorm2d)


class BlocksAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Block) or super().is_leaf_module(m, module_qualified_name)


class SomeAreEntered(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name != "conv2" and super().is_leaf_module(m, module_qualified_name)


def every_layer() -> nn.Module:
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(4, 4, 2),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 1, groups=2),
    )
    return nn.Sequential(
        *layers, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2), nn.Flatten(2), nn.Conv1d(4, 4, 3, padding=1)
    )


class OwnConv2d(nn.Conv2d):
    """Of no module of torch's: tracers enter it."""


def calls_a_forward(self, x):
    return self.relu(self.bn(self.conv.forward(x)))


def names_its_argument(self, x):
    return self.relu(self.bn(self.conv(input=x))) + x


def doubled(x):
    return x * 2


def calls_a_helper(self, x):
    return doubled(self.relu(self.bn(self.conv(x))))


def asks_for_a_size(self, x):
    return self.relu(self.bn(self.conv(x))) * math.sqrt(x.size(1))


def spectral_norm_by_hook() -> nn.Module:
    """Its weight is computed by a hook at every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(CHANNELS, CHANNELS, 1)), nn.BatchNorm2d(CHANNELS))


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "network": (Net, by()),
    "no leaves": (lambda: every_layer()[:3], by(NoLeaves)),
    "no norm is a leaf": (every_layer, by(NoLeaves)),
    "every layer": (every_layer, by()),
    "leaves by type": (Block, by(LeavesByType)),
    "blocks are leaves": (Net, by(BlocksAreLeaves)),
    "one is entered": (Block, by(SomeAreEntered)),
    "root is a convolution": (lambda: nn.Conv2d(3, 4, 1), by()),
    "root is a transposed convolution": (lambda: nn.ConvTranspose2d(3, 4, 1), by()),
    "root is a norm": (lambda: nn.BatchNorm2d(3), by()),
    "root is a pool": (lambda: nn.MaxPool2d(2), by()),
    "subclass": (lambda: nn.Sequential(OwnConv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), by()),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)),
        by(),
    ),
    "weight by a hook": (spectral_norm_by_hook, by()),
    "forward is called": (block(calls_a_forward), by()),
    "by keyword": (block(names_its_argument), by()),
    "helper is recorded": (block(calls_a_helper), by(autowrap_functions=(doubled,))),
    "math is recorded": (block(asks_for_a_size), by(autowrap_modules=(math,))),
    "concrete arguments": (Net, lambda model: nodes(fx.symbolic_trace(model, concrete_args={"x": fx.PH}).graph)),
}


# torch.nn's own forwards decide by sizes
UNTRACEABLE = {"root is a transposed convolution", "root is a norm", "no norm is a leaf"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_same_nodes(program, quick):
    make, program_nodes = PROGRAMS[program]
    model = build(make, quick)
    right = outcome(program_nodes, model)
    assert isinstance(right, list) == (program not in UNTRACEABLE)
    assert outcome(program_nodes, cnnfast.convert(model)) == right
    assert outcome(program_nodes, model) == right


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_traced_model_computes_the_same_and_fuses_again(net, x, training):
    original = copy.deepcopy(net)
    traced = fx.symbolic_trace(cnnfast.convert(net).train(training))
    assert {type(m) for m in traced.modules() if isinstance(m, nn.Conv2d)} == {cnn.Conv2d}
    assert_same_steps(traced, original, x, fused=0)
    assert_same_steps(cnnfast.convert(traced), original, x, fused=CONVOLUTIONS)


def doubles_results(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output * 2)


def doubles_inputs(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, inputs: inputs[0] * 2)


@pytest.mark.parametrize("hook", [doubles_results, doubles_inputs], ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("path", ["conv", "bn", ""])
def test_hooks_run_once(path, hook, quick):
    """Those of a layer belong to its call, those of the block to the trace."""
    x = image().to(quick)
    model = build(Block, quick)
    hook(model.get_submodule(path))
    right = fx.symbolic_trace(copy.deepcopy(model))
    traced = fx.symbolic_trace(cnnfast.convert(model))
    assert nodes(traced.graph) == nodes(right.graph)
    assert_same_steps(traced, right, x)


def test_hooks_of_all_modules_run_once(quick):
    x = image().to(quick)
    model = build(Block, quick)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output * 2 if isinstance(module, nn.Conv2d) else None
    )
    try:
        right, traced = fx.symbolic_trace(copy.deepcopy(model)), fx.symbolic_trace(cnnfast.convert(model))
        assert nodes(traced.graph) == nodes(right.graph)
        assert_same_steps(traced, right, x)
    finally:
        hook.remove()


def test_proxies_without_a_tracer(quick):
    """A graph that is written by hand has nobody to ask for leaves: torch.nn's layer records what it does inside, and
    so does ours.
    """
    graphs = []
    for pool in (nn.MaxPool2d, cnn.MaxPool2d):
        graph = fx.Graph()
        pool(2)(fx.Proxy(graph.placeholder("x")))
        graphs.append(nodes(graph))
    assert graphs[0] == graphs[1]


def test_a_layer_of_ours_alone(quick):
    """cnnfast.nn has a layer that torch.nn has not: it is a leaf too."""
    model = nn.Sequential(cnn.GlobalAvgPool2d(), nn.Flatten())
    assert [n.target for n in fx.symbolic_trace(model).graph.nodes if n.op == "call_module"] == ["0", "1"]

    class Own(cnn.Conv2d):
        pass

    entered = fx.symbolic_trace(nn.Sequential(Own(3, 4, 1)))
    assert [n.op for n in entered.graph.nodes] == ["placeholder", "get_attr", "get_attr", "call_function", "output"]


# ----------------------------------------------------------------------------------------------------------------------
# Blocks and networks of our own


@pytest.mark.parametrize("arguments", [{}, {"activation": None}, {"activation": "gelu_tanh", "stride": 2}], ids=str)
def test_conv_bn_act(arguments, quick):
    model = build(lambda: nn.Sequential(cnn.ConvBNAct(3, 4, 3, **arguments), cnn.ConvBNAct(4, 4, 1)), quick)
    traced = fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0.conv", "0.bn", "1.conv", "1.bn"]
    assert_same_steps(traced, copy.deepcopy(model), image(3, 9).to(quick))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_our_resnets_have_torchvisions_nodes(name, torchvision, quick):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    theirs = getattr(torchvision.models, name)(num_classes=3)
    ours = getattr(cnnfast.models, name)(num_classes=3)
    assert nodes(fx.symbolic_trace(ours).graph) == nodes(fx.symbolic_trace(theirs).graph)
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    if name == "resnet18":
        randomise(theirs).double().to(quick).eval()
        ours.double().to(quick).eval().load_state_dict(theirs.state_dict())
        extractors = [create_feature_extractor(model, ["layer1.0.bn1", "layer4"]) for model in (ours, theirs)]
        assert_same_steps(*extractors, image(3, 33).to(quick), modes=("no_grad", "train"))
        assert_same_steps(
            cnnfast.convert(extractors[0]), extractors[1].eval(), image(3, 33).to(quick), modes=("no_grad",), fused=20
        )


# ----------------------------------------------------------------------------------------------------------------------
# Tools that trace


def test_torchvisions_feature_extractor(net, x, torchvision):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    ours = cnnfast.convert(copy.deepcopy(net))
    assert get_graph_node_names(ours) == get_graph_node_names(net)
    wanted = {"stem.1": "norm", "layers.0.bn2": "middle", "layers.2": "last", "flatten": "flat"}
    extractor, right = (create_feature_extractor(model, wanted) for model in (ours, net))
    assert list(extractor(x)) == list(wanted.values())
    assert_same_steps(extractor, right, x)
    # norm and bn2 are results: their convolutions are fused without what follows
    assert_same_steps(cnnfast.convert(extractor), copy.deepcopy(right).eval(), x, fused=CONVOLUTIONS)


@pytest.mark.parametrize("name", ["resnet18", "regnety_002"])
def test_timms_names(name, torchvision, quick):
    """regnety_002 has timm's norms that activate: its forward is what is traced."""
    timm = package("timm")
    from timm.models._features_fx import get_graph_node_names

    model = timm.create_model(name, num_classes=3)
    converted = cnnfast.convert(model)
    assert get_graph_node_names(converted) == get_graph_node_names(model)


def test_timms_features_of_a_converted_model(torchvision, quick):
    timm = package("timm")
    from timm.models._features_fx import FeatureGraphNet

    model = build(functools.partial(timm.create_model, "resnet18", num_classes=3), quick)
    right = FeatureGraphNet(copy.deepcopy(model), (1, 2)).eval()
    features = FeatureGraphNet(cnnfast.convert(model), (1, 2)).eval()
    assert_same_steps(features, right, image(3, 33).to(quick), modes=("no_grad",))
    assert_same_steps(cnnfast.convert(features), right, image(3, 33).to(quick), modes=("no_grad",), fused=10)


def test_timms_norms_that_activate(torchvision, quick):
    norm = package("timm.layers").BatchNormAct2d
    model = build(
        lambda: nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 1), norm(CHANNELS), nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4)
        )
    )
    model = model.to(quick)
    converted = cnnfast.convert(copy.deepcopy(model))
    for tracer in (fx.Tracer, NoLeaves):
        assert outcome(by(tracer), converted) == outcome(by(tracer), model)


def test_fx_fuses_a_converted_model(net, x):
    """torch.fx.experimental.optimization: it knows torch.nn's classes only, folds nothing, and computes the same."""
    from torch.fx.experimental import optimization

    ours = cnnfast.convert(net)
    for model in (ours, cnnfast.convert(fx.symbolic_trace(net))):
        for tool in (optimization.fuse, optimization.remove_dropout):
            torch.testing.assert_close(tool(model)(x), net(x), rtol=1e-10, atol=1e-10)
    folded = optimization.fuse(cnnfast.revert(ours))
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(folded(x), net(x), rtol=1e-10, atol=1e-10)


QUANTIZE = ["prepare_fx", "prepare_qat_fx"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("prepare", QUANTIZE)
@pytest.mark.parametrize("make", [lambda net: net, fx.symbolic_trace], ids=["model", "graph module"])
def test_quantization_says_to_revert(prepare, make, net, x):
    """It would find no convolution, and quantise none, without a word."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping, quantize_fx

    training = prepare == "prepare_qat_fx"
    mapping = get_default_qat_qconfig_mapping() if training else get_default_qconfig_mapping()
    tool = functools.partial(getattr(quantize_fx, prepare), qconfig_mapping=mapping, example_inputs=(x,))
    model = make(net).train(training)
    ours = cnnfast.convert(model)
    with pytest.raises(TypeError, match=r"stem\.0.*cnnfast\.revert"):
        tool(ours)
    right, prepared = tool(copy.deepcopy(model)), tool(cnnfast.revert(ours))
    assert [type(m).__name__ for m in prepared.modules()] == [type(m).__name__ for m in right.modules()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantization_of_ours_alone(quick):
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    with pytest.raises(TypeError, match=r"revert"):
        quantize_fx.prepare_fx(cnn.ConvBNAct(3, 4, 3).eval(), get_default_qconfig_mapping(), (image(3).float(),))


def test_functions_take_proxies(quick):
    """cnnfast.functional in a user's own forward is recorded, as torch.nn.functional is."""
    import cnnfast.functional as CF

    class Functional(nn.Module):
        def __init__(self, functions: Any) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.functions = functions

        def forward(self, x):
            return self.functions.max_pool2d(self.functions.conv2d(x, self.conv.weight, self.conv.bias, 1, 1), 2)

    ours, theirs = (build(functools.partial(Functional, functions), quick) for functions in (CF, F))
    traced = fx.symbolic_trace(ours)
    assert [n.op for n in traced.graph.nodes] == [n.op for n in fx.symbolic_trace(theirs).graph.nodes]
    assert_same_steps(traced, theirs, image(3, 9).to(quick))


# ----------------------------------------------------------------------------------------------------------------------
# The call of a layer is ours: what else comes that way


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
def test_layers_compile(hooked, keyword, quick):
    x = image(3, 9).to(quick)
    layer = build(lambda: cnn.Conv2d(3, 4, 3), quick)
    right = layer(x)
    if hooked:
        doubles_results(layer)
        right = right * 2
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(input=x) if keyword else layer(x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(input=x) if keyword else layer(x), right, rtol=1e-10, atol=1e-10)
    layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(layer(x), right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), [("Conv2d", (3, 4, 3)), ("BatchNorm2d", (3,)), ("MaxPool2d", (2,))])
def test_calls_with_other_things_than_tensors(name, options):
    """Raise what torch.nn's layer raises."""
    layers = [getattr(module, name)(*options) for module in (cnn, nn)]
    for args, kwargs in (
        ((), {}),
        ((3,), {}),
        ((None,), {}),
        ((), {"input": "image"}),
        ((), {"image": image(3)}),
        ((image(3), 1), {}),
    ):
        ours, theirs = (outcome(lambda layer: layer(*args, **kwargs), layer) for layer in layers)  # noqa: B023
        assert ours is theirs, (args, kwargs)
