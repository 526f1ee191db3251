"""fit, from data to a run."""

from __future__ import annotations

from tests.support.trainable import small_fit


def test_digits_are_learnt():
    run = small_fit(count=400, epochs=16, lr=1e-2)
    assert run.accuracy is not None
    assert len(run.history) == 16
    assert run.accuracy > 0.7
    assert run.history[-1].loss < run.history[0].loss
    assert not run.model.training
