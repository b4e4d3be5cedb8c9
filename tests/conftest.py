"""Shared parts of the tests."""

import logging
import os

import mmengine  # noqa: F401  # the first import writes YAPF's cache, not atomically: here it ends before workers start
import pytest
import torch
from hypothesis import settings

# The same cases in every run, so that a run says something about a change; `make fuzz` tries others, and more of them.
settings.register_profile("same", derandomize=True)
settings.load_profile("default" if os.environ.get("FUZZ") else "same")


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    assert not logging.root.manager.disable, "a module or a test has left all logs disabled"
