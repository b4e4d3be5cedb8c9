"""When a hook acts: from when on, until when, and how often."""

from dataclasses import dataclass, replace

from mmengine.runner import EpochBasedTrainLoop, Runner

from rep_plugin.arguments import NotNegative, Positive, checked
from rep_plugin.errors import ArgumentError, HookError


@checked
@dataclass(frozen=True)
class Schedule:
    """What is due at ``begin``, and then after every ``interval``, up to ``end``.

    Args:
        begin: Epochs or iterations that are over when it is due first; fractions of epochs too.
        end: When it ends; None: with the training.
        interval: Between two times; None: it is due once.
        by_epoch: All numbers count epochs; False: iterations.

    Raises:
        ArgumentError: A number is out of its range.

    Example:
        >>> from rep_plugin.openmmlab.hooks import Schedule
        >>> schedule = Schedule(begin=2, interval=3)
        >>> [schedule.count(epoch) for epoch in range(7)]
        [0, 0, 1, 1, 1, 2, 2]
    """

    begin: NotNegative = 0
    end: NotNegative | None = None
    interval: Positive | None = None
    by_epoch: bool = True

    def __post_init__(self):
        if self.end is not None and self.end < self.begin:
            raise ArgumentError(f"end must be >= begin (={self.begin}), got {self.end}")

    def count(self, progress: float) -> int:
        """Return how many times it was due when so many epochs (iterations) are over; ``end`` does not count here."""
        if progress < self.begin:
            return 0
        return 1 if self.interval is None else int((progress - self.begin) // self.interval) + 1

    def length(self, runner: Runner, hook: str) -> tuple[int, str]:
        """Return how many epochs (iterations) a training has, and the name of the unit.

        Args:
            runner: Of the training.
            hook: Name of the hook, for the message.

        Raises:
            HookError: Epochs are counted where the training loop has none.
        """
        if not self.by_epoch:
            return runner.max_iters, "iterations"
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            loop = type(runner.train_loop).__name__
            raise HookError(f"{hook}: by_epoch=True needs epochs, {loop} has none: by_epoch=False")
        return runner.max_epochs, "epochs"

    def in_iterations(self, runner: Runner, hook: str) -> "Schedule":
        """Return the same schedule in iterations of a training, rounded. Arguments and errors as of :meth:`length`."""
        iterations = runner.max_iters / self.length(runner, hook)[0]
        begin, end, interval = (
            None if value is None else round(value * iterations) for value in (self.begin, self.end, self.interval)
        )
        return replace(self, begin=begin, end=end, interval=interval and max(1, interval), by_epoch=False)
