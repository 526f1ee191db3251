"""Threads call a model while tune writes rows for it; and a model that was tuned is copied and pickled as any other."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

import cnnfast
from cnnfast import tuning
from cnnfast_kernels import tables
from tests.support.threads import elsewhere, together
from tests.support.tuned import LAST, Net, clock, convolution, image

pytestmark = pytest.mark.usefixtures("quick_tuning")


def integral(device):
    """A converted Net with integers for weights and statistics."""
    torch.manual_seed(0)
    model = Net().to(device)
    with torch.no_grad():
        for t in model.state_dict().values():
            t.copy_(torch.randint_like(t, -2, 3) if t.dim() > 1 else torch.ones_like(t))
    for norm in (model.bn1, model.bn2, model.bn3):
        norm.eps = 0.0
    return cnnfast.convert(model, memory_format=LAST).eval()


def test_threads_read_tables_and_plans_while_tune_writes(gpu, device):
    """Every call is served by one row or another, and right; once tune has ended, all threads have its rows."""
    model, x = convolution(device).to(memory_format=LAST), image(device).contiguous(memory_format=LAST)
    with torch.no_grad():
        model.weight.copy_(torch.randint_like(model.weight, -2, 3))  # sums are exact, whichever tile serves
        model.bias.fill_(1)
    model = cnnfast.convert(model)
    with torch.no_grad():
        expected = model(x)
    ended = threading.Event()

    def measure():
        try:
            return tuning.tune(model, x, measure=clock())
        finally:
            ended.set()

    def calls():
        results = []
        with torch.no_grad():
            while not ended.is_set() or len(results) < 2:
                results.append(model(x))
        return results

    result, *served = together(measure, calls, calls)
    assert result.ok, str(result)
    assert all(torch.equal(y, expected) for results in served for y in results)
    assert {row.key for row in result.rows} == {row.key for row in tables.read(tables.user_file(*gpu))}
    for row in result.rows:
        assert elsewhere(lambda key=row.key: tables.find(key)) == row


def test_a_tuned_model_is_copied_and_pickled(gpu, device):
    """Rows are kept by what is computed, not by the model: its copies have them too, and nothing of them is in it."""
    model, x = integral(device), image(device).contiguous(memory_format=LAST)
    before = [dict(vars(m)) for m in model.modules()], len(pickle.dumps(model))
    assert tuning.tune(model, x, measure=clock()).ok
    assert ([dict(vars(m)) for m in model.modules()], len(pickle.dumps(model))) == before
    with torch.no_grad(), cnnfast.trace() as calls:
        expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cnnfast.convert(model)):
        with torch.no_grad(), cnnfast.trace() as again:
            assert torch.equal(twin(x), expected)
        assert list(map(str, again)) == list(map(str, calls))
        assert again.launches
