"""Schedule: when something is due, and its numbers in iterations."""

from types import SimpleNamespace

import pytest
from mmengine.runner import EpochBasedTrainLoop

from rep_plugin.errors import ArgumentError, HookError
from rep_plugin.openmmlab.hooks import Schedule


def training(epochs: int | None, iterations: int) -> SimpleNamespace:
    """What a schedule asks of a Runner; without epochs, of one with an iteration-based loop."""
    loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop) if epochs else object()
    return SimpleNamespace(train_loop=loop, max_epochs=epochs, max_iters=iterations)


def test_counts_how_often_it_was_due():
    assert [Schedule(1.5).count(epoch) for epoch in range(4)] == [0, 0, 1, 1]
    assert [Schedule(1, interval=2).count(epoch) for epoch in range(6)] == [0, 1, 1, 2, 2, 3]
    assert Schedule(interval=0.5).count(3) == 7


def test_epochs_become_iterations():
    runner = training(4, 40)
    assert Schedule(0.5, 2, 1).in_iterations(runner, "Hook") == Schedule(5, 20, 10, by_epoch=False)
    assert Schedule(3, 9, by_epoch=False).in_iterations(runner, "Hook") == Schedule(3, 9, by_epoch=False)
    assert Schedule(1).in_iterations(runner, "Hook") == Schedule(10, by_epoch=False)
    assert Schedule().length(runner, "Hook") == (4, "epochs")
    assert Schedule(by_epoch=False).length(training(None, 40), "Hook") == (40, "iterations")
    with pytest.raises(HookError, match="^Hook: by_epoch=True needs epochs, object has none: by_epoch=False$"):
        Schedule().in_iterations(training(None, 40), "Hook")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(begin=-1), "begin must be a number >= 0, got -1"),
        (dict(begin=None), "begin must be a number >= 0, got None"),
        (dict(begin="1"), "begin must be a number >= 0, got '1'"),
        (dict(end=float("inf")), "end must be a number >= 0 or None, got inf"),
        (dict(interval=True), "interval must be a number > 0 or None, got True"),
        (dict(begin=3, end=2), r"end must be >= begin \(=3\), got 2"),
        (dict(interval=0), "interval must be a number > 0 or None, got 0"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Schedule(**arguments)
