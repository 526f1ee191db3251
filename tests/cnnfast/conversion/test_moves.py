"""A convolution and what follows it are computed together, in the place of the last: whatever in between would mind
holds them back.

Every program is compared in eval, in eval with gradients and in training with an untouched copy: outputs, inputs,
gradients, buffers. The convolutions read a tensor in memory of its own, `p`, where it shall not be what they read that
holds them back.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from tests.support.blocks import CHANNELS, Block, block, build, image
from tests.support.steps import MODES, assert_same_steps, converted, difference, step


class Scales(nn.Module):
    """Writes into what it is given, and returns it."""

    def forward(self, x):
        return x.mul_(0.5)


class ScalesTheOther(nn.Module):
    def forward(self, x, y):
        y.mul_(0.5)
        return x


class Passes(nn.Module):
    def forward(self, x):
        return x


class Keeps(nn.Module):
    """Keeps its argument, and changes it at its next call."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x):
        for kept in self.kept:
            kept.mul_(0.5)
        self.kept = [x.detach()]
        return x * 1


class Remembers(nn.Module):
    """Returns what it was given at the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x):
        self.kept = [*self.kept, x][-2:]
        return self.kept[0]


class Puts(nn.Module):
    """Puts one argument into the other."""

    def forward(self, xs, x):
        xs.append(x)


class Subtracts(nn.Module):
    def forward(self, x, y):
        return x - y


MEMBERS: dict[str, Any] = {
    "pool": functools.partial(nn.MaxPool2d, 3, 1, 1),
    "inplace": functools.partial(nn.ReLU, inplace=True),
    "identity": nn.Identity,
    "dropout": functools.partial(nn.Dropout, 0.0),
    "flatten": functools.partial(nn.Flatten, 2),
    "scales": Scales,
    "scales_other": ScalesTheOther,
    "passes": Passes,
    "keeps": Keeps,
    "remembers": Remembers,
    "puts": Puts,
    "add": Subtracts,
}

# ----------------------------------------------------------------------------------------------------------------------
# Memory


def addend_changed(self, x):
    y = self.bn(self.conv(self.pool(x))) + x
    x.mul_(0.5)
    return self.relu(y)


def addend_changed_by_an_operator(self, x):
    y = self.bn(self.conv(self.pool(x))) + x
    x -= 0.5
    return self.relu(y)


def addend_changed_through_a_view(self, x):
    y = self.bn(self.conv(self.pool(x))) + x
    x[:, 1:3].mul_(0.5)
    return self.relu(y)


def addend_is_a_view(self, x):
    r = self.pool(x)
    y = self.bn(self.conv(self.pool(x))) + r.view(2, CHANNELS, 5, 5)
    r.mul_(0.5)
    return self.relu(y)


def addend_is_a_chunk(self, x):
    p = torch.cat([x, x], 1)
    a, b = p.chunk(2, 1)
    y = self.bn(self.conv(self.pool(x))) + b
    p.mul_(0.5)
    return self.relu(y) + a


def addend_changed_by_a_module(self, x):
    y = self.bn(self.conv(self.pool(x))) + x
    r = self.inplace(x)
    return self.relu(y) + r


def addend_changed_by_a_function(self, x):
    y = self.bn(self.conv(self.pool(x)))
    y += x
    r = F.relu(x, True)
    return self.relu(y) + r


def addend_changed_by_silu_by_name(self, x):
    y = self.bn(self.conv(self.pool(x))).add_(x)
    r = F.silu(input=x, inplace=True)
    return self.relu(y) + r


def addend_is_an_in_place_result(self, x):
    r = x.mul_(2)
    y = self.bn(self.conv(self.pool(x))) + r
    x.sub_(0.5)
    return self.relu(y)


def addend_changed_by_a_child(self, x):
    y = self.bn(self.conv(self.pool(x))) + x
    self.scales(x)
    return self.relu(y)


def addend_changed_by_a_child_as_the_second_of_two(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(self.pool(x))) + p
    z = self.scales_other(x, p)
    return self.relu(y) + z


def addend_changed_under_the_name_that_a_child_returned(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(self.pool(x))) + p
    self.passes(p).mul_(0.5)
    return self.relu(y)


def addend_changed_by_a_child_that_kept_it(self, x):
    p = self.pool(x)
    q = self.keeps(p)
    y = self.bn(self.conv(self.pool(x))) + p
    return self.relu(y) + self.keeps(self.pool(x)) + q


def source_changed_under_the_name_that_a_child_remembered(self, x):
    p = self.pool(x)
    self.remembers(p)
    q = self.remembers(x)
    y = self.conv(p)
    q.mul_(0.5)
    return self.relu(self.bn(y))


def addend_changed_through_its_contiguous_self(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(self.pool(x))) + p
    p.contiguous().mul_(0.5)
    return self.relu(y)


def addend_changed_through_what_to_returned(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(self.pool(x))) + p
    p.to(torch.float64).mul_(0.5)
    return self.relu(y)


def addend_changed_through_an_identity(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(self.pool(x))) + p
    self.identity(p).mul_(0.5)
    return self.relu(y)


def addend_changed_through_a_flat_view(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(self.pool(x))) + p
    self.flatten(p).mul_(0.5)
    return self.relu(y)


def addend_changed_through_dropout(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(self.pool(x))) + p
    self.dropout(p).mul_(0.5)
    return self.relu(y)


def source_changed_before_the_norm(self, x):
    p = self.pool(x)
    y = self.conv(p)
    p.mul_(0.5)
    return self.relu(self.bn(y))


def source_changed_by_an_in_place_sum_before_the_norm(self, x):
    p = self.pool(x)
    y = self.conv(p)
    p += x
    return self.relu(self.bn(y) + p)


def sum_is_of_lists(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(p))
    slots = torch.cat([x, x], 1).chunk(2, 1)
    slots += (p,)
    slots[-1].mul_(0.5)
    return self.relu(y)


def identity_after_a_write(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(p))
    p.mul_(0.5)
    return self.identity(y)


def two_in_flight(self, x):
    """The one writes into what the other reads, and the other way round."""
    p, q = self.pool(x), self.pool(x * 2)
    y = self.conv(p)
    z = self.conv2(q)
    y = self.bn(y) + q
    z = self.bn2(z) + p
    a = self.inplace(q)
    y = self.relu(y)
    p.mul_(0.5)
    return self.relu(z) + y + a


def one_within_the_other(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(p))
    z = self.relu(self.bn2(self.conv2(p)) + p)
    p += 1
    return self.relu(y + z)


def a_module_called_add(self, x):
    return self.relu(self.add(self.bn(self.conv(x)), x))


def densely_connected(self, x):
    features = [x, self.pool(x)]
    for _ in range(2):
        y = self.conv(torch.cat(features, 0))
        features[-1].mul_(0.5)
        features.append(self.relu(self.bn(y)))
    return features


MEMORY = [
    addend_changed,
    addend_changed_by_an_operator,
    addend_changed_through_a_view,
    addend_is_a_view,
    addend_is_a_chunk,
    addend_changed_by_a_module,
    addend_changed_by_a_function,
    addend_changed_by_silu_by_name,
    addend_is_an_in_place_result,
    addend_changed_by_a_child,
    addend_changed_by_a_child_as_the_second_of_two,
    addend_changed_under_the_name_that_a_child_returned,
    addend_changed_by_a_child_that_kept_it,
    source_changed_under_the_name_that_a_child_remembered,
    addend_changed_through_its_contiguous_self,
    addend_changed_through_what_to_returned,
    addend_changed_through_an_identity,
    addend_changed_through_a_flat_view,
    addend_changed_through_dropout,
    source_changed_before_the_norm,
    source_changed_by_an_in_place_sum_before_the_norm,
    sum_is_of_lists,
    identity_after_a_write,
    two_in_flight,
    one_within_the_other,
    a_module_called_add,
    densely_connected,
]


@pytest.mark.parametrize("forward", MEMORY, ids=lambda forward: forward.__name__)
def test_memory_that_is_written_in_between(forward, quick):
    converted(build(block(forward, **MEMBERS), quick), image().to(quick), may_raise=True)


def out_by_keyword(self, x):
    y = self.bn(self.conv(self.pool(x))) + x
    torch.mul(x, 0.5, out=x)
    return self.relu(y)


def out_is_a_view(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(self.pool(x))) + p
    torch.add(x[:, :2], 1.0, out=p[:, 2:])
    return self.relu(y)


def out_of_cat(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(self.pool(x))) + p
    z = torch.cat([x[:, :2], x[:, 2:]], 1, out=p)
    return self.relu(y) + z


def out_is_what_a_convolution_reads(self, x):
    p = self.pool(x)
    y = self.conv(p)
    z = torch.sigmoid(x, out=p)
    return self.relu(self.bn(y)) + z


@pytest.mark.parametrize("forward", [out_by_keyword, out_is_a_view, out_of_cat, out_is_what_a_convolution_reads])
def test_memory_that_is_written_by_out(forward, quick):
    """PyTorch has no gradients for it."""
    converted(build(block(forward, **MEMBERS), quick), image().to(quick), modes=("no_grad",))


def slot_changed(self, xs):
    y = self.bn(self.conv(self.pool(xs[0]))) + xs[-1]
    xs[1].mul_(0.5)
    return self.relu(y)


def slot_joined(self, xs):
    p = self.pool(xs[0])
    xs += [p]
    y = self.conv(p)
    xs[-1].mul_(0.5)
    return self.relu(self.bn(y))


def slot_joined_under_another_name(self, xs):
    p, ys = self.pool(xs[0]), xs
    xs += [p]
    y = self.conv(p)
    ys[-1].mul_(0.5)
    return self.relu(self.bn(y))


def slot_put_there_by_a_child(self, xs):
    p = self.pool(xs[0])
    self.puts(xs, p)
    y = self.conv(p)
    xs[-1].mul_(0.5)
    return self.relu(self.bn(y))


def lists_joined(self, xs):
    p = self.pool(xs[0])
    y = self.conv(p)
    (xs + [p])[-1].mul_(0.5)
    return self.relu(self.bn(y))


@pytest.mark.parametrize(
    "forward", [slot_changed, slot_joined, slot_joined_under_another_name, slot_put_there_by_a_child, lists_joined]
)
def test_slots_of_lists(forward, quick):
    model = build(block(forward, **MEMBERS), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    x, y = image().to(quick), 2 * image().to(quick)
    with torch.no_grad():
        theirs, mine = [x.clone(), y.clone()], [x.clone(), y.clone()]
        right, got = original(theirs), ours(mine)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# State of modules: in training the order in which a norm sees its batches is the order of its running statistics


def norm_called_by_a_child(self, x):
    p = self.pool(x)
    y = self.bn(self.conv(self.pool(x)))
    return self.relu(y + self.child(p))


def norm_called_by_a_child_before_it(self, x):
    p = self.pool(x)
    y = self.conv(self.pool(x))
    z = self.child(p)
    return self.relu(self.bn(y)) + z


class Calls(nn.Module):
    """Calls something that is no child of its own."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.__dict__.update(held)

    def forward(self, x):
        return self.find()(x)


class FromAList(Calls):
    def find(self):
        return self.norms[0]


class FromADict(Calls):
    def find(self):
        return self.norms["bn"][0]


class FromAnAttribute(Calls):
    def find(self):
        return self.norm


class FromAClosure(Calls):
    def find(self):
        return self.get()


class FromItsContainer(Calls):
    def find(self):
        return self.container().bn


class FromItsClass(Calls):
    norms: ClassVar[list[nn.Module]] = []

    def find(self):
        return self.norms[-1]


NORMS: list[nn.Module] = []


def last_of_the_norms() -> nn.Module:
    return NORMS[-1]


class FromAGlobal(Calls):
    def find(self):
        return last_of_the_norms()


def get(norm: nn.Module) -> Callable[[], nn.Module]:
    return lambda: norm


def tied(model: Any) -> nn.Module:
    norm = nn.BatchNorm2d(CHANNELS).to(model.bn.weight)
    norm.running_var = model.bn.running_var
    return norm


def tied_by_a_view(model: Any) -> nn.Module:
    norm = nn.BatchNorm2d(CHANNELS).to(model.bn.weight)
    norm.running_mean = model.bn.running_mean[:]
    return norm


class Trains(nn.Module):
    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.scale = parameter

    def forward(self, x):
        self.scale.data.mul_(0.5)
        return x * 1


CHILDREN: dict[str, Callable[[Any], nn.Module]] = {
    "registered": lambda model: nn.Sequential(model.conv2, model.bn),
    "registered_deeper": lambda model: nn.Sequential(nn.Sequential(model.bn, nn.ReLU()), model.conv2),
    "under_another_name": lambda model: model.bn,
    "in_a_list": lambda model: FromAList(norms=[model.bn]),
    "in_a_dict": lambda model: FromADict(norms={"bn": (model.bn,)}),
    "in_an_attribute": lambda model: FromAnAttribute(norm=model.bn),
    "in_a_partial": lambda model: FromAClosure(get=functools.partial(getattr, model, "bn")),
    "in_a_closure": lambda model: FromAClosure(get=get(model.bn)),
    "in_its_container": lambda model: FromItsContainer(container=weakref.ref(model)),
    "in_its_class": lambda model: FromItsClass.norms.append(model.bn) or FromItsClass(),
    "in_a_global": lambda model: NORMS.append(model.bn) or FromAGlobal(),
    "tied": tied,
    "tied_by_a_view": tied_by_a_view,
    "trains_its_weight": lambda model: Trains(model.bn.weight),
    "trains_its_bias": lambda model: Trains(model.bn.bias),
    "trains_the_convolution": lambda model: Trains(model.conv.weight),
}


@pytest.mark.parametrize(
    "forward", [norm_called_by_a_child, norm_called_by_a_child_before_it], ids=lambda forward: forward.__name__
)
@pytest.mark.parametrize("child", CHILDREN)
def test_state_that_a_child_shares(child, forward, quick):
    """Converted in place: a copy of some of these would call the original's norm. The one is done before the other is
    made.
    """

    def steps(convert: bool) -> dict[str, dict[str, Any]]:
        model: Any = build(block(forward, **MEMBERS), quick)
        model.child = CHILDREN[child](model)
        if convert:
            cnnfast.convert(model, inplace=True)
        return {mode: step(model.eval(), (image().to(quick),), mode) for mode in MODES}

    right, mine = steps(convert=False), steps(convert=True)
    for mode in MODES:
        assert list(mine[mode]) == list(right[mode])
        wrong = {name: text for name in right[mode] if (text := difference(mine[mode][name], right[mode][name], 1e-10))}
        assert not wrong, mode


class HandsOut(nn.Module):
    """Returns a tensor that belongs to somebody else."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.held = [module, name]

    def forward(self, x):
        module, name = self.held
        return (
            getattr(module, name).detach().view(-1, 1, 1) if name == "running_mean" else getattr(module, name).detach()
        )


def written_under_another_name(self, x):
    w = self.child(x)
    y = self.bn(self.conv(self.pool(x)))
    w.mul_(0.5)
    return self.relu(y)


def read_under_another_name(self, x):
    w = self.child(x)
    y = self.conv(self.pool(x))
    z = w + 1
    return self.relu(self.bn(y)) + z, w * 1


def read_under_another_name_after_the_norm(self, x):
    w = self.child(x)
    y = self.bn(self.conv(self.pool(x)))
    z = w * 2
    return self.relu(y) + z


@pytest.mark.parametrize(
    ("forward", "member", "name"),
    [
        (written_under_another_name, "bn", "weight"),
        (written_under_another_name, "conv", "weight"),
        (read_under_another_name, "bn", "running_mean"),
        (read_under_another_name_after_the_norm, "bn", "running_mean"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("by", ["its class", "the instance"])
def test_state_that_a_child_hands_out(forward, member, name, by, quick):
    """By the forward of its class, or by one that a module of PyTorch's was given on the instance."""

    def make() -> nn.Module:
        model: Any = build(block(forward, **MEMBERS), quick)
        model.child = child = HandsOut(getattr(model, member), name)
        if by == "the instance":
            model.child = nn.Tanh()
            model.child.forward = child.forward
        return model.eval()

    assert_same_steps(cnnfast.convert(make(), inplace=True), make(), image().to(quick), may_raise=True)


def test_a_convolution_with_code_of_its_users(quick):
    """A parametrization computes the weight at each call, and may do more: here it counts."""
    counted: list[str] = []

    class Counts(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, weight):
            counted.append(self.name)
            return weight * 1

    def forward(self, x):
        y = self.bn(self.conv(x))
        z = self.bn2(self.conv2(x))
        return self.relu(y + z)

    model: Any = build(block(forward, **MEMBERS), quick)
    for name in ("conv", "conv2"):
        nn.utils.parametrize.register_parametrization(model.get_submodule(name), "weight", Counts(name))
    x = image().to(quick)
    orders = []
    for m in (copy.deepcopy(model), cnnfast.convert(model)):
        counted.clear()
        with torch.no_grad():
            m(x)
        orders.append(list(dict.fromkeys(counted)))
    assert orders[0] == orders[1] == ["conv", "conv2"]


def test_an_order_that_does_not_matter(quick):
    """A child that has nothing to do with the norm, and a norm that is called twice but not in between: all is
    fused.
    """

    def beside(self, x):
        return self.relu(self.bn(self.conv(x)) + self.child(self.pool(x)))

    def twice(self, x):
        return self.relu(self.bn(self.conv(self.relu(self.bn(self.conv2(x))))) + x)

    model = build(block(beside, child=lambda: None, **MEMBERS), quick)
    model.child = FromAList(norms=[nn.BatchNorm2d(CHANNELS).double().to(quick).eval()])
    assert "self.conv only up to self.bn" in cnnfast.report(converted(model, image().to(quick))).rows[0].reason, (
        "its code may keep x"
    )
    model.child = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)).double().to(quick)
    converted(model, image().to(quick), fused=2)
    converted(build(block(twice), quick), image().to(quick), fused=2)


def shared_norm(self, x):
    a = self.bn(self.conv(x))
    b = self.bn(self.conv2(x))
    return self.relu(a + b)


def shared_norm_of_one_convolution(self, x):
    return self.bn(self.bn(self.conv(x)))


def shared_pair(self, x):
    return self.relu(self.bn(self.conv(self.relu(self.bn(self.conv(x))))))


@pytest.mark.parametrize(
    ("forward", "count"),
    [(shared_norm, 2), (shared_norm_of_one_convolution, 1), (shared_pair, 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_norm_that_several_calls_share_is_fused(forward, count, quick):
    converted(build(block(forward), quick), image().to(quick), fused=count)


# ----------------------------------------------------------------------------------------------------------------------
# What stands in between, watched or changed after it was looked at


def over_a_child(self, x):
    return self.relu(self.bn(self.conv(x)) + self.shortcut(self.pool(x)))


def shortcut() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU())
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["shortcut", "shortcut.0", "shortcut.1.1"])
def test_a_hook_on_what_is_in_between(name, when, quick):
    """It writes into what the convolution reads, of which it was told otherwise. Removed, all is fused as it was."""
    x = image().to(quick)
    model: Any = build(block(over_a_child, shortcut=functools.partial(shortcut), **MEMBERS), quick)
    original = copy.deepcopy(model)
    given: dict[nn.Module, Tensor] = {}

    def watch(model: Any) -> list[Any]:
        """The container's own hook tells which tensor it was given."""

        def remember(module: nn.Module, inputs: Any) -> None:
            given[module] = inputs[0]

        def write(*_: Any) -> None:
            given[model].mul_(0.5)

        return [model.register_forward_pre_hook(remember), model.get_submodule(name).register_forward_hook(write)]

    ours = cnnfast.convert(model, inplace=True) if when == "after" else model
    theirs, mine = watch(original), watch(ours)
    if when == "before":
        ours = cnnfast.convert(model, inplace=True)
    assert_same_steps(ours, original, x, modes=("no_grad",))
    for handle in theirs + mine:
        handle.remove()
    assert_same_steps(ours, original, x, fused=1)


@pytest.mark.parametrize("shared", ["module", "buffers"])
def test_statistics_that_are_shared_after_the_conversion(shared, quick):
    """With a norm inside the child in between, of which the container is not told: the child updates them last."""
    x = image().to(quick)
    model: Any = build(block(over_a_child, shortcut=functools.partial(shortcut), **MEMBERS), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, x, fused=1)
    for m in (original, ours):
        if shared == "module":
            m.shortcut[1][0] = m.bn
        else:
            m.shortcut[1][0].running_mean, m.shortcut[1][0].running_var = m.bn.running_mean, m.bn.running_var
    assert_same_steps(ours, original, x, fused=0)


def over_an_activation(self, x):
    r = self.pool(x)
    y = self.bn(self.conv(r))
    z = self.act(r)
    return self.relu(y + z)


@pytest.mark.parametrize("deeper", [False, True])
def test_an_activation_in_between_is_made_to_work_in_place(deeper, quick):
    """By a flag that the container is not told of."""
    x = image().to(quick)
    act = (lambda: nn.Sequential(nn.ReLU())) if deeper else nn.ReLU
    model: Any = build(block(over_an_activation, **MEMBERS), quick)
    model.act = act()
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, x, fused=1)
    for m in (original, ours):
        (m.act[0] if deeper else m.act).inplace = True
    assert_same_steps(ours, original, x, may_raise=True)


def test_a_child_in_between_gets_another_child(quick):
    x = image().to(quick)
    model: Any = build(block(over_an_activation, act=lambda: None, **MEMBERS), quick)
    model.act = nn.Sequential(nn.Tanh())
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, x, fused=1)
    for m in (original, ours):
        m.act.insert(0, Scales())
    assert_same_steps(ours, original, x, may_raise=True)


def test_containers_alike_but_for_a_flag(quick):
    """Both have the same fused forward, but only one writes into its argument: their container has to know which."""

    class Inner(Block):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=inplace)

        def forward(self, x):
            return self.relu(self.bn(self.conv(self.act(x))))

    def forward(self, x):
        p, q = self.pool(x), self.pool(x)
        y = self.relu(self.bn(self.conv(p)) + self.plain(p))
        return y + self.relu(self.bn2(self.conv2(q)) + self.writing(q))

    # the last is converted first
    members = {"writing": functools.partial(Inner, True), "plain": functools.partial(Inner, False)}
    converted(build(block(forward, **MEMBERS, **members), quick), image().to(quick), may_raise=True)


# ----------------------------------------------------------------------------------------------------------------------
# Ways to call members


def by_name(self, x):
    return self.relu(input=self.bn(input=self.conv(input=x)) + x)


def by_the_names_of_torch_add(self, x):
    return torch.relu(input=torch.add(input=x, other=self.bn(self.conv(x))))


def by_the_name_of_the_other(self, x):
    return F.relu(input=self.bn(input=self.conv(x)).add(other=x))


def by_the_name_of_the_other_in_place(self, x):
    return F.leaky_relu(input=self.bn(self.conv(input=x)).add_(other=x, alpha=1), negative_slope=0.3)


def by_the_name_of_gelu(self, x):
    return F.gelu(input=self.bn(self.conv(x)), approximate="tanh")


def by_the_name_of_an_identity(self, x):
    return F.silu(input=self.bn(self.identity(input=self.conv(x))))


@pytest.mark.parametrize(
    "forward",
    [
        by_name,
        by_the_names_of_torch_add,
        by_the_name_of_the_other,
        by_the_name_of_the_other_in_place,
        by_the_name_of_gelu,
        by_the_name_of_an_identity,
    ],
    ids=lambda forward: forward.__name__,
)
def test_members_called_by_name_are_fused(forward, quick):
    ours = converted(build(block(forward, **MEMBERS), quick), image().to(quick), fused=1)
    assert not [row for row in cnnfast.report(ours).rows if row.name == "" and row.reason], "with all that follows"
