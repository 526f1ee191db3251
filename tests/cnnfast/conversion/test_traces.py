"""Forwards of which a trace does not tell the whole: decisions, constants, random numbers, contexts, side effects.

Every one is compared in eval, in eval with gradients and in training with an untouched copy: outputs, inputs,
gradients, buffers.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from tests.support.blocks import block, build, image
from tests.support.steps import assert_same_steps, converted

# ----------------------------------------------------------------------------------------------------------------------
# Forwards that a trace does not tell the whole of

SWITCH = {"double": False}


def depends_on_training(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if self.training else y


def dropout_by_function(self, x):
    return F.dropout(self.relu(self.bn(self.conv(x))), 0.5, training=self.training)


def dropout_before_the_norm(self, x):
    return self.relu(self.bn(F.dropout(self.conv(x), 0.5, self.training)))


def depends_on_a_members_training(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if self.bn.training else y


def depends_on_gradients(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if torch.is_grad_enabled() else y


def depends_on_python_random(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if random.random() < 0.5 else y


def depends_on_numpy_random(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if np.random.rand() < 0.5 else y


def depends_on_torch_random(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if torch.rand(()).item() < 0.5 else y


def depends_on_a_switch(self, x):
    y = self.relu(self.bn(self.conv(x)))
    return y * 2 if SWITCH["double"] else y


def random_constant(self, x):
    return self.relu(self.bn(self.conv(x))) * torch.rand((), dtype=x.dtype, device=self.bn.bias.device)


def random_tensor_like(self, x):
    return self.relu(self.bn(self.conv(x + torch.rand_like(x))))


def constant(self, x):
    return self.relu(self.bn(self.conv(x))) + torch.ones(1, dtype=torch.float64, device=self.bn.bias.device)


def parameter_of_a_member(self, x):
    return self.relu(self.bn(self.conv(x))) * self.bn2.weight.view(-1, 1, 1)


def decides_by_numbers(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if y.sum() > 0 else y


def decides_by_the_size(self, x):
    return self.relu(self.bn(self.conv(x))) if x.shape[-1] == 5 else x


def decides_by_isinstance(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if isinstance(x, Tensor) else y


def decides_by_is_tensor(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if torch.is_tensor(x) else y


def decides_by_type(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if type(x) is Tensor else y


def decides_by_hasattr(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if hasattr(x, "decoded") else y


def decides_by_failing(self, x):
    try:
        positive = bool(x.sum() > 1e9)
    except Exception:
        positive = True
    y = self.bn(self.conv(x))
    return self.relu(y) if positive else y


def decides_by_a_match(self, x):
    y = self.bn(self.conv(x))
    match x:
        case Tensor():
            return self.relu(y)
    return y


def decides_by_its_own_type(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if type(self).__name__ == "decides_by_its_own_type" else y


def without_gradients(self, x):
    with torch.no_grad():
        y = self.bn(self.conv(x))
    return self.relu(self.bn2(self.conv2(y)))


@torch.no_grad()
def never_with_gradients(self, x):
    return self.relu(self.bn(self.conv(x)))


def gradients_are_switched_off(self, x):
    was = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = self.bn(self.conv(x))
    torch.set_grad_enabled(was)
    return self.relu(y) + x


def norm_without_gradients(self, x):
    y = self.conv(x)
    with torch.no_grad():
        y = self.bn(y)
    return self.relu(y) + x


def detached(self, x):
    return self.relu(self.bn(self.conv(x).detach())) + self.bn2(self.conv2(x.detach()))


def checkpointed(self, x):
    return torch.utils.checkpoint.checkpoint(lambda x: self.relu(self.bn(self.conv(x))), x, use_reentrant=False)


def checkpointed_in_the_older_way(self, x):
    return torch.utils.checkpoint.checkpoint(lambda x: self.relu(self.bn(self.conv(x))), x, use_reentrant=True)


def norm_by_function(self, x):
    y = self.conv(x)
    return F.relu(
        F.batch_norm(y, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, self.training)
    )


def convolution_by_function(self, x):
    return self.relu(self.bn(F.conv2d(x, self.conv.weight * 2, self.conv.bias, padding=1)))


def member_by_its_forward(self, x):
    return self.relu(self.bn.forward(self.conv.forward(x)))


def member_by_its_class(self, x):
    return self.relu(nn.BatchNorm2d.forward(self.bn, nn.Conv2d.forward(self.conv, x)))


def convolution_with_a_loop(self, x):
    for module in self.children():
        x = module(x)
    return x


OPAQUE = [
    depends_on_training,
    dropout_by_function,
    dropout_before_the_norm,
    depends_on_a_members_training,
    depends_on_gradients,
    depends_on_python_random,
    depends_on_numpy_random,
    depends_on_torch_random,
    depends_on_a_switch,
    random_constant,
    random_tensor_like,
    constant,
    parameter_of_a_member,
    decides_by_numbers,
    decides_by_the_size,
    decides_by_isinstance,
    decides_by_is_tensor,
    decides_by_type,
    decides_by_hasattr,
    decides_by_failing,
    decides_by_a_match,
    decides_by_its_own_type,
    without_gradients,
    never_with_gradients,
    gradients_are_switched_off,
    norm_without_gradients,
    detached,
    checkpointed,
    checkpointed_in_the_older_way,
    norm_by_function,
    convolution_by_function,
    member_by_its_forward,
    member_by_its_class,
    convolution_with_a_loop,
]


@pytest.mark.parametrize("forward", OPAQUE, ids=lambda forward: forward.__name__)
def test_what_a_trace_does_not_tell(forward, quick):
    called = forward not in (member_by_its_forward, member_by_its_class)
    converted(build(block(forward), quick), image().to(quick), told=called)


def depends_on_autocast(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y.float() if torch.is_autocast_enabled(x.device.type) else y)


def switches_autocast_off(self, x):
    with torch.autocast(x.device.type, enabled=False):
        return self.relu(self.bn(self.conv(x)))


def switches_autocast_off_everywhere(self, x):
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return self.relu(self.bn(self.conv(x)))


AUTOCAST = [depends_on_autocast, switches_autocast_off, switches_autocast_off_everywhere]


@pytest.mark.parametrize("forward", AUTOCAST, ids=lambda forward: forward.__name__)
def test_what_a_trace_does_not_tell_of_autocast(forward, device):
    """Converted without autocast, called with it; by the kernels, whose rounding is their own."""
    model = build(block(forward), device).float()
    within = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16)
    converted(model, image().float().to(device), modes=("no_grad", "train"), tolerance=0.05, within=within)


@pytest.mark.parametrize(
    "forward", [depends_on_python_random, depends_on_numpy_random, depends_on_torch_random, random_constant]
)
def test_random_decisions_are_made_at_every_call(forward, quick):
    """Whatever the random numbers were while the model was converted."""
    x = image().to(quick)
    model = build(block(forward), quick)
    original = copy.deepcopy(model)
    for seed in range(4):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert_same_steps(cnnfast.convert(model), original, x, modes=("no_grad",))


@pytest.mark.parametrize(
    "forward", [depends_on_python_random, depends_on_numpy_random, random_constant, dropout_by_function]
)
def test_conversion_draws_no_random_numbers(forward):
    model = build(block(forward))
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    cnnfast.convert(model)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_switches_outside_of_the_model(quick, monkeypatch):
    """A global that forward reads is turned after conversion."""
    x = image().to(quick)
    model = build(block(depends_on_a_switch), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, x, modes=("no_grad",))
    monkeypatch.setitem(SWITCH, "double", True)
    assert_same_steps(ours, original, x, modes=("no_grad",))


def test_sizes_that_forward_decides_by(quick):
    model = build(block(decides_by_the_size), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    for size in (5, 6):
        assert_same_steps(ours, original, image(size=size).to(quick))


# ----------------------------------------------------------------------------------------------------------------------
# Side effects


def counts(self, x):
    self.counter += 1
    return self.relu(self.bn(self.conv(x)))


def appends(self, x):
    y = self.relu(self.bn(self.conv(x)))
    self.features.append(y)
    return y


def keeps(self, x):
    y = self.relu(self.bn(self.conv(x)))
    self.last = y
    self.cache["y"] = y
    return y


def prints(self, x):
    print("forward")
    return self.relu(self.bn(self.conv(x)))


def warns(self, x):
    warnings.warn("forward", stacklevel=1)
    return self.relu(self.bn(self.conv(x)))


def counts_in_its_class(self, x):
    type(self).calls += 1
    return self.relu(self.bn(self.conv(x)))


def counted(forward):
    """A decorator that keeps count in its closure, as libraries do that time or cache a forward."""
    calls = [0]

    @functools.wraps(forward)
    def call(self, x):
        calls[0] += 1
        self.last = calls[0]
        return forward(self, x)

    call.calls = calls
    return call


SEEN: list[Any] = []


def tells_the_world(self, x):
    SEEN.append(x)
    return self.relu(self.bn(self.conv(x)))


def test_counters(quick):
    model = build(block(counts, counter=0), quick)
    ours = converted(model, image().to(quick), told=False)
    assert model.counter == 0
    assert ours.counter == 3


def test_lists_of_features(quick):
    model = build(block(appends, features=list), quick)
    ours = cnnfast.convert(model)
    assert ours.features == [], "the trace must leave nothing"
    assert model.features == []
    y = ours(image().to(quick))
    assert [id(feature) for feature in ours.features] == [id(y)]


def test_kept_results(quick):
    model = build(block(keeps, last=None, cache=dict), quick)
    ours = cnnfast.convert(model)
    assert (ours.last, ours.cache, model.last, model.cache) == (None, {}, None, {})
    for _ in range(2):
        y = ours(image().to(quick))
        assert ours.last is y
        assert ours.cache == {"y": y}


def test_prints(quick, capsys):
    model = build(block(prints), quick)
    ours = cnnfast.convert(model)
    capsys.readouterr()  # converting may have said it
    for _ in range(2):
        ours(image().to(quick))
        assert capsys.readouterr().out == "forward\n"


def test_warnings(quick):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = cnnfast.convert(build(block(warns), quick))
    for _ in range(2):
        with pytest.warns(UserWarning, match="forward"):
            ours(image().to(quick))


def test_counts_in_a_class(quick):
    kind = block(counts_in_its_class)
    kind.calls = 0
    ours = cnnfast.convert(build(kind, quick))
    assert kind.calls == 0, "the trace must leave nothing"
    ours(image().to(quick))
    ours(image().to(quick))
    assert type(ours).calls == 2


def test_counts_in_a_closure(quick):
    @counted
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))

    ours = cnnfast.convert(build(block(forward), quick))
    assert forward.calls == [0], "the trace must leave nothing"
    ours(image().to(quick))
    ours(image().to(quick))
    assert forward.calls == [2]


def test_effects_outside_of_the_model(quick):
    SEEN.clear()
    x = image().to(quick)
    ours = cnnfast.convert(build(block(tells_the_world), quick))
    assert SEEN == [], "no proxy of a tensor may get out"
    ours(x)
    assert [id(seen) for seen in SEEN] == [id(x)]
