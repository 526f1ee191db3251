"""convert on torch.fx's GraphModules: traced models, feature extractors, graphs that are changed afterwards, copies and
files of them.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import cnnfast
from tests.support.blocks import CHANNELS, CONVOLUTIONS, Block, Net, block, build, image
from tests.support.packages import package
from tests.support.steps import assert_same_steps, converted, fusions


class Plain(Net):
    """A Net without annotations: fx writes those of a root into its code, and then fails to pickle it."""

    def forward(self, x):
        x = self.layers(self.pool(self.stem(x)))
        return self.fc(torch.flatten(self.average(x), 1))


class Around(nn.Module):
    """A GraphModule between ordinary modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.middle = fx.symbolic_trace(
            nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        )

    def forward(self, x):
        return self.middle(self.first(x))


class KeepsBlocks(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Block) or super().is_leaf_module(m, module_qualified_name)


class NamedGraph(fx.GraphModule):
    """A GraphModule's class that somebody derived."""


def traced() -> nn.Module:
    return fx.symbolic_trace(build(Plain))


def extractor() -> nn.Module:
    features = package("torchvision.models.feature_extraction")
    nodes = {"stem.1": "norm", "layers.0.relu": "middle", "layers.2": "last", "fc": "classes"}
    return features.create_feature_extractor(build(Plain), nodes)


def keeps_blocks() -> nn.Module:
    net = build(Plain)
    return fx.GraphModule(net, KeepsBlocks().trace(net), "KeepsBlocks")


def named_graph() -> nn.Module:
    net = build(Plain)
    return NamedGraph(net, fx.Tracer().trace(net))


def twice_traced() -> nn.Module:
    return fx.symbolic_trace(traced())


# How each is made, the channels of its input and how many convolutions are fused. The extractor's stem ends with its
# norm.
KINDS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "traced": (traced, 3, CONVOLUTIONS),
    "extractor": (extractor, 3, CONVOLUTIONS),
    "in an ordinary model": (lambda: build(Around), CHANNELS, 3),
    "around ordinary blocks": (keeps_blocks, 3, CONVOLUTIONS),
    "of a derived class": (named_graph, 3, CONVOLUTIONS),
    "traced twice": (twice_traced, 3, CONVOLUTIONS),
}


@pytest.fixture(params=KINDS)
def graph_kind(
    request: pytest.FixtureRequest, quick: torch.device, torchvision: Any
) -> tuple[nn.Module, torch.Tensor, int]:
    """A model in eval, an input, and how many of its convolutions are fused."""
    make, channels, fused = KINDS[request.param]
    return make().to(quick).eval(), image(channels, 9).to(quick), fused


def own_copy(model: nn.Module) -> nn.Module:
    """With buffers of its own, and in the original's mode: a deepcopy of torchvision's extractor comes back in
    training.
    """
    return copy.deepcopy(model).train(model.training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_graph_modules(graph_kind, training):
    model, x, fused = graph_kind
    model.train(training)
    ours, original = cnnfast.convert(model), own_copy(model)
    for (name, mine), (right, theirs) in zip(ours.named_modules(), model.named_modules(), strict=True):
        assert (name, mine.training) == (right, theirs.training)
        assert mine is not theirs
        assert isinstance(mine, type(theirs)) or isinstance(theirs, fx.GraphModule)
    mine, theirs = (m.state_dict(keep_vars=True) for m in (ours, model))
    assert list(mine) == list(theirs)
    assert all(mine[key] is theirs[key] for key in theirs)
    torch.testing.assert_close(ours(x), original(x), rtol=1e-10, atol=1e-10)  # in the mode it came in
    assert_same_steps(ours, original, x, fused=fused)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False).to(next(model.parameters()).device)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "converted again": cnnfast.convert,
    "converted again in place": lambda model: cnnfast.convert(model, inplace=True),
    "a copy converted again": lambda model: cnnfast.convert(copy.deepcopy(model)),
    "reverted and converted": lambda model: cnnfast.convert(cnnfast.revert(model)),
    "a copy of a copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_of_graph_modules_stay_fused(graph_kind, way):
    model, x, fused = graph_kind
    original = own_copy(model)
    ours = cnnfast.convert(model)
    twin = WAYS[way](ours)
    assert_same_steps(twin, original, x, fused=fused)
    assert list(twin.state_dict()) == list(model.state_dict())
    before = ours.state_dict()
    assert_same_steps(ours, own_copy(model), x, fused=fused)  # reading a GraphModule's state recompiles it
    assert list(ours.state_dict()) == list(before)


def test_reverted_graph_modules(graph_kind):
    model, x, _ = graph_kind
    original = own_copy(model)
    back = cnnfast.revert(cnnfast.convert(model))
    assert not [m for m in back.modules() if type(m).__module__.startswith("cnnfast")]
    for module in back.modules():
        if isinstance(module, fx.GraphModule):
            module.recompile()
    assert_same_steps(back, original, x, fused=0)


def test_a_graph_module_reads_as_before(quick):
    model = fx.symbolic_trace(build(Plain))
    ours = cnnfast.convert(model)
    assert type(ours).__name__ == type(model).__name__
    assert ours.code == model.code
    assert str(ours.graph) == str(model.graph)
    assert ours.graph.owning_module is ours
    assert model.graph.owning_module is model
    assert ours.print_readable(print_output=False) == model.print_readable(print_output=False)
    ours_text, text = (re.sub("  # .*", "", str(m)) for m in (ours, model))  # but for comments on what is fused
    assert ours_text == text
    ours.graph.lint()


def reads_a_parameter(self, x):
    return self.relu(self.bn(self.conv(x))) + self.bn2.weight.view(-1, 1, 1)


def test_report_of_a_graph_module(quick):
    """Containers within it, which are not called, are no rows; one that is not fused says why."""
    report = cnnfast.report(cnnfast.convert(traced().to(quick)))
    assert {row.status for row in report.rows} == {"fused", "replaced"}
    assert report.count("fused") == CONVOLUTIONS
    unfused = fx.symbolic_trace(nn.Sequential(build(block(reads_a_parameter), quick)))
    rows = {row.name: row for row in cnnfast.report(cnnfast.convert(unfused)).rows}
    assert (rows[""].status, rows[""].reason) == ("left", "not fused: its forward reads 0.bn2.weight itself")
    assert rows["0.conv"].status == "replaced"
    assert "0" not in rows


# ----------------------------------------------------------------------------------------------------------------------
# Graphs that change


def twice_the_last_relu(model: Any) -> None:
    node = next(n for n in reversed(model.graph.nodes) if n.op == "call_module" and str(n.target).endswith("relu"))
    with model.graph.inserting_after(node):
        doubled = model.graph.call_function(torch.mul, (node, 2.0))
    node.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)


def without_one_norm(model: Any) -> None:
    node = next(n for n in model.graph.nodes if n.target == "layers.0.bn2")
    node.replace_all_uses_with(node.args[0])
    model.graph.erase_node(node)


def with_another_convolution(model: Any) -> None:
    """One that is not converted yet."""
    torch.manual_seed(1)
    model.add_submodule("new", nn.Conv2d(CHANNELS, CHANNELS, 1).to(next(model.parameters())))
    node = next(n for n in model.graph.nodes if n.target == "layers.0.conv")
    with model.graph.inserting_before(node):
        node.args = (model.graph.call_module("new", node.args),)


def ends_early(model: Any) -> None:
    node = next(n for n in model.graph.nodes if n.target == "layers.2.conv")
    next(n for n in model.graph.nodes if n.op == "output").args = (node.args[0],)
    model.graph.eliminate_dead_code()


EDITS = {twice_the_last_relu: 5, without_one_norm: 4, with_another_convolution: 5, ends_early: 3}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_graph_runs_and_fuses_again(quick, edit):
    x = image(3, 9).to(quick)
    model = traced().to(quick)
    original, ours = own_copy(model), cnnfast.convert(model)
    for m in (original, ours):
        edit(m)
        m.recompile()
    assert_same_steps(ours, original, x, fused=EDITS[edit])
    for m in (original, ours):
        m.delete_all_unused_submodules()
    assert_same_steps(ours, original, x, fused=EDITS[edit])
    assert list(ours.state_dict()) == list(original.state_dict())
    assert_same_steps(cnnfast.convert(ours), own_copy(original), x, fused=EDITS[edit])


def test_another_graph(quick):
    x = image(3, 9).to(quick)
    model = traced().to(quick)
    original, ours = own_copy(model), cnnfast.convert(model)
    for m in (original, ours):
        graph = copy.deepcopy(m.graph)
        next(n for n in graph.nodes if n.op == "output").args = (next(n for n in graph.nodes if n.target == "pool"),)
        m.graph = graph
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)
    for m in (original, ours):
        m.graph.eliminate_dead_code()
        m.recompile()
    assert_same_steps(ours, original, x, fused=1)


def test_a_graph_that_does_not_compile(quick):
    """recompile() raises as the original's does, and what ran before goes on running."""
    x = image(3, 9).to(quick)
    model = traced().to(quick)
    original, ours = own_copy(model), cnnfast.convert(model)
    for m in (original, ours):
        m.graph.set_codegen(None)
        with pytest.raises(AttributeError):
            m.recompile()
    assert_same_steps(ours, original, x)


def test_modes_that_have_graphs_of_their_own(quick, torchvision):
    """torchvision's extractor runs another graph in training: here dropout is in one of them only."""
    from torchvision.models.feature_extraction import create_feature_extractor

    class Dropping(Plain):
        def forward(self, x):
            x = self.layers(self.pool(self.stem(x)))
            x = torch.flatten(self.average(x), 1)
            return self.fc(F.relu(x)) if self.training else self.fc(x)

    x = image(3, 9).to(quick)
    model = create_feature_extractor(build(Dropping, quick), ["layers.0", "fc"], suppress_diff_warning=True).eval()
    ours, original = cnnfast.convert(model), own_copy(model)
    for training in (True, False, True):
        ours.train(training)
        original.train(training)
        assert ours.code == original.code
        assert ("relu(flatten" in ours.code) == training
        with cnnfast.trace() as trace:
            torch.testing.assert_close(ours(x), original(x), rtol=1e-10, atol=1e-10)
        assert fusions(trace) == CONVOLUTIONS


def test_attributes_and_hooks_of_a_graph_module(quick):
    """Which a deepcopy of a GraphModule loses."""
    x = image(3, 9).to(quick)
    model = traced().to(quick)
    model.note, model.meta["origin"] = "kept", "traced"
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    original = traced().to(quick)
    original.register_forward_hook(lambda module, inputs, output: output * 2)
    ours = cnnfast.convert(model)
    assert (ours.note, ours.meta) == ("kept", {"origin": "traced"})
    assert_same_steps(ours, original, x, fused=CONVOLUTIONS)
    ours.note = "changed"
    assert model.note == "kept"


def test_hooks_within_a_graph_module(quick):
    """The hooked convolution is called, as the graph has it, and the others stay fused."""
    x, seen = image(3, 9).to(quick), []
    ours = cnnfast.convert(traced().to(quick))
    ours.layers.get_submodule("0").conv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    original = traced().to(quick)
    assert_same_steps(ours, original, x, fused=0)
    assert len(seen) == 3


def test_one_class_for_each_graph_module_that_goes_with_it(quick):
    ours = cnnfast.convert(traced().to(quick))
    ours(image(3, 9).to(quick))
    ours.recompile()
    twin = copy.deepcopy(ours)
    gone = [weakref.ref(item) for item in (ours, type(ours), type(ours).__base__, twin, type(twin), ours.layers)]
    del ours, twin
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


def test_classes_of_parametrized_layers_go_with_them(quick):
    """torch.nn.utils.parametrize makes one for each layer, as torch.fx does."""

    class Own(nn.Conv2d):
        """A class for one layer, on which ours is grafted."""

    layers = nn.utils.parametrizations.weight_norm(Own(3, 4, 1)), nn.BatchNorm2d(4)
    ours = cnnfast.convert(nn.Sequential(*layers).to(quick))
    twin = copy.deepcopy(ours)
    gone = [weakref.ref(item) for item in (ours[0], type(ours[0]), type(ours[0]).__base__, Own, twin, type(twin[0]))]
    del layers, ours, twin, Own
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


def test_equal_containers_have_one_class(quick):
    """Of an ordinary class: nothing is compiled twice. Others of that class have another."""
    ours = cnnfast.convert(build(Net, quick))
    assert type(ours.layers[0]) is type(ours.layers[2]) is type(cnnfast.convert(build(Block, quick)))
    layers = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU()
    for count in (3, 2):
        converted(build(lambda count=count: nn.Sequential(*layers[:count]), quick), image().to(quick), fused=1)


# ----------------------------------------------------------------------------------------------------------------------
# Whatever else fx offers


def with_an_option(self, x, twice=False):
    y = self.relu(self.bn(self.conv(x)))
    return y * 2 if twice else y


def test_concrete_arguments(quick):
    x = image().to(quick)
    model = fx.symbolic_trace(build(block(with_an_option), quick), concrete_args={"twice": True})
    assert_same_steps(cnnfast.convert(model), own_copy(model), x, True)  # the argument stays, and must be that


def scaled(x, by):
    return x * float(by)


fx.wrap("scaled")


def calls_a_wrapped_function(self, x):
    return scaled(self.relu(self.bn(self.conv(x))), 3)


def test_wrapped_functions(quick):
    x = image().to(quick)
    model = fx.symbolic_trace(build(block(calls_a_wrapped_function), quick))
    assert "scaled" in model.code
    assert_same_steps(cnnfast.convert(model), own_copy(model), x)


def test_an_interpreter_of_the_graph(quick):
    """It calls the layers one by one: unfused, and right."""
    x = image(3, 9).to(quick)
    model = traced().to(quick)
    ours = cnnfast.convert(model)
    with torch.no_grad(), cnnfast.trace() as trace:
        torch.testing.assert_close(fx.Interpreter(ours).run(x), model(x), rtol=1e-10, atol=1e-10)
        transformed = fx.Transformer(ours).transform()
        torch.testing.assert_close(transformed(x), model(x), rtol=1e-10, atol=1e-10)
    assert fusions(trace) == 0
    assert_same_steps(cnnfast.convert(transformed), own_copy(model), x, fused=CONVOLUTIONS)


def test_a_lazily_compiled_graph_module(quick):
    """As torch.compile hands to backends: compiled at its first call, and again after recompile()."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    x = image(3, 9).to(quick)
    net = build(Plain, quick)
    original = own_copy(net)
    model = _LazyGraphModule(net, fx.Tracer().trace(net))
    assert_same_steps(cnnfast.convert(model), original, x)
    ours = cnnfast.convert(model)
    assert_same_steps(ours, own_copy(net), x)
    for change in (lambda: ours.recompile(), lambda: pickle.dumps(ours), lambda: cnnfast.convert(ours, inplace=True)):
        change()
        assert_same_steps(ours, own_copy(net), x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_graph_module_compiles(quick, training):
    """Also once its graph has changed. Seconds, which are torch.compile's."""
    x = image(3, 9).to(quick)
    model = traced().to(quick).train(training)
    ours, original = cnnfast.convert(model), own_copy(model)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), original(x), rtol=1e-10, atol=1e-10)
    for m in (ours, original):
        without_one_norm(m)
        m.recompile()
    torch.testing.assert_close(compiled(x), original(x), rtol=1e-10, atol=1e-10)


def test_a_graph_module_is_exported_and_traced(device):
    """Seconds: torch.export and torch.jit.trace run the operators themselves."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = image(3, 7).float().to(device)
    model = traced().float().to(device)
    ours = cnnfast.convert(model)
    with torch.no_grad():
        exported = torch.export.export(ours, (x,)).module()
        recorded = make_fx(ours)(x)
        scripted = torch.jit.trace(ours, x)
        for other in (exported, recorded, scripted):
            torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)
    for other in (exported, recorded):  # GraphModules without a module to convert
        torch.testing.assert_close(cnnfast.convert(other)(x), model(x), rtol=1e-4, atol=1e-4)


def test_timm_features_by_fx(quick, torchvision):
    timm = package("timm")
    x = image(3, 33).to(quick)
    model = timm.create_model("resnet18", features_only=True, feature_cls="fx").double().to(quick).eval()
    ours, original = cnnfast.convert(model), own_copy(model)
    assert_same_steps(ours, original, x, modes=("no_grad", "train"), fused=20)
    assert_same_steps(copy.deepcopy(ours), original, x, modes=("no_grad",), fused=20)


def test_a_graph_module_is_traced_once_when_its_graph_is_set(quick, monkeypatch):
    """torchvision's extractor sets it at every train() and eval()."""
    from cnnfast.conversion import fusion

    ours, plans = cnnfast.convert(traced().to(quick)), []
    monkeypatch.setattr(fusion, "plan", lambda block, plan=fusion.plan: plans.append(block) or plan(block))
    ours.graph = ours.graph
    assert plans == [ours]
    ours.train()
    assert plans == [ours]
    ours.note = "read by the forward, for all that is known"
    assert plans == [ours, ours]


@pytest.mark.parametrize(
    ("name", "last", "normalised", "fused"),
    [("resnet18", "layer4", 20, 20), ("mobilenet_v3_small", "features", 34, 34 + 18)],  # 9 squeezes have no norm
)
def test_torchvisions_extractors(name, last, normalised, fused, quick, torchvision):
    """Whole networks, a second or two each; the report says what happens."""
    from torchvision.models.feature_extraction import create_feature_extractor

    make = getattr(torchvision.models, name)
    model = build(lambda: create_feature_extractor(make(num_classes=3), {last: "map", "flatten": "flat"}), quick)
    x = image(3, 33).to(quick)
    ours = cnnfast.convert(model)
    assert cnnfast.report(ours, x).count("fused") == fused
    assert_same_steps(ours, own_copy(model), x, modes=("no_grad", "train"), fused=normalised)
