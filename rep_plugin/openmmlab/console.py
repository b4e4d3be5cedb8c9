"""A console that shows a run at a glance: mmengine's long texts go into the log file alone."""

import logging
from typing import Any, TextIO

from mmengine.logging import MMLogger
from mmengine.runner import Runner

# How the texts begin that mmengine logs before the first epoch: about 500 lines.
LONG_TEXTS = (
    "System environment:",
    "Config:",
    "Hooks will be executed in the following order:",
    "paramwise_options -- ",
)


class _ShortConsole(logging.StreamHandler):
    """A console handler that names the log file once, in the place of all long texts."""

    def __init__(self, stream: TextIO, log_file: str):
        super().__init__(stream)
        self.log_file, self.named = log_file, False

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno <= logging.INFO and str(record.msg).lstrip("\n-").startswith(LONG_TEXTS):
            if self.named:
                return
            self.named = True
            text = f"environment, config, hooks and parameter options: {self.log_file}"
            record = logging.makeLogRecord(record.__dict__ | dict(msg=text, args=None))
        super().emit(record)


def shorten_console(logger: MMLogger) -> None:
    """Keep mmengine's long texts off the console of a logger that writes a file; the file gets every word.

    Args:
        logger: the runner's, before it logs the first text.
    """
    if not logger.log_file:
        return
    for i, handler in enumerate(logger.handlers):
        if type(handler) is logging.StreamHandler:
            short = _ShortConsole(handler.stream, logger.log_file)
            short.setFormatter(handler.formatter)
            short.setLevel(handler.level)
            logger.handlers[i] = short


def with_short_console(runner_class: type[Runner]) -> type[Runner]:
    """Return a runner class whose console is short from the first line on.

    Args:
        runner_class: mmengine's Runner, or one derived from it.

    Returns:
        A subclass of the same name.
    """

    def build_logger(self: Any, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super(short, self).build_logger(*args, **kwargs)
        shorten_console(logger)
        return logger

    short = type(runner_class.__name__, (runner_class,), dict(build_logger=build_logger, __doc__=runner_class.__doc__))
    return short
