"""fit, from data to a run."""

from __future__ import annotations

from tests.support.trainable import few_digits, small_net

from cnnfast.training import fit


def test_digits_are_learnt():
    run = fit(small_net(), few_digits(200), epochs=4, lr=1e-2, ema=None, progress=False)
    assert run.accuracy is not None
    assert len(run.history) == 4
    assert run.accuracy > 0.5
    assert run.history[-1].loss < run.history[0].loss
    assert not run.model.training
